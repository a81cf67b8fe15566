"""Plain-PyTorch versions of every function: the oracle of tests and benchmarks, the `reference`
backend, and the composite that is differentiated when a second derivative is asked for.

Where torch has the function, it is called; the rest is composed of differentiable operations.
`keep` is an optional dropout mask, already scaled by 1 / (1 - p), in place of torch's own dropout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._ops import accumulate_dtype

# Torch's own, also while `integrations.torch_sdpa` routes calls of that name here.
torch_attention = F.scaled_dot_product_attention


class Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    # The derivative is the same function of the output as of the input, so that the backward may
    # keep the output instead of the pre-activation.
    output_suffices: bool = False
    # act(gate) * up, where the pre-activation holds the gate's columns first
    gated: bool = False


ACTIVATIONS = {
    "identity": Activation(lambda x: x, output_suffices=True),
    "relu": Activation(F.relu, output_suffices=True),
    "gelu": Activation(F.gelu),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh")),
    "silu": Activation(F.silu),
    "sigmoid": Activation(torch.sigmoid),
    "tanh": Activation(torch.tanh),
    "leaky_relu": Activation(F.leaky_relu, output_suffices=True),
    "relu2": Activation(lambda x: F.relu(x).square()),
    "glu": Activation(torch.sigmoid, gated=True),
    "swiglu": Activation(F.silu, gated=True),
    "geglu": Activation(F.gelu, gated=True),
    "geglu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), gated=True),
    "reglu": Activation(F.relu, gated=True),
}


def _dropout(x, p, training, keep):
    if keep is not None:
        return x * keep
    return F.dropout(x, p, training) if p else x


def dropout(input, p=0.5, training=True, *, keep=None):
    return _dropout(input, p if training else 0.0, training, keep)


def linear_act(
    input, weight, bias=None, activation="identity", *, residual=None, dropout_p=0.0,
    training=True, keep=None,
):  # fmt: skip
    preact = F.linear(input, weight, bias)
    act = ACTIVATIONS[activation]
    if act.gated:
        gate, up = preact.chunk(2, dim=-1)
        out = act.value(gate) * up
    else:
        out = act.value(preact)
    out = _dropout(out, dropout_p if training else 0.0, training, keep)
    return out if residual is None else residual + out


def _soft_capped(logits, softcap):
    return logits if not softcap else softcap * torch.tanh(logits / softcap)


def cross_entropy(
    input, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0,
    z_loss=0.0, softcap=None, return_lse=False,
):  # fmt: skip
    logits = _soft_capped(input, softcap)
    loss = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    if not z_loss and not return_lse:
        return loss
    class_dim = 1 if input.dim() > 1 else 0
    lse = torch.logsumexp(logits.to(accumulate_dtype(input.dtype)), dim=class_dim)
    if z_loss:
        penalty = z_loss * lse.square()
        if target.dtype == torch.int64:
            counted = target != ignore_index
            penalty = torch.where(counted, penalty, 0.0)
            divisor = counted.to(lse.dtype)
            if weight is not None:
                divisor = divisor * weight.to(lse.dtype)[target.where(counted, 0)]
            divisor = divisor.sum()
        else:
            divisor = lse.new_tensor(float(lse.numel()))
        if reduction == "sum":
            penalty = penalty.sum()
        elif reduction == "mean":
            penalty = penalty.sum() / divisor
        loss = (loss + penalty).to(loss.dtype)
    return (loss, lse) if return_lse else loss


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
    ignore_index=None, label_smoothing=0.0, z_loss=0.0, softcap=None, shift=0, return_lse=False,
):  # fmt: skip
    """`shift` pairs input[..., i, :] with target[..., i + shift]; the last `shift` rows are cut."""
    if shift:
        length = input.shape[-2] - shift
        input, target = input[..., :length, :], target.narrow(input.dim() - 2, shift, length)
    options = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss,
        "softcap": softcap, "return_lse": return_lse,
    }  # fmt: skip
    classes, features = linear_weight.shape[0], linear_weight.shape[1:-1]
    logits = F.linear(input, linear_weight.flatten(0, -2))
    logits = logits.unflatten(-1, (classes, *features))
    if linear_bias is not None:
        logits = logits + linear_bias
    if features or input.dim() <= 2:
        return cross_entropy(logits, target, weight, **options)
    rows = input.shape[:-1]
    target = target.reshape(-1, *target.shape[len(rows) :])
    result = cross_entropy(logits.flatten(0, -2), target, weight, **options)
    loss, lse = result if return_lse else (result, None)
    loss = loss.view(rows) if reduction == "none" else loss
    return (loss, lse.view(rows)) if return_lse else loss


def band_mask(sq, sk, bottom_right, window_left, window_right, device=None):
    """Visible keys: shift - left <= j - i <= shift + right, shift = sk - sq if bottom_right else 0;
    a negative width is unlimited. None when everything is visible."""
    if window_left < 0 and window_right < 0:
        return None
    shift = sk - sq if bottom_right else 0
    distance = torch.arange(sk, device=device)[None, :] - torch.arange(sq, device=device)[:, None]
    distance = distance - shift
    visible = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if window_left >= 0:
        visible = visible & (distance >= -window_left)
    if window_right >= 0:
        visible = visible & (distance <= window_right)
    return visible


def attention_scores(
    query, key, attn_mask, alibi_slopes, scale, softcap, bottom_right, window_left, window_right
):
    """(B, H, Sq, Sk) scores with -inf where a key is hidden; K has as many heads as Q."""
    scores = (query * scale) @ key.transpose(-2, -1)
    scores = _soft_capped(scores, softcap)
    sq, sk = scores.shape[-2:]
    if alibi_slopes is not None:
        shift = sk - sq if bottom_right else 0
        rows = torch.arange(sq, device=query.device)[:, None] + shift
        distance = (rows - torch.arange(sk, device=query.device)[None, :]).abs()
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    visible = band_mask(sq, sk, bottom_right, window_left, window_right, query.device)
    return scores if visible is None else scores.masked_fill(~visible, -math.inf)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, *, causal_alignment="top_left", window=None, softcap=None,
    alibi_slopes=None, sinks=None, return_lse=False, keep=None,
):  # fmt: skip
    bottom_right = causal_alignment == "bottom_right"
    plain = window is None and not softcap and alibi_slopes is None and sinks is None
    # The shapes last: nested tensors have none.
    square = not is_causal or not bottom_right or query.shape[-2] == key.shape[-2]
    if plain and square and not return_lse and keep is None:
        return torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    left, right = window if window is not None else (-1, -1)
    if is_causal:
        right = 0
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = attention_scores(
        query, key, attn_mask, alibi_slopes, scale, softcap, bottom_right, left, right
    )
    accumulate = accumulate_dtype(query.dtype)
    scores = scores.to(accumulate)
    if sinks is not None:
        extra = sinks.to(accumulate)[..., None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], dim=-1)
    # A row without a visible key has probability 0 everywhere (and lse -inf), not NaN.
    empty = (scores == -math.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1, keepdim=True)
    probabilities = torch.exp(scores - lse).masked_fill(empty, 0.0)[..., : key.shape[-2]]
    probabilities = _dropout(probabilities.to(query.dtype), dropout_p, True, keep)
    out = probabilities @ value
    if not return_lse:
        return out
    return out, lse.masked_fill(empty, -math.inf).squeeze(-1)


def varlen_attention(
    query, key, value, starts_q, starts_k, *options, return_lse=False, keep=None, **named
):
    """Sequence by sequence: rows starts_q[n] up to starts_q[n + 1] attend to the keys from
    starts_k[n] up to starts_k[n + 1]; both are lists of integers. `keep` is (H, Tq, columns)."""
    outs = [query[:0, :, :1].expand(-1, -1, value.shape[-1])]
    lses = [query.new_empty((query.shape[1], 0), dtype=accumulate_dtype(query.dtype))]
    for n, (first, last) in enumerate(itertools.pairwise(starts_q)):
        if first == last:
            continue
        keys = slice(starts_k[n], starts_k[n + 1])
        q, k, v = (
            tensor[rows].transpose(0, 1)[None]
            for tensor, rows in ((query, slice(first, last)), (key, keys), (value, keys))
        )
        mask = None if keep is None else keep[None, :, first:last, : k.shape[-2]]
        result = scaled_dot_product_attention(
            q, k, v, None, *options, return_lse=return_lse, keep=mask, **named
        )
        out, lse = result if return_lse else (result, None)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0] if return_lse else None)
    out = torch.cat(outs)
    return (out, torch.cat(lses, 1)) if return_lse else out
