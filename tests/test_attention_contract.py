"""Attention: what PyTorch asks of an operator, arguments that do not fit, memory, AVX2."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import NATIVE, leaves_of, operands

from fastnn import backend
from fastnn.attention import scaled_dot_product_attention as attention

pytestmark = NATIVE


def test_compile_and_func():
    torch.manual_seed(20)
    qkv, grad_out = operands((1, 2, 2, 20, 24, 8, 8), torch.float32)
    mask = torch.randn(20, 24)

    def function(q, k, v, mask):
        return attention(q, k, v, mask, softcap=4.0, window=(9, 9))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first = leaves_of((*qkv, mask))
    second = leaves_of((*qkv, mask))
    a, b = compiled(*first), function(*second)
    assert torch.equal(a, b)
    for x, y in zip(
        torch.autograd.grad(a, first, grad_out),
        torch.autograd.grad(b, second, grad_out),
        strict=True,
    ):
        assert torch.equal(x, y)
    gradient = torch.func.grad(lambda q: (function(q, *qkv[1:], mask) * grad_out).sum())(qkv[0])
    torch.testing.assert_close(
        gradient, torch.autograd.grad(function(*second), second, grad_out)[0]
    )


def test_compile_dropout():
    q = torch.randn(1, 2, 30, 8)
    compiled = torch.compile(
        lambda q: attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(1)
    first = compiled(q)
    second = compiled(q)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(q)) and not torch.equal(first, second)


def test_opcheck():
    torch.manual_seed(21)
    seed = torch.tensor([1, 2])
    forward = torch.ops.fastnn.attention_forward.default
    backward = torch.ops.fastnn.attention_backward.default
    for dtype in (torch.float32, torch.bfloat16):
        qkv, grad_out = operands((1, 4, 2, 9, 11, 8, 6), dtype, "permuted")
        mask, slopes, sinks = torch.randn(9, 11).to(dtype), torch.rand(4), torch.randn(4).to(dtype)
        options = (0.3, 0.25, 2.0, True, 5, -1)
        arguments = (*qkv, mask, slopes, sinks, seed, *options)
        torch.library.opcheck(forward, arguments)
        torch.library.opcheck(forward, (*qkv, None, None, None, None, 0.0, 1.0, 0.0, False, -1, 0))
        out, lse = forward(*arguments)
        for wanted in ((True,) * 5, (False, True, False, False, True)):
            torch.library.opcheck(
                backward,
                (grad_out, torch.randn(lse.shape), *qkv, mask, slopes, sinks, seed, out, lse,
                 *options, list(wanted)),
            )  # fmt: skip


def test_autocast():
    torch.manual_seed(22)
    q, k, v = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert ours.dtype == torchs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(ours.float().square().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_float_mask_with_half_inputs():
    torch.manual_seed(23)
    qkv, grad_out = operands((1, 2, 2, 20, 30, 16, 16), torch.bfloat16)
    mask = torch.randn(20, 30, requires_grad=True)
    out = attention(*qkv, mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(*qkv, mask.detach()), rtol=2e-2, atol=2e-2
    )
    assert torch.autograd.grad(out, mask, grad_out)[0].dtype == torch.float32


def test_window_of_one_width():
    q = torch.randn(1, 2, 20, 8)
    assert torch.equal(attention(q, q, q, window=3), attention(q, q, q, window=(3, 3)))
    causal = attention(q, q, q, is_causal=True)
    assert torch.equal(attention(q, q, q, window=(None, 0)), causal)
    assert torch.equal(attention(q, q, q, window=(-1, 0)), causal)
    assert torch.equal(attention(q, q, q, window=sys.maxsize), attention(q, q, q))


def changed(**changes):
    q = torch.randn(2, 4, 5, 8)
    return {"query": q, "key": torch.randn(2, 4, 6, 8), "value": torch.randn(2, 4, 6, 8)} | changes


@pytest.mark.parametrize(
    "changes, error, argument",
    (
        ({"query": [1]}, TypeError, "query"),
        ({"attn_mask": 1}, TypeError, "attn_mask"),
        ({"query": torch.randn(8)}, RuntimeError, "query"),
        ({"key": torch.randn(2, 4, 6, 9)}, RuntimeError, "key"),
        ({"value": torch.randn(2, 4, 7, 8)}, RuntimeError, "value"),
        ({"key": torch.randn(2, 4, 6, 8).double()}, RuntimeError, "key"),
        ({"value": torch.empty(2, 4, 6, 8, device="meta")}, RuntimeError, "value"),
        ({"key": torch.randn(2, 3, 6, 8)}, RuntimeError, "key"),
        ({"key": torch.randn(2, 3, 6, 8), "enable_gqa": True}, RuntimeError, "key"),
        ({"value": torch.randn(2, 3, 6, 8), "enable_gqa": True}, RuntimeError, "value"),
        ({"key": torch.randn(3, 4, 6, 8)}, RuntimeError, "key"),
        ({"dropout_p": 1.5}, RuntimeError, "dropout_p"),
        ({"dropout_p": -0.1}, RuntimeError, "dropout_p"),
        ({"attn_mask": torch.ones(5, 6).bool(), "is_causal": True}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 5).bool()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(3, 1, 5, 6).bool()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(1, 2, 4, 5, 6).bool()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 6).long()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 6).double()}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.ones(5, 6, device="meta")}, RuntimeError, "attn_mask"),
        ({"causal_alignment": "middle"}, ValueError, "causal_alignment"),
        ({"window": (1, 2, 3)}, ValueError, "window"),
        ({"window": -2}, ValueError, "window"),
        ({"window": (1.5, 2)}, ValueError, "window"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"alibi_slopes": torch.ones(3)}, RuntimeError, "alibi_slopes"),
        ({"sinks": torch.ones(4).long()}, RuntimeError, "sinks"),
        ({"sinks": 1.0}, TypeError, "sinks"),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(changes, error, argument):
    with pytest.raises(error, match=f"scaled_dot_product_attention: {argument} must be .*, got "):
        attention(**changed(**changes))


def test_raw_operators_check_their_arguments():
    forward = torch.ops.fastnn.attention_forward.default
    q = torch.randn(1, 2, 3, 4)
    options = (0.0, 1.0, 0.0, False, -1, -1)
    with pytest.raises(RuntimeError, match="key must be of shape"):
        forward(q, torch.randn(1, 2, 3, 5), q, None, None, None, None, *options)
    with pytest.raises(RuntimeError, match="seed must be given"):
        forward(q, q, q, None, None, None, None, 0.5, *options[1:])
    with pytest.raises(RuntimeError, match="attn_mask must be broadcastable"):
        forward(q, q, q, torch.ones(2, 3), None, None, None, *options)


def test_backends():
    q = torch.randn(1, 2, 5, 8)
    with backend.use_backend("reference"):
        plain = attention(q, q, q, window=2, sinks=torch.zeros(2))
    with backend.use_backend("native"):
        torch.testing.assert_close(attention(q, q, q, window=2, sinks=torch.zeros(2)), plain)
        with pytest.raises(NotImplementedError, match="alibi_slopes"):
            attention(q, q, q, alibi_slopes=torch.ones(2, requires_grad=True))
    slopes = torch.ones(2, requires_grad=True)
    attention(q, q, q, alibi_slopes=slopes).sum().backward()
    assert slopes.grad is not None


def test_auto_leaves_small_plain_calls_to_torch(monkeypatch):
    monkeypatch.setattr("fastnn.attention._TORCH_UP_TO", 4 * 9 * 7 * 8)
    served = []
    monkeypatch.setattr(backend, "resolve", lambda *args, **features: served.append(args))
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 7, 8)
    assert torch.equal(
        attention(q, k, k, scale=0.3), F.scaled_dot_product_attention(q, k, k, scale=0.3)
    )
    assert not served
    for more in (
        {"attn_mask": torch.ones(9, 7, dtype=torch.bool)}, {"dropout_p": 0.5}, {"is_causal": True},
        {"window": 2}, {"softcap": 1.0}, {"sinks": torch.ones(2)}, {"return_lse": True},
        {"enable_gqa": True},
    ):  # fmt: skip
        attention(q, k, k, **more)
        assert served.pop(), more
    for other in (q.repeat(2, 1, 1, 1), q.double(), q.bfloat16()):
        attention(other, other, other)
        assert served.pop(), other.shape
    with backend.use_backend("native"):
        attention(q, k, k)
    assert served


MEMORY = """
import resource, sys, torch
from fastnn.attention import scaled_dot_product_attention
s = int(sys.argv[1])
q, k, v = (torch.randn(1, 2, s, 32, requires_grad=True) for _ in range(3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scaled_dot_product_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], None, 0.1).sum().backward()
before = peak()
scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum().backward()
print(peak() - before)
"""


def test_memory_grows_linearly_with_dropout():
    """S x S floats of one head at S = 4096 would be 64 MiB, and of two heads 128."""
    used = subprocess.run(
        [sys.executable, "-c", MEMORY, "4096"], capture_output=True, text=True, check=True
    )
    assert int(used.stdout) < 40 * 1024  # KiB: ten tensors of 1 MiB, packed copies and tiles


def test_lower_instruction_set():
    """The AVX2 kernels, whatever this machine has."""
    script = """
import torch
from fastnn import _C
from fastnn.attention import scaled_dot_product_attention as attention
assert _C.cpu_capability() == "AVX2"
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    q, k, v = (torch.randn(1, 2, 140, 24).to(dtype).requires_grad_() for _ in range(3))
    ours = attention(q, k, v, is_causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    a = torch.autograd.grad(ours.square().sum(), (q, k, v))
    b = torch.autograd.grad(plain.square().sum(), (q, k, v))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=10 * tolerance, atol=10 * tolerance)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
