import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastnn.cross_entropy import CrossEntropyLoss
from fastnn.linear_act import Dropout, LinearAct
from fastnn.linear_cross_entropy import LinearCrossEntropyLoss
from fastnn.swap import FusedActivation, SwapReport, swap_, unswap_
from fastnn.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)
ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(),
    nn.Tanh(), nn.LeakyReLU(),
]  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 8, bias=False), nn.Tanh(),
        nn.Linear(8, 4),
    )  # fmt: skip


def transformer(**options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, **options}
    return nn.Transformer(16, 2, 2, 2, 24, **options)


def step(model, *inputs, dtype=torch.float64, **masks):
    """Output and gradients of a training-mode call, in float64 so that only a bug differs."""
    model = model.to(dtype)
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = model(*inputs, **masks)
    out.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    return [out.detach(), *(x.grad for x in inputs), *gradients]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_linear_and_its_activation_become_one(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), activation)
    x = torch.randn(3, 5, dtype=torch.float64)
    before = step(model, x)
    weight = model[0].weight
    report = swap_(model)
    assert type(model[0]) is LinearAct and type(model[1]) is FusedActivation
    assert model[0].weight is weight and [row.name for row in report.swapped] == ["0"]
    torch.testing.assert_close(step(model, x), before)


def test_stock_and_swapped_exchange_checkpoints():
    stock, swapped = mlp(), mlp()
    swap_(swapped)
    assert list(stock.state_dict()) == list(swapped.state_dict())
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.normal_()
    stream = io.BytesIO()
    torch.save(swapped.state_dict(), stream)
    stream.seek(0)
    stock.load_state_dict(torch.load(stream))
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(step(stock, x), step(swapped, x))
    other = swap_built = mlp()
    swap_(swap_built)
    other.load_state_dict(mlp().state_dict())
    torch.testing.assert_close(step(other, x), step(mlp(), x))


@pytest.mark.parametrize("build", [mlp, transformer])
def test_unswap_restores_the_same_objects(build):
    model = build()
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in modules]
    values = {name: value for name, value in model.__dict__.items() if isinstance(value, bool)}
    first = swap_(model)
    second = swap_(model)
    assert first.swapped and not second.swapped
    model.eval()
    with torch.no_grad():
        next(model.parameters()).fill_(0.5)
    undone = unswap_(model)
    assert len(undone.swapped) == len(first.swapped)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not any(m.training for m in model.modules())
    assert {k: v for k, v in model.__dict__.items() if k in values} == {**values, "training": False}
    assert (next(model.parameters()) == 0.5).all()
    assert not unswap_(model).rows


def test_unswap_keeps_modules_that_were_built_as_fastnns():
    model = nn.Sequential(LinearAct(4, 4, activation="relu"), nn.Linear(4, 4), nn.ReLU())
    swap_(model)
    unswap_(model)
    assert [type(m) for m in model] == [LinearAct, nn.Linear, nn.ReLU]


@pytest.mark.parametrize("build", [mlp, transformer])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_unswap(way, build):
    model = build()
    swap_(model)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        copied = torch.load(stream, weights_only=False)
    inputs = [torch.randn(2, 6, dtype=torch.float64)]
    if build is transformer:
        inputs = [torch.randn(2, length, 16, dtype=torch.float64) for length in (5, 4)]
    expected = step(model, *inputs)
    torch.testing.assert_close(step(copied, *inputs), expected)
    unswap_(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in build().modules()]
    torch.testing.assert_close(step(copied, *inputs), expected)


def test_optimizers_keep_their_parameters():
    losses = []
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))
    for swapped in (False, True):
        model, loss = mlp().double(), nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses.append([])
        for index in range(6):
            if swapped and index == 2:
                swap_(model), swap_(loss)
            if swapped and index == 4:
                unswap_(model), unswap_(loss)
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[1][-1] < losses[1][0]


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.net = nn.Sequential(nn.Linear(6, 6), nn.SiLU())
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.net[0].weight = self.other = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return self.head(self.net(self.embedding(x)) @ self.other)

    torch.manual_seed(0)
    model = Tied().double()
    tokens = torch.randint(10, (4,))
    expected = model(tokens)
    swap_(model)
    assert model.head.weight is model.embedding.weight and model.net[0].weight is model.other
    torch.testing.assert_close(model(tokens), expected)


