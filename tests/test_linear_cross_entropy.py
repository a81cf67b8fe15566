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
from fastnn.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, features, classes
SHAPES = [(33, 24, 301), (19, 13, 47), (65, 64, 128), (8, 16, 5003), (0, 8, 9), (5, 0, 7)]
OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
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


def make(rows, features, classes, dtype, option, soft=False):
    """(input, linear_weight, linear_bias), target, options."""
    options = dict(OPTIONS[option])
    if options.pop("weight", False):
        options["weight"] = (torch.rand(classes) + 0.1).to(dtype)
    tensors = (
        torch.randn(rows, features),
        torch.randn(classes, features),
        torch.randn(classes),
    )
    if soft:
        target = torch.rand(rows, classes).to(dtype)
    else:
        target = torch.randint(0, classes, (rows,))
        target[1::3] = -100
    return tuple(t.to(dtype) for t in tensors), target, options


def evaluate(function, tensors, target, double=False, bias=True, **options):
    """Loss and gradients for a non-uniform upstream gradient."""
    to = (lambda t: t.double()) if double else (lambda t: t)
    dtype = tensors[0].dtype
    inputs = [to(t).detach().requires_grad_() for t in tensors[: 3 if bias else 2]]
    if options.get("weight") is not None:
        options["weight"] = to(options["weight"])
    target = to(target) if target.is_floating_point() else target
    input, weight, *linear_bias = inputs
    loss = function(
        input, weight, target, linear_bias=linear_bias[0] if linear_bias else None, **options
    )
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(loss.shape, dtype=torch.float64, generator=generator)
    # The oracle is given the same rounded gradient.
    grad = grad.to(dtype).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, inputs, grad)


def check(tensors, target, bias=True, workspace_bytes=None, **options):
    ours = evaluate(
        linear_cross_entropy, tensors, target, bias=bias, workspace_bytes=workspace_bytes, **options
    )
    torchs = evaluate(reference.linear_cross_entropy, tensors, target, bias=bias, **options)
    oracle = evaluate(
        reference.linear_cross_entropy, tensors, target, bias=bias, double=True, **options
    )
    names = ("loss", "grad_input", "grad_linear_weight", "grad_linear_bias")[: len(ours)]
    for what, *results in zip(names, ours, torchs, oracle, strict=True):
        assert_close_to_oracle(*results, what=what)


@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_torch(dtype, shape, option):
    for soft in (False, True):
        for reduction in ("none", "mean"):
            tensors, target, options = make(*shape, dtype, option, soft)
            for workspace in (None, 5 * shape[2] * 4):
                check(
                    tensors, target, reduction=reduction, workspace_bytes=workspace,
                    bias=option != "plain", **options,
                )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_views(dtype):
    (x, w, b), target, options = make(30, 16, 70, dtype, "all")
    views = {
        "input transposed": (x.T.contiguous().T, w),
        "input offset": (F.pad(x, (3, 5))[:, 3:-5], w),
        "input expanded": (x[:1].expand(30, 16), w),
        "weight transposed": (x, w.T.contiguous().T),
        "weight sliced": (x, torch.cat([w, w], 1)[:, 5:21]),
    }
    for input, weight in views.values():
        before = input.clone(), weight.clone()
        for workspace in (None, 7 * 70 * 4):
            check((input, weight, b), target, workspace_bytes=workspace, **options)
        assert torch.equal(input, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("shift", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("soft", [False, True])
def test_batched_input_and_shift(shift, soft):
    (x, w, b), _, options = make(3 * 6, 8, 20, torch.float32, "z_loss")
    x = x.view(3, 6, 8)
    if soft and shift > 6:
        pytest.skip("probabilities are cut, so at most all of them")
    target = torch.rand(3, 6, 20) if soft else torch.randint(0, 20, (3, 6))
    if not soft:
        target[0, 2] = -100
    length = max(6 - shift, 0)
    cut = x[:, :length], w, b
    late = target[:, shift:] if shift < 6 else target[:, :0]
    for reduction in ("none", "mean", "sum"):
        a, b_ = x.clone().requires_grad_(), cut[0].clone().requires_grad_()
        ours, lse = linear_cross_entropy(
            a, w, target, linear_bias=b, shift=shift, reduction=reduction, return_lse=True,
            **options,
        )  # fmt: skip
        torchs = reference.linear_cross_entropy(
            b_, w, late, linear_bias=b, reduction=reduction, **options
        )
        torch.testing.assert_close(ours, torchs, equal_nan=True)
        assert lse.shape == (3, length)
        if length:
            grad = torch.autograd.grad(ours.sum(), a)[0]
            torch.testing.assert_close(grad[:, :length], torch.autograd.grad(torchs.sum(), b_)[0])
            assert not grad[:, length:].any()


def test_one_row():
    w, x = torch.randn(9, 4), torch.randn(4)
    for target in (torch.tensor(3), torch.rand(9)):
        torch.testing.assert_close(
            linear_cross_entropy(x, w, target), F.cross_entropy(x @ w.T, target)
        )


def test_k_dimensional_weight():
    x, w, target = torch.randn(6, 5), torch.randn(7, 3, 2, 5), torch.randint(0, 7, (6, 3, 2))
    logits = torch.einsum("nd,cijd->ncij", x, w)
    with fastnn.use_backend("auto"):
        ours = linear_cross_entropy(x, w, target)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))
    with pytest.raises(NotImplementedError, match="native"):
        linear_cross_entropy(x, w, target)


