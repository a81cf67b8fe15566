"""The Triton kernels of cross_entropy and linear_cross_entropy, on a GPU or else interpreted."""

import pytest
import torch
from conftest import assert_close_to_oracle
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

import tritonops
from fastnn import _ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
OPTIONS = [
    (NONE, False),
    ({**NONE, "label_smoothing": 0.3}, False),
    ({**NONE, "z_loss": 1e-2, "label_smoothing": 0.1}, True),
    ({**NONE, "softcap": 4.0}, True),
    (ALL, True),
]


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def labels(shape, classes, ignored=True):
    target = torch.randint(0, classes, shape)
    if ignored and target.numel() > 2:
        target.view(-1)[::4] = -100
    return target.to(DEVICE)


def expected(logits, target, weight, options, reduction, grad_loss, grad_lse, dtype):
    x = logits.detach().to(dtype).requires_grad_()
    weight = None if weight is None else weight.to(dtype)
    loss, lse = reference.cross_entropy(
        x, target, weight, reduction=reduction, return_lse=True, **options
    )
    outputs, upstream = [loss], [grad_loss.to(loss.dtype)]
    if grad_lse is not None:
        outputs, upstream = [loss, lse], [*upstream, grad_lse.to(lse.dtype)]
    (grad,) = torch.autograd.grad(outputs, x, upstream)
    return loss.detach(), lse.detach(), grad


def check(logits, target, weight, options, reduction, with_lse=True):
    copies = [None if t is None else t.clone() for t in (logits, target, weight)]
    args = (target, weight, reduction, -100, *options.values())
    loss, lse, total = tritonops.cross_entropy_forward(logits, *args)
    grad_loss = draw(*loss.shape)
    grad_lse = draw(*lse.shape) if with_lse else None
    grad, grad_target = tritonops.cross_entropy_backward(
        grad_loss, grad_lse, logits, target, weight, lse, total, reduction, -100,
        *options.values(), [True, False],
    )  # fmt: skip
    assert grad.is_contiguous() and grad.shape == logits.shape and grad_target.shape == (0,)
    assert loss.dtype == lse.dtype == total.dtype == torch.float32
    rest = (target, weight, options, reduction, grad_loss, grad_lse)
    same = expected(logits, *rest, logits.dtype)
    exact = expected(logits, *rest, torch.float64)
    assert_close_to_oracle(loss.to(same[0].dtype), same[0], exact[0], what="loss")
    assert_close_to_oracle(lse, same[1], exact[1], what="lse")
    assert_close_to_oracle(grad, same[2], exact[2], what="gradient")
    for before, now in zip(copies, (logits, target, weight), strict=True):
        assert before is None or torch.equal(before.nan_to_num(), now.nan_to_num())
    return loss, lse, total, grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_options(dtype, reduction):
    torch.manual_seed(0)
    for options, weighted in OPTIONS:
        logits = draw(13, 150, dtype=dtype, scale=3.0)
        weight = torch.rand(150).to(DEVICE, dtype) if weighted else None
        check(logits, labels((13,), 150), weight, options, reduction)


@pytest.mark.parametrize(
    "shape", ((1, 1), (5, 64), (3, 257), (17,), (2, 19, 3, 4), (3, 70, 1), (2, 5, 0), (0, 7))
)
def test_shapes(shape):
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[1] if len(shape) > 1 else shape[0]
    target = labels(rows, classes)
    for reduction in ("none", "sum", "mean"):
        check(draw(*shape), target, None, NONE, reduction, with_lse=False)
    check(draw(*shape), target, draw(classes).abs(), ALL, "none")


def test_strides():
    target = labels((6, 10), 40)[::2, ::2]
    for logits in (
        draw(3, 5, 40).permute(0, 2, 1),
        draw(40, 5, 3).permute(2, 0, 1),
        draw(6, 80, 5)[::2, ::2],
        draw(40, 5).expand(3, 40, 5),
        draw(3, 40, 1).expand(3, 40, 5),
    ):
        assert not logits.is_contiguous()
        check(logits, target, None, ALL, "none")
        check(logits, target, draw(80).abs()[::2], ALL, "mean")


def test_gradient_of_an_expanded_upstream():
    logits, target = draw(6, 9), labels((6,), 9)
    _, lse, total = tritonops.cross_entropy_forward(
        logits, target, None, "none", -100, *NONE.values()
    )
    results = [
        tritonops.cross_entropy_backward(
            upstream, None, logits, target, None, lse, total, "none", -100, *NONE.values(),
            [True, False],
        )[0]
        for upstream in (torch.ones(1, device=DEVICE).expand(6), torch.ones(6, device=DEVICE))
    ]  # fmt: skip
    assert torch.equal(*results)


