"""What PyTorch puts around a model, on one that holds every family of fastnn."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import fastnn

# What torch.vmap says when it falls back to a loop of its own.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
WIDTH, CLASSES = 16, 40


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.encoder = fastnn.TransformerEncoderLayer(
            WIDTH, 2, 24, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.mlp = fastnn.GatedMLP(WIDTH, 24, WIDTH, dropout_p=dropout)
        self.head = fastnn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True, label_smoothing=0.1)
        self.other = fastnn.LinearAct(WIDTH, CLASSES, activation="tanh")
        # Its options keep it from being torch's own at this size.
        self.loss = fastnn.CrossEntropyLoss(z_loss=1e-3)

    def forward(self, x, target):
        x = self.mlp(self.encoder(x))
        return self.head(x, target) + self.loss(self.other(x).flatten(0, 1), target.flatten())


def build(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Model(**options).to(dtype)


def batch(texts=4, length=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(texts, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (texts, length), generator=generator)


def step(model, x, target, call=None):
    """Loss and gradients, the input's last."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = (model if call is None else call)(x, target)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), x.grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_good_as_plain_torch(dtype):
    model, inputs = build(torch.float32), batch(16, 12, torch.float32)
    oracle = step(copy.deepcopy(model).double(), inputs[0].double(), inputs[1])

    def errors():
        with torch.autocast("cpu", dtype):
            loss = model(*inputs)
        assert loss.dtype == torch.float32
        model.zero_grad()
        loss.backward()
        results = [p.grad for p in model.parameters()]
        assert all(result.dtype == torch.float32 for result in results)
        return [(a - b).square().mean().sqrt() for a, b in zip(results, oracle[1:-1], strict=True)]

    ours = errors()
    with fastnn.use_backend("reference"):
        torchs = errors()
    for (name, _), error, theirs in zip(model.named_parameters(), ours, torchs, strict=True):
        assert error <= 2 * theirs, f"{name}: {error:.2e}, plain torch {theirs:.2e}"


def test_grad_scaler():
    model, (x, target) = build(torch.float32), batch(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for index in range(8):
        before = model.other.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = model(x * (torch.inf if index == 3 else 1), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.other.weight, before) == (index == 3)
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**9 and losses[-1] < losses[0] - 0.5


def test_compiles_for_training_and_inference():
    model = build()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for texts, length in ((4, 6), (5, 9), (3, 7)):
        inputs = batch(texts, length)
        torch.testing.assert_close(step(model, *inputs, compiled), step(model, *inputs))
    with torch.no_grad():
        for texts in (4, 7):
            torch.testing.assert_close(compiled(*batch(texts)), model(*batch(texts)))


def test_exports_with_dynamic_shapes():
    model = build().eval()
    sizes = {0: torch.export.Dim("texts", max=64), 1: torch.export.Dim("length", max=64)}
    exported = torch.export.export(model, batch(), dynamic_shapes=(sizes, sizes)).module()
    for texts, length in ((4, 6), (7, 11)):
        inputs = batch(texts, length)
        torch.testing.assert_close(exported(*inputs), model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_each_sample(dtype, monkeypatch):
    monkeypatch.undo()  # outside of vmap, float32 attention of this size is torch's
    model, (x, target) = build(dtype), batch(dtype=dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, target):
        return functional_call(model, parameters, (x[None], target[None]))

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, target)
    for index in range(len(x)):
        wanted = step(model, x[index : index + 1], target[index : index + 1])[1:-1]
        for gradient, alone in zip(gradients.values(), wanted, strict=True):
            torch.testing.assert_close(gradient[index], alone)


def test_vmap_inside_of_autograd():
    model, (x, target) = build(), batch()

    def each(x, target):  # samples of a batch of 2, in the middle
        return vmap(model, (1, 1))(x.unflatten(0, (2, 2)), target.unflatten(0, (2, 2))).mean()

    torch.testing.assert_close(step(model, x, target, each), step(model, x, target))


@pytest.mark.parametrize(
    "batched", ["q", "kv", "mask", "bias", "slopes sinks", "q kv mask slopes sinks"]
)
def test_vmap_of_attention(batched):
    torch.manual_seed(3)
    shapes = {
        "q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8), "mask": (2, 1, 5, 7),
        "slopes": (4,), "sinks": (4,),
    }  # fmt: skip
    if batched == "bias":
        shapes["mask"] = (5, 7)
    batched = batched.replace("kv", "k v").replace("bias", "mask").split()
    inputs = {
        name: torch.randn(*([3] if name in batched else []), *shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    inputs["slopes"] = inputs["slopes"].abs()

    def call(q, k, v, mask, slopes, sinks):
        return fastnn.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=True, alibi_slopes=slopes, sinks=sinks, return_lse=True
        )

    def run(function):
        leaves = {
            name: x if name == "slopes" else x.clone().requires_grad_()
            for name, x in inputs.items()
        }
        out, lse = function(*leaves.values())
        wanted = [x for x in leaves.values() if x.requires_grad]
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), wanted)]

    def one_by_one(*tensors):
        picked = [
            call(*(x[i] if name in batched else x for name, x in zip(inputs, tensors, strict=True)))
            for i in range(3)
        ]
        return [torch.stack(results) for results in zip(*picked, strict=True)]

    mapped = vmap(call, tuple(0 if name in batched else None for name in inputs))
    torch.testing.assert_close(run(mapped), run(one_by_one))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_dropout(randomness):
    out = vmap(lambda x: fastnn.dropout(x, 0.5), randomness=randomness)(torch.ones(3, 1000))
    assert abs(out.mean() - 1) < 0.1
    assert torch.equal(out[0], out[1]) == (randomness == "same")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    model, inputs = build(dropout=0.2), batch()

    def saved_again(x, target):
        return checkpoint(model, x, target, use_reentrant=use_reentrant)

    results = []
    for call in (None, saved_again):
        torch.manual_seed(4)
        results.append(step(model, *inputs, call))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference_mode():
    model, inputs = build(), batch()
    with torch.no_grad():
        expected = model(*inputs)
    with torch.inference_mode():
        loss = model(*inputs)
        assert loss.is_inference() and torch.equal(loss, expected)
    step(model, *inputs)


