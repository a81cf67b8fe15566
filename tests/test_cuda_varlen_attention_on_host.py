"""The CUDA attention kernels on packed sequences, run on the host as in
test_cuda_attention_on_host.py.
"""

import ctypes
import itertools
import math

import pytest
import torch
from conftest import assert_close_to_oracle
from philox_oracle import dropout_mask
from test_cuda_attention_on_host import (
    BF16,
    FP16,
    FP32,
    INT64,
    SEED,
    Backward,
    Forward,
    Operand,
    amid_nan,
    attention_library,
)
from test_cuda_on_host import CANARY, DTYPES, guarded

from fastnn import reference

# (rows, keys) of the sequences: empty ones of either kind, more than a tile, a single row.
LENGTHS = ((37, 45), (0, 5), (70, 3), (5, 0), (1, 130), (100, 90), (0, 0))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return attention_library(tmp_path_factory.getbasetemp())


class Packed:
    """A call on sequences that lie one behind the other, and what is expected of it."""

    def __init__(
        self, host, lengths=LENGTHS, *, heads=2, heads_k=None, dim=24, value_dim=None,
        dtype=FP32, bottom_right=False, left=-1, right=-1, softcap=0.0, alibi=False, sinks=False,
        dropout_p=0.0, splits=None, more=0,
    ):  # fmt: skip
        self.host, self.splits, self.outputs = host, splits, []
        host.set_seed(7)
        generator = torch.Generator().manual_seed(5)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        self.starts = [[0, *itertools.accumulate(side)] for side in zip(*lengths, strict=True)]
        self.ranges = list(zip(*map(itertools.pairwise, self.starts), strict=True))
        self.longest = [max(side) + more for side in zip(*lengths, strict=True)]
        rows, keys = (side[-1] for side in self.starts)
        heads_k, value_dim = heads_k or heads, value_dim or dim
        # The query is cut from wider rows, as of a packed projection.
        self.query = torch.cat([normal(rows, heads, dim)] * 2, 1).to(dtype)[:, :heads]
        self.key = normal(keys, heads_k, dim).to(dtype)
        self.value = normal(keys, heads_k, value_dim).to(dtype)
        self.grad_out = normal(rows, heads, value_dim).to(dtype)
        self.grad_lse = normal(heads, rows)
        self.alibi = torch.rand(heads, generator=generator) if alibi else None
        self.sinks = normal(heads) if sinks else None
        self.softcap, self.dropout_p, self.scale = softcap, dropout_p, dim**-0.5
        self.band = (bottom_right, left, right)
        if dropout_p:
            keep = dropout_mask(SEED, heads * rows, self.longest[1], dropout_p)
            self.keep = torch.from_numpy(keep).view(heads, rows, self.longest[1])

    def expected(self, dtype):
        """(out, lse, dq, dk, dv[, dsinks]): the reference, sequence by sequence."""
        leaves = [self.query, self.key, self.value, *([] if self.sinks is None else [self.sinks])]
        leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
        query, key, value = leaves[:3]
        bottom_right, left, right = self.band
        outs, lses = [], []
        for (q0, q1), (k0, k1) in self.ranges:
            keep = None
            if self.dropout_p:
                keep = self.keep[None, :, q0:q1, : k1 - k0].to(dtype)
            out, lse = reference.scaled_dot_product_attention(
                query[q0:q1].transpose(0, 1)[None], key[k0:k1].transpose(0, 1)[None],
                value[k0:k1].transpose(0, 1)[None], None, self.dropout_p, False, self.scale, True,
                causal_alignment="bottom_right" if bottom_right else "top_left",
                window=(left, right), softcap=self.softcap or None, alibi_slopes=self.alibi,
                sinks=leaves[3] if self.sinks is not None else None, return_lse=True, keep=keep,
            )  # fmt: skip
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        out, lse = torch.cat(outs), torch.cat(lses, 1)
        loss = (out * self.grad_out.to(dtype)).sum()
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * self.grad_lse.to(lse.dtype)).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    def output(self, *shape, dtype=None):
        dtype = dtype or self.query.dtype
        tensor, buffer = guarded(shape, torch.empty(shape).stride(), dtype, CANARY)
        self.outputs.append((tensor, buffer))
        return tensor

    def check_outputs(self):
        for tensor, buffer in self.outputs:
            canary = torch.tensor(CANARY, dtype=buffer.dtype)
            assert int((buffer == canary).sum()) == buffer.numel() - tensor.numel()
        self.outputs.clear()

    def problem(self, kind):
        query, key, value = (amid_nan(t) for t in (self.query, self.key, self.value))
        starts = [torch.tensor(side, dtype=torch.int32) for side in self.starts]
        batch, heads = len(starts[0]) - 1, query.shape[1]
        per_head = [
            None if t is None else t.expand(batch, heads).contiguous()
            for t in (self.alibi, self.sinks)
        ]
        seed = torch.tensor(SEED)
        bottom_right, left, right = self.band
        threshold = math.floor(self.dropout_p * 65536 + 0.5)

        def operand(tensor):
            return Operand(tensor.data_ptr(), 0, tensor.stride(1), tensor.stride(0))

        problem = kind(
            storage=DTYPES[query.dtype], batches=batch, heads=heads, kv_heads=key.shape[1],
            queries=self.longest[0], keys=self.longest[1], dim=query.shape[2],
            value_dim=value.shape[2], query=operand(query), key=operand(key), value=operand(value),
            scale=self.scale, softcap=self.softcap, left=left, right=right,
            slopes=None if per_head[0] is None else per_head[0].data_ptr(),
            sinks=None if per_head[1] is None else per_head[1].data_ptr(),
            seed=seed.data_ptr() if self.dropout_p else None, threshold=threshold,
            keep_scale=65536 / (65536 - threshold), query_starts=starts[0].data_ptr(),
            key_starts=starts[1].data_ptr(), query_rows=query.shape[0], key_rows=key.shape[0],
            each_bottom_right=bottom_right,
        )  # fmt: skip
        return problem, [query, key, value, *starts, *per_head, seed], operand

    def forward(self):
        problem, kept, _ = self.problem(Forward)
        rows, heads, _ = self.query.shape
        out = self.output(rows, heads, self.value.shape[2])
        lse = self.output(heads, rows, dtype=FP32)
        reference = ctypes.byref(problem)
        problem.out, problem.lse = out.data_ptr(), lse.data_ptr()
        problem.splits = self.splits or self.host.splits(reference, 4)
        partial = torch.empty(self.host.split_scratch(reference, INT64(problem.splits)))
        problem.partial = partial.data_ptr() if problem.splits > 1 else None
        assert self.host.forward_portable(reference) == 0
        self.check_outputs()
        return out, lse

    def backward(self, out, lse):
        problem, kept, operand = self.problem(Backward)
        upstream, saved = amid_nan(self.grad_out), amid_nan(out)
        problem.grad_out, problem.out = operand(upstream), operand(saved)
        problem.saved_lse, problem.grad_lse = lse.data_ptr(), self.grad_lse.data_ptr()
        problem.rows = self.output(2, *lse.shape, dtype=FP32).data_ptr()
        gradients = [self.output(*t.shape) for t in (self.query, self.key, self.value)]
        for name, tensor in zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True):
            setattr(problem, name, tensor.data_ptr())
        reference = ctypes.byref(problem)
        assert self.host.rows(reference) == 0
        assert self.host.backward_portable(reference) == 0
        if self.sinks is not None:
            sums = self.output(problem.batches, lse.shape[0], dtype=FP32)
            problem.grad_sinks = sums.data_ptr()
            problem.sink_rows = self.output(*lse.shape, dtype=FP32).data_ptr()
            assert self.host.sinks_gradient(reference) == 0
            gradients.append(sums.sum(0).to(self.query.dtype))
        self.check_outputs()
        return gradients

    def check(self):
        ours = self.forward()
        ours = [*ours, *self.backward(*ours)]
        dtype = self.query.dtype
        plain, exact = self.expected(dtype), self.expected(torch.float64)
        for index, results in enumerate(zip(ours, plain, exact, strict=True)):
            assert_close_to_oracle(*results, what=f"result {index}")
        return ours


