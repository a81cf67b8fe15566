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

import fastnn
from fastnn import _ops, reference
from fastnn.cross_entropy import CrossEntropyLoss, cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (33, 7),
    (40, 130),
    (3, 5003),
    (1, 20011),
    (9,),
    (0, 5),
    (3, 6, 7, 5),
    (2, 67, 9),
]
OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.3},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 4.0},
}
OPTION_NAMES = list(OPTIONS)


@pytest.fixture(autouse=True)
def native():
    torch.manual_seed(0)
    with fastnn.use_backend("native"):
        yield


def make(shape, dtype, option, soft=False):
    classes = shape[1] if len(shape) > 1 else shape[0]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    options = dict(OPTIONS[option])
    weight = None
    if options.pop("weight", False):
        weight = (torch.rand(classes) + 0.1).to(dtype)
    x = (torch.randn(shape) * 3).to(dtype)
    if soft:
        return x, torch.rand(shape).to(dtype), weight, options
    target = torch.randint(0, classes, rows)
    if target.numel() > 3:
        target.view(-1)[1::4] = -100
    return x, target, weight, options


def evaluate(function, x, target, weight, double=False, **options):
    """Loss and gradients for a non-uniform upstream gradient."""
    to = (lambda t: t.double()) if double else (lambda t: t)
    dtype = x.dtype
    x = to(x).detach().requires_grad_()
    inputs = [x]
    if target.is_floating_point():
        target = to(target).detach().requires_grad_()
        inputs.append(target)
    weight = None if weight is None else to(weight)
    loss = function(x, target, weight, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(loss.shape, dtype=torch.float64, generator=generator)
    # The oracle is given the same rounded gradient.
    grad = grad.to(dtype).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, inputs, grad)


def check(x, target, weight, **options):
    ours = evaluate(cross_entropy, x, target, weight, **options)
    torchs = evaluate(reference.cross_entropy, x, target, weight, **options)
    oracle = evaluate(reference.cross_entropy, x, target, weight, double=True, **options)
    names = ("loss", "grad_input", "grad_target")[: len(ours)]
    for what, *results in zip(names, ours, torchs, oracle, strict=True):
        assert_close_to_oracle(*results, what=what)


@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_torch(dtype, shape, option):
    reductions = ("none", "mean", "sum") if option in ("plain", "all") else ("mean",)
    for soft in (False, True):
        for reduction in reductions:
            x, target, weight, options = make(shape, dtype, option, soft)
            check(x, target, weight, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "weight and smoothing", "softcap"])
def test_single_class(dtype, option):
    """p is exactly 1: what is left of the gradient is the rounding of q."""
    for soft in (False, True):
        x, target, weight, options = make((48, 1), dtype, option, soft)
        loss, grad, *_ = evaluate(cross_entropy, x, target, weight, reduction="sum", **options)
        assert loss == 0
        assert grad.abs().max() <= 4 * torch.finfo(_ops.accumulate_dtype(dtype)).eps


