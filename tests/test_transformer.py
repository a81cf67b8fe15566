import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from transformer_cases import (
    BATCH,
    DTYPES,
    HEADS,
    LAYER_CASES,
    LAYERS,
    LENGTH,
    MEMORY,
    PAIRS,
    WIDTH,
    causal,
    compare,
    sequences,
    twins,
)

from fastnn import use_backend
from fastnn.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    activation_name,
)


def padding(keys=LENGTH):
    hidden = torch.zeros(BATCH, keys, dtype=torch.bool)
    hidden[1, keys - 5 :] = True
    hidden[2, 1:4] = True
    return hidden


def additive(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, float("-inf"))


MASKS = {
    "none": lambda dtype: {},
    "padding": lambda dtype: {"key_padding_mask": padding()},
    "padding, additive": lambda dtype: {"key_padding_mask": additive(padding(), dtype)},
    "hint": lambda dtype: {"attn_mask": causal(), "is_causal": True},
    "causal mask": lambda dtype: {"attn_mask": causal()},
    "hint and padding": lambda dtype: {
        "attn_mask": causal(), "is_causal": True, "key_padding_mask": padding(),
    },
    "both": lambda dtype: {"attn_mask": causal(), "key_padding_mask": padding()},
    "both, additive": lambda dtype: {
        "attn_mask": additive(causal(), dtype), "key_padding_mask": additive(padding(), dtype),
    },
    "per head": lambda dtype: {
        "attn_mask": torch.sin(torch.arange(BATCH * HEADS * LENGTH * LENGTH, dtype=dtype)).view(
            BATCH * HEADS, LENGTH, LENGTH
        )
    },
}  # fmt: skip
# Mixed kinds of masks are deprecated in torch, but served.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:enable_nested_tensor is True"
)


def self_attention(masks):
    def call(module, x):
        chosen = masks(x.dtype)
        return module(x, x, x, need_weights=False, **chosen)[0]

    return call


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "options",
    [{"batch_first": True}, {}, {"add_bias_kv": True}, {"add_zero_attn": True, "bias": False}],
    ids=["batch first", "sequence first", "bias_kv", "zero_attn without bias"],
)
def test_self_attention(options, masks):
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, **options)
    inputs = sequences(options.get("batch_first", False))
    compare(ours, stock, self_attention(MASKS[masks]), inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("masks", ["none", "hint and padding", "both, additive"])
def test_self_attention_dtypes(masks, dtype):
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, batch_first=True)
    compare(ours, stock, self_attention(MASKS[masks]), sequences(), dtype)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["shared memory", "three inputs", "kdim and vdim"])
def test_cross_attention(kind, bias, batch_first):
    sizes = {"kdim": 20, "vdim": 12} if kind == "kdim and vdim" else {}
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, batch_first=batch_first, bias=bias, **sizes)
    lengths = (LENGTH, MEMORY) if kind == "shared memory" else (LENGTH, MEMORY, MEMORY)
    widths = (WIDTH, 20, 12) if sizes else None
    inputs = sequences(batch_first, lengths, widths)
    mask = padding(MEMORY)

    def call(module, query, key, value=None):
        value = key if value is None else value
        return module(query, key, value, key_padding_mask=mask, need_weights=False)[0]

    compare(ours, stock, call, inputs, torch.float32)


@pytest.mark.parametrize("with_mask", [True, False])
def test_unbatched(with_mask):
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, batch_first=True)
    masks = {"key_padding_mask": padding()[1], "attn_mask": causal()} if with_mask else {}
    compare(
        ours, stock, self_attention(lambda dtype: masks), sequences(batched=False), torch.float32
    )


