"""linear_cross_entropy's products on the host (tests/cuda_on_host): rows whose number only the
device knows, and logits that leave statistics instead of being stored."""

import ctypes
import math

import pytest
import torch
from conftest import assert_close_to_oracle, host_library
from test_cuda_linear_act_on_host import (
    NN,
    NT,
    TN,
    Epilogue,
    Outputs,
    Problem,
    Statistics,
    matrix,
    placed,
    pointer,
    random,
)
from test_cuda_on_host import CANARY, DTYPES, RowCount, Strides
from test_cuda_on_host import Problem as LossProblem

from fastnn import reference

GEMMS = ("gemm_portable", "gemm_sm90")
TILES = {"gemm_portable": 128, "gemm_sm90": 256}  # rows and columns
ROW_STEP = 64


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    return host_library(folder, "linear_act", "linear_act_sm90", "linear_cross_entropy")


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def run(kernels, gemm, problem, seed=1):
    kernels.set_seed(seed)
    assert getattr(kernels, gemm)(ctypes.byref(problem)) == 0


def up_to(count, step, rows):
    return min(rows, -(-count // step) * step)


# rows of the chunk, the kept rows of all chunks, the chunk's first row
COUNTS = [(520, 1000, 0), (520, 650, 520), (520, 300, 100), (520, 100, 100), (520, 7, 100)]


@pytest.mark.parametrize("layout", [NT, NN], ids=["NT", "NN"])
@pytest.mark.parametrize("gemm", GEMMS)
def test_products_leave_out_rows(kernels, gemm, layout):
    """Whole tiles beyond the last row are neither read nor written."""
    k, n = 72, 264
    for rows, total, first in COUNTS:
        there = max(0, min(rows, total - first))
        reach = up_to(there, TILES[gemm], rows)
        a = random((rows, k), torch.bfloat16, 1)
        a[reach:] = math.nan
        b = placed(random((n, k) if layout == NT else (k, n), torch.bfloat16, 2))
        a, factor, counted = placed(a), torch.tensor(0.375), integers(total)
        outputs = Outputs()
        out = outputs.make((rows, n), torch.bfloat16)
        epilogue = Epilogue(out=pointer(out), out_stride=n, width=n, factor=pointer(factor))
        run(kernels, gemm, Problem(
            matrix(a), matrix(b), layout, DTYPES[a.dtype], rows, n, k, False, epilogue,
            RowCount(pointer(counted), first),
        ))  # fmt: skip
        if reach < rows:
            assert (out[reach:] == CANARY).all()
        else:
            outputs.check()
        right = b.t() if layout == NT else b
        assert_close_to_oracle(
            out[:there], (a[:there] @ right) * factor.bfloat16(),
            a[:there].double() @ right.double() * 0.375,
        )  # fmt: skip


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gemm", GEMMS)
def test_sums_over_rows_leave_rows_out(kernels, gemm, dtype, adds):
    """grad_weight: rows beyond the last step of the sum are not read."""
    if adds and dtype != torch.float32:
        pytest.skip("sums over chunks are in float")
    m, n = 264, 136
    for rows, total, first in COUNTS:
        there = max(0, min(rows, total - first))
        reach = up_to(max(there, 1), ROW_STEP, rows)
        a, b = random((rows, m), torch.bfloat16, 1), random((rows, n), torch.bfloat16, 2)
        for tensor in (a, b):
            tensor[there:reach] = 0.0
            tensor[reach:] = math.nan
        a, b, factor, counted = placed(a), placed(b), torch.tensor(0.375), integers(total)
        before = random((m, n), dtype, 3) if adds else torch.zeros(m, n, dtype=dtype)
        outputs = Outputs()
        out = outputs.make((m, n), dtype)
        if adds:
            out.copy_(before)
        epilogue = Epilogue(
            out=pointer(out), out_stride=n, width=n, factor=pointer(factor), residual_stride=n,
            residual=pointer(out) if adds else None, float_out=dtype == torch.float32,
        )  # fmt: skip
        run(kernels, gemm, Problem(
            matrix(a), matrix(b), TN, DTYPES[a.dtype], m, n, rows, False, epilogue,
            RowCount(pointer(counted), first),
        ))  # fmt: skip
        outputs.check()
        left, right = a[:there].t(), b[:there]
        torchs = before + (left.to(dtype) @ right.to(dtype)) * 0.375
        exact = before.double() + left.double() @ right.double() * 0.375
        assert_close_to_oracle(out, torchs.to(dtype), exact)


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "weight": True, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 4.0},
}


