"""The Transformer layers on jagged nested tensors: each sequence is as alone, without padding."""

import copy

import pytest
import torch
from torch import nn
from torch.nested import nested_tensor_from_jagged
from transformer_cases import (
    DTYPES,
    HEADS,
    LAYER_CASES,
    LAYERS,
    PAIRS,
    WIDTH,
    causal,
    compare,
    results,
    twins,
)

import fastnn
from fastnn.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

# Rows and keys of each sequence: none, one, fewer and more rows than keys.
ROWS, KEYS = (5, 0, 17, 1, 9), (7, 3, 4, 1, 12)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def jagged(rows, lengths=ROWS, **known):
    return nested_tensor_from_jagged(rows, starts(lengths), **known)


def rows(*shapes):
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def alone(call, *inputs):
    """The rows of `call` on each sequence, one after the other; inputs are (rows, lengths)."""
    parts = zip(*(x.split(lengths) for x, lengths in inputs), strict=True)
    return torch.cat([call(*part) for part in parts if len(part[0])])


def apart(lengths, key_lengths):
    """Which keys are of another sequence. With this mask stock layers take all rows as one batch,
    so that sums over rows, which torch's LayerNorm makes in bfloat16, are of the same rows."""
    rows, keys = (torch.arange(len(n)).repeat_interleave(torch.tensor(n))
                  for n in (lengths, key_lengths))  # fmt: skip
    return rows.unsqueeze(1) != keys


def is_ours(module):
    return type(module).__module__.startswith("fastnn")


@pytest.mark.parametrize("options, dtype", LAYER_CASES)
def test_encoder_layer(options, dtype):
    options = {**LAYERS[options], "batch_first": True}
    ours, stock = twins(*PAIRS[1][:2], WIDTH, HEADS, 48, **options)

    def call(module, x):
        if is_ours(module):
            return module(jagged(x), is_causal=True).values()
        return module(x[None], apart(ROWS, ROWS) | causal(len(x), len(x)))[0]

    compare(ours, stock, call, rows((sum(ROWS), WIDTH)), dtype)


@pytest.mark.parametrize("options, dtype", LAYER_CASES)
def test_decoder_layer(options, dtype):
    options = {**LAYERS[options], "batch_first": True}
    ours, stock = twins(*PAIRS[2][:2], WIDTH, HEADS, 48, **options)

    def call(module, x, memory):
        if is_ours(module):
            return module(jagged(x), jagged(memory, KEYS)).values()
        return module(x[None], memory[None], apart(ROWS, ROWS), apart(ROWS, KEYS))[0]

    compare(ours, stock, call, rows((sum(ROWS), WIDTH), (sum(KEYS), WIDTH)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["self", "shared memory", "three inputs", "kdim and vdim"])
def test_attention(kind, bias, dtype):
    sizes = {"kdim": 20, "vdim": 12} if kind == "kdim and vdim" else {}
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, bias=bias, batch_first=True, **sizes)
    shapes = [(sum(ROWS), WIDTH), (sum(KEYS), sizes.get("kdim", WIDTH))]
    shapes = {"self": shapes[:1], "shared memory": shapes}.get(
        kind, [*shapes, (sum(KEYS), sizes.get("vdim", WIDTH))]
    )

    def call(module, query, key=None, value=None):
        if not is_ours(module):
            mask = apart(ROWS, ROWS if key is None else KEYS)
            key = query if key is None else key
            value = key if value is None else value
            return module(query, key, value, need_weights=False, attn_mask=mask)[0]
        query = jagged(query)
        if key is None:
            key = value = query
        else:
            offsets = starts(KEYS)
            key = nested_tensor_from_jagged(key, offsets)
            value = key if value is None else nested_tensor_from_jagged(value, offsets)
        out, weights = module(query, key, value, need_weights=False)
        assert weights is None and out.offsets() is query.offsets()
        return out.values()

    compare(ours, stock, call, rows(*shapes), dtype)


def test_one_sequence_is_a_batch_of_one():
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True).double()
    (x,) = rows((12, WIDTH))
    torch.testing.assert_close(layer(jagged(x, (12,))).values(), layer(x[None])[0])


def test_no_rows_at_all():
    module = TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0)
    x = torch.empty(0, WIDTH, requires_grad=True)
    module(jagged(x, (0, 0))).values().sum().backward()
    assert x.grad.shape == (0, WIDTH)
    assert all((p.grad == 0).all() for p in module.parameters())


def encoders(**options):
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True, **options)
    stock = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH)).double()
    ours = copy.deepcopy(stock)
    fastnn.swap_(ours)
    return ours, stock


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_inside_torchs_encoder(norm_first, training):
    ours, stock = (module.train(training) for module in encoders(norm_first=norm_first))
    (x,) = rows((sum(ROWS), WIDTH))

    def call(module, x):
        if not is_ours(module.layers[0]):
            return alone(lambda x: module(x.unsqueeze(0)).squeeze(0), (x, ROWS))
        src = jagged(x)
        out = module(src, is_causal=False)
        assert out.shape == src.shape and out.layout == torch.jagged
        return (out + src).values() - x  # of the same sequences, as torch tells them

    torch.testing.assert_close(*(results(m, call, [x], torch.float64) for m in (ours, stock)))


