"""Hopper's attention kernels, run on the host thread by thread (tests/cuda_on_host).

The tensor cores' fragments, descriptors and swizzles, the copy engine's boxes and the barriers are
emulated as the PTX manual defines them; asynchronous work is done as late as it may be. NaN around
every input and a canary around every output show an access outside of the tensors.
"""

import ctypes
import math

import pytest
import torch
from conftest import assert_close_to_oracle, host_library
from test_cuda_attention_on_host import PACKING, POISON, check_poisoned
from test_cuda_on_host import CANARY, DTYPES, GUARD, guarded

from fastnn import reference

HALVES = (torch.bfloat16, torch.float16)


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
    ]


class Mask(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("boolean", ctypes.c_bool), ("storage", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "col")),
    ]  # fmt: skip


class Problem(ctypes.Structure):
    _fields_ = [
        ("storage", ctypes.c_int),
        *(
            (name, ctypes.c_int64)
            for name in ("b", "heads", "kv_heads", "queries", "keys", "dim", "value_dim")
        ),
        *((name, Operand) for name in ("query", "key", "value")),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("shift", "left", "right")),
        ("mask", Mask), ("slopes", ctypes.c_void_p), ("sinks", ctypes.c_void_p),
        ("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("keep_scale", ctypes.c_float),
        *PACKING,
    ]  # fmt: skip


class Forward(Problem):
    _fields_ = [
        ("out", ctypes.c_void_p), ("lse", ctypes.c_void_p), ("splits", ctypes.c_int64),
        ("partial", ctypes.c_void_p),
    ]  # fmt: skip


