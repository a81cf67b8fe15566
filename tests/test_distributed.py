"""The vocabulary and the sequence shared out over 2 and 4 processes, against one process."""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from functools import partial
from multiprocessing import connection

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

import torch.distributed as dist
from attention_cases import NATIVE, compare, operands, values
from attention_cases import OPTIONS as ATTENTION_OPTIONS
from conftest import ROOT, assert_close_to_oracle
from test_linear_cross_entropy import DTYPES, OPTION_NAMES, evaluate, make
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import reference
from fastnn._ring import Ring
from fastnn.distributed import (
    context_parallel_attention,
    shard_sequence,
    unshard_sequence,
    vocab_parallel_linear_cross_entropy,
)


def _serve(rank, ranks, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    while True:
        function, arguments = pipe.recv()
        try:
            torch.manual_seed(0)
            function(*arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


class Team:
    """Processes that wait for functions to run. After a failure new ones are started."""

    def __init__(self, ranks, folder):
        self.ranks, self.folder, self.started, self.members = ranks, folder, 0, []

    def start(self):
        self.started += 1
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, and not by each process
        for rank in range(self.ranks):
            mine, theirs = context.Pipe()
            store = self.folder / str(self.started)
            arguments = rank, self.ranks, store, theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, mine))

    def stop(self):
        for process, pipe in self.members:
            process.kill()
            process.join()
            pipe.close()
        self.members = []

    def run(self, function, *arguments, seconds=90):
        """Runs it on every rank; fails with the first error, death or delay of one."""
        if not self.members:
            self.start()
        for _, pipe in self.members:
            pipe.send((function, arguments))
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self.members)}
        deadline = time.monotonic() + seconds
        failure = None
        while pending and not failure:
            ready = connection.wait(pending, max(deadline - time.monotonic(), 0.0))
            if not ready:
                failure = f"ranks {sorted(pending.values())} did not answer in {seconds} s"
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    error = pipe.recv()
                    failure = failure or (error and f"rank {rank}:\n{error}")
                except EOFError:
                    process = self.members[rank][0]
                    process.join()
                    failure = f"rank {rank} died with exit code {process.exitcode}"
        if failure:
            self.stop()
            pytest.fail(failure, pytrace=False)


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def team(request, tmp_path_factory):
    team = Team(request.param, tmp_path_factory.mktemp("team"))
    # The kernels are the native ones: Triton's interpreter would only be imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        yield team
    team.stop()


# ---- the vocabulary ----

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


@contextlib.contextmanager
def refused(kind, match):
    """Every rank raises, and none is left in a collective."""
    with pytest.raises(kind, match=match):
        yield
    dist.barrier()


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


# ---- the sequence ----


def ring(query, key, value, *, layout="zigzag", group=None, return_lse=False, **options):
    """The attention of whole sequences, by their shards."""
    where = {"layout": layout, "group": group}
    shards = (shard_sequence(t, **where) for t in (query, key, value))
    out = context_parallel_attention(*shards, return_lse=return_lse, **where, **options)
    if not return_lse:
        return unshard_sequence(out, **where)
    return unshard_sequence(out[0], **where), unshard_sequence(out[1], -1, **where)


def shapes(ranks):
    """B, Hq, Hkv, Sq, Sk, D, Dv: grouped heads, one head, more than a block of keys."""
    length = 2 * ranks
    return (
        (2, 4, 2, 13 * length, 13 * length, 16, 24),
        (1, 1, 1, 9 * length, 9 * length, 7, 7),
        (1, 2, 2, 75 * length, 75 * length, 32, 32),
    )


def sequence(dtype, option):
    for layout in ("zigzag", "contiguous"):
        for shape in shapes(dist.get_world_size()):
            b, h, _, length = shape[:4]
            qkv, grad_out = operands(shape, dtype)
            grad_lse = values((b, h, length), torch.float32) if option == "lse" else None
            options = ATTENTION_OPTIONS["causal" if option == "lse" else option]()
            compare(qkv, options, grad_out, grad_lse, partial(ring, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "causal", "softcap", "scale", "lse"])
def test_sequence(team, option, dtype):
    team.run(sequence, dtype, option)