def test_a_common_offset_costs_nothing():
    logits = torch.randint(-8, 8, (12, 100)).to(DEVICE, torch.float32) / 4
    target = labels((12,), 100)
    for options in (NONE, {**NONE, "label_smoothing": 0.2}):
        plain = tritonops.cross_entropy_forward(
            logits, target, None, "none", -100, *options.values()
        )
        moved = tritonops.cross_entropy_forward(
            logits + 1e4, target, None, "none", -100, *options.values()
        )
        assert (plain[0] - moved[0]).abs().max() <= 1e-6 * plain[0].abs().max()


def test_infinite_logits():
    logits = draw(5, 150)
    logits[0, 10:] = -float("inf")
    logits[1, :100] = -float("inf")
    logits[2] = -float("inf")
    logits[3, 5] = float("inf")
    logits[4, 149] = float("nan")
    target = torch.tensor([3, 120, 0, 5, 1], device=DEVICE)
    check(logits, target, None, NONE, "none", with_lse=False)
    smoothed = {**NONE, "label_smoothing": 0.1}
    check(logits[:2, :20], target[:2] % 20, None, smoothed, "none", with_lse=False)


def test_everything_ignored():
    logits, target = draw(4, 9), torch.full((4,), -100, device=DEVICE)
    loss, lse, total, grad = check(logits, target, None, NONE, "mean", with_lse=False)
    assert loss.isnan() and total == 0 and not grad.any() and lse.isfinite().all()
    check(logits, target, None, ALL, "sum")


def test_ignored_rows_are_not_read():
    logits, target = draw(5, 9), labels((5,), 9)
    logits[target == -100] = float("nan")
    loss, lse, total = tritonops.cross_entropy_forward(
        logits, target, None, "sum", -100, *NONE.values()
    )
    grad = tritonops.cross_entropy_backward(
        loss, None, logits, target, None, lse, total, "sum", -100, *NONE.values(), [True, False]
    )[0]
    assert loss.isfinite() and grad.isfinite().all() and not grad[target == -100].any()


@pytest.mark.parametrize("bad", (9, 2**40, -1, -101))
def test_labels_out_of_range_give_nan(bad):
    logits, target = draw(4, 9), torch.tensor([1, bad, -100, 2], device=DEVICE)
    for weight in (None, draw(9).abs()):
        loss, lse, total = tritonops.cross_entropy_forward(
            logits, target, weight, "none", -100, *ALL.values()
        )
        assert loss.isnan().tolist() == [False, True, False, False]
        grad = tritonops.cross_entropy_backward(
            loss.nan_to_num(1.0), None, logits, target, weight, lse, total, "none", -100,
            *ALL.values(), [True, False],
        )[0]  # fmt: skip
        assert grad.isnan().all(1).tolist() == [False, True, False, False]
        assert tritonops.cross_entropy_forward(logits, target, weight, "mean", -100, *ALL.values())[
            0
        ].isnan()


def test_offsets_past_32_bits():
    # 4 GiB of addresses of which a few pages are touched
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    target = torch.tensor([3, 7], device=DEVICE)
    logits = storage.as_strided((2, 50), (2**31, 1))
    logits.copy_(draw(2, 50))
    mine = tritonops.cross_entropy_forward(logits, target, None, "none", -100, *NONE.values())
    near = tritonops.cross_entropy_forward(
        logits.clone(), target, None, "none", -100, *NONE.values()
    )
    assert torch.equal(mine[0], near[0]) and torch.equal(mine[1], near[1])


def test_long_sums_are_the_same_every_time():
    from tritonops.cross_entropy import row_sums

    loss, weight = draw(200_003).abs(), draw(200_003).abs()
    total, total_weight = row_sums(loss, weight, mean=False)
    mean, _ = row_sums(loss, weight, mean=True)
    assert_close_to_oracle(total, loss.sum(), loss.double().sum())
    assert_close_to_oracle(total_weight, weight.sum(), weight.double().sum())
    exact = loss.double().sum() / weight.double().sum()
    assert_close_to_oracle(mean, loss.sum() / weight.sum(), exact)
    assert torch.equal(row_sums(loss, weight, mean=True)[0], mean)


def test_what_is_refused():
    refusal = tritonops.refusal
    assert refusal("cross_entropy", {"prob_target": False, "k_dim": True}) is None
    assert "probability" in refusal("cross_entropy", {"prob_target": True, "k_dim": False})
    assert "probability" in refusal("linear_cross_entropy", {"prob_target": True})


# linear_cross_entropy


def linear_expected(tensors, target, weight, options, reduction, grad_loss, grad_lse, dtype):
    x, w, b = (None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors)
    weight = None if weight is None else weight.to(dtype)
    loss, lse = reference.linear_cross_entropy(
        x, w, target, linear_bias=b, weight=weight, reduction=reduction, return_lse=True, **options
    )
    leaves = [t for t in (x, w, b) if t is not None]
    outputs, upstream = [loss], [grad_loss.to(loss.dtype)]
    if grad_lse is not None:
        outputs, upstream = [loss, lse], [*upstream, grad_lse.to(lse.dtype)]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    return loss.detach(), lse.detach(), *grads


