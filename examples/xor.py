"""XOR with a 2-8-2 network, of ReLU and of sigmoid units: `python -m examples.xor [--help]`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from examples._data import Split
from examples._pictures import draw_boundary
from examples._run import SEED, main
from examples.digits_mlp import ImageClassification


def noisy_xor(count: int, noise: float = 0.15) -> Split:
    """Points around the corners of the unit square, half of them for the test; y is x0 xor x1."""
    random = torch.Generator().manual_seed(SEED)
    corners = torch.randint(2, (count, 2), generator=random)
    x = corners + noise * torch.randn(count, 2, generator=random)
    y = corners[:, 0] ^ corners[:, 1]
    half = count // 2
    return Split(x[:half], y[:half], x[half:], y[half:])


class Xor(ImageClassification):
    name = "xor_relu"
    title = "XOR, 2-8-2 ReLU"
    sizes = (2, 8, 2)
    batch = 32
    learning_rate = 2e-2
    epochs, quick_epochs = 60, 60
    goals = quick_goals = {"accuracy": 0.98}

    def load(self, quick):
        return noisy_xor(1000)

    def draw(self, folder: Path, model, data: Split):
        picture = f"{self.name}_boundary.png"
        draw_boundary(folder / picture, self.title, model.logits, data)
        return [picture]


class SigmoidXor(Xor):
    name = "xor_sigmoid"
    title = "XOR, 2-8-2 sigmoid"
    activation = nn.Sigmoid


if __name__ == "__main__":
    raise SystemExit(main(Xor, SigmoidXor))
