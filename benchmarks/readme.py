"""`python -m benchmarks.readme`: rewrites the generated parts of README.md.

The support matrix comes from the table of operators and the kernels' registrations, the measured
table from the newest full run of each device under benchmarks/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastnn import _ops
from fastnn.info import FEATURES
from tritonops import refusal

ROOT = Path(__file__).parents[1]
DTYPES = {"cpu": "fp32, bf16, fp16, fp64", "cuda": "fp32, bf16, fp16"}


def _registered(folder: str) -> set[str]:
    """The operators that the sources of a room register."""
    files = [*(ROOT / "csrc" / folder).glob("*.cpp"), *(ROOT / "csrc" / folder).glob("*.cu")]
    return {op for file in files for op in re.findall(r'm\.impl\("(\w+)"', file.read_text())}


def support() -> str:
    rooms = {"CPU (C++)": ("cpu", _registered("cpu")), "CUDA (C++)": ("cuda", _registered("cuda"))}
    lines = [
        "| family | " + " | ".join(rooms) + " | Triton (CUDA) | reference |",
        "|---|---|---|---|---|",
    ]
    for family, ops in _ops.FAMILIES.items():
        cells = [DTYPES[device] if set(ops) <= has else "-" for device, has in rooms.values()]
        refused = [name for name, used in FEATURES[family].items() if refusal(family, used)]
        cells.append(DTYPES["cuda"] + (f"; without {', '.join(refused)}" if refused else ""))
        lines.append(f"| `{family}` | " + " | ".join([*cells, "what torch serves"]) + " |")
    return "\n".join(lines)


def _row(row: dict) -> str:
    eager, ours = row["providers"]["eager"], row["providers"][row["ours"]]
    low, high = ours["ratio_p20"], ours["ratio_p80"]
    memory = ""
    if "extra_bytes" in eager and "extra_bytes" in ours:
        memory = f"{eager['extra_bytes'] / 1e6:.0f} / {ours['extra_bytes'] / 1e6:.0f}"
    mark = " **loses**" if row["loses"] else ""
    reason = f" ({row['reason']})" if row["loses"] and row["reason"] else ""
    times = f"{eager['seconds'] * 1e3:.3g} | {ours['seconds'] * 1e3:.3g}"
    ratio = f"{ours['ratio']:.2f} ({low:.2f} to {high:.2f}){mark}{reason}"
    return f"| {row['label']} | {times} | {ratio} | {memory} |"


def measured() -> str:
    newest = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        newest[re.sub(r"-\d{4}-\d{2}-\d{2}$", "", path.stem)] = path
    parts = []
    for path in newest.values():
        results = json.loads(path.read_text())
        machine = results["machine"]
        parts.append(
            f"{machine['name']} ({machine['isa']}), {machine['threads']} threads, torch"
            f" {machine['torch']}, {machine['date'][:10]} (`{path.relative_to(ROOT)}`). Times are"
            " medians of interleaved rounds; the ratio is eager's time over ours within a round,"
            " with the middle 60 % of the rounds.\n\n"
            "| case | eager ms | fastnn ms | times faster | extra memory MB, eager / fastnn |\n"
            "|---|---|---|---|---|\n"
            + "\n".join(_row(row) for row in results["rows"] if row["ours"])
        )
    return "\n\n".join(parts) or "No run has been recorded yet."


def updated(text: str) -> str:
    for name, content in (("support", support()), ("measured", measured())):
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
