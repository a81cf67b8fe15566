"""What the attention tests share: operands in every layout, options, results and their oracle."""

import math

import pytest
import torch
from conftest import assert_close_to_oracle

from fastnn import _ops, reference
from fastnn.attention import scaled_dot_product_attention as attention

NATIVE = pytest.mark.skipif(_ops.NATIVE_MISSING is not None, reason=str(_ops.NATIVE_MISSING))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "attn_mask", "sinks")
# B, Hq, Hkv, Sq, Sk, D, Dv: grouped heads, more than a block of each, few rows, odd widths
SHAPES = (
    (2, 4, 2, 37, 70, 16, 24),
    (1, 2, 2, 131, 300, 64, 64),
    (1, 3, 1, 2, 97, 40, 33),
    (1, 1, 1, 257, 127, 7, 130),
)


def values(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def lay_out(tensor, layout):
    """The same values in another memory layout."""
    if layout == "permuted":  # (B, S, H, D) in memory, as a model's projections leave it
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "column":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        padded = tensor.new_zeros([s + 3 for s in tensor.shape])
        view = padded[tuple(slice(2, 2 + s) for s in tensor.shape)]
        return view.copy_(tensor)
    return tensor


def middle(b, sk):
    """A padding mask: the keys about the middle, fewer of them in each sequence."""
    keys, half = torch.arange(sk), sk // torch.arange(3, 3 + b)[:, None, None, None] // 2
    return (keys - sk // 2).abs() <= half


OPTIONS = {
    "plain": lambda *_: {},
    "causal": lambda *_: {"is_causal": True},
    "bottom_right": lambda *_: {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": lambda *_: {"window": (5, 3)},
    "window_bottom_right": lambda *_: {"window": (40, 7), "causal_alignment": "bottom_right"},
    "scale": lambda *_: {"scale": -0.3},
    "softcap": lambda *_: {"softcap": 1.5},
    "alibi": lambda b, h, sq, sk, dtype: {"alibi_slopes": torch.rand(h), "is_causal": True},
    "sinks": lambda b, h, sq, sk, dtype: {"sinks": values((h,), dtype), "is_causal": True},
    "bool": lambda b, h, sq, sk, dtype: {"attn_mask": torch.rand(b, 1, sq, sk) > 0.3},
    "padding": lambda b, h, sq, sk, dtype: {"attn_mask": torch.rand(b, 1, 1, sk) > 0.3},
    # whole panels of keys, on both sides
    "sides": lambda b, h, sq, sk, dtype: {"attn_mask": middle(b, sk)},
    "additive_sides": lambda b, h, sq, sk, dtype: {
        "attn_mask": torch.zeros(b, 1, 1, sk, dtype=dtype).masked_fill(~middle(b, sk), -math.inf)
    },
    "additive": lambda b, h, sq, sk, dtype: {"attn_mask": values((b, h, sq, sk), dtype)},
    "additive_2d": lambda b, h, sq, sk, dtype: {"attn_mask": values((sq, sk), dtype)},
    "additive_keys": lambda b, h, sq, sk, dtype: {"attn_mask": values((h, 1, sk), dtype)},
    "everything": lambda b, h, sq, sk, dtype: {
        "attn_mask": values((h, sq, sk), dtype),
        "window": (60, 50),
        "softcap": 3.0,
        "alibi_slopes": torch.rand(b, h),
        "sinks": values((b, h), dtype),
        "causal_alignment": "bottom_right",
        "scale": 0.2,
    },
}


def cast(options, dtype):
    """The options as torch evaluates them in `dtype`; the mask and the sinks become leaves."""
    result = dict(options)
    for name in ("attn_mask", "alibi_slopes", "sinks"):
        t = result.get(name)
        if t is not None and t.is_floating_point():
            result[name] = t.detach().to(dtype).requires_grad_(name != "alibi_slopes")
    return result


def results(function, qkv, options, grad_out, grad_lse=None, **extra):
    """{name: tensor} of out, lse (if its gradient is given) and every gradient."""
    leaves = dict(zip(NAMES, (*qkv, options.get("attn_mask"), options.get("sinks")), strict=True))
    leaves = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    gqa = qkv[0].shape[-3] != qkv[1].shape[-3]
    outputs = function(*qkv, enable_gqa=gqa, return_lse=grad_lse is not None, **options, **extra)
    outputs = outputs if grad_lse is not None else (outputs,)
    upstream = [g.to(o.dtype) for g, o in zip((grad_out, grad_lse), outputs, strict=False)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(("out", "lse"), outputs, strict=False)) | dict(
        zip(leaves, gradients, strict=True)
    )


def leaves_of(qkv, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in qkv]


def compare(qkv, options, grad_out, grad_lse=None, function=attention):
    dtype = qkv[0].dtype
    mine = results(function, leaves_of(qkv), cast(options, dtype), grad_out, grad_lse)
    arguments = (options, grad_out, grad_lse)
    same, exact = (
        results(
            reference.scaled_dot_product_attention, leaves_of(qkv, d), cast(arguments[0], d),
            *arguments[1:],
        )
        for d in (dtype, torch.float64)
    )  # fmt: skip
    for name, ours in mine.items():
        assert_close_to_oracle(ours, same[name], exact[name], what=name)


def operands(shape, dtype, layout="contiguous"):
    b, h, hkv, sq, sk, d, dv = shape
    sizes = ((b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    qkv = [lay_out(values(size, dtype), layout) for size in sizes]
    return qkv, lay_out(values((b, h, sq, dv), dtype), layout)
