"""The vocabulary shared out over 2 and 4 processes, against one process."""

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

import torch.distributed as dist
from attention_cases import NATIVE
from conftest import assert_close_to_oracle
from processes import Largest, own_half, refused
from test_linear_cross_entropy import DTYPES, OPTION_NAMES, evaluate, make
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastnn import reference
from fastnn.distributed import vocab_parallel_linear_cross_entropy

SIZES = {1: [101], 2: [40, 61], 4: [24, 31, 7, 39]}
ROWS, FEATURES, CLASSES = 33, 24, 101


def shard_of(tensor, group=None):
    sizes = SIZES[dist.get_world_size(group)]
    return None if tensor is None else tensor.split(sizes)[dist.get_rank(group)]


def sharded(input, linear_weight, target, *, linear_bias=None, weight=None, **options):
    """The function on this rank's rows of the whole weights."""
    group = options.get("group")
    return vocab_parallel_linear_cross_entropy(
        input, shard_of(linear_weight, group), target, linear_bias=shard_of(linear_bias, group),
        weight=shard_of(weight, group), **options,
    )  # fmt: skip


def collected(results, group=None):
    """Loss, gradient of the input and, of every rank's rows, those of weight and bias."""
    loss, grad_input, *shards = results
    whole = []
    for grad in shards:  # zero outside of the rank's rows
        total = grad.double()
        dist.all_reduce(total, group=group)
        whole.append(total.to(grad.dtype))
    return loss, grad_input, *whole


def check(tensors, target, function=sharded, group=None, **options):
    extra = {} if group is None else {"group": group}
    ours = collected(evaluate(function, tensors, target, **extra, **options), group)
    torchs, oracle = (
        evaluate(reference.linear_cross_entropy, tensors, target, double=double, **options)
        for double in (False, True)
    )
    names = ("loss", "grad_input", "grad_linear_weight", "grad_linear_bias")
    for what, *results in zip(names, ours, torchs, oracle, strict=False):
        assert_close_to_oracle(*results, what=f"{what} with {options}")
    return ours


