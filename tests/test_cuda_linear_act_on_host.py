"""The CUDA kernels of linear + activation, run on the host thread by thread (tests/cuda_on_host).

The tensor cores' fragments, descriptors and swizzles, the copy engine's boxes and the barriers are
emulated as the PTX manual defines them; asynchronous work is done as late as it may be. NaN around
every input and a canary around every output show an access outside of the tensors.
"""

import ctypes
import math
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close_to_oracle, host_binary, host_library
from philox_oracle import dropout_mask
from test_cuda_on_host import CANARY, DTYPES, GUARD, RowCount, guarded

from fastnn import reference
from fastnn.reference import ACTIVATIONS

HALVES = (torch.bfloat16, torch.float16)
NT, NN, TN = 0, 1, 2


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class Statistics(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "label_logit", "labels", "row_index")),
        ("class_weight", ctypes.c_void_p), ("softcap", ctypes.c_float),
        ("weighted", ctypes.c_bool),
    ]  # fmt: skip


class Epilogue(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "preact", "bias", "residual")),
        *((name, ctypes.c_int64) for name in ("out_stride", "residual_stride", "width")),
        ("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("scale", ctypes.c_float),
        ("activation", ctypes.c_int), ("gated", ctypes.c_bool), ("float_out", ctypes.c_bool),
        ("factor", ctypes.c_void_p), ("statistics", Statistics),
    ]  # fmt: skip


class Problem(ctypes.Structure):
    _fields_ = [
        ("a", Matrix), ("b", Matrix), ("layout", ctypes.c_int), ("storage", ctypes.c_int),
        *((name, ctypes.c_int64) for name in "mnk"), ("tf32", ctypes.c_bool),
        ("epilogue", Epilogue), ("rows", RowCount),
    ]  # fmt: skip


