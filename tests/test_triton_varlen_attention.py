"""The Triton attention kernels on packed sequences, under the interpreter, against fp64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import math

import pytest
import torch
from attention_cases import cast, leaves_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from varlen_cases import (
    EMPTY,
    OPTIONS,
    check_dropout,
    check_empty,
    check_poison,
    compare,
    operands,
    results,
    starts,
)

import fastnn
from fastnn import _ops
from fastnn.varlen_attention import varlen_attention

pytestmark = pytest.mark.skipif(
    _ops.TRITON_MISSING is not None or torch.cuda.is_available(),
    reason=f"no Triton kernels under the interpreter: {_ops.TRITON_MISSING}",
)
RAGGED = (5, 0, 1, 40, 0), (7, 3, 0, 50, 0)


def triton(*arguments, **named):
    with fastnn.use_backend("triton"):
        return varlen_attention(*arguments, **named)


@pytest.mark.parametrize("option", OPTIONS)
def test_error_rule(option):
    torch.manual_seed(1)
    qkv, grad_out = operands(RAGGED, torch.float32)
    options = OPTIONS[option](4, torch.float32)
    compare(qkv, RAGGED, options, grad_out, torch.randn(4, 46), function=triton)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("option", ("bottom_right", "everything"))
def test_half_types(option, dtype):
    torch.manual_seed(2)
    qkv, grad_out = operands(RAGGED, dtype)
    compare(qkv, RAGGED, OPTIONS[option](4, dtype), grad_out, function=triton)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_dropout_is_the_generators_mask(dtype):
    torch.manual_seed(3)
    qkv, grad_out = operands(RAGGED, dtype)
    check_dropout(qkv, RAGGED, grad_out, _ops.TRITON, torch.float32, triton)


def test_views_of_packed_projections():
    torch.manual_seed(4)
    lengths = (5, 0, 40), (5, 0, 40)
    packed = torch.randn(45, 3, 3, 16)
    grad_out = torch.randn(1, 3, 16).expand(45, -1, -1)
    compare(packed.unbind(1), lengths, {"is_causal": True}, grad_out, function=triton)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4),
    group=st.integers(1, 2), dim=st.integers(1, 20), is_causal=st.booleans(),
    causal_alignment=st.sampled_from(("top_left", "bottom_right")),
    window=st.none() | st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
)  # fmt: skip
def test_any_combination(lengths, group, dim, is_causal, causal_alignment, window):
    torch.manual_seed(5)
    lengths = [n for n, _ in lengths], [n for _, n in lengths]
    assume(any(lengths[0]))
    qkv, grad_out = operands(lengths, torch.float32, 2 * group, 2, dim, dim)
    options = {"is_causal": is_causal, "causal_alignment": causal_alignment, "window": window}
    compare(qkv, lengths, options, grad_out, function=triton)


def test_other_sequences_do_not_leak():
    torch.manual_seed(6)
    lengths = (2, 40, 5), (40, 33, 3)
    qkv, grad_out = operands(lengths, torch.float32)
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    check_poison(math.nan, qkv, lengths, options, grad_out, triton)


@pytest.mark.parametrize("lengths", EMPTY, ids=str)
def test_empty(lengths):
    check_empty(lengths, triton)


def test_same_bits_again_and_contiguous_results():
    torch.manual_seed(7)
    qkv, grad_out = operands(RAGGED, torch.float32)
    options = cast(OPTIONS["everything"](4, torch.float32), torch.float32)
    runs = []
    for _ in range(2):
        torch.manual_seed(8)
        leaves = leaves_of(qkv)
        runs.append(results(triton, leaves, RAGGED, options, grad_out, dropout_p=0.2))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(tensor.is_contiguous() for tensor in runs[0].values())


def test_bad_starts():
    qkv, _ = operands(((4, 5), (2, 10)), torch.float32)
    with pytest.raises(RuntimeError, match="cu_seqlens_k must be 12 at last"):
        triton(*qkv, starts((4, 5)), starts((2, 9)), 5, 10, enable_gqa=True)


def test_opcheck():
    torch.manual_seed(9)
    lengths = (4, 0, 3), (5, 2, 0)
    qkv, grad_out = operands(lengths, torch.float32)
    packed = (*qkv, *map(starts, lengths), 4, 5, None, torch.randn(4), None)
    options = (0.0, 0.25, 0.0, True, 3, -1)
    torch.library.opcheck(_ops.TRITON.varlen_attention_forward, (*packed, *options))
    out, lse = _ops.TRITON.varlen_attention_forward(*packed, *options)
    torch.library.opcheck(
        _ops.TRITON.varlen_attention_backward,
        (grad_out, lse, *packed, out, lse, *options, [True] * 4),
    )