def vocabulary(dtype, option):
    for reduction in ("none", "mean", "sum"):
        tensors, target, options = make(ROWS, FEATURES, CLASSES, dtype, option)
        check(tensors, target, reduction=reduction, bias=option != "plain", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_vocabulary(team, option, dtype):
    team.run(vocabulary, dtype, option)


def smoothing_and_softcap():
    for dtype in (torch.float64, torch.bfloat16):
        for smoothing in (0.3, 1.0):
            for option in ("plain", "weight"):
                tensors, target, options = make(ROWS, FEATURES, CLASSES, dtype, option)
                check(tensors, target, label_smoothing=smoothing, softcap=2.0, **options)


def test_smoothing_and_softcap(team):
    team.run(smoothing_and_softcap)


def lse_and_its_gradient():
    for option in ("plain", "all"):
        (x, w, b), target, options = make(ROWS, FEATURES, CLASSES, torch.float64, option)
        upstream = torch.randn(2, ROWS, dtype=torch.float64)
        upstream[1][target == -100] = 0.0  # the reference gives those an lse too
        results = []
        for function in (sharded, reference.linear_cross_entropy):
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            loss, lse = function(
                leaves[0], leaves[1], target, linear_bias=leaves[2], reduction="none",
                return_lse=True, **options,
            )  # fmt: skip
            grads = torch.autograd.grad((loss, lse), leaves, tuple(upstream))
            results.append((loss, lse.masked_fill(target == -100, 0.0), *grads))
        loss, lse, *grads = results[0]
        torch.testing.assert_close((loss, lse, *collected((loss, *grads))[1:]), results[1])


def test_lse_and_its_gradient(team):
    team.run(lse_and_its_gradient)


def labels_of_every_kind():
    (x, w, b), target, _ = make(18, FEATURES, CLASSES, torch.float64, "plain")
    batched = x.view(3, 6, FEATURES), w, b
    for shift in (0, 1, 5, 6, 9):
        if shift < 6:
            check(batched, target.view(3, 6), shift=shift)
        options = {"shift": shift, "reduction": "none", "return_lse": True}
        loss, lse = sharded(x.view(3, 6, FEATURES), w, target.view(3, 6), **options)
        assert loss.shape == lse.shape == (3, max(6 - shift, 0))
    for ignore_index in (0, 50, CLASSES - 1):  # a class of some rank
        for smoothing in (0.0, 0.1):
            labels = torch.randint(0, CLASSES, (18,))
            labels[::4] = ignore_index
            check((x, w, b), labels, ignore_index=ignore_index, label_smoothing=smoothing)
    labels = torch.randint(0, CLASSES, (18,), dtype=torch.uint8)
    torch.testing.assert_close(sharded(x, w, labels), sharded(x, w, labels.long()))
    torch.testing.assert_close(  # one row
        sharded(x[0], w, labels[0], reduction="none", z_loss=0.1),
        sharded(x, w, labels, reduction="none", z_loss=0.1)[0],
    )
    for labels in (target[:0], torch.full((18,), -100)):
        for reduction in ("none", "mean", "sum"):
            ours = check((x[: len(labels)], w, b), labels, reduction=reduction)
            assert ours[0].isnan().all() if reduction == "mean" else not ours[0].any()
            assert not any(grad.any() for grad in ours[1:])


def test_labels_of_every_kind(team):
    team.run(labels_of_every_kind)


def far_logits():
    """The lse of logits about 1e4 is float32: half a unit in its last place, 2^-11, may be lost."""
    tensors, target, _ = make(ROWS, FEATURES, CLASSES, torch.float32, "plain")
    far = *tensors[:2], tensors[2] + 1e4
    for reduction in ("none", "mean"):
        ours = collected(evaluate(sharded, far, target, reduction=reduction))
        torchs, oracle = (
            evaluate(reference.linear_cross_entropy, far, target, double, reduction=reduction)
            for double in (False, True)
        )
        for a, b, wanted in zip(ours, torchs, oracle, strict=True):
            error, theirs = ((t - wanted).abs().max() for t in (a, b))
            assert error <= 2 * theirs + 2**-11 * wanted.abs().max()


def test_far_logits(team):
    team.run(far_logits)


def views_and_bits():
    for dtype in (torch.float32, torch.bfloat16):
        (x, w, b), target, options = make(ROWS, FEATURES, CLASSES, dtype, "all")
        padded = torch.cat([w, w], 1)[:, 5 : 5 + FEATURES]
        for views in ((x.T.contiguous().T, w, b), (x[:1].expand(ROWS, FEATURES), padded, b)):
            before = [t.clone() for t in views]
            first, second = (evaluate(sharded, views, target, **options) for _ in range(2))
            assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))
            assert all(torch.equal(a, c) for a, c in zip(views, before, strict=True))
            check(views, target, **options)
        for result in first[:2]:  # what is whole has the same bits everywhere
            everywhere = [torch.empty_like(result) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, result.contiguous())
            assert all(torch.equal(result, other) for other in everywhere)


def test_views_and_bits(team):
    team.run(views_and_bits)


def accumulation():
    """Two backward passes, of one graph and of two, add up; what is frozen gets nothing."""
    (x, w, b), target, options = make(ROWS, FEATURES, CLASSES, torch.float64, "all")
    x.requires_grad_()
    mine, bias = (shard_of(t).clone().requires_grad_() for t in (w, b))
    options["weight"] = shard_of(options["weight"])

    def loss():
        return vocab_parallel_linear_cross_entropy(x, mine, target, linear_bias=bias, **options)

    once = torch.autograd.grad(loss(), (x, mine, bias))
    kept = loss()
    kept.backward(retain_graph=True)
    kept.backward()
    loss().backward()
    for leaf, grad in zip((x, mine, bias), once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * grad)
        others = [t for t in (x, mine, bias) if t is not leaf]
        for other in others:
            other.requires_grad_(False)
        torch.testing.assert_close(torch.autograd.grad(loss(), leaf)[0], grad)
        for other in others:
            other.requires_grad_(True)
    with torch.no_grad():
        torch.testing.assert_close(loss(), kept.detach())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(loss(), x, create_graph=True)[0].sum().backward()


def test_accumulation(team):
    team.run(accumulation)


