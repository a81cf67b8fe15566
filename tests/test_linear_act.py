"""linear_act and dropout: values, gradients, options, and what PyTorch asks of an operator."""

import itertools
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
from fastnn.functional import dropout, linear_act
from fastnn.linear_act import MLP, Dropout, GatedMLP, LinearAct, dropout_seed
from fastnn.reference import ACTIVATIONS

NATIVE = pytest.mark.skipif(_ops.NATIVE_MISSING is not None, reason=str(_ops.NATIVE_MISSING))
pytestmark = NATIVE
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64, 128), (7, 33, 45), (131, 65, 67), (1, 1, 1), (30, 700, 20))


def make(shape, dtype, layout="contiguous", requires_grad=True, scale=1.0):
    """A leaf of N(0, scale^2) values in `dtype` and `layout`."""
    if layout == "permuted":
        leaf = (scale * torch.randn(*reversed(shape), dtype=torch.float64)).to(dtype)
        view = leaf.permute(*reversed(range(len(shape))))
    elif layout == "offset":
        leaf = (scale * torch.randn(*(s + 3 for s in shape), dtype=torch.float64)).to(dtype)
        view = leaf[tuple(slice(2, 2 + s) for s in shape)]
    else:
        view = (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)
    return view.detach().requires_grad_(requires_grad)


def results(function, tensors, grad_out):
    out = function(*tensors)
    return (out, *torch.autograd.grad(out, [t for t in tensors if t is not None], grad_out))


