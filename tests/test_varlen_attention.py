"""Packed sequences: each is attention on its own, in values, gradients, options and bits."""

import math

import pytest
import torch
from attention_cases import DTYPES, NATIVE, cast, leaves_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from varlen_cases import (
    EMPTY,
    NAMES,
    OPTIONS,
    RAGGED,
    check_dropout,
    check_empty,
    check_poison,
    compare,
    operands,
    plain,
    results,
    seen,
    starts,
)

import fastnn
from fastnn import _ops
from fastnn.attention import scaled_dot_product_attention
from fastnn.varlen_attention import varlen_attention

pytestmark = NATIVE
ALL_DTYPES = (*DTYPES, torch.float64)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_rule(option, dtype):
    torch.manual_seed(2)
    for heads, kv_heads, dim, value_dim in ((4, 2, 16, 24), (3, 3, 64, 64), (2, 1, 7, 130)):
        qkv, grad_out = operands(RAGGED, dtype, heads, kv_heads, dim, value_dim)
        compare(qkv, RAGGED, OPTIONS[option](heads, dtype), grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_and_its_gradient(dtype):
    torch.manual_seed(2)
    qkv, grad_out = operands(RAGGED, dtype)
    options = {"sinks": torch.randn(4).to(dtype), "is_causal": True}
    compare(qkv, RAGGED, options, grad_out, torch.randn(4, sum(RAGGED[0])))


def test_lse_alone_has_a_gradient():
    qkv, _ = operands(((3, 4), (5, 2)), torch.float64, 2, 2)
    leaves = leaves_of(qkv)
    lengths = starts((3, 4)), starts((5, 2)), 4, 5
    lse = varlen_attention(*leaves, *lengths, return_lse=True)[1]
    wanted = plain(*leaves, *lengths, enable_gqa=False, return_lse=True)[1]
    torch.testing.assert_close(lse, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(lse.sum(), leaves[:2]), torch.autograd.grad(wanted.sum(), leaves[:2]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_same_bits_as_attention_on_each(option, dtype):
    torch.manual_seed(3)
    # The last is long enough that attention's backward takes P and dS apart.
    lengths = (5, 131, 1, 40), (7, 300, 290, 4100)
    qkv, grad_out = operands(lengths, dtype)
    options = cast(OPTIONS[option](4, dtype), dtype)
    mine = results(varlen_attention, leaves_of(qkv), lengths, options, grad_out)
    q, k = (starts(n).tolist() for n in lengths)
    for n in range(4):
        rows, keys = slice(q[n], q[n + 1]), slice(k[n], k[n + 1])
        parts = [
            t[cut].transpose(0, 1)[None].detach().requires_grad_()
            for t, cut in zip(qkv, (rows, keys, keys), strict=True)
        ]
        out = scaled_dot_product_attention(*parts, enable_gqa=True, **options)
        gradients = torch.autograd.grad(out, parts, grad_out[rows].transpose(0, 1)[None])
        for name, tensor in zip(("out", *NAMES[:3]), (out, *gradients), strict=True):
            ours = mine[name][keys if name in ("key", "value") else rows]
            assert torch.equal(ours, tensor[0].transpose(0, 1)), (n, name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("packed", "heads first", "columns", "expanded"))
def test_views(layout, dtype):
    torch.manual_seed(4)
    lengths = ((5, 0, 130), (5, 0, 130))
    qkv, grad_out = operands(lengths, dtype, 3, 3, 16, 16)
    same = compared = [*qkv, grad_out]
    if layout == "packed":  # as one projection leaves them
        compared = [*torch.stack(qkv, 1).unbind(1), grad_out]
    elif layout == "heads first":
        compared = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in same]
    elif layout == "columns":
        compared = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in same]
    else:
        compared = [*qkv[:2], qkv[2][:, :1].expand(-1, 3, -1), grad_out[:1].expand(135, -1, -1)]
    # What leaves_of() makes of a view keeps its strides.
    compare(compared[:3], lengths, {"is_causal": True}, compared[3])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dropout_is_the_generators_mask(dtype):
    torch.manual_seed(5)
    qkv, grad_out = operands(RAGGED, dtype)
    check_dropout(qkv, RAGGED, grad_out, _ops.NATIVE, torch.float64)


def test_dropout_everything_and_rate():
    lengths = starts((40, 0, 24)), starts((512, 3, 200)), 40, 512
    q, ones = torch.zeros(64, 4, 16), torch.ones(715, 4, 16)
    assert not varlen_attention(q, ones, ones, *lengths, dropout_p=1.0).any()
    torch.manual_seed(6)
    out = varlen_attention(q, ones, ones, *lengths, dropout_p=0.25)
    assert abs(out[:40].mean().item() - 1.0) < 0.011  # 81920 draws: five standard deviations
    assert not torch.equal(out, varlen_attention(q, ones, ones, *lengths, dropout_p=0.25))
    torch.manual_seed(6)
    assert torch.equal(out, varlen_attention(q, ones, ones, *lengths, dropout_p=0.25))


def test_repeats_and_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    # Many of a size, one that is most of the work among small ones, a decoding batch
    cases = (
        ((64,) * 9, (64,) * 9),
        ((3, 500, 0, 20), (9, 600, 5, 30)),
        ((1,) * 5, (900, 3, 0, 40, 8)),
    )
    try:
        for lengths in cases:
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(7)
                qkv, grad_out = operands(lengths, dtype, 2, 1, 32, 32)
                options = cast(OPTIONS["everything"](2, dtype), dtype)
                runs = []
                for n in (1, 2, 2, 3):
                    torch.set_num_threads(n)
                    torch.manual_seed(8)
                    leaves = leaves_of(qkv)
                    runs.append(
                        results(varlen_attention, leaves, lengths, options, grad_out, dropout_p=0.2)
                    )
                for other in runs[1:]:
                    assert all(torch.equal(runs[0][name], other[name]) for name in other)
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_not_changed_and_backward_repeats():
    torch.manual_seed(9)
    qkv, grad_out = operands(RAGGED, torch.bfloat16)
    leaves = leaves_of(qkv)
    before = [t.clone() for t in (*leaves, grad_out)]
    out = varlen_attention(
        *leaves, *map(starts, RAGGED), *map(max, RAGGED), 0.1, True, enable_gqa=True
    )
    kept = out.clone()
    first = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(out, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, grad_out), strict=True))


