"""The sequence shared out over 2 and 4 processes, against one process."""

from functools import partial

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

import torch.distributed as dist
from attention_cases import DTYPES, NATIVE, OPTIONS, compare, operands, values
from processes import Largest, own_half, refused

import fastnn
from fastnn._ring import Ring
from fastnn.distributed import (
    context_parallel_attention,
    shard_sequence,
    unshard_sequence,
)


def ring(query, key, value, *, layout="zigzag", group=None, return_lse=False, **options):
    """The attention of whole sequences, by their shards."""
    where = {"layout": layout, "group": group}
    shards = (shard_sequence(t, **where) for t in (query, key, value))
    out = context_parallel_attention(*shards, return_lse=return_lse, **where, **options)
    if not return_lse:
        return unshard_sequence(out, **where)
    return unshard_sequence(out[0], **where), unshard_sequence(out[1], -1, **where)


def shapes(ranks):
    """B, Hq, Hkv, Sq, Sk, D, Dv: grouped heads, one head, more than a block of keys."""
    length = 2 * ranks
    return (
        (2, 4, 2, 13 * length, 13 * length, 16, 24),
        (1, 1, 1, 9 * length, 9 * length, 7, 7),
        (1, 2, 2, 75 * length, 75 * length, 32, 32),
    )


def sequence(dtype, option):
    for layout in ("zigzag", "contiguous"):
        for shape in shapes(dist.get_world_size()):
            b, h, _, length = shape[:4]
            qkv, grad_out = operands(shape, dtype)
            grad_lse = values((b, h, length), torch.float32) if option == "lse" else None
            options = OPTIONS["causal" if option == "lse" else option]()
            compare(qkv, options, grad_out, grad_lse, partial(ring, layout=layout))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("option", ["plain", "causal", "softcap", "scale", "lse"])
def test_sequence(team, option, dtype):
    team.run(sequence, dtype, option)


def other_keys():
    """Keys of another length, other numbers of dimensions, one head of keys for all."""
    ranks = dist.get_world_size()
    qkv, grad_out = operands((2, 4, 2, 5 * ranks, 9 * ranks, 8, 6), torch.float64)
    compare(qkv, {}, grad_out, function=partial(ring, layout="contiguous"))
    for shape in ((6 * ranks, 8), (3, 6 * ranks, 8), (2, 3, 2, 6 * ranks, 8)):
        q, k, v = (values(shape, torch.float64) for _ in range(3))
        ours, wanted = (f(q, k, v, is_causal=True) for f in (ring, fastnn_attention))
        torch.testing.assert_close(ours, wanted)
    k, v = k[:, :1], v[:, :1]
    torch.testing.assert_close(ring(q, k, v), fastnn_attention(q, k, v))


fastnn_attention = fastnn.scaled_dot_product_attention


def test_other_keys(team):
    team.run(other_keys)


def attention_contract():
    """Views, bits, accumulation, frozen inputs, autocast, plain PyTorch, no second derivative."""
    shape = shapes(dist.get_world_size())[0]
    whole, grad_out = operands(shape, torch.bfloat16, "permuted")
    qkv = [shard_sequence(t) for t in whole]
    for layout in ("permuted", "column", "offset"):
        compare(operands(shape, torch.float32, layout)[0], {"is_causal": True}, grad_out,
                function=ring)  # fmt: skip
    upstream = shard_sequence(grad_out)
    leaves = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in qkv]
    before = [t.detach().clone() for t in leaves]

    def forward():
        return context_parallel_attention(*leaves, is_causal=True, enable_gqa=True)

    out = forward()
    once = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    out.backward(upstream, retain_graph=True)
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, once, strict=True))
    forward().backward(upstream)
    for leaf, grad, value in zip(leaves, once, before, strict=True):
        assert torch.equal(leaf.grad, grad + grad) and torch.equal(leaf, value)
        others = [t for t in leaves if t is not leaf]
        for other in others:
            other.requires_grad_(False)
        assert torch.equal(torch.autograd.grad(forward(), leaf, upstream)[0], grad)
        for other in others:
            other.requires_grad_(True)
    with torch.no_grad():
        assert torch.equal(forward(), out)
    with torch.autocast("cpu", torch.bfloat16):
        wide = [t.detach().float() for t in leaves]
        result = context_parallel_attention(*wide, is_causal=True, enable_gqa=True)
    assert result.dtype == torch.bfloat16 and torch.equal(result, out)
    with fastnn.use_backend("reference"):
        for option in ("causal", "softcap"):
            qkv, grad_out = operands(shape, torch.float64)
            grad_lse = values(qkv[0].shape[:-1], torch.float64)
            compare(qkv, OPTIONS[option](), grad_out, grad_lse, function=ring)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.autograd.grad(forward().sum(), leaves, create_graph=True)


def test_attention_contract(team):
    team.run(attention_contract)


