"""The CUDA attention kernels, run on the host thread by thread (tests/cuda_on_host), on the cases
of the Triton kernels and more. NaN around every input and a canary around every output show access
outside of the tensors; asynchronous copies are done as late as they may be.
"""

import ctypes
import functools
import math

import pytest
import torch
from conftest import host_library
from test_cuda_on_host import CANARY, DTYPES, guarded
from test_triton_attention import (
    BF16,
    CASES,
    FP16,
    FP32,
    SEED,
    Case,
    assert_as_good_as_torch,
)

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Operand(ctypes.Structure):
    _fields_ = [("data", POINTER), *((name, INT64) for name in ("batch", "head", "row"))]


class Mask(ctypes.Structure):
    _fields_ = [
        ("data", POINTER), ("boolean", ctypes.c_bool), ("storage", ctypes.c_int),
        *((name, INT64) for name in ("batch", "head", "row", "col")),
    ]  # fmt: skip


# Of packed sequences: test_cuda_varlen_attention_on_host.py.
PACKING = [
    ("query_starts", POINTER), ("key_starts", POINTER), ("query_rows", INT64), ("key_rows", INT64),
    ("each_bottom_right", ctypes.c_bool),
]  # fmt: skip


class Problem(ctypes.Structure):
    _fields_ = [
        ("storage", ctypes.c_int),
        *((name, INT64) for name in (
            "batches", "heads", "kv_heads", "queries", "keys", "dim", "value_dim")),
        *((name, Operand) for name in ("query", "key", "value")),
        ("scale", FLOAT), ("softcap", FLOAT),
        *((name, INT64) for name in ("shift", "left", "right")), ("mask", Mask),
        *((name, POINTER) for name in ("slopes", "sinks", "seed")),
        ("threshold", ctypes.c_uint32), ("keep_scale", FLOAT), *PACKING,
    ]  # fmt: skip


class Forward(Problem):
    _fields_ = [("out", POINTER), ("lse", POINTER), ("splits", INT64), ("partial", POINTER)]


class Backward(Problem):
    _fields_ = [
        ("grad_out", Operand), ("out", Operand),
        *((name, POINTER) for name in (
            "saved_lse", "grad_lse", "rows", "grad_query", "grad_key", "grad_value", "grad_sinks")),
        ("mask_sizes", INT64 * 4), ("grad_mask", POINTER), ("mask_partial", POINTER),
        ("mask_parts", INT64), ("sink_rows", POINTER),
    ]  # fmt: skip


@functools.cache
def attention_library(folder):
    library = host_library(folder, "attention", "attention_backward", "attention_rows")
    for name in ("splits", "split_scratch", "mask_parts"):
        getattr(library, name).restype = INT64
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return attention_library(tmp_path_factory.getbasetemp())


def amid_nan(tensor):
    """The same values in the same layout amid NaN (True, for a bool mask)."""
    fill = True if tensor.dtype is torch.bool else math.nan
    offset = tensor.storage_offset() % 8
    return guarded(tensor.shape, tensor.stride(), tensor.dtype, fill, offset)[0].copy_(tensor)


def unit_columns(tensor):
    return tensor if tensor.stride(3) == 1 or tensor.size(3) <= 1 else tensor.contiguous()


def operand(tensor):
    return Operand(tensor.data_ptr(), *tensor.stride()[:3])


