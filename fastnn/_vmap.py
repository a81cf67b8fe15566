"""torch.vmap over the operators: samples fold into a batch dimension where the operator has one
that treats them apart, and are calls of their own elsewhere (losses, weights' gradients, dropout).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _samples(x: Tensor | None, batched: bool, size: int) -> Tensor | None:
    return x if x is None or batched else x.expand(size, *x.shape)


def _fold_linear_act(op, size, batched, args):
    input, weight, bias, residual, seed, *options = args
    if batched[1] or batched[2] or seed is not None:
        return None
    input, residual = _samples(input, batched[0], size), _samples(residual, batched[3], size)
    out, preact = op(input, weight, bias, residual, seed, *options)
    return (out, preact), (0, 0 if options[2] else None)


def _rows(x: Tensor | None, batched: bool, size: int) -> Tensor | None:
    """(B, ...) as (size * B, ...)"""
    return None if x is None else _samples(x, batched, size).flatten(0, 1)


def _broadcast_rows(x: Tensor | None, batched: bool, size: int, shape) -> Tensor | None:
    """The same of what broadcasts to a first dimension of B, or stays as it is."""
    if x is None or not (batched or x.dim() == len(shape) and x.shape[0] > 1):
        return x
    x = _samples(x, batched, size)
    if x.dim() == len(shape):  # (size, H): without B
        x = x.unsqueeze(1)
    return x.expand(size, shape[0], *x.shape[2:]).flatten(0, 1)


def _fold_attention_inputs(size, batched, q, k, v, mask, slopes, sinks):
    lead = q.shape[batched[0] : 2 + batched[0]]
    q, k, v = (_rows(x, b, size) for x, b in zip((q, k, v), batched, strict=False))
    mask = _broadcast_rows(mask, batched[3], size, (*lead, 0, 0))
    slopes = _broadcast_rows(slopes, batched[4], size, lead)
    sinks = _broadcast_rows(sinks, batched[5], size, lead)
    return q, k, v, mask, slopes, sinks


def _fold_attention(op, size, batched, args):
    *tensors, seed = args[:7]
    if seed is not None:
        return None
    results = op(*_fold_attention_inputs(size, batched, *tensors), seed, *args[7:])
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0, 0)


def _fold_attention_backward(op, size, batched, args):
    grad_out, grad_lse, *tensors, seed, out, lse = args[:11]
    wanted = args[-1]
    if seed is not None or wanted[3] or wanted[4]:
        return None
    grad_out, grad_lse, out, lse = (
        _rows(args[index], batched[index], size) for index in (0, 1, 9, 10)
    )
    folded = _fold_attention_inputs(size, batched[2:], *tensors)
    results = op(grad_out, grad_lse, *folded, seed, out, lse, *args[11:])
    results = (x.unflatten(0, (size, -1)) if w else x for x, w in zip(results, wanted, strict=True))
    return tuple(results), tuple(0 if w else None for w in wanted)


_FOLDS = {
    "linear_act_forward": _fold_linear_act,
    "attention_forward": _fold_attention,
    "attention_backward": _fold_attention_backward,
}


def rule(name: str, op: Callable) -> Callable:
    """The function that torch.library.register_vmap wants for an operator that returns tensors."""
    fold = _FOLDS.get(name)

    def vmap(info, in_dims, *args):
        batched = [isinstance(dim, int) for dim in in_dims]
        args = [
            x.movedim(dim, 0) if b else x for x, dim, b in zip(args, in_dims, batched, strict=True)
        ]
        folded = fold and fold(op, info.batch_size, batched, args)
        if folded is not None:
            return folded
        each = [
            op(*(x[sample] if b else x for x, b in zip(args, batched, strict=True)))
            for sample in range(info.batch_size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * len(
            each[0]
        )

    return vmap
