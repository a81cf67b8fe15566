"""linear_act and dropout on a device, by every kernel that can make the product: pytest -m gpu."""

import subprocess

import pytest
import torch
from conftest import ROOT, assert_close_to_oracle, memcheck
from philox_oracle import dropout_mask
from test_cuda_build import find_nvcc
from test_linear_act import DTYPES, double, make, results

from fastnn import _ops, backend, reference
from fastnn.linear_act import dropout, dropout_seed, linear_act
from fastnn.reference import ACTIVATIONS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PATHS = ("sm90", "portable", "cublas")
# (rows, in, out): one row, prime, rows that 16 bytes do not divide, one tile, several.
SHAPES = ((1, 24, 40), (7, 33, 45), (131, 65, 67), (128, 64, 128), (300, 328, 520))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """The kernel asked for; where it cannot serve a product the table chooses another."""
    if request.param == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper device")
    monkeypatch.setenv("FASTNN_LINEAR_ACT", request.param)
    return request.param


@pytest.fixture(autouse=True)
def native():
    with backend.use_backend("native"):
        yield


def on_device(tensor):
    """A leaf on the device with the same strides, and NaN between the elements."""
    if tensor is None:
        return None
    room = sum(max(n - 1, 0) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    buffer = torch.full((room + 8,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    view = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() % 8)
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def operands(activation, shape, dtype, layout="contiguous", bias=True, residual=True):
    m, k, n = shape
    rows = 2 * n if ACTIVATIONS[activation].gated else n
    tensors = (
        make((m, k), dtype, layout),
        make((rows, k), dtype, layout, scale=max(k, 1) ** -0.5),
        make((rows,), dtype, layout) if bias else None,
        make((m, n), dtype, layout) if residual else None,
    )
    return tuple(map(on_device, tensors))


def check(tensors, activation, p=0.0):
    grad_out = torch.randn(tensors[0].shape[0], tensors[1].shape[0], device=DEVICE)
    grad_out = grad_out[:, : grad_out.shape[1] // (2 if ACTIVATIONS[activation].gated else 1)]
    grad_out = grad_out.to(tensors[0].dtype)
    torch.manual_seed(21)
    seed = dropout_seed(torch.device(DEVICE))
    ones = torch.ones(grad_out.shape, device=DEVICE)
    keep = _ops.NATIVE.dropout(ones, seed, p) if p else None

    def ours(x, w, b, r):
        torch.manual_seed(21)
        return linear_act(x, w, b, activation, residual=r, dropout_p=p)

    def torchs(x, w, b, r):
        mask = None if keep is None else keep.to(x.dtype)
        return reference.linear_act(x, w, b, activation, residual=r, keep=mask)

    mine, again = results(ours, tensors, grad_out), results(ours, tensors, grad_out)
    same = results(torchs, tensors, grad_out)
    exact = results(torchs, double(tensors), grad_out.double())
    names = [name for name, t in zip("xwbr", tensors, strict=True) if t is not None]
    for what, a, b, c, d in zip(("out", *names), mine, same, exact, again, strict=True):
        assert_close_to_oracle(a, b, c, what=f"{activation} {what} {tuple(tensors[0].shape)}")
        assert torch.equal(a, d), "a rerun changed a bit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(path, activation, dtype):
    torch.manual_seed(1)
    for shape in SHAPES:
        check(operands(activation, shape, dtype), activation)
        check(operands(activation, shape, dtype, bias=False, residual=False), activation)
        check(operands(activation, shape, dtype), activation, p=0.25)


@pytest.mark.parametrize("layout", ("permuted", "offset"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(path, dtype, layout):
    torch.manual_seed(2)
    for activation in ("identity", "gelu", "swiglu"):
        for shape in SHAPES:
            check(operands(activation, shape, dtype, layout), activation)


@pytest.mark.parametrize("shape", ((2048, 1024, 3072), (1000, 4096, 776), (264, 8192, 264)))
@pytest.mark.parametrize("activation", ("identity", "gelu", "swiglu"))
def test_many_tiles(path, activation, shape):
    torch.manual_seed(3)
    for dtype in (torch.bfloat16, torch.float16):
        check(operands(activation, shape, dtype), activation, p=0.1)


@pytest.mark.parametrize("shape", ((0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)))
def test_empty(path, shape):
    for activation in ("identity", "gelu", "swiglu"):
        check(operands(activation, shape, torch.float32), activation)


@pytest.mark.parametrize("allowed", (False, True))
def test_tf32_only_where_torch_allows_it(path, allowed):
    x, w = torch.randn(512, 1024, device=DEVICE), torch.randn(256, 1024, device=DEVICE)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        error = (linear_act(x, w).double() - x.double() @ w.double().t()).abs().max().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert 1e-3 < error < 0.2 if allowed else error < 5e-4


@pytest.mark.parametrize("shape", [(5, 7), (300, 264), (1, 1 << 20), (3, 5, 9)], ids=str)
def test_dropout_has_the_bits_of_the_cpu(shape):
    seed = torch.tensor([-77, 2**62 + 5])
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype)
        ours = _ops.NATIVE.dropout(x.to(DEVICE), seed.to(DEVICE), 0.3)
        assert torch.equal(ours.cpu() == 0, _ops.NATIVE.dropout(x, seed, 0.3) == 0)
        assert torch.equal(ours.cpu(), _ops.NATIVE.dropout(x, seed, 0.3))


def test_dropout_in_the_epilogue_has_the_same_bits(path):
    x = torch.eye(256, device=DEVICE, dtype=torch.bfloat16)
    w = torch.ones(264, 256, device=DEVICE, dtype=torch.bfloat16)
    seed = torch.tensor([5, 6], device=DEVICE)
    arguments = (x, w, None, None, seed, "identity", 0.5, False, False)
    out, _ = _ops.NATIVE.linear_act_forward(*arguments)
    assert torch.equal(out, _ops.NATIVE.dropout(torch.ones_like(out), seed, 0.5))


def dropped(x):
    x = x.detach().requires_grad_()
    out = dropout(x, 0.3)
    return out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))


def assert_dropped(x, out, grad):
    """One mask for both, close to the rate, and survivors scaled."""
    assert torch.equal(out == 0, (grad == 0) | (x == 0))
    torch.testing.assert_close(out, x * grad, rtol=1e-2, atol=0)
    assert abs((grad == 0).double().mean() - 0.3) < 5 * (0.21 / x.numel()) ** 0.5
    assert set(grad.unique().tolist()) <= {0.0, grad.max().item()}
    assert abs(grad.max().item() * 0.7 - 1) < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    for shape in ((3000, 264), (777, 131), (1 << 20,)):
        x = torch.randn(shape, device=DEVICE).to(dtype)
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(dropped(x))
        assert_dropped(x, *runs[0])
        assert all(torch.equal(first, again) for first, again in zip(*runs, strict=True))


def test_dropout_under_graphs_and_streams_without_synchronization():
    x = torch.randn(512, 256, device=DEVICE)
    mode = torch.cuda.get_sync_debug_mode()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        dropped(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dropped(x)
    masks = []
    for _ in range(2):
        fresh = torch.randn_like(x)
        x.copy_(fresh)
        graph.replay()
        assert_dropped(x, *captured)
        masks.append(captured[1].clone())
    assert not torch.equal(*masks), "a replay draws again"
    fresh = torch.randn_like(x)
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            x.copy_(fresh)
            got = dropped(x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    side.synchronize()
    assert_dropped(fresh, *got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_dropout_on_the_second_device():
    x = torch.randn(512, 256, device="cuda:1")
    with torch.cuda.device(0):
        assert_dropped(x, *dropped(x))


@pytest.mark.slow
def test_dropout_of_more_elements_than_32_bits_count():
    rows, columns = 2**31 // 32768 + 3, 32768
    if torch.cuda.mem_get_info()[0] < 3 * rows * columns * 2:
        pytest.skip("needs 13 GB of device memory")
    ones = torch.ones(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    seed = torch.tensor([7, -9], device=DEVICE)
    out = _ops.NATIVE.dropout(ones, seed, 0.25)
    for row in (0, rows // 2, rows - 1):
        mask = torch.from_numpy(dropout_mask(seed.tolist(), [row], columns, 0.25))
        assert torch.equal(out[row : row + 1].cpu(), mask.bfloat16())


def step(x, w, b):
    out = linear_act(x, w, b, "gelu")
    return (out.detach(), *torch.autograd.grad(out, (x, w, b), torch.ones_like(out)))


def test_graph_capture(path):
    x, w, b, _ = operands("gelu", (512, 256, 512), torch.bfloat16, residual=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, w, b)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, w, b)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, eager in zip(captured, step(x, w, b), strict=True):
        assert torch.equal(replayed, eager)


def test_no_synchronization(path):
    x, w, b, r = operands("swiglu", (512, 256, 512), torch.bfloat16)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_act(x, w, b, "swiglu", residual=r, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_runs_on_the_current_stream(path):
    """Behind a sleep on a side stream: a launch on the default stream would read the old input."""
    x, w, b, _ = operands("gelu", (512, 256, 512), torch.bfloat16, residual=False)
    fresh = torch.randn_like(x)
    wanted = step(fresh.clone().requires_grad_(), w, b)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
    with torch.cuda.stream(stream):
        got = step(x, w, b)
    stream.synchronize()
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device(path):
    x, w = torch.randn(256, 64, device="cuda:1"), torch.randn(128, 64, device="cuda:1")
    torch.testing.assert_close(linear_act(x, w, None, "relu"), torch.relu(x @ w.t()))


def test_more_elements_than_32_bits_count(path):
    m, k, n = 70_000, 64, 32_768
    if torch.cuda.mem_get_info()[0] < 5 * m * n * 2:
        pytest.skip("needs 23 GB of device memory")
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    x, w = x.requires_grad_(), w.requires_grad_()
    out = linear_act(x, w, None, "relu")
    grad_out = torch.zeros_like(out)
    rows = [0, m // 2, m - 1]
    grad_out[rows] = torch.randn(3, n, device=DEVICE, dtype=torch.bfloat16)
    grad_x, grad_w = torch.autograd.grad(out, (x, w), grad_out)
    assert not grad_x[1 : m // 2].any() and not grad_x[m // 2 + 1 : -1].any()

    def wanted(dtype):
        few, weight = (t.detach().to(dtype).requires_grad_() for t in (x[rows], w))
        result = torch.relu(few @ weight.t())
        upstream = grad_out[rows].to(dtype)
        return result.detach(), *torch.autograd.grad(result, (few, weight), upstream)

    ours = out.detach()[rows], grad_x[rows], grad_w
    torchs, exact = wanted(torch.bfloat16), wanted(torch.float64)
    for what, *three in zip(("out", "grad_x", "grad_w"), ours, torchs, exact, strict=True):
        assert_close_to_oracle(*three, what=what)


def test_unwanted_gradients_are_empty():
    x, w, b, _ = operands("gelu", (64, 32, 48), torch.bfloat16, residual=False)
    _, preact = _ops.NATIVE.linear_act_forward(x, w, b, None, None, "gelu", 0.0, True, False)
    for mask in ((True, False, False), (False, True, False), (False, False, True), (False,) * 3):
        gradients = _ops.NATIVE.linear_act_backward(
            preact, x, w, preact, None, "gelu", 0.0, False, list(mask)
        )
        shapes = [tuple(t.shape) if m else (0,) for t, m in zip((x, w, b), mask, strict=True)]
        assert [tuple(g.shape) for g in gradients] == shapes


X, W = torch.randn(4, 8), torch.randn(6, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=W), "weight must be on cuda"),
        (dict(weight=W.double().to), "weight must be"),
        (dict(weight=W[:, :7].to), "input must be of shape"),
        (dict(bias=torch.randn(5).to), "bias must be of shape"),
        (dict(residual=torch.randn(4, 5).to), "residual must be of shape"),
        (dict(activation="swish"), "activation must be one of identity relu"),
        (dict(dropout_p=0.5), "seed must be given"),
        (dict(gated=True), "gated must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(change, message):
    arguments = dict(
        input=X.to(DEVICE), weight=W.to(DEVICE), bias=None, residual=None, seed=None,
        activation="relu", dropout_p=0.0, save_preact=False, gated=False,
    )  # fmt: skip
    arguments |= {name: v(DEVICE) if callable(v) else v for name, v in change.items()}
    with pytest.raises(RuntimeError, match=message):
        _ops.NATIVE.linear_act_forward(**arguments)


def test_a_path_of_another_name_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTNN_LINEAR_ACT", "fastest")
    with pytest.raises(RuntimeError, match="FASTNN_LINEAR_ACT must be sm90, portable or cublas"):
        linear_act(X.to(DEVICE), W.to(DEVICE))


def test_compile(path):
    x, w, b, r = operands("swiglu", (300, 64, 136), torch.bfloat16)

    def function(x, w, b, r):
        return linear_act(x, w, b, "swiglu", residual=r)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grad_out = torch.randn(300, 136, device=DEVICE, dtype=torch.bfloat16)
    for a, c in zip(
        results(compiled, (x, w, b, r), grad_out), results(function, (x, w, b, r), grad_out),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, c)


def test_hoppers_instructions(tmp_path):
    """tests/cuda_prim.cu: barriers, boxes, and products of every layout, width and source of A."""
    if torch.cuda.get_device_capability() != (9, 0) or find_nvcc() is None:
        pytest.skip("needs a Hopper device and nvcc")
    program = tmp_path / "cuda_prim"
    build = [
        find_nvcc(), "-std=c++17", "-O2", "--expt-relaxed-constexpr",
        "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests/cuda_prim.cu"), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


def test_under_the_sanitizer():
    """Small shapes by every path under compute-sanitizer's memcheck: no access out of bounds."""
    memcheck("""
import os, torch, fastnn
for path in ("sm90", "portable", "cublas"):
    os.environ["FASTNN_LINEAR_ACT"] = path
    for shape in ((136, 72, 264), (37, 21, 45)):
        for dtype in (torch.bfloat16, torch.float32):
            x, w = (torch.randn(*s, device="cuda", dtype=dtype, requires_grad=True)
                    for s in ((shape[0], shape[1]), (2 * shape[2], shape[1])))
            fastnn.linear_act(x, w, None, "swiglu", dropout_p=0.1).sum().backward()
torch.cuda.synchronize()
""")