VIEWS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda x: F.pad(x, (3, 2))[..., 3:-2] if x.dim() == 2 else F.pad(x, (1, 0))[..., 1:],
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(37, 131), (17, 20), (3, 70, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_views(dtype, shape, view):
    for soft in (False, True):
        x, target, weight, options = make(shape, dtype, "all", soft)
        x = VIEWS[view](x)
        before = x.clone()
        check(x, target, weight, **options)
        if soft:
            check(x.contiguous(), VIEWS[view](target), weight, **options)
        assert torch.equal(x, before)


@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(option, soft):
    for shape in ((5, 4), (2, 3, 4), (4, 70)):
        x, target, weight, options = make(shape, torch.float64, option, soft)
        inputs = (x.requires_grad_(), target.requires_grad_()) if soft else (x.requires_grad_(),)
        for reduction in ("none", "mean"):

            def function(x, target=target, weight=weight, reduction=reduction, options=options):
                return cross_entropy(
                    x, target, weight, reduction=reduction, return_lse=True, **options
                )

            assert torch.autograd.gradcheck(function, inputs)
            if shape != (4, 70):
                assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_and_its_gradient(dtype):
    x, target, _, options = make((20, 300), dtype, "z_loss")
    for first in (x, x.T.contiguous().T):
        a, b = (first.clone().requires_grad_() for _ in range(2))
        lse = cross_entropy(a, target, return_lse=True, **options)[1]
        wanted = torch.logsumexp(b.to(_ops.accumulate_dtype(dtype)), 1)
        torch.testing.assert_close(lse, wanted)
        grad = torch.randn(20, dtype=lse.dtype)
        torch.testing.assert_close(
            torch.autograd.grad(lse, a, grad)[0], torch.autograd.grad(wanted, b, grad)[0]
        )


@pytest.mark.parametrize("shape", [(16, 200), (16, 30)])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset_costs_nothing(shape, offset):
    x = torch.randint(-8, 8, shape).float()  # exact after the offset
    target = torch.randint(0, shape[1], shape[:1])
    for options in ({}, {"label_smoothing": 0.1}):
        plain = evaluate(cross_entropy, x, target, None, **options)
        moved = evaluate(cross_entropy, x + offset, target, None, **options)
        for a, b in zip(plain, moved, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("classes", [10, 3000])
def test_infinite_and_nan_logits(classes):
    x = torch.randn(6, classes)
    x[0, 3] = -math.inf
    x[1] = -math.inf
    x[2, 4] = math.inf
    x[3, 5] = math.nan
    x[4, 1] = -math.inf
    x[5, : classes - 1] = -math.inf
    target = torch.tensor([1, 0, 0, 0, 1, classes - 1])
    for options in ({}, {"label_smoothing": 0.1}):
        ours = cross_entropy(x, target, reduction="none", **options)
        torchs = F.cross_entropy(x, target, reduction="none", **options)
        torch.testing.assert_close(ours, torchs, equal_nan=True)
    x[3] = -1.0
    target[1:3] = -100
    grads = [evaluate(f, x[:4], target[:4], None)[1] for f in (cross_entropy, F.cross_entropy)]
    torch.testing.assert_close(grads[0][::3], grads[1][::3])
    assert not grads[0][1:3].any()  # ignored: no NaN comes through


def test_all_ignored_and_empty():
    x = torch.randn(4, 9, requires_grad=True)
    ignored = torch.full((4,), -100)
    loss = cross_entropy(x, ignored)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, x)[0].any()
    assert cross_entropy(x, ignored, reduction="sum") == 0
    assert not cross_entropy(x, ignored, reduction="none").any()
    none = torch.zeros(0, dtype=torch.long)
    assert cross_entropy(x[:0], none).isnan()
    assert cross_entropy(x[:0], none, reduction="sum") == 0
    assert cross_entropy(x[:, :0], ignored).isnan()


@pytest.mark.parametrize("label", [9, 12, -1])
def test_label_out_of_range(label):
    x = torch.randn(4, 9)
    for logits, target in ((x, torch.tensor([0, 1, label, 2])), (x[0], torch.tensor(label))):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            cross_entropy(logits, target)
    ignored = cross_entropy(x, torch.tensor([0, 1, label, 2]), ignore_index=label)
    torch.testing.assert_close(ignored, F.cross_entropy(x[[0, 1, 3]], torch.tensor([0, 1, 2])))


def test_backward_twice_and_expanded_gradient():
    x, target, _, _ = make((12, 400), torch.float32, "plain")
    x.requires_grad_()
    loss = cross_entropy(x, target, reduction="none")
    first = torch.autograd.grad(loss, x, torch.ones(()).expand(12), retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, torch.ones(12))[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1, 40000), (70, 3001), (1000, 12), (2, 21, 40, 40)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    x, target, weight, options = make(shape, torch.float32, "all")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(evaluate(cross_entropy, x, target, weight, **options))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, soft):
    x, target, weight, _ = make((4, 70), dtype, "all", soft)
    for reduction in ("none", "mean"):
        scalars = (reduction, -100, 0.1, 1e-2, 5.0)
        forward = torch.ops.fastnn.cross_entropy_forward.default
        torch.library.opcheck(forward, (x, target, weight, *scalars))
        loss, lse, total = forward(x, target, weight, *scalars)
        backward = torch.ops.fastnn.cross_entropy_backward.default
        for grad_lse, mask in ((None, (True, soft)), (torch.ones(4), (not soft, soft))):
            torch.library.opcheck(
                backward,
                (torch.ones_like(loss), grad_lse, x, target, weight, lse, total, *scalars, mask),
            )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_equals_eager(reduction):
    x, target, weight, options = make((12, 100), torch.float32, "all")

    def step(x, target):
        loss, lse = cross_entropy(
            x * 1.0, target, weight, reduction=reduction, return_lse=True, **options
        )
        return loss.sum() + lse.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        x_ = x.clone().requires_grad_()
        loss = function(x_, target)
        results.append((loss.detach(), torch.autograd.grad(loss, x_)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_func_grad():
    x, target, weight, options = make((7, 30), torch.float64, "all")
    ours, torchs = (
        torch.func.grad(lambda x, f=f: f(x, target, weight, **options))(x)
        for f in (cross_entropy, reference.cross_entropy)
    )
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, target, _, _ = make((9, 50), dtype, "plain")
    with torch.autocast("cpu", dtype=dtype):
        for logits in (x, x.float(), x.double()):
            a, b = (logits.clone().requires_grad_() for _ in range(2))
            ours, torchs = cross_entropy(a, target), F.cross_entropy(b, target)
            torch.testing.assert_close(ours, torchs)
            torch.testing.assert_close(
                torch.autograd.grad(ours, a)[0], torch.autograd.grad(torchs, b)[0]
            )
        soft = torch.rand(9, 50)
        torch.testing.assert_close(cross_entropy(x, soft), F.cross_entropy(x, soft))


def test_dtypes_of_targets():
    x = torch.randn(6, 80)
    labels = torch.randint(0, 80, (6,))
    torch.testing.assert_close(cross_entropy(x, labels.byte()), F.cross_entropy(x, labels))
    for logits, soft in ((x, torch.float64), (x.bfloat16(), torch.float32)):
        target = torch.rand(6, 80, dtype=soft)
        a, b = (target.clone().requires_grad_() for _ in range(2))
        ours, torchs = cross_entropy(logits, a), F.cross_entropy(logits, b)
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(
            torch.autograd.grad(ours, a)[0],
            torch.autograd.grad(torchs, b)[0],
            rtol=1e-2,
            atol=1e-2,
        )
    one = torch.randn(5)
    torch.testing.assert_close(
        cross_entropy(one, torch.tensor([2])), F.cross_entropy(one, torch.tensor([2]))
    )


def test_module_is_torchs():
    weight = torch.rand(8)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1, "ignore_index": 2}):
        ours, torchs = CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
        torchs.load_state_dict(ours.state_dict())
        x, target = torch.randn(20, 8), torch.randint(0, 8, (20,))
        torch.testing.assert_close(ours(x, target), torchs(x, target))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    option=st.sampled_from(OPTION_NAMES),
    soft=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    transposed=st.booleans(),
)
def test_any_shape(rows, classes, dtype, option, soft, reduction, transposed):
    x, target, weight, options = make((rows + 8, classes + 1), dtype, option, soft)
    if transposed:
        x = x.T.contiguous().T
    check(x, target, weight, reduction=reduction, **options)