def test_rows_without_a_visible_key_are_zero_and_finite():
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, batch_first=True)
    hidden = padding()
    hidden[0] = True
    compare(
        ours, stock, self_attention(lambda dtype: {"key_padding_mask": hidden}), sequences(),
        torch.float32,
    )  # fmt: skip
    (x,) = sequences()
    out = ours.double()(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand_as(out[0]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_need_weights(average, training):
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, batch_first=True)
    (x,) = sequences()
    pair = []
    for module in (ours, stock):
        module = module.double().train(training)
        pair.append(module(x, x, x, key_padding_mask=padding(), average_attn_weights=average))
    torch.testing.assert_close(pair[0][0], pair[1][0])
    torch.testing.assert_close(pair[0][1], pair[1][1])


@pytest.mark.parametrize("options, dtype", LAYER_CASES)
def test_encoder_layer(options, dtype):
    options = LAYERS[options]
    ours, stock = twins(*PAIRS[1][:2], WIDTH, HEADS, 48, **options)

    def call(module, x):
        return module(x, src_key_padding_mask=padding(), src_mask=causal(), is_causal=True)

    compare(ours, stock, call, sequences(options.get("batch_first", False)), dtype)


@pytest.mark.parametrize("options, dtype", LAYER_CASES)
def test_decoder_layer(options, dtype):
    options = LAYERS[options]
    ours, stock = twins(*PAIRS[2][:2], WIDTH, HEADS, 48, **options)

    def call(module, x, memory):
        return module(
            x, memory, tgt_mask=causal(), tgt_is_causal=True,
            memory_key_padding_mask=padding(MEMORY),
        )  # fmt: skip

    inputs = sequences(options.get("batch_first", False), (LENGTH, MEMORY))
    compare(ours, stock, call, inputs, dtype)


def test_layers_without_batch():
    ours, stock = twins(*PAIRS[2][:2], WIDTH, HEADS, 48, dropout=0.0)
    inputs = sequences(True, (LENGTH, MEMORY), batched=False)
    compare(ours, stock, lambda module, x, memory: module(x, memory), inputs, torch.float32)


@pytest.mark.parametrize("ours, stock, arguments", PAIRS)
def test_evaluation_does_not_need_gradients(ours, stock, arguments):
    ours, stock = twins(ours, stock, *arguments, batch_first=True, dropout=0.3)
    (x, memory) = sequences(True, (LENGTH, LENGTH))
    more = (memory,) if isinstance(stock, nn.TransformerDecoderLayer) else ()
    more = (x, x) if isinstance(stock, nn.MultiheadAttention) else more
    calls = {}
    for name, module in (("ours", ours), ("stock", stock)):
        with torch.no_grad():
            out = module.double().eval()(x, *more)
        calls[name] = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(calls["ours"], calls["stock"])


@pytest.mark.parametrize("ours, stock, arguments", PAIRS)
def test_constructor_and_state_are_torchs(ours, stock, arguments):
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(stock).parameters)
    made = []
    for kind in (stock, ours):
        torch.manual_seed(0)
        made.append(kind(*arguments, dtype=torch.float64, device="cpu").state_dict())
    assert list(made[0]) == list(made[1])
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name
    module = ours(*arguments)
    assert isinstance(module, stock)
    stock(*arguments).load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is ours
        assert all(map(torch.equal, copied.parameters(), module.parameters()))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_inside_torchs_encoder_and_transformer(training, batch_first):
    """Built with our layers, torch's encoder may hand them nested tensors in evaluation."""
    (x, memory) = sequences(batch_first, (LENGTH, LENGTH))
    outs = []
    for layer in (TransformerEncoderLayer, nn.TransformerEncoderLayer):
        torch.manual_seed(5)
        encoder = nn.TransformerEncoder(
            layer(WIDTH, HEADS, 48, dropout=0.0, batch_first=batch_first), 2
        )
        encoder = encoder.double().train(training)
        with torch.set_grad_enabled(training):
            outs.append(encoder(x, src_key_padding_mask=padding()))
    seen = ~padding() if batch_first else ~padding().T
    torch.testing.assert_close(outs[0][seen], outs[1][seen])

    torch.manual_seed(5)
    ours = nn.TransformerDecoder(
        TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=batch_first), 2
    )
    stock = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=batch_first), 2
    )
    stock.load_state_dict(ours.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    pair = [module.double().train(training)(x, memory, tgt_mask=mask) for module in (ours, stock)]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("ours, stock, arguments", PAIRS)
def test_dropout_is_replayed_in_the_backward(ours, stock, arguments):
    torch.manual_seed(1)
    module = ours(*arguments, dropout=0.4, batch_first=True).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(9)
        if ours is MultiheadAttention:
            return module(x, x, x, need_weights=False)[0]
        return module(x, x) if ours is TransformerDecoderLayer else module(x)

    first = call(x)
    assert torch.equal(first, call(x))
    module.eval()
    assert not torch.equal(first, call(x))
    module.train()
    # The forward's mask is in every difference quotient: another one in the backward would show.
    assert torch.autograd.gradcheck(call, (x,), fast_mode=True)
    first.sum().backward(retain_graph=True)
    once = x.grad.clone()
    x.grad = None
    first.sum().backward()
    assert torch.equal(once, x.grad)


def test_attention_dropout_has_torchs_distribution():
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, dropout=0.3, batch_first=True)
    torch.manual_seed(0)
    x = torch.randn(1, 8, WIDTH).expand(2000, 8, WIDTH)
    outs = [m(x, x, x, need_weights=False)[0].detach() for m in (ours, stock)]
    kept = ours.eval()(x[:1], x[:1], x[:1], need_weights=False)[0].detach()[0]
    spread = outs[1].std(0)
    assert ((outs[0].mean(0) - kept).abs() < 5 * spread / 2000**0.5).all()
    torch.testing.assert_close(outs[0].std(0), spread, rtol=0.15, atol=0.0)