def double(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def compare(tensors, grad_out, activation, keep=None, **options):
    """linear_act against the references in its dtype and in float64, with every gradient."""

    def ours(x, w, b, r):
        return linear_act(x, w, b, activation, residual=r, **options)

    def torchs(x, w, b, r):
        mask = None if keep is None else keep.to(x.dtype)
        return reference.linear_act(x, w, b, activation, residual=r, keep=mask)

    mine = results(ours, tensors, grad_out)
    same = results(torchs, tensors, grad_out)
    exact = results(torchs, double(tensors), grad_out.double())
    for what, a, b, c in zip(("out", "x", "w", "b", "r"), mine, same, exact, strict=False):
        assert_close_to_oracle(a, b, c, what=f"{activation} {what}")


def operands(activation, shape, dtype, layout="contiguous", bias=True, residual=True):
    m, k, n = shape
    rows = 2 * n if ACTIVATIONS[activation].gated else n
    # N(0, 1) pre-activations, as a network has them; wider ones saturate every activation.
    return (
        make((m, k), dtype, layout),
        make((rows, k), dtype, layout, scale=max(k, 1) ** -0.5),
        make((rows,), dtype, layout) if bias else None,
        make((m, n), dtype, layout) if residual else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_rule(activation, dtype):
    torch.manual_seed(1)
    for shape, extras in itertools.product(SHAPES, ((True, False), (False, False), (True, True))):
        tensors = operands(activation, shape, dtype, bias=extras[0], residual=extras[1])
        compare(tensors, make((shape[0], shape[2]), dtype), activation)


@pytest.mark.parametrize("layout", ("permuted", "offset"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype, layout):
    torch.manual_seed(2)
    for activation in ("identity", "relu", "gelu", "swiglu"):
        for shape in SHAPES:
            tensors = operands(activation, shape, dtype, layout)
            compare(tensors, make((shape[0], shape[2]), dtype, layout), activation)


def test_expanded_gradient_and_leading_dimensions():
    x, w, b = make((2, 3, 5, 8), torch.float32), make((6, 8), torch.float32), None
    out = linear_act(x, w, b, "gelu")
    grad_out = torch.randn(()).expand(2, 3, 5, 6)
    mine = torch.autograd.grad(out, (x, w), grad_out)
    wanted = torch.autograd.grad(reference.linear_act(x, w, b, "gelu"), (x, w), grad_out)
    for a, c in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, c)
    vector = linear_act(x[0, 0, 0], w, b, "silu")
    torch.testing.assert_close(vector, reference.linear_act(x[0, 0, 0], w, b, "silu"))


@pytest.mark.parametrize("shape", ((0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)))
def test_empty(shape):
    for activation in ("identity", "gelu", "swiglu"):
        tensors = operands(activation, shape, torch.float32)
        compare(tensors, make((shape[0], shape[2]), torch.float32), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    torch.manual_seed(3)
    tensors = operands(activation, (4, 3, 5), torch.float64)

    def function(x, w, b, r):
        return linear_act(x, w, b, activation, residual=r)

    def with_dropout(x, w, b, r):
        torch.manual_seed(11)
        return linear_act(x, w, b, activation, residual=r, dropout_p=0.4)

    for f in (function, with_dropout):
        assert gradcheck(f, tensors)
        assert gradgradcheck(f, tensors)


def test_dropout_gradcheck():
    x = make((5, 9), torch.float64)

    def function(x):
        torch.manual_seed(5)
        return dropout(x, 0.3)

    assert gradcheck(function, (x,)) and gradgradcheck(function, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ("identity", "relu", "gelu", "swiglu"))
def test_dropout_in_the_epilogue(activation, dtype):
    torch.manual_seed(4)
    # The last: rows enough to be finished one by one, in tiles wider than one draw of the mask.
    shapes = ((64, 32, 128), (9, 20, 13), (1030, 40, 300))
    for shape, residual in itertools.product(shapes, (True, False)):
        tensors = operands(activation, shape, dtype, residual=residual)
        torch.manual_seed(21)
        seed = dropout_seed(torch.device("cpu"))
        keep = _ops.NATIVE.dropout(torch.ones(shape[0], shape[2]), seed, 0.25)
        assert 0 < (keep == 0).sum() < keep.numel()
        grad_out = make((shape[0], shape[2]), dtype, requires_grad=False)
        torch.manual_seed(21)
        compare(tensors, grad_out, activation, keep, dropout_p=0.25)


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_dropout_rate_and_independence(p):
    torch.manual_seed(6)
    x = torch.ones(512, 1024)
    first, second = dropout(x, p), dropout(x, p)
    n = x.numel()
    for out in (first, second):
        rate = (out == 0).double().mean().item()
        assert abs(rate - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
        assert abs(out.double().mean().item() - 1) < 5 * (p / (1 - p) / n) ** 0.5
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert abs(both - p * p) < 6 * (p * p / n) ** 0.5
    # Neighbours along rows and columns are independent too.
    dropped = first == 0
    for shifted in (dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(8, 1)):
        joint = (dropped & shifted).double().mean().item()
        assert abs(joint - p * p) < 6 * (p * p / n) ** 0.5


def test_dropout_follows_the_generator():
    x = torch.randn(100, 37)
    torch.manual_seed(7)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(dropout(x, 0.5), first) and torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)


def test_dropout_edges():
    x = torch.randn(10, 10, requires_grad=True)
    assert dropout(x, 0.3, training=False) is x and dropout(x, 0.0) is x
    out = dropout(x, 1.0)
    assert torch.equal(out, torch.zeros_like(x))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros_like(x))
    assert dropout(torch.randn(0, 3)).shape == (0, 3)
    assert dropout(torch.randn(5, 7).t(), 0.5).shape == (7, 5)
    assert dropout(torch.tensor(2.0), 0.5) in (torch.tensor(0.0), torch.tensor(4.0))


def test_dropout_gradient_is_the_same_mask():
    x = torch.ones(64, 100, requires_grad=True)
    out = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, out)


def test_results_do_not_depend_on_threads_and_repeat():
    torch.manual_seed(8)
    tensors = operands("gelu", (300, 70, 130), torch.bfloat16)
    grad_out = make((300, 130), torch.bfloat16, requires_grad=False)

    def run():
        torch.manual_seed(9)
        return results(
            lambda x, w, b, r: linear_act(x, w, b, "gelu", residual=r, dropout_p=0.1),
            tensors,
            grad_out,
        )

    threads = torch.get_num_threads()
    before = [t.detach().clone() for t in tensors]
    first = run()
    again = run()
    torch.set_num_threads(1)
    single = run()
    torch.set_num_threads(threads)
    for a, b, c in zip(first, again, single, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t, old)


def test_retain_graph():
    x, w, b, _ = operands("relu", (8, 4, 6), torch.float32, residual=False)
    out = linear_act(x, w, b, "relu").square().sum()
    first = torch.autograd.grad(out, (x, w, b), retain_graph=True)
    second = torch.autograd.grad(out, (x, w, b))
    for a, c in zip(first, second, strict=True):
        assert torch.equal(a, c)


def test_partial_gradients():
    tensors = operands("gelu", (8, 4, 6), torch.float32)
    wanted = results(
        lambda *t: reference.linear_act(*t[:3], "gelu", residual=t[3]), tensors, torch.ones(8, 6)
    )[1:]
    for index in range(4):
        alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        linear_act(*alone[:3], "gelu", residual=alone[3]).sum().backward()
        torch.testing.assert_close(alone[index].grad, wanted[index])
        assert all(t.grad is None for i, t in enumerate(alone) if i != index)


def test_autocast():
    x, w, b, r = operands("gelu", (16, 8, 12), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_act(x, w, b, "gelu", residual=r)
        expected = reference.linear_act(x, w, b, "gelu")
    assert out.dtype == expected.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


def test_compile_and_func():
    torch.manual_seed(10)
    tensors = operands("swiglu", (16, 8, 12), torch.float32)

    def function(x, w, b, r):
        return linear_act(x, w, b, "swiglu", residual=r)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grad_out = torch.randn(16, 12)
    for a, b in zip(
        results(compiled, tensors, grad_out), results(function, tensors, grad_out), strict=True
    ):
        assert torch.equal(a, b)

    plain = [t.detach() for t in tensors]
    gradient = torch.func.grad(lambda x: function(x, *plain[1:]).sum())(plain[0])
    wanted = results(function, tensors, torch.ones(16, 12))[1]
    torch.testing.assert_close(gradient, wanted)


def test_compile_dropout():
    x = torch.randn(64, 64)
    w = torch.randn(64, 64)
    compiled = torch.compile(
        lambda x, w: linear_act(x, w, None, "relu", dropout_p=0.5) + dropout(x, 0.5),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(1)
    first = compiled(x, w)
    second = compiled(x, w)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(x, w)) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "module",
    (
        LinearAct(8, 12, activation="gelu"),
        LinearAct(8, 12, activation="swiglu", bias=False),
        MLP(8, 16, activation="relu"),
        GatedMLP(8, 16, 4),
        Dropout(0.5).eval(),
    ),
    ids=repr,
)
def test_modules_compile(module):
    x = torch.randn(5, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_modules_match_torch():
    torch.manual_seed(12)
    stock = torch.nn.Linear(8, 12)
    ours = LinearAct(8, 12, activation="silu")
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(ours(x), torch.nn.functional.silu(stock(x)))
    mlp = GatedMLP(8, 16, activation="geglu")
    gate, up = torch.nn.functional.linear(x, mlp.linear1.weight, mlp.linear1.bias).chunk(2, -1)
    hidden = torch.nn.functional.gelu(gate) * up
    wanted = torch.nn.functional.linear(hidden, mlp.linear2.weight, mlp.linear2.bias) + x
    torch.testing.assert_close(mlp(x, residual=x), wanted)


def test_opcheck():
    seed = torch.tensor([1, 2])
    for activation in ("identity", "gelu", "swiglu"):
        gated = ACTIVATIONS[activation].gated
        # The operators themselves are not differentiable: autograd.Function is (test_gradcheck).
        x, w, b, r = (t.detach() for t in operands(activation, (6, 5, 4), torch.float32))
        x = x.t().contiguous().t()
        forward = torch.ops.fastnn.linear_act_forward.default
        torch.library.opcheck(forward, (x, w, b, r, seed, activation, 0.5, True, gated))
        torch.library.opcheck(forward, (x, w, None, None, None, activation, 0.0, False, gated))
        _, preact = forward(x, w, b, r, seed, activation, 0.5, True, gated)
        torch.library.opcheck(
            torch.ops.fastnn.linear_act_backward.default,
            (r, x, w, preact, seed, activation, 0.5, gated, (True, False, True)),
        )
    torch.library.opcheck(torch.ops.fastnn.dropout.default, (x, seed, 0.5))


@given(
    m=st.integers(0, 130),
    k=st.integers(0, 150),
    n=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    layout=st.sampled_from(("contiguous", "permuted", "offset")),
    bias=st.booleans(),
    residual=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(m, k, n, dtype, activation, layout, bias, residual):
    torch.manual_seed(13)
    tensors = operands(activation, (m, k, n), dtype, layout, bias, residual)
    compare(tensors, make((m, n), dtype, layout), activation)


X, W = torch.randn(4, 8), torch.randn(6, 8)
BAD = [
    (dict(activation="swish"), ValueError, "activation"),
    (dict(dropout_p=1.5), ValueError, "dropout_p"),
    (dict(dropout_p=-0.1), ValueError, "dropout_p"),
    (dict(weight=torch.randn(6, 7)), RuntimeError, "input"),
    (dict(weight=torch.randn(2, 6, 8)), RuntimeError, "weight"),
    (dict(weight=torch.randn(5, 8), activation="swiglu"), RuntimeError, "weight"),
    (dict(weight=W.double()), RuntimeError, "weight"),
    (dict(weight=W.to("meta")), RuntimeError, "weight"),
    (dict(bias=torch.randn(5)), RuntimeError, "bias"),
    (dict(bias=torch.randn(6, 1)), RuntimeError, "bias"),
    (dict(residual=torch.randn(4, 5)), RuntimeError, "residual"),
    (dict(residual=torch.randn(6)), RuntimeError, "residual"),
    (dict(input=torch.tensor(1.0)), RuntimeError, "input"),
    (dict(input=[1.0]), TypeError, "input"),
    (dict(bias=3.0), TypeError, "bias"),
]


@pytest.mark.parametrize("change, error, argument", BAD)
def test_bad_input(change, error, argument):
    arguments = {"input": X, "weight": W, "bias": None} | change
    with pytest.raises(error, match=f"linear_act: {argument} must be .*, got "):
        linear_act(**arguments)


def test_bad_dropout():
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got 2"):
        dropout(X, 2)
    with pytest.raises(TypeError, match="dropout: input must be a Tensor, got int"):
        dropout(3)
    with pytest.raises(ValueError, match="Dropout: inplace must be False"):
        Dropout(0.5, inplace=True)


def test_raw_operators_check_their_arguments():
    op = torch.ops.fastnn.linear_act_forward.default
    with pytest.raises(RuntimeError, match="linear_act_forward: weight must be"):
        op(X, W.double(), None, None, None, "relu", 0.0, False, False)
    with pytest.raises(RuntimeError, match="seed must be given"):
        op(X, W, None, None, None, "relu", 0.5, False, False)
    with pytest.raises(RuntimeError, match="activation must be one of identity relu"):
        op(X, W, None, None, None, "swish", 0.0, False, False)


def test_lower_instruction_set():
    """The kernels built for AVX2 give the same answers."""
    program = """
import torch, fastnn, fastnn._C
from fastnn import reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, w, b = (torch.randn(*s).to(dtype).requires_grad_() for s in ((70, 33), (90, 33), (90,)))
    out = fastnn.functional.linear_act(x, w, b, "gelu")
    ref = reference.linear_act(x, w, b, "gelu")
    mine = torch.autograd.grad(out.sum(), (x, w, b))
    wanted = torch.autograd.grad(ref.sum(), (x, w, b))
    for a, c in zip((out, *mine), (ref, *wanted)):
        torch.testing.assert_close(a, c, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=3e-2)
print(fastnn._C.cpu_capability())
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "AVX2"


class Traced(torch.Tensor):
    """A subclass with the inherited __torch_function__."""


def test_auto_leaves_small_cheap_calls_to_torch(monkeypatch):
    monkeypatch.setattr(sys.modules["fastnn.linear_act"], "_TORCH_UP_TO", 5 * 4 * 3)
    served = []
    monkeypatch.setattr(backend, "resolve", lambda *args, **features: served.append(args))
    x, w, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    assert torch.equal(linear_act(x, w, b, "relu"), F.relu(F.linear(x, w, b)))
    assert torch.equal(linear_act(x, w), F.linear(x, w))
    assert torch.equal(linear_act(x, w, b, dropout_p=0.5, training=False), F.linear(x, w, b))
    assert not served
    for more in (
        {"activation": "gelu"}, {"dropout_p": 0.5}, {"residual": torch.randn(5, 3)},
        {"input": torch.randn(6, 4)}, {"input": x.bfloat16(), "weight": w.bfloat16()},
        {"input": torch.randn(0, 4)}, {"input": x.as_subclass(Traced)},
    ):  # fmt: skip
        linear_act(**{"input": x, "weight": w} | more)
        assert served.pop(), more
    torch.func.vmap(linear_act, (0, None))(x, w)
    assert served.pop()
    with torch.autocast("cpu"):
        assert linear_act(x, w).dtype == torch.bfloat16 and not served
    for wrong in ({"bias": torch.randn(4)}, {"weight": torch.randn(3, 5)}, {"dropout_p": 2.0}):
        with pytest.raises((RuntimeError, ValueError), match=f"linear_act: {list(wrong)[0]}|input"):
            linear_act(**{"input": x, "weight": w} | wrong)