def test_inside_torchs_decoder():
    torch.manual_seed(5)
    layer = TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, dtype=torch.float64)
    decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH, dtype=torch.float64))
    x, memory = rows((sum(ROWS), WIDTH), (sum(KEYS), WIDTH))
    packed = decoder(jagged(x), jagged(memory, KEYS)).values()
    torch.testing.assert_close(packed, alone(decoder, (x, ROWS), (memory, KEYS)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(norm_first):
    options = {"dropout": 0.0, "norm_first": norm_first, "activation": "gelu", "batch_first": True}
    ours, stock = twins(*PAIRS[1][:2], WIDTH, HEADS, 48, **options)

    def call(module, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            if is_ours(module):
                return module(jagged(x)).values()
            return module(x[None], apart(ROWS, ROWS))[0]

    compare(ours, stock, call, rows((sum(ROWS), WIDTH)), torch.float32)


@pytest.mark.parametrize("ours", [MultiheadAttention, TransformerEncoderLayer])
def test_dropout_is_replayed_in_the_backward(ours):
    torch.manual_seed(1)
    module = ours(WIDTH, HEADS, dropout=0.4).double()
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)

    def call(x, seed=9):
        torch.manual_seed(seed)
        src = jagged(x, (4, 0, 2))
        if ours is MultiheadAttention:
            return module(src, src, src, need_weights=False)[0].values()
        return module(src).values()

    first = call(x)
    assert torch.equal(first, call(x)) and not torch.equal(first, call(x, 10))
    assert torch.autograd.gradcheck(call, (x,), fast_mode=True)
    module.eval()
    assert torch.equal(call(x), call(x, 10))


@pytest.mark.parametrize("ours", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_sub_modules_that_changed_are_called(ours):
    """Hooked ones, and frozen parameters get no gradient."""
    module = ours(WIDTH, HEADS, 48, dropout=0.0).double()
    x, memory = rows((sum(ROWS), WIDTH), (sum(KEYS), WIDTH))
    inputs = [jagged(x)] if ours is TransformerEncoderLayer else [jagged(x), jagged(memory, KEYS)]
    names = ["linear1", "linear2", "dropout", "dropout1", "dropout2", "self_attn", "norm1"]
    names += ["multihead_attn"] * (ours is TransformerDecoderLayer)
    plain = module(*inputs).values()
    calls = []
    for name in names:
        getattr(module, name).register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    module.linear1.requires_grad_(False)
    module.self_attn.in_proj_weight.requires_grad_(False)
    out = module(*inputs).values()
    assert sorted(calls) == sorted(names)
    torch.testing.assert_close(out, plain)
    out.sum().backward()
    frozen = {name for name, p in module.named_parameters() if p.grad is None}
    assert frozen == {"linear1.weight", "linear1.bias", "self_attn.in_proj_weight"}


def test_the_longest_length_is_read_once():
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48).eval()
    x = torch.randn(sum(ROWS), WIDTH)
    src = jagged(x)
    out = layer(src)
    assert src._maybe_max_seqlen == out._maybe_max_seqlen == max(ROWS)
    told = layer(jagged(x, max_seqlen=20, min_seqlen=0))
    assert told._maybe_max_seqlen == 20 and told._maybe_min_seqlen == 0
    assert torch.equal(told.values(), out.values())


def test_gradient_of_a_nested_leaf():
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0)
    parts = [torch.randn(n, WIDTH) for n in (3, 5)]
    src = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    layer(src).values().square().sum().backward()
    x = torch.cat(parts).requires_grad_()
    layer(jagged(x, (3, 5))).values().square().sum().backward()
    torch.testing.assert_close(src.grad.values(), x.grad)


def call_attention(changes=None, **options):
    x = torch.randn(sum(ROWS), WIDTH)
    module = MultiheadAttention(WIDTH, HEADS, **(changes or {}))
    src = options.pop("src", None)
    src = jagged(x) if src is None else src(x)
    inputs = {"query": src, "key": src, "value": src}
    inputs |= {name: make(x) for name, make in options.pop("inputs", {}).items()}
    return module(**inputs, need_weights=False, **options)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "attn_mask must be None for jagged", {"attn_mask": causal()}),
        (ValueError, "key_padding_mask must be None for jagged",
         {"key_padding_mask": torch.zeros(5, 17, dtype=torch.bool)}),
        (ValueError, r"query must be \(N, j, E\), jagged and without holes",
         {"src": lambda x: nested_tensor_from_jagged(x, starts(ROWS), torch.tensor(ROWS))}),
        (ValueError, "query must be .N, j, E.", {"src": lambda x: jagged(x).transpose(1, 2)}),
        (ValueError, "query must be .N, j, E.", {"src": lambda x: jagged(x).unflatten(-1, (4, 8))}),
        (ValueError, "value must be of key's shape", {"inputs": {"value": jagged}}),
        (ValueError, "query must be of 32 features, got 16",
         {"inputs": {"query": lambda x: jagged(x[:, :16])}}),
        (RuntimeError, "cu_seqlens_k must be of cu_seqlens_q's length",
         {"inputs": {"query": lambda x: jagged(x, (16, 16))}}),
        (NotImplementedError, "add_bias_kv must be False", {"changes": {"add_bias_kv": True}}),
        (NotImplementedError, "add_zero_attn must be False", {"changes": {"add_zero_attn": True}}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, options):
    with pytest.raises(error, match=message):
        call_attention(**options)


def test_layers_refuse_masks_and_other_memory():
    src = jagged(torch.randn(sum(ROWS), WIDTH))
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48)
    with pytest.raises(ValueError, match="key_padding_mask must be None for jagged"):
        layer(src, src_key_padding_mask=torch.zeros(5, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="TransformerDecoderLayer: memory must be .N, j, E., jag"):
        TransformerDecoderLayer(WIDTH, HEADS, 48)(src, torch.randn(5, 7, WIDTH))
