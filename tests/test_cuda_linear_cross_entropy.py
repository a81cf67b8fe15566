"""linear_cross_entropy on a device, by each product of the CUDA C++ and by Triton: -m gpu."""

import math

import pytest
import torch
from conftest import assert_close_to_oracle, memcheck

from fastnn import backend, reference
from fastnn.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, features, classes: ragged, aligned, prime, a block and a cluster per row, ragged tiles that
# Hopper's product serves, nothing
SHAPES = [
    (33, 24, 301), (256, 128, 4096), (65, 64, 5003), (130, 72, 33000), (330, 200, 776), (1, 8, 2),
    (0, 8, 9), (5, 0, 7),
]  # fmt: skip
OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 4.0},
}


@pytest.fixture(autouse=True, params=["native-sm90", "native-portable", "native-cublas", "triton"])
def serving(request, monkeypatch):
    """The backend, and of native the product asked for; where that cannot serve, the table's."""
    torch.manual_seed(0)
    name, _, path = request.param.partition("-")
    for dtype in DTYPES if torch.cuda.is_available() else ():
        reason = backend.refusal(name, "linear_cross_entropy", DEVICE, dtype)
        if reason is not None:
            pytest.skip(reason)
    if path == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper device")
    monkeypatch.setenv("FASTNN_LINEAR_CROSS_ENTROPY", path)
    with backend.use_backend(name):
        yield request.param


# Classes that 16 bytes do not divide, and that they do.
both_vocabularies = pytest.mark.parametrize("classes", [1009, 1016])


def make(shape, dtype, option="plain", soft=False, ignored=1 / 3, device=DEVICE):
    """(input, linear_weight, linear_bias), target, options."""
    rows, features, classes = shape
    options = dict(OPTIONS[option])
    if options.pop("weight", False):
        options["weight"] = (torch.rand(classes) + 0.1).to(device, dtype)
    sizes = ((rows, features), (classes, features), (classes,))
    scale = max(features, 1) ** -0.25
    tensors = tuple((torch.randn(size) * scale).to(device, dtype) for size in sizes)
    if soft:
        target = torch.rand(rows, classes).softmax(1).to(device, dtype)
    else:
        target = torch.randint(0, classes, (rows,))
        target[torch.rand(rows) < ignored] = -100
        target = target.to(device)
    return tensors, target, options


def evaluate(function, tensors, target, double=False, **options):
    """Loss and gradients for an upstream gradient that is not 1."""
    to = (lambda t: t.double()) if double else (lambda t: t)
    inputs = [to(t).detach().requires_grad_() for t in tensors]
    if options.get("weight") is not None:
        options["weight"] = to(options["weight"])
    target = to(target) if target.is_floating_point() else target
    input, weight, *bias = inputs
    loss = function(input, weight, target, linear_bias=bias[0] if bias else None, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(loss.shape, dtype=torch.float64, generator=generator)
    grad = grad.to(tensors[0].dtype).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, inputs, grad)


def check(tensors, target, workspace_bytes=None, **options):
    before = [t.clone() for t in tensors]
    ours = evaluate(
        linear_cross_entropy, tensors, target, workspace_bytes=workspace_bytes, **options
    )
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), "an input changed"
    torchs = evaluate(reference.linear_cross_entropy, tensors, target, **options)
    oracle = evaluate(reference.linear_cross_entropy, tensors, target, double=True, **options)
    names = ("loss", "grad_input", "grad_linear_weight", "grad_linear_bias")
    for what, *results in zip(names, ours, torchs, oracle, strict=False):
        assert_close_to_oracle(*results, what=what)
    # Without gradients the logits need not be stored.
    with torch.no_grad():
        bias = tensors[2] if len(tensors) > 2 else None
        evaluated = linear_cross_entropy(
            *tensors[:2], target, linear_bias=bias, workspace_bytes=workspace_bytes, **options
        )
    assert_close_to_oracle(evaluated, torchs[0], oracle[0], what="loss without gradients")


def assert_near(ours, other):
    """The same numbers by another order of bfloat16's roundings."""
    assert (ours - other).abs().max() <= 0.01 * other.abs().max() and other.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_torch(dtype, shape, option, reduction):
    tensors, target, options = make(shape, dtype, option)
    for workspace in (None, 24 * shape[2] * dtype.itemsize):
        some = tensors if option != "plain" else tensors[:2]
        check(some, target, reduction=reduction, workspace_bytes=workspace, **options)


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities(serving, dtype, shape, option):
    if serving == "triton":
        pytest.skip("served by native and reference")
    for reduction in ("mean", "none"):
        tensors, target, options = make(shape, dtype, option, soft=True)
        workspace = 24 * shape[2] * dtype.itemsize
        check(tensors, target, reduction=reduction, workspace_bytes=workspace, **options)
        check(tensors, target.float(), reduction=reduction, **options)


