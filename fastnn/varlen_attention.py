"""Attention over sequences that lie packed one behind the other, without padding."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fastnn import _autograd, _check, _ops, backend, reference
from fastnn.attention import check_options, check_per_head, refused_by_kernels, window_sides
from fastnn.linear_act import dropout_seed, keep_mask

_NAME = "varlen_attention"


class VarlenAttentionFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        ops, query, key, value, starts_q, starts_k, longest_q, longest_k, alibi_slopes, sinks, seed,
        dropout_p, scale, softcap, bottom_right, left, right,
    ):  # fmt: skip
        return ops.varlen_attention_forward(
            query, key, value, starts_q, starts_k, longest_q, longest_k, alibi_slopes, sinks, seed,
            dropout_p, scale, softcap, bottom_right, left, right,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ops, query, key, value, starts_q, starts_k, *rest = inputs
        ctx.longest_q, ctx.longest_k, alibi_slopes, sinks, seed, *options = rest
        ctx.dropout_p, ctx.scale, ctx.softcap, ctx.bottom_right, ctx.left, ctx.right = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            query, key, value, starts_q, starts_k, alibi_slopes, sinks, seed, *output
        )

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 17
        query, key, value, starts_q, starts_k, alibi_slopes, sinks, seed, out, lse = (
            ctx.saved_tensors
        )
        if _autograd.wants_composite():
            q, k, v, sink = _composite_gradients(ctx, grad_out, grad_lse)
            return None, q, k, v, *(None,) * 5, sink, *(None,) * 7
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = ctx.needs_input_grad
        wanted = (needs[1], needs[2], needs[3], needs[9])
        gradients = ctx.ops.varlen_attention_backward(
            grad_out, grad_lse, query, key, value, starts_q, starts_k, ctx.longest_q,
            ctx.longest_k, alibi_slopes, sinks, seed, out, lse, ctx.dropout_p, ctx.scale,
            ctx.softcap, ctx.bottom_right, ctx.left, ctx.right, wanted,
        )  # fmt: skip
        q, k, v, sink = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        return None, q, k, v, *(None,) * 5, sink, *(None,) * 7


def _composite_gradients(ctx, grad_out, grad_lse):
    """Gradients that can be differentiated again: plain PyTorch, sequence by sequence."""
    query, key, value, starts_q, starts_k, alibi_slopes, sinks, seed, *_ = ctx.saved_tensors
    keep = None
    if ctx.dropout_p > 0:
        shape = (query.shape[1], query.shape[0], ctx.longest_k)
        keep = keep_mask(ctx.ops, shape, ctx.dropout_p, seed, query.detach())

    def composite(query, key, value, sinks):
        return reference.varlen_attention(
            query, key, value, starts_q.tolist(), starts_k.tolist(), 0.0, False, ctx.scale,
            query.shape[1] != key.shape[1],
            causal_alignment="bottom_right" if ctx.bottom_right else "top_left",
            window=(ctx.left, ctx.right), softcap=ctx.softcap or None, alibi_slopes=alibi_slopes,
            sinks=sinks, return_lse=True, keep=keep,
        )  # fmt: skip

    return _autograd.composite_gradients(
        composite, (query, key, value, sinks), (grad_out, grad_lse)
    )


def _check_arguments(
    query, key, value, starts, dropout_p, enable_gqa, causal_alignment, softcap, alibi_slopes, sinks
):
    fail = _check.fail
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            fail(RuntimeError, _NAME, name, "of shape (T, H, D)", tuple(tensor.shape))
    _check.same_kind(_NAME, "query", query, key=key, value=value)
    rows, heads, dim = query.shape
    keys, kv_heads, _ = key.shape
    if key.shape[-1] != dim:
        fail(RuntimeError, _NAME, "key", f"of shape (Tk, H, {dim})", tuple(key.shape))
    if value.shape[:-1] != key.shape[:-1]:
        fail(RuntimeError, _NAME, "value", f"of shape ({keys}, {kv_heads}, Dv)", tuple(value.shape))
    fits = kv_heads and heads % kv_heads == 0 if enable_gqa else heads == kv_heads
    if not fits:
        expected = f"of the query's {heads} heads" + ", or of a divisor" * bool(enable_gqa)
        fail(RuntimeError, _NAME, "key", expected, kv_heads)
    for name, tensor in starts.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            fail(RuntimeError, _NAME, name, "of dtype int32 or int64", tensor.dtype)
        if tensor.dim() != 1 or tensor.numel() == 0:
            fail(RuntimeError, _NAME, name, "of shape (N + 1,)", tuple(tensor.shape))
        if tensor.device != query.device:
            fail(RuntimeError, _NAME, name, f"on query's device {query.device}", tensor.device)
    counts = [tensor.numel() for tensor in starts.values()]
    if counts[0] != counts[1]:
        fail(
            RuntimeError, _NAME, "cu_seqlens_k", f"of cu_seqlens_q's length {counts[0]}", counts[1]
        )
    check_options(_NAME, dropout_p, causal_alignment, softcap)
    check_per_head(_NAME, "alibi_slopes", alibi_slopes, query.device, (heads,))
    check_per_head(_NAME, "sinks", sinks, query.device, (heads,))


def _values(side: str, starts: Tensor, rows: int, longest: int) -> list[int]:
    """The starts as a list, checked as the C++ kernels check them (csrc/cpu/varlen_attention.h)."""
    name, values = f"cu_seqlens_{side}", starts.tolist()
    if values[0] != 0:
        _check.fail(RuntimeError, _NAME, name, "0 at first", values[0])
    for first, last in itertools.pairwise(values):
        if last < first:
            _check.fail(RuntimeError, _NAME, name, "ascending", f"{last} after {first}")
        if last - first > longest:
            expected = f"at least the length {last - first} of a sequence"
            _check.fail(RuntimeError, _NAME, f"max_seqlen_{side}", expected, longest)
    if values[-1] != rows:
        _check.fail(RuntimeError, _NAME, name, f"{rows} at last, as the rows are", values[-1])
    return values


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` on each of the sequences packed in one tensor, unpadded.

        out[q[n] : q[n + 1]] = attention(query[q[n] : q[n + 1]], key[k[n] : k[n + 1]],
                                         value[k[n] : k[n + 1]])

    where q and k are the starts `cu_seqlens_q` and `cu_seqlens_k`: a sequence sees no other one,
    and rows and keys count from its own start. Sequences may be empty; a row of one without keys
    is 0 (with a log-sum-exp of -inf).

    Args:
        query: (Tq, Hq, D), float32, bfloat16 or float16 (float64 on the CPU), of any strides, such
            as a slice of packed projections.
        key: (Tk, H, D). value: (Tk, H, Dv). H is Hq, or divides it with `enable_gqa`.
        cu_seqlens_q: (N + 1,), int32 (or int64, which costs a conversion): where each sequence's
            rows start, 0 first, ascending, Tq last. cu_seqlens_k: the same of the keys, Tk last.
        max_seqlen_q: at least the longest sequence's number of rows. max_seqlen_k: of keys.
        dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap: as for
            `scaled_dot_product_attention`, with each sequence's own Sq and Sk.
        alibi_slopes: (Hq,). sinks: (Hq,).
        return_lse: also return the log-sum-exp of each row's scores, differentiable.
    Returns:
        (Tq, Hq, Dv) of the query's dtype; with `return_lse` also (Hq, Tq) in float32 (float64 for
        float64).
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, `dropout_p` outside [0, 1]; on the
            CPU also starts that are not as said. On a GPU the starts are not read by the host and
            wrong ones are not found.
        ValueError: unknown `causal_alignment`, a `window` or `softcap` out of range.
        TypeError: an argument that is no tensor.
    Backends:
        native (CPU, and CUDA with head dimensions up to 256), triton, reference (a loop over the
        sequences, as is the second derivative: it reads the starts on the host).
    Reference:
        Dao 2023 (arXiv:2307.08691); torch.nn.attention.varlen.varlen_attn.
    """
    _check.tensor(
        _NAME, query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, alibi_slopes_or_none=alibi_slopes, sinks_or_none=sinks,
    )  # fmt: skip
    query, key, value = _autograd.autocast(query, key, value)
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    _check_arguments(
        query, key, value, starts, dropout_p, enable_gqa, causal_alignment, softcap, alibi_slopes,
        sinks,
    )  # fmt: skip
    left, right = window_sides(_NAME, window)
    if is_causal:
        right = 0
    refused = refused_by_kernels(query, alibi_slopes)
    if refused and backend.current_backend() not in ("auto", "reference"):
        _check.fail(NotImplementedError, _NAME, *refused)
    ops = None
    if not refused:
        ops = backend.resolve(
            "varlen_attention", query, head_dim=query.shape[-1], value_dim=value.shape[-1],
            dropout=dropout_p > 0, softcap=softcap is not None, window=left >= 0 or right > 0,
            alibi=alibi_slopes is not None, sinks=sinks is not None,
        )  # fmt: skip
    if ops is None or (ops is _ops.TRITON and query.is_cpu):
        starts_q = _values("q", cu_seqlens_q, query.shape[0], max_seqlen_q)
        starts_k = _values("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    if ops is None:
        return reference.varlen_attention(
            query, key, value, starts_q, starts_k, dropout_p, is_causal, scale, enable_gqa,
            causal_alignment=causal_alignment, window=None if window is None else (left, right),
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    arguments = (
        query, key, value, cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32),
        max_seqlen_q, max_seqlen_k, alibi_slopes, sinks,
        dropout_seed(query.device) if dropout_p > 0.0 else None, dropout_p,
        1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale), float(softcap or 0.0),
        causal_alignment == "bottom_right", left, right,
    )  # fmt: skip
    if _autograd.is_recorded(query, key, value, sinks):
        out, lse = _autograd.apply(VarlenAttentionFunction, ops, *arguments)
    else:
        out, lse = ops.varlen_attention_forward(*arguments)
    return (out, lse) if return_lse else out
