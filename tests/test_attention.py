"""Attention: values, gradients, options, dropout, threads and hidden NaN against the oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    DTYPES,
    NAMES,
    NATIVE,
    OPTIONS,
    SHAPES,
    cast,
    compare,
    lay_out,
    leaves_of,
    operands,
    results,
    values,
)
from conftest import assert_close_to_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastnn import _ops, reference
from fastnn.attention import scaled_dot_product_attention as attention
from fastnn.linear_act import dropout_seed, keep_mask

pytestmark = NATIVE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_rule(option, dtype):
    torch.manual_seed(1)
    for shape in SHAPES:
        b, h, _, sq, sk, _, _ = shape
        qkv, grad_out = operands(shape, dtype)
        compare(qkv, OPTIONS[option](b, h, sq, sk, dtype), grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("permuted", "column", "offset"))
def test_views(layout, dtype):
    torch.manual_seed(2)
    for shape in SHAPES[:3]:
        b, h, _, sq, sk, _, _ = shape
        qkv, grad_out = operands(shape, dtype, layout)
        mask = lay_out(values((b, h, sq, sk), dtype), layout)
        compare(qkv, {"attn_mask": mask}, grad_out)
        compare(qkv, {"attn_mask": mask > 0, "softcap": 2.0}, grad_out)


def test_double_is_exact():
    torch.manual_seed(3)
    for shape in (*SHAPES, (1, 1, 1, 1, 1, 1, 1)):
        qkv, grad_out = operands(shape, torch.float64)
        for option in ("plain", "bottom_right", "everything"):
            b, h, _, sq, sk, _, _ = shape
            options = OPTIONS[option](b, h, sq, sk, torch.float64)
            mine = results(attention, leaves_of(qkv), cast(options, torch.float64), grad_out)
            plain = results(
                reference.scaled_dot_product_attention, leaves_of(qkv),
                cast(options, torch.float64), grad_out,
            )  # fmt: skip
            for name, ours in mine.items():
                torch.testing.assert_close(ours, plain[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_and_its_gradient(dtype):
    torch.manual_seed(4)
    for shape in SHAPES:
        b, h, _, sq, sk, _, _ = shape
        qkv, grad_out = operands(shape, dtype)
        # window and top-left alignment: every row sees its own key or has none after Sk
        options = {"attn_mask": values((h, 1, sk), dtype), "sinks": values((h,), dtype)}
        compare(qkv, options, grad_out, torch.randn(b, h, sq))


def test_lse_alone_has_a_gradient():
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lse = attention(q, k, v, return_lse=True)[1]
    wanted = torch.logsumexp(q @ k.transpose(-1, -2) / 2, -1)
    torch.testing.assert_close(lse, wanted)
    for ours, plain in zip(
        torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(wanted.sum(), (q, k)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("lead", ((), (3,), (2, 3), (2, 2, 3)), ids=str)
def test_ranks_and_expanded_gradients(lead):
    torch.manual_seed(5)
    q = torch.randn(*lead, 7, 8, requires_grad=True)
    k, v = (torch.randn(*lead, 9, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(*lead, 7, 9) > 0.3
    ours, torchs = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.shape == torchs.shape
    torch.testing.assert_close(ours, torchs)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (q, k, v)),  # the gradient of sum() has strides of 0
        torch.autograd.grad(torchs.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_broadcast_batches_and_heads():
    torch.manual_seed(6)
    for q_shape, k_shape in (((2, 3, 5, 8), (1, 1, 6, 8)), ((1, 3, 5, 8), (2, 3, 6, 8)),
                             ((5, 8), (3, 6, 8)), ((2, 3, 5, 8), (3, 6, 8))):  # fmt: skip
        q, k, v = (torch.randn(s, requires_grad=True) for s in (q_shape, k_shape, k_shape))
        ours, torchs = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(ours, torchs)
        for a, b in zip(
            torch.autograd.grad(ours.square().sum(), (q, k, v)),
            torch.autograd.grad(torchs.square().sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 4, 6, 8)
    torch.testing.assert_close(
        attention(q, k, v, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )


@pytest.mark.parametrize("shape", ((0, 2, 2, 3, 4, 8, 8), (1, 0, 0, 3, 4, 8, 8),
                                   (1, 2, 2, 0, 4, 8, 8), (1, 2, 2, 3, 0, 8, 8),
                                   (1, 2, 2, 3, 4, 8, 0)), ids=str)  # fmt: skip
def test_empty(shape):
    qkv, grad_out = operands(shape, torch.float32)
    b, h, _, sq, sk, _, _ = shape
    leaves = leaves_of(qkv)
    out, lse = attention(*leaves, torch.zeros(sq, sk), return_lse=True)
    assert out.shape == grad_out.shape
    assert not out.any() and (sk > 0 or (lse == -math.inf).all())
    for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, grad_out), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def check_second_order(function, tensors):
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option):
    torch.manual_seed(7)
    b, h, hkv, sq, sk, d, dv = 1, 2, 1, 10, 12, 3, 2
    qkv, _ = operands((b, h, hkv, sq, sk, d, dv), torch.float64)
    options = cast(OPTIONS[option](b, h, sq, sk, torch.float64), torch.float64)
    learned = [n for n in ("attn_mask", "sinks")
               if options.get(n) is not None and options[n].requires_grad]  # fmt: skip

    def function(q, k, v, *rest):
        changed = options | dict(zip(learned, rest, strict=True))
        out, lse = attention(q, k, v, enable_gqa=True, return_lse=True, **changed)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    check_second_order(function, (*leaves_of(qkv), *(options[n] for n in learned)))


def test_dropout_gradcheck():
    torch.manual_seed(8)
    qkv, _ = operands((1, 2, 2, 9, 11, 3, 4), torch.float64)

    def function(q, k, v):
        torch.manual_seed(9)
        return attention(q, k, v, dropout_p=0.4)

    check_second_order(function, leaves_of(qkv))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_dropout_is_the_generators_mask(dtype):
    for shape in SHAPES:
        torch.manual_seed(10)
        b, h, _, sq, sk, _, _ = shape
        qkv, grad_out = operands(shape, dtype)
        state = torch.get_rng_state()
        mine = results(attention, leaves_of(qkv), {"is_causal": True}, grad_out, dropout_p=0.3)
        torch.set_rng_state(state)
        seed = dropout_seed(qkv[0].device)
        keep = keep_mask(_ops.NATIVE, (b, h, sq, sk), 0.3, seed, qkv[0].double())
        same, exact = (
            results(reference.scaled_dot_product_attention, leaves_of(qkv, d), {"is_causal": True},
                    grad_out, keep=keep.to(d))
            for d in (dtype, torch.float64)
        )  # fmt: skip
        for name, ours in mine.items():
            assert_close_to_oracle(ours, same[name], exact[name], what=name)


def test_dropout_everything_and_rate():
    q = torch.zeros(2, 2, 64, 16)
    ones = torch.ones(2, 2, 512, 16)
    assert not attention(q, ones, ones, dropout_p=1.0).any()
    torch.manual_seed(11)
    out = attention(q, ones, ones, dropout_p=0.25)
    assert abs(out.mean().item() - 1.0) < 0.01  # 131072 draws: five standard deviations are 0.008
    assert not torch.equal(out, attention(q, ones, ones, dropout_p=0.25))
    torch.manual_seed(11)
    assert torch.equal(out, attention(q, ones, ones, dropout_p=0.25))


def test_repeats_and_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        for shape in (
            (3, 2, 1, 200, 300, 32, 32),
            (1, 1, 1, 300, 520, 64, 64),
            (1, 4, 2, 2, 90, 8, 8),
        ):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(12)
                b, h, _, sq, sk, _, _ = shape
                qkv, grad_out = operands(shape, dtype)
                options = OPTIONS["everything"](b, h, sq, sk, dtype)
                for chosen in (options, options | {"attn_mask": options["attn_mask"] > 0}):
                    runs = []
                    for n in (1, 2, 2, 3):
                        torch.set_num_threads(n)
                        torch.manual_seed(13)
                        leaves, rest = leaves_of(qkv), cast(chosen, dtype)
                        runs.append(results(attention, leaves, rest, grad_out, dropout_p=0.2))
                    for other in runs[1:]:
                        assert all(torch.equal(runs[0][name], other[name]) for name in other)
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_not_changed_and_backward_repeats():
    torch.manual_seed(14)
    qkv, grad_out = operands(SHAPES[0], torch.bfloat16)
    leaves = leaves_of(qkv)
    mask = values((37, 70), torch.bfloat16).requires_grad_()
    before = [t.clone() for t in (*leaves, mask, grad_out)]
    out = attention(*leaves, mask, 0.1, enable_gqa=True)
    kept = out.clone()
    first = torch.autograd.grad(out, (*leaves, mask), grad_out, retain_graph=True)
    second = torch.autograd.grad(out, (*leaves, mask), grad_out, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(out, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, mask, grad_out), strict=True))


def test_partial_gradients():
    torch.manual_seed(15)
    qkv, grad_out = operands(SHAPES[0], torch.float32)
    mask, sinks = torch.randn(37, 70), torch.randn(4)
    full = results(
        attention,
        leaves_of(qkv),
        cast({"attn_mask": mask, "sinks": sinks}, torch.float32),
        grad_out,
    )
    for chosen in NAMES:
        tensors = dict(zip(NAMES, (*qkv, mask, sinks), strict=True))
        leaf = tensors[chosen] = tensors[chosen].detach().clone().requires_grad_()
        out = attention(**tensors, enable_gqa=True)
        assert torch.equal(torch.autograd.grad(out, leaf, grad_out)[0], full[chosen]), chosen


@pytest.mark.parametrize("kind", ("bool", "additive", "causal", "window"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_hidden_keys_do_not_leak(kind, dtype):
    """Rows that do not see a key are as if it were absent, NaN or not, with their gradients."""
    torch.manual_seed(16)
    for sq, sk in ((130, 300), (3, 40)):
        qkv, grad_out = operands((1, 2, 2, sq, sk, 16, 16), dtype)
        hidden = torch.zeros(sk, dtype=torch.bool)
        if kind == "causal":
            options = {"is_causal": True}
            hidden[sq:] = True
        elif kind == "window":
            options = {"window": (sk, 0), "causal_alignment": "top_left"}
            hidden[sq:] = True
        else:
            hidden = torch.rand(sk) > 0.5
            hide = ~hidden if kind == "bool" else torch.zeros(sk, dtype=dtype)
            options = {"attn_mask": hide if kind == "bool" else hide.masked_fill(hidden, -math.inf)}
        clean = results(attention, leaves_of(qkv), options, grad_out)
        for poison in (math.nan, math.inf):
            poisoned = [t.clone() for t in qkv]
            for t in poisoned[1:]:
                t[:, :, hidden] = poison
            dirty = results(attention, leaves_of(poisoned), options, grad_out)
            for name, tensor in dirty.items():
                assert torch.isfinite(tensor).all(), name
                torch.testing.assert_close(tensor, clean[name], rtol=1e-2, atol=1e-2)
            for name in ("key", "value"):
                assert not dirty[name][:, :, hidden].any()


def test_nan_reaches_only_the_rows_that_see_it():
    q, k, v = (torch.randn(1, 1, 40, 8) for _ in range(3))
    v[:, :, 20] = math.nan
    out = attention(q, k, v, is_causal=True)
    assert torch.isfinite(out[:, :, :20]).all() and out[:, :, 20:].isnan().all()
    q[:, :, 5] = math.nan
    out = attention(q, k, torch.randn(1, 1, 40, 8))
    assert out[:, :, 5].isnan().all() and torch.isfinite(out[:, :, 6:]).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", (40, 300))
def test_a_row_of_nan_reaches_only_the_keys_that_it_sees(size, dtype):
    """Gradients of the keys and values that it does not see are as without it."""
    torch.manual_seed(17)
    row = size // 2 + 3
    qkv, grad_out = operands((1, 2, 2, size, size, 16, 16), dtype)
    clean = results(attention, leaves_of(qkv), {"is_causal": True}, grad_out)
    qkv[0][:, :, row] = math.nan
    dirty = results(attention, leaves_of(qkv), {"is_causal": True}, grad_out)
    for name in ("key", "value"):
        assert dirty[name][:, :, : row + 1].isnan().all(), name
        after = dirty[name][:, :, row + 1 :], clean[name][:, :, row + 1 :]
        torch.testing.assert_close(*after, rtol=1e-2, atol=1e-2)


def test_rows_that_see_nothing():
    torch.manual_seed(17)
    for sq in (3, 130):
        qkv, grad_out = operands((2, 2, 2, sq, 70, 8, 8), torch.float32)
        mask = torch.rand(2, 1, sq, 70) > 0.5
        mask[1, :, 1] = False
        for attn_mask in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
            leaves = leaves_of(qkv)
            out, lse = attention(*leaves, attn_mask, return_lse=True)
            assert not out[1, :, 1].any() and (lse[1, :, 1] == -math.inf).all()
            gradients = torch.autograd.grad(out, leaves, grad_out)
            assert not gradients[0][1, :, 1].any()
            assert all(torch.isfinite(g).all() for g in gradients)
            torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv, attn_mask))


def test_large_logits():
    """Logits near -120 and 1e4 with a mask, where cuDNN's backward gives NaN (pytorch #196678)."""
    torch.manual_seed(18)
    q, k, v = (torch.randn(1, 2, 192, 64) for _ in range(3))
    for offset in (-120.0, 1e4):
        mask = torch.full((192, 192), offset)
        leaves = leaves_of((q, k, v))
        out = attention(*leaves, mask)
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(torch.isfinite(t).all() for t in (out, *gradients))
        torch.testing.assert_close(
            out, F.scaled_dot_product_attention(q, k, v), rtol=2e-3, atol=2e-3
        )


