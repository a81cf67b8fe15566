"""Handwritten digits with a 64-64-10 ReLU network, trained with stock layers and with fastnn's.

    python -m examples.digits_mlp [--quick] [--stock | --swapped | --both] [--epochs N] [--out DIR]

Both trainings start from the same seed and see the same batches, so that their loss curves must
coincide: the program fails where they do not, or where the test accuracy is below 96 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from examples._data import Split, digits
from fastnn import swap_, use_backend
from fastnn.backend import refusal

SEED, BATCH, RATE = 0, 64, 2e-3
EPOCHS, QUICK_EPOCHS = 40, 20
ACCURACY = 0.96
# Of the loss, at every epoch. In this run stock layers in float32 and in float64 are 1.5e-6 apart,
# stock and swapped ones 1e-7; gradients that are wrong by 1 % show as 4e-5 within 3 epochs.
TOLERANCE = 2e-5


def build() -> tuple[nn.Module, nn.Module]:
    """The network and its loss (softmax cross-entropy)."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), nn.CrossEntropyLoss()


def train(model, criterion, data: Split, epochs: int) -> Iterator[float]:
    """Trains with Adam, an epoch for each item: its mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    order = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(data.train_x), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = criterion(model(data.train_x[batch]), data.train_y[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        yield total / len(data.train_x)


def train_all(kinds: Sequence[str], data: Split, epochs: int) -> dict[str, dict]:
    """Losses, seconds per epoch, predictions and accuracy for "stock" and "swapped" layers.

    The trainings take turns at every epoch, so that a busy machine slows both alike.
    """
    # By name where they are built: `auto` leaves a loss as small as this one to torch.
    built = refusal("native", "cross_entropy", "cpu", torch.float32) is None
    kernels = {"stock": "auto", "swapped": "native" if built else "auto"}
    models, trainings, runs = {}, {}, {}
    for kind in kinds:
        model, criterion = build()
        if kind == "swapped":
            swap_(nn.ModuleList([model, criterion]))
        models[kind] = model
        trainings[kind] = train(model, criterion, data, epochs)
        runs[kind] = {"losses": [], "epoch_seconds": []}
    with progress(f"training {' and '.join(kinds)}", epochs) as advance:
        for _ in range(epochs):
            for kind in kinds:
                started = time.perf_counter()
                with use_backend(kernels[kind]):
                    runs[kind]["losses"].append(next(trainings[kind]))
                runs[kind]["epoch_seconds"].append(time.perf_counter() - started)
            advance()
    for kind in kinds:
        with torch.no_grad():
            predicted = models[kind].eval()(data.test_x).argmax(-1)
        runs[kind]["predicted"] = predicted
        runs[kind]["accuracy"] = (predicted == data.test_y).float().mean().item()
        runs[kind]["seconds"] = sum(runs[kind]["epoch_seconds"])
    return runs


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar's `advance`; a plain line where rich is missing."""
    try:
        from rich.progress import Progress
    except ImportError:
        print(f"{title}, {total} epochs")
        yield lambda: None
        return
    with Progress() as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)


def relative_gap(first: list[float], second: list[float]) -> float:
    """The largest relative distance of two loss curves."""
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def draw_grid(path: Path, data: Split, predicted: torch.Tensor, columns: int = 12) -> None:
    from matplotlib.figure import Figure

    wrong = (predicted != data.test_y).nonzero().flatten().tolist()[: 2 * columns]
    right = (predicted == data.test_y).nonzero().flatten().tolist()
    shown = right[: 5 * columns - len(wrong)] + wrong
    figure = Figure(figsize=(columns, 6.6), layout="constrained")
    accuracy = (predicted == data.test_y).float().mean().item()
    figure.suptitle(
        f"test images, actual / predicted (accuracy {accuracy:.1%}; the wrong ones, last, in red)"
    )
    axes = figure.subplots(5, columns).flat
    for axis, index in zip(axes, shown, strict=True):
        axis.imshow(data.test_x[index].view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        actual, guess = data.test_y[index].item(), predicted[index].item()
        axis.set_title(f"{actual} / {guess}", color="black" if actual == guess else "red")
        axis.set_axis_off()
    figure.savefig(path, dpi=90)


def draw_curves(path: Path, runs: dict[str, dict], gap: float | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=False):
        epochs = range(1, len(run["losses"]) + 1)
        milliseconds = 1e3 * statistics.median(run["epoch_seconds"])
        label = f"{name}: accuracy {run['accuracy']:.1%}, {milliseconds:.0f} ms an epoch"
        axis.plot(epochs, run["losses"], style, linewidth=4 if style == "-" else 2, label=label)
    axis.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
    if gap is not None:
        axis.set_title(f"largest relative distance of the curves: {gap:.1e}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=90)


def run(out_dir, quick: bool = False, which: str = "both", epochs: int | None = None) -> dict:
    """Trains, draws digits_grid.png and digits_curves.png, writes digits.json; returns its content.

    Args:
        out_dir: where the three files go.
        quick: half as many epochs.
        which: "stock", "swapped" or "both".
        epochs: overrides the number of epochs.
    Returns:
        accuracy, seconds, epoch_seconds and losses by kind of layers, and max_relative_gap (None
        unless both ran).
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    data = digits()
    kinds = ("stock", "swapped") if which == "both" else (which,)
    epochs = epochs or (QUICK_EPOCHS if quick else EPOCHS)
    runs = train_all(kinds, data, epochs)
    gap = relative_gap(*(runs[kind]["losses"] for kind in kinds)) if len(kinds) == 2 else None
    draw_grid(out / "digits_grid.png", data, runs[kinds[-1]]["predicted"])
    draw_curves(out / "digits_curves.png", runs, gap)
    names = ("accuracy", "seconds", "epoch_seconds", "losses")
    result = {name: {kind: runs[kind][name] for kind in kinds} for name in names}
    result["max_relative_gap"] = gap
    (out / "digits.json").write_text(json.dumps(result, indent=1))
    return result


def failures(result: dict) -> list[str]:
    """What is wrong with a result, in words; empty when nothing is."""
    found = [
        f"{kind}: test accuracy {accuracy:.1%} is below {ACCURACY:.0%}"
        for kind, accuracy in result["accuracy"].items()
        if accuracy < ACCURACY
    ]
    gap = result["max_relative_gap"]
    if gap is not None and not gap <= TOLERANCE:
        found.append(f"the loss curves differ by {gap:.1e} (relative), {TOLERANCE:.0e} is allowed")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits_mlp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs")
    parser.add_argument("--epochs", type=int, help=f"default {EPOCHS}")
    parser.add_argument("--out", default="report", help="folder of the pictures and digits.json")
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("stock", "swapped", "both"):
        kinds.add_argument(f"--{kind}", dest="which", action="store_const", const=kind)
    parser.set_defaults(which="both")
    options = parser.parse_args(arguments)
    result = run(options.out, options.quick, options.which, options.epochs)
    for kind, accuracy in result["accuracy"].items():
        milliseconds = 1e3 * statistics.median(result["epoch_seconds"][kind])
        print(f"{kind:8} test accuracy {accuracy:.1%}, {milliseconds:.1f} ms an epoch (median)")
    if result["max_relative_gap"] is not None:
        print(f"loss curves: largest relative distance {result['max_relative_gap']:.1e}")
    print(f"pictures and digits.json are in {options.out}")
    wrong = failures(result)
    for line in wrong:
        print(f"FAILED: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
