"""Attention: values, gradients, options, hidden NaN, and what PyTorch asks of an operator."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastnn import _ops, backend, reference
from fastnn.attention import scaled_dot_product_attention as attention
from fastnn.linear_act import dropout_seed, keep_mask

NATIVE = pytest.mark.skipif(_ops.NATIVE_MISSING is not None, reason=str(_ops.NATIVE_MISSING))
pytestmark = NATIVE
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "attn_mask", "sinks")
# B, Hq, Hkv, Sq, Sk, D, Dv: grouped heads, more than a block of each, few rows, odd widths
SHAPES = (
    (2, 4, 2, 37, 70, 16, 24),
    (1, 2, 2, 131, 300, 64, 64),
    (1, 3, 1, 2, 97, 40, 33),
    (1, 1, 1, 257, 127, 7, 130),
)


def values(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def lay_out(tensor, layout):
    """The same values in another memory layout."""
    if layout == "permuted":  # (B, S, H, D) in memory, as a model's projections leave it
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "column":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        padded = tensor.new_zeros([s + 3 for s in tensor.shape])
        view = padded[tuple(slice(2, 2 + s) for s in tensor.shape)]
        return view.copy_(tensor)
    return tensor


OPTIONS = {
    "plain": lambda *_: {},
    "causal": lambda *_: {"is_causal": True},
    "bottom_right": lambda *_: {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": lambda *_: {"window": (5, 3)},
    "window_bottom_right": lambda *_: {"window": (40, 7), "causal_alignment": "bottom_right"},
    "scale": lambda *_: {"scale": -0.3},
    "softcap": lambda *_: {"softcap": 1.5},
    "alibi": lambda b, h, sq, sk, dtype: {"alibi_slopes": torch.rand(h), "is_causal": True},
    "sinks": lambda b, h, sq, sk, dtype: {"sinks": values((h,), dtype), "is_causal": True},
    "bool": lambda b, h, sq, sk, dtype: {"attn_mask": torch.rand(b, 1, sq, sk) > 0.3},
    "padding": lambda b, h, sq, sk, dtype: {"attn_mask": torch.rand(b, 1, 1, sk) > 0.3},
    "additive": lambda b, h, sq, sk, dtype: {"attn_mask": values((b, h, sq, sk), dtype)},
    "additive_2d": lambda b, h, sq, sk, dtype: {"attn_mask": values((sq, sk), dtype)},
    "additive_keys": lambda b, h, sq, sk, dtype: {"attn_mask": values((h, 1, sk), dtype)},
    "everything": lambda b, h, sq, sk, dtype: {
        "attn_mask": values((h, sq, sk), dtype),
        "window": (60, 50),
        "softcap": 3.0,
        "alibi_slopes": torch.rand(b, h),
        "sinks": values((b, h), dtype),
        "causal_alignment": "bottom_right",
        "scale": 0.2,
    },
}


def cast(options, dtype):
    """The options as torch evaluates them in `dtype`; the mask and the sinks become leaves."""
    result = dict(options)
    for name in ("attn_mask", "alibi_slopes", "sinks"):
        t = result.get(name)
        if t is not None and t.is_floating_point():
            result[name] = t.detach().to(dtype).requires_grad_(name != "alibi_slopes")
    return result


def results(function, qkv, options, grad_out, grad_lse=None, **extra):
    """{name: tensor} of out, lse (if its gradient is given) and every gradient."""
    leaves = dict(zip(NAMES, (*qkv, options.get("attn_mask"), options.get("sinks")), strict=True))
    leaves = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    gqa = qkv[0].shape[-3] != qkv[1].shape[-3]
    outputs = function(*qkv, enable_gqa=gqa, return_lse=grad_lse is not None, **options, **extra)
    outputs = outputs if grad_lse is not None else (outputs,)
    upstream = [g.to(o.dtype) for g, o in zip((grad_out, grad_lse), outputs, strict=False)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(("out", "lse"), outputs, strict=False)) | dict(
        zip(leaves, gradients, strict=True)
    )


def leaves_of(qkv, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in qkv]


def compare(qkv, options, grad_out, grad_lse=None):
    dtype = qkv[0].dtype
    mine = results(attention, leaves_of(qkv), cast(options, dtype), grad_out, grad_lse)
    arguments = (options, grad_out, grad_lse)
    same, exact = (
        results(
            reference.scaled_dot_product_attention, leaves_of(qkv, d), cast(arguments[0], d),
            *arguments[1:],
        )
        for d in (dtype, torch.float64)
    )  # fmt: skip
    for name, ours in mine.items():
        assert_close_to_oracle(ours, same[name], exact[name], what=name)


def operands(shape, dtype, layout="contiguous"):
    b, h, hkv, sq, sk, d, dv = shape
    sizes = ((b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    qkv = [lay_out(values(size, dtype), layout) for size in sizes]
    return qkv, lay_out(values((b, h, sq, dv), dtype), layout)


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


def test_compile_and_func():
    torch.manual_seed(20)
    qkv, grad_out = operands((1, 2, 2, 20, 24, 8, 8), torch.float32)
    mask = torch.randn(20, 24)

    def function(q, k, v, mask):
        return attention(q, k, v, mask, softcap=4.0, window=(9, 9))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first = leaves_of((*qkv, mask))
    second = leaves_of((*qkv, mask))
    a, b = compiled(*first), function(*second)
    assert torch.equal(a, b)
    for x, y in zip(
        torch.autograd.grad(a, first, grad_out),
        torch.autograd.grad(b, second, grad_out),
        strict=True,
    ):
        assert torch.equal(x, y)
    gradient = torch.func.grad(lambda q: (function(q, *qkv[1:], mask) * grad_out).sum())(qkv[0])
    torch.testing.assert_close(
        gradient, torch.autograd.grad(function(*second), second, grad_out)[0]
    )


def test_compile_dropout():
    q = torch.randn(1, 2, 30, 8)
    compiled = torch.compile(
        lambda q: attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(1)
    first = compiled(q)
    second = compiled(q)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(q)) and not torch.equal(first, second)


def test_opcheck():
    torch.manual_seed(21)
    seed = torch.tensor([1, 2])
    forward = torch.ops.fastnn.attention_forward.default
    backward = torch.ops.fastnn.attention_backward.default
    for dtype in (torch.float32, torch.bfloat16):
        qkv, grad_out = operands((1, 4, 2, 9, 11, 8, 6), dtype, "permuted")
        mask, slopes, sinks = torch.randn(9, 11).to(dtype), torch.rand(4), torch.randn(4).to(dtype)
        options = (0.3, 0.25, 2.0, True, 5, -1)
        arguments = (*qkv, mask, slopes, sinks, seed, *options)
        torch.library.opcheck(forward, arguments)
        torch.library.opcheck(forward, (*qkv, None, None, None, None, 0.0, 1.0, 0.0, False, -1, 0))
        out, lse = forward(*arguments)
        for wanted in ((True,) * 5, (False, True, False, False, True)):
            torch.library.opcheck(
                backward,
                (grad_out, torch.randn(lse.shape), *qkv, mask, slopes, sinks, seed, out, lse,
                 *options, list(wanted)),
            )  # fmt: skip


def test_autocast():
    torch.manual_seed(22)
    q, k, v = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert ours.dtype == torchs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(ours.float().square().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_float_mask_with_half_inputs():
    torch.manual_seed(23)
    qkv, grad_out = operands((1, 2, 2, 20, 30, 16, 16), torch.bfloat16)
    mask = torch.randn(20, 30, requires_grad=True)
    out = attention(*qkv, mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(*qkv, mask.detach()), rtol=2e-2, atol=2e-2
    )
    assert torch.autograd.grad(out, mask, grad_out)[0].dtype == torch.float32


@settings(max_examples=25, deadline=None)
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


def test_window_of_one_width():
    q = torch.randn(1, 2, 20, 8)
    assert torch.equal(attention(q, q, q, window=3), attention(q, q, q, window=(3, 3)))
    causal = attention(q, q, q, is_causal=True)
    assert torch.equal(attention(q, q, q, window=(None, 0)), causal)
    assert torch.equal(attention(q, q, q, window=(-1, 0)), causal)


def changed(**changes):
    q = torch.randn(2, 4, 5, 8)
    return {"query": q, "key": torch.randn(2, 4, 6, 8), "value": torch.randn(2, 4, 6, 8)} | changes


@pytest.mark.parametrize(
    "changes, error, argument",
    (
        ({"query": [1]}, TypeError, "query"),
        ({"attn_mask": 1}, TypeError, "attn_mask"),
        ({"query": torch.randn(8)}, RuntimeError, "query"),
        ({"key": torch.randn(2, 4, 6, 9)}, RuntimeError, "key"),
        ({"value": torch.randn(2, 4, 7, 8)}, RuntimeError, "value"),
        ({"key": torch.randn(2, 4, 6, 8).double()}, RuntimeError, "key"),
        ({"value": torch.empty(2, 4, 6, 8, device="meta")}, RuntimeError, "value"),
        ({"key": torch.randn(2, 3, 6, 8)}, RuntimeError, "key"),
        ({"key": torch.randn(2, 3, 6, 8), "enable_gqa": True}, RuntimeError, "key"),
        ({"value": torch.randn(2, 3, 6, 8), "enable_gqa": True}, RuntimeError, "value"),
        ({"key": torch.randn(3, 4, 6, 8)}, RuntimeError, "key"),
        ({"dropout_p": 1.5}, RuntimeError, "dropout_p"),
        ({"dropout_p": -0.1}, RuntimeError, "dropout_p"),
        ({"attn_mask": torch.ones(5, 6).bool(), "is_causal": True}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 5).bool()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(3, 1, 5, 6).bool()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(1, 2, 4, 5, 6).bool()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 6).long()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 6).double()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 6, device="meta")}, RuntimeError, "attn_mask"),
        ({"causal_alignment": "middle"}, ValueError, "causal_alignment"),
        ({"window": (1, 2, 3)}, ValueError, "window"),
        ({"window": -2}, ValueError, "window"),
        ({"window": (1.5, 2)}, ValueError, "window"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"alibi_slopes": torch.ones(3)}, RuntimeError, "alibi_slopes"),
        ({"sinks": torch.ones(4).long()}, RuntimeError, "sinks"),
        ({"sinks": 1.0}, TypeError, "sinks"),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(changes, error, argument):
    with pytest.raises(error, match=f"scaled_dot_product_attention: {argument} must be .*, got "):
        attention(**changed(**changes))


def test_raw_operators_check_their_arguments():
    forward = torch.ops.fastnn.attention_forward.default
    q = torch.randn(1, 2, 3, 4)
    options = (0.0, 1.0, 0.0, False, -1, -1)
    with pytest.raises(RuntimeError, match="key must be of shape"):
        forward(q, torch.randn(1, 2, 3, 5), q, None, None, None, None, *options)
    with pytest.raises(RuntimeError, match="seed must be given"):
        forward(q, q, q, None, None, None, None, 0.5, *options[1:])
    with pytest.raises(RuntimeError, match="attn_mask must be broadcastable"):
        forward(q, q, q, torch.ones(2, 3), None, None, None, *options)


def test_backends():
    q = torch.randn(1, 2, 5, 8)
    with backend.use_backend("reference"):
        plain = attention(q, q, q, window=2, sinks=torch.zeros(2))
    with backend.use_backend("native"):
        torch.testing.assert_close(attention(q, q, q, window=2, sinks=torch.zeros(2)), plain)
        with pytest.raises(NotImplementedError, match="alibi_slopes"):
            attention(q, q, q, alibi_slopes=torch.ones(2, requires_grad=True))
    slopes = torch.ones(2, requires_grad=True)
    attention(q, q, q, alibi_slopes=slopes).sum().backward()
    assert slopes.grad is not None


MEMORY = """
import resource, sys, torch
from fastnn.attention import scaled_dot_product_attention
s = int(sys.argv[1])
q, k, v = (torch.randn(1, 2, s, 32, requires_grad=True) for _ in range(3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scaled_dot_product_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], None, 0.1).sum().backward()
before = peak()
scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum().backward()
print(peak() - before)
"""


def test_memory_grows_linearly_with_dropout():
    """S x S floats of one head at S = 4096 would be 64 MiB, and of two heads 128."""
    used = subprocess.run(
        [sys.executable, "-c", MEMORY, "4096"], capture_output=True, text=True, check=True
    )
    assert int(used.stdout) < 40 * 1024  # KiB: ten tensors of 1 MiB, packed copies and tiles


def test_lower_instruction_set():
    """The AVX2 kernels, whatever this machine has."""
    script = """
import torch
from fastnn import _C
from fastnn.attention import scaled_dot_product_attention as attention
assert _C.cpu_capability() == "AVX2"
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    q, k, v = (torch.randn(1, 2, 140, 24).to(dtype).requires_grad_() for _ in range(3))
    ours = attention(q, k, v, is_causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    a = torch.autograd.grad(ours.square().sum(), (q, k, v))
    b = torch.autograd.grad(plain.square().sum(), (q, k, v))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=10 * tolerance, atol=10 * tolerance)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
