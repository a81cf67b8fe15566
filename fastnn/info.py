"""`python -m fastnn.info [--json]`: what is installed, what was built, what serves a call."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import textwrap

import torch

import fastnn
from fastnn import _ops, backend
from fastnn.attention import LEFT_TO_TORCH as SMALL_ATTENTION
from fastnn.cross_entropy import LEFT_TO_TORCH as SMALL_LOSSES
from fastnn.linear_act import LEFT_TO_TORCH as SMALL_LINEARS
from fastnn.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("native", "triton", "reference")
# What calls may use beyond the plain case, as the public functions tell backend.resolve(): the
# questions that are put to backend.refusal(), which has the answers.
_ATTENTION = {
    "head dimension 256": {"head_dim": 256, "value_dim": 256},
    "head dimension 512": {"head_dim": 512, "value_dim": 512},
    **{name: {name: True} for name in ("dropout", "softcap", "window", "alibi", "sinks")},
}
FEATURES = {
    "linear_act": {name: {"activation": name} for name in ACTIVATIONS},
    "dropout": {},
    "cross_entropy": {
        "probability targets": {"prob_target": True, "k_dim": False},
        "K-dimensional logits": {"prob_target": False, "k_dim": True},
    },
    "linear_cross_entropy": {"probability targets": {"prob_target": True}},
    "attention": _ATTENTION | {"gradient of the mask": {"mask_grad": True}},
    "varlen_attention": _ATTENTION,
}


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.metadata.version(package)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> list[dict]:
    devices = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return devices


def _build() -> dict:
    if _ops.NATIVE_MISSING is not None:
        return {"extension": False, "reason": _ops.NATIVE_MISSING}
    from fastnn import _C

    return {"extension": True, **_C.build_info(), "cpu_kernels": _C.cpu_capability()}


def _availability() -> list[dict]:
    """A row per family, device and backend: the dtypes that are served, and why others are not;
    `refused` has the features that are not served in the first of those dtypes."""
    rows = []
    for family in _ops.FAMILIES:
        for device in ("cpu", "cuda"):
            for name in BACKENDS:
                refusals = {
                    _name(dtype): backend.refusal(name, family, device, dtype) for dtype in DTYPES
                }
                served = [dtype for dtype, reason in refusals.items() if reason is None]
                refused = {}
                for feature, features in FEATURES[family].items() if served else ():
                    dtype = getattr(torch, served[0])
                    reason = backend.refusal(name, family, device, dtype, **features)
                    if reason is not None:
                        refused[feature] = reason
                reasons = list(dict.fromkeys(r for r in refusals.values() if r is not None))
                rows.append(
                    {
                        "family": family,
                        "device": device,
                        "backend": name,
                        "dtypes": served,
                        "reasons": reasons,
                        "refused": refused,
                    }
                )
    return rows


def collect() -> dict:
    """Everything that `python -m fastnn.info` prints, as one JSON-compatible dictionary."""
    build = _build()
    paths = build.pop("cuda_paths", {})
    return {
        "versions": {
            "fastnn": fastnn.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "devices": _devices(),
        "build": build,
        "settings": {
            "backend": backend.current_backend(),
            **{name: os.environ[name] for name in sorted(os.environ) if name[:7] == "FASTNN_"},
        },
        "availability": _availability(),
        "cuda_paths": paths,
        "auto_leaves_to_torch": {
            "linear_act on the CPU": SMALL_LINEARS,
            "cross_entropy on the CPU": SMALL_LOSSES,
            "attention on the CPU": SMALL_ATTENTION,
        },
    }


def _pairs(values: dict) -> list[str]:
    width = max(len(name) for name in values)
    shown = {True: "yes", False: "no", None: "none"}
    return [
        f"  {name.ljust(width)}  {shown[value] if value in shown else value}"
        for name, value in values.items()
    ]


def render(info: dict) -> str:
    """`info` of `collect` as aligned text."""
    lines = []
    for title in ("versions", "build", "settings"):
        lines += [title, *_pairs(info[title]), ""]
    lines.append("devices")
    for device in info["devices"]:
        details = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name"))
        lines.append(f"  {device['device']}: {device['name']} ({details})")
    if not torch.cuda.device_count():
        lines.append("  cuda: no device here")
    lines += ["", "what serves a call"]
    explained = [
        row["reasons"] + [f"{feature}: {reason}" for feature, reason in row["refused"].items()]
        for row in info["availability"]
    ]
    notes = list(dict.fromkeys(note for row in explained for note in row))
    table = [("family", "device", "backend", "dtypes", "why not")]
    for row, row_notes in zip(info["availability"], explained, strict=True):
        why_not = " ".join(f"[{notes.index(note) + 1}]" for note in row_notes)
        dtypes = " ".join(row["dtypes"]) or "-"
        table.append((row["family"], row["device"], row["backend"], dtypes, why_not))
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  " + "  ".join([*cells, row[4]]).rstrip())
    lines += [f"  [{number}] {note}" for number, note in enumerate(notes, 1)]
    for title, rules in (
        ("which of the CUDA kernels makes it", info["cuda_paths"]),
        ("what auto leaves to torch", info["auto_leaves_to_torch"]),
    ):
        lines += ["", title] if rules else []
        for name, rule in rules.items():
            lines += [f"  {name}", textwrap.indent(textwrap.fill(rule, 96), " " * 4)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastnn.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args(arguments).json else render(info))


if __name__ == "__main__":
    main()