def test_losses():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 2, 6, 1])
    weight = torch.rand(7, dtype=torch.float64)
    for options in ({}, {"weight": weight, "reduction": "sum", "label_smoothing": 0.2},
                    {"ignore_index": 3, "reduction": "none"}):  # fmt: skip
        loss = nn.CrossEntropyLoss(**options)
        expected = loss(logits, target)
        (wanted,) = torch.autograd.grad(expected.sum(), logits)
        assert [row.target for row in swap_(loss).swapped] == ["CrossEntropyLoss"]
        assert type(loss) is CrossEntropyLoss and isinstance(loss, nn.Module)
        got = loss(logits, target)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), logits)[0], wanted)
        unswap_(loss)
        assert type(loss) is nn.CrossEntropyLoss


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has it since 2.13")
def test_linear_cross_entropy_loss():
    torch.manual_seed(0)
    x, target = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 3, 2, 6, 1])
    loss = nn.LinearCrossEntropyLoss(6, 7, bias=True, ignore_index=2, dtype=torch.float64)
    expected, weight = loss(x, target), loss.linear.weight
    report = swap_(loss)
    assert type(loss) is LinearCrossEntropyLoss and not report.skipped
    assert loss.linear.weight is weight and "linear.weight" in loss.state_dict()
    torch.testing.assert_close(loss(x, target), expected)
    unswap_(loss)
    assert torch.equal(loss(x, target), expected)


def test_dropout_keeps_rate_and_mode():
    model = nn.Sequential(nn.Dropout(0.25), nn.Dropout(0.5, inplace=True))
    report = swap_(model)
    assert type(model[0]) is Dropout and type(model[1]) is nn.Dropout
    assert report.skipped[0].reason == "it works in place"
    kept = (model[0](torch.ones(40000)) != 0).float().mean().item()
    assert abs(kept - 0.75) < 5 * (0.25 * 0.75 / 40000) ** 0.5
    assert torch.equal(model.eval()[0](torch.ones(10)), torch.ones(10))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(batch_first, norm_first):
    model = transformer(batch_first=batch_first, norm_first=norm_first, activation="gelu")
    source, target = (torch.randn(3, n, 16, dtype=torch.float64) for n in (7, 5))
    padded = torch.zeros(3, 7, dtype=torch.bool)
    padded[1, 4:] = True
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = {
        "src_key_padding_mask": padded, "memory_key_padding_mask": padded,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "tgt_is_causal": True,
    }  # fmt: skip
    before = step(model, source, target, **masks)
    report = swap_(model)
    kinds = {type(m) for m in model.modules()}
    assert {TransformerEncoderLayer, TransformerDecoderLayer, MultiheadAttention} <= kinds
    assert not {nn.TransformerEncoderLayer, nn.TransformerDecoderLayer} & kinds
    assert not report.skipped
    torch.testing.assert_close(step(model, source, target, **masks), before)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(source, target, **masks), before[0])