def test_partial_gradients():
    torch.manual_seed(10)
    qkv, grad_out = operands(RAGGED, torch.float32)
    sinks = torch.randn(4)
    options = cast({"sinks": sinks}, torch.float32)
    full = results(varlen_attention, leaves_of(qkv), RAGGED, options, grad_out)
    for chosen in NAMES:
        tensors = dict(zip(NAMES, (*qkv, sinks), strict=True))
        leaf = tensors[chosen] = tensors[chosen].detach().clone().requires_grad_()
        sink = tensors.pop("sinks")
        out = varlen_attention(
            *tensors.values(), *map(starts, RAGGED), *map(max, RAGGED), enable_gqa=True, sinks=sink
        )
        assert torch.equal(torch.autograd.grad(out, leaf, grad_out)[0], full[chosen]), chosen


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_other_sequences_do_not_leak(dtype, poison):
    torch.manual_seed(11)
    lengths = (2, 70, 5, 130), (40, 70, 3, 300)
    qkv, grad_out = operands(lengths, dtype)
    check_poison(poison, qkv, lengths, {}, grad_out)


@pytest.mark.parametrize("lengths", EMPTY, ids=str)
def test_empty(lengths):
    check_empty(lengths)


def test_starts_of_int64_and_lengths_that_are_too_long():
    torch.manual_seed(12)
    qkv, _ = operands(RAGGED, torch.float32)
    longest = list(map(max, RAGGED))
    out = varlen_attention(*qkv, *map(starts, RAGGED), *longest, enable_gqa=True)
    long_starts = [starts(n, torch.int64) for n in RAGGED]
    assert torch.equal(out, varlen_attention(*qkv, *long_starts, *longest, enable_gqa=True))
    more = [n + 1000 for n in longest]
    assert torch.equal(out, varlen_attention(*qkv, *long_starts, *more, enable_gqa=True))
    for backend in ("native", "triton"):
        with fastnn.use_backend(backend):
            all_of_it, far = (
                varlen_attention(*qkv, *map(starts, RAGGED), *longest, enable_gqa=True, window=w)
                for w in (None, 2**31 - 1)
            )
            assert torch.equal(all_of_it, far)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option):
    torch.manual_seed(13)
    lengths = (4, 0, 3), (5, 2, 0)
    qkv, _ = operands(lengths, torch.float64, 2, 1, 3, 2)
    options = cast(OPTIONS[option](2, torch.float64), torch.float64)
    learned = [n for n in ("sinks",) if n in options]

    def function(q, k, v, *rest):
        changed = options | dict(zip(learned, rest, strict=True))
        out, lse = varlen_attention(
            q, k, v, *map(starts, lengths), 4, 5, enable_gqa=True, return_lse=True, **changed
        )
        return out, seen(lse)

    tensors = (*leaves_of(qkv), *(options[n] for n in learned))
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_dropout_gradcheck():
    torch.manual_seed(14)
    lengths = (6, 1, 3), (5, 2, 9)
    qkv, _ = operands(lengths, torch.float64, 2, 2, 3, 2)

    def function(q, k, v):
        torch.manual_seed(15)
        return varlen_attention(q, k, v, *map(starts, lengths), 6, 9, 0.4)

    assert gradcheck(function, leaves_of(qkv))
    assert gradgradcheck(function, leaves_of(qkv))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 300)), max_size=6),
    kv_heads=st.integers(1, 2), group=st.integers(1, 3), dim=st.integers(1, 40),
    value_dim=st.integers(1, 40), is_causal=st.booleans(),
    causal_alignment=st.sampled_from(("top_left", "bottom_right")),
    window=st.none() | st.tuples(st.integers(-1, 60), st.integers(-1, 60)),
    softcap=st.none() | st.floats(0.5, 5.0), alibi=st.booleans(), sinks=st.booleans(),
)  # fmt: skip
def test_any_combination(
    lengths, kv_heads, group, dim, value_dim, is_causal, causal_alignment, window, softcap, alibi,
    sinks,
):  # fmt: skip
    torch.manual_seed(16)
    lengths = [n for n, _ in lengths], [n for _, n in lengths]
    assume(any(lengths[0]))
    heads = kv_heads * group
    qkv, grad_out = operands(lengths, torch.float64, heads, kv_heads, dim, value_dim)
    options = cast(
        {
            "is_causal": is_causal, "causal_alignment": causal_alignment, "window": window,
            "softcap": softcap, "alibi_slopes": torch.rand(heads) if alibi else None,
            "sinks": torch.randn(heads) if sinks else None,
        },
        torch.float64,
    )  # fmt: skip
    arguments = lengths, options, grad_out, torch.randn(heads, sum(lengths[0]))
    mine = results(varlen_attention, leaves_of(qkv), *arguments)
    exact = results(plain, leaves_of(qkv), *arguments)
    for name, ours in mine.items():
        torch.testing.assert_close(ours, exact[name], rtol=1e-10, atol=1e-10)


