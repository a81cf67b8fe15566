"""The CUDA kernels' own code, compiled for the host and run thread by thread (tests/cuda_on_host).

No GPU is needed: indexing, layouts, tails, barriers and arithmetic are checked against the oracle.
NaN around every input and a canary around every output show an access outside of the tensors, and
misaligned packets trap.
"""

import ctypes
import math
import mmap

import pytest
import torch
from conftest import assert_close_to_oracle, host_library

from fastnn import reference

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
GUARD = 64
CANARY = 12345.0


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "cls", "inner")]


class RowCount(ctypes.Structure):
    _fields_ = [("total", ctypes.c_void_p), ("first", ctypes.c_int)]


class Problem(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p), ("storage", ctypes.c_int), ("strides", Strides),
        ("rows", ctypes.c_int64), ("inner", ctypes.c_int64), ("classes", ctypes.c_int),
        ("labels", ctypes.c_void_p), ("probabilities", ctypes.c_void_p),
        ("probability_storage", ctypes.c_int), ("probability_strides", Strides),
        ("class_weight", ctypes.c_void_p), ("weight_sum", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64), ("label_smoothing", ctypes.c_float),
        ("z_loss", ctypes.c_float), ("softcap", ctypes.c_float),
        ("row_index", ctypes.c_void_p), ("skip_ignored", ctypes.c_bool),
    ]  # fmt: skip


