"""A straight line fitted by SGD: `python -m examples.linear_regression [--help]`.

`swap_` leaves an nn.Linear without an activation to torch; here a `LinearAct` of the identity
takes its place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples._data import Split
from examples._run import SEED, Example, main
from fastnn import LinearAct

SLOPE, INTERCEPT, NOISE = 2.0, -0.5, 0.2


def noisy_line(count: int) -> Split:
    random = torch.Generator().manual_seed(SEED)
    x = 2 * torch.rand(count, 1, generator=random) - 1
    y = SLOPE * x + INTERCEPT + NOISE * torch.randn(count, 1, generator=random)
    half = count // 2
    return Split(x[:half], y[:half], x[half:], y[half:])


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.criterion = nn.MSELoss()

    def forward(self, x, y):
        dtype = self.layer.weight.dtype
        return self.criterion(self.layer(x.to(dtype)), y.to(dtype))


class LinearRegression(Example):
    name = "linear_regression"
    title = "Linear regression, one weight and a bias"
    epochs, quick_epochs = 20, 20
    # The share of the variance that is explained; the noise allows 0.97.
    goals = quick_goals = {"r2": 0.95}
    batch = 32

    def load(self, quick):
        return noisy_line(2000)

    def model(self, data):
        return Line()

    def swap(self, model):
        layer = LinearAct(1, 1, activation="identity")
        layer.load_state_dict(model.layer.state_dict())
        model.layer = layer.to(model.layer.weight.dtype)
        return "layer  Linear  LinearAct  by this example: torch's own GEMM is all it needs"

    def batches(self, data: Split, epoch: int):
        return data.batches(self.batch, SEED, epoch)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def metrics(self, model, data: Split):
        residual = model(data.test_x, data.test_y) / data.test_y.var(unbiased=False)
        return {"r2": 1.0 - residual.item()}

    def draw(self, folder: Path, model, data: Split):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        weight, bias = model.layer.weight.item(), model.layer.bias.item()
        points = data.test_x.numpy(), data.test_y.numpy()
        axis.plot(*points, ".", color="#9097a1", label="test points")
        ends = np.array([-1.0, 1.0])
        axis.plot(ends, SLOPE * ends + INTERCEPT, linewidth=4, label="the line behind the points")
        axis.plot(ends, weight * ends + bias, "--", label=f"fitted: {weight:.3f} x {bias:+.3f}")
        axis.set(xlabel="x", ylabel="y", title=self.title)
        axis.legend()
        picture = f"{self.name}_fit.png"
        figure.savefig(folder / picture, dpi=90)
        return [picture]


if __name__ == "__main__":
    raise SystemExit(main(LinearRegression))
