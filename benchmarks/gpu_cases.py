"""`python -m benchmarks.gpu_cases`: the GPU's table, its peers and what bounds it.

Every case is timed as `benchmarks.common` does it; a rate is given in TB/s against a copy of this
process, or in TFLOP/s against the cuBLAS GEMMs of the same shapes ("bound"). What a provider raises
is noted in its place, the JSON is rewritten after every case, and no case is begun after --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import common, machine, memory, timing
from benchmarks.common import BOTH, FWD, Case

GEMMS = (
    (4096, 4096, 4096), (8192, 8192, 8192), (4096, 4096, 14336), (8192, 4096, 14336),
    (8192, 14336, 4096), (8192, 4096, 8192), (16384, 4096, 4096), (4096, 8192, 4096),
    (8192, 5120, 5120), (8192, 5120, 13824), (16384, 4096, 11008), (4096, 12288, 4096),
)  # fmt: skip
TOKENS, HIDDEN = 16384, 2048  # of attention's usual protocol


def _half_ignored(case: Case) -> Case:
    name = f"{case.name} half ignored"
    return dataclasses.replace(case, name=name, options={**case.options, "ignored": 2})


def _losses():
    for backward in (FWD, BOTH):
        for rows, classes in (
            (32768, 256), (32768, 1024), (8192, 4096), (8192, 16384), (8192, 32000), (8192, 65536),
            (8192, 131072), (8192, 262144),
        ):  # fmt: skip
            yield common.cross_entropy(rows, classes, "bf16", backward)
        for rows in (2048, 4096, 8192):
            yield common.linear_cross_entropy(rows, 4096, 128256, "bf16", backward)
        yield _half_ignored(common.linear_cross_entropy(8192, 4096, 128256, "bf16", backward))
    yield common.cross_entropy(8192, 131072, "fp32", BOTH)
    yield common.cross_entropy(16, 131072, "bf16", BOTH)


def _linears():
    for m, k, n in GEMMS:
        yield common.linear_act("plain", m, k, n, "bf16", FWD, "identity")
    for backward in (FWD, BOTH):
        for m, k, n in ((8192, 2048, 8192), (8192, 4096, 14336), (8192, 8192, 8192)):
            yield common.linear_act("gelu", m, k, n, "bf16", backward, "gelu")
        yield common.linear_act("swiglu", 8192, 4096, 14336, "bf16", backward, "swiglu")
    yield common.linear_act("plain", 8192, 4096, 14336, "bf16", BOTH, "identity")


def _attentions():
    for width in (128, 64, 256):
        for length in (16384, 4096, 1024, 512):
            for causal in (False, True):
                for backward in (FWD, BOTH):
                    yield common.attention(
                        "causal" if causal else "full", TOKENS // length, HIDDEN // width, length,
                        width, "bf16", backward, **({"is_causal": True} if causal else {}),
                    )  # fmt: skip
    for queries in (1, 8):
        yield common.attention("decode", 8, 32, queries, 128, "bf16", FWD, keys=32768, kv_heads=8)
    yield common.attention("decode", 1, 64, 1, 128, "bf16", FWD, keys=8192, kv_heads=8)
    # Where torch holds all the scores, or leaves its fastest kernels.
    yield common.attention("bias", 4, 16, 2048, 64, "bf16", BOTH, bias=True)
    yield common.attention("padding", 8, 12, 1024, 64, "bf16", BOTH, padding=True)
    yield common.attention("dropout 0.1", 8, 12, 1024, 64, "bf16", BOTH, dropout_p=0.1)
    yield common.attention("full", 2, 8, 2048, 64, "fp32", BOTH)
    # What torch does not have; with a head as wide as Gemma 2's.
    for backward in (FWD, BOTH):
        yield common.attention(
            "causal softcap 50", 2, 16, 4096, 256, "bf16", backward, is_causal=True, softcap=50.0
        )


CASES = (*_losses(), *_linears(), *_attentions())


# --- providers that only a GPU has


@dataclasses.dataclass(frozen=True)
class Peer(common.Provider):
    """Serves `families` where `package` is installed. With `whole`, `build` returns the step: all
    that is to be timed, of the inputs, without autograd."""

    families: tuple[str, ...] = ()
    package: str = "torch"
    whole: bool = False

    def refusal(self, case: Case, device: torch.device) -> str | None:
        if case.family not in self.families:
            return f"serves {', '.join(self.families)}"
        missing = importlib.util.find_spec(self.package) is None
        return f"{self.package} is not installed" if missing else None


@dataclasses.dataclass(frozen=True)
class Product(common.Provider):
    """fastnn native with one of its own choices of a product forced on linear cross-entropy."""

    def refusal(self, case: Case, device: torch.device) -> str | None:
        if case.family != "linear_cross_entropy":
            return "linear_act's products are measured by benchmarks.linear_act_paths"
        return super().refusal(case, device)

    @contextlib.contextmanager
    def context(self):
        with super().context(), mock.patch.dict(os.environ, FASTNN_LINEAR_CROSS_ENTROPY=self.name):
            yield


def _bound(case: Case) -> Callable:
    """The GEMMs alone, or a copy that moves as many bytes."""

    def copies(input, target):
        count = int(case.amount(case.bytes)) // 2
        source = torch.empty(count, dtype=torch.int8, device=input.device)
        result = torch.empty_like(source)
        return lambda: (result.copy_(source),)

    def products(input, weight, *_):
        upstream = torch.randn(input.shape[0], weight.shape[0], device=input.device).to(input)
        out = torch.empty_like(upstream)
        grads = [torch.empty_like(input), torch.empty_like(weight)]

        def step():
            torch.mm(input, weight.t(), out=out)
            if not case.backward:
                return (out,)
            torch.mm(upstream, weight, out=grads[0])
            torch.mm(upstream.t(), input, out=grads[1])
            return (out, *grads)

        return step

    return copies if case.family == "cross_entropy" else products


def _max_autotune(case: Case) -> Callable:
    torch._dynamo.reset()
    eager = common.FAMILIES[case.family].eager(case)
    return torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs")


def _liger(case: Case) -> Callable:
    from liger_kernel.transformers import functional

    if case.family == "cross_entropy":
        # It overwrites its input.
        return lambda x, target: functional.liger_cross_entropy(x.clone(), target)
    return lambda x, w, target: functional.liger_fused_linear_cross_entropy(x, w, target)


def _quack(case: Case) -> Callable:
    if case.family == "cross_entropy":
        from quack.cross_entropy import cross_entropy

        return lambda x, target: cross_entropy(x, target, reduction="mean")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, target: chunked_linear_cross_entropy(x, w, target, reduction="mean")


def _sdpa(name: str) -> Callable:
    def build(case):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, name)

        function = common.attention_with(F.scaled_dot_product_attention, case)

        def call(*tensors):
            with sdpa_kernel(backend):
                return function(*tensors)

        return call

    return build


def _check_options(case: Case, *served: str) -> None:
    others = case.options.keys() - set(served)
    if others:
        raise NotImplementedError(f"has no {', '.join(sorted(others))}")


def _flex(case: Case) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _check_options(case, "is_causal", "softcap", "enable_gqa")
    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    cap, block_mask = case.options.get("softcap"), None
    if case.options.get("is_causal"):
        block_mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, case.sizes["S"], case.sizes["T"], device="cuda"
        )
    score_mod = cap and (lambda score, b, h, i, j: cap * torch.tanh(score / cap))
    gqa = case.options.get("enable_gqa", False)
    return lambda q, k, v: flex(q, k, v, score_mod, block_mask, enable_gqa=gqa)


def _flash_attn(case: Case) -> Callable:
    from flash_attn import flash_attn_func

    _check_options(case, "is_causal", "softcap", "enable_gqa", "dropout_p")

    def call(*tensors):
        out = flash_attn_func(
            *(t.transpose(1, 2) for t in tensors), causal=case.options.get("is_causal", False),
            dropout_p=case.options.get("dropout_p", 0.0), softcap=case.options.get("softcap", 0.0),
        )  # fmt: skip
        return out.transpose(1, 2)

    return call


_LOSSES = ("cross_entropy", "linear_cross_entropy")
_GEMMS = ("linear_act", "linear_cross_entropy")
PROVIDERS = (
    Peer("bound", "cuBLAS or copy", _bound, families=("cross_entropy", *_GEMMS), whole=True),
    *(Product(name, f"fastnn native by {name}", common.PROVIDERS["native"].build, "native")
      for name in ("sm90", "portable", "cublas")),
    Peer("liger", "Liger", _liger, families=_LOSSES, package="liger_kernel"),
    Peer("quack", "quack", _quack, families=_LOSSES, package="quack"),
    Peer("flash", "SDPA flash", _sdpa("FLASH_ATTENTION"), families=("attention",)),
    Peer("cudnn", "SDPA cuDNN", _sdpa("CUDNN_ATTENTION"), families=("attention",)),
    Peer("efficient", "SDPA memory-efficient", _sdpa("EFFICIENT_ATTENTION"),
         families=("attention",)),
    Peer("flash_attn", "FlashAttention", _flash_attn, families=("attention",),
         package="flash_attn"),
    Peer("flex", "FlexAttention", _flex, families=("attention",), compiled=True),
    Peer("autotune", "torch.compile max-autotune", _max_autotune, compiled=True,
         families=(*_LOSSES, "linear_act")),
)  # fmt: skip


def serving(case: Case, device: torch.device, compiled: bool) -> list[common.Provider]:
    """With `compiled` only those that compile, and eager to compare with: they take minutes."""
    everyone = (*common.PROVIDERS.values(), *PROVIDERS)
    return [
        provider
        for provider in everyone
        if (provider.compiled == compiled or provider.name == "eager")
        and provider.refusal(case, device) is None
    ]


# --- one case


def _inputs(case: Case, device: torch.device) -> dict:
    tensors = common.make_inputs(case, device)
    if case.options.get("ignored"):
        tensors["target"][:: case.options["ignored"]] = -100
    return tensors


def _step(case: Case, provider: common.Provider, tensors: dict) -> Callable[[], tuple]:
    if getattr(provider, "whole", False):
        return provider.build(case)(*(t.detach() for t in tensors.values()))
    return common.prepare(case, provider, tensors)


def measure(case, device, clock, roofs, rounds, compiled) -> dict:
    tensors = _inputs(case, device)
    steps, rows = {}, {}
    for provider in serving(case, device, compiled):
        row = rows[provider.name] = {"label": provider.label}
        try:
            step = _step(case, provider, tensors)
            with provider.context():
                peak, result = memory.cuda_peak(step, device)
            row["extra_bytes"] = max(0, peak - sum(t.nbytes for t in result))
            steps[provider.name] = (provider, step)
            del result
        except Exception as error:  # a peer's failure is a result
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    times = timing.interleaved(steps, clock, rounds)
    by_bytes = case.family == "cross_entropy" or case.sizes.get("S", 16) < 16
    work = case.amount(case.bytes if by_bytes else case.flops)
    roof = roofs["copy_bytes_per_s"] if by_bytes else roofs["gemm_flops_per_s"][case.dtype]
    bound = statistics.median(times["bound"]) if "bound" in times else None
    for name, samples in times.items():
        row, seconds = rows[name], statistics.median(samples)
        row.update(seconds=seconds, samples=samples)
        row["rate"], row["unit"] = work / seconds * 1e-12, "TB/s" if by_bytes else "TFLOP/s"
        row["roof_percent"] = 100 * work / roof / seconds
        row["times_bound"] = None if bound is None else seconds / bound
        if "eager" in times:
            row.update(timing.ratio_to(times["eager"], samples))
    return {
        "family": case.family, "label": case.label, "sizes": case.sizes, "dtype": case.dtype,
        "pass": case.passes, "options": case.options, "work": work, "providers": rows,
    }  # fmt: skip


def line(row: dict) -> str:
    parts = [f"{row['label']:52}"]
    for name, entry in row["providers"].items():
        if "failed" in entry:
            parts.append(f"{name}: {entry['failed'][:60]}")
            continue
        digits = 2 if entry["rate"] < 10 else 0
        part = f"{name} {entry['seconds'] * 1e3:.3f} ms {entry['rate']:.{digits}f} {entry['unit']}"
        part += f" {entry['roof_percent']:.0f}%"
        if entry["times_bound"] and name != "bound":
            part += f" {entry['times_bound']:.2f}x bound"
        parts.append(f"{part} +{entry['extra_bytes'] / 1e6:.0f} MB")
    return " | ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cases", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--family", choices=sorted({case.family for case in CASES}))
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose label has it")
    parser.add_argument("--compile", action="store_true", help="torch.compile's, with max-autotune")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    device = torch.device("cuda")
    clock = timing.Clock(device)
    cases = [
        case
        for case in CASES
        if args.family in (None, case.family) and args.case.lower() in case.label.lower()
    ]
    if not cases:
        parser.error(f"no case has {args.case!r} in its label")
    results = {
        "machine": machine.describe(device),
        "roofs": machine.roofs((case.dtype for case in cases), device, clock),
        "rows": [],
    }
    print(json.dumps(results["roofs"]), flush=True)
    for count, case in enumerate(cases):
        if time.perf_counter() - started > args.seconds:
            print(f"out of time: {len(cases) - count} cases were not run")
            break
        row = measure(case, device, clock, results["roofs"], args.rounds, args.compile)
        results["rows"].append(row)
        print(line(row), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
