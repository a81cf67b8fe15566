"""Scaled dot-product attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnn import _autograd, _check, backend, reference
from fastnn.linear_act import dropout_seed, keep_mask

_NAME = "scaled_dot_product_attention"
_ALIGNMENTS = ("top_left", "bottom_right")
# On the CPU, `auto` leaves plain float32 calls of so few products B H Sq Sk D to torch: its graph
# is made in C++, ours in Python. Measured as our time over torch's, forward + backward: 2^12 1.8,
# 2^18 1.5, 2^20 1.15, 2^21 1.07, 2^23 0.95; bfloat16 0.4 from 2^16 on.
_TORCH_UP_TO = 2**20
LEFT_TO_TORCH = (
    f"float32 calls of at most {_TORCH_UP_TO} products B H Sq Sk D, with no option but a scale,"
    " outside of torch.compile and torch.func: torch's call costs less"
)


class AttentionFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        ops, query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, scale, softcap,
        bottom_right, left, right,
    ):  # fmt: skip
        return ops.attention_forward(
            query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, scale, softcap,
            bottom_right, left, right,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ops, query, key, value, attn_mask, alibi_slopes, sinks, seed, *options = inputs
        ctx.dropout_p, ctx.scale, ctx.softcap, ctx.bottom_right, ctx.left, ctx.right = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, attn_mask, alibi_slopes, sinks, seed, *output)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 14
        query, key, value, attn_mask, alibi_slopes, sinks, seed, out, lse = ctx.saved_tensors
        if _autograd.wants_composite():
            gradients = _composite_gradients(ctx, grad_out, grad_lse)
            return None, *gradients[:4], None, gradients[4], *(None,) * 7
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = ctx.needs_input_grad
        wanted = (needs[1], needs[2], needs[3], needs[4], needs[6])
        gradients = ctx.ops.attention_backward(
            grad_out, grad_lse, query, key, value, attn_mask, alibi_slopes, sinks, seed, out, lse,
            ctx.dropout_p, ctx.scale, ctx.softcap, ctx.bottom_right, ctx.left, ctx.right, wanted,
        )  # fmt: skip
        q, k, v, mask, sink = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        return None, q, k, v, mask, None, sink, *(None,) * 7


def _composite_gradients(ctx, grad_out, grad_lse):
    """Gradients that can be differentiated again: plain PyTorch, holding all the scores."""
    query, key, value, attn_mask, alibi_slopes, sinks, seed, *_ = ctx.saved_tensors
    keep = None
    if ctx.dropout_p > 0:
        shape = (*query.shape[:-1], key.shape[-2])
        keep = keep_mask(ctx.ops, shape, ctx.dropout_p, seed, query.detach())

    def composite(query, key, value, attn_mask, sinks):
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, False, ctx.scale, query.shape[1] != key.shape[1],
            causal_alignment="bottom_right" if ctx.bottom_right else "top_left",
            window=(ctx.left, ctx.right), softcap=ctx.softcap or None, alibi_slopes=alibi_slopes,
            sinks=sinks, return_lse=True, keep=keep,
        )  # fmt: skip

    tensors = (query, key, value, attn_mask, sinks)
    return _autograd.composite_gradients(composite, tensors, (grad_out, grad_lse))


def _left_to_torch(query, key) -> bool:
    """Whether such a call, beyond which nothing is asked for, costs less in torch.

    In few words: each tensor attribute read here is 0.2 % of the smallest call. Torch then checks
    what is not looked at.
    """
    return (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and query.dtype == torch.float32
        and query.is_cpu
        and not query.is_nested
        and key.dim() == 4
        and 0 < query.numel() * key.size(2) <= _TORCH_UP_TO
        and backend.chosen == "auto"
        and not torch.compiler.is_compiling()  # the graph would be of these sizes only
        and not _autograd.transforming()  # torch's kernel has no batching rule
    )


def check_arguments(
    function, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, causal_alignment,
    softcap,
):  # fmt: skip
    fail = _check.fail
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            fail(RuntimeError, function, name, "of at least 2 dimensions", tuple(tensor.shape))
    _check.same_kind(function, "query", query, key=key, value=value)
    shape, key_shape, value_shape = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if key_shape[-1] != shape[-1]:
        fail(RuntimeError, function, "key", f"of shape (..., {shape[-1]})", key_shape)
    if value_shape[-2] != key_shape[-2]:
        fail(RuntimeError, function, "value", f"of shape (..., {key_shape[-2]}, Dv)", value_shape)
    lead = shape[:-2]
    alike = len(lead) == 2 and lead == key_shape[:-2] == value_shape[:-2] and lead[1] > 0
    for name, other in () if alike else (("key", key_shape), ("value", value_shape)):
        batch, other_batch = lead, other[:-2]
        if enable_gqa:
            if len(other) < 3 or len(shape) < 3:
                fail(RuntimeError, function, name, "of 3 or more dimensions with enable_gqa", other)
            if not other[-3] or shape[-3] % other[-3]:
                expected = f"of a number of heads that divides the query's {shape[-3]}"
                fail(RuntimeError, function, name, expected, other[-3])
            batch, other_batch = shape[:-3], other[:-3]
        if batch != other_batch and not _broadcasts(batch, other_batch):
            expected = f"of batch dimensions that broadcast with the query's {batch}"
            fail(RuntimeError, function, name, expected, other)
    if attn_mask is not None:
        if is_causal:
            fail(RuntimeError, function, "attn_mask", "None when is_causal is set", "a mask")
        if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
            expected = f"bool, float32 or of the query's dtype {query.dtype}"
            fail(RuntimeError, function, "attn_mask", expected, attn_mask.dtype)
        if attn_mask.device != query.device:
            expected = f"on query's device {query.device}"
            fail(RuntimeError, function, "attn_mask", expected, attn_mask.device)
    check_options(function, dropout_p, causal_alignment, softcap)


def check_options(function, dropout_p, causal_alignment, softcap) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        _check.fail(RuntimeError, function, "dropout_p", "in [0, 1]", dropout_p)
    if causal_alignment not in _ALIGNMENTS:
        _check.choice(function, "causal_alignment", causal_alignment, _ALIGNMENTS)
    if softcap is not None and not softcap > 0:
        _check.fail(ValueError, function, "softcap", "None or above 0", softcap)


def _broadcasts(a, b) -> bool:
    short = min(len(a), len(b))
    return short == 0 or all(
        x == y or x == 1 or y == 1 for x, y in zip(a[-short:], b[-short:], strict=True)
    )


def window_sides(function: str, window) -> tuple[int, int]:
    """(left, right) with -1 for unlimited."""
    if window is None:
        return -1, -1
    sides = (window, window) if isinstance(window, int) else tuple(window)
    sides = tuple(-1 if side is None else side for side in sides)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= -1 for side in sides):
        expected = "None, a width or a pair (left, right)"
        _check.fail(ValueError, function, "window", expected, window)
    return sides


def check_per_head(function: str, name: str, values: Tensor | None, device, *shapes) -> None:
    """Values of which each head has one have one of the shapes."""
    if values is None:
        return
    if tuple(values.shape) not in shapes:
        expected = f"of shape {' or '.join(map(str, dict.fromkeys(shapes)))}"
        _check.fail(RuntimeError, function, name, expected, tuple(values.shape))
    if not values.is_floating_point():
        _check.fail(RuntimeError, function, name, "of a floating dtype", values.dtype)
    if values.device != device:
        _check.fail(RuntimeError, function, name, f"on query's device {device}", values.device)


def as_batches(query, key, value, attn_mask, enable_gqa):
    """Views of (B, H, S, D), a mask of four dimensions that broadcasts, and the leading shape."""
    lead, kv_lead = query.shape[:-2], key.shape[:-2]
    if attn_mask is None and len(lead) == len(kv_lead) == 2 and kv_lead == value.shape[:-2]:
        if lead == kv_lead or (enable_gqa and lead[0] == kv_lead[0]):
            return query, key, value, None, lead
    heads = query.shape[-3:-2]
    if not enable_gqa:
        heads = torch.broadcast_shapes(heads, key.shape[-3:-2], value.shape[-3:-2])
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        batch = torch.broadcast_shapes(batch, key.shape[:-3], value.shape[:-3])
    kv_heads = key.shape[-3:-2]
    if kv_heads != value.shape[-3:-2] or (not enable_gqa and kv_heads != (1,)):
        kv_heads = heads  # (1,) is left as it is: one head that every query head reads

    def shaped(tensor, wanted_heads):
        shape = (*batch, *wanted_heads, *tensor.shape[-2:])
        if enable_gqa and tensor.shape[-3:-2] != wanted_heads:
            tensor = tensor.repeat_interleave(wanted_heads[0] // tensor.shape[-3], -3)
        if tuple(tensor.shape) != shape:
            tensor = tensor.expand(shape)
        if len(batch) == 1:
            return tensor
        if len(batch) > 1:
            return tensor.flatten(0, len(batch) - 1)
        return tensor[(None,) * (4 - tensor.dim())]

    lead = (*batch, *heads)
    if attn_mask is not None:
        full = (*lead, query.shape[-2], key.shape[-2])
        mask_shape = tuple(attn_mask.shape)
        fits = len(mask_shape) <= len(full) and all(
            m in (1, n) for m, n in zip(reversed(mask_shape), reversed(full), strict=False)
        )
        if not fits:
            _check.fail(RuntimeError, _NAME, "attn_mask", f"broadcastable to {full}", mask_shape)
        if len(batch) > 1 and len(mask_shape) > 3:
            rest = mask_shape[-3:]
            if any(n != 1 for n in mask_shape[:-3]):
                attn_mask = attn_mask.expand(*batch, *rest)
            attn_mask = attn_mask.reshape(-1, *rest)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return shaped(query, heads), shaped(key, kv_heads), shaped(value, kv_heads), attn_mask, lead


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
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
    """Exact attention in memory linear in the sequence, forward and backward.

        out = dropout(softmax(S)) value
        S[i, j] = softcap(scale query[i] . key[j]) - slope |i + shift - j| + attn_mask[i, j]

    where softcap(x) = softcap tanh(x / softcap), shift = Sk - Sq for the bottom-right alignment,
    else 0. A row that sees no key gives 0 (and a log-sum-exp of -inf); NaN and infinities in hidden
    keys and values do not reach the rows that do not see them (the reference is as torch there; on
    Triton they may where another row of the same tile sees them).

    Args:
        query: (..., Hq, Sq, D), float32, bfloat16 or float16 (float64 on the CPU); 2 or more
            dimensions.
        key: (..., H, Sk, D). value: (..., H, Sk, Dv). H is Hq, or divides it with `enable_gqa`.
        attn_mask: broadcastable to (..., Hq, Sq, Sk): bool (True takes part), or numbers to add, of
            the query's dtype or float32, which may require a gradient. Never expanded in memory.
        dropout_p: the probability of dropping a probability, rounded to 1/65536.
        is_causal: row i sees the keys j <= i + shift. Not together with `attn_mask`.
        scale: 1 / sqrt(D) by default.
        enable_gqa: query head h reads key and value head h // (Hq // H).
        causal_alignment: "top_left" as torch, or "bottom_right": the last row sees the last key.
        window: (left, right), or one width for both sides: row i sees the keys from
            i + shift - left to i + shift + right; -1 or None is unlimited.
        softcap: above 0.
        alibi_slopes: (Hq,) or (B, Hq).
        sinks: (Hq,) or (B, Hq): logits of a further key whose value is 0, per head.
        return_lse: also return the log-sum-exp of each row's scores, differentiable.
    Returns:
        (..., Hq, Sq, Dv) of the query's dtype; with `return_lse` also (..., Hq, Sq) in float32
        (float64 for float64).
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, `dropout_p` outside [0, 1], both
            `attn_mask` and `is_causal`.
        ValueError: unknown `causal_alignment`, a `window` or `softcap` out of range.
        TypeError: an argument that is no tensor.
    Backends:
        native (CPU, and CUDA with head dimensions up to 256), triton, reference. Autocast as for
        torch's function. Under `auto`, float32 calls of up to 2^20 products B Hq Sq Sk D on the CPU
        with no option but `scale`, outside of torch.compile and torch.func, are torch's own, whose
        call costs less (and which cannot be differentiated twice).
    Reference:
        Vaswani et al. 2017 (arXiv:1706.03762); Dao 2023 (arXiv:2307.08691).
    """
    if (
        attn_mask is window is softcap is alibi_slopes is sinks is None
        and not (dropout_p or is_causal or return_lse or enable_gqa)
        and causal_alignment == "top_left"
        and _left_to_torch(query, key)
    ):
        return reference.torch_attention(query, key, value, scale=scale)
    _check.tensor(
        _NAME, query=query, key=key, value=value, attn_mask_or_none=attn_mask,
        alibi_slopes_or_none=alibi_slopes, sinks_or_none=sinks,
    )  # fmt: skip
    query, key, value, attn_mask = _autograd.autocast(query, key, value, attn_mask)
    if not query.is_nested:  # those have no shape to check; torch does it
        check_arguments(
            _NAME, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa,
            causal_alignment, softcap,
        )  # fmt: skip
    left, right = window_sides(_NAME, window)
    if is_causal:
        right = 0
    bottom_right = causal_alignment == "bottom_right"
    refused = refused_by_kernels(query, alibi_slopes)
    if refused and backend.current_backend() not in ("auto", "reference"):
        _check.fail(NotImplementedError, _NAME, *refused)
    ops = None
    if not refused:
        q, k, v, mask, lead = as_batches(query, key, value, attn_mask, enable_gqa)
        batch, heads = q.shape[:2]
        for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
            shapes = (heads,), (batch, heads), (1, heads)
            check_per_head(_NAME, name, per_head, q.device, *shapes)
        ops = backend.resolve(
            "attention", query, head_dim=q.shape[-1], value_dim=v.shape[-1],
            dropout=dropout_p > 0, softcap=softcap is not None, window=left >= 0 or right > 0,
            alibi=alibi_slopes is not None, sinks=sinks is not None,
            mask_grad=mask is not None and mask.requires_grad,
        )  # fmt: skip
    if ops is None:
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            causal_alignment=causal_alignment, window=None if window is None else (left, right),
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    seed = dropout_seed(q.device) if dropout_p > 0.0 else None
    arguments = (
        q, k, v, mask, alibi_slopes, sinks, seed, dropout_p, scale, float(softcap or 0.0),
        bottom_right, left, right,
    )  # fmt: skip
    if _autograd.is_recorded(q, k, v, mask, sinks):
        out, lse = _autograd.apply(AttentionFunction, ops, *arguments)
    else:
        out, lse = ops.attention_forward(*arguments)
    if len(lead) != 2:
        out = out.reshape(*lead, *out.shape[-2:])
        lse = lse.reshape(*lead, lse.shape[-1])
    return (out, lse) if return_lse else out


def refused_by_kernels(query, alibi_slopes) -> tuple[str, str, str] | None:
    """(argument, what it must be, what it is) where only plain PyTorch serves the call."""
    if query.is_nested or query.layout != torch.strided:
        return "query", "a dense tensor", str(query.layout)
    if query.shape[-1] == 0:
        return "query", "of a head dimension above 0", str(tuple(query.shape))
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        return "alibi_slopes", "without gradient", "one that requires it"
    return None