class Gradient(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_out", "saved", "grad_preact", "grad_bias")),
        ("scratch", ctypes.c_void_p), ("rows", ctypes.c_int64), ("width", ctypes.c_int64),
        ("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("scale", ctypes.c_float),
        ("activation", ctypes.c_int), ("gated", ctypes.c_bool),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    return host_library(folder, "linear_act", "linear_act_rows", "linear_act_sm90")


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def random(shape, dtype, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def placed(values, layout="contiguous"):
    """A copy of a matrix amid NaN: rows without gaps, apart by a multiple of 16 bytes, or not."""
    rows, columns = values.shape
    eight = -(-columns // 8) * 8 + 8
    stride, offset = {"contiguous": (columns, 0), "padded": (eight, 8), "odd": (eight + 1, 3)}[
        layout
    ]
    tensor, _ = guarded(values.shape, (stride, 1), values.dtype, math.nan, offset)
    return tensor.copy_(values)


class Outputs:
    """Outputs amid canaries."""

    def __init__(self):
        self.made = []

    def make(self, shape, dtype):
        tensor, buffer = guarded(shape, torch.empty(shape).stride(), dtype, CANARY)
        self.made.append((tensor, buffer))
        return tensor

    def check(self):
        for tensor, buffer in self.made:
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside[GUARD : GUARD + tensor.numel()] = True
            canary = torch.tensor(CANARY, dtype=buffer.dtype)
            assert (buffer[~inside] == canary).all(), "written outside"
            assert not (tensor == canary).any(), "not written"


def matrix(tensor):
    return Matrix(tensor.data_ptr(), tensor.stride(0))


def activation_number(kernels, name):
    gated = ctypes.c_bool()
    number = kernels.find_activation(name.encode(), ctypes.byref(gated))
    assert gated.value == ACTIVATIONS[name].gated
    return number


def dropout_fields(seed, p):
    threshold = math.floor(p * 65536 + 0.5)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return {"seed": pointer(seed), "threshold": threshold, "scale": scale} if p else {}


def product(kernels, gemm, a, b, layout, out, accumulate=False, tf32=False, seed=1):
    """out (+)= A B^T, with A [M, K] or [K, M] and B [N, K] or [K, N] as `layout` stores them."""
    m, n = out.shape
    epilogue = Epilogue(
        out=pointer(out), out_stride=out.stride(0), width=n, float_out=out.dtype != a.dtype,
        residual=pointer(out) if accumulate else None, residual_stride=out.stride(0),
    )  # fmt: skip
    problem = Problem(
        matrix(a), matrix(b), layout, DTYPES[a.dtype], m, n, a.shape[layout != TN], tf32, epilogue
    )
    kernels.set_seed(seed)
    assert getattr(kernels, gemm)(ctypes.byref(problem)) == 0


SHAPES = [(1, 1, 1), (3, 130, 5), (130, 40, 140), (65, 33, 131), (128, 128, 128)]


def check_product(kernels, gemm, shape, layout, dtype, placement, tf32=False, out=None):
    m, k, n = shape
    a = random((k, m) if layout == TN else (m, k), dtype, 1)
    b = random((n, k) if layout == NT else (k, n), dtype, 2)
    outputs = Outputs()
    out = outputs.make((m, n), out or dtype)
    product(kernels, gemm, placed(a, placement), placed(b, placement), layout, out, tf32=tf32)
    outputs.check()
    left = a.t() if layout == TN else a
    right = b.t() if layout == NT else b
    exact, torchs = left.double() @ right.double(), left.to(out.dtype) @ right.to(out.dtype)
    if tf32:
        torchs = (left.bfloat16() @ right.bfloat16()).float()  # 8 bits of mantissa; TF32 has 11
    assert_close_to_oracle(out, torchs, exact, factor=0.25 if tf32 else 2.0)
    return out


@pytest.mark.parametrize("placement", ["contiguous", "padded", "odd"])
@pytest.mark.parametrize("layout", [NT, NN, TN], ids=["NT", "NN", "TN"])
def test_portable_products(kernels, layout, placement):
    for shape in SHAPES:
        for dtype in (torch.float32, *HALVES):
            check_product(kernels, "gemm_portable", shape, layout, dtype, placement)
        check_product(kernels, "gemm_portable", shape, layout, torch.float32, placement, tf32=True)


def test_product_of_nothing(kernels):
    """A sum over no terms is 0."""
    outputs = Outputs()
    out = outputs.make((5, 9), torch.bfloat16)
    empty = torch.empty(5, 0, dtype=torch.bfloat16), torch.empty(9, 0, dtype=torch.bfloat16)
    product(kernels, "gemm_portable", *empty, NT, out)
    outputs.check()
    assert (out == 0).all()


def check_accumulation(kernels, gemm, m, k, n):
    a, b = random((k, m), torch.bfloat16, 1), random((k, n), torch.bfloat16, 2)
    before = random((m, n), torch.float32, 3)
    out = before.clone()
    product(kernels, gemm, a, b, TN, out, accumulate=True)
    exact = before.double() + a.t().double() @ b.double()
    assert_close_to_oracle(out, before + a.t().float() @ b.float(), exact)


def test_portable_product_accumulates_in_float(kernels):
    check_accumulation(kernels, "gemm_portable", 37, 50, 70)


def test_sm90_product_accumulates_in_float(kernels):
    """Half a tile at a time; ragged, several tiles a block, one step of K."""
    for shape in ((8, 8, 8), (304, 200, 520), (136, 72, 264), (520, 64, 776)):
        check_accumulation(kernels, "gemm_sm90", *shape)
        check_product(kernels, "gemm_sm90", shape, TN, torch.float16, "padded", out=torch.float32)


class Layer:
    """One linear_act call's tensors; `exact(dtype)` is the reference's result and gradients."""

    def __init__(self, shape, dtype, activation, bias=True, residual=True, p=0.0, placement=None):
        m, k, n = shape
        gated = ACTIVATIONS[activation].gated
        rows = 2 * n if gated else n
        self.activation, self.gated, self.p, self.dtype = activation, gated, p, dtype
        placement = placement or "contiguous"
        self.x = placed(random((m, k), dtype, 1), placement)
        self.w = placed(random((rows, k), dtype, 2, k**-0.5), placement)
        self.bias = random((rows,), dtype, 3) if bias else None
        self.residual = placed(random((m, n), dtype, 4), placement) if residual else None
        self.grad_out = random((m, n), dtype, 5)
        self.seed = torch.tensor([-(2**62) + 12345, 2**61 + 7])
        mask = dropout_mask(self.seed.tolist(), m, n, p) if p else None
        self.keep = None if mask is None else torch.from_numpy(np.asarray(mask))

    def exact(self, dtype):
        tensors = [
            None if t is None else t.to(dtype).contiguous().requires_grad_()
            for t in (self.x, self.w, self.bias, self.residual)
        ]
        keep = None if self.keep is None else self.keep.to(dtype)
        x, w, bias, residual = tensors
        out = reference.linear_act(x, w, bias, self.activation, residual=residual, keep=keep)
        leaves = [t for t in (x, w, bias) if t is not None]
        preact = torch.nn.functional.linear(x, w, bias).detach()
        return out.detach(), preact, torch.autograd.grad(out, leaves, self.grad_out.to(dtype))

    def epilogue(self, kernels, out, preact):
        return Epilogue(
            out=pointer(out), preact=pointer(preact), bias=pointer(self.bias),
            residual=pointer(self.residual), out_stride=out.stride(0), width=out.shape[1],
            residual_stride=0 if self.residual is None else self.residual.stride(0),
            activation=activation_number(kernels, self.activation), gated=self.gated,
            **dropout_fields(self.seed, self.p),
        )  # fmt: skip

    def forward(self, kernels, gemm, save_preact, seed=1):
        outputs = Outputs()
        out = outputs.make(self.grad_out.shape, self.dtype)
        shape = (self.x.shape[0], self.w.shape[0])
        preact = outputs.make(shape, self.dtype) if save_preact else None
        problem = Problem(
            matrix(self.x), matrix(self.w), NT, DTYPES[self.dtype], *shape, self.x.shape[1], False,
            self.epilogue(kernels, out, preact),
        )  # fmt: skip
        kernels.set_seed(seed)
        assert getattr(kernels, gemm)(ctypes.byref(problem)) == 0
        outputs.check()
        return out, preact


def check_forward(kernels, gemm, *case, **options):
    layer = Layer(*case, **options)
    (exact, exact_preact, _), (torchs, torchs_preact, _) = (
        layer.exact(torch.float64), layer.exact(layer.dtype)
    )  # fmt: skip
    for save_preact in (False, True):
        out, preact = layer.forward(kernels, gemm, save_preact)
        assert_close_to_oracle(out, torchs, exact, what=f"{case} out")
        if save_preact:
            assert_close_to_oracle(preact, torchs_preact, exact_preact, what=f"{case} preact")
            again = layer.forward(kernels, gemm, True, seed=9)
            assert torch.equal(out, again[0]) and torch.equal(preact, again[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_portable_epilogue(kernels, activation):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_forward(kernels, "gemm_portable", (70, 40, 75), dtype, activation, p=0.3)
    check_forward(kernels, "gemm_portable", (9, 24, 136), torch.bfloat16, activation, bias=False,
                  residual=False)  # fmt: skip


def test_portable_epilogue_with_odd_rows(kernels):
    for activation in ("gelu", "swiglu"):
        check_forward(kernels, "gemm_portable", (70, 41, 77), torch.bfloat16, activation,
                      placement="odd")  # fmt: skip


# Hopper's kernel: one tile and less, ragged, several tiles a block, several rounds of the ring.
SM90_SHAPES = [(8, 8, 8), (136, 72, 264), (304, 200, 520), (520, 328, 776)]


@pytest.mark.parametrize("layout", [NT, NN, TN], ids=["NT", "NN", "TN"])
def test_sm90_products(kernels, layout):
    for shape, dtype, placement in zip(
        SM90_SHAPES, HALVES * 2, ("contiguous", "padded") * 2, strict=True
    ):
        check_product(kernels, "gemm_sm90", shape, layout, dtype, placement)


def test_sm90_product_is_the_same_in_any_order(kernels):
    a, b = random((300, 400), torch.bfloat16, 1), random((264, 400), torch.bfloat16, 2)
    results = []
    for seed in (1, 2, 3):
        out = torch.empty(300, 264, dtype=torch.bfloat16)
        product(kernels, "gemm_sm90", a, b, NT, out, seed=seed)
        results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_sm90_tiles_follow_each_other(kernels):
    """One step of K a tile: P is overwritten as soon as it may be."""
    check_product(kernels, "gemm_sm90", (520, 8, 1040), NT, torch.bfloat16, "contiguous")
    check_forward(kernels, "gemm_sm90", (264, 8, 776), torch.bfloat16, "swiglu")


def test_sm90_sums_over_ragged_k(kernels):
    """Rows 16 bytes apart, of which the last elements are not K's."""
    for layout in (NT, NN):
        check_product(kernels, "gemm_sm90", (40, 75, 72), layout, torch.bfloat16, "padded")


@pytest.mark.parametrize("activation", ["identity", "gelu", "swiglu", "reglu"])
def test_sm90_epilogue(kernels, activation):
    check_forward(kernels, "gemm_sm90", (300, 136, 264), torch.bfloat16, activation, p=0.3)
    check_forward(kernels, "gemm_sm90", (72, 200, 136), torch.float16, activation, bias=False,
                  residual=False)  # fmt: skip
    check_forward(kernels, "gemm_sm90", (72, 72, 392), torch.bfloat16, activation, residual=False)


def test_sm90_refuses_what_the_copy_engine_cannot_address(kernels):
    x, w = random((8, 16), torch.bfloat16, 1), random((8, 16), torch.bfloat16, 2)
    out = torch.empty(8, 8, dtype=torch.bfloat16)

    def served(a, b, out, **options):
        epilogue = Epilogue(
            out=pointer(out), out_stride=out.stride(0), width=out.shape[1], **options
        )
        problem = Problem(
            matrix(a), matrix(b), NT, DTYPES[a.dtype], *out.shape, a.shape[1], False, epilogue
        )
        return kernels.gemm_sm90(ctypes.byref(problem)) == 0

    assert served(x, w, out)
    assert not served(x.float(), w.float(), out.float())
    assert not served(x[:, 1:9], w[:, :8], out)
    assert not served(placed(x, "odd"), w, out)
    assert not served(x, w[:7], torch.empty(8, 7, dtype=torch.bfloat16))
    # Columns that 16 bytes do not divide only where rows still begin on them, and nothing follows.
    assert served(x, w[:7], out[:, :7])
    assert not served(x, w[:7], out[:, :7], activation=activation_number(kernels, "relu"))


def test_the_table_of_paths(kernels):
    """Hopper's kernel only on Hopper and where it serves; cuBLAS where nothing else fits."""
    sm90, portable, cublas = 0, 1, 2

    def chosen(m, n, k, dtype=torch.bfloat16, stride=None, capability=90, counted=False):
        stride = k if stride is None else stride
        operand = Matrix(1 << 20, stride)
        epilogue = Epilogue(out=1 << 20, out_stride=n, width=n)
        problem = Problem(operand, operand, NT, DTYPES[dtype], m, n, k, False, epilogue)
        problem.rows.total = 1 << 20 if counted else None
        return kernels.choose_path(ctypes.byref(problem), capability)

    assert chosen(4096, 4096, 4096) == sm90
    assert chosen(4096, 4096, 4096, capability=80) == cublas
    assert chosen(4096, 4096, 4096, capability=100) == cublas
    assert chosen(4096, 4096, 4096, torch.float32) == cublas
    assert chosen(4096, 4096, 4099, stride=4099) == cublas
    assert chosen(4096, 4099, 4096) == cublas
    assert chosen(64, 64, 64) == portable
    assert chosen(0, 64, 64) == cublas
    # Where only the device counts the rows, cuBLAS is what leaves none out.
    assert chosen(4096, 32000, 4096, counted=True) == chosen(128, 512, 64, counted=True) == sm90
    assert chosen(64, 64, 64, counted=True) == chosen(4096, 50257, 768, counted=True) == cublas
    assert chosen(4096, 32000, 4096, counted=True, capability=80) == cublas


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (8, 2), (17, 7), (40, 1)], ids=str)
def test_every_tile_is_visited_once(kernels, tiles):
    m, n = ctypes.c_int(), ctypes.c_int()
    seen = []
    for index in range(tiles[0] * tiles[1]):
        kernels.tile_at(*tiles, index, ctypes.byref(m), ctypes.byref(n))
        seen.append((m.value, n.value))
    assert sorted(seen) == [(i, j) for i in range(tiles[0]) for j in range(tiles[1])]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_of_rows(kernels, activation):
    """The epilogue alone, of a product that something else made."""
    for dtype, n in ((torch.float32, 300), (torch.bfloat16, 77), (torch.float16, 16)):
        layer = Layer((7, 20, n), dtype, activation, p=0.25)
        preact = placed(layer.exact(dtype)[1])
        outputs = Outputs()
        out = outputs.make((7, n), dtype)
        epilogue = layer.epilogue(kernels, out, preact)
        run = kernels.apply_epilogue(ctypes.byref(epilogue), DTYPES[dtype], ctypes.c_int64(7))
        assert run == 0
        outputs.check()
        exact, torchs = layer.exact(torch.float64)[0], layer.exact(dtype)[0]
        assert_close_to_oracle(out, torchs, exact)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_preact_gradient(kernels, activation, p):
    for (m, n), dtype in (((70, 75), torch.float32), ((130, 264), torch.bfloat16),
                          ((5, 8), torch.float16), ((4200, 9), torch.bfloat16)):  # fmt: skip
        layer = Layer((m, 24, n), dtype, activation, residual=False, p=p)
        identity = activation == "identity"
        # Against torch's gradients of the same saved, rounded pre-activation.
        preact = layer.exact(dtype)[1]

        def gradients(dtype, layer=layer, preact=preact):
            saved = preact.to(dtype).requires_grad_()
            act = ACTIVATIONS[layer.activation]
            gate, up = saved.chunk(2, -1) if act.gated else (saved, None)
            out = act.value(gate) * up if act.gated else act.value(gate)
            out = out if layer.keep is None else out * layer.keep.to(dtype)
            (grad,) = torch.autograd.grad(out, saved, layer.grad_out.to(dtype))
            return grad, grad.sum(0)

        outputs = Outputs()
        grad_preact = outputs.make(preact.shape, dtype)
        grad_bias = outputs.make(preact.shape[1:], dtype)
        kept = placed(preact), placed(layer.grad_out)
        runs = []
        for seed in (1, 2):
            gradient = Gradient(
                grad_out=pointer(kept[1]), saved=None if identity else pointer(kept[0]),
                grad_preact=pointer(grad_preact), grad_bias=pointer(grad_bias), rows=m, width=n,
                activation=activation_number(kernels, activation), gated=layer.gated,
                **dropout_fields(layer.seed, p),
            )  # fmt: skip
            kernels.set_seed(seed)
            assert kernels.preact_grad(gradient, DTYPES[dtype]) == 0
            outputs.check()
            runs.append((grad_preact.clone(), grad_bias.clone()))
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
        for ours, torchs, exact in zip(
            runs[0], gradients(dtype), gradients(torch.float64), strict=True
        ):
            assert_close_to_oracle(ours, torchs, exact, what=f"{activation} {m} x {n}")


def test_bias_gradient_alone(kernels):
    grad_out = random((300, 70), torch.bfloat16, 1)
    outputs = Outputs()
    grad_bias = outputs.make((70,), torch.bfloat16)
    gradient = Gradient(
        grad_out=pointer(grad_out), grad_bias=pointer(grad_bias), rows=300, width=70
    )
    assert kernels.preact_grad(gradient, DTYPES[torch.bfloat16]) == 0
    outputs.check()
    assert_close_to_oracle(grad_bias, grad_out.sum(0), grad_out.double().sum(0))


@pytest.mark.parametrize("shape", [(5, 7), (3, 264), (1, 5000)], ids=str)
def test_dropout_has_the_generators_bits(kernels, shape):
    seed = torch.tensor([77, -3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ones = placed(torch.ones(shape, dtype=dtype))
        outputs = Outputs()
        out = outputs.make(shape, dtype)
        run = kernels.dropout(
            ctypes.c_void_p(pointer(ones)), ctypes.c_void_p(pointer(out)), DTYPES[dtype],
            *map(ctypes.c_int64, shape), ctypes.c_void_p(pointer(seed)), ctypes.c_double(0.25),
        )  # fmt: skip
        assert run == 0
        outputs.check()
        wanted = torch.from_numpy(dropout_mask(seed.tolist(), *shape, 0.25)).to(dtype)
        assert torch.equal(out, wanted)


def test_program_of_hoppers_instructions(tmp_path):
    """tests/cuda_prim.cu, which checks a device's instructions, against their emulation."""
    program = host_binary(tmp_path / "cuda_prim", "-x", "c++", str(ROOT / "tests/cuda_prim.cu"))
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("ok ") == 18, run.stdout + run.stderr