def other_keys():
    """Keys of another length, other numbers of dimensions, one head of keys for all."""
    ranks = dist.get_world_size()
    qkv, grad_out = operands((2, 4, 2, 5 * ranks, 9 * ranks, 8, 6), torch.float64)
    compare(qkv, {}, grad_out, function=partial(ring, layout="contiguous"))
    for shape in ((6 * ranks, 8), (3, 6 * ranks, 8), (2, 3, 2, 6 * ranks, 8)):
        q, k, v = (values(shape, torch.float64) for _ in range(3))
        ours, wanted = (f(q, k, v, is_causal=True) for f in (ring, fastnn_attention))
        torch.testing.assert_close(ours, wanted)
    k, v = k[:, :1], v[:, :1]
    torch.testing.assert_close(ring(q, k, v), fastnn_attention(q, k, v))


fastnn_attention = fastnn.scaled_dot_product_attention


def test_other_keys(team):
    team.run(other_keys)


def attention_contract():
    """Views, bits, accumulation, frozen inputs, autocast, plain PyTorch, no second derivative."""
    shape = shapes(dist.get_world_size())[0]
    whole, grad_out = operands(shape, torch.bfloat16, "permuted")
    qkv = [shard_sequence(t) for t in whole]
    for layout in ("permuted", "column", "offset"):
        compare(operands(shape, torch.float32, layout)[0], {"is_causal": True}, grad_out,
                function=ring)  # fmt: skip
    upstream = shard_sequence(grad_out)
    leaves = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in qkv]
    before = [t.detach().clone() for t in leaves]

    def forward():
        return context_parallel_attention(*leaves, is_causal=True, enable_gqa=True)

    out = forward()
    once = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    out.backward(upstream, retain_graph=True)
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, once, strict=True))
    forward().backward(upstream)
    for leaf, grad, value in zip(leaves, once, before, strict=True):
        assert torch.equal(leaf.grad, grad + grad) and torch.equal(leaf, value)
        others = [t for t in leaves if t is not leaf]
        for other in others:
            other.requires_grad_(False)
        assert torch.equal(torch.autograd.grad(forward(), leaf, upstream)[0], grad)
        for other in others:
            other.requires_grad_(True)
    with torch.no_grad():
        assert torch.equal(forward(), out)
    with torch.autocast("cpu", torch.bfloat16):
        wide = [t.detach().float() for t in leaves]
        result = context_parallel_attention(*wide, is_causal=True, enable_gqa=True)
    assert result.dtype == torch.bfloat16 and torch.equal(result, out)
    with fastnn.use_backend("reference"):
        for option in ("causal", "softcap"):
            qkv, grad_out = operands(shape, torch.float64)
            grad_lse = values(qkv[0].shape[:-1], torch.float64)
            compare(qkv, ATTENTION_OPTIONS[option](), grad_out, grad_lse, function=ring)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.autograd.grad(forward().sum(), leaves, create_graph=True)


def test_attention_contract(team):
    team.run(attention_contract)


def bad_sequences():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attention = context_parallel_attention
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    with refused(RuntimeError, "the same on every rank"):
        attention(q[:, :, rank:], k[:, :, rank:], v[:, :, rank:])
    with refused(RuntimeError, "the same on every rank"):
        attention(q, k, v, is_causal=rank == 0)
    with refused(RuntimeError, "an even one, with is_causal, got 5 and 5"):
        attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], is_causal=True)
    with refused(RuntimeError, "query must be of the key's length with is_causal, got 4 and 6"):
        attention(q[:, :, 2:], k, v, is_causal=True, layout="contiguous")
    with refused(NotImplementedError, "dropout_p must be 0, got 0.1"):
        attention(q, k, v, dropout_p=0.1)
    with refused(RuntimeError, "context_parallel_attention: key must be of batch dimensions"):
        attention(q, k[:, :1].expand(2, 3, 6, 8), v)
    with refused(ValueError, "layout must be one of zigzag, contiguous, got 'striped'"):
        attention(q, k, v, layout="striped")
    with refused(ValueError, "softcap must be"):
        attention(q, k, v, softcap=-1.0)
    with refused(TypeError, "key must be a Tensor"):
        attention(q, None, v)
    with refused(RuntimeError, f"length along dimension -2 that {2 * ranks} divides, got 15"):
        shard_sequence(torch.zeros(15, 2))
    with refused(RuntimeError, "even length along dimension 0, got 3"):
        unshard_sequence(torch.zeros(3), 0)
    with refused(RuntimeError, "shape must be the same on every rank"):
        unshard_sequence(torch.zeros(4, 2 + rank))
    with refused(IndexError, "dim must be"):
        shard_sequence(torch.zeros(8), 1)
    alone = dist.new_group([0])
    if rank == 0:
        assert torch.equal(shard_sequence(q, group=alone), q)
        torch.testing.assert_close(attention(q, k, v, group=alone), fastnn_attention(q, k, v))
    else:
        with pytest.raises(ValueError, match="one that this process belongs to"):
            attention(q, k, v, group=alone)


