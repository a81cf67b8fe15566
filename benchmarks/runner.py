"""Runs cases over providers and gathers what was measured in one JSON-ready dictionary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks import accuracy, common, machine, memory, timing

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """`case_s` is a case's time for the rounds; `sample_s` the least length of one sample."""

    rounds: int
    case_s: float
    sample_s: float = 0.02
    compiled: bool = False
    with_memory: bool = True


QUICK = Settings(rounds=5, case_s=4.0)
FULL = Settings(rounds=15, case_s=40.0, compiled=True)


def _floor(case: common.Case, roofs: dict) -> dict:
    """The least time of a case: its bytes at the copy rate or its FLOPs at the GEMM rate."""
    flops, moved = case.amount(case.flops), case.amount(case.bytes)
    times = {
        "copy": moved / roofs["copy_bytes_per_s"],
        "gemm": flops / roofs["gemm_flops_per_s"][case.dtype],
    }
    bound = max(times, key=times.get)
    return {"flops": flops, "bytes": moved, "bound": bound, "floor_s": times[bound]}


def run_case(
    case: common.Case,
    providers: list[common.Provider],
    device: torch.device,
    clock: timing.Clock,
    roofs: dict,
    settings: Settings,
) -> dict:
    """One row: the case, its floor, and per provider time, ratio, rate, memory and error."""
    tensors = common.make_inputs(case, device)
    oracle = accuracy.Oracle(case, tensors)
    steps, rows = {}, {}
    for provider in providers:
        row = rows[provider.name] = {"label": provider.label}
        if settings.with_memory:
            row.update(memory.measure(case, provider, device))
        step = common.prepare(case, provider, tensors)
        errors = oracle.errors(provider, step)
        row["errors"] = errors
        row["error"] = None if errors is None else max(errors.values())
        steps[provider.name] = (provider, step)
    del oracle
    # A GPU's events are steady; a CPU's short samples are not.
    short_factor = 5 if device.type == "cpu" else 1
    times = timing.interleaved(
        steps, clock, settings.rounds, settings.sample_s, settings.case_s, short_factor
    )
    floor = _floor(case, roofs)
    eager_error = rows["eager"]["error"]
    for name, row in rows.items():
        samples = [t for t in times[name] if t is not None]
        row["seconds"] = statistics.median(samples)
        row["samples"] = samples
        row.update(timing.ratio_to(times["eager"], times[name]))
        per_s = floor["bytes" if floor["bound"] == "copy" else "flops"] / row["seconds"]
        row["rate"] = per_s / (1e9 if floor["bound"] == "copy" else 1e12)
        row["rate_unit"] = "GB/s" if floor["bound"] == "copy" else "TFLOP/s"
        row["floor_percent"] = 100 * floor["floor_s"] / row["seconds"]
        # Below one part in 2^60 both are exact: eager's error says nothing to divide by.
        known = row["error"] is not None and eager_error is not None
        row["error_ratio"] = max(row["error"], 2**-60) / max(eager_error, 2**-60) if known else None
    ours = [name for name in common.OURS if name in rows]
    best = max(ours, key=lambda name: rows[name]["ratio"], default=None)
    return {
        "family": case.family,
        "name": case.name,
        "label": case.label,
        "dtype": case.dtype,
        "pass": case.passes,
        "sizes": case.sizes,
        "options": case.options,
        "flops_formula": case.flops,
        "bytes_formula": case.bytes,
        "reason": case.reason,
        **floor,
        "ours": best,
        "loses": best is not None and rows[best]["ratio"] < common.LOSES_BELOW,
        "providers": rows,
    }


def run(
    cases: Iterable[common.Case],
    device: torch.device,
    settings: Settings,
    on_start: Callable[[common.Case], None] = lambda case: None,
    on_row: Callable[[dict], None] = lambda row: None,
) -> dict:
    cases = list(cases)
    clock = timing.Clock(device)
    described = machine.describe(device)
    roofs = machine.roofs((case.dtype for case in cases), device, clock)
    rows = []
    for case in cases:
        on_start(case)
        providers = common.serving(case, device, settings.compiled)
        row = run_case(case, providers, device, clock, roofs, settings)
        if row["ours"] is None:
            row["missing"] = {
                name: common.PROVIDERS[name].refusal(case, device) for name in common.OURS
            }
        rows.append(row)
        on_row(row)
    return {
        "schema": SCHEMA,
        "machine": described,
        "roofs": roofs,
        "settings": {"rounds": settings.rounds, "sample_s": settings.sample_s},
        "rows": rows,
    }


def replaced(earlier: dict, results: dict) -> dict:
    """An earlier run with these rows in place of its own; such a row names its commit."""
    same = ("name", "isa", "threads", "torch")
    mine, theirs = ({k: r["machine"][k] for k in same} for r in (results, earlier))
    if mine != theirs:
        raise ValueError(f"the earlier run is of {theirs}, this one of {mine}")
    rows = {row["label"]: row | {"commit": results["machine"]["commit"]} for row in results["rows"]}
    known = [rows.pop(row["label"], row) for row in earlier["rows"]]
    return earlier | {"rows": known + list(rows.values())}