X, Y = torch.zeros(4, 9), torch.zeros(4, dtype=torch.long)
BAD = {
    "input is no tensor": (TypeError, ([1.0], Y), {}),
    "target is no tensor": (TypeError, (X, [1]), {}),
    "scalar input": (RuntimeError, (X[0, 0], Y[0]), {}),
    "integer input": (NotImplementedError, (X.long(), Y), {}),
    "number of rows": (ValueError, (X, Y[:3]), {}),
    "rank of target": (RuntimeError, (X, Y[:, None]), {}),
    "size of probabilities": (RuntimeError, (X, X[:, :8]), {}),
    "float labels": (RuntimeError, (X, Y.float()), {}),
    "int32 labels": (RuntimeError, (X, Y.int()), {}),
    "size of weight": (RuntimeError, (X, Y, torch.ones(8)), {}),
    "rank of weight": (RuntimeError, (X, Y, torch.ones(1, 9)), {}),
    "dtype of weight": (RuntimeError, (X, Y, torch.ones(9).double()), {}),
    "device of target": (RuntimeError, (X, Y.to("meta")), {}),
    "reduction": (ValueError, (X, Y), {"reduction": "average"}),
    "label_smoothing": (RuntimeError, (X, Y), {"label_smoothing": 1.5}),
    "ignore_index of probabilities": (RuntimeError, (X, X), {"ignore_index": 3}),
    "softcap": (ValueError, (X, Y), {"softcap": -1.0}),
    "z_loss": (ValueError, (X, Y), {"z_loss": -1.0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    kind, arguments, options = BAD[case]
    with pytest.raises(kind, match=r"cross_entropy: \w+ must be .*, got "):
        cross_entropy(*arguments, **options)
    if not {"softcap", "z_loss"} & set(options):
        with pytest.raises(kind):
            F.cross_entropy(*arguments, **options)


def test_operators_refuse_gradients_of_another_shape():
    ops = torch.ops.fastnn
    options = (-100, 0.0, 0.0, 0.0)
    for reduction, rows in (("mean", ()), ("none", (4,))):
        _, lse, total = ops.cross_entropy_forward(X, Y, None, reduction, *options)
        good = {"grad_loss": torch.ones(rows), "grad_lse": torch.ones(4), "lse": lse}
        for name in good:
            bad = {**good, name: torch.ones(3)}
            with pytest.raises(RuntimeError, match=f"cross_entropy_backward: {name} must be"):
                ops.cross_entropy_backward(
                    bad["grad_loss"], bad["grad_lse"], X, Y, None, bad["lse"], total, reduction,
                    *options, (True, False),
                )  # fmt: skip


@pytest.mark.parametrize("top", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(2, 3), (1, 50, 2)])
def test_an_ignored_row_stays_silent_beside_large_ones(shape, top):
    x = torch.randn(shape)
    rows = x.movedim(1, -1)  # a view
    rows[(0,) * (x.dim() - 1)][0] = math.nan
    rows.flatten(0, -2)[1] += top
    target = torch.ones(shape[:1] + shape[2:], dtype=torch.int64)
    target.view(-1)[0] = -100
    x.requires_grad_()
    with fastnn.use_backend("native"):
        cross_entropy(x, target).backward()
    assert (x.grad.movedim(1, -1).flatten(0, -2)[0] == 0).all()


@pytest.mark.parametrize("offset", [10.0, 20.0, 31.0])
def test_gradients_of_large_logits(offset):
    x = torch.randn(256, 300)
    x[:, 0] += offset
    target = torch.randint(1, 300, (256,))
    expected = {}
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype, copy=True).requires_grad_()
        F.cross_entropy(leaf, target).backward()
        expected[dtype] = leaf.grad
    x.requires_grad_()
    with fastnn.use_backend("native"):
        cross_entropy(x, target).backward()
    assert_close_to_oracle(x.grad, *expected.values())


def test_gradient_of_class_weights_is_torchs():
    x, soft = torch.randn(400, 200, requires_grad=True), torch.randn(400, 200).softmax(1)
    weight = torch.rand(200, requires_grad=True)
    with fastnn.use_backend("auto"):
        ours = torch.autograd.grad(cross_entropy(x, soft, weight), weight)[0]
        theirs = torch.autograd.grad(F.cross_entropy(x, soft, weight), weight)[0]
    torch.testing.assert_close(ours, theirs)
    with fastnn.use_backend("native"), pytest.raises(NotImplementedError, match="class weights"):
        cross_entropy(x, soft, weight)


SMALLER = """
import torch, fastnn, fastnn._C
from fastnn.cross_entropy import cross_entropy
assert fastnn._C.cpu_capability() == "AVX2", fastnn._C.cpu_capability()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in ((20, 7), (20, 301), (2, 30, 11)):
        x = torch.randn(shape).to(dtype)
        y = torch.randint(0, shape[1], shape[:1] + shape[2:])
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        ours, theirs = cross_entropy(a, y), torch.nn.functional.cross_entropy(b, y)
        ours.backward()
        theirs.backward()
        eps = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=eps, atol=0)
        largest = b.grad.abs().max()
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=eps * largest)
"""


@pytest.mark.skipif(_ops.NATIVE_MISSING is not None, reason="no extension")
def test_on_avx2():
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "FASTNN_BACKEND": "native"}
    subprocess.run([sys.executable, "-c", SMALLER], env=environment, check=True)
