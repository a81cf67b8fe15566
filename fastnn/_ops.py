"""The one table of operators: schema, fake and registration of every backend.

A row serves two namespaces: `fastnn::<op>` (C++ for the CPU and CUDA, registered when `fastnn._C`
is loaded) and `fastnn_triton::<op>` (Triton). The functions of both have the same arguments and
results, so one fake and one autograd.Function serve them all. Only the C++ operators check what
they are given; `fastnn_triton` is called by fastnn, which has checked it.

Conventions: gradients a caller did not ask for (`output_mask`) come back as empty tensors of shape
(0,); `lse`, losses and `total_weight` are float32 (float64 for float64 inputs); `softcap=0` and
`window=-1` mean "off"; `seed` is the int64 pair (key, offset) of the dropout generator.
Packed sequences are (T, H, D) with int32 starts `cu_seqlens` (N + 1,), 0 first and T last; their
out is (Tq, H, Dv), their lse (H, Tq), and their dropout mask is that of an (H, Tq, max_seqlen_k)
tensor, of which a row uses as many columns as its sequence has keys.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import PathFinder
from types import SimpleNamespace

import torch

from fastnn import _vmap

REDUCTIONS = ("none", "mean", "sum")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _skipped(like):
    return like.new_empty((0,))


def _masked(mask, *tensors):
    return tuple(
        t.new_empty(t.shape) if wanted else _skipped(t)
        for wanted, t in zip(mask, tensors, strict=True)
    )


def _linear_act_forward(
    input, weight, bias, residual, seed, activation, dropout_p, save_preact, gated
):
    rows = input.shape[:-1]
    width = weight.shape[0]
    out = input.new_empty((*rows, width // 2 if gated else width))
    return out, input.new_empty((*rows, width)) if save_preact else _skipped(input)


def _linear_act_backward(
    grad_out, input, weight, saved, seed, activation, dropout_p, gated, output_mask
):
    return _masked(output_mask, input, weight, weight.new_empty((weight.shape[0],)))


def _dropout(input, seed, p):
    return input.new_empty(input.shape)


def _loss_outputs(logits_like, target_shape, reduction):
    dtype = accumulate_dtype(logits_like.dtype)
    loss = logits_like.new_empty(target_shape if reduction == "none" else (), dtype=dtype)
    lse = logits_like.new_empty(target_shape, dtype=dtype)
    return loss, lse, logits_like.new_empty((), dtype=dtype)


def _rows_shape(logits):
    """Shape of the target's class indices: the logits' shape without the class dimension."""
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()


def _cross_entropy_forward(logits, target, weight, reduction, *options):
    return _loss_outputs(logits, _rows_shape(logits), reduction)


def _cross_entropy_backward(grad_loss, grad_lse, logits, target, *options):
    return _masked(options[-1], logits, target)


def _linear_cross_entropy_forward(
    input, linear_weight, linear_bias, target, weight, reduction, *options
):
    bias = linear_weight.new_empty((linear_weight.shape[0],))
    losses = _loss_outputs(input, input.shape[:-1], reduction)
    return losses + _masked(options[-1], input, linear_weight, bias)


def _linear_cross_entropy_backward(grad_loss, grad_lse, input, linear_weight, *options):
    bias = linear_weight.new_empty((linear_weight.shape[0],))
    return _masked(options[-1], input, linear_weight, bias)


def _attention_forward(query, key, value, *options):
    shape = query.shape[:-1]
    lse = query.new_empty(shape, dtype=accumulate_dtype(query.dtype))
    return query.new_empty((*shape, value.shape[-1])), lse


def _attention_backward(
    grad_out, grad_lse, query, key, value, attn_mask, alibi_slopes, sinks, *options
):
    mask = query if attn_mask is None else attn_mask
    return _masked(options[-1], query, key, value, mask, query if sinks is None else sinks)


def _varlen_attention_forward(query, key, value, *options):
    rows, heads, _ = query.shape
    lse = query.new_empty((heads, rows), dtype=accumulate_dtype(query.dtype))
    return query.new_empty((rows, heads, value.shape[-1])), lse


def _varlen_attention_backward(grad_out, grad_lse, query, key, value, *options):
    sinks = options[5]
    return _masked(options[-1], query, key, value, query if sinks is None else sinks)


_LOSS = "str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap"
_BAND = "bool bottom_right, int window_left, int window_right"
_PACKED = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " int max_seqlen_q, int max_seqlen_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)

# op -> (signature, fake)
OPS = {
    "linear_act_forward": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed,"
        " str activation, float dropout_p, bool save_preact, bool gated)"
        " -> (Tensor out, Tensor preact)",
        _linear_act_forward,
    ),
    "linear_act_backward": (
        "(Tensor grad_out, Tensor input, Tensor weight, Tensor saved, Tensor? seed,"
        " str activation, float dropout_p, bool gated, bool[3] output_mask)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
        _linear_act_backward,
    ),
    "dropout": ("(Tensor input, Tensor seed, float p) -> Tensor", _dropout),
    "cross_entropy_forward": (
        f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS})"
        " -> (Tensor loss, Tensor lse, Tensor total_weight)",
        _cross_entropy_forward,
    ),
    "cross_entropy_backward": (
        "(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, Tensor? weight,"
        f" Tensor lse, Tensor total_weight, {_LOSS}, bool[2] output_mask)"
        " -> (Tensor grad_logits, Tensor grad_target)",
        _cross_entropy_backward,
    ),
    "linear_cross_entropy_forward": (
        "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
        f" {_LOSS}, int workspace_bytes, bool[3] output_mask)"
        " -> (Tensor loss, Tensor lse, Tensor total_weight,"
        " Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
        _linear_cross_entropy_forward,
    ),
    "linear_cross_entropy_backward": (
        "(Tensor grad_loss, Tensor? grad_lse, Tensor input, Tensor linear_weight,"
        " Tensor? linear_bias, Tensor target, Tensor? weight, Tensor lse, Tensor total_weight,"
        f" {_LOSS}, int workspace_bytes, bool[3] output_mask)"
        " -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
        _linear_cross_entropy_backward,
    ),
    # In place; on a device a scale of 1 costs a launch and no memory traffic.
    "scale_": ("(Tensor(a!) tensor, Tensor scale) -> ()", lambda tensor, scale: None),
    "attention_forward": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes,"
        f" Tensor? sinks, Tensor? seed, float dropout_p, float scale, float softcap, {_BAND})"
        " -> (Tensor out, Tensor lse)",
        _attention_forward,
    ),
    "attention_backward": (
        "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value,"
        " Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed,"
        " Tensor out, Tensor lse, float dropout_p, float scale, float softcap,"
        f" {_BAND}, bool[5] output_mask) -> (Tensor grad_query, Tensor grad_key,"
        " Tensor grad_value, Tensor grad_attn_mask, Tensor grad_sinks)",
        _attention_backward,
    ),
    "varlen_attention_forward": (
        f"({_PACKED}, float dropout_p, float scale, float softcap, {_BAND})"
        " -> (Tensor out, Tensor lse)",
        _varlen_attention_forward,
    ),
    "varlen_attention_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, {_PACKED}, Tensor out, Tensor lse,"
        f" float dropout_p, float scale, float softcap, {_BAND}, bool[4] output_mask)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sinks)",
        _varlen_attention_backward,
    ),
}

# family -> its ops; what backend.resolve() chooses between and fastnn.info prints
FAMILIES = {
    "linear_act": ("linear_act_forward", "linear_act_backward"),
    "dropout": ("dropout",),
    "cross_entropy": ("cross_entropy_forward", "cross_entropy_backward"),
    "linear_cross_entropy": (
        "linear_cross_entropy_forward",
        "linear_cross_entropy_backward",
        "scale_",
    ),
    "attention": ("attention_forward", "attention_backward"),
    "varlen_attention": ("varlen_attention_forward", "varlen_attention_backward"),
}

_LIBRARIES = {ns: torch.library.Library(ns, "DEF") for ns in ("fastnn", "fastnn_triton")}


def _register() -> tuple[SimpleNamespace, SimpleNamespace]:
    handles = {}
    for ns, library in _LIBRARIES.items():
        for name, (signature, fake) in OPS.items():
            library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{ns}::{name}", fake, lib=library)
        ops = getattr(torch.ops, ns)
        handles[ns] = SimpleNamespace(**{name: getattr(ops, name).default for name in OPS})
        for name, (signature, _) in OPS.items():
            if "(a!)" not in signature:
                rule = _vmap.rule(name, getattr(handles[ns], name))
                torch.library.register_vmap(f"{ns}::{name}", rule, lib=library)
    return handles["fastnn"], handles["fastnn_triton"]


NATIVE, TRITON = _register()


def small_linear(input, weight, bias, products) -> torch.Tensor | None:
    """See csrc/small_linear.h. This one stands in where there is no extension: it serves none."""
    return None


def _load_extension() -> str | None:
    """Load the C++ kernels; returns why there are none, or None."""
    # Beside this file only: an editable install would offer the extension of another checkout.
    if PathFinder.find_spec("fastnn._C", [os.path.dirname(__file__)]) is None:
        return "fastnn was installed without its C++ extension (FASTNN_BUILD_EXT=0)"
    from fastnn._built_for import TORCH

    running = torch.__version__.split("+")[0]
    if running.split(".")[:2] != TORCH.split(".")[:2]:
        raise ImportError(
            f"fastnn was built for torch {TORCH} but torch {running} is installed: rebuild it with"
            " `pip install --no-build-isolation --force-reinstall fastnn`, or install that torch"
        )
    global small_linear
    from fastnn._C import small_linear  # loading it registers the kernels

    return None


def _load_triton() -> str | None:
    """Register the Triton kernels; returns why there are none, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "Triton needs a CUDA device (or TRITON_INTERPRET=1)"
    global tritonops
    import tritonops

    for name in OPS:
        _LIBRARIES["fastnn_triton"].impl(name, getattr(tritonops, name), "CUDA")
        if interpreted:
            _LIBRARIES["fastnn_triton"].impl(name, getattr(tritonops, name), "CPU")
    return None


NATIVE_MISSING = _load_extension()
TRITON_MISSING = _load_triton()