def test_bad_sequences(team):
    team.run(bad_sequences)


def shards():
    """Any dtype and dimension; each is the other's inverse and gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    places = torch.arange(6 * ranks)
    chunks = places.view(2 * ranks, 3)
    assert torch.equal(shard_sequence(places, 0).view(2, 3), chunks[[rank, 2 * ranks - 1 - rank]])
    mine = places.view(ranks, 6)[rank]
    assert torch.equal(shard_sequence(places, 0, layout="contiguous"), mine)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float16, torch.float64):
        whole = torch.randn(2, 6 * ranks, 3).to(dtype).transpose(0, 2)
        for layout in ("zigzag", "contiguous"):
            part = shard_sequence(whole, 1, layout=layout)
            assert torch.equal(unshard_sequence(part, 1, layout=layout), whole)
    leaf = torch.randn(6 * ranks, 3, requires_grad=True)
    factor = torch.randn(6 * ranks, 3)
    (unshard_sequence(shard_sequence(leaf).sin()) * factor).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf.detach().cos() * factor)


def test_shards(team):
    team.run(shards)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def memory():
    """Nothing of the size of the shard's logits, or of the sequence, is ever made."""
    ranks = dist.get_world_size()
    x = torch.randn(64, 8, requires_grad=True)
    w = torch.randn(100, 8, requires_grad=True)
    target = torch.randint(0, 100 * ranks, (64,))
    with Largest() as largest:
        vocab_parallel_linear_cross_entropy(x, w, target, label_smoothing=0.1).backward()
    assert largest.elements == w.numel()
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        context_parallel_attention(q, k, v, is_causal=True).sum().backward()
    assert largest.elements == k.numel() + v.numel()


@NATIVE
def test_memory(team):
    team.run(memory)


def groups():
    """Both halves of the processes at once, each a group of its own."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    halves = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    group = halves[rank // half]
    torch.manual_seed(rank // half)
    tensors, target, options = make(ROWS, FEATURES, CLASSES, torch.float32, "all")
    check(tensors, target, group=group, **options)
    qkv, grad_out = operands((1, 2, 1, 12 * half, 12 * half, 8, 8), torch.float32)
    compare(qkv, {"is_causal": True}, grad_out, function=partial(ring, group=group))


def test_groups(team):
    team.run(groups)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_every_pair_meets_once(layout, ranks):
    """All steps of all ranks are the causal mask; in zigzag each rank does the same in each."""
    length = 6 if layout == "zigzag" else 3
    chunks = torch.arange(length * ranks).view(-1, 3)
    held = [
        chunks[[rank, 2 * ranks - 1 - rank]].flatten() if layout == "zigzag" else chunks[rank]
        for rank in range(ranks)
    ]
    met = torch.zeros(length * ranks, length * ranks, dtype=torch.int64)
    for rank in range(ranks):
        ring = Ring(None, 1.0, 0.0, True, layout == "zigzag", rank, ranks, None)
        for step in range(ranks):
            meets = ring.meeting(step, length)
            if meets is None:
                assert layout == "contiguous" and step > rank
                continue
            rows, columns, causal = meets
            rows, columns = held[rank][rows], held[(rank - step) % ranks][columns]
            pairs = torch.ones(len(rows), len(columns), dtype=torch.int64)
            met[rows[:, None], columns] += pairs.tril() if causal else pairs
            if layout == "zigzag" and step:
                assert pairs.sum() == length * length / 2
    assert torch.equal(met, torch.ones_like(met).tril())


# ---- the programs ----


def test_example(tmp_path):
    program = "-m examples.distributed --quick"
    run = subprocess.run(
        [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(),
         *program.split()],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "largest relative difference" in run.stdout


def die_on_the_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    dist.barrier()


def hang_on_the_last_rank():
    if dist.get_rank() < dist.get_world_size() - 1:
        dist.barrier()
    time.sleep(30)


def test_failures_of_a_process_are_seen(team):
    """Of the tests themselves: a rank that raises, dies or hangs fails them."""
    if team.ranks > 2:
        pytest.skip("seen with 2")
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        team.run(divmod, 1, 0)
    with pytest.raises(pytest.fail.Exception, match="rank 1 died with exit code 7|rank 0:"):
        team.run(die_on_the_last_rank)
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] did not answer in 1 s"):
        team.run(hang_on_the_last_rank, seconds=1)