@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(option, soft):
    (x, w, b), target, options = make(5, 3, 6, torch.float64, option, soft)
    inputs = tuple(t.requires_grad_() for t in (x, w, b))
    for reduction in ("none", "mean", "sum"):
        for return_lse in (False, True):

            def function(x, w, b, reduction=reduction, return_lse=return_lse):
                return linear_cross_entropy(
                    x, w, target, linear_bias=b, reduction=reduction, return_lse=return_lse,
                    workspace_bytes=2 * 6 * 8, **options,
                )  # fmt: skip

            assert torch.autograd.gradcheck(function, inputs)
            if reduction != "sum":
                assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradients_only_where_wanted():
    (x, w, b), target, options = make(12, 8, 30, torch.float32, "all")
    whole = evaluate(linear_cross_entropy, (x, w, b), target, **options)
    for i in range(3):
        tensors = [t.clone() for t in (x, w, b)]
        tensors[i].requires_grad_()
        loss = linear_cross_entropy(
            tensors[0], tensors[1], target, linear_bias=tensors[2], **options
        )
        grad = torch.autograd.grad(loss, tensors[i])[0]
        upstream = torch.randn(
            (), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).float()
        torch.testing.assert_close(grad * upstream, whole[1 + i])


@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_backward_twice(upstream):
    (x, w, _), target, _ = make(20, 8, 50, torch.float32, "plain")
    x.requires_grad_()
    w.requires_grad_()
    loss = linear_cross_entropy(x, w, target) * upstream
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    loss.backward()
    for a, b, c, d in zip(first, kept, second, (x.grad, w.grad), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(a, d)


def test_unit_gradient_becomes_the_parameters_grad():
    """Nothing is copied on the way from the forward to `.grad`."""
    (x, w, _), target, _ = make(20, 8, 50, torch.float32, "plain")
    w.requires_grad_()
    loss = linear_cross_entropy(x, w, target)
    made = loss.grad_fn.units[1].data_ptr()
    loss.backward()
    assert w.grad.data_ptr() == made


def test_ignored_rows():
    (x, w, b), target, options = make(30, 8, 40, torch.float32, "all")
    ours = evaluate(linear_cross_entropy, (x, w, b), target, **options)
    assert not ours[1][1::3].any()
    poisoned = x.clone()
    poisoned[1::3] = float("nan")  # they are never read
    again = evaluate(linear_cross_entropy, (poisoned, w, b), target, **options)
    assert all(torch.equal(a, c) for a, c in zip(ours, again, strict=True))
    lse = linear_cross_entropy(x, w, target, return_lse=True)[1]
    assert not lse[1::3].any() and lse[::3].all()


def test_all_ignored():
    (x, w, b), target, _ = make(12, 8, 20, torch.bfloat16, "plain")
    target = torch.full_like(target, -100)
    for reduction in ("none", "sum", "mean"):
        loss, *grads = evaluate(linear_cross_entropy, (x, w, b), target, reduction=reduction)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("label", [20, -1])
def test_label_out_of_range(label):
    (x, w, _), target, _ = make(12, 8, 20, torch.float32, "plain")
    target[3] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        linear_cross_entropy(x.requires_grad_(), w, target)


def test_common_offset_costs_nothing():
    x, w = torch.ones(9, 1), torch.randint(-8, 8, (300, 1)).float()
    target = torch.randint(0, 300, (9,))
    plain = evaluate(linear_cross_entropy, (x, w), target, bias=False)
    moved = evaluate(linear_cross_entropy, (x, w + 1e4), target, bias=False)
    torch.testing.assert_close(plain[0], moved[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(plain[2], moved[2], rtol=2e-6, atol=1e-9)


def test_float32_accumulation_over_chunks():
    """The error of a bfloat16 grad_weight does not grow with the number of chunks."""
    (x, w, _), target, _ = make(512, 32, 96, torch.bfloat16, "plain")
    oracle = evaluate(reference.linear_cross_entropy, (x, w), target, double=True, bias=False)[2]
    errors = []
    for rows in (512, 8):
        grad = evaluate(
            linear_cross_entropy, (x, w), target, bias=False, workspace_bytes=rows * 96 * 2
        )[2]
        errors.append((grad - oracle).abs().max())
    assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_again(dtype):
    (x, w, b), target, options = make(70, 32, 300, dtype, "all")
    for workspace in (None, 9 * 300 * 4):
        first, second = (
            evaluate(linear_cross_entropy, (x, w, b), target, workspace_bytes=workspace, **options)
            for _ in range(2)
        )
        assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, soft):
    (x, w, b), target, _ = make(6, 8, 20, dtype, "plain", soft)
    class_weight = torch.rand(20).to(dtype)
    for reduction, mask in (("none", (False,) * 3), ("mean", (True, True, False))):
        scalars = (reduction, -100, 0.1, 1e-2, 5.0, -1)
        forward = torch.ops.fastnn.linear_cross_entropy_forward.default
        torch.library.opcheck(forward, (x, w, b, target, class_weight, *scalars, mask))
        loss, lse, total, *_ = forward(x, w, b, target, class_weight, *scalars, mask)
        backward = torch.ops.fastnn.linear_cross_entropy_backward.default
        torch.library.opcheck(
            backward,
            (
                torch.ones_like(loss), torch.ones_like(lse), x, w, b, target, class_weight, lse,
                total, *scalars, (True, False, True),
            ),
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_equals_eager(reduction):
    (x, w, b), target, options = make(12, 8, 30, torch.float32, "all")

    def step(x, w, b):
        return linear_cross_entropy(
            x * 1.0, w, target, linear_bias=b, reduction=reduction, shift=0, **options
        ).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = function(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


def test_func_grad():
    (x, w, b), target, options = make(7, 5, 12, torch.float64, "all")
    ours, torchs = (
        torch.func.grad(
            lambda x, w, b, f=f: f(x, w, target, linear_bias=b, **options), argnums=(0, 1, 2)
        )(x, w, b)
        for f in (linear_cross_entropy, reference.linear_cross_entropy)
    )
    for a, c in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    (x, w, b), target, _ = make(40, 16, 50, torch.float32, "plain")
    results = []
    for function in (linear_cross_entropy, reference.linear_cross_entropy):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        with torch.autocast("cpu", dtype=dtype):
            loss = function(*inputs[:2], target, linear_bias=inputs[2])
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    assert results[0][0].dtype == torch.float32
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c, rtol=3e-2, atol=3e-3)


def test_gradient_of_probabilities_takes_the_reference():
    (x, w, _), target, _ = make(6, 8, 20, torch.float32, "plain", soft=True)
    with fastnn.use_backend("auto"):
        a, b = (target.clone().requires_grad_() for _ in range(2))
        ours = torch.autograd.grad(linear_cross_entropy(x, w, a), a)[0]
        torchs = torch.autograd.grad(F.cross_entropy(x @ w.T, b), b)[0]
        torch.testing.assert_close(ours, torchs)
        weight = torch.rand(20, requires_grad=True)
        ours = torch.autograd.grad(linear_cross_entropy(x, w, target, weight=weight), weight)[0]
        torchs = torch.autograd.grad(F.cross_entropy(x @ w.T, target, weight), weight)[0]
        torch.testing.assert_close(ours, torchs)


def test_no_classes():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(0, 4)
    linear_cross_entropy(x, w, torch.rand(3, 0), reduction="sum").backward()
    assert (x.grad == 0).all()


def test_operators_refuse_gradients_of_another_shape():
    x, w = torch.randn(4, 8), torch.randn(20, 8)
    target, total = torch.zeros(4, dtype=torch.int64), torch.ones(())
    for grad_loss, grad_lse, name in (
        (torch.ones(0), None, "grad_loss"), (torch.ones(()), torch.ones(1), "grad_lse"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{name} must be of shape"):
            torch.ops.fastnn.linear_cross_entropy_backward(
                grad_loss, grad_lse, x, w, None, target, None, torch.ones(4), total, "sum", -100,
                0.0, 0.0, 0.0, -1, (True, True, False),
            )  # fmt: skip


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch before 2.13")
def test_module_is_torchs():
    for features, options in (
        ((), {}),
        ((), {"bias": True, "label_smoothing": 0.1, "weight": torch.rand(9)}),
        ((3, 2), {"bias": True}),
    ):
        with fastnn.use_backend("auto"):
            ours = LinearCrossEntropyLoss(5, 9, out_features=features, **options)
            torchs = torch.nn.LinearCrossEntropyLoss(5, 9, out_features=features, **options)
            torchs.load_state_dict(ours.state_dict())
            x, target = torch.randn(7, 5), torch.randint(0, 9, (7, *features))
            torch.testing.assert_close(ours(x, target), torchs(x, target))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    features=st.integers(4, 40),
    classes=st.integers(8, 200),
    dtype=st.sampled_from(DTYPES),
    option=st.sampled_from(OPTION_NAMES),
    soft=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    chunk=st.integers(1, 50),
)
def test_any_shape(rows, features, classes, dtype, option, soft, reduction, chunk):
    tensors, target, options = make(rows + 8, features, classes, dtype, option, soft)
    check(tensors, target, reduction=reduction, workspace_bytes=chunk * classes * 4, **options)


X, W, Y = torch.zeros(4, 5), torch.zeros(9, 5), torch.zeros(4, dtype=torch.long)
BAD = {
    "input is no tensor": (TypeError, ([1.0], W, Y), {}),
    "weight is no tensor": (TypeError, (X, None, Y), {}),
    "rank of linear_weight": (RuntimeError, (X, W[0], Y), {}),
    "in_features": (RuntimeError, (X, W[:, :4], Y), {}),
    "size of linear_bias": (RuntimeError, (X, W, Y), {"linear_bias": torch.ones(8)}),
    "dtype of linear_weight": (RuntimeError, (X, W.double(), Y), {}),
    "dtype of linear_bias": (RuntimeError, (X, W, Y), {"linear_bias": torch.ones(9).double()}),
    "number of rows": (ValueError, (X, W, Y[:3]), {}),
    "int32 labels": (RuntimeError, (X, W, Y.int()), {}),
    "size of weight": (RuntimeError, (X, W, Y), {"weight": torch.ones(8)}),
    "reduction": (ValueError, (X, W, Y), {"reduction": "average"}),
    "label_smoothing": (RuntimeError, (X, W, Y), {"label_smoothing": 1.5}),
    "ignore_index of probabilities": (
        RuntimeError, (X, W, torch.zeros(4, 9)), {"ignore_index": -100},
    ),
    "shift of one row": (ValueError, (X[0], W, Y[0]), {"shift": 1}),
    "negative shift": (ValueError, (X, W, Y), {"shift": -1}),
    "softcap": (ValueError, (X, W, Y), {"softcap": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    kind, arguments, options = BAD[case]
    with pytest.raises(kind, match=r"linear_cross_entropy: \w+ must be .*, got "):
        linear_cross_entropy(*arguments, **options)
    if hasattr(F, "linear_cross_entropy") and not {"softcap", "shift"} & set(options):
        with pytest.raises((kind, AttributeError)):
            F.linear_cross_entropy(*arguments, **options)


PEAK = """
import sys, torch
import torch.nn.functional as F
from fastnn.linear_cross_entropy import linear_cross_entropy

rows, features, classes = 4096, 256, 16000
x = torch.randn(rows, features, requires_grad=True)
w = torch.randn(classes, features, requires_grad=True)
target = torch.randint(0, classes, (rows,))
def ours(x, w, target):
    return linear_cross_entropy(x, w, target, workspace_bytes=8 << 20)
def theirs(x, w, target):
    return F.cross_entropy(F.linear(x, w), target)
def peak():  # of this program; ru_maxrss would start at that of the process that ran it
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
function = {"ours": ours, "theirs": theirs}[sys.argv[1]]
function(x[:8], w, target[:8]).backward()  # what libraries allocate once
x.grad = w.grad = None
before = peak()
function(x, w, target).backward()
print(peak() - before)
"""


@pytest.mark.skipif(_ops.NATIVE_MISSING is not None, reason="no extension")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_peak_memory():
    """At most an eighth of torch's, at a shape a quarter as wide as a language model's."""
    kib = {}
    for which in ("ours", "theirs"):
        out = subprocess.run(
            [sys.executable, "-c", PEAK, which], env={**os.environ, "FASTNN_BACKEND": "auto"},
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        kib[which] = int(out.stdout)
    assert kib["theirs"] > 400_000  # three times the logits, or the measure is wrong
    assert kib["ours"] <= kib["theirs"] / 8, kib