def _call(**changed):
    arguments = {
        "query": torch.randn(9, 4, 8), "key": torch.randn(12, 2, 8), "value": torch.randn(12, 2, 6),
        "cu_seqlens_q": starts((4, 5)), "cu_seqlens_k": starts((2, 10)), "max_seqlen_q": 5,
        "max_seqlen_k": 10, "enable_gqa": True,
    }  # fmt: skip
    return varlen_attention(**arguments | changed)


BAD = {
    "no tensor": ({"key": 3}, TypeError, "key must be a Tensor, got int"),
    "rank": ({"query": torch.randn(1, 9, 4, 8)}, RuntimeError, "query must be of shape"),
    "dtype": ({"key": torch.randn(12, 2, 8).double()}, RuntimeError, "key must be of query's dty"),
    "dim": ({"key": torch.randn(12, 2, 9)}, RuntimeError, r"key must be of shape \(Tk, H, 8\)"),
    "values": ({"value": torch.randn(11, 2, 6)}, RuntimeError, r"value must be of shape \(12, 2"),
    "heads": ({"enable_gqa": False}, RuntimeError, "key must be of the query's 4 heads, got 2"),
    "groups": ({"key": torch.randn(12, 3, 8), "value": torch.randn(12, 3, 8)}, RuntimeError,
               "or of a divisor, got 3"),
    "starts": ({"cu_seqlens_q": starts((4, 5)).float()}, RuntimeError, "int32 or int64"),
    "starts' rank": ({"cu_seqlens_q": starts((4, 5))[None]}, RuntimeError, r"\(N \+ 1,\)"),
    "no starts": ({"cu_seqlens_q": starts((4, 5))[:0]}, RuntimeError, r"\(N \+ 1,\)"),
    "counts": ({"cu_seqlens_k": starts((2, 9, 1))}, RuntimeError, "length 3, got 4"),
    "first": ({"cu_seqlens_q": starts((4, 5)) + 1}, RuntimeError,
              "cu_seqlens_q must be 0 at first"),
    "descending": ({"cu_seqlens_k": torch.tensor([0, 13, 12]), "max_seqlen_k": 99}, RuntimeError,
                   "cu_seqlens_k must be ascending, got 12 after 13"),
    "negative": ({"cu_seqlens_q": torch.tensor([0, -1, 9])}, RuntimeError, "ascending"),
    "last": ({"cu_seqlens_k": starts((2, 9))}, RuntimeError, "cu_seqlens_k must be 12 at last"),
    "past the end": ({"cu_seqlens_q": starts((4, 6)), "max_seqlen_q": 6}, RuntimeError,
                     "cu_seqlens_q must be 9 at last"),
    "longest": ({"max_seqlen_q": 4}, RuntimeError, "max_seqlen_q must be at least the length 5"),
    "longest keys": ({"max_seqlen_k": 9}, RuntimeError, "max_seqlen_k must be at least"),
    "dropout": ({"dropout_p": 1.5}, RuntimeError, "dropout_p must be in"),
    "alignment": ({"causal_alignment": "left"}, ValueError, "causal_alignment must be one of"),
    "window": ({"window": (1, 2, 3)}, ValueError, "varlen_attention: window must be"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be"),
    "slopes": ({"alibi_slopes": torch.rand(2)}, RuntimeError,
               r"alibi_slopes must be of shape \(4,\)"),
    "sinks": ({"sinks": torch.rand(2, 4)}, RuntimeError, r"sinks must be of shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_bad_input(name, backend):
    changed, kind, message = BAD[name]
    with fastnn.use_backend(backend), pytest.raises(kind, match=message):
        _call(**changed)


def test_reference_backend_and_what_only_it_serves():
    torch.manual_seed(17)
    qkv, _ = operands(((4, 5), (2, 10)), torch.float32, 4, 2, 8, 6)
    tensors = dict(zip(NAMES, qkv, strict=False))
    ours = _call(**tensors, is_causal=True)
    with fastnn.use_backend("reference"):
        torch.testing.assert_close(ours, _call(**tensors, is_causal=True))
    slopes = torch.rand(4, requires_grad=True)
    assert torch.autograd.grad(_call(**tensors, alibi_slopes=slopes).sum(), slopes)[0].any()


def test_opcheck():
    torch.manual_seed(18)
    lengths = (4, 0, 3), (5, 2, 0)
    qkv, grad_out = operands(lengths, torch.float32)
    packed = (*qkv, *map(starts, lengths), 4, 5, torch.rand(4), torch.randn(4))
    for seed, p in ((None, 0.0), (torch.tensor([3, 4]), 0.3)):
        options = (p, 0.25, 0.0, True, 3, -1)
        torch.library.opcheck(_ops.NATIVE.varlen_attention_forward, (*packed, seed, *options))
        out, lse = _ops.NATIVE.varlen_attention_forward(*packed, seed, *options)
        for wanted in ([True] * 4, [False, True, False, True]):
            torch.library.opcheck(
                _ops.NATIVE.varlen_attention_backward,
                (grad_out, lse, *packed, seed, out, lse, *options, wanted),
            )


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic):
    def step(q, k, v, starts_q, starts_k):
        out = varlen_attention(
            q, k, v, starts_q, starts_k, 131, 300, is_causal=True, enable_gqa=True, softcap=5.0
        )
        return out.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in (RAGGED, ((131, 7), (300, 1))):
        torch.manual_seed(19)
        qkv, _ = operands(lengths, torch.float32)
        pairs = []
        for function in (step, compiled):
            leaves = leaves_of(qkv)
            loss = function(*leaves, *map(starts, lengths))
            pairs.append((loss, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype):
    qkv, _ = operands(RAGGED, torch.float32)
    leaves = leaves_of(qkv)
    arguments = (*map(starts, RAGGED), *map(max, RAGGED))
    with torch.autocast("cpu", dtype):
        out = varlen_attention(*leaves, *arguments, enable_gqa=True)
    assert out.dtype == dtype
    assert torch.equal(
        out, varlen_attention(*(t.to(dtype) for t in qkv), *arguments, enable_gqa=True)
    )
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


def test_func_transforms():
    torch.manual_seed(20)
    lengths = (4, 3), (5, 2)
    batches = [operands(lengths, torch.float32, 2, 2, 4, 4)[0] for _ in range(3)]
    arguments = (*map(starts, lengths), 4, 5)

    def loss(q, k, v):
        return varlen_attention(q, k, v, *arguments, is_causal=True).square().sum()

    stacked = [torch.stack(tensors) for tensors in zip(*batches, strict=True)]
    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*stacked)
    for sample, qkv in enumerate(batches):
        leaves = leaves_of(qkv)
        for ours, wanted in zip(gradients, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(ours[sample], wanted)
