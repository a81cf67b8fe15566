"""Attention whose keys and values pass around a ring of processes.

Every rank attends with its own queries to the block of keys and values that it has, while the block
is on its way to the next rank. Results are merged by their log-sum-exp, in float32. The backward
goes around once more: given the final result and log-sum-exp, the operator's gradients of a block
are exactly those of the whole attention; a block's own gradients follow it, adding up, and end one
step further, at home. Each exchange is one of all ranks, in one order, so none waits for another.
Liu, Zaharia & Abbeel 2023 (arXiv:2310.01889).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastnn import _autograd, reference
from fastnn._ops import accumulate_dtype


class _Passing:
    """A buffer on its way to the next rank, and one from the rank before."""

    def __init__(self, buffer: Tensor, rank: int, ranks: int, group):
        self.sent, self.received = buffer, torch.empty_like(buffer)
        ends = (dist.isend, buffer, rank + 1), (dist.irecv, self.received, rank - 1)
        self.works = dist.batch_isend_irecv(
            [dist.P2POp(op, t, group=group, group_peer=peer % ranks) for op, t, peer in ends]
        )

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class Ring(NamedTuple):
    """The ranks, and the attention of one rank's queries to the keys of another."""

    ops: SimpleNamespace | None
    scale: float
    softcap: float
    causal: bool
    zigzag: bool
    rank: int
    ranks: int
    group: dist.ProcessGroup | None

    def send(self, buffer: Tensor) -> _Passing:
        return _Passing(buffer, self.rank, self.ranks, self.group)

    def meeting(self, step: int, length: int):
        """(rows of queries, of keys, causal) of a step's work; None where no key is seen.

        A rank's own keys come first. In zigzag the keys of a rank before are seen by all queries in
        their first chunk and by none in their last; those of a rank after, by the last chunk of
        queries: half of the products either way.
        """
        everything, source = slice(None), self.rank - step
        if not self.causal or step == 0:
            return everything, everything, self.causal
        if self.zigzag and source >= 0:
            return everything, slice(length // 2), False
        if self.zigzag:
            return slice(length // 2, None), everything, False
        return (everything, everything, False) if source >= 0 else None

    def forward(self, query, key, value, causal):
        if self.ops is None:
            return self._plain(query, key, value, causal)
        return self.ops.attention_forward(
            query, key, value, None, None, None, None, 0.0, self.scale, self.softcap, False, -1,
            0 if causal else -1,
        )  # fmt: skip

    def backward(self, grad_out, grad_lse, query, key, value, out, lse, causal, wanted):
        """Gradients of the queries and keys that meet, of the attention to all keys."""
        if self.ops is not None:
            if query.is_cpu and self.ranks > 1:
                # Where all keys are in one tile the kernel takes rowsum(dO O) from its own products
                # and divides by the row's sum of probabilities: it is that of these keys' own O.
                part, _ = self.forward(query, key, value, causal)
                own = (grad_out * (part.to(lse.dtype) - out)).sum(-1)
                grad_lse, out = own if grad_lse is None else own + grad_lse, part
            return self.ops.attention_backward(
                grad_out, grad_lse, query, key, value, None, None, None, None, out, lse, 0.0,
                self.scale, self.softcap, False, -1, 0 if causal else -1, (*wanted, False, False),
            )[:3]  # fmt: skip
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (query, key, value)]
            part, part_lse = self._plain(*inputs, causal)
        # out = sum of share * part, where share = exp(part_lse - lse)
        share = (part_lse.detach() - lse).exp().unsqueeze(-1)
        to_lse = share * (grad_out * (part.detach() - out)).sum(-1, keepdim=True)
        if grad_lse is not None:
            to_lse = to_lse + share * grad_lse.unsqueeze(-1)
        upstream = share * grad_out, to_lse.squeeze(-1)
        return torch.autograd.grad((part, part_lse), inputs, upstream)

    def _plain(self, query, key, value, causal):
        # In float32, or the parts would be rounded once more than one attention is.
        query, key, value = (t.to(accumulate_dtype(t.dtype)) for t in (query, key, value))
        gqa = query.shape[1] != key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            return reference.scaled_dot_product_attention(
                query, key, value, None, 0.0, causal, self.scale, gqa,
                softcap=self.softcap or None, return_lse=True,
            )  # fmt: skip


def _unpacked(buffer: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = buffer.split([key.numel(), value.numel()])
    return keys.view(key.shape), values.view(value.shape)


def _packed(key: Tensor, value: Tensor) -> Tensor:
    """One buffer, so that one message takes both."""
    buffer = key.new_empty(key.numel() + value.numel())
    for place, tensor in zip(_unpacked(buffer, key, value), (key, value), strict=True):
        place.copy_(tensor)
    return buffer


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds to `out`, in place, the attention to further keys."""
    total = torch.logaddexp(lse, part_lse)
    finite = total.masked_fill(total == -math.inf, 0.0)  # of rows that have seen no key
    out *= (lse - finite).exp().unsqueeze(-1)
    out.addcmul_(part.to(out.dtype), (part_lse - finite).exp().unsqueeze(-1))
    lse.copy_(total)


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, ring):
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        wide, blocks = accumulate_dtype(query.dtype), _packed(key, value)
        for step in range(ring.ranks):
            passing = ring.send(blocks) if step + 1 < ring.ranks else None
            meets = ring.meeting(step, key.shape[2])
            if meets is not None:
                rows, columns, causal = meets
                k, v = (t[:, :, columns] for t in _unpacked(blocks, key, value))
                part, part_lse = ring.forward(query[:, :, rows], k, v, causal)
                if step == 0:
                    out, lse = part.to(wide), part_lse
                else:
                    _merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
            if passing is not None:
                blocks = passing.wait()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if _autograd.wants_composite():
            raise NotImplementedError(
                "context_parallel_attention cannot be differentiated twice (create_graph=True)"
            )
        query, key, value, out, lse = ctx.saved_tensors
        ring = ctx.ring
        if grad_out is None and grad_lse is None:
            return (None,) * 4
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        of_query, of_keys = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        wide, blocks = accumulate_dtype(query.dtype), _packed(key, value)
        grad_query = torch.zeros_like(query, dtype=wide) if of_query else None
        # The gradients of keys and values go around behind them, adding up, one step further: home.
        grad_blocks, following = torch.zeros_like(blocks, dtype=wide), None
        for step in range(ring.ranks):
            passing = ring.send(blocks) if step + 1 < ring.ranks else None
            meets = ring.meeting(step, key.shape[2])
            if meets is not None:
                rows, columns, causal = meets
                q, o, o_lse, grad_o, grad_l = (
                    None if t is None else t[:, :, rows]
                    for t in (query, out, lse, grad_out, grad_lse)
                )
                k, v = (t[:, :, columns] for t in _unpacked(blocks, key, value))
                wanted = of_query, of_keys, of_keys
                grads = ring.backward(grad_o, grad_l, q, k, v, o, o_lse, causal, wanted)
                if of_query:
                    grad_query[:, :, rows] += grads[0]
            if following is not None:
                grad_blocks = following.wait()
            if meets is not None and of_keys:
                pair = _unpacked(grad_blocks, key, value)
                for total, grad in zip(pair, grads[1:], strict=True):
                    total[:, :, columns] += grad
            if of_keys and ring.ranks > 1:
                following = ring.send(grad_blocks)
            if passing is not None:
                blocks = passing.wait()
        if following is not None:
            grad_blocks = following.wait()
        grads = grad_query, *_unpacked(grad_blocks, key, value)
        return *(
            grad.to(query.dtype) if wanted else None
            for grad, wanted in zip(grads, ctx.needs_input_grad, strict=False)
        ), None
