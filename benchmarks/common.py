"""The one table of cases and providers.

A case is one call on fixed shapes; a provider is one way to serve it. `python -m benchmarks`, the
pytest-benchmark files and the tests all run what `prepare` returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastnn import backend, reference

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
SEED = 20240
LOSES_BELOW = 0.97


@dataclass(frozen=True)
class Case:
    """One call on fixed shapes.

    `flops` and `bytes` are formulas over `sizes` (and `e`, the element's bytes): the least work and
    the least traffic that any implementation has, each input and result moved once per pass.
    `reason` says why fastnn is slower than eager here, where that is known.
    """

    family: str
    name: str
    dtype: str
    backward: bool
    sizes: dict[str, int]
    flops: str
    bytes: str
    options: dict = field(default_factory=dict)
    quick: bool = True
    reason: str = ""

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype} {'fwd+bwd' if self.backward else 'fwd'}"

    def amount(self, formula: str) -> float:
        names = {"e": DTYPES[self.dtype].itemsize, **self.sizes}
        return float(eval(formula, {"__builtins__": {}}, names))


# --- families: the inputs of a case, and the functions that serve it


@dataclass(frozen=True)
class Family:
    """How to make a case's inputs and who serves it.

    `inputs(case, normal, labels)` returns the named tensors in the order the functions take them;
    `eager`, `ours`, `oracle(case, keep)` and `chunked` return a function of those tensors.
    `dropout_shape` is the shape of the dropout mask the functions draw; no `oracle`, no error is
    measured. `ops` are fastnn's families that serve it, where that is more than its own.
    """

    inputs: Callable
    eager: Callable
    ours: Callable
    oracle: Callable | None = None
    dropout_shape: Callable | None = None
    chunked: Callable | None = None
    ops: tuple[str, ...] = ()


def _linear_act_inputs(case, normal, labels):
    m, k, n, g = (case.sizes[s] for s in "MKNG")
    tensors = {
        "input": normal(m, k),
        "weight": normal(g * n, k, scale=k**-0.5),
        "bias": normal(g * n),
    }
    if case.options.get("residual"):
        tensors["residual"] = normal(m, n)
    return tensors


def _gated(act):
    def apply(preact):
        gate, up = preact.chunk(2, dim=-1)
        return act(gate) * up

    return apply


EAGER_ACTIVATIONS = {
    "identity": lambda x: x, "relu": F.relu, "gelu": F.gelu, "swiglu": _gated(F.silu),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "geglu": _gated(F.gelu),
}  # fmt: skip


def _linear_act_eager(case):
    act, p = EAGER_ACTIVATIONS[case.options["activation"]], case.options.get("dropout_p", 0.0)
    if case.options.get("residual"):
        return lambda x, w, b, residual: residual + F.dropout(act(F.linear(x, w, b)), p)
    if p:
        return lambda x, w, b: F.dropout(act(F.linear(x, w, b)), p)
    return lambda x, w, b: act(F.linear(x, w, b))


def _linear_act_with(function, case, **extra):
    activation, p = case.options["activation"], case.options.get("dropout_p", 0.0)
    if case.options.get("residual"):
        return lambda x, w, b, residual: function(
            x, w, b, activation, residual=residual, dropout_p=p, **extra
        )
    if p:
        return lambda x, w, b: function(x, w, b, activation, dropout_p=p, **extra)
    return lambda x, w, b: function(x, w, b, activation)


def functional():
    import fastnn.functional

    return fastnn.functional


def _dropout_with(function, case):
    p = case.options["dropout_p"]
    return lambda x: function(x, p)


def _attention_inputs(case, normal, labels):
    b, h, g, s, t, d = (case.sizes[x] for x in "BHGSTD")
    tensors = {"query": normal(b, h, s, d), "key": normal(b, g, t, d), "value": normal(b, g, t, d)}
    if case.options.get("padding"):
        # sequences of half to all of the keys
        lengths = t // 2 + labels(t - t // 2 + 1, b)
        keys = torch.arange(t, device=lengths.device)
        tensors["attn_mask"] = (keys < lengths[:, None])[:, None, None]
    if case.options.get("bias"):
        # learned, the same for all sequences
        tensors["attn_mask"] = normal(1, h, s, t)
    return tensors


def attention_with(function, case, **extra):
    inputs = ("padding", "bias")
    options = {name: value for name, value in case.options.items() if name not in inputs} | extra
    return lambda q, k, v, attn_mask=None: function(q, k, v, attn_mask, **options)


def _encoder_layer(case) -> torch.nn.TransformerEncoderLayer:
    d, h, f = (case.sizes[x] for x in "DHF")
    layer = torch.nn.TransformerEncoderLayer(d, h, f, batch_first=True)
    return layer.to(DTYPES[case.dtype])


def _encoder_layer_inputs(case, normal, labels):
    b, s, d = (case.sizes[x] for x in "BSD")
    tensors = {"input": normal(b, s, d)}
    for name, parameter in _encoder_layer(case).named_parameters():
        fan_in = parameter.shape[-1]
        values = normal(*parameter.shape, scale=fan_in**-0.5)
        tensors[name] = torch.ones_like(values, requires_grad=True) if "norm" in name else values
    return tensors


def _encoder_layer_with(layer):
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return call


def _swapped_encoder_layer(case):
    import fastnn

    layer = _encoder_layer(case)
    fastnn.swap_(layer)
    return _encoder_layer_with(layer)


def _torch_chunked(case):
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=options)


FAMILIES = {
    "linear_act": Family(
        inputs=_linear_act_inputs,
        eager=_linear_act_eager,
        ours=lambda case: _linear_act_with(functional().linear_act, case),
        oracle=lambda case, keep: _linear_act_with(
            reference.linear_act, case, **({} if keep is None else {"keep": keep})
        ),
        dropout_shape=lambda case: (case.sizes["M"], case.sizes["N"]),
    ),
    "dropout": Family(
        inputs=lambda case, normal, labels: {"input": normal(case.sizes["R"], case.sizes["C"])},
        eager=lambda case: _dropout_with(F.dropout, case),
        ours=lambda case: _dropout_with(functional().dropout, case),
        oracle=lambda case, keep: lambda x: x * keep,
        dropout_shape=lambda case: (case.sizes["R"], case.sizes["C"]),
    ),
    "cross_entropy": Family(
        inputs=lambda case, normal, labels: {
            "input": normal(case.sizes["N"], case.sizes["V"]),
            "target": labels(case.sizes["V"], case.sizes["N"]),
        },
        eager=lambda case: F.cross_entropy,
        ours=lambda case: functional().cross_entropy,
        oracle=lambda case, keep: reference.cross_entropy,
    ),
    "linear_cross_entropy": Family(
        inputs=lambda case, normal, labels: {
            "input": normal(case.sizes["N"], case.sizes["D"]),
            "weight": normal(case.sizes["V"], case.sizes["D"], scale=case.sizes["D"] ** -0.5),
            "target": labels(case.sizes["V"], case.sizes["N"]),
        },
        eager=lambda case: lambda x, w, target: F.cross_entropy(F.linear(x, w), target),
        ours=lambda case: functional().linear_cross_entropy,
        oracle=lambda case, keep: reference.linear_cross_entropy,
        chunked=_torch_chunked,
    ),
    "attention": Family(
        inputs=_attention_inputs,
        eager=lambda case: attention_with(F.scaled_dot_product_attention, case),
        ours=lambda case: attention_with(functional().scaled_dot_product_attention, case),
        oracle=lambda case, keep: attention_with(
            reference.scaled_dot_product_attention, case, keep=keep
        ),
        dropout_shape=lambda case: tuple(case.sizes[x] for x in "BHST"),
    ),
    "encoder_layer": Family(
        inputs=_encoder_layer_inputs,
        eager=lambda case: _encoder_layer_with(_encoder_layer(case)),
        ours=_swapped_encoder_layer,
        ops=("linear_act", "dropout", "attention"),
    ),
}


# --- the table of cases


def linear_act(name, m, k, n, dtype, backward, activation, *, quick=True, reason="", **options):
    sizes = {"M": m, "K": k, "N": n, "G": 2 if activation in ("swiglu", "geglu") else 1}
    return Case(
        "linear_act", f"{name} {m}x{k}->{'2x' if sizes['G'] == 2 else ''}{n}", dtype, backward,
        sizes,
        flops="6*M*K*G*N" if backward else "2*M*K*G*N",
        bytes="e*(3*M*K + 3*G*N*K + 2*M*N)" if backward else "e*(M*K + G*N*K + M*N)",
        options={"activation": activation, **options}, quick=quick, reason=reason,
    )  # fmt: skip


def dropout(rows, cols, dtype, backward, p=0.1, *, quick=True, reason=""):
    return Case(
        "dropout", f"dropout {p} {rows}x{cols}", dtype, backward, {"R": rows, "C": cols},
        flops="2*R*C" if backward else "R*C",
        bytes="e*4*R*C" if backward else "e*2*R*C",
        options={"dropout_p": p}, quick=quick, reason=reason,
    )  # fmt: skip


def cross_entropy(n, v, dtype, backward, *, quick=True, reason=""):
    return Case(
        "cross_entropy", f"cross-entropy {n}x{v}", dtype, backward, {"N": n, "V": v},
        # maximum, subtraction, exponential, sum; then subtraction, exponential, scaling
        flops="7*N*V" if backward else "4*N*V",
        bytes="e*3*N*V" if backward else "e*N*V",
        quick=quick, reason=reason,
    )  # fmt: skip


def linear_cross_entropy(n, d, v, dtype, backward, *, quick=True, reason=""):
    return Case(
        "linear_cross_entropy", f"linear cross-entropy {n}x{d}->{v}", dtype, backward,
        {"N": n, "D": d, "V": v},
        flops="6*N*D*V" if backward else "2*N*D*V",
        bytes="e*2*(N*D + V*D)" if backward else "e*(N*D + V*D)",
        quick=quick, reason=reason,
    )  # fmt: skip


def attention(
    name, b, h, s, d, dtype, backward, *, keys=None, kv_heads=None, quick=True, reason="", **options
):
    sizes = {"B": b, "H": h, "G": kv_heads or h, "S": s, "T": keys or s, "D": d}
    if kv_heads:
        options["enable_gqa"] = True
    flops = "14*B*H*S*T*D" if backward else "4*B*H*S*T*D"
    shape = f"({b},{h},{s},{d})" + (f" keys {keys}" if keys else "")
    return Case(
        "attention", f"{name} {shape}" + (f" GQA {kv_heads}" if kv_heads else ""), dtype, backward,
        sizes,
        flops=flops + "/2" if options.get("is_causal") else flops,
        bytes="e*6*(B*H*S*D + B*G*T*D)" if backward else "e*2*(B*H*S*D + B*G*T*D)",
        options=options, quick=quick, reason=reason,
    )  # fmt: skip


def encoder_layer(b, s, d, h, f, dtype, *, quick=True, reason=""):
    return Case(
        "encoder_layer", f"TransformerEncoderLayer({d},{h},{f}) {b}x{s}", dtype, True,
        {"B": b, "S": s, "D": d, "H": h, "F": f},
        # four projections and two linears, and the attention
        flops="6*B*S*D*(4*D + 2*F) + 14*B*S*S*D",
        # every weight and its gradient, and what each of the sub-layers takes and gives
        bytes="e*(2*D*(4*D + 2*F) + 2*B*S*(10*D + 2*F))",
        options={}, quick=quick, reason=reason,
    )  # fmt: skip


FWD, BOTH = False, True
GEMM_BOUND = "nine tenths are GEMM, where torch's and ours are even without AMX: 1 within the noise"
CASES = (
    linear_act("gelu", 2048, 768, 3072, "bf16", FWD, "gelu", reason=GEMM_BOUND),
    linear_act("gelu", 2048, 768, 3072, "bf16", BOTH, "gelu", reason=GEMM_BOUND),
    linear_act("gelu", 2048, 768, 3072, "fp32", FWD, "gelu"),
    linear_act("gelu", 2048, 768, 3072, "fp32", BOTH, "gelu"),
    linear_act("gelu", 32, 64, 64, "fp32", FWD, "gelu"),
    linear_act("gelu", 32, 64, 64, "fp32", BOTH, "gelu"),
    linear_act("gelu", 1, 64, 64, "fp32", FWD, "gelu", quick=False),
    linear_act("gelu", 1, 64, 64, "fp32", BOTH, "gelu", quick=False),
    linear_act("gelu", 4096, 1024, 4096, "bf16", FWD, "gelu", quick=False, reason=GEMM_BOUND),
    linear_act("gelu", 4096, 1024, 4096, "bf16", BOTH, "gelu", quick=False, reason=GEMM_BOUND),
    linear_act("relu+dropout", 4096, 512, 2048, "fp32", BOTH, "relu", dropout_p=0.1),
    linear_act("relu+dropout", 4096, 512, 2048, "bf16", BOTH, "relu", dropout_p=0.1),
    linear_act("swiglu", 2048, 768, 2048, "bf16", BOTH, "swiglu", reason=GEMM_BOUND),
    linear_act("gelu", 2048, 768, 3072, "fp16", BOTH, "gelu", quick=False),
    linear_act("relu", 2048, 1024, 4096, "bf16", BOTH, "relu", quick=False),
    linear_act("geglu", 1024, 768, 2048, "fp32", BOTH, "geglu", quick=False),
    linear_act(
        "dropout+residual", 2048, 3072, 768, "bf16", BOTH, "identity", dropout_p=0.1, residual=True,
        quick=False,
    ),
    dropout(4096, 2048, "fp32", BOTH),
    dropout(4096, 2048, "bf16", BOTH),
    cross_entropy(1024, 32000, "fp32", FWD),
    cross_entropy(1024, 32000, "fp32", BOTH),
    cross_entropy(512, 128256, "bf16", FWD),
    cross_entropy(512, 128256, "bf16", BOTH),
    cross_entropy(
        64, 10, "fp32", BOTH,
        reason="left to torch, whose call costs less than a Python autograd.Function",
    ),
    cross_entropy(1000, 50257, "bf16", BOTH, quick=False),
    linear_cross_entropy(1024, 768, 32000, "fp32", BOTH),
    linear_cross_entropy(1024, 768, 32000, "bf16", BOTH),
    linear_cross_entropy(4096, 256, 64000, "fp32", BOTH, quick=False),
    linear_cross_entropy(1024, 768, 32000, "bf16", FWD, quick=False),
    attention("full", 8, 12, 512, 64, "bf16", BOTH),
    attention("full", 8, 12, 512, 64, "fp32", BOTH),
    attention("causal", 8, 12, 512, 64, "bf16", BOTH, is_causal=True),
    attention("causal", 8, 12, 512, 64, "fp32", BOTH, is_causal=True),
    attention("dropout 0.1", 8, 12, 512, 64, "bf16", BOTH, dropout_p=0.1),
    attention("dropout 0.1", 8, 12, 512, 64, "fp32", BOTH, dropout_p=0.1),
    attention("padding+dropout", 8, 12, 512, 64, "bf16", BOTH, dropout_p=0.1, padding=True),
    attention("padding+dropout", 8, 12, 512, 64, "fp32", BOTH, dropout_p=0.1, padding=True),
    attention("full", 1, 16, 4096, 128, "bf16", FWD),
    attention("full", 1, 16, 4096, 128, "bf16", BOTH),
    attention(
        "full", 2, 4, 64, 32, "fp32", BOTH,
        reason="left to torch, whose call costs less than a Python autograd.Function",
    ),
    attention("decode", 8, 32, 1, 128, "bf16", FWD, keys=8192, kv_heads=8),
    attention("decode", 8, 32, 1, 128, "fp32", FWD, keys=8192, kv_heads=8),
    attention("full", 8, 12, 512, 64, "bf16", FWD, quick=False),
    attention("causal", 2, 12, 2048, 128, "bf16", BOTH, is_causal=True, quick=False),
    attention("dropout 0.1", 2, 8, 2048, 64, "fp32", BOTH, dropout_p=0.1, quick=False),
    attention("dropout 0.1", 2, 8, 4096, 64, "fp32", BOTH, dropout_p=0.1, quick=False),
    attention("decode", 1, 8, 1, 128, "bf16", FWD, keys=16384, kv_heads=1, quick=False),
    encoder_layer(8, 512, 512, 8, 2048, "bf16"),
    encoder_layer(8, 512, 512, 8, 2048, "fp32"),
)  # fmt: skip


def select(quick: bool, family: str | None = None, text: str = "") -> list[Case]:
    return [
        case
        for case in CASES
        if (case.quick or not quick)
        and family in (None, case.family)
        and text.lower() in case.label.lower()
    ]


# --- the table of providers


@dataclass(frozen=True)
class Provider:
    """One way to serve a case. `backend` is the fastnn backend its calls run under."""

    name: str
    label: str
    build: Callable[[Case], Callable]
    backend: str | None = None
    compiled: bool = False

    def refusal(self, case: Case, device: torch.device) -> str | None:
        """Why this provider does not serve the case, or None when it does."""
        if self.backend is not None:
            if (self.backend == "auto") == (device.type == "cuda"):
                return "on the CPU what users get is measured, on CUDA each backend"
            asked = "native" if self.backend == "auto" else self.backend
            for family in FAMILIES[case.family].ops or (case.family,):
                reason = backend.refusal(
                    asked, family, device.type, DTYPES[case.dtype], **_features(case)
                )
                if reason:
                    return reason
            return None
        if self.name == "chunked":
            if FAMILIES[case.family].chunked is None:
                return "torch has it for linear cross-entropy only"
            if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
                return "this torch has no chunked linear_cross_entropy"
        return None

    def context(self):
        return contextlib.nullcontext() if self.backend is None else backend.use_backend(
            self.backend
        )  # fmt: skip


def _features(case: Case) -> dict:
    """What a case uses beyond the plain call, in the words `backend.resolve` is asked in."""
    if case.family == "linear_act":
        return {"activation": case.options["activation"]}
    if case.family == "attention":
        width = case.sizes["D"]
        dropout = case.options.get("dropout_p", 0.0) > 0
        mask_grad = case.backward and case.options.get("bias", False)
        return {
            "head_dim": width, "value_dim": width, "dropout": dropout, "mask_grad": mask_grad,
        }  # fmt: skip
    return {}


def _compiled(case: Case) -> Callable:
    torch._dynamo.reset()
    return torch.compile(FAMILIES[case.family].eager(case), dynamic=False)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", "PyTorch eager", lambda case: FAMILIES[case.family].eager(case)),
        Provider("compile", "torch.compile", _compiled, compiled=True),
        Provider("auto", "fastnn", lambda case: FAMILIES[case.family].ours(case), "auto"),
        Provider(
            "native", "fastnn native", lambda case: FAMILIES[case.family].ours(case), "native"
        ),
        Provider(
            "triton", "fastnn Triton", lambda case: FAMILIES[case.family].ours(case), "triton"
        ),
        Provider("chunked", "torch chunked", lambda case: FAMILIES[case.family].chunked(case)),
    )
}
OURS = ("auto", "native", "triton")


def serving(case: Case, device: torch.device, compiled: bool) -> list[Provider]:
    return [
        provider
        for provider in PROVIDERS.values()
        if (compiled or not provider.compiled) and provider.refusal(case, device) is None
    ]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parameters(*families: str) -> list:
    """(case, provider) of the quick table, for pytest.mark.parametrize."""
    import pytest

    return [
        pytest.param(case, provider, id=f"{case.label} {provider.name}")
        for family in families
        for case in select(True, family)
        for provider in serving(case, default_device(), compiled=False)
    ]


# --- one case prepared for one provider


def make_inputs(case: Case, device: torch.device) -> dict:
    """The case's tensors: N(0, 1) values (weights scaled by 1/sqrt(fan in)), uniform labels."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape, scale=1.0):
        values = torch.randn(shape, generator=generator, device=device).mul_(scale)
        values = values.to(DTYPES[case.dtype])
        return values.requires_grad_(case.backward)

    def labels(classes, rows):
        return torch.randint(classes, (rows,), generator=generator, device=device)

    return FAMILIES[case.family].inputs(case, normal, labels)


def make_step(case: Case, function: Callable, tensors: dict) -> Callable[[], tuple]:
    """A call without arguments that returns (out, *gradients of the floating inputs)."""
    arguments = tuple(tensors.values())
    if not case.backward:
        return lambda: (function(*arguments),)
    wanted = [t for t in arguments if t.requires_grad]
    upstream = []

    def step():
        out = function(*arguments)
        if not upstream:
            upstream.append(_upstream(case, out))
        return (out.detach(), *torch.autograd.grad(out, wanted, upstream[0]))

    return step


def _upstream(case: Case, out: torch.Tensor) -> torch.Tensor:
    """The gradient that reaches the call: N(0, 1), or 1 for a loss."""
    if not out.dim():
        return torch.ones_like(out)
    generator = torch.Generator(out.device).manual_seed(SEED + 1)
    values = torch.randn(out.shape, generator=generator, device=out.device)
    return values.to(DTYPES[case.dtype]).to(out)


def prepare(case: Case, provider: Provider, tensors: dict) -> Callable[[], tuple]:
    """The step that is timed; call it under `provider.context()`."""
    with provider.context():
        return make_step(case, provider.build(case), tensors)