def test_views():
    (x, w, b), target, options = make((30, 16, 70), torch.bfloat16, "all")
    doubled = torch.cat([w, w], 1)[:, 5:21]
    for input, weight in (
        (x.t().contiguous().t(), w), (x[:1].expand(30, 16), w), (x, w.t().contiguous().t()),
        (torch.cat([x, x], 1)[:, 3:19], doubled), (x.view(5, 6, 16).transpose(0, 1), w),
    ):  # fmt: skip
        labels = target if input.dim() == 2 else target.view(6, 5)
        check((input, weight, b), labels, workspace_bytes=7 * 72 * 2, **options)


def test_no_gradient_and_lse():
    (x, w, b), target, options = make((200, 64, 3001), torch.bfloat16, "all")
    with torch.no_grad():
        loss, lse = linear_cross_entropy(
            x, w, target, linear_bias=b, return_lse=True, workspace_bytes=64 * 3008 * 2, **options
        )
    exact = [t.double() for t in (x, w, b, options.pop("weight"))]
    oracle, oracle_lse = reference.linear_cross_entropy(
        *exact[:2], target, linear_bias=exact[2], weight=exact[3], return_lse=True, **options
    )
    torch.testing.assert_close(loss.double(), oracle, rtol=2e-2, atol=0)
    counted = target != -100
    torch.testing.assert_close(lse[counted].double(), oracle_lse[counted], rtol=1e-2, atol=1e-2)
    assert not lse[~counted].any()


@both_vocabularies
def test_ignored_rows_are_never_read(classes):
    tensors, target, options = make((300, 64, classes), torch.bfloat16, "all")
    clean = evaluate(linear_cross_entropy, tensors, target, **options)
    poisoned = tensors[0].clone()
    poisoned[target == -100] = math.nan
    for workspace in (None, 70 * 1016 * 2):
        again = evaluate(
            linear_cross_entropy, (poisoned, *tensors[1:]), target, workspace_bytes=workspace,
            **options,
        )  # fmt: skip
        assert all(t.isfinite().all() for t in again)
        assert not again[1][target == -100].any()
        if workspace is None:
            assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(reduction):
    tensors, target, _ = make((40, 32, 500), torch.bfloat16, ignored=1.0)
    loss, *gradients = evaluate(linear_cross_entropy, tensors, target, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert not any(gradient.any() for gradient in gradients)


def test_label_out_of_range_is_nan():
    (x, w, _), target, _ = make((12, 8, 20), torch.float32, ignored=0.0)
    target[3], target[5] = 20, -1
    loss = linear_cross_entropy(x.requires_grad_(), w, target, reduction="none")
    assert loss.isnan().nonzero()[:, 0].tolist() == [3, 5]
    assert linear_cross_entropy(x, w, target).isnan()


@pytest.mark.parametrize("classes", [5003, 5000])
def test_same_bits_again(classes):
    tensors, target, options = make((500, 256, classes), torch.bfloat16, "all")
    for workspace in (None, 128 * 5008 * 2):
        runs = [
            evaluate(linear_cross_entropy, tensors, target, workspace_bytes=workspace, **options)
            for _ in range(3)
        ]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
        with torch.no_grad():
            losses = {
                linear_cross_entropy(
                    *tensors[:2], target, workspace_bytes=workspace, **options
                ).item()
                for _ in range(3)
            }
        assert len(losses) == 1


def test_float32_accumulation_over_chunks():
    tensors, target, _ = make((2048, 64, 512), torch.bfloat16)
    oracle = evaluate(reference.linear_cross_entropy, tensors[:2], target, double=True)[2]
    errors = [
        (
            evaluate(linear_cross_entropy, tensors[:2], target, workspace_bytes=rows * 512 * 2)[2]
            - oracle
        ).abs().max()
        for rows in (2048, 128)
    ]  # fmt: skip
    assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_backward_twice(upstream):
    (x, w, _), target, _ = make((100, 64, 999), torch.bfloat16)
    leaves = x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, target) * upstream
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert_near(a, b)


def training_step(tensors, target, options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options)
    with torch.no_grad():
        evaluated = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options)
    return loss.detach(), evaluated, *torch.autograd.grad(loss, leaves)


@pytest.fixture
def no_waiting():
    """The device's count of kept rows, its loss and its upstream gradient stay there."""
    mode = torch.cuda.get_sync_debug_mode()

    def start():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode(mode)


@both_vocabularies
@pytest.mark.parametrize("option", OPTIONS)
def test_no_synchronization(no_waiting, option, classes):
    tensors, target, options = make((300, 64, classes), torch.bfloat16, option)
    training_step(tensors, target, options)  # compiles, tunes and creates handles
    no_waiting()
    for workspace in (None, 64 * 1016 * 2):
        training_step(tensors, target, {**options, "workspace_bytes": workspace})


