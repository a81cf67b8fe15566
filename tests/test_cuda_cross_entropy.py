"""The CUDA cross-entropy operators on a device: pytest -m gpu."""

import math

import pytest
import torch
from conftest import assert_close_to_oracle
from test_cuda_on_host import OPTIONS, expected, layout_of

from fastnn import _ops

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One class, prime, a warp and a block per row, clusters (few rows), lanes per row, no rows.
SHAPES = [
    (5, 1), (64, 131), (8192, 1000), (7, 50257), (3, 262144), (97,), (4, 21, 65, 3), (2, 5, 40),
    (0, 5), (3, 5, 0),
]  # fmt: skip


def forward(logits, target, weight, options):
    return _ops.NATIVE.cross_entropy_forward(logits, target, weight, *arguments(options))


def backward(saved, grad_loss, grad_lse, options, mask):
    return _ops.NATIVE.cross_entropy_backward(
        grad_loss, grad_lse, *saved, *arguments(options), list(mask)
    )


def arguments(options):
    names = ("reduction", "ignore_index", "label_smoothing", "z_loss", "softcap")
    defaults = ("mean", -100, 0.0, 0.0, 0.0)
    return [options.get(name, default) for name, default in zip(names, defaults, strict=True)]


def rows_of(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def inputs(shape, dtype, layout="contiguous", prob=False, weighted=False, ignore_index=-100):
    generator = torch.Generator().manual_seed(1)
    classes = shape[min(1, len(shape) - 1)]
    values = (3.0 * torch.randn(shape, generator=generator)).to(dtype)
    strides, offset = layout_of(shape, layout)
    room = sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True)) + 1 + offset
    logits = torch.empty(room, dtype=dtype, device=DEVICE).as_strided(shape, strides, offset)
    logits.copy_(values)
    if prob:
        target = torch.rand(shape, generator=generator).softmax(min(1, len(shape) - 1)).to(dtype)
    else:
        target = torch.randint(classes, rows_of(shape), generator=generator)
        target.view(-1)[1:2] = ignore_index
    weight = (torch.rand(classes, generator=generator) + 0.5).to(dtype) if weighted else None
    return logits, target.to(DEVICE), None if weight is None else weight.to(DEVICE)


