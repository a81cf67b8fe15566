"""What a measurement ran on, and the two rates it is held against: copy and matrix product."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks import common, timing

# What holds torch's own kernels back to an older instruction set, each library's by its own.
_ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_NOTED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def _cpu() -> tuple[str, str, list[str]]:
    """The CPU's name, its generation, which a rented machine's name may leave out, and those of its
    instruction sets that kernels care about."""
    name, generation, flags = platform.processor() or platform.machine(), "", []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            name = match[1].strip()
        if match := re.search(r"^cpu family\s*:\s*(\d+)\nmodel\s*:\s*(\d+)", text, re.M):
            generation = f"family {match[1]}, model {match[2]}"
        if match := re.search(r"^flags\s*:\s*(.+)$", text, re.M):
            flags = [flag for flag in _NOTED_FLAGS if flag in match[1].split()]
    return name, generation, flags


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return head + (" with local changes" if changed.strip() else "")


def describe(device: torch.device) -> dict:
    cpu, generation, flags = _cpu()
    try:
        version = importlib.metadata.version("fastnn")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    machine = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cpu_generation": generation,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": flags,
        "environment": {name: os.environ[name] for name in _ISA_VARIABLES if name in os.environ},
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnn": version,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        machine["cuda"] = torch.version.cuda
    return machine


def restriction(machine: dict) -> str:
    """How a run on the CPU was held back, if it was: fewer threads than cores, or an older ISA."""
    if machine["device"] != "cpu":
        return ""
    held = []
    if machine["threads"] < machine["cores"]:
        held.append(f"{machine['threads']} thread" + "s" * (machine["threads"] > 1))
    if "avx512f" in machine["cpu_flags"] and not machine["isa"].startswith("AVX512"):
        held.append(machine["isa"])
    return ", ".join(held)


def slug(machine: dict) -> str:
    """`<device>[-<restriction>]-<date>`, the name of a results file."""
    words = f"{machine['device']} {machine['name']} {restriction(machine)}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f"-{machine['date'][:10]}"


def _best_seconds(step, clock: timing.Clock, repeats: int, budget_s: float) -> float:
    clock.sample(step, 1)
    best, spent = float("inf"), time.perf_counter()
    for turn in range(repeats):
        best = min(best, clock.sample(step, 1))
        if turn and time.perf_counter() - spent > budget_s:
            break
    return best


def copy_rate(device: torch.device, clock: timing.Clock, megabytes: int = 256) -> float:
    """Bytes read plus bytes written per second by `copy_`; the best of several."""
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), clock, 10, 1.0)
    return 2 * source.nbytes / seconds


def gemm_rate(dtype: str, device: torch.device, clock: timing.Clock, size: int | None = None):
    """FLOP/s of torch's own square matrix product; the best of several."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(common.DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, clock, 8, 1.0)


def roofs(dtypes, device: torch.device, clock: timing.Clock) -> dict:
    gemms = {dtype: gemm_rate(dtype, device, clock) for dtype in sorted(set(dtypes))}
    return {"copy_bytes_per_s": copy_rate(device, clock), "gemm_flops_per_s": gemms}