class HostCase(Case):
    """A call of the kernels on the host."""

    def __init__(self, kernels, *args, splits=None, **options):
        super().__init__(*args, **options)
        self.host, self.splits, self.outputs = kernels, splits, []
        kernels.set_seed(7)

    def output(self, *shape, dtype=None):
        tensor, buffer = guarded(
            shape, torch.empty(shape).stride(), dtype or self.query.dtype, CANARY
        )
        self.outputs.append((tensor, buffer))
        return tensor

    def check_outputs(self):
        for tensor, buffer in self.outputs:
            canary = torch.tensor(CANARY, dtype=buffer.dtype)
            assert int((buffer == canary).sum()) == buffer.numel() - tensor.numel()
        self.outputs.clear()

    def problem(self, kind):
        """`kind` with the arguments of both directions; the tensors it points to."""
        query, key, value = (amid_nan(unit_columns(t)) for t in (self.query, self.key, self.value))
        batch, heads, queries, dim = query.shape
        kept = [query, key, value, self.seed]
        bottom_right, left, right = self.band
        mask = Mask()
        if self.mask is not None:
            tensor = amid_nan(self.mask)
            kept.append(tensor)
            shape, strides = (list(x) for x in (tensor.shape, tensor.stride()))
            strides = [0] * (4 - len(shape)) + [
                0 if n == 1 else s for n, s in zip(shape, strides, strict=True)
            ]
            boolean = tensor.dtype is torch.bool
            storage = 0 if boolean else DTYPES[tensor.dtype]
            mask = Mask(tensor.data_ptr(), boolean, storage, *strides)
        per_head = []
        for values in (self.alibi, self.sinks):
            if values is not None:
                values = amid_nan(values.float().expand(batch, heads).contiguous())
            kept.append(values)
            per_head.append(None if values is None else values.data_ptr())
        threshold = math.floor(self.dropout_p * 65536 + 0.5)
        keep_scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
        problem = kind(
            DTYPES[query.dtype], batch, heads, key.shape[1], queries, key.shape[2], dim,
            value.shape[3], operand(query), operand(key), operand(value), self.scale, self.softcap,
            key.shape[2] - queries if bottom_right else 0, left, right, mask, *per_head,
            self.seed.data_ptr() if self.dropout_p else None, threshold, keep_scale,
        )  # fmt: skip
        return problem, kept

    def forward(self):
        problem, kept = self.problem(Forward)
        rows = self.query.shape[:3]
        out = self.output(*rows, self.value.shape[3])
        lse = self.output(*rows, dtype=torch.float32)
        reference = ctypes.byref(problem)
        problem.out, problem.lse = out.data_ptr(), lse.data_ptr()
        problem.splits = self.splits or self.host.splits(reference, 4)
        partial = self.output(
            self.host.split_scratch(reference, INT64(problem.splits)), dtype=torch.float32
        )
        problem.partial = partial.data_ptr() if problem.splits > 1 else None
        assert self.host.forward_portable(reference) == 0
        self.check_outputs()
        return out, lse

    def backward(self, out, lse, output_mask=None):
        problem, kept = self.problem(Backward)
        wanted = output_mask or self.output_mask
        upstream, saved, lse = amid_nan(unit_columns(self.grad_out)), amid_nan(out), amid_nan(lse)
        grad_lse = None if self.grad_lse is None else amid_nan(self.grad_lse.contiguous())
        problem.grad_out, problem.out = operand(upstream), operand(saved)
        problem.saved_lse = lse.data_ptr()
        problem.grad_lse = None if grad_lse is None else grad_lse.data_ptr()
        problem.rows = self.output(2, *lse.shape, dtype=torch.float32).data_ptr()
        gradients = [torch.empty(0)] * 5
        names = ("grad_query", "grad_key", "grad_value", "grad_mask", "grad_sinks")
        likes = (self.query, self.key, self.value, self.mask, lse[..., 0])
        for index, (name, like) in enumerate(zip(names, likes, strict=True)):
            if wanted[index]:
                dtype = self.query.dtype if index < 3 else torch.float32
                gradients[index] = self.output(*like.shape, dtype=dtype)
                setattr(problem, name, gradients[index].data_ptr())
        reference = ctypes.byref(problem)
        assert self.host.rows(reference) == 0
        assert self.host.backward_portable(reference) == 0
        if wanted[3]:
            sizes = [1] * (4 - self.mask.dim()) + list(self.mask.shape)
            problem.mask_sizes = (INT64 * 4)(*sizes)
            problem.mask_parts = self.host.mask_parts(reference)
            if problem.mask_parts > 1:
                scratch = self.output(problem.mask_parts, self.mask.numel(), dtype=torch.float32)
                problem.mask_partial = scratch.data_ptr()
            assert self.host.mask_gradient(reference) == 0
            gradients[3] = gradients[3].to(self.mask.dtype)
        if wanted[4]:
            problem.sink_rows = self.output(*lse.shape, dtype=torch.float32).data_ptr()
            assert self.host.sinks_gradient(reference) == 0
            gradients[4] = gradients[4].sum_to_size(self.sinks.shape).to(self.sinks.dtype)
        self.check_outputs()
        return gradients


