"""Handwritten digits with a 64-64-10 ReLU network: `python -m examples.digits_mlp [--help]`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from examples._data import Split, digits
from examples._pictures import draw_grid
from examples._run import SEED, Example, main


class Classifier(nn.Module):
    """A network and softmax cross-entropy: forward gives the loss."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.criterion = nn.CrossEntropyLoss()

    def logits(self, x):
        return self.net(x.to(self.net[0].weight.dtype))

    def forward(self, x, y):
        return self.criterion(self.logits(x), y)


class ImageClassification(Example):
    """An MLP on the rows of a `Split`, trained with Adam."""

    sizes: tuple[int, ...]
    activation: type[nn.Module] = nn.ReLU
    batch = 64
    learning_rate = 2e-3

    def model(self, data: Split) -> nn.Module:
        layers = []
        for width, following in zip(self.sizes, self.sizes[1:], strict=False):
            layers += [nn.Linear(width, following), self.activation()]
        return Classifier(nn.Sequential(*layers[:-1]))

    def batches(self, data: Split, epoch: int):
        return data.batches(self.batch, SEED, epoch)

    def optimizer(self, model):
        return torch.optim.Adam(model.parameters(), self.learning_rate)

    def metrics(self, model, data: Split):
        predicted = model.logits(data.test_x).argmax(-1)
        return {"accuracy": (predicted == data.test_y).float().mean().item()}

    def draw(self, folder: Path, model, data: Split):
        picture = f"{self.name}_grid.png"
        draw_grid(folder / picture, data, model.logits(data.test_x).argmax(-1))
        return [picture]


class Digits(ImageClassification):
    name = "digits_mlp"
    title = "Handwritten digits, 64-64-10 ReLU"
    sizes = (64, 64, 10)
    epochs, quick_epochs = 40, 20
    goals = quick_goals = {"accuracy": 0.96}

    def load(self, quick):
        return digits()


if __name__ == "__main__":
    raise SystemExit(main(Digits))
