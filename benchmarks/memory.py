"""Peak memory of one step above what its inputs hold.

On the CPU a fresh process measures each provider, so that no allocator cache of another one hides
a peak: a server that has imported torch, but never started a thread, forks it in milliseconds. The
child runs the step once (which also brings in library pages), hands freed pages back, resets the
kernel's high-water mark and runs it again; a step of more than four seconds has its first run
measured. On a GPU torch's caching allocator knows the peak.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

from benchmarks import common


def _reset_high_water_mark() -> bool:
    """True where the kernel lets a process reset its VmHWM (Linux, most containers)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _trim_heap() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _max_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_peak(step) -> tuple[int, tuple]:
    """Bytes at the peak of `step()` above what is held before it, on the CPU; and its result."""
    _trim_heap()
    if not _reset_high_water_mark():
        # Without a reset only growth over all earlier peaks shows: no warm-up may come before.
        before = _max_resident_bytes()
        result = step()
        return _max_resident_bytes() - before, result
    for _ in range(2):
        result = None
        _trim_heap()
        _reset_high_water_mark()
        before, started = _resident_bytes("VmRSS"), time.perf_counter()
        result = step()
        peak = _resident_bytes("VmHWM") - before
        if time.perf_counter() - started > 4.0:
            break
    return peak, result


def cuda_peak(step, device) -> tuple[int, tuple]:
    step()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, result


def measure_here(case: common.Case, provider: common.Provider, device: torch.device) -> dict:
    step = common.prepare(case, provider, common.make_inputs(case, device))
    with provider.context():
        peak, result = cuda_peak(step, device) if device.type == "cuda" else step_peak(step)
    results = sum(t.nbytes for t in result)
    return {"peak_bytes": peak, "result_bytes": results, "extra_bytes": max(0, peak - results)}


def _child(connection, threads, function, arguments):
    torch.set_num_threads(threads)
    connection.send(function(*arguments))
    connection.close()


def in_fresh_process(function, *arguments):
    """`function(*arguments)` in a process that has imported torch and run nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_child, args=(sender, torch.get_num_threads(), function, arguments)
    )
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"a memory run of {arguments} ended with exit code {child.exitcode}"
        ) from None
    child.join()
    return result


def _measure_on_cpu(case: common.Case, provider_name: str) -> dict:
    return measure_here(case, common.PROVIDERS[provider_name], torch.device("cpu"))


def measure(case: common.Case, provider: common.Provider, device: torch.device) -> dict:
    """Bytes at the peak above the inputs, of the results alone, and the difference: `extra_bytes`
    is the workspace that an implementation needs beyond what it returns."""
    if device.type == "cuda":
        return measure_here(case, provider, device)
    return in_fresh_process(_measure_on_cpu, case, provider.name)
