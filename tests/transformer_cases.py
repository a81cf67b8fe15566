"""What the tests of the Transformer layers share: twins of each class, and how they compare."""

import copy

import torch
from conftest import assert_close_to_oracle
from torch import nn

from fastnn.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

WIDTH, HEADS, BATCH, LENGTH, MEMORY = 32, 4, 3, 17, 13
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PAIRS = [
    (MultiheadAttention, nn.MultiheadAttention, (WIDTH, HEADS)),
    (TransformerEncoderLayer, nn.TransformerEncoderLayer, (WIDTH, HEADS, 48)),
    (TransformerDecoderLayer, nn.TransformerDecoderLayer, (WIDTH, HEADS, 48)),
]
LAYERS = {
    "post": {"batch_first": True, "dropout": 0.0},
    "pre, gelu": {"norm_first": True, "activation": "gelu", "dropout": 0.0},
    "callable": {"activation": nn.SiLU(), "batch_first": True, "dropout": 0.0},
    "other activation": {"activation": nn.ELU(), "norm_first": True, "dropout": 0.0, "bias": False},
    "eps": {
        "layer_norm_eps": 1e-2, "bias": False, "batch_first": True, "dropout": 0.0,
        "activation": torch.tanh,
    },
}  # fmt: skip
# Not relu in bfloat16: where its input is within a rounding of 0, the derivative of any two
# implementations may be 0 in one and 1 in the other.
LAYER_CASES = [
    (name, dtype)
    for name in LAYERS
    for dtype in DTYPES
    if name != "post" or dtype != torch.bfloat16
]


def twins(ours, stock, *arguments, **options):
    """One module of each class with the same parameters, none of them at a special value."""
    torch.manual_seed(3)
    stock = stock(*arguments, **options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = ours(*arguments, **options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def sequences(batch_first=True, lengths=(LENGTH,), widths=None, batched=True):
    generator = torch.Generator().manual_seed(11)
    widths = widths or (WIDTH,) * len(lengths)
    made = []
    for length, width in zip(lengths, widths, strict=True):
        x = torch.randn(BATCH, length, width, generator=generator, dtype=torch.float64)
        x = x[0] if not batched else x
        made.append(x if batch_first or not batched else x.transpose(0, 1).contiguous())
    return made


def results(module, call, inputs, dtype):
    """Output and every gradient of `call(module, *inputs)` in `dtype`, by name."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = call(module, *inputs)
    weight = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weight).sum().backward()
    named = {"out": out.detach()}
    named |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    named |= {name: p.grad for name, p in module.named_parameters()}
    return named


def compare(ours, stock, call, inputs, dtype):
    # In float64 itself, stock's error is zero and the epsilon of the rule is what is allowed.
    got, torchs = results(ours, call, inputs, dtype), results(stock, call, inputs, dtype)
    oracle = results(stock, call, inputs, torch.float64)
    assert got.keys() == torchs.keys()
    for name, value in got.items():
        if torchs[name] is None:
            assert value is None, name
            continue
        assert_close_to_oracle(value, torchs[name], oracle[name], what=name)


def causal(rows=LENGTH, keys=LENGTH):
    return torch.ones(rows, keys, dtype=torch.bool).triu(1)
