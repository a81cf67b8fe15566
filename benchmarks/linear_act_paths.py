"""`python -m benchmarks.linear_act_paths [--json FILE] [--rounds N]`: linear_act's products on a
GPU by every kernel that can make them, to fill the table in csrc/cuda/linear_act_paths.h.

Each row is one call; within a round every path is timed back to back by device events, and a
ratio is the median over the rounds. `torch` is what eager PyTorch does for the same result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import torch
import torch.nn.functional as F

from fastnn import _ops

PATHS = ("sm90", "portable", "cublas")
# (rows, in, out) with all of them at least 4096, then short sums, few rows, ragged sizes.
LARGE = [
    (4096, 4096, 4096), (8192, 4096, 4096), (4096, 4096, 8192), (4096, 8192, 4096),
    (8192, 8192, 8192), (16384, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096),
    (16384, 8192, 8192), (4096, 4096, 28672), (5120, 5120, 5120), (12288, 4096, 12288),
]  # fmt: skip
OTHERS = [
    (8192, 2048, 8192), (8192, 1024, 4096), (4096, 768, 3072), (2048, 2048, 2048),
    (512, 4096, 4096), (128, 4096, 4096), (16, 4096, 14336), (1, 4096, 4096), (256, 256, 256),
    (4100, 4104, 4200), (4099, 4100, 4099),
]  # fmt: skip


def cases(shape, dtype):
    """Name -> (function of ours, function of torch, operations) on inputs of N(0, 1)."""
    m, k, n = shape
    x, grad = (torch.randn(m, size, device="cuda", dtype=dtype) for size in (k, n))
    w = torch.randn(n, k, device="cuda", dtype=dtype).mul_(k**-0.5)
    b = torch.randn(n, device="cuda", dtype=dtype)
    ops, flops = _ops.NATIVE, 2.0 * m * k * n
    preact = F.linear(x, w, b)

    def forward(activation, bias, save):
        return lambda: ops.linear_act_forward(x, w, bias, None, None, activation, 0.0, save, False)

    def backward(activation, mask):
        return lambda: ops.linear_act_backward(
            grad, x, w, preact, None, activation, 0.0, False, mask
        )

    def eager_gelu_backward():
        d = torch.ops.aten.gelu_backward(grad, preact)
        return d @ w, d.t() @ x, d.sum(0)

    return {
        "plain NT": (forward("identity", None, False), lambda: F.linear(x, w), flops),
        "bias gelu": (forward("gelu", b, False), lambda: F.gelu(F.linear(x, w, b)), flops),
        "bias gelu save": (forward("gelu", b, True), lambda: F.gelu(F.linear(x, w, b)), flops),
        "grad input NN": (backward("identity", [True, False, False]), lambda: grad @ w, flops),
        "grad weight TN": (backward("identity", [False, True, False]), lambda: grad.t() @ x, flops),
        "gelu backward": (backward("gelu", [True] * 3), eager_gelu_backward, 2 * flops),
    }


def timed(function, repeats):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def measure(ours, torchs, rounds):
    """Milliseconds of each path and of torch: the medians, and the median ratio to torch."""

    def by(path):
        os.environ["FASTNN_LINEAR_ACT"] = path
        return ours

    names = [*PATHS, "torch"]
    times = {name: [] for name in names}
    for name in names:  # warm up, and choose how many calls make 5 ms
        function = torchs if name == "torch" else by(name)
        timed(function, 2)
    repeats = max(1, min(50, int(5.0 / max(timed(torchs, 3), 1e-3))))
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            function = torchs if name == "torch" else by(name)
            times[name].append(timed(function, repeats))
    os.environ.pop("FASTNN_LINEAR_ACT", None)
    return {
        name: {
            "ms": statistics.median(values),
            "times_torch": statistics.median(
                t / mine for t, mine in zip(times["torch"], values, strict=True)
            ),
        }
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--case", default="", help="only the calls whose name has this text")
    parser.add_argument("--large", action="store_true", help="only the large shapes")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; TFLOP/s (times torch's speed)"
    )
    print(f"{'rows x in -> out':24}{'call':16}" + "".join(f"{p:>18}" for p in (*PATHS, "torch")))
    for shape in LARGE if arguments.large else LARGE + OTHERS:
        for name, (ours, torchs, flops) in cases(shape, torch.bfloat16).items():
            if arguments.case not in name:
                continue
            with torch.no_grad():
                found = measure(ours, torchs, arguments.rounds)
            rows.append({"shape": shape, "case": name, "flops": flops, **found})
            cells = [
                f"{flops / found[p]['ms'] / 1e9:8.1f} ({found[p]['times_torch']:.3f})"
                for p in (*PATHS, "torch")
            ]
            label = "{} x {} -> {}".format(*shape)
            print(f"{label:24}{name:16}" + "".join(f"{c:>18}" for c in cells), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)
    for name in ("plain NT", "grad input NN", "grad weight TN"):
        large = [
            r["cublas"]["ms"] / r["sm90"]["ms"]
            for r in rows if r["case"] == name and min(r["shape"]) >= 4096
        ]  # fmt: skip
        if large:
            print(f"{name}: sm90 has {statistics.median(large):.3f} of cuBLAS's speed (median of"
                  f" {len(large)} large shapes, least {min(large):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