def dtensor():
    ranks = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (ranks,))
    (x, w, b), target, options = make(ROWS, FEATURES, CLASSES, torch.float64, "all")
    expected = evaluate(reference.linear_cross_entropy, (x, w, b), target, **options)
    x.requires_grad_()
    parameter, bias, weight = (
        distribute_tensor(t, mesh, [Shard(0)]) for t in (w, b, options.pop("weight"))
    )
    parameter = torch.nn.Parameter(parameter)
    bias = torch.nn.Parameter(bias)
    loss = vocab_parallel_linear_cross_entropy(
        x, parameter, target, linear_bias=bias, weight=weight, **options
    )
    torch.testing.assert_close(loss.detach(), expected[0])
    upstream = torch.randn((), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (loss * upstream).backward()
    assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
    grads = x.grad, parameter.grad.full_tensor(), bias.grad.full_tensor()
    torch.testing.assert_close(grads, expected[1:])

    for wrong in ([Shard(1)], [Replicate()]):
        with pytest.raises(ValueError, match=r"linear_weight must be sharded by Shard\(0\)"):
            vocab_parallel_linear_cross_entropy(x, distribute_tensor(w, mesh, wrong), target)
    with pytest.raises(ValueError, match="must be None with a DTensor"):
        vocab_parallel_linear_cross_entropy(x, parameter, target, vocab_sizes=SIZES[ranks])
    with pytest.raises(TypeError, match="input must be a Tensor, whole on every rank"):
        vocab_parallel_linear_cross_entropy(parameter, w, target)
    few = distribute_tensor(w[: ranks - 1], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="at least one row on every rank"):
        vocab_parallel_linear_cross_entropy(x, few, target % (ranks - 1))


def test_dtensor(team):
    team.run(dtensor)


def autocast():
    (x, w, b), target, _ = make(ROWS, FEATURES, CLASSES, torch.float32, "plain")
    oracle = evaluate(reference.linear_cross_entropy, (x, w, b), target, double=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            ours = collected(evaluate(sharded, (x, w, b), target))
            torchs = evaluate(reference.linear_cross_entropy, (x, w, b), target)
        for results in zip(ours, torchs, oracle, strict=True):
            assert results[0].dtype == torch.float32
            error, theirs = ((r - results[2]).square().mean().sqrt() for r in results[:2])
            assert error <= 2 * theirs + 1e-6


def test_autocast(team):
    team.run(autocast)


def bad_vocabularies():
    loss = vocab_parallel_linear_cross_entropy
    rank, ranks = dist.get_rank(), dist.get_world_size()
    (x, w, _), target, _ = make(ROWS, FEATURES, CLASSES, torch.float32, "plain")
    mine, labels = shard_of(w), target.clone()
    for label in (CLASSES, -1):
        labels[3] = label
        with refused(IndexError, rf"target must be in \[0, {CLASSES}\) or -100, got {label}"):
            loss(x, mine, labels)
    with refused(RuntimeError, "input must be of the same shape on every rank"):
        loss(x[rank:], mine, target[rank:])
    with refused(ValueError, "vocab_sizes must be"):
        loss(x, mine, target, vocab_sizes=[1] * ranks)
    with refused(ValueError, "linear_weight must be of at least one row"):
        loss(x, w[:rank], target)
    with refused(RuntimeError, "target must be int64 class indices"):
        loss(x, mine, torch.rand(ROWS, len(mine)))
    with refused(RuntimeError, "linear_weight must be 2-D"):
        loss(x, mine[None], target)
    with refused(RuntimeError, "linear_bias must be of shape"):
        loss(x, mine, target, linear_bias=torch.zeros(CLASSES + 1))
    with refused(ValueError, "reduction must be"):
        loss(x, mine, target, reduction="max")
    with refused(TypeError, "target must be a Tensor"):
        loss(x, mine, None)
    given = loss(x, mine, target, vocab_sizes=SIZES[ranks])
    assert torch.equal(given, loss(x, mine, target))


def test_bad_vocabularies(team):
    team.run(bad_vocabularies)


def memory():
    """Nothing of the size of the shard's logits is ever made."""
    x = torch.randn(64, 8, requires_grad=True)
    w = torch.randn(100, 8, requires_grad=True)
    target = torch.randint(0, 100 * dist.get_world_size(), (64,))
    with Largest() as largest:
        vocab_parallel_linear_cross_entropy(x, w, target, label_smoothing=0.1).backward()
    assert largest.elements == w.numel()


@NATIVE
def test_memory(team):
    team.run(memory)


def groups():
    """Both halves of the processes at once, each a group of its own."""
    group = own_half()
    tensors, target, options = make(ROWS, FEATURES, CLASSES, torch.float32, "all")
    check(tensors, target, group=group, **options)


def test_groups(team):
    team.run(groups)
