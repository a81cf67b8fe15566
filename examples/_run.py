"""How every example runs: the same model twice, with stock layers and after `swap_`, trained side
by side on the same batches; compared, timed, drawn and written down.

An example is a subclass of `Example`, and its module's last line is
`raise SystemExit(main(ThatClass))`; a module with several names them all.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.memory import in_fresh_process, step_peak
from examples._data import Unavailable
from fastnn import swap_, use_backend
from fastnn.swap import SwapReport

SEED = 0
DTYPES = ("fp32", "bf16", "autocast")
KINDS = ("stock", "swapped")
SKIPPED = 77  # the exit status of a program whose data cannot be had
CURVE_POINTS = 20  # at least so many are drawn, parts of an epoch where the epochs are fewer


class Example(abc.ABC):
    """One model on one data set."""

    name: str  # of the files it writes: NAME.json, NAME_curves.png, NAME_*.png
    title: str
    epochs: int
    quick_epochs: int
    # Least value of a metric after the last epoch; without --quick and with it.
    goals: dict[str, float] = {}
    quick_goals: dict[str, float] = {}
    falling: tuple[str, ...] = ()  # metrics that end below where they were after the first epoch
    # The largest relative distance of the two loss curves. With dropout, whose masks differ between
    # stock and swapped layers, the curves agree only on average.
    curve_tolerance = 2e-5
    # Of the first step's loss and gradients without dropout, relative.
    step_tolerance = {"fp32": 1e-4, "bf16": 5e-2, "autocast": 5e-2}
    clip: float | None = None  # the gradients' norm
    backend = "auto"  # fastnn's, for the swapped layers
    swap_options: dict = {}

    @abc.abstractmethod
    def load(self, quick: bool):
        """The data, by a loader of `examples._data`."""

    @abc.abstractmethod
    def model(self, data) -> nn.Module:
        """A module whose forward takes a batch's tensors and returns the loss. Called after
        seeding, once a kind of layers: both start from the same parameters."""

    @abc.abstractmethod
    def batches(self, data, epoch: int) -> Iterable[Sequence[Tensor]]:
        """The training batches of an epoch, the same whenever asked; as many in every epoch."""

    @abc.abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer: ...

    @abc.abstractmethod
    def metrics(self, model: nn.Module, data) -> dict[str, float]:
        """Of the test data; called after each epoch, in eval mode and without gradients."""

    @abc.abstractmethod
    def draw(self, folder: Path, model: nn.Module, data) -> list[str]:
        """The example's pictures; returns their file names."""

    def swap(self, model: nn.Module) -> SwapReport | str:
        return swap_(model, **self.swap_options)

    def rate(self, done: float) -> float:
        """Factor of the learning rate when that share of the training is done."""
        return 1.0

    def failures(self, result: dict) -> list[str]:
        """What is wrong with a result, in words; empty when nothing is."""
        goals = self.quick_goals if result["quick"] else self.goals
        found = []
        for kind, run in result["runs"].items():
            if not all(map(math.isfinite, run["losses"])):
                found.append(f"{kind}: the training loss is not finite")
            for metric, least in goals.items():
                reached = run["metrics"][metric][-1]
                if not reached >= least:
                    found.append(f"{kind}: {metric} {reached:.4g} is below {least:.4g}")
            for metric in self.falling:
                first, *others = run["metrics"][metric]
                if others and not others[-1] < first:
                    found.append(
                        f"{kind}: {metric} did not fall: {first:.4g}, then {others[-1]:.4g}"
                    )
        for what, allowed in (
            ("curve_gap", self.curve_tolerance),
            ("step_error", self.step_tolerance[result["dtype"]]),
        ):
            if result[what] is not None and not result[what] <= allowed:
                found.append(f"{what} {result[what]:.1e} is above {allowed:.0e}")
        return found


