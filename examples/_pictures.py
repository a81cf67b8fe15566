"""Pictures that more than one example draws."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples._data import Split


def draw_grid(path: Path, data: Split, predicted: Tensor, columns: int = 12) -> None:
    """Square test images titled actual / predicted, wrong ones last and in red."""
    from matplotlib.figure import Figure

    wrong = (predicted != data.test_y).nonzero().flatten().tolist()[: 2 * columns]
    right = (predicted == data.test_y).nonzero().flatten().tolist()
    shown = right[: 5 * columns - len(wrong)] + wrong
    figure = Figure(figsize=(columns, 6.6), layout="constrained")
    accuracy = (predicted == data.test_y).float().mean().item()
    figure.suptitle(
        f"test images, actual / predicted (accuracy {accuracy:.1%}; the wrong ones, last, in red)"
    )
    side = round(data.test_x.shape[1] ** 0.5)
    axes = figure.subplots(5, columns).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, index in zip(axes, shown, strict=False):  # there may be less to show
        image = data.test_x[index].view(side, side).numpy()
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        actual, guess = data.test_y[index].item(), predicted[index].item()
        axis.set_title(f"{actual} / {guess}", color="black" if actual == guess else "red")
    figure.savefig(path, dpi=90)


def draw_boundary(path: Path, title: str, logits: Callable[[Tensor], Tensor], data: Split) -> None:
    """Points of a plane in two classes, over the probability that a model gives the second one."""
    from matplotlib.figure import Figure

    side = torch.linspace(-0.6, 1.6, 200)
    chance = logits(torch.cartesian_prod(side, side)).float().softmax(-1)[:, 1]
    chance, side = chance.view(200, 200).T.numpy(), side.numpy()
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    shades = axis.contourf(side, side, chance, levels=10, cmap="RdBu_r", alpha=0.6)
    axis.contour(side, side, chance, levels=[0.5], colors="black")
    figure.colorbar(shades, label="probability of class 1")
    for label, colour in enumerate(("#1f4e8c", "#b32626")):
        x, y = data.test_x[data.test_y == label].T.numpy()
        axis.plot(x, y, ".", color=colour, markersize=4, label=f"class {label}")
    axis.set(title=title, xlabel="x0", ylabel="x1")
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=90)


def draw_confusion(
    path: Path, title: str, actual: Tensor, predicted: Tensor, names: Sequence[str]
) -> None:
    """How many of each class (a row) were taken for each (a column)."""
    from matplotlib.figure import Figure

    size = len(names)
    counts = torch.zeros(size, size, dtype=torch.int64)
    counts.index_put_((actual, predicted), torch.ones_like(actual), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    inches = 2.5 + 0.22 * max(size, 16)
    figure = Figure(figsize=(inches, inches), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    font = 9 if size <= 16 else 6
    axis.set_xticks(range(size), names, rotation=90, fontsize=font)
    axis.set_yticks(range(size), names, fontsize=font)
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axis.text(
            column, row, counts[row, column].item(), ha="center", va="center", color=colour,
            fontsize=font,
        )  # fmt: skip
    accuracy = (actual == predicted).float().mean().item()
    axis.set(xlabel="predicted", ylabel="actual", title=f"{title}: {accuracy:.2%}")
    figure.savefig(path, dpi=90)


def draw_attention(
    path: Path, title: str, weights: Tensor, queries: Sequence[str], keys: Sequence[str]
) -> None:
    """The share of its attention that each query (a row) gives to each key (a column)."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(2.5 + 0.17 * max(len(keys), 16), 2 + 0.17 * max(len(queries), 16)),
        layout="constrained",
    )
    axis = figure.subplots()
    shown = axis.imshow(weights.float().numpy(), cmap="viridis", vmin=0)
    axis.set_xticks(range(len(keys)), keys, rotation=90, fontsize=7)
    axis.set_yticks(range(len(queries)), queries, fontsize=7)
    axis.set(title=title, xlabel="attended to", ylabel="from")
    figure.colorbar(shown, shrink=0.6)
    figure.savefig(path, dpi=90)


def draw_text(path: Path, title: str, text: str, columns: int = 100) -> None:
    """A text as a picture, its long lines broken."""
    from matplotlib.figure import Figure

    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, columns) or [""]]
    figure = Figure(figsize=(columns * 0.09, 0.8 + 0.17 * len(lines)))
    # No mathematics: a dollar sign is one.
    figure.text(
        0.02, 1 - 0.55 / figure.get_figheight(), "\n".join(lines), family="monospace", fontsize=10,
        va="top", parse_math=False,
    )  # fmt: skip
    figure.suptitle(title, y=1 - 0.1 / figure.get_figheight(), va="top")
    figure.savefig(path, dpi=90)