@both_vocabularies
@pytest.mark.parametrize("workspace", [None, 64 * 1016 * 2])
def test_graph_capture(workspace, classes):
    tensors, target, options = make((300, 64, classes), torch.bfloat16, "all")
    options["workspace_bytes"] = workspace
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(tensors, target, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(tensors, target, options)
    tensors[0].copy_(torch.randn_like(tensors[0]))
    target.copy_(torch.where(torch.rand(300, device=DEVICE) < 0.5, -100, target.clamp_min(0)))
    graph.replay()
    for replayed, eager in zip(captured, training_step(tensors, target, options), strict=True):
        assert torch.equal(replayed, eager)


@both_vocabularies
def test_runs_on_the_current_stream(classes):
    """Behind a sleep on a side stream: a launch on the default stream would read the old input."""
    tensors, target, options = make((300, 64, classes), torch.bfloat16, "all")
    fresh = torch.randn_like(tensors[0])
    wanted = training_step((fresh, *tensors[1:]), target, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tensors[0].copy_(fresh)
        got = training_step(tensors, target, options)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@both_vocabularies
def test_another_device(classes):
    tensors, target, options = make((300, 64, classes), torch.bfloat16, "all", device="cuda:1")
    with torch.cuda.device(0):
        check(tensors, target, **options)


@pytest.mark.slow
def test_logits_past_two_to_the_31():
    """One chunk of more than 2^31 logits, as rows x classes and as the bytes of its rows."""
    rows, features, classes = 16500, 64, 131072
    assert rows * classes > 2**31
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of device memory")
    tensors, target, _ = make((rows, features, classes), torch.bfloat16)
    x, w, _ = tensors
    loss, grad_x, grad_w = evaluate(
        linear_cross_entropy, (x, w), target, workspace_bytes=rows * classes * 2
    )
    chunked = evaluate(linear_cross_entropy, (x, w), target, workspace_bytes=1 << 30)
    for a, b in zip((loss, grad_x, grad_w), chunked, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("option", ["plain", "smoothing"])
def test_memory_without_gradients(serving, option):
    """No logits: a chunk of the input, and a few bytes per row and tile of classes."""
    if serving in ("native-cublas", "triton"):
        pytest.skip("stores a chunk of logits")
    tensors, target, options = make((8192, 4096, 128256), torch.bfloat16, option)
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            linear_cross_entropy(*tensors[:2], target, **options)
            peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert peak <= 16e6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows_are_kept_of_a_chunk(reduction):
    """Chunks of ignored rows, and one whose last tile is partly there."""
    tensors, target, options = make((1200, 64, 776), torch.bfloat16, "all", ignored=0.0)
    target[torch.randperm(1200, device=DEVICE)[:901]] = -100
    for rows in (256, 64):
        check(tensors, target, workspace_bytes=rows * 776 * 2, reduction=reduction, **options)


def test_under_the_sanitizer(serving):
    if serving == "triton":
        pytest.skip("only native")
    memcheck("""
import torch, fastnn
x, w = (torch.randn(n, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (300, 776))
target = torch.randint(776, (300,), device="cuda")
target[::2] = -100
for workspace in (None, 64 * 776 * 2):
    options = dict(label_smoothing=0.1, workspace_bytes=workspace)
    fastnn.linear_cross_entropy(x, w, target, **options).backward()
    with torch.no_grad():
        fastnn.linear_cross_entropy(x, w, target, **options)
torch.cuda.synchronize()
""")


def test_a_product_of_another_name_is_an_error(serving, monkeypatch):
    if serving == "triton":
        pytest.skip("only native has a choice")
    monkeypatch.setenv("FASTNN_LINEAR_CROSS_ENTROPY", "fastest")
    (x, w, _), target, _ = make((8, 16, 24), torch.bfloat16)
    with pytest.raises(RuntimeError, match="must be sm90, portable or cublas"):
        linear_cross_entropy(x, w, target)


def test_peak_memory(serving):
    """Beside the float gradient of the weight: a chunk of logits and one of the input."""
    rows, features, classes = 16384, 1024, 32000
    tensors, target, _ = make((rows, features, classes), torch.bfloat16)
    workspace = 64 << 20
    for _ in range(2):  # the first call pays for the GEMMs' workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = evaluate(linear_cross_entropy, tensors[:2], target, workspace_bytes=workspace)
        peak = torch.cuda.max_memory_allocated() - before
        returned = sum(t.nbytes for t in results)
    in_float = classes * features * 4
    assert peak - returned <= in_float + 1.25 * workspace
