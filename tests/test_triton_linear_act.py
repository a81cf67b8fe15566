"""The Triton kernels of linear_act and dropout, on a GPU or else under Triton's interpreter."""

import numpy as np
import pytest
import torch
from conftest import assert_close_to_oracle
from philox_oracle import dropout_mask, philox

pytest.importorskip("triton", reason="Triton is not installed")

import tritonops
from fastnn import _ops, reference
from tritonops.activation import ACTIVATIONS
from tritonops.linear_act import column_sums, matmul, matmul_add_
from tritonops.philox import dropout_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = (2**40 + 7, 2**33 + 5)


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def seed_tensor(seed=SEED):
    return torch.tensor(seed, device=DEVICE)


def keep_mask(rows, cols, p, seed=SEED):
    return torch.from_numpy(dropout_mask(seed, rows, cols, p)).to(DEVICE)


def expected(tensors, grad_out, activation, mask, dtype):
    """Output and gradients of input, weight and bias by the reference, computed in `dtype`."""
    x, w, b, r = (None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors)
    mask = None if mask is None else mask.to(dtype).view(*x.shape[:-1], -1)
    out = reference.linear_act(x, w, b, activation, residual=r, keep=mask)
    wanted = [t for t in (x, w, b) if t is not None]
    return (out.detach(), *torch.autograd.grad(out, wanted, grad_out.to(dtype)))


def check(x, w, b, r, activation, p, grad_out, save="preact"):
    dtype, gated = x.dtype, ACTIVATIONS[activation].gated
    seed = seed_tensor() if p else None
    copies = [None if t is None else t.clone() for t in (x, w, b, r, grad_out)]
    out, preact = tritonops.linear_act_forward(
        x, w, b, r, seed, activation, p, save == "preact", gated
    )
    saved = {"preact": preact, "out": out, "nothing": x.new_empty(0)}[save]
    grads = tritonops.linear_act_backward(
        grad_out, x, w, saved, seed, activation, p, gated, [True, True, b is not None]
    )
    mask = keep_mask(out.numel() // out.shape[-1], out.shape[-1], p) if p else None
    same = expected((x, w, b, r), grad_out, activation, mask, dtype)
    exact = expected((x, w, b, r), grad_out, activation, mask, torch.float64)
    mine = (out, *grads[: len(exact) - 1])
    for name, *values in zip(("out", "input", "weight", "bias"), mine, same, exact, strict=False):
        assert values[0].is_contiguous()
        assert_close_to_oracle(*values, what=f"{name} of {activation}")
    for before, now in zip(copies, (x, w, b, r, grad_out), strict=True):
        assert before is None or torch.equal(before, now), "an input was changed"
    return mine


def test_tables_agree():
    assert ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()
    for name, entry in ACTIVATIONS.items():
        assert entry.gated == reference.ACTIVATIONS[name].gated
    assert tritonops.refusal("linear_act", {"activation": "gelu"}) is None
    assert "mish" in tritonops.refusal("linear_act", {"activation": "mish"})


def test_philox_known_answers():
    # Salmon et al.'s own test vectors, philox4x32-10
    ones = 2**64 - 1
    assert [hex(w) for w in philox(0, 0, np.zeros(1, np.uint64))[0]] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip
    assert [hex(w) for w in philox(ones, ones, np.array([ones], np.uint64))[0]] == [
        "0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd",
    ]  # fmt: skip


@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 1.0))
@pytest.mark.parametrize("shape", ((5, 7), (3, 1), (2, 3, 530), (9,), ()))
def test_dropout_draws_the_generators_bits(shape, p):
    for seed in ((0, 0), SEED, (-1, -2)):
        x = torch.ones(shape, device=DEVICE)
        mine = tritonops.dropout(x, seed_tensor(seed), p)
        cols = shape[-1] if shape else 1
        mask = keep_mask(x.numel() // cols, cols, p, seed).view(shape)
        assert torch.equal(mine, mask)


def test_dropout_of_views_and_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = draw(11, 2, 6, dtype=dtype).permute(2, 0, 1)[1:, ::2]
        mine = tritonops.dropout(x, seed_tensor(), 0.3)
        mask = keep_mask(x.numel() // 2, 2, 0.3).view(x.shape)
        assert mine.is_contiguous() and mine.dtype == dtype
        assert_close_to_oracle(mine, (x * mask.to(dtype)), x.double() * mask.double())
    assert tritonops.dropout(draw(0, 4), seed_tensor(), 0.5).shape == (0, 4)


@pytest.mark.parametrize("p", (0.0, 0.25, 0.1, 1 / 3, 1.0 - 2**-20, 2**-17, 2**-18, 1.0))
def test_dropout_rate(p):
    threshold, scale = dropout_rate(p)
    assert abs(threshold - p * 65536) <= 0.5
    assert scale == (0.0 if threshold == 65536 else 65536 / (65536 - threshold))


CASES = [(name, torch.float32) for name in ACTIVATIONS]
for half in (torch.bfloat16, torch.float16):
    CASES += [(name, half) for name in ("identity", "gelu", "relu2", "tanh", "geglu_tanh")]


@pytest.mark.parametrize("activation, dtype", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_values_and_gradients(activation, dtype):
    torch.manual_seed(0)
    m, k, n = 37, 45, 29
    width = 2 * n if ACTIVATIONS[activation].gated else n
    x, w = draw(m, k, dtype=dtype), draw(width, k, dtype=dtype, scale=0.2)
    b, r = draw(width, dtype=dtype), draw(m, n, dtype=dtype)
    check(x, w, b, r, activation, 0.3, draw(m, n, dtype=dtype))


@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 3, 128, 64), (70, 16, 33), (5, 0, 3), (0, 4, 5)))
def test_shapes(shape):
    *rows, k, n = shape
    x, w, b = draw(*rows, k), draw(n, k), draw(n)
    check(x, w, b, None, "silu", 0.0, draw(*rows, n))