def test_half_gradients_do_not_get_worse_with_the_sequence():
    """torch accumulates dQ, dK, dV in bfloat16 on the CPU; ours must not."""
    torch.manual_seed(19)
    ratios = []
    for s in (128, 1024):
        qkv, grad_out = operands((1, 1, 1, s, s, 64, 64), torch.bfloat16)
        mine = results(attention, leaves_of(qkv), {}, grad_out)
        exact = results(attention, leaves_of(qkv, torch.float64), {}, grad_out)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            math_path = results(
                reference.scaled_dot_product_attention, leaves_of(qkv), {}, grad_out
            )
        ratios.append(
            max(
                (mine[n].double() - exact[n]).norm() / (math_path[n].double() - exact[n]).norm()
                for n in NAMES[:3]
            )
        )
    assert ratios[1] <= 1.5 and ratios[1] <= 1.2 * ratios[0]


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("seed", range(26, 29))
def test_bfloat16_gradients_of_a_long_sequence(seed, causal):
    """At most 1.5 times the error of torch's math path, which rounds nothing but its results: P and
    dS are split in two for such lengths. Torch's fused path is 3 to 8 times worse."""
    torch.manual_seed(seed)
    qkv, grad_out = operands((1, 1, 1, 6144, 6144, 64, 64), torch.bfloat16)

    def gradients(function, dtype):
        leaves = leaves_of(qkv, dtype)
        out = function(*leaves, is_causal=causal)
        return [g.double() for g in torch.autograd.grad(out, leaves, grad_out.to(dtype))]

    exact = gradients(F.scaled_dot_product_attention, torch.float64)
    mine = gradients(attention, torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        math_path = gradients(F.scaled_dot_product_attention, torch.bfloat16)
    for name, ours, plain, wanted in zip(NAMES[:3], mine, math_path, exact, strict=True):
        assert (ours - wanted).abs().max() <= 1.5 * (plain - wanted).abs().max(), name


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("option", ("plain", "sinks", "sides", "everything", "bottom_right"))
def test_decode_over_a_long_cache(option, dtype):
    """The keys are split into parts of 2048, on any number of threads."""
    torch.manual_seed(27)
    shape = (2, 4, 2, 2, 5000, 40, 24)
    b, h, _, sq, sk, _, _ = shape
    qkv, grad_out = operands(shape, dtype)
    options = OPTIONS[option](b, h, sq, sk, dtype)
    compare(qkv, options, grad_out, torch.randn(b, h, sq))
    threads = torch.get_num_threads()
    outputs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(28)
            outputs.append(attention(*qkv, dropout_p=0.2, enable_gqa=True, **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(*(st.integers(1, n) for n in (2, 2, 3, 110, 270, 20, 20))),
    st.sampled_from(tuple(OPTIONS)),
    st.sampled_from(("contiguous", "permuted", "column", "offset")),
)
def test_any_shape(shape, option, layout):
    """In float64, where a gradient that cancels to zero is no matter of rounding."""
    torch.manual_seed(24)
    b, hkv, group, sq, sk, d, dv = shape
    qkv, grad_out = operands((b, hkv * group, hkv, sq, sk, d, dv), torch.float64, layout)
    options = cast(OPTIONS[option](b, hkv * group, sq, sk, torch.float64), torch.float64)
    mine = results(attention, leaves_of(qkv), options, grad_out)
    plain = results(reference.scaled_dot_product_attention, leaves_of(qkv), options, grad_out)
    for name, ours in mine.items():
        torch.testing.assert_close(ours, plain[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype):
    """Its probability is 1 whatever the score: the gradients of q and k cancel, to rounding."""
    torch.manual_seed(25)
    q, k, v = leaves_of([values((1, 2, 50, 8), dtype), *(values((1, 2, 1, 8), dtype),) * 2])
    grad_out = values((1, 2, 50, 8), dtype)
    out = attention(q, k, v)
    torch.testing.assert_close(out, v.expand(out.shape), rtol=1e-6, atol=0)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), grad_out)
    terms = (grad_out * v).abs().sum(-1, keepdim=True).double()  # what cancels
    eps = torch.finfo(torch.float32).eps * 8
    assert (grad_q.double().abs() <= eps * terms * k.double().abs()).all()
    bound = (eps * terms * q.double().abs()).sum(-2, keepdim=True)
    assert (grad_k.double().abs() <= bound).all()
    exact = grad_out.double().sum(-2, keepdim=True)
    torch.testing.assert_close(grad_v.double(), exact, rtol=1e-2, atol=torch.finfo(dtype).eps)