OPTIONS = {
    "plain": {},
    "causal": dict(right=0, more=30),
    "bottom_right": dict(bottom_right=True, right=0, heads=4, heads_k=2),
    "window": dict(left=9, right=3, bottom_right=True, value_dim=40),
    "everything": dict(
        softcap=3.0, alibi=True, sinks=True, dropout_p=0.2, right=0, bottom_right=True,
        heads=4, heads_k=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_error_is_at_most_twice_torchs(host, dtype, option):
    Packed(host, dtype=dtype, **OPTIONS[option]).check()


def test_a_few_rows_share_a_tile_and_split_the_keys(host):
    lengths = ((1, 333), (3, 40), (0, 7), (2, 600), (1, 0))
    for splits in (1, 2, 5):
        Packed(
            host, lengths, heads=6, heads_k=2, dim=40, dtype=BF16, splits=splits,
            bottom_right=True, right=0, sinks=True, dropout_p=0.1,
        ).check()  # fmt: skip


def test_each_sequence_is_as_if_alone(host):
    """Bit for bit."""
    packed = Packed(host, ((70, 90), (37, 45)), dtype=BF16, softcap=2.0, right=0)
    out, lse, dq, dk, dv = packed.check()
    for n, ((q0, q1), (k0, k1)) in enumerate(packed.ranges):
        alone = Packed(host, ((q1 - q0, k1 - k0),), dtype=BF16, softcap=2.0, right=0)
        alone.query, alone.grad_out = packed.query[q0:q1], packed.grad_out[q0:q1]
        alone.key, alone.value = packed.key[k0:k1], packed.value[k0:k1]
        alone.grad_lse = packed.grad_lse[:, q0:q1].contiguous()
        results = alone.forward()
        results = [*results, *alone.backward(*results)]
        wanted = [out[q0:q1], lse[:, q0:q1], dq[q0:q1], dk[k0:k1], dv[k0:k1]]
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True)), n


def test_no_sequence_reaches_another(host):
    packed = Packed(host, ((40, 50), (30, 60), (64, 64)), dtype=BF16)
    clean = packed.check()
    for tensor, starts in (
        (packed.query, packed.starts[0]), (packed.key, packed.starts[1]),
        (packed.value, packed.starts[1]), (packed.grad_out, packed.starts[0]),
    ):  # fmt: skip
        tensor[starts[1] : starts[2]] = math.nan
    out, lse = packed.forward()
    dirty = [out, lse, *packed.backward(out, lse)]
    for index, (got, was) in enumerate(zip(dirty, clean, strict=True)):
        starts = packed.starts[1 if index > 2 else 0]
        if index == 1:
            got, was = got.t(), was.t()
        for part in (slice(0, starts[1]), slice(starts[2], None)):
            assert torch.equal(got[part], was[part]), index