def test_training_step_with_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.1, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, wanted = torch.randn(4, 9, WIDTH), torch.randn(4, 9, WIDTH)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_sub_modules_that_changed_are_called():
    ours, stock = twins(*PAIRS[1][:2], WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    (x,) = sequences()
    calls = []
    ours = ours.double()
    for name in ("linear1", "linear2", "dropout", "dropout1", "dropout2", "self_attn"):
        getattr(ours, name).register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    out = ours(x)
    assert sorted(calls) == ["dropout", "dropout1", "dropout2", "linear1", "linear2", "self_attn"]
    torch.testing.assert_close(out, stock.double()(x))

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    for module in (ours, stock):
        for name in ("linear1", "linear2"):
            adapter = Adapter(*getattr(module, name).weight.shape[::-1]).double()
            adapter.load_state_dict(getattr(module, name).state_dict())
            setattr(module, name, adapter)
    torch.testing.assert_close(ours(x), stock(x))
    assert not torch.allclose(ours(x), out)


@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(norm_first):
    ours, stock = twins(
        *PAIRS[1][:2], WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=norm_first,
        activation="gelu",
    )  # fmt: skip
    (x,) = sequences()

    def call(module, x):
        if x.dtype == torch.float64:
            return module(x, src_key_padding_mask=padding())
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, src_key_padding_mask=padding())

    compare(ours, stock, call, [x], torch.float32)


@pytest.mark.parametrize("ours, stock, arguments", PAIRS)
def test_compiles_as_one_graph(ours, stock, arguments):
    torch.manual_seed(0)
    module = ours(*arguments, dropout=0.0, batch_first=True)
    (x, memory) = (t.float() for t in sequences(True, (LENGTH, MEMORY)))
    mask = padding()

    def call(x, memory):
        if ours is MultiheadAttention:
            return module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        if ours is TransformerEncoderLayer:
            return module(x, src_key_padding_mask=mask)
        return module(x, memory, tgt_key_padding_mask=mask)

    gradients = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (x, memory)]
        out = run(*inputs)
        out.square().sum().backward()
        gradients.append([out.detach(), *(t.grad for t in inputs)])
        gradients[-1] += [p.grad.clone() for p in module.parameters()]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_explicit_reference_backend_agrees():
    ours, stock = twins(*PAIRS[1][:2], WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    (x,) = sequences()
    with use_backend("reference"):
        torch.testing.assert_close(ours.double()(x), stock.double()(x))


def test_activation_names():
    import torch.nn.functional as F

    named = {
        "relu": [F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True)],
        "gelu": [F.gelu, nn.GELU()], "gelu_tanh": [nn.GELU("tanh")], "silu": [F.silu, nn.SiLU()],
        "sigmoid": [F.sigmoid, torch.sigmoid, nn.Sigmoid()],
        "tanh": [F.tanh, torch.tanh, nn.Tanh()], "leaky_relu": [F.leaky_relu, nn.LeakyReLU()],
        None: [nn.LeakyReLU(0.2), nn.ELU(), F.elu, nn.Softmax(-1), nn.GLU(), nn.Identity()],
    }  # fmt: skip
    for name, activations in named.items():
        for activation in activations:
            assert activation_name(activation) == name, activation


def _attention_call(query=(2, 5, 8), key=(2, 7, 8), value=(2, 7, 8), **masks):
    module = MultiheadAttention(8, 2, batch_first=True)
    shapes = (torch.randn(shape) for shape in (query, key, value))
    return module(*shapes, need_weights=False, **masks)