def test_strided_operands():
    x = draw(33, 6, 4).permute(1, 2, 0)
    w = draw(33, 70).t()[::2]
    b = draw(70)[::2]
    r = draw(35, 1, 4).expand(35, 6, 4).permute(1, 2, 0)
    grad = draw(35).expand(6, 4, 35)
    assert not (x.is_contiguous() or w.is_contiguous() or r.is_contiguous())
    check(x, w, b, r, "gelu", 0.2, grad)
    check(x, w, None, r, "identity", 0.0, grad)


@pytest.mark.parametrize("activation", ("identity", "relu", "leaky_relu"))
def test_backward_from_the_output(activation):
    x, w, b = draw(19, 21), draw(23, 21), draw(23)
    save = "nothing" if activation == "identity" else "out"
    check(x, w, b, None, activation, 0.4, draw(19, 23), save=save)


def test_unrequested_gradients_are_empty():
    x, w, b = draw(9, 8), draw(6, 8), draw(6)
    _, preact = tritonops.linear_act_forward(x, w, b, None, None, "gelu", 0.0, True, False)
    grad = draw(9, 6)
    full = tritonops.linear_act_backward(
        grad, x, w, preact, None, "gelu", 0.0, False, [True, True, True]
    )
    for index in range(3):
        mask = [i == index for i in range(3)]
        some = tritonops.linear_act_backward(grad, x, w, preact, None, "gelu", 0.0, False, mask)
        for i, (one, all_) in enumerate(zip(some, full, strict=True)):
            assert torch.equal(one, all_) if i == index else one.shape == (0,)


def test_nan_and_infinity_pass_as_in_torch():
    bad = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.0]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    for activation in ("relu", "leaky_relu", "sigmoid", "tanh", "gelu_tanh"):
        out, _ = tritonops.linear_act_forward(
            bad, one, None, None, None, activation, 0.0, False, False
        )
        wanted = reference.ACTIVATIONS[activation].value(bad)
        assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0)), activation


def test_same_bits_when_run_again():
    x, w, b = draw(40, 33), draw(50, 33), draw(50)
    grad = draw(40, 50)
    first = check(x, w, b, None, "gelu", 0.1, grad)
    second = check(x, w, b, None, "gelu", 0.1, grad)
    assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_products_that_are_split_or_added_to(dtype):
    x, w = draw(5, 4200, dtype=dtype), draw(7, 4200, dtype=dtype)
    exact = x.double() @ w.double().t()
    assert_close_to_oracle(matmul(x, w, dtype), x @ w.t(), exact)
    total = draw(5, 7)
    wanted = total.double() + exact
    same = total + (x.double() @ w.double().t()).float()
    matmul_add_(total, x, w)
    assert (total - wanted).abs().max() <= 2 * (same - wanted).abs().max() + 1e-4
    sums = column_sums(x)
    assert_close_to_oracle(sums, x.float().sum(0), x.double().sum(0))


def test_operators_are_registered():
    assert _ops.TRITON_MISSING is None
    x, w, b = draw(6, 5), draw(8, 5), draw(8)
    seed = seed_tensor()
    args = (x, w, b, None, seed, "swiglu", 0.2, True, True)
    out, preact = _ops.TRITON.linear_act_forward(*args)
    mine = tritonops.linear_act_forward(*args)
    assert torch.equal(out, mine[0]) and torch.equal(preact, mine[1])
    namespace = torch.ops.fastnn_triton
    torch.library.opcheck(namespace.linear_act_forward.default, args)
    torch.library.opcheck(
        namespace.linear_act_backward.default,
        (draw(6, 4), x, w, preact, seed, "swiglu", 0.2, True, [True, False, True]),
    )
    torch.library.opcheck(namespace.dropout.default, (x, seed, 0.2))