def test_encoder_is_kept_from_nested_tensors(monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    x, padded = torch.randn(3, 6, 16, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.bool)
    padded[0, 2:] = True
    with torch.no_grad():
        stock = model(x, src_key_padding_mask=padded)
        report = swap_(model)
        assert "nested" in str(report)

        def refuse(*arguments, **options):
            raise AssertionError("a nested tensor was made")

        monkeypatch.setattr(torch, "_nested_tensor_from_mask", refuse)
        got = model(x, src_key_padding_mask=padded)
        monkeypatch.undo()
        torch.testing.assert_close(got[~padded], stock[~padded])
        unswap_(model)
        assert model.use_nested_tensor
        assert torch.equal(model(x, src_key_padding_mask=padded), stock)


def test_filter_and_report():
    model = nn.Sequential(mlp(), transformer().encoder)
    asked = []

    def keep_out_the_second_linear(module, name):
        asked.append(name)
        return name != "0.3"

    report = swap_(model, filter_fn=keep_out_the_second_linear)
    assert isinstance(report, SwapReport) and "0.3" in asked
    assert type(model[0][0]) is LinearAct and type(model[0][3]) is nn.Linear
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons == {
        "0.3": "filter_fn refused it",
        "0.5": "no activation follows it in an nn.Sequential",
    }
    text = str(report).splitlines()
    assert text[0].split() == ["module", "from", "to", "reason"]
    assert text[-1] == f"{len(report.swapped)} swapped, 2 left"
    assert text[1].split()[:4] == ["0.0", "Linear", "LinearAct", "with"]
    assert any(line.endswith("filter_fn refused it") for line in text)


class _Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(module):
    module.register_forward_hook(lambda *arguments: None)
    return module


def _parametrized():
    module = nn.Linear(4, 4)
    nn.utils.parametrizations.weight_norm(module)
    return module


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: [_Scaled(4, 4), nn.ReLU()], "a subclass of Linear may compute something else"),
        (lambda: [_hooked(nn.Linear(4, 4)), nn.ReLU()], "it has hooks"),
        (lambda: [nn.Linear(4, 4), _hooked(nn.ReLU())], "the ReLU after it has hooks"),
        (lambda: [_parametrized(), nn.ReLU()], "it is parametrized"),
        (lambda: [nn.Linear(4, 4), nn.LeakyReLU(0.2)], "LeakyReLU(negative_slope=0.2) follows it"),
        (lambda: [nn.Linear(4, 8), nn.GLU()], "GLU(dim=-1) follows it"),
        (lambda: [nn.Linear(4, 4), nn.Linear(4, 4)], "in_features=4"),
        (lambda: [nn.Linear(4, 4)], "no activation follows it in an nn.Sequential"),
        (lambda: [_hooked(nn.MultiheadAttention(4, 2))], "it has hooks"),
    ],
)
def test_what_is_left_alone(build, reason):
    model = nn.Sequential(*build())
    classes = [type(m) for m in model.modules()]
    report = swap_(model)
    assert not report.swapped and reason in report.skipped[0].reason
    assert [type(m) for m in model.modules()] == classes


def test_shared_modules():
    shared, activation = nn.Linear(4, 4), nn.ReLU()
    model = nn.Sequential(shared, activation, shared, nn.Linear(4, 4), activation)
    x = torch.randn(2, 4)
    expected = model(x)
    report = swap_(model)
    assert [row.name for row in report.swapped] == ["3"]
    assert report.skipped[0].reason.startswith("it is shared")
    # The activation still serves the shared Linear.
    assert model[1] is activation and model[4].stock is activation
    torch.testing.assert_close(model(x), expected)
    unswap_(model)
    assert model[4] is activation


def test_attributes_are_not_paired():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x)) + self.fc(x)

    model = Block()
    x = torch.randn(2, 4)
    expected = model(x)
    assert not swap_(model).swapped
    assert torch.equal(model(x), expected)