@pytest.mark.parametrize(
    "error, argument, options",
    [
        (ValueError, "query must be 2-D or 3-D, got 4-D", {"query": (1, 2, 5, 8)}),
        (ValueError, "query must be of 8 features, got 9", {"query": (2, 5, 9)}),
        (ValueError, "key must be 3-D as query, got 2-D", {"key": (7, 8)}),
        (ValueError, "key must be of 8 features, got 6", {"key": (2, 7, 6)}),
        (ValueError, "key must be a batch of 2, got 3", {"key": (3, 7, 8), "value": (3, 7, 8)}),
        (ValueError, "value must be of key's shape", {"value": (2, 6, 8)}),
        (RuntimeError, "attn_mask must be given with the is_causal hint", {"is_causal": True}),
        (ValueError, "attn_mask must be of shape (5, 7) or (4, 5, 7), got (7, 5)",
         {"attn_mask": torch.zeros(7, 5)}),
        (TypeError, "attn_mask must be boolean or floating point, got torch.int64",
         {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}),
        (ValueError, "key_padding_mask must be of shape (2, 7), got (2, 5)",
         {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
        (TypeError, "key_padding_mask must be boolean or floating point, got torch.uint8",
         {"key_padding_mask": torch.zeros(2, 7, dtype=torch.uint8)}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, argument, options):
    with pytest.raises(error) as raised:
        _attention_call(**options)
    assert argument in str(raised.value)
    assert str(raised.value).startswith("MultiheadAttention: ")


@pytest.fixture
def recorded(monkeypatch):
    """What the modules hand to linear_act and to scaled_dot_product_attention."""
    from fastnn import transformer

    calls = {"linear_act": [], "scaled_dot_product_attention": []}
    for name, seen in calls.items():
        function = getattr(transformer, name)

        def record(*arguments, function=function, seen=seen, **options):
            seen.append((arguments, options))
            return function(*arguments, **options)

        monkeypatch.setattr(transformer, name, record)
    return calls


def test_an_encoder_layer_is_four_gemms_with_epilogues(recorded):
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.1, batch_first=True)
    (x,) = (t.float() for t in sequences())
    layer(x, src_key_padding_mask=padding())
    inner, out, first, second = recorded["linear_act"]
    assert inner[0][1] is layer.self_attn.in_proj_weight and not inner[1]
    assert out[1]["residual"] is x and out[1]["dropout_p"] == 0.1
    assert first[0][3] == "relu" and first[1]["dropout_p"] == 0.1
    assert second[1]["residual"] is first[0][0] and second[1]["dropout_p"] == 0.1
    ((q, k, v, mask, dropout_p, is_causal), _), *rest = recorded["scaled_dot_product_attention"]
    assert not rest and dropout_p == 0.1 and not is_causal
    # Views of one packed projection.
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.shape == (BATCH, HEADS, LENGTH, WIDTH // HEADS)


def test_a_padding_mask_is_broadcast_and_causality_stays_a_band(recorded):
    module = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    (x,) = (t.float() for t in sequences())
    module(x, x, x, need_weights=False, **MASKS["hint and padding"](torch.float32))
    (((*_, mask, _, is_causal), options),) = recorded["scaled_dot_product_attention"]
    assert mask.shape == (BATCH, 1, 1, LENGTH) and mask.dtype == torch.bool
    assert not is_causal and options == {"window": (-1, 0)}


def test_cross_attention_projects_keys_and_values_at_once(recorded):
    module = MultiheadAttention(WIDTH, HEADS)
    query, memory = (t.float() for t in sequences(False, (LENGTH, MEMORY)))
    module(query, memory, memory, need_weights=False)
    shapes = [tuple(arguments[1].shape) for arguments, _ in recorded["linear_act"]]
    assert shapes == [(2 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]


def test_gradient_of_an_additive_mask():
    ours, stock = twins(*PAIRS[0][:2], WIDTH, HEADS, batch_first=True)
    mask = torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))

    def call(module, x, mask):
        return module(x, x, x, attn_mask=mask, need_weights=False)[0]

    compare(ours, stock, call, [*sequences(), mask.double()], torch.float32)


def test_functional_call_and_func_grad():
    ours, stock = twins(*PAIRS[1][:2], WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    (x,) = sequences()
    gradients = []
    for module in (ours.double(), stock.double()):

        def loss(parameters, module=module):
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        gradients.append(torch.func.grad(loss)(dict(module.named_parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("norm_first", [True, False])
def test_create_graph_counts_every_path_once(norm_first):
    """A block's input is its residual too: the composite gradient must keep the two apart."""
    ours, stock = twins(
        *PAIRS[1][:2], WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=norm_first,
        activation="gelu",
    )  # fmt: skip
    seconds = []
    for module in (ours.double(), stock.double()):
        (x,) = sequences()
        x.requires_grad_()
        # Torch's other kernels have no second derivative.
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        seconds.append((first.detach(), second))
    torch.testing.assert_close(*seconds)


def test_second_derivative():
    module = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x, x, x, need_weights=False)[0], (x,))


def test_exports():
    module = TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    (x,) = (t.float() for t in sequences())
    exported = torch.export.export(module, (x,), {"src_key_padding_mask": padding()})
    torch.testing.assert_close(
        exported.module()(x, src_key_padding_mask=padding()),
        module(x, src_key_padding_mask=padding()),
    )
