"""MNIST with a 784-128-10 and a 784-64-64-10 ReLU network: `python -m examples.mnist_mlp [--help]`.

With --quick, 5,000 of its images.
"""

from __future__ import annotations

from examples._data import mnist, mnist_5k
from examples._run import main
from examples.digits_mlp import ImageClassification


class Mnist(ImageClassification):
    name = "mnist_mlp"
    title = "MNIST, 784-128-10 ReLU"
    sizes = (784, 128, 10)
    learning_rate = 1e-3
    epochs, quick_epochs = 12, 20
    goals = {"accuracy": 0.978}
    quick_goals = {"accuracy": 0.92}

    def load(self, quick):
        if quick:
            return mnist_5k()
        # Roundings switch units of ReLU, and 11,000 steps of Adam amplify that: stock layers in
        # fp32 and in fp64 end 9e-4 apart, stock and swapped ones 2e-3 (9e-3 in another order).
        self.curve_tolerance = 2e-2
        return mnist()

    def rate(self, done):
        return 1.0 - done


class DeepMnist(Mnist):
    name = "mnist_deep_mlp"
    title = "MNIST, 784-64-64-10 ReLU"
    sizes = (784, 64, 64, 10)
    goals = {"accuracy": 0.972}
    quick_goals = {"accuracy": 0.91}


if __name__ == "__main__":
    raise SystemExit(main(Mnist, DeepMnist))