def bad_sequences():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attention = context_parallel_attention
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    with refused(RuntimeError, "the same on every rank"):
        attention(q[:, :, rank:], k[:, :, rank:], v[:, :, rank:])
    with refused(RuntimeError, "the same on every rank"):
        attention(q, k, v, is_causal=rank == 0)
    with refused(RuntimeError, "an even one, with is_causal, got 5 and 5"):
        attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], is_causal=True)
    with refused(RuntimeError, "query must be of the key's length with is_causal, got 4 and 6"):
        attention(q[:, :, 2:], k, v, is_causal=True, layout="contiguous")
    with refused(NotImplementedError, "dropout_p must be 0, got 0.1"):
        attention(q, k, v, dropout_p=0.1)
    with refused(RuntimeError, "context_parallel_attention: key must be of batch dimensions"):
        attention(q, k[:, :1].expand(2, 3, 6, 8), v)
    with refused(ValueError, "layout must be one of zigzag, contiguous, got 'striped'"):
        attention(q, k, v, layout="striped")
    with refused(ValueError, "softcap must be"):
        attention(q, k, v, softcap=-1.0)
    with refused(TypeError, "key must be a Tensor"):
        attention(q, None, v)
    with refused(RuntimeError, f"length along dimension -2 that {2 * ranks} divides, got 15"):
        shard_sequence(torch.zeros(15, 2))
    with refused(RuntimeError, "even length along dimension 0, got 3"):
        unshard_sequence(torch.zeros(3), 0)
    with refused(RuntimeError, "shape must be the same on every rank"):
        unshard_sequence(torch.zeros(4, 2 + rank))
    with refused(IndexError, "dim must be"):
        shard_sequence(torch.zeros(8), 1)
    alone = dist.new_group([0])
    if rank == 0:
        assert torch.equal(shard_sequence(q, group=alone), q)
        torch.testing.assert_close(attention(q, k, v, group=alone), fastnn_attention(q, k, v))
    else:
        with pytest.raises(ValueError, match="one that this process belongs to"):
            attention(q, k, v, group=alone)


def test_bad_sequences(team):
    team.run(bad_sequences)


def shards():
    """Any dtype and dimension; each is the other's inverse and gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    places = torch.arange(6 * ranks)
    chunks = places.view(2 * ranks, 3)
    assert torch.equal(shard_sequence(places, 0).view(2, 3), chunks[[rank, 2 * ranks - 1 - rank]])
    mine = places.view(ranks, 6)[rank]
    assert torch.equal(shard_sequence(places, 0, layout="contiguous"), mine)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float16, torch.float64):
        whole = torch.randn(2, 6 * ranks, 3).to(dtype).transpose(0, 2)
        for layout in ("zigzag", "contiguous"):
            part = shard_sequence(whole, 1, layout=layout)
            assert torch.equal(unshard_sequence(part, 1, layout=layout), whole)
    leaf = torch.randn(6 * ranks, 3, requires_grad=True)
    factor = torch.randn(6 * ranks, 3)
    (unshard_sequence(shard_sequence(leaf).sin()) * factor).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf.detach().cos() * factor)


def test_shards(team):
    team.run(shards)


def memory():
    """Nothing of the size of the sequence is ever made."""
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        context_parallel_attention(q, k, v, is_causal=True).sum().backward()
    assert largest.elements == k.numel() + v.numel()


@NATIVE
def test_memory(team):
    team.run(memory)


def groups():
    """Both halves of the processes at once, each a group of its own."""
    group = own_half()
    length = 12 * dist.get_world_size(group)
    qkv, grad_out = operands((1, 2, 1, length, length, 8, 8), torch.float32)
    compare(qkv, {"is_causal": True}, grad_out, function=partial(ring, group=group))


def test_groups(team):
    team.run(groups)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_every_pair_meets_once(layout, ranks):
    """All steps of all ranks are the causal mask; in zigzag each rank does the same in each."""
    length = 6 if layout == "zigzag" else 3
    chunks = torch.arange(length * ranks).view(-1, 3)
    held = [
        chunks[[rank, 2 * ranks - 1 - rank]].flatten() if layout == "zigzag" else chunks[rank]
        for rank in range(ranks)
    ]
    met = torch.zeros(length * ranks, length * ranks, dtype=torch.int64)
    for rank in range(ranks):
        ring = Ring(None, 1.0, 0.0, True, layout == "zigzag", rank, ranks, None)
        for step in range(ranks):
            meets = ring.meeting(step, length)
            if meets is None:
                assert layout == "contiguous" and step > rank
                continue
            rows, columns, causal = meets
            rows, columns = held[rank][rows], held[(rank - step) % ranks][columns]
            pairs = torch.ones(len(rows), len(columns), dtype=torch.int64)
            met[rows[:, None], columns] += pairs.tril() if causal else pairs
            if layout == "zigzag" and step:
                assert pairs.sum() == length * length / 2
    assert torch.equal(met, torch.ones_like(met).tril())
