"""Attention over packed sequences on a device, by the C++ kernels: pytest -m gpu."""

import math

import pytest
import torch
from attention_cases import DTYPES, cast, leaves_of
from varlen_cases import OPTIONS, RAGGED, compare, operands, results, starts

from fastnn import _ops, backend
from fastnn.linear_act import dropout_seed, keep_mask
from fastnn.varlen_attention import varlen_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HALVES = (torch.bfloat16, torch.float16)
# Heads, heads of keys, widths: every padded one, and one key head for many.
WIDTHS = ((4, 2, 16, 24), (8, 1, 64, 64), (2, 2, 72, 128), (2, 1, 256, 200))


@pytest.fixture(autouse=True)
def native():
    with backend.use_backend("native"):
        yield


def packed(query, key, value, starts_q, starts_k, *rest, **named):
    """With starts on the device, of which the references want the numbers."""
    return varlen_attention(query, key, value, starts_q.to(DEVICE), starts_k.to(DEVICE), *rest,
                            **named)  # fmt: skip


def make(dtype, option="plain", lengths=RAGGED, widths=WIDTHS[0]):
    qkv, grad_out = operands(lengths, dtype, *widths)
    options = OPTIONS[option](widths[0], dtype)
    options = {n: t.to(DEVICE) if torch.is_tensor(t) else t for n, t in options.items()}
    return [t.to(DEVICE) for t in qkv], options, grad_out.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, dtype):
    torch.manual_seed(1)
    for widths in WIDTHS:
        qkv, options, grad_out = make(dtype, option, widths=widths)
        grad_lse = torch.randn(widths[0], sum(RAGGED[0]), device=DEVICE)
        compare(qkv, RAGGED, options, grad_out, grad_lse, function=packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_packed_projections(dtype):
    torch.manual_seed(2)
    lengths = (5, 0, 200), (5, 0, 200)
    projections = torch.randn(205, 3, 3, 64, device=DEVICE).to(dtype)
    grad_out = torch.randn(1, 3, 64, device=DEVICE).to(dtype).expand(205, -1, -1)
    compare(projections.unbind(1), lengths, {"is_causal": True}, grad_out, function=packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_generators_mask(dtype):
    """Of a matrix of the rows of all heads and the longest sequence's keys, as on the CPU."""
    torch.manual_seed(3)
    qkv, _, grad_out = make(dtype)
    torch.manual_seed(10)
    seed = dropout_seed(qkv[0].device)
    keep = keep_mask(_ops.NATIVE, (4, sum(RAGGED[0]), max(RAGGED[1])), 0.3, seed, qkv[0].float())

    def seeded(*arguments, **named):
        torch.manual_seed(10)
        return packed(*arguments, **named)

    compare(qkv, RAGGED, {"is_causal": True}, grad_out, function=seeded, keep=(0.3, keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_rows_over_a_long_cache(dtype):
    """The keys are split, and the heads of a group share a tile."""
    torch.manual_seed(4)
    lengths = (1, 3, 0, 2, 1), (5000, 40, 7, 2600, 0)
    for option in ("bottom_right", "sinks", "everything"):
        qkv, options, grad_out = make(dtype, option, lengths, (8, 2, 128, 128))
        compare(qkv, lengths, options, grad_out, function=packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_other_sequences_do_not_leak(dtype, poison):
    torch.manual_seed(5)
    lengths = (2, 70, 5, 130), (40, 70, 3, 300)
    qkv, _, grad_out = make(dtype, lengths=lengths)
    clean = results(packed, leaves_of(qkv), lengths, {}, grad_out)
    rows, keys = (starts(n).tolist() for n in lengths)
    poisoned = [t.clone() for t in qkv]
    poisoned[0][rows[1] : rows[2]] = poison
    for tensor in poisoned[1:]:
        tensor[keys[1] : keys[2]] = poison
    for name, tensor in results(packed, leaves_of(poisoned), lengths, {}, grad_out).items():
        begin, end = (keys if name in ("key", "value") else rows)[1:3]
        assert torch.equal(tensor[:begin], clean[name][:begin]), name
        assert torch.equal(tensor[end:], clean[name][end:]), name
    assert not torch.isfinite(packed(*poisoned, *map(starts, lengths), 130, 300,
                                     enable_gqa=True)[rows[1] : rows[2]]).any()  # fmt: skip


@pytest.mark.parametrize("lengths", (((), ()), ((0, 0), (0, 0)), ((0,), (4,)), ((3, 1), (0, 0))),
                         ids=str)  # fmt: skip
def test_empty(lengths):
    qkv, _, grad_out = make(torch.float32, lengths=lengths, widths=(2, 2, 8, 4))
    leaves = leaves_of(qkv)
    longest = [max(n, default=0) for n in lengths]
    out, lse = packed(*leaves, *map(starts, lengths), *longest, return_lse=True)
    assert out.shape == grad_out.shape and not out.any() and (lse == -math.inf).all()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, grad_out), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_repeats_and_starts_of_int64(dtype):
    torch.manual_seed(6)
    qkv, options, grad_out = make(dtype, "everything")
    runs = []
    for kind in (torch.int32, torch.int32, torch.int64):
        torch.manual_seed(7)
        runs.append(
            results(
                lambda *a, kind=kind, **named: packed(*a[:3], *(s.to(kind) for s in a[3:5]), *a[5:],
                                                      **named),
                leaves_of(qkv), RAGGED, cast(options, dtype), grad_out, dropout_p=0.2,
            )
        )  # fmt: skip
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in other)


def test_no_synchronization_and_graph_capture():
    torch.manual_seed(8)
    qkv, _, grad_out = make(torch.bfloat16)
    lengths = [starts(n).to(DEVICE) for n in RAGGED]
    seed = torch.tensor((1234, 56), device=DEVICE)
    rest = (*lengths, max(RAGGED[0]), max(RAGGED[1]), None, None, seed, 0.1, 0.3, 5.0, True, -1, 0)

    def step():
        out, lse = _ops.NATIVE.varlen_attention_forward(*qkv, *rest)
        return (
            out,
            lse,
            *_ops.NATIVE.varlen_attention_backward(
                grad_out, None, *qkv, *rest[:7], out, lse, *rest[7:], [True, True, True, False]
            )[:3],
        )

    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(1, 4, 2, 8)), "query must be of shape"),
        (dict(dim=264), "query must be of a head dimension up to 256"),
        (dict(cu_seqlens_q=torch.tensor([0, 4])), "cu_seqlens_q must be"),
        (dict(cu_seqlens_k=torch.zeros(3, dtype=torch.int32)), "cu_seqlens_k must be as long"),
        (dict(max_seqlen_k=-1), "max_seqlen_k must be from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(change, message):
    zeros = torch.zeros(4, 2, change.get("dim", 8), device=DEVICE)
    arguments = dict(
        query=zeros, key=zeros, value=zeros, cu_seqlens_q=starts((4,)), cu_seqlens_k=starts((4,)),
        max_seqlen_q=4, max_seqlen_k=4,
    ) | {name: value for name, value in change.items() if name != "dim"}  # fmt: skip
    arguments = [t.to(DEVICE) if torch.is_tensor(t) else t for t in arguments.values()]
    with pytest.raises(RuntimeError, match=message):
        _ops.NATIVE.varlen_attention_forward(
            *arguments, None, None, None, 0.0, 1.0, 0.0, False, -1, -1
        )


def test_opcheck():
    lengths = (3, 0, 4), (5, 2, 0)
    qkv, _, grad_out = make(torch.float32, lengths=lengths)
    rest = (*(starts(n).to(DEVICE) for n in lengths), 4, 5, None, None, None,
            0.0, 0.3, 0.0, False, -1, -1)  # fmt: skip
    torch.library.opcheck(_ops.NATIVE.varlen_attention_forward, (*qkv, *rest))
    out, lse = _ops.NATIVE.varlen_attention_forward(*qkv, *rest)
    torch.library.opcheck(
        _ops.NATIVE.varlen_attention_backward,
        (grad_out, lse, *qkv, *rest[:7], out, lse, *rest[7:], [True, True, True, False]),
    )