class Backward(Problem):
    _fields_ = [
        ("grad_out", Operand), ("output", Operand),
        *((name, ctypes.c_void_p) for name in ("lse", "grad_lse", "rows")),
        *((name, ctypes.c_void_p) for name in ("grad_query", "grad_key", "grad_value")),
        ("grad_sinks", ctypes.c_void_p), ("mask_sizes", ctypes.c_int64 * 4),
        ("grad_mask", ctypes.c_void_p), ("mask_partial", ctypes.c_void_p),
        ("mask_parts", ctypes.c_int64),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = host_library(
        tmp_path_factory.mktemp("cuda_on_host"), "attention_sm90", "attention_backward_sm90"
    )
    library.forward_serves.restype = library.backward_serves.restype = ctypes.c_bool
    return library


def placed(values, permuted):
    """A copy amid NaN, as (B, H, S, D) or as (B, S, H, D) in memory, in rows of whole packets."""
    b, h, s, d = values.shape
    width = -(-d // 8) * 8 + (8 if permuted else 0)
    strides = (s * h * width, width, h * width, 1) if permuted else (h * s * d, s * d, d, 1)
    tensor, _ = guarded(values.shape, strides, values.dtype, math.nan)
    return tensor.copy_(values)


def output(shape, dtype):
    return guarded(shape, torch.empty(shape).stride(), dtype, CANARY)


def check_canary(tensor, buffer):
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[GUARD : GUARD + tensor.numel()] = True
    canary = torch.tensor(CANARY, dtype=buffer.dtype)
    assert (buffer[~inside] == canary).all(), "written outside"
    assert not (tensor == canary).any(), "not written"


class Case:
    """A call's tensors. shape: B, Hq, Hkv, Sq, Sk, D, Dv; band: shift, left, right."""

    def __init__(
        self, shape, dtype=torch.bfloat16, band=(0, -1, -1), permuted=False, scale=None, softcap=0.0
    ):
        self.b, self.hq, self.hkv, self.sq, self.sk, self.d, self.dv = shape
        self.dtype, self.band = dtype, band
        self.scale, self.softcap = scale or self.d**-0.5, softcap
        generator = torch.Generator().manual_seed(7)

        def random(heads, rows, columns):
            values = torch.randn(self.b, heads, rows, columns, generator=generator)
            return placed(values.to(dtype), permuted)

        self.query = random(self.hq, self.sq, self.d)
        self.key = random(self.hkv, self.sk, self.d)
        self.value = random(self.hkv, self.sk, self.dv)
        self.grad_out = random(self.hq, self.sq, self.dv)
        self.grad_lse = torch.randn(self.b, self.hq, self.sq, generator=generator)

    def fields(self):
        def operand(t):
            return Operand(t.data_ptr(), *t.stride()[:3])

        return dict(
            storage=DTYPES[self.dtype], b=self.b, heads=self.hq, kv_heads=self.hkv,
            queries=self.sq, keys=self.sk, dim=self.d, value_dim=self.dv,
            query=operand(self.query), key=operand(self.key), value=operand(self.value),
            scale=self.scale, softcap=self.softcap, shift=self.band[0], left=self.band[1],
            right=self.band[2],
        )  # fmt: skip

    def visible(self):
        rows, keys = torch.arange(self.sq)[:, None] + self.band[0], torch.arange(self.sk)
        seen = torch.ones(self.sq, self.sk, dtype=torch.bool)
        if self.band[1] >= 0:
            seen &= keys >= rows - self.band[1]
        if self.band[2] >= 0:
            seen &= keys <= rows + self.band[2]
        return seen

    def expected(self, dtype):
        """(out, lse, dq, dk, dv) by the reference, computed in dtype."""
        leaves = [t.to(dtype).requires_grad_() for t in (self.query, self.key, self.value)]
        out, lse = reference.scaled_dot_product_attention(
            *leaves, attn_mask=self.visible(), scale=self.scale, enable_gqa=self.hq != self.hkv,
            softcap=self.softcap or None, return_lse=True,
        )  # fmt: skip
        gradients = torch.autograd.grad(
            [out, lse], leaves, [self.grad_out.to(dtype), self.grad_lse.to(lse.dtype)]
        )
        return out.detach(), lse.detach(), *gradients

    def forward(self, kernels, blocks=3, seed=1):
        out = output((self.b, self.hq, self.sq, self.dv), self.dtype)
        lse = output((self.b, self.hq, self.sq), torch.float32)
        problem = Forward(**self.fields(), out=out[0].data_ptr(), lse=lse[0].data_ptr(), splits=1)
        kernels.set_seed(seed)
        assert kernels.forward_serves(ctypes.byref(problem))
        assert kernels.forward(ctypes.byref(problem), blocks) == 0
        check_canary(*out)
        check_canary(*lse)
        return out[0], lse[0]

    def rows(self, out, lse):
        """What attention_rows_cuda leaves: lse of base 2, inf where no key is seen, and delta."""
        delta = (self.grad_out.float() * out.float()).sum(-1) - self.grad_lse
        lse = lse.float() / math.log(2)
        return torch.stack([lse.masked_fill(lse == -math.inf, math.inf), delta.float()])

    def backward_problem(self, **pointers):
        grad_out = Operand(self.grad_out.data_ptr(), *self.grad_out.stride()[:3])
        return Backward(**self.fields(), grad_out=grad_out, **pointers)

    def backward(self, kernels, rows, blocks=3, seed=1):
        made = [output(t.shape, self.dtype) for t in (self.query, self.key, self.value)]
        names = ("grad_query", "grad_key", "grad_value")
        pointers = {n: t.data_ptr() for n, (t, _) in zip(names, made, strict=True)}
        problem = self.backward_problem(rows=rows.data_ptr(), **pointers)
        kernels.set_seed(seed)
        assert kernels.backward_serves(ctypes.byref(problem))
        assert kernels.backward(ctypes.byref(problem), blocks) == 0
        for tensor, buffer in made:
            check_canary(tensor, buffer)
        return [tensor for tensor, _ in made]


SHAPES = {
    "one tile": (1, 1, 1, 64, 16, 64, 64),
    "ragged": (1, 2, 1, 197, 300, 64, 64),
    "wide": (1, 2, 2, 150, 270, 128, 128),
    "batch": (2, 4, 2, 130, 131, 40, 72),
    "widest": (1, 1, 1, 140, 170, 256, 200),
}
BANDS = {
    "full": lambda sq, sk: (0, -1, -1),
    "causal": lambda sq, sk: (0, -1, 0),
    "bottom right": lambda sq, sk: (sk - sq, -1, 0),
    "window": lambda sq, sk: (0, 50, 20),
    "left": lambda sq, sk: (sk - sq, 30, -1),
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(kernels, shape, band):
    sizes = SHAPES[shape]
    dtype = HALVES[(len(shape) + len(band)) % 2]
    case = Case(sizes, dtype, BANDS[band](*sizes[3:5]), permuted=len(band) % 2 == 0)
    exact, same = case.expected(torch.float64), case.expected(dtype)
    out, lse = case.forward(kernels)
    assert_close_to_oracle(out, same[0], exact[0], what="out")
    assert_close_to_oracle(lse, same[1], exact[1], what="lse")
    again = case.forward(kernels, blocks=5, seed=3)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def check_backward(kernels, case):
    exact, same = case.expected(torch.float64), case.expected(case.dtype)
    rows = case.rows(same[0], exact[1])
    gradients = case.backward(kernels, rows)
    names = ("grad_query", "grad_key", "grad_value")
    for name, ours, torchs, oracle in zip(names, gradients, same[2:], exact[2:], strict=True):
        assert_close_to_oracle(ours, torchs, oracle, what=name)
    return rows, gradients


BACKWARD_SHAPES = {
    "one tile": (1, 1, 1, 64, 64, 64, 64),
    "ragged": (1, 2, 1, 197, 300, 64, 64),
    "wide": (1, 2, 2, 150, 270, 128, 128),
    "batch": (2, 4, 2, 130, 131, 40, 72),
    "widest": (1, 1, 1, 140, 170, 256, 200),
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("shape", BACKWARD_SHAPES)
def test_backward(kernels, shape, band):
    sizes = BACKWARD_SHAPES[shape]
    dtype = HALVES[(len(shape) + len(band)) % 2]
    case = Case(sizes, dtype, BANDS[band](*sizes[3:5]), permuted=len(band) % 2 == 0)
    rows, gradients = check_backward(kernels, case)
    if band == "causal":
        again = case.backward(kernels, rows, blocks=5, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("shape", ["ragged", "wide", "widest"])
def test_softcap(kernels, shape):
    for band in ("full", "causal"):
        sizes = BACKWARD_SHAPES[shape]
        # Scores far beyond the cap, and far below it.
        for scale, softcap in ((0.5, 3.0), (sizes[5] ** -0.5, 30.0)):
            case = Case(sizes, band=BANDS[band](*sizes[3:5]), scale=scale, softcap=softcap)
            exact, same = case.expected(torch.float64), case.expected(case.dtype)
            if max(sizes[5:]) > 64:
                for ours, torchs, oracle in zip(case.forward(kernels), same, exact, strict=False):
                    assert_close_to_oracle(ours, torchs, oracle)
            check_backward(kernels, case)


def test_backward_where_rows_or_keys_have_nothing(kernels):
    for band in ((-80, -1, 0), (130, 30, 20)):
        case = Case((1, 2, 1, 150, 400, 64, 64), band=band)
        seen = case.visible()
        case.key[:, :, ~seen.any(0)] = 0  # not NaN, for the reference
        _, (dq, dk, dv) = check_backward(kernels, case)
        assert (dq[:, :, ~seen.any(1)] == 0).all()
        assert (dk[:, :, ~seen.any(0)] == 0).all() and (dv[:, :, ~seen.any(0)] == 0).all()


def test_keys_that_no_query_sees_do_not_reach_a_gradient(kernels):
    case = Case((1, 2, 1, 100, 400, 64, 64), band=(130, 30, 20))
    exact = case.expected(torch.float64)
    rows = case.rows(exact[0], exact[1])
    wanted = case.backward(kernels, rows)
    for hidden in (slice(0, 100), slice(250, 400)):
        case.key[:, :, hidden] = math.nan
        case.value[:, :, hidden] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(case.backward(kernels, rows), wanted, strict=True))


# A row or a key in the middle is spoiled, which the band cuts from others of its tile.
POISONED = {
    "64": ((1, 2, 1, 197, 300, 64, 64), (0, -1, 0)),
    "128": ((1, 2, 2, 150, 270, 128, 128), (30, 40, 9)),
    "256": ((1, 1, 1, 140, 170, 256, 200), (30, 20, 0)),
}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("what", POISON)
@pytest.mark.parametrize("shape", POISONED)
def test_what_is_hidden_from_a_row_does_not_reach_it(kernels, shape, what, poison):
    if what in ("key", "query") and poison == math.inf:
        pytest.skip("scores of -inf are as hidden keys")
    sizes, band = POISONED[shape]
    dtype = HALVES[len(what) % 2]
    case = Case(sizes, dtype, band)
    clean = case.forward(kernels)
    clean_gradients = case.backward(kernels, case.rows(*clean))
    at = (case.sq if what in ("query", "grad_out") else case.sk) // 2
    getattr(case, what)[:, :, at, POISON[what]] = poison
    out, lse = case.forward(kernels)
    got = [out, lse, *case.backward(kernels, case.rows(out, lse))]
    check_poisoned(what, at, case.visible(), [*clean, *clean_gradients], got)


def test_rows_that_see_no_key(kernels):
    case = Case((1, 1, 1, 150, 70, 64, 64), band=(-80, -1, 0))
    out, lse = case.forward(kernels)
    assert (out[:, :, :80] == 0).all() and (lse[:, :, :80] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 80:]).all()


def test_keys_that_no_query_sees_are_not_read(kernels):
    case = Case((1, 2, 1, 100, 400, 64, 64), band=(130, 30, 20))
    wanted = case.forward(kernels)
    for hidden in (slice(0, 100), slice(250, 400)):
        case.key[:, :, hidden] = math.nan
        case.value[:, :, hidden] = math.nan
    for ours, without in zip(case.forward(kernels), wanted, strict=True):
        assert torch.equal(ours, without)


def test_large_logits(kernels):
    """Scores of thousands, of either sign: the running maximum is what exp sees."""
    case = Case((1, 1, 1, 70, 260, 64, 64), scale=40.0)
    exact, same = case.expected(torch.float64), case.expected(torch.bfloat16)
    for ours, torchs, oracle in zip(case.forward(kernels), same, exact, strict=False):
        assert_close_to_oracle(ours, torchs, oracle)


def test_what_the_kernel_serves(kernels):
    def serves(case=None, **changes):
        case = case or Case((1, 2, 1, 128, 64, 64, 64))
        problem = Forward(**case.fields(), splits=1)
        for name, value in changes.items():
            setattr(problem, name, value)
        return kernels.forward_serves(ctypes.byref(problem))

    assert serves() and serves(Case((1, 2, 1, 128, 64, 256, 8)))
    assert not serves(storage=DTYPES[torch.float32])
    assert not serves(scale=-1.0) and not serves(splits=2)
    for dim, wanted in ((64, False), (72, True)):
        assert serves(Case((1, 2, 1, 128, 64, 64, dim)), softcap=1.0) == wanted
    for pointer in ("slopes", "sinks", "seed", "query_starts"):
        assert not serves(**{pointer: 64})
    assert not serves(mask=Mask(data=64))
    for dim in (60, 0):
        assert not serves(dim=dim) and not serves(value_dim=dim)
    assert not serves(queries=63)
    assert not serves(query=Operand(8, 8192, 4096, 64))  # misaligned
    assert not serves(query=Operand(16, 8192, 4096, 60)) and not serves(keys=0)
    assert not serves(key=Operand(16, 8192, 4096, 0))  # expanded
    assert not serves(shift=-1000, right=0)  # nothing is seen
    case = Case((1, 2, 1, 128, 64, 128, 72))
    for names, wanted in (((), True), (("grad_query",), True), (("grad_key",), False)):
        problem = case.backward_problem(**dict.fromkeys(names, 64))
        assert kernels.backward_serves(ctypes.byref(problem)) == wanted
    wide = Case((1, 2, 1, 128, 64, 264, 72)).backward_problem()
    assert not kernels.backward_serves(ctypes.byref(wide))