class Evaluation:
    """Chunks of rows, compacted, whose logits only leave statistics; `step` rows a chunk."""

    def __init__(self, kernels, gemm, x, w, target, bias, weight, step, seed=1, **options):
        rows, classes = len(target), len(w)
        order = (target == -100).sort(stable=True).indices.int()  # kept rows first
        kept = integers((target != -100).sum())
        weight = None if weight is None else weight.float()
        smoothing = options.get("label_smoothing", 0.0)
        softcap = options.get("softcap", 0.0)
        outputs = Outputs()
        self.loss, self.lse = (outputs.make((rows,), torch.float32) for _ in range(2))
        w = placed(w)
        for first in range(0, rows, step):
            places = order[first : first + step].contiguous()
            count = len(places)
            there = max(0, min(count, kept.item() - first))
            part = x[places.long()].contiguous()
            part[there:] = 0.0
            part = placed(part)
            tiles = -(-classes // TILES[gemm])
            sums = torch.full((tiles, count, 4 if smoothing else 2), math.nan)
            label_logit = torch.full((count,), math.nan)
            statistics = Statistics(
                pointer(sums), pointer(label_logit), pointer(target), pointer(places),
                pointer(weight), softcap, smoothing > 0.0,
            )  # fmt: skip
            epilogue = Epilogue(width=classes, bias=pointer(bias), statistics=statistics)
            run(kernels, gemm, Problem(
                matrix(part), matrix(w), NT, DTYPES[x.dtype], count, classes, x.shape[1], False,
                epilogue, RowCount(pointer(kept), first),
            ), seed)  # fmt: skip
            problem = LossProblem(
                storage=DTYPES[x.dtype], strides=Strides(0, 0, 0), rows=count, inner=1,
                classes=classes, labels=pointer(target), class_weight=pointer(weight),
                ignore_index=-100, label_smoothing=smoothing, softcap=softcap,
                z_loss=options.get("z_loss", 0.0), row_index=pointer(places), skip_ignored=True,
            )  # fmt: skip
            merged = kernels.merge_statistics(
                ctypes.byref(problem), ctypes.byref(statistics), ctypes.c_int64(tiles),
                ctypes.c_void_p(pointer(self.loss)), ctypes.c_void_p(pointer(self.lse)),
            )  # fmt: skip
            assert merged == 0
        outputs.check()


def make(shape, dtype, option):
    rows, features, classes = shape
    options = dict(OPTIONS[option])
    x = random((rows, features), dtype, 1, 2.0 * features**-0.25)
    w = random((classes, features), dtype, 2, features**-0.25)
    bias = random((classes,), dtype, 3) if options.pop("bias", False) else None
    weight = random((classes,), dtype, 4).abs() + 0.1 if options.pop("weight", False) else None
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.4] = -100
    return x, w, target, bias, weight, options


def check(kernels, gemm, shape, dtype, option, step):
    x, w, target, bias, weight, options = make(shape, dtype, option)
    ours = Evaluation(kernels, gemm, x, w, target, bias, weight, step, **options)
    again = Evaluation(kernels, gemm, x, w, target, bias, weight, step, seed=7, **options)
    assert torch.equal(ours.loss, again.loss) and torch.equal(ours.lse, again.lse)

    def expected(dtype):
        tensors = [None if t is None else t.to(dtype) for t in (x, w, bias, weight)]
        return reference.linear_cross_entropy(
            *tensors[:2], target, linear_bias=tensors[2], weight=tensors[3], reduction="none",
            return_lse=True, **options,
        )  # fmt: skip

    kept = target != -100
    assert not ours.loss[~kept].any() and not ours.lse[~kept].any()
    (torchs, torchs_lse), (exact, exact_lse) = expected(dtype), expected(torch.float64)
    assert_close_to_oracle(ours.loss[kept], torchs[kept].float(), exact[kept])
    assert_close_to_oracle(ours.lse[kept], torchs_lse[kept].float(), exact_lse[kept])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_statistics_of_the_portable_product(kernels, option, dtype):
    check(kernels, "gemm_portable", (90, 40, 301), dtype, option, 64)
    check(kernels, "gemm_portable", (150, 24, 136), dtype, option, 150)


@pytest.mark.parametrize("option", OPTIONS)
def test_statistics_of_the_sm90_product(kernels, option):
    """Several tiles a block, a ragged last tile, rows of two blocks."""
    check(kernels, "gemm_sm90", (330, 72, 776), torch.bfloat16, option, 192)
    check(kernels, "gemm_sm90", (140, 8, 264), torch.float16, option, 140)
    check(kernels, "gemm_sm90", (70, 16, 523), torch.bfloat16, option, 70)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("classes", [520, 517])
def test_the_numbers_of_stored_logits(kernels, gemm, classes):
    """Statistics are of the rounded logits: a backward that stores them finds the same sums."""
    x, w, target, bias, *_ = make((64, 40, classes), torch.bfloat16, "bias")
    target[:] = 3
    bias = placed(bias[None])[0]
    ours = Evaluation(kernels, gemm, x, w, target, bias, None, 64)
    buffer = torch.full((64, 520), CANARY, dtype=torch.bfloat16)
    logits = buffer[:, :classes]
    epilogue = Epilogue(out=pointer(logits), out_stride=520, width=classes, bias=pointer(bias))
    run(kernels, gemm, Problem(
        matrix(x), matrix(w), NT, DTYPES[x.dtype], 64, classes, 40, False, epilogue
    ))  # fmt: skip
    assert (buffer[:, classes:] == CANARY).all() and not (logits == CANARY).any()
    exact = torch.logsumexp(logits.double(), 1)
    assert (ours.lse - exact).abs().max() < 2e-6 * exact.abs().max()
    assert (ours.loss - (exact - logits[:, 3].double())).abs().max() < 4e-6 * exact.abs().max()


@pytest.mark.parametrize("gemm", GEMMS)
def test_labels_and_logits_out_of_range(kernels, gemm):
    x, w, target, *_ = make((70, 24, 264), torch.bfloat16, "plain")
    target[:] = 5
    target[3], target[5] = 264, -1
    x[7] = math.nan
    loss = Evaluation(kernels, gemm, x, w, target, None, None, 70).loss
    assert loss.isnan().nonzero()[:, 0].tolist() == [3, 5, 7]
    target[:] = -100
    result = Evaluation(kernels, gemm, x, w, target, None, None, 70)
    assert not result.loss.any() and not result.lse.any()
