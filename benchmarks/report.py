"""`python -m benchmarks.report`: a self-contained HTML page from a results file, and one of the
examples that were run.

Plots are inline SVG whose text takes the page's colour, so that they read in light and dark.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
import statistics
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.__main__ import RESULTS, megabytes, milliseconds

TITLES = {
    "linear_act": "Linear + activation",
    "dropout": "Dropout",
    "cross_entropy": "Cross-entropy",
    "linear_cross_entropy": "Linear + cross-entropy",
    "attention": "Scaled dot-product attention",
    "encoder_layer": "A Transformer encoder layer, a whole training step",
}
OURS, EAGER, LOSS = "#2f7fd6", "#9097a1", "#d64545"
DTYPE_COLOURS = {"fp32": "#2f7fd6", "bf16": "#d9822b", "fp16": "#3a9d6a", "fp64": "#8e5bc0"}
# Drawn in this colour, replaced by CSS's currentColor in the SVG.
INK = "#0a0b0c"
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page's width rules; the view box keeps the proportions.
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1))


def _png(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def rate(entry: dict) -> str:
    if entry["rate_unit"] == "TFLOP/s" and entry["rate"] < 0.1:
        return f"{1e3 * entry['rate']:.3g} GFLOP/s"
    return f"{entry['rate']:.3g} {entry['rate_unit']}"


def _ours(row: dict) -> dict | None:
    return row["providers"][row["ours"]] if row["ours"] else None


def plot_ratios(rows: list[dict]) -> Markup:
    """Bars from 1.0 to the ratio, with the spread of the rounds; the losing ones in red."""
    groups = {}
    for row in rows:
        groups.setdefault(row["family"], []).append(row)
    ratios = [_ours(row)[key] for row in rows for key in ("ratio", "ratio_p20", "ratio_p80")]
    low, high = min(0.8, *ratios) / 1.05, max(2.0, *ratios) * 1.25
    heights = [len(group) + 0.8 for group in groups.values()]
    figure = Figure(figsize=(9.5, 0.27 * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axis, (family, group) in zip(axes[:, 0], groups.items(), strict=True):
        for place, row in enumerate(group):
            entry = _ours(row)
            ratio = entry["ratio"]
            axis.barh(
                place, ratio - 1, left=1, height=0.66, color=LOSS if row["loses"] else OURS,
                alpha=0.9,
            )  # fmt: skip
            axis.plot([entry["ratio_p20"], entry["ratio_p80"]], [place] * 2, color=INK, lw=1)
            edge = max(ratio, entry["ratio_p80"], 1.0) * 1.02
            axis.text(edge, place, f"{ratio:.2f}", va="center", fontsize=9)
        axis.set_yticks(range(len(group)), [row["label"] for row in group])
        axis.invert_yaxis()
        axis.axvline(1, color=INK, lw=1.2)
        axis.set_title(TITLES.get(family, family))
        axis.set_xscale("log", base=2)
        axis.set_xlim(low, high)
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= t <= high]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color=EAGER, alpha=0.25)
    axes[-1, 0].set_xlabel("times faster than PyTorch eager (thin line: 20th to 80th percentile)")
    return _svg(figure)


def plot_roofline(rows: list[dict], roofs: dict) -> Markup:
    """Achieved FLOP/s over FLOPs per byte, an arrow from eager to fastnn for each case."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axis = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    copy = roofs["copy_bytes_per_s"]
    for dtype, peak in roofs["gemm_flops_per_s"].items():
        ridge = peak / copy
        colour = DTYPE_COLOURS[dtype]
        if ridge < high:
            axis.plot([max(low, ridge), high], [peak / 1e12] * 2, color=colour, lw=1.5)
            axis.text(
                max(low, ridge) * 1.15, peak / 1e12 * 1.08,
                f"GEMM {dtype}, {peak / 1e12:.2f} TFLOP/s", color=colour, va="bottom", fontsize=9,
            )  # fmt: skip
    end = min(high, max(roofs["gemm_flops_per_s"].values()) / copy)
    if end > low:
        axis.plot([low, end], [low * copy / 1e12, end * copy / 1e12], color=INK, lw=1.5)
        middle = math.sqrt(low * end)
        axis.annotate(
            f"copy, {copy / 1e9:.1f} GB/s", (middle, middle * copy / 1e12), (10, -8),
            textcoords="offset points", va="top", fontsize=9,
        )  # fmt: skip
    for row, intensity in zip(rows, intensities, strict=True):
        colour = DTYPE_COLOURS[row["dtype"]]
        speeds = [
            row["flops"] / entry["seconds"] / 1e12
            for entry in (row["providers"]["eager"], _ours(row))
        ]
        axis.plot([intensity] * 2, speeds, color=colour, lw=1, alpha=0.5)
        axis.plot(intensity, speeds[0], "o", mfc="none", mec=colour, ms=6)
        mark = LOSS if row["loses"] else colour
        axis.plot(intensity, speeds[1], "o", color=mark, mec=mark, ms=6)
    axis.plot([], [], "o", mfc="none", mec=INK, label="PyTorch eager")
    axis.plot([], [], "o", color=INK, label="fastnn")
    axis.plot([], [], "o", color=LOSS, label="fastnn, slower than eager")
    axis.set(
        xscale="log", yscale="log", xlim=(low, high), xlabel="least FLOPs per least byte moved",
        ylabel="TFLOP/s",
    )  # fmt: skip
    axis.grid(color=EAGER, alpha=0.25)
    axis.legend(loc="lower right")
    return _svg(figure)