def check(case):
    dtype = case.query.dtype
    assert_as_good_as_torch(case.kernels(), case.composed(dtype), case.composed(torch.float64))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_error_is_at_most_twice_torchs(kernels, name, dtype):
    options = CASES[name]
    if dtype is not FP32 and "dtype" in options:
        pytest.skip("of a dtype of its own")
    check(HostCase(kernels, **{"dtype": dtype, **options}))


# More than a tile of rows and of keys, in the kernels that serve the band alone, of every width.
@pytest.mark.parametrize("dim", [64, 72, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_widths(kernels, dtype, dim):
    shape = dict(dim=dim, heads=2, heads_k=1, dtype=dtype, layout="bshd")
    check(HostCase(kernels, 140, 150, value_dim=dim - 8, right=0, **shape))
    check(HostCase(kernels, 70, 90, softcap=3.0, dropout_p=0.2, mask=(70, 90), **shape))


@pytest.mark.parametrize("option", ["plain", "sinks", "everything"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_keys_are_split(kernels, dtype, option):
    options = {
        "plain": {},
        "sinks": dict(sinks=True, left=100, right=0, bottom_right=True),
        "everything": dict(sinks=True, mask=(2, 6, 3, 333), softcap=3.0, dropout_p=0.2, alibi=True),
    }[option]
    for splits in (2, 5, 9):  # the last with parts that have no key
        check(HostCase(kernels, 3, 333, batch=2, heads=6, heads_k=2, dim=40, dtype=dtype,
                       splits=splits, **options))  # fmt: skip


def test_a_few_rows_split_the_keys(kernels):
    case = HostCase(kernels, 1, 4096, heads=8, heads_k=2, dim=128, dtype=BF16)
    problem, _ = case.problem(Forward)
    reference = ctypes.byref(problem)
    assert kernels.splits(reference, 1) == 1
    assert kernels.splits(reference, 132) == 16  # of 256 keys
    assert kernels.splits(reference, 4) == 4
    problem.queries = 65
    assert kernels.splits(reference, 132) == 1


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_hidden_keys_reach_no_row_that_does_not_see_them(kernels, dtype, poison):
    """Row by row: a tile has rows that see a key and rows that do not."""
    mask = torch.ones(90, 90, dtype=torch.bool)
    mask[:50, 60:] = False
    for options in (dict(right=0), dict(mask=mask)):
        case = HostCase(kernels, 90, 90, dtype=dtype, grad_lse=False, **options)
        clean = case.forward()[0]
        case.value = case.value.clone()
        case.value[:, :, 70, 3] = poison
        got, _ = case.forward()
        hidden = 70 if "right" in options else 50
        assert torch.equal(got[:, :, :hidden], clean[:, :, :hidden])
        assert not torch.isfinite(got[:, :, max(hidden, 70) :, 3]).any()
        assert torch.isfinite(got[..., 4:]).all()


def assert_spoiled(got, clean, where):
    """Nothing is finite where it says, and the rest is what it was."""
    where = where.expand(got.shape)
    assert not torch.isfinite(got[where]).any() and torch.equal(got[~where], clean[~where])


# Of the query, the key, the value or dO, the column that is spoiled: one row of it.
POISON = {"query": 5, "key": 5, "value": 3, "grad_out": 3}


def check_poisoned(what, at, seen, clean, got):
    """out, lse, dQ, dK, dV, where POISON is in row `at`: it reaches what sees it."""
    rows = seen[:, at] if what in ("value", "key") else torch.arange(len(seen)) == at
    keys = seen[rows].any(0)  # what these rows see
    assert rows.any() and not rows.all() and keys.any() and not keys.all()
    rows, keys = rows[:, None], keys[:, None]
    nothing = torch.zeros(1, dtype=torch.bool)
    only = torch.arange(got[0].shape[-1]) == POISON[what]
    wrong_scores = what in ("query", "key")
    assert_spoiled(got[0], clean[0], rows & (only if what == "value" else nothing | wrong_scores))
    assert_spoiled(got[1], clean[1], rows[:, 0] & wrong_scores)
    assert_spoiled(got[2], clean[2], rows)
    assert_spoiled(got[3], clean[3], keys)
    column = {"value": nothing, "grad_out": only}.get(what, ~nothing)
    assert_spoiled(got[4], clean[4], keys & column)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("what", POISON)
def test_what_is_hidden_from_a_row_does_not_reach_it(kernels, what, dtype):
    mask = torch.zeros(90, 120, dtype=torch.bool)
    mask[30:80, 40:90] = True
    mask[5, 7] = mask[:, 100:] = True
    mask[45] = mask[:, 65] = False
    mask[45, 60:70] = mask[40:50, 65] = True
    band = (torch.arange(120) <= torch.arange(90)[:, None] + 9) & (
        torch.arange(120) >= torch.arange(90)[:, None] - 20
    )
    for seen, options in ((mask, dict(mask=mask)), (band, dict(left=20, right=9))):
        case = HostCase(kernels, 90, 120, dtype=dtype, grad_lse=False, **options)
        wanted = [True, True, True, False, False]
        results = case.forward()
        clean = [*results, *case.backward(*results, wanted)[:3]]
        at = 45 if what in ("query", "grad_out") else 65
        tensor = getattr(case, what).clone()
        tensor[:, :, at, POISON[what]] = math.nan
        setattr(case, what, tensor)
        results = case.forward()
        got = [*results, *case.backward(*results, wanted)[:3]]
        check_poisoned(what, at, seen, clean, got)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_hidden_queries_and_keys_reach_no_gradient(kernels, dtype):
    case = HostCase(kernels, 70, 90, dtype=dtype, right=0, grad_lse=False)
    clean = case.backward(*case.forward(), [True, True, True, False, False])
    case.key, case.value = case.key.clone(), case.value.clone()
    case.key[:, :, 70:] = math.nan
    case.value[:, :, 70:] = math.nan
    out, lse = case.forward()
    got = case.backward(out, lse, [True, True, True, False, False])
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True) if a.numel())


def test_results_do_not_depend_on_the_order_of_threads(kernels):
    case = HostCase(kernels, dropout_p=0.2, mask=(1, 2, 37, 45), heads=2, heads_k=1, dtype=BF16)
    first = case.kernels()
    kernels.set_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, case.kernels(), strict=True))


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_wanted_gradient_is_made(kernels, wanted):
    case = HostCase(kernels, mask=(37, 45), sinks=True, dim=200)
    out, lse = case.forward()
    everything = case.backward(out, lse)
    gradients = case.backward(out, lse, [index == wanted for index in range(5)])
    assert torch.equal(gradients[wanted], everything[wanted])
    assert all(g.shape == (0,) for i, g in enumerate(gradients) if i != wanted)


def test_no_keys(kernels):
    out, lse = HostCase(kernels, 37, 0).forward()
    assert not out.any() and (lse == -math.inf).all()


def test_dropout_is_the_generators_mask(kernels):
    """Values that are the identity show every bit, in every layout of the rows."""
    case = HostCase(kernels, 40, 64, dim=64, dropout_p=0.3, heads=4, heads_k=2, grad_lse=False)
    case.query = torch.zeros_like(case.query)
    case.value = torch.eye(64).expand(1, 2, 64, 64).contiguous()
    out, lse = case.forward()
    assert torch.equal(out != 0, case.keep != 0) and case.seed.tolist() == list(SEED)
    case.grad_out = torch.eye(64)[:40].expand(1, 4, 40, 64).contiguous()
    grad_value = case.backward(out, lse)[2]
    kept = (case.keep != 0).view(1, 2, 2, 40, 64).sum(2).transpose(2, 3)
    torch.testing.assert_close(
        grad_value[..., :40] * 64 * (1 - 0.3), kept.float(), rtol=1e-4, atol=1e-6
    )