class _Block(nn.Module):
    """An activation and Linears as attributes; sub-classes differ in how they call them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.fc2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU()
        self.flag, self.seen, self.table = False, [], {"act": self.act}
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.seen.append(x)
        h = self.fc(x)
        return self.fc2(self.act(h)) + x


class _Twice(_Block):
    def forward(self, x):
        return self.act(self.fc2(self.act(self.fc(x))))


class _Branch(_Block):
    def forward(self, x):
        h = self.fc(x)
        if self.flag:
            return h
        return self.act(h)


class _Loop(_Block):
    def forward(self, x):
        x = self.fc(x)
        for _ in self.seen:
            x = x + 1
        return self.act(x)


class _Helper(_Block):
    def after(self, x):
        return x if self.flag else self.act(x)

    def forward(self, x):
        return self.after(self.fc(x))


class _DataDependent(_Block):
    def forward(self, x):
        return self.act(self.fc(x)) if x.sum() > 0 else x


class _Aliased(_Block):
    def forward(self, x):
        return self.table["act"](self.fc(x))


class _ReadTwice(_Block):
    def forward(self, x):
        h = self.fc(x)
        return self.act(h) + h


class _PartlyRead(_Block):
    def forward(self, x):
        return self.act(self.fc(x)[..., :2])


class _Function(_Block):
    def forward(self, x):
        return torch.relu(self.fc(x))


def test_attribute_pairs_that_a_trace_proves():
    model = _Block()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = step(model, x)
    count, state = model.count.clone(), torch.get_rng_state()
    seen, act = list(model.seen), model.act
    report = swap_(model)
    assert torch.equal(model.count, count) and torch.equal(torch.get_rng_state(), state)
    assert len(model.seen) == len(seen)
    assert [(row.name, row.reason) for row in report.swapped] == [("fc", "with GELU")]
    assert report.skipped[0].reason == "the forward of _Block applies no activation to it alone"
    torch.testing.assert_close(step(model, x), before)
    assert not swap_(model).swapped
    unswap_(model)
    assert model.act is act and type(model.fc) is nn.Linear
    torch.testing.assert_close(step(model, x), before)


def test_an_attribute_activation_of_two_linears():
    model = _Twice()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = step(model, x)
    assert [row.name for row in swap_(model).swapped] == ["fc", "fc2"]
    torch.testing.assert_close(step(model, x), before)
    hooked = _Twice()
    _hooked(hooked.fc2)
    report = swap_(hooked)
    assert not report.swapped
    assert report.skipped[0].reason == "its GELU also serves fc2: it has hooks"


@pytest.mark.parametrize(
    "kind, reason",
    [
        (_Branch, "the forward of _Branch branches"),
        (_Loop, "the forward of _Loop branches"),
        (_Helper, "the forward of _Helper branches"),
        (_DataDependent, "torch.fx cannot trace the forward of _DataDependent"),
        (_Aliased, "torch.fx cannot trace the forward of _Aliased"),
        (_ReadTwice, "the forward of _ReadTwice applies no activation to it alone"),
        (_PartlyRead, "the forward of _PartlyRead applies no activation to it alone"),
        (_Function, "the forward of _Function applies no activation to it alone"),
    ],
)
def test_attribute_pairs_that_are_not_certain(kind, reason):
    model = kind()
    x = torch.randn(2, 4)
    expected = model(x)
    report = swap_(model)
    assert not report.swapped and report.skipped[0].reason == reason
    assert torch.equal(model(x), expected)


def test_only_code_of_the_forward_counts():
    """Neither what the garbage collector calls, nor what torch.fx does before the forward."""

    class Branching:
        def __getattribute__(self, name):  # asked for its __class__ by torch.fx
            return None if name == "other" else object.__getattribute__(self, name)

    def callback(phase, info):
        return 1 if phase == "start" else 2

    model = _Block()
    model.config = Branching()
    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        report = swap_(model)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert [row.name for row in report.swapped] == ["fc"]


def test_replaced_forwards_are_left_alone():
    for module in ("", "fc", "act"):
        model = _Block()
        owner = model.get_submodule(module)
        owner.forward = owner.forward
        assert not swap_(model).swapped


def test_pruned_and_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model[2].weight.requires_grad_(False)
    x = torch.randn(3, 4)
    expected = model(x)
    report = swap_(model)
    assert report.skipped[0].reason == "it has hooks"
    assert [row.name for row in report.swapped] == ["2"]
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model[2].weight.grad is None and model[2].bias.grad is not None
    prune.remove(model[0], "weight")
    assert [row.name for row in swap_(model).swapped] == ["0"]
    torch.testing.assert_close(model(x), expected)


def test_hooks_added_after_the_swap_run():
    model = mlp()
    swap_(model)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, out: seen.append(out.min().item()))
    model(torch.randn(3, 6))
    assert len(seen) == 1 and seen[0] >= 0.0


def test_swapped_model_compiles_as_one_graph():
    model = mlp()
    swap_(model)
    x = torch.randn(3, 6)
    expected = model(x)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected
    )


@pytest.mark.parametrize("function", [swap_, unswap_])
def test_other_objects_are_refused(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        function([nn.Linear(2, 2)])
