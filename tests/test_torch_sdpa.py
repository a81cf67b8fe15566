import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn import attention
from fastnn.integrations import torch_sdpa

STOCK = F.scaled_dot_product_attention


@pytest.fixture
def served(monkeypatch):
    """Counts the calls that fastnn's function serves."""
    calls = []
    function = attention.scaled_dot_product_attention

    def counting(*arguments, **options):
        out = function(*arguments, **options)
        calls.append(out)
        return out

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counting)
    return calls


def qkv(heads=2, kv_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, heads, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 8))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_nothing_is_routed_outside(served):
    assert F.scaled_dot_product_attention is STOCK
    with torch_sdpa.routed():
        assert F.scaled_dot_product_attention is not STOCK
    assert F.scaled_dot_product_attention is STOCK
    F.scaled_dot_product_attention(*qkv())
    assert not served


@pytest.mark.parametrize(
    "options",
    [
        {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(5, 7) > 0.3},
        {"attn_mask": torch.randn(2, 1, 5, 7, dtype=torch.float64)}, {"enable_gqa": True},
    ],
    ids=["plain", "causal", "scale", "mask", "bias", "gqa"],
)  # fmt: skip
def test_results_are_torchs(options, served):
    inputs = qkv(heads=4 if "enable_gqa" in options else 2)
    results = []
    for routed in (False, True):
        if routed:
            torch_sdpa.enable()
        try:
            out = F.scaled_dot_product_attention(*inputs, **options)
        finally:
            if routed:
                torch_sdpa.disable()
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert len(served) == 1
    torch.testing.assert_close(results[1], results[0])


def test_modules_are_routed_and_dropout_served(served):
    module = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, 16)
    with torch_sdpa.routed():
        module(x, x, x, need_weights=False)[0].sum().backward()
    assert len(served) == 1 and module.in_proj_weight.grad is not None


def test_nesting_and_errors(served):
    with pytest.raises(ZeroDivisionError), torch_sdpa.routed():
        with torch_sdpa.routed():
            pass
        F.scaled_dot_product_attention(*qkv())
        raise ZeroDivisionError
    assert len(served) == 1 and F.scaled_dot_product_attention is STOCK
    with pytest.raises(RuntimeError, match="not enabled"):
        torch_sdpa.disable()


def test_kept_and_wrapped_functions_stop_routing(served):
    torch_sdpa.enable()
    kept = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *arguments: kept(*arguments)
    try:
        torch_sdpa.disable()
        F.scaled_dot_product_attention(*qkv())
        assert not served
    finally:
        F.scaled_dot_product_attention = STOCK


def test_other_threads_are_routed(served):
    with torch_sdpa.routed():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv()))
        thread.start()
        thread.join()
    assert len(served) == 1


def test_what_cannot_be_served_goes_to_torch(served):
    class Marked(torch.Tensor):
        pass

    inputs = [x.detach() for x in qkv()]
    expected = STOCK(*inputs)
    with torch_sdpa.routed():
        marked = F.scaled_dot_product_attention(*(x.as_subclass(Marked) for x in inputs))
        assert isinstance(marked, Marked) and torch.equal(
            marked.as_subclass(torch.Tensor), expected
        )
        assert not served
        meta = F.scaled_dot_product_attention(*(x.to("meta") for x in inputs))
        assert meta.is_meta and meta.shape == expected.shape
        nested = [torch.nested.nested_tensor([x[0], x[1]]) for x in inputs]
        assert F.scaled_dot_product_attention(*nested).is_nested
        with fastnn.use_backend("triton"):  # which has no float64
            assert torch.equal(F.scaled_dot_product_attention(*inputs), expected)


def test_what_is_left_to_torch_does_not_come_back(monkeypatch, served):
    monkeypatch.setattr(attention, "_TORCH_UP_TO", 2**20)
    inputs = qkv(dtype=torch.float32)
    with torch_sdpa.routed():
        assert torch.equal(F.scaled_dot_product_attention(*inputs), STOCK(*inputs))
    assert len(served) == 1


def test_disabled_and_twice_differentiable(served):
    inputs = qkv()
    with torch_sdpa.routed():
        with fastnn.use_backend("reference"):
            torch.testing.assert_close(F.scaled_dot_product_attention(*inputs), STOCK(*inputs))
        out = F.scaled_dot_product_attention(*inputs)
        (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        torch.autograd.grad(first.square().sum(), inputs[1])


def test_compiles():
    inputs = qkv(dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(*tensors):
        return F.scaled_dot_product_attention(*tensors)

    with torch_sdpa.routed():
        torch.testing.assert_close(function(*inputs), STOCK(*inputs), rtol=1e-4, atol=1e-5)
