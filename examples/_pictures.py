"""Pictures that more than one example draws."""

from __future__ import annotations

from pathlib import Path

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
    for axis, index in zip(figure.subplots(5, columns).flat, shown, strict=True):
        axis.imshow(data.test_x[index].view(side, side).float(), cmap="gray_r", vmin=0, vmax=1)
        actual, guess = data.test_y[index].item(), predicted[index].item()
        axis.set_title(f"{actual} / {guess}", color="black" if actual == guess else "red")
        axis.set_axis_off()
    figure.savefig(path, dpi=90)