def test_meta_device():
    model, inputs = build(), batch()
    with torch.device("meta"):
        empty = Model().double()
        fastnn.swap_(empty)
    assert all(p.is_meta for p in empty.parameters())
    assert empty(*(x.to("meta") for x in inputs)).is_meta
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(*inputs), model(*inputs))


def test_parametrizations():
    x = torch.randn(5, 8, dtype=torch.float64)
    results = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).double()
        if swapped:
            fastnn.swap_(model)
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.orthogonal(model[2])
        model(x).square().sum().backward()
        results.append([model(x).detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)
    out = model(x)
    fastnn.unswap_(model)
    assert isinstance(model[0], nn.Linear) and not isinstance(model[0], fastnn.LinearAct)
    torch.testing.assert_close(model(x), out)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), out)


def train(kind):
    """Two steps on halves of a batch are those of one process on all of it."""
    rank, model, (x, target) = dist.get_rank(), build(), batch()
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (2,))
        fully_shard(model.encoder, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(x[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2]).backward()
        optimizer.step()
    values = [p if kind == "ddp" else p.full_tensor() for p in model.parameters()]
    alone = build()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for _ in range(2):
        step(alone, x, target)
        optimizer.step()
    torch.testing.assert_close(values, list(alone.parameters()))


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("team", [2], indirect=True)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(team, kind):
    team.run(train, kind)


def test_forward_mode_is_the_references():
    """No kernel has a tangent: plain PyTorch serves the call, and a backend by name refuses."""
    torch.manual_seed(0)
    x, w, target = torch.randn(4, 8), torch.randn(50, 8), torch.randint(50, (4,))
    with fastnn.use_backend("auto"):
        for ours, theirs in (
            (lambda x: fastnn.linear_act(x, w, None, "gelu"), lambda x: F.gelu(x @ w.T)),
            (lambda x: fastnn.cross_entropy(x @ w.T, target, z_loss=0.0, return_lse=True)[1],
             lambda x: (x @ w.T).logsumexp(-1)),
            (lambda x: fastnn.linear_cross_entropy(x, w, target),
             lambda x: F.cross_entropy(x @ w.T, target)),
            (lambda x: fastnn.dropout(x, 1.0), lambda x: x * 0.0),
        ):  # fmt: skip
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                ours_dual, theirs_dual = ours(dual), theirs(dual)
                for got, wanted in zip(
                    torch.autograd.forward_ad.unpack_dual(ours_dual),
                    torch.autograd.forward_ad.unpack_dual(theirs_dual), strict=True,
                ):  # fmt: skip
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        hessian = torch.func.hessian(lambda x: fastnn.linear_act(x, w, None, "gelu").sum())
        expected = torch.func.hessian(lambda x: F.gelu(x @ w.T).sum())
        torch.testing.assert_close(hessian(x[0]), expected(x[0]), rtol=1e-4, atol=1e-5)
    with (
        fastnn.use_backend("native"),
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="linear_act with forward-mode"),
    ):
        fastnn.linear_act(x, w)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_the_references(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5)).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    with fastnn.use_backend("auto"):
        expected = model(x)
        fastnn.swap_(model)
        for ours, theirs in zip(model(x).unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert model.train()(x).is_nested
