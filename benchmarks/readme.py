"""`python -m benchmarks.readme`: rewrites the generated parts of README.md.

The support matrix comes from the table of operators and the kernels' registrations, the measured
table from the newest full run of each device under benchmarks/results, that of the models from the
full runs of the examples in its folder models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import machine
from fastnn import _ops
from fastnn.backend import native_limit
from fastnn.info import FEATURES
from tritonops import refusal

ROOT = Path(__file__).parents[1]
DTYPES = {"cpu": "fp32, bf16, fp16, fp64", "cuda": "fp32, bf16, fp16"}


def _registered(folder: str) -> set[str]:
    """The operators that the sources of a room register."""
    files = [*(ROOT / "csrc" / folder).glob("*.cpp"), *(ROOT / "csrc" / folder).glob("*.cu")]
    return {op for file in files for op in re.findall(r'm\.impl\("(\w+)"', file.read_text())}


def _served(device: str, family: str, refused: Callable[[dict], str | None]) -> str:
    without = [name for name, used in FEATURES[family].items() if refused(used)]
    return DTYPES[device] + (f"; without {', '.join(without)}" if without else "")


def support() -> str:
    rooms = {"CPU (C++)": ("cpu", _registered("cpu")), "CUDA (C++)": ("cuda", _registered("cuda"))}
    lines = [
        "| family | " + " | ".join(rooms) + " | Triton (CUDA) | reference |",
        "|---|---|---|---|---|",
    ]
    for family, ops in _ops.FAMILIES.items():
        cells = [
            _served(device, family, partial(native_limit, device)) if set(ops) <= has else "-"
            for device, has in rooms.values()
        ]
        cells.append(_served("cuda", family, partial(refusal, family)))
        lines.append(f"| `{family}` | " + " | ".join([*cells, "what torch serves"]) + " |")
    return "\n".join(lines)


def _row(row: dict, beside: list[dict]) -> str:
    eager, ours = row["providers"]["eager"], row["providers"][row["ours"]]
    low, high = ours["ratio_p20"], ours["ratio_p80"]
    memory = ""
    if "extra_bytes" in eager and "extra_bytes" in ours:
        memory = f"{eager['extra_bytes'] / 1e6:.0f} / {ours['extra_bytes'] / 1e6:.0f}"
    mark = " **loses**" if row["loses"] else ""
    reason = f" ({row['reason']})" if row["loses"] and row["reason"] else ""
    compiled = row["providers"].get("compile")
    ratios = [f"{compiled['ratio']:.2f}" if compiled else ""]
    for results in beside:
        same = [r for r in results["rows"] if r["label"] == row["label"] and r["ours"]]
        ratios.append(f"{same[0]['providers'][same[0]['ours']]['ratio']:.2f}" if same else "")
    cells = [
        row["label"], f"{eager['seconds'] * 1e3:.3g}", f"{ours['seconds'] * 1e3:.3g}",
        f"{ours['ratio']:.2f} ({low:.2f} to {high:.2f}){mark}{reason}",
        f"{ours['floor_percent']:.0f}", *ratios, memory,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _newest() -> dict[str, dict[str, tuple[Path, dict]]]:
    """machine -> restriction ("" is none) -> the newest run's file and results."""
    newest: dict = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        results = json.loads(path.read_text())
        described = results["machine"]
        newest.setdefault(described["name"], {})[machine.restriction(described)] = path, results
    return newest


def measured() -> str:
    parts = []
    for runs in _newest().values():
        path, results = runs[""]
        beside = {held: run for held, (_, run) in runs.items() if held}
        described = results["machine"]
        heads = ["case", "eager ms", "fastnn ms", "times faster", "% of the floor", "torch.compile"]
        heads += [*beside, "extra memory MB, eager / fastnn"]
        also = "".join(
            f"; {held}: `{runs[held][0].relative_to(ROOT)}`" for held in beside
        )  # fmt: skip
        generation = described.get("cpu_generation") if described["device"] == "cpu" else ""
        parts.append(
            f"{described['name']}{f' ({generation})' if generation else ''},"
            f" {described['isa']}, {described['threads']} threads, torch"
            f" {described['torch']}, {described['date'][:10]} (`{path.relative_to(ROOT)}`{also})."
            " Times are medians of interleaved rounds; the ratio is eager's time over ours within"
            " a round, with the middle 60 % of the rounds; the floor is the bytes at the copy rate"
            " or the FLOPs at torch's GEMM rate. The torch.compile column is its own ratio to"
            " eager" + ("; the ones after it are ours, so held back." if beside else ".") + "\n\n"
            + "| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|\n"
            + "\n".join(_row(row, list(beside.values())) for row in results["rows"] if row["ours"])
        )  # fmt: skip
    return "\n\n".join(parts) or "No run has been recorded yet."


def models() -> str:
    """What the examples reached in full, a row each."""
    heads = ["example", "layers", "dtype", "epochs", "reached", "step time, peak: stock / swapped"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for path in sorted((ROOT / "benchmarks" / "results" / "models").glob("*.json")):
        result = json.loads(path.read_text())
        for kind, run in result["runs"].items():
            reached = (f"{name} {values[-1]:.4g}" for name, values in run["metrics"].items())
            ratios = [result["speed_ratio"], result["memory_ratio"]] if kind == "swapped" else []
            cells = [
                f"`{result['name']}`", kind, result["dtype"], str(result["epochs"]),
                ", ".join(reached), ", ".join(f"{ratio:.2f}" for ratio in ratios if ratio),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(text: str) -> str:
    for name, content in (("support", support()), ("models", models()), ("measured", measured())):
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