def check(shape, dtype, layout="contiguous", prob=False, weighted=False, with_lse=False, **options):
    options.setdefault("reduction", "mean")
    ignore_index = options.get("ignore_index", -100)
    logits, target, weight = inputs(shape, dtype, layout, prob, weighted, ignore_index)
    before = logits.clone()
    rows = rows_of(shape)
    grad_loss = torch.randn(rows if options["reduction"] == "none" else (), device=DEVICE)
    grad_lse = torch.randn(rows, device=DEVICE) if with_lse else None
    loss, lse, total = forward(logits, target, weight, options)
    saved = (logits, target, weight, lse, total)
    gradients = backward(saved, grad_loss, grad_lse, options, (True, prob))
    assert torch.equal(logits, before), "the input changed"
    wanted = (logits, target, weight, options, grad_loss, grad_lse)
    oracle, torchs = expected(*wanted, torch.float64), expected(*wanted, dtype)
    names = ("loss", "lse", "grad_logits", "grad_target")
    results = zip(names, (loss, lse, *gradients), torchs, oracle, strict=False)
    for what, ours, theirs, exact in results:
        assert_close_to_oracle(ours.to(theirs.dtype), theirs, exact, what=what)
    for first, second in zip(
        (loss, lse, total), forward(logits, target, weight, options), strict=True
    ):
        assert torch.equal(first, second) or first.isnan().all(), "a rerun changed a bit"
    again = backward(saved, grad_loss, grad_lse, options, (True, prob))
    assert all(torch.equal(first, second) for first, second in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "offset", "padded", "classes_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(shape, layout, dtype):
    check(shape, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    for shape in ((65, 259), (9, 32000), (600, 40000), (2, 6, 35)):
        check(shape, dtype, **OPTIONS[name])


def test_invalid_labels_give_nan():
    logits = torch.randn(4, 4000, device=DEVICE)
    target = torch.tensor([4000, -1, -100, 0], device=DEVICE)
    options = {"reduction": "none"}
    loss, lse, total = forward(logits, target, None, options)
    assert loss.isnan().tolist() == [True, True, False, False] and loss[2] == 0
    saved = (logits, target, None, lse, total)
    gradient, _ = backward(saved, torch.ones_like(loss), None, options, (True, False))
    assert gradient.isnan().all(1).tolist() == [True, True, False, False]
    assert (gradient[2] == 0).all() and gradient[3].isfinite().all()


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    classes = 131072
    rows = 2**31 // classes + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * classes * 2:
        pytest.skip("needs 13 GB of device memory")
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    logits.normal_()
    target = torch.randint(classes, (rows,), device=DEVICE)
    options = {"reduction": "none"}
    loss, lse, total = forward(logits, target, None, options)
    saved = (logits, target, None, lse, total)
    gradient, _ = backward(saved, torch.ones_like(loss), None, options, (True, False))
    for row in (0, rows // 2, rows - 2, rows - 1):
        one = (logits[row : row + 1], target[row : row + 1], None, options, loss.new_ones(1), None)
        oracle, torchs = expected(*one, torch.float64), expected(*one, torch.bfloat16)
        ours = loss[row : row + 1].bfloat16()
        assert_close_to_oracle(ours, torchs[0], oracle[0], what=f"loss of row {row}")
        gradient_row = gradient[row : row + 1]
        assert_close_to_oracle(gradient_row, torchs[2], oracle[2], what=f"gradient of row {row}")


def step(logits, target, options):
    loss, lse, total = forward(logits, target, None, options)
    saved = (logits, target, None, lse, total)
    return loss, backward(saved, torch.ones_like(loss), None, options, (True, False))[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_graph_capture(reduction):
    options = {"reduction": reduction, "label_smoothing": 0.1}
    logits, target, _ = inputs((33, 5000), torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(logits, target, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, target, options)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    for replayed, eager in zip(captured, step(logits, target, options), strict=True):
        assert torch.equal(replayed, eager)


def test_no_synchronization():
    logits, target, weight = inputs((33, 5000), torch.bfloat16, weighted=True)
    probabilities = inputs((33, 5000), torch.bfloat16, prob=True)[1]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in OPTIONS.values():
            prob = options.get("prob", False)
            call = {k: v for k, v in options.items() if k not in ("weighted", "with_lse", "prob")}
            against = probabilities if prob else target
            loss, lse, total = forward(logits, against, weight, call)
            saved = (logits, against, weight, lse, total)
            backward(saved, torch.ones_like(loss), None, call, (True, prob))
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_runs_on_the_current_stream():
    """Behind a sleep on a side stream: a launch on the default stream would read the old logits."""
    logits, target, _ = inputs((64, 5000), torch.float32)
    fresh = torch.randn_like(logits)
    wanted = step(fresh, target, {})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits.copy_(fresh)
        got = step(logits, target, {})
    stream.synchronize()
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device():
    logits, target, _ = inputs((33, 5000), torch.bfloat16)
    wanted = step(logits, target, {})
    with torch.cuda.device(0):
        got = step(logits.to("cuda:1"), target.to("cuda:1"), {})
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))


def test_unwanted_gradients_are_empty():
    logits, target, _ = inputs((8, 100), torch.float32, prob=True)
    loss, lse, total = forward(logits, target, None, {})
    saved = (logits, target, None, lse, total)
    for mask in ((True, False), (False, True), (False, False)):
        gradients = backward(saved, torch.ones_like(loss), None, {}, mask)
        shapes = [tuple(logits.shape) if wanted else (0,) for wanted in mask]
        assert [tuple(g.shape) for g in gradients] == shapes


def test_all_ignored():
    logits, target, _ = inputs((8, 100), torch.float32)
    target.fill_(-100)
    loss, lse, total = forward(logits, target, None, {})
    assert loss.isnan() and total == 0
    saved = (logits, target, None, lse, total)
    gradient, _ = backward(saved, torch.ones_like(loss), None, {}, (True, False))
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.zeros(7, dtype=torch.int64)), "target must be of shape"),
        (dict(target=torch.zeros(8, dtype=torch.int32)), "target must be"),
        (dict(weight=torch.ones(99)), "weight must be of shape"),
        (dict(label_smoothing=1.5), "label_smoothing must be in"),
        (dict(label_smoothing=math.nan), "label_smoothing must be in"),
        (dict(softcap=-1.0), "softcap must be"),
        (dict(reduction="average"), "reduction must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(change, message):
    logits, target, weight = inputs((8, 100), torch.float32)
    change = dict(change)
    target = change.pop("target", target).to(DEVICE)
    if "weight" in change:
        weight = change.pop("weight").to(DEVICE)
    with pytest.raises(RuntimeError, match=message):
        forward(logits, target, weight, change)