class Gradient(ctypes.Structure):
    _fields_ = [
        ("grad_loss", ctypes.c_void_p), ("grad_per_row", ctypes.c_bool),
        ("grad_lse", ctypes.c_void_p), ("lse", ctypes.c_void_p), ("total_weight", ctypes.c_void_p),
        ("grad_logits", ctypes.c_void_p), ("grad_strides", Strides),
        ("grad_probabilities", ctypes.c_void_p), ("row_loss", ctypes.c_void_p),
        ("row_lse", ctypes.c_void_p), ("rows", RowCount),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host_library(tmp_path_factory.mktemp("cuda_on_host"), "cross_entropy")


@pytest.fixture(scope="module")
def linear_kernels(tmp_path_factory):
    return host_library(tmp_path_factory.mktemp("cuda_on_host"), "linear_cross_entropy")


def guarded(shape, strides, dtype, fill, offset=0):
    """A tensor of these strides amid `fill`; returns (tensor, the whole buffer)."""
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    buffer = torch.full((GUARD + offset + reach + GUARD,), fill, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    return buffer.as_strided(shape, strides, GUARD + offset), buffer


def contiguous_strides(shape):
    return torch.empty(shape, device="meta").stride()


def layout_of(shape, name):
    """(strides, offset): contiguous, misaligned, cut from wider rows, or transposed."""
    strides = contiguous_strides(shape)
    if name == "offset":
        return strides, 3
    if name == "padded":
        return (strides[0] + 5 if len(shape) > 1 else strides[0], *strides[1:]), 0
    if name == "classes_last" and len(shape) > 2:
        n, c, *rest = shape
        inner = contiguous_strides((n, *rest, c))
        return (inner[0], inner[-1], *inner[1:-1]), 0
    if name == "classes_last" and len(shape) == 2:
        return (1, shape[0]), 0
    return strides, 0


def rows_view(tensor):
    if tensor.dim() == 1:
        return tensor.view(1, -1, 1)
    return tensor.reshape(tensor.shape[0], tensor.shape[1], math.prod(tensor.shape[2:]))


def strides_of(rows):
    return Strides(*(1 if n == 1 else s for n, s in zip(rows.shape, rows.stride(), strict=True)))


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


class Run:
    """Forward and backward of one call, on copies of the inputs that lie amid NaN."""

    def __init__(
        self, kernels, logits, target, weight, options, layout, target_layout="contiguous"
    ):
        self.kernels, self.options = kernels, options
        strides, offset = layout_of(logits.shape, layout)
        self.logits, _ = guarded(logits.shape, strides, logits.dtype, math.nan, offset)
        self.logits.copy_(logits)
        rows = rows_view(self.logits)
        assert rows.data_ptr() == self.logits.data_ptr(), "the case needs a view"
        self.shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
        self.weight = None if weight is None else weight.float().contiguous()
        self.weight_sum = None if weight is None else self.weight.sum()
        self.prob = target.is_floating_point()
        if self.prob:
            strides, offset = layout_of(target.shape, target_layout)
            self.target, _ = guarded(target.shape, strides, target.dtype, math.nan, offset)
            self.target.copy_(target)
        else:
            self.target = target.contiguous()
        self.problem = Problem(
            logits=pointer(rows), storage=DTYPES[logits.dtype], strides=strides_of(rows),
            rows=rows.shape[0] * rows.shape[2], inner=rows.shape[2], classes=rows.shape[1],
            labels=None if self.prob else pointer(self.target),
            probabilities=pointer(self.target) if self.prob else None,
            probability_storage=DTYPES[target.dtype] if self.prob else 0,
            probability_strides=strides_of(rows_view(self.target)) if self.prob else Strides(),
            class_weight=pointer(self.weight), weight_sum=pointer(self.weight_sum),
            ignore_index=options.get("ignore_index", -100),
            label_smoothing=options.get("label_smoothing", 0.0), z_loss=options.get("z_loss", 0.0),
            softcap=options.get("softcap") or 0.0,
        )  # fmt: skip

    def output(self, shape, dtype):
        tensor, buffer = guarded(shape, contiguous_strides(shape), dtype, CANARY)
        self.outputs.append((tensor, buffer))
        return tensor

    def check_guards(self):
        for tensor, buffer in self.outputs:
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside[GUARD : GUARD + tensor.numel()] = True
            assert (buffer[~inside] == torch.tensor(CANARY, dtype=buffer.dtype)).all()
            assert not (tensor == torch.tensor(CANARY, dtype=tensor.dtype)).any(), "not written"

    def forward(self, seed=1):
        self.outputs = []
        self.kernels.set_seed(seed)
        reduction = self.options.get("reduction", "mean")
        row_loss = self.output(self.shape, torch.float32)
        lse = self.output(self.shape, torch.float32)
        row_weight = None if self.prob else self.output(self.shape, torch.float32)
        outputs = pointer(row_loss), pointer(lse), pointer(row_weight)
        run = self.kernels.forward(ctypes.byref(self.problem), *map(ctypes.c_void_p, outputs))
        assert run == 0
        loss, total = self.output((), torch.float32), self.output((), torch.float32)
        pointers = map(ctypes.c_void_p, (pointer(row_loss), pointer(row_weight)))
        run = self.kernels.reduce(
            *pointers, ctypes.c_int64(self.problem.rows), ctypes.c_bool(reduction == "mean"),
            ctypes.c_void_p(pointer(loss)), ctypes.c_void_p(pointer(total)),
        )  # fmt: skip
        assert run == 0
        self.check_guards()
        self.lse, self.total = lse, total
        return (row_loss if reduction == "none" else loss), lse, total

    def backward(self, grad_loss, grad_lse=None, seed=1):
        self.outputs = []
        self.kernels.set_seed(seed)
        grad_logits = self.output(self.logits.shape, self.logits.dtype)
        grad_target = self.output(self.target.shape, self.target.dtype) if self.prob else None
        reduction = self.options.get("reduction", "mean")
        gradient = Gradient(
            grad_loss=pointer(grad_loss), grad_per_row=reduction == "none",
            grad_lse=pointer(grad_lse), lse=pointer(self.lse),
            total_weight=pointer(self.total) if reduction == "mean" else None,
            grad_logits=pointer(grad_logits), grad_strides=strides_of(rows_view(grad_logits)),
            grad_probabilities=pointer(grad_target),
        )  # fmt: skip
        assert self.kernels.backward(ctypes.byref(self.problem), ctypes.byref(gradient)) == 0
        self.check_guards()
        return grad_logits, grad_target

    def loss_and_gradient(self, index, seed=1):
        """One launch, the gradient over the logits; row r of them is row index[r] of the rest."""
        self.outputs = []
        self.kernels.set_seed(seed)
        index = index.int()
        logits = self.logits.clone()[index.long()]
        pitch = -(-logits.shape[1] // 8) * 8
        in_place, buffer = guarded(logits.shape, (pitch, 1), logits.dtype, CANARY)
        in_place.copy_(logits)
        row_loss, row_lse = (self.output(self.shape, torch.float32) for _ in range(2))
        self.problem.logits, self.problem.strides = pointer(in_place), Strides(pitch, 1, 1)
        self.problem.row_index, self.problem.skip_ignored = pointer(index), True
        gradient = Gradient(
            grad_logits=pointer(in_place), grad_strides=self.problem.strides,
            row_loss=pointer(row_loss), row_lse=pointer(row_lse),
        )  # fmt: skip
        assert self.kernels.backward(ctypes.byref(self.problem), ctypes.byref(gradient)) == 0
        self.check_guards()
        between = buffer[GUARD:-GUARD].as_strided((len(index) - 1, pitch), (pitch, 1))
        outside = (buffer[:GUARD], buffer[-GUARD:], between[:, logits.shape[1] :])
        assert all((part == torch.tensor(CANARY, dtype=part.dtype)).all() for part in outside)
        return row_loss, row_lse, torch.empty_like(logits).index_copy_(0, index.long(), in_place)


def expected(logits, target, weight, options, grad_loss, grad_lse, dtype):
    logits = logits.to(dtype).detach().requires_grad_()
    prob = target.is_floating_point()
    target = target.to(dtype).detach().requires_grad_() if prob else target
    weight = None if weight is None else weight.to(dtype)
    loss, lse = reference.cross_entropy(logits, target, weight, **options, return_lse=True)
    total = (loss * grad_loss.to(loss.dtype)).sum()
    if grad_lse is not None:
        total = total + (lse * grad_lse.to(lse.dtype)).sum()
    leaves = [logits, target] if prob else [logits]
    gradients = torch.autograd.grad(total, leaves)
    return (loss.detach(), lse.detach(), *gradients)


def check(
    kernels, shape, dtype, layout="contiguous", prob=False, weighted=False, with_lse=False,
    target_layout="contiguous", target_dtype=None, scale=3.0, offset=0.0, **options,
):  # fmt: skip
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    logits = (torch.randn(shape, generator=generator) * scale + offset).to(dtype)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[0] if len(shape) == 1 else shape[1]
    if prob:
        target = torch.rand(shape, generator=generator).softmax(0 if len(shape) == 1 else 1)
        target = target.to(target_dtype or dtype)
    else:
        target = torch.randint(classes, rows, generator=generator)
        if target.numel() > 2:
            target.view(-1)[1] = options.get("ignore_index", -100)
    weight = (torch.rand(classes, generator=generator) + 0.5).to(dtype) if weighted else None
    reduction = options.setdefault("reduction", "mean")
    grad_loss = torch.randn(rows if reduction == "none" else (), generator=generator)
    grad_lse = torch.randn(rows, generator=generator) if with_lse else None
    run = Run(kernels, logits, target, weight, options, layout, target_layout)
    loss, lse, _ = run.forward()
    gradients = run.backward(grad_loss, grad_lse)
    arguments = (logits, target, weight, options, grad_loss, grad_lse)
    oracle = expected(*arguments, torch.float64)
    torchs = expected(*arguments, dtype)
    for what, ours, theirs, exact in zip(
        ("loss", "lse", "grad_logits", "grad_target"), (loss, lse, *gradients), torchs, oracle,
        strict=False,
    ):  # fmt: skip
        wanted = theirs.dtype if what != "grad_target" else ours.dtype
        assert_close_to_oracle(ours.to(wanted), theirs.to(wanted), exact, what=what)
    again = (*run.forward(seed=77), *run.backward(grad_loss, grad_lse, seed=78))
    for first, second in zip((loss, lse, run.total, *gradients), again, strict=True):
        if first is not None:
            assert torch.equal(first, second), "the order of the threads changed a bit"


LAYOUTS = ("contiguous", "offset", "padded", "classes_last")
# Warps, blocks of 256 and of 512 threads, and clusters per row; lanes per row; prime; one class.
SHAPES = [(5, 1), (1, 2), (9, 7), (11, 131), (3, 1031), (2, 5003), (1, 20011), (97,), (2, 5, 41),
          (3, 37, 3, 2)]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(kernels, shape, layout):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(kernels, shape, dtype, layout)


OPTIONS = {
    "none": dict(reduction="none"),
    "sum": dict(reduction="sum"),
    "ignore": dict(ignore_index=0),
    "weight": dict(weighted=True),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing_weight": dict(label_smoothing=0.3, weighted=True, reduction="sum"),
    "all_smoothing": dict(label_smoothing=1.0),
    "z_loss": dict(z_loss=1e-2, weighted=True),
    "softcap": dict(softcap=5.0),
    "lse": dict(with_lse=True, reduction="none"),
    "everything": dict(label_smoothing=0.2, weighted=True, z_loss=1e-2, softcap=4.0, with_lse=True,
                       ignore_index=3),
    "prob": dict(prob=True),
    "prob_sum_smoothing_weight": dict(prob=True, reduction="sum", label_smoothing=0.2,
                                      weighted=True),
    "prob_everything": dict(prob=True, reduction="none", label_smoothing=0.2, weighted=True,
                            z_loss=1e-2, softcap=4.0, with_lse=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(kernels, name):
    for shape in ((6, 259), (2, 2100), (2, 6, 35)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(kernels, shape, dtype, **OPTIONS[name])


# A warp, a block and a cluster per row; the last in more than one tile.
@pytest.mark.parametrize("classes", [5, 37, 300, 2100, 9001, 70003])
@pytest.mark.parametrize(
    "name", ["none", "weight", "smoothing_weight", "z_loss", "softcap", "everything", "prob",
             "prob_everything"],
)  # fmt: skip
def test_loss_and_gradient_in_one_launch(kernels, classes, name):
    options = {**OPTIONS[name], "reduction": "none", "ignore_index": -100}
    prob, weighted = options.pop("prob", False), options.pop("weighted", False)
    options.pop("with_lse", None)
    rows = 2 if classes > 9001 else 6
    if classes > 9001 and name not in ("none", "prob_everything"):
        pytest.skip("thousands of fibers")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(classes)
        logits = (3.0 * torch.randn(rows, classes, generator=generator)).to(dtype)
        target = torch.randint(classes, (rows,), generator=generator)
        target[1] = -100
        if prob:
            target = torch.rand(rows, classes, generator=generator).softmax(1).to(dtype)
        weight = (torch.rand(classes, generator=generator) + 0.5).to(dtype) if weighted else None
        index = torch.arange(rows) if prob else torch.randperm(rows, generator=generator)
        run = Run(kernels, logits, target, weight, options, "contiguous")
        results = run.loss_and_gradient(index)
        ones = torch.ones(rows)
        oracle = expected(logits, target, weight, options, ones, None, torch.float64)
        torchs = expected(logits, target, weight, options, ones, None, dtype)
        for what, ours, theirs, exact in zip(
            ("loss", "lse", "gradient"), results, torchs, oracle, strict=False
        ):
            if what == "lse" and not prob:
                assert ours[1] == 0
                ours, theirs, exact = (torch.cat([t[:1], t[2:]]) for t in (ours, theirs, exact))
            assert_close_to_oracle(ours.to(theirs.dtype), theirs, exact, what=what)


def test_packets_and_elements_of_probabilities(kernels):
    for layout in LAYOUTS:
        for target_layout in LAYOUTS:
            check(kernels, (4, 300), torch.bfloat16, layout, prob=True, target_layout=target_layout)
    for target_dtype in (torch.float32, torch.float64):
        check(kernels, (4, 300), torch.float32, prob=True, target_dtype=target_dtype)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset(kernels, offset):
    for options in ({}, dict(label_smoothing=0.1), dict(prob=True), dict(with_lse=True)):
        for shape in ((6, 259), (2, 2100), (2, 6, 35)):
            check(kernels, shape, torch.float32, offset=offset, scale=2.0, **options)


def special_run(kernels, logits, target, **options):
    run = Run(kernels, logits, target, None, {"reduction": "none", **options}, "contiguous")
    loss, lse, total = run.forward()
    return loss, lse, total, run


@pytest.mark.parametrize("shape", [(4, 40), (4, 2000), (4, 40, 33)], ids=str)
def test_invalid_labels_give_nan(kernels, shape):
    logits = torch.randn(shape)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    target[0], target[1], target[2] = shape[1], -1, -100
    loss, _, total, run = special_run(kernels, logits, target)
    assert loss[:2].isnan().all() and (loss[2] == 0).all() and loss[3].isfinite().all()
    assert total == target[3].numel()
    gradient, _ = run.backward(torch.ones_like(loss))
    assert gradient[:2].isnan().all() and (gradient[2] == 0).all() and gradient[3].isfinite().all()


def test_all_ignored(kernels):
    logits, target = torch.randn(4, 40), torch.full((4,), -100)
    run = Run(kernels, logits, target, None, {"label_smoothing": 0.1}, "contiguous")
    loss, _, total = run.forward()
    assert loss.isnan() and total == 0
    gradient, _ = run.backward(torch.ones(()))
    assert (gradient == 0).all()
    run = Run(kernels, logits, target, None, {"reduction": "sum"}, "contiguous")
    assert run.forward()[0] == 0


@pytest.mark.parametrize("classes", [40, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_and_nan_logits(kernels, classes, dtype):
    logits = torch.randn(6, classes).to(dtype)
    target = torch.tensor([3, 3, 3, 3, 3, 5])
    logits[0, 10:] = -math.inf
    logits[1, :20] = -math.inf
    logits[2, :] = -math.inf
    logits[3, 7] = math.inf
    logits[4, classes - 1] = math.nan
    for options in ({}, {"label_smoothing": 0.1}, {"softcap": 5.0}):
        loss, lse, _, run = special_run(kernels, logits, target, **options)
        grad_loss = torch.ones(6)
        gradient, _ = run.backward(grad_loss)
        options = {"reduction": "none", **options}
        oracle = expected(logits, target, None, options, grad_loss, None, torch.float64)
        torchs = expected(logits, target, None, options, grad_loss, None, dtype)
        assert_close_to_oracle(loss.to(dtype), torchs[0], oracle[0], what="loss")
        assert_close_to_oracle(lse, torchs[1].float(), oracle[1], what="lse")
        # The gradients of the reference's softcap and of its lse differ at infinities.
        if not options.get("softcap"):
            rows = [1, 2, 3, 4, 5]
            assert_close_to_oracle(
                gradient[rows], torchs[2][rows], oracle[2][rows], what="gradient"
            )
        assert gradient[0, 3:4].isfinite().all() and (gradient[5].isfinite()).all()


def test_many_rows_are_reduced_in_two_steps(kernels):
    rows = 20000
    row_loss, row_weight = torch.rand(rows), torch.rand(rows)
    loss, total = torch.zeros(()), torch.zeros(())
    outputs = [ctypes.c_void_p(t.data_ptr()) for t in (row_loss, row_weight, loss, total)]
    size = ctypes.c_int64(rows)
    assert kernels.reduce(*outputs[:2], size, ctypes.c_bool(True), *outputs[2:]) == 0
    wanted = row_loss.double().sum() / row_weight.double().sum()
    assert abs(loss.item() - wanted.item()) <= 1e-6 * wanted.item()
    assert abs(total.item() - row_weight.double().sum().item()) <= 1e-6 * rows
    assert kernels.reduce(outputs[0], None, size, ctypes.c_bool(True), *outputs[2:]) == 0
    assert total == rows


def test_no_rows(kernels):
    loss, total = torch.ones(()), torch.ones(())
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (loss, total)]
    for mean in (False, True):
        run = kernels.reduce(None, None, ctypes.c_int64(0), ctypes.c_bool(mean), *pointers)
        assert run == 0 and total == 0
        assert loss.isnan() if mean else loss == 0


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (1, 2**26)], ids=["rows", "classes"])
def test_offsets_past_two_to_the_31(kernels, strides):
    """Anonymous memory costs only the pages that are touched."""
    shape = (2, 50)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    assert reach > 2**31
    buffer = torch.frombuffer(mmap.mmap(-1, 2 * reach), dtype=torch.bfloat16)
    logits = buffer.as_strided(shape, strides)
    logits.copy_(torch.randn(shape))
    target = torch.tensor([49, 7])
    run = Run(kernels, logits.contiguous(), target, None, {}, "contiguous")
    run.problem.logits, run.problem.strides = logits.data_ptr(), Strides(*strides, 1)
    loss, _, _ = run.forward()
    gradient, _ = run.backward(torch.ones(()))
    arguments = (logits.contiguous(), target, None, {}, torch.ones(()), None)
    oracle, torchs = expected(*arguments, torch.float64), expected(*arguments, torch.bfloat16)
    assert_close_to_oracle(loss.to(torch.bfloat16), torchs[0], oracle[0], what="loss")
    assert_close_to_oracle(gradient, torchs[2], oracle[2], what="gradient")


# What linear cross-entropy has beside it


def call(function, *arguments):
    kinds = {int: ctypes.c_int64, bool: ctypes.c_bool, type(None): lambda _: None}
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else kinds[type(a)](a)
        for a in arguments
    ]
    assert function(*converted) == 0


@pytest.mark.parametrize("rows", [0, 1, 31, 1024, 2500])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_rows_are_compacted(linear_kernels, rows, ignored):
    target = torch.randint(0, 9, (rows,))
    target[torch.rand(rows) < ignored] = -100
    target[1::50] = 9  # out of range: kept, and without weight
    weight = torch.rand(9)
    place, kept = torch.full((rows,), -1, dtype=torch.int32), torch.full((1,), -1).int()
    row_weight = torch.full((rows,), CANARY)
    call(linear_kernels.compact, target, rows, 9, -100, weight, place, kept, row_weight)
    keeps = target != -100
    assert kept == keeps.sum()
    assert torch.equal(place[:kept].long(), keeps.nonzero()[:, 0])
    assert torch.equal(place[kept:].long().sort()[0], (~keeps).nonzero()[:, 0])
    counted = keeps & (target < 9)
    assert torch.equal(row_weight, torch.where(counted, weight[target.clamp(0, 8)], 0.0))


@pytest.mark.parametrize("features", [1, 7, 16, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_moved(linear_kernels, features, dtype):
    rows, first, count = 9, 2, 5
    kept = torch.tensor([5], dtype=torch.int32)
    place = torch.randperm(rows).int()
    whole, _ = guarded((rows, features), (features + 8, 1), dtype, math.nan)
    whole.copy_(torch.randn(rows, features))
    chunk, buffer = guarded((count, features), (features, 1), dtype, CANARY)
    e = dtype.itemsize
    sizes = (features * e, e, place[first:], kept, first, count)
    call(linear_kernels.move, whole, (features + 8) * e, chunk, features * e, *sizes, False)
    wanted = whole[place[first : first + count].long()]
    wanted[3:] = 0  # places 5 and 6 have ignored rows
    assert torch.equal(chunk, wanted)
    assert (buffer[:GUARD] == torch.tensor(CANARY, dtype=dtype)).all()
    back = torch.full((rows, features), CANARY, dtype=dtype)
    call(linear_kernels.move, chunk, features * e, back, features * e, *sizes, True)
    assert torch.equal(back[place[first : first + count].long()], wanted)
    rest = torch.cat([place[:first], place[first + count :]]).long()
    assert (back[rest] == torch.tensor(CANARY, dtype=dtype)).all()


def test_gemm_scalars(linear_kernels):
    out, total = torch.zeros(3), torch.tensor([4.0])
    for weight, kept, wanted in ((total, 3, 0.25), (None, 3, 1.0), (total * 0, 0, 0.0)):
        kept = torch.tensor([kept], dtype=torch.int32)
        call(linear_kernels.scalars, weight, kept, out)
        assert out.tolist() == [wanted, 0.0, 1.0]
    call(linear_kernels.scalars, total, None, out)
    assert out[0] == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale(linear_kernels, dtype):
    for count in (0, 1, 5, 4099, 600_001):
        data, buffer = guarded((max(count, 1),), (1,), dtype, CANARY, offset=3)
        data.copy_(torch.randn(max(count, 1)))
        for factor in (1.0, 0.3):
            scale = torch.tensor(factor)
            wanted = data * scale if count else data.clone()
            call(linear_kernels.scale, data, DTYPES[dtype], count, scale)
            assert torch.equal(data, wanted)
        assert (buffer[: GUARD + 3] == torch.tensor(CANARY, dtype=dtype)).all()
        assert (buffer[GUARD + 3 + max(count, 1) :] == torch.tensor(CANARY, dtype=dtype)).all()
