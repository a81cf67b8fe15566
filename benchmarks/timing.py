"""How long calls take, and how often faster one is than another.

Times of one round are taken back to back, so the ratio to eager is formed within a round; its
spread over the rounds is kept.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.common import Provider


class Clock:
    """Times `inner` calls of a step, in seconds per call.

    On a GPU each call is timed by events and the L2 cache is overwritten before it; on the CPU the
    calls follow each other, as the layers of a model do.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)

    def sample(self, step: Callable, inner: int) -> float:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._cuda(step, inner) if self.device.type == "cuda" else _cpu(step, inner)
        finally:
            if collecting:
                gc.enable()

    def _cuda(self, step, inner):
        events = []
        for _ in range(inner):
            self._flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


def _cpu(step, inner):
    start = time.perf_counter()
    for _ in range(inner):
        step()
    return (time.perf_counter() - start) / inner


def interleaved(
    steps: dict[str, tuple[Provider, Callable]],
    clock: Clock,
    rounds: int,
    sample_s: float = 0.02,
    case_s: float = math.inf,
    short_factor: int = 1,
) -> dict[str, list[float | None]]:
    """Seconds per call, one entry per round and provider; the order is rotated every round.

    A provider that has used up its share of `case_s` sits out the later rounds (None), but every
    one of them gets two samples. Where all samples are short there are `short_factor` times as many
    rounds: whatever else the machine does weighs most on those.
    """
    inner, spent = {}, dict.fromkeys(steps, 0.0)
    longest = 0.0
    for name, (provider, step) in steps.items():
        with provider.context():
            once = clock.sample(step, 1)
            if once < 0.5:
                # the first call may pay for memory, code loading and primitive creation
                once = min(clock.sample(step, 1), clock.sample(step, 3 if once < 0.1 else 1))
        inner[name] = max(1, min(10_000, math.ceil(sample_s / max(once, 1e-7))))
        longest = max(longest, once * inner[name])
    if longest <= 2 * sample_s:
        rounds *= short_factor
    times = {name: [] for name in steps}
    share = case_s / len(steps)
    names = list(steps)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn >= 2 and spent[name] >= share:
                times[name].append(None)
                continue
            provider, step = steps[name]
            with provider.context():
                seconds = clock.sample(step, inner[name])
            times[name].append(seconds)
            spent[name] += seconds * inner[name]
    return times


def quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio_to(base: list[float | None], other: list[float | None]) -> dict[str, float]:
    """How many times faster than `base`: the median of the per-round ratios, and their spread."""
    ratios = [b / o for b, o in zip(base, other, strict=True) if b is not None and o is not None]
    return {
        "ratio": statistics.median(ratios),
        "ratio_p20": quantile(ratios, 0.2),
        "ratio_p80": quantile(ratios, 0.8),
    }
