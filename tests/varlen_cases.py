"""What the tests of packed sequences share: operands, options, results and their oracle."""

import itertools
import math

import torch
from attention_cases import cast, leaves_of, values
from conftest import assert_close_to_oracle

from fastnn import reference
from fastnn.linear_act import dropout_seed, keep_mask
from fastnn.varlen_attention import varlen_attention

NAMES = ("query", "key", "value", "sinks")
# Rows and keys of each sequence: none of either, one, few, more than a block, more rows than keys
RAGGED = ((5, 0, 1, 131, 2, 0, 37), (7, 3, 0, 300, 290, 0, 20))
# Nothing at all, empty sequences, keys without rows, rows without keys
EMPTY = (((), ()), ((0, 0), (0, 0)), ((0,), (4,)), ((3, 1), (0, 0)))
OPTIONS = {
    "plain": lambda h, dtype: {},
    "causal": lambda h, dtype: {"is_causal": True},
    "bottom_right": lambda h, dtype: {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": lambda h, dtype: {"window": (5, 3)},
    "window_bottom_right": lambda h, dtype: {
        "window": (40, 7), "causal_alignment": "bottom_right",
    },
    "scale": lambda h, dtype: {"scale": -0.3},
    "softcap": lambda h, dtype: {"softcap": 1.5},
    "alibi": lambda h, dtype: {
        "alibi_slopes": torch.rand(h), "is_causal": True, "causal_alignment": "bottom_right",
    },
    "sinks": lambda h, dtype: {"sinks": values((h,), dtype), "is_causal": True},
    "everything": lambda h, dtype: {
        "window": (60, 50), "softcap": 3.0, "alibi_slopes": torch.rand(h),
        "sinks": values((h,), dtype), "causal_alignment": "bottom_right", "scale": 0.2,
    },
}  # fmt: skip


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def operands(lengths, dtype, heads=4, kv_heads=2, dim=16, value_dim=24):
    """query, key, value, and the gradient of out"""
    rows, keys = map(sum, lengths)
    shapes = (rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim)
    return [values(shape, dtype) for shape in shapes], values((rows, heads, value_dim), dtype)


def results(function, qkv, lengths, options, grad_out, grad_lse=None, **extra):
    """{name: tensor} of out, lse (if its gradient is given) and every gradient."""
    leaves = dict(zip(NAMES, (*qkv, options.get("sinks")), strict=True))
    leaves = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    outputs = function(
        *qkv, *map(starts, lengths), *(max(n, default=0) for n in lengths),
        enable_gqa=qkv[0].shape[1] != qkv[1].shape[1], return_lse=grad_lse is not None, **options,
        **extra,
    )  # fmt: skip
    outputs = outputs if grad_lse is not None else (outputs,)
    upstream = [g.to(o.dtype) for g, o in zip((grad_out, grad_lse), outputs, strict=False)]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), upstream, materialize_grads=True
    )
    return dict(zip(("out", "lse"), outputs, strict=False)) | dict(
        zip(leaves, gradients, strict=True)
    )


def plain(
    query, key, value, starts_q, starts_k, longest_q, longest_k, *, enable_gqa, dropout_p=0.0,
    is_causal=False, scale=None, **options,
):  # fmt: skip
    """The reference with the arguments of the public function."""
    return reference.varlen_attention(
        query, key, value, starts_q.tolist(), starts_k.tolist(), dropout_p, is_causal, scale,
        enable_gqa, **options,
    )  # fmt: skip


def compare(qkv, lengths, options, grad_out, grad_lse=None, function=varlen_attention, keep=None):
    dtype = qkv[0].dtype
    extra = {} if keep is None else {"dropout_p": keep[0]}
    mine = results(
        function, leaves_of(qkv), lengths, cast(options, dtype), grad_out, grad_lse, **extra
    )
    same, exact = (
        results(
            plain, leaves_of(qkv, d), lengths, cast(options, d), grad_out, grad_lse,
            keep=None if keep is None else keep[1].to(d),
        )
        for d in (dtype, torch.float64)
    )  # fmt: skip
    for name, ours in mine.items():
        assert_close_to_oracle(ours, same[name], exact[name], what=name)


def seen(lse):
    """The lse without the -inf of rows that see nothing, for checks by finite differences."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def check_empty(lengths, function=varlen_attention):
    qkv, grad_out = operands(lengths, torch.float32, 2, 2, 8, 4)
    leaves = leaves_of(qkv)
    longest = [max(n, default=0) for n in lengths]
    out, lse = function(*leaves, *map(starts, lengths), *longest, return_lse=True)
    assert out.shape == grad_out.shape and not out.any() and (lse == -math.inf).all()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, grad_out), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def check_dropout(qkv, lengths, grad_out, ops, wide, function=varlen_attention):
    """The mask is that of a matrix of the rows of all heads and the longest sequence's keys, which
    `ops` draws in the dtype `wide`."""
    state = torch.get_rng_state()
    seed = dropout_seed(qkv[0].device)
    shape = (qkv[0].shape[1], sum(lengths[0]), max(lengths[1]))
    keep = keep_mask(ops, shape, 0.3, seed, torch.ones((), dtype=wide))

    def seeded(*arguments, **named):
        torch.set_rng_state(state)
        return function(*arguments, **named)

    compare(qkv, lengths, {"is_causal": True}, grad_out, function=seeded, keep=(0.3, keep))


def check_poison(poison, qkv, lengths, options, grad_out, function=varlen_attention):
    """Sequences do not see what NaN or infinities another one has."""
    clean = results(function, leaves_of(qkv), lengths, options, grad_out)
    q, k = (starts(n).tolist() for n in lengths)
    for n in range(len(lengths[0])):
        poisoned = [t.clone() for t in qkv]
        for t, cut in zip(poisoned, (q, k, k), strict=True):
            t[cut[n] : cut[n + 1]] = poison
        dirty = results(function, leaves_of(poisoned), lengths, options, grad_out)
        for name, tensor in dirty.items():
            cut = k if name in ("key", "value") else q
            others = torch.ones(tensor.shape[0], dtype=torch.bool)
            others[cut[n] : cut[n + 1]] = False
            assert torch.equal(tensor[others], clean[name][others]), (n, name)
            if name == "out" and not options:  # all rows see all of their sequence's keys
                assert not torch.isfinite(tensor[~others]).any()