def plot_memory(rows: list[dict]) -> Markup | None:
    """Workspace beyond inputs and results; None when no case needs a megabyte."""
    shown = []
    for row in rows:
        pair = [e.get("extra_bytes") for e in (row["providers"]["eager"], _ours(row))]
        if None not in pair and max(pair) >= 2**20:
            shown.append((row["label"], *(count / 2**20 for count in pair)))
    if not shown:
        return None
    figure = Figure(figsize=(9.5, 0.36 * len(shown) + 0.8), layout="constrained")
    axis = figure.subplots()
    for place, (_, eager, ours) in enumerate(shown):
        for offset, count, colour in ((-0.19, eager, EAGER), (0.19, ours, OURS)):
            axis.barh(place + offset, max(count, 0.1), height=0.36, color=colour)
            axis.text(max(count, 0.1) * 1.04, place + offset, f"{count:.1f}", va="center", size=8)
    axis.set_yticks(range(len(shown)), [label for label, *_ in shown])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(0.1, max(max(pair) for _, *pair in shown) * 1.8)
    axis.set_xlabel("MB beyond inputs and results (log scale)")
    axis.tick_params(axis="y", length=0)
    axis.barh([], [], color=EAGER, label="PyTorch eager")
    axis.barh([], [], color=OURS, label="fastnn")
    figure.legend(loc="outside upper right", ncols=2)
    axis.grid(axis="x", color=EAGER, alpha=0.25)
    return _svg(figure)


def _families(rows: list[dict]) -> list[dict]:
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        ratios = [_ours(row)["ratio"] for row in rows if row["family"] == family]
        found.append(
            {
                "title": TITLES.get(family, family),
                "cases": len(ratios),
                "median": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "losing": sum(ratio < common.LOSES_BELOW for ratio in ratios),
            }
        )
    return found


def _models(folder: Path | None) -> list[dict]:
    """What the examples wrote into a folder, their pictures as data."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        result = json.loads(path.read_text())
        result["pictures"] = [_png(folder / name) for name in result["pictures"]]
        found.append(result)
    return found


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ms=milliseconds, mb=megabytes, rate=rate, number=number)
    return environment


def number(value: float | None, form: str) -> str:
    return "–" if value is None else form % value


def render(results: dict, models: list[dict] | tuple = ()) -> str:
    served = [row for row in results["rows"] if row["ours"]]
    with matplotlib.rc_context(STYLE):
        plots = {
            "ratios": plot_ratios(served) if served else None,
            "roofline": plot_roofline(served, results["roofs"]) if served else None,
            "memory": plot_memory(served) if served else None,
        }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            machine=results["machine"],
            roofs=results["roofs"],
            rows=results["rows"],
            served=served,
            families=_families(served),
            losing=[row for row in served if row["loses"]],
            plots=plots,
            models=models,
            titles=TITLES,
            ours_names=common.OURS,
        )
    )


def write(results: dict, out: Path, models: Path | None = None) -> Path:
    """Writes index.html and, of the examples in a folder, models.html."""
    out.mkdir(parents=True, exist_ok=True)
    trained = _models(models)
    page = out / "index.html"
    page.write_text(render(results, trained), encoding="utf-8")
    if trained:
        text = _environment().get_template("models.html.j2").render(models=trained)
        (out / "models.html").write_text(text, encoding="utf-8")
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, help="default: the newest of benchmarks/results")
    parser.add_argument("--models", type=Path, help="folder that the examples wrote")
    parser.add_argument("--out", type=Path, default=Path("report"))
    args = parser.parse_args(arguments)
    source = args.results
    if source is None:
        files = sorted(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)
        if not files:
            parser.error("benchmarks/results is empty: run python -m benchmarks first")
        source = files[-1]
    elif not source.exists():
        parser.error(f"--results {source} does not exist")
    page = write(json.loads(source.read_text()), args.out, args.models)
    print(f"report: {page.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