def linear_check(x, w, b, target, weight, options, reduction, workspace):
    mask = [True, True, b is not None]
    args = (x, w, b, target, weight, reduction, -100, *options.values(), workspace)
    loss, lse, total, *grads = tritonops.linear_cross_entropy_forward(*args, mask)
    ones = torch.ones_like(loss)
    bare = tritonops.linear_cross_entropy_forward(*args, [False] * 3)
    assert all(g.shape == (0,) for g in bare[3:])
    torch.testing.assert_close(bare[:3], (loss, lse, total), rtol=1e-6, atol=0, equal_nan=True)
    grad_loss, grad_lse = draw(*loss.shape), draw(*lse.shape)
    later = tritonops.linear_cross_entropy_backward(
        grad_loss, grad_lse, x, w, b, target, weight, lse, total, *args[5:], mask
    )
    for mine, upstream in ((grads, (ones, None)), (later, (grad_loss, grad_lse))):
        rest = ((x, w, b), target, weight, options, reduction, *upstream)
        same, exact = linear_expected(*rest, x.dtype), linear_expected(*rest, torch.float64)
        mine = (loss.to(same[0].dtype), lse, *mine[: len(exact) - 2])
        names = ("loss", "lse", "input", "weight", "bias")
        for name, *values in zip(names, mine, same, exact, strict=False):
            assert_close_to_oracle(*values, what=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_linear_cross_entropy(dtype, reduction):
    torch.manual_seed(0)
    x, w, b = draw(2, 7, 19, dtype=dtype), draw(75, 19, dtype=dtype), draw(75, dtype=dtype)
    target, weight = labels((2, 7), 75), torch.rand(75).to(DEVICE, dtype)
    one_row = 80 * x.element_size()
    linear_check(x, w, b, target, weight, ALL, reduction, 5 * one_row)
    if reduction == "mean":
        linear_check(x, w, None, target, None, NONE, reduction, -1)


def test_linear_cross_entropy_of_views_and_edges():
    x, w = draw(19, 14).t(), draw(19, 33).t()
    linear_check(x, w, draw(66)[::2], labels((28,), 33)[::2], None, NONE, "mean", 300)
    for reduction in ("none", "sum"):
        empty = draw(0, 5), draw(7, 5), draw(7), labels((0,), 7)
        linear_check(*empty, None, NONE, reduction, -1)


def test_chunks_do_not_cost_precision():
    dtype = torch.bfloat16
    x, w, target = draw(30, 16, dtype=dtype), draw(30, 16, dtype=dtype), labels((30,), 30)
    options = (None, "mean", -100, *NONE.values())
    exact = linear_expected(
        (x, w, None), target, None, NONE, "mean", torch.ones(()).to(DEVICE), None, torch.float64
    )
    errors = []
    for workspace in (-1, 2 * 32 * 2):
        grads = tritonops.linear_cross_entropy_forward(
            x, w, None, target, *options, workspace, [True, True, False]
        )
        errors.append((grads[4].double() - exact[3]).norm())
    assert errors[1] <= 1.1 * errors[0]


class _Largest(TorchDispatchMode):
    """Records the largest tensor of numbers that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_are_never_held():
    n, d, v = 32, 2, 64
    x, w, target = draw(n, d), draw(v, d), labels((n,), v)
    args = (None, "mean", -100, *NONE.values(), 4 * v * 4, [True, True, False])
    with _Largest() as largest:
        loss, lse, total, *_ = tritonops.linear_cross_entropy_forward(x, w, None, target, *args)
        tritonops.linear_cross_entropy_backward(
            loss, None, x, w, None, target, None, lse, total, *args[1:]
        )
    assert 4 * v <= largest.elements < n * v // 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_scale(dtype):
    for count in (0, 1, 5000):
        for factor in (1.0, 0.3):
            x = draw(count, dtype=dtype)
            scale = torch.tensor(factor, device=DEVICE)
            wanted = x * scale
            tritonops.scale_(x, scale)
            assert torch.equal(x, wanted)


def test_operators_are_registered():
    assert _ops.TRITON_MISSING is None
    namespace = torch.ops.fastnn_triton
    logits, target = draw(4, 9), labels((4,), 9)
    options = ("mean", -100, *ALL.values())
    loss, lse, total = _ops.TRITON.cross_entropy_forward(logits, target, None, *options)
    mine = tritonops.cross_entropy_forward(logits, target, None, *options)
    assert torch.equal(loss, mine[0]) and torch.equal(lse, mine[1])
    check = torch.library.opcheck
    check(namespace.cross_entropy_forward.default, (logits, target, None, *options))
    check(
        namespace.cross_entropy_backward.default,
        (loss, lse, logits, target, None, lse, total, *options, [True, False]),
    )
    linear = (draw(4, 5), draw(9, 5), draw(9), target, None, *options, -1, [True] * 3)
    check(namespace.linear_cross_entropy_forward.default, linear)
    check(
        namespace.linear_cross_entropy_backward.default,
        (loss, None, *linear[:5], lse, total, *linear[5:]),
    )