class _Training:
    """One kind of layers: its model, optimizer, random state and record."""

    def __init__(self, example: Example, kind: str, data, dtype: str, backend: str):
        torch.manual_seed(SEED)
        self.example, self.dtype, self.backend = example, dtype, backend
        self.model = example.model(data).train()  # a pretrained part comes in eval mode
        if dtype == "bf16":
            self.model.to(torch.bfloat16)
        self.report = str(example.swap(self.model)) if kind == "swapped" else None
        self.optimizer = example.optimizer(self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        torch.manual_seed(SEED)
        self.random = torch.get_rng_state()
        self.losses: list[float] = []  # of epochs
        self.curve: list[float] = []  # of parts of epochs
        self.metrics: dict[str, list[float]] = {}
        self.step_seconds: list[float] = []

    @contextlib.contextmanager
    def context(self):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "autocast")
        with use_backend(self.backend), autocast:
            yield

    def step(self, batch: Sequence[Tensor], done: float) -> float:
        """One training step; returns its loss."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.example.rate(done)
        torch.set_rng_state(self.random)
        started = time.perf_counter()
        self.optimizer.zero_grad()
        with self.context():
            loss = self.model(*batch)
        with use_backend(self.backend):
            loss.backward()
        if self.example.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.example.clip)
        self.optimizer.step()
        value = loss.item()
        self.step_seconds.append(time.perf_counter() - started)
        self.random = torch.get_rng_state()
        return value

    def evaluate(self, data) -> None:
        self.model.eval()
        with torch.no_grad(), self.context():
            for metric, value in self.example.metrics(self.model, data).items():
                self.metrics.setdefault(metric, []).append(value)
        self.model.train()

    def first_step(self, batch) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients without dropout."""
        self.model.eval()
        with self.context():
            loss = self.model(*batch)
        with use_backend(self.backend):
            loss.backward()
        gradients = [p.grad.float() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        self.model.train()
        return loss.detach().float(), gradients


def _largest(values: Iterable[float]) -> float:
    """The maximum, and NaN where one is: Python's own would depend on the order."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def _step_error(stock: _Training, swapped: _Training, batch) -> float:
    """The larger of the relative distances of the losses and of all gradients as one vector."""
    (loss, gradients), (other_loss, others) = stock.first_step(batch), swapped.first_step(batch)
    distance = sum((a - b).square().sum().item() for a, b in zip(gradients, others, strict=True))
    norm = sum(gradient.square().sum().item() for gradient in gradients)
    return _largest((abs((other_loss - loss) / loss).item(), (distance / norm) ** 0.5))


def relative_gap(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest relative distance of two loss curves."""
    return _largest(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def _peak(example_class, kind: str, quick: bool, dtype: str, backend: str) -> int:
    """Bytes at the peak of a training step above what is held before it: the first epoch's largest
    batch, after a step on its smallest in which the optimizer makes its state."""
    example = example_class()
    data = example.load(quick)
    training = _Training(example, kind, data, dtype, backend)

    def step(batch):
        training.step(batch, 0.0)
        training.optimizer.zero_grad()
        return ()

    step(min(example.batches(data, 0), key=_elements))
    batch = max(example.batches(data, 0), key=_elements)
    return step_peak(lambda: step(batch))[0]


def _elements(batch: Sequence[Tensor]) -> int:
    return batch[0].numel()


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar's `advance`; a plain line where rich is missing."""
    try:
        from rich.progress import Progress
    except ImportError:
        print(f"{title}, {total} steps")
        yield lambda: None
        return
    with Progress() as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)


def draw_curves(path: Path, title: str, runs: dict[str, dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (kind, run), style in zip(runs.items(), ("-", "--"), strict=False):
        label = f"{kind}: {1e3 * run['step_seconds']:.3g} ms a step"
        curve, epochs = run["curve"], len(run["losses"])
        places = [(index + 1) * epochs / len(curve) for index in range(len(curve))]
        axis.plot(places, curve, style, linewidth=4 if style == "-" else 2, label=label)
    axis.set(xlabel="epoch", ylabel="training loss", yscale="log", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=90)


def _train(trainings: dict[str, _Training], example: Example, data, epochs: int) -> None:
    """The kinds take turns at every step, so that a busy machine slows both alike."""
    order = list(trainings)
    steps = sum(1 for _ in example.batches(data, 0))
    part = math.ceil(steps / math.ceil(CURVE_POINTS / epochs))
    said = time.perf_counter()
    with progress(f"{example.name}: {' and '.join(order)}", epochs * steps) as advance:
        for epoch in range(epochs):
            losses: dict[str, list[float]] = {kind: [] for kind in order}
            sizes = []
            for index, batch in enumerate(example.batches(data, epoch)):
                order.reverse()
                done = (epoch * steps + index) / (epochs * steps)
                sizes.append(len(batch[0]))
                for kind in order:
                    losses[kind].append(trainings[kind].step(batch, done) * sizes[-1])
                advance()
            for kind, training in trainings.items():
                training.losses.append(sum(losses[kind]) / sum(sizes))
                for first in range(0, steps, part):
                    taken = slice(first, first + part)
                    training.curve.append(sum(losses[kind][taken]) / sum(sizes[taken]))
                training.evaluate(data)
            if time.perf_counter() - said > 10.0:  # a long training tells how it goes
                said = time.perf_counter()
                for kind, training in trainings.items():
                    print(f"epoch {epoch + 1} of {epochs}, {kind}: {_state(training)}", flush=True)


def _state(training: _Training) -> str:
    metrics = (f"{name} {values[-1]:.4g}" for name, values in training.metrics.items())
    return f"loss {training.losses[-1]:.4g}, " + ", ".join(metrics)


def run(
    example_class: type[Example], out_dir, *, quick: bool = False, which: str = "both",
    epochs: int | None = None, dtype: str = "fp32", backend: str | None = None,
    memory: bool = True,
) -> dict:  # fmt: skip
    """Trains, draws, writes NAME.json into `out_dir` and returns its content.

    Args:
        example_class: what to run.
        out_dir: where the files go.
        quick: less data or fewer epochs, as the example says.
        which: "stock", "swapped" or "both".
        epochs: overrides the number of epochs.
        dtype: "fp32", "bf16" (the parameters too) or "autocast" (to bfloat16).
        backend: fastnn's, for the swapped layers; overrides the example's.
        memory: measure the peak of a step, each kind in a fresh process.
    Returns:
        runs (a kind of layers: losses and metrics by epoch, the finer curve, step_seconds,
        total_seconds of all steps, peak_bytes), and of both kinds: speed_ratio and memory_ratio
        (stock over swapped; the latter where a megabyte is needed), curve_gap, step_error.
    Raises:
        Unavailable: the example's data cannot be had.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    example = example_class()
    data = example.load(quick)
    kinds = KINDS if which == "both" else (which,)
    epochs = epochs or (example.quick_epochs if quick else example.epochs)
    backend = backend or example.backend
    trainings = {kind: _Training(example, kind, data, dtype, backend) for kind in kinds}
    both = list(trainings.values()) if len(kinds) == 2 else None
    step_error = None
    if both:
        step_error = _step_error(*both, next(iter(example.batches(data, 0))))
    _train(trainings, example, data, epochs)
    runs = {
        kind: {
            "losses": training.losses,
            "curve": training.curve,
            "metrics": training.metrics,
            "step_seconds": statistics.median(training.step_seconds),
            "total_seconds": sum(training.step_seconds),
        }
        for kind, training in trainings.items()
    }
    if memory:
        for kind in kinds:
            runs[kind]["peak_bytes"] = in_fresh_process(
                _peak, example_class, kind, quick, dtype, backend
            )
    result = {
        "name": example.name, "title": example.title, "quick": quick, "dtype": dtype,
        "machine": machine.describe(torch.device("cpu")), "epochs": epochs, "runs": runs,
        "speed_ratio": None, "memory_ratio": None, "curve_gap": None, "step_error": step_error,
        "swapped": trainings["swapped"].report if "swapped" in trainings else None,
    }  # fmt: skip
    if both:
        # The first steps also bring in libraries and fill the allocator.
        pairs = list(zip(both[0].step_seconds, both[1].step_seconds, strict=True))
        result["speed_ratio"] = statistics.median(a / b for a, b in pairs[2:] or pairs)
        result["curve_gap"] = relative_gap(both[0].losses, both[1].losses)
        if memory:
            peaks = [runs[kind]["peak_bytes"] for kind in KINDS]
            if min(peaks) >= 2**20:  # less drowns in the pages that any step touches
                result["memory_ratio"] = peaks[0] / peaks[1]
    result["failures"] = example.failures(result)
    result["pictures"] = [f"{example.name}_curves.png"]
    written = out / f"{example.name}.json"
    written.write_text(json.dumps(result, indent=1))  # before a picture can fail
    draw_curves(out / result["pictures"][0], example.title, runs)
    with torch.no_grad(), use_backend(backend):
        result["pictures"] += example.draw(out, trainings[kinds[-1]].model.eval(), data)
    written.write_text(json.dumps(result, indent=1))
    return result


def describe(result: dict) -> Iterator[str]:
    """A result in lines for the terminal."""
    for kind, run in result["runs"].items():
        parts = [f"{name} {values[-1]:.4g}" for name, values in run["metrics"].items()]
        parts.append(f"{1e3 * run['step_seconds']:.3g} ms a step (median)")
        if "peak_bytes" in run:
            parts.append(f"{run['peak_bytes'] / 2**20:.1f} MB at a step's peak")
        yield f"{kind:8} {', '.join(parts)}"
    if result["speed_ratio"] is not None:
        yield f"step time, stock over swapped: {result['speed_ratio']:.2f}"
        if result["memory_ratio"] is not None:
            yield f"peak memory, stock over swapped: {result['memory_ratio']:.2f}"
        gap, error = result["curve_gap"], result["step_error"]
        yield f"loss curves {gap:.1e} apart, the first step without dropout {error:.1e} (relative)"
    for line in result["failures"]:
        yield f"FAILED: {line}"


def main(
    *example_classes: type[Example], arguments: list[str] | None = None, run: Callable = run
) -> int:
    """The command line of a module's examples, run by `run`; returns the exit status."""
    module = example_classes[0].__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description="; ".join(e.title for e in example_classes)
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs, or less data")
    parser.add_argument("--epochs", type=int, help="in place of the example's own number")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", default="report/models", help="folder of pictures and the JSON")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    kinds = parser.add_mutually_exclusive_group()
    for kind in (*KINDS, "both"):
        kinds.add_argument(f"--{kind}", dest="which", action="store_const", const=kind)
    parser.set_defaults(which="both")
    if len(example_classes) > 1:
        names = [example.name for example in example_classes]
        parser.add_argument("--only", choices=names, help="one of the module's examples")
    options = vars(parser.parse_args(arguments))
    only, out = options.pop("only", None), options.pop("out")
    failed = False
    for example in example_classes:
        if only in (None, example.name):
            print(example.title)
            try:
                result = run(example, out, **options)
            except Unavailable as reason:
                print(f"SKIPPED: {reason}")
                return SKIPPED
            for line in describe(result):
                print(line)
            print(f"pictures and {result['name']}.json are in {out}")
            failed |= bool(result["failures"])
    return 1 if failed else 0
