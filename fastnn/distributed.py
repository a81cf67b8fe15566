"""The vocabulary of a loss, or the sequence of an attention, shared out over processes.

On torch.distributed: every function here is a collective, which all ranks of `group` call with the
same options and differentiate together, once (no second derivative). What is whole on every rank
(an input, a loss) is the same on all of them and is differentiated by all; each then holds the
whole gradient of what is whole, and its shard of the gradient of what is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from fastnn import _autograd, _check, backend
from fastnn._ops import accumulate_dtype
from fastnn._ring import Ring, RingAttention
from fastnn.attention import as_batches, check_arguments, refused_by_kernels
from fastnn.linear_cross_entropy import evaluate, prepare

LAYOUTS = ("zigzag", "contiguous")
_IGNORED = -1  # no label of a shard


def _position(name: str, group) -> tuple[int, int]:
    """This process's rank in the group, and how many there are."""
    rank = dist.get_rank(group)
    if rank < 0:
        _check.fail(ValueError, name, "group", "one that this process belongs to", group)
    return rank, dist.get_world_size(group)


def _table(numbers: Sequence[int], device: torch.device, group) -> list[list[int]]:
    """The numbers of every rank."""
    mine = torch.tensor(numbers, device=device)
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(table, mine, group=group)
    return torch.stack(table).tolist()


def _alike(name: str, what: str, numbers: Sequence[int], device: torch.device, group) -> None:
    """Fails on every rank where numbers differ; on the CPU, for elsewhere the host would wait."""
    if device.type == "cpu":
        table = _table(numbers, device, group)
        if any(row != table[0] for row in table):
            _check.fail(RuntimeError, name, what, "the same on every rank", table)


# ---- the vocabulary ----


class _Whole(torch.autograd.Function):
    """A tensor that is whole on every rank, whose gradient is the sum of what the ranks make."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wide = accumulate_dtype(grad.dtype)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, whose gradient is whole on each of them."""

    @staticmethod
    def forward(ctx, part, group):
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


def _total(values: Tensor) -> Tensor:
    """The sum in float64, by parts so small that torch adds up each on one thread."""
    parts = values.flatten().split(1 << 14)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()


def _local(name: str, argument: str, tensor: Tensor | None) -> Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        expected = "sharded by Shard(0) on a mesh of one dimension"
        got = f"{tensor.placements} on {tensor.device_mesh}"
        _check.fail(ValueError, name, argument, expected, got)
    return tensor.to_local()


def _chunk_sizes(rows: int, ranks: int) -> list[int]:
    """What Shard(0) gives each rank."""
    size = -(-rows // ranks)
    return [min(size, max(rows - rank * size, 0)) for rank in range(ranks)]


def _asked_sizes(name, input, linear_weight, group) -> list[int]:
    """The rows of every rank's shard, asked of the ranks."""
    rows, features = linear_weight.shape
    table = _table((rows, features, input.numel()), input.device, group)
    if any(row[1:] != table[0][1:] for row in table):
        _check.fail(RuntimeError, name, "input", "of the same shape on every rank", table)
    return [row[0] for row in table]


def _on_shard(loss_of, label, counted, mine, smoothing, share):
    """(cost, lse) of each row, 0 where it is not counted.

    lse is that of the shard's logits z, cost = sum_c q_c (lse - z_c) over the shard's classes with
    the whole vocabulary's q. `share` of all the probability is smoothed over the shard.
    """
    if not smoothing:
        # A label of another shard is any of this one, whose loss is not used.
        here = label.where(mine, 0).masked_fill(~counted, _IGNORED)
        loss, lse = loss_of(here, 0.0)
        return loss.where(mine, 0.0), lse
    # The loss of the shard alone smooths a probability of 1; a row whose label is here keeps less
    # than that, and one whose label is elsewhere is all smoothed. Each row is in one of two calls.
    kept = 1.0 - smoothing + share
    loss, lse = loss_of(label.masked_fill(~mine, _IGNORED), share / kept)
    elsewhere = torch.zeros_like(label).masked_fill(mine | ~counted, _IGNORED)
    smoothed, other_lse = loss_of(elsewhere, 1.0)
    return kept * loss + share * smoothed, lse + other_lse


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: int = 0,
    return_lse: bool = False,
    workspace_bytes: int | None = None,
    vocab_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastnn.linear_cross_entropy` with the rows of `linear_weight` shared out over the ranks.

        lse = log sum_r exp(lse_r),  loss = sum_c q_c (lse - z_c) + z_loss lse^2

    where rank r has the logits z of its classes and their log-sum-exp lse_r. No logits travel: the
    forward reduces the largest lse_r and two numbers a row (four with `weight`), the backward the
    gradient of `input`, in float32. Memory beside that is `linear_cross_entropy`'s on the shard;
    the backward makes the shard's logits again.

    Args:
        input: (*, in), whole on every rank; float32, bfloat16 or float16 (float64 on the CPU).
        linear_weight: (C_r, in), of the input's dtype: the ranks' shards follow each other, in the
            order of the ranks, and may differ in size. Or a DTensor (C, in) with Shard(0) on a mesh
            of one dimension, whose group is then used; its gradient is a DTensor like it.
        target: (*) class indices of the whole vocabulary (int64 or uint8), whole on every rank.
        linear_bias: (C_r,), sharded like linear_weight. (A shard whose logits are all -inf has no
            gradient: NaN.)
        weight: (C_r,), rescales each class; sharded like linear_weight.
        reduction, ignore_index, label_smoothing, z_loss, softcap, shift, return_lse,
        workspace_bytes: as for `linear_cross_entropy`. With `label_smoothing` the rows are served
            in two calls on the shard, one for those whose label is there.
        vocab_sizes: the rows of every rank's shard. None asks the ranks, for which the host waits
            (a DTensor knows).
        group: the ranks; None is all.
    Returns:
        What `linear_cross_entropy` returns, the same on every rank.
    Raises:
        ValueError, RuntimeError: options, shapes or shardings that do not fit; `target` of
            probabilities.
        IndexError: a label out of range, on the CPU (NaN on CUDA).
        TypeError: an argument that is no tensor, or an `input` or `target` that is a DTensor.
    Backends:
        native (CPU, CUDA), triton, reference.
    Reference:
        Shoeybi et al. 2019 (arXiv:1909.08053), section 3, for the parallel loss; here it is
        composed of the shards' losses.
    """
    name = "vocab_parallel_linear_cross_entropy"
    _check.tensor(
        name, input=input, linear_weight=linear_weight, target=target,
        linear_bias_or_none=linear_bias, weight_or_none=weight,
    )  # fmt: skip
    for argument, tensor in (("input", input), ("target", target)):
        if isinstance(tensor, DTensor):
            _check.fail(TypeError, name, argument, "a Tensor, whole on every rank", "a DTensor")
    if linear_weight.dim() != 2:
        _check.fail(RuntimeError, name, "linear_weight", "2-D", tuple(linear_weight.shape))
    if isinstance(linear_weight, DTensor):
        if group is not None or vocab_sizes is not None:
            expected = "None with a DTensor"
            _check.fail(ValueError, name, "group and vocab_sizes", expected, (group, vocab_sizes))
        mesh, rows = linear_weight.device_mesh, len(linear_weight)
        linear_weight = _local(name, "linear_weight", linear_weight)
        group, vocab_sizes = mesh.get_group(), _chunk_sizes(rows, mesh.size())
    linear_bias = _local(name, "linear_bias", linear_bias)
    weight = _local(name, "weight", weight)
    rank, ranks = _position(name, group)
    if target.is_floating_point():
        _check.fail(RuntimeError, name, "target", "int64 class indices", target.dtype)
    input, linear_weight, linear_bias, target, dtype, options = prepare(
        name, _Whole.apply(input, group), linear_weight, linear_bias, target, weight, reduction,
        ignore_index, label_smoothing, z_loss, softcap, shift,
    )  # fmt: skip
    reduction, ignore_index, smoothing, z_loss, softcap = options
    ops = backend.resolve("linear_cross_entropy", input)
    rows = len(linear_weight)
    sizes = _asked_sizes(name, input, linear_weight, group) if vocab_sizes is None else vocab_sizes
    if len(sizes) != ranks or sizes[rank] != rows:
        expected = f"{ranks} numbers of rows, {rows} for rank {rank}"
        _check.fail(ValueError, name, "vocab_sizes", expected, sizes)
    if min(sizes) < 1:
        expected = "of at least one row on every rank"
        _check.fail(ValueError, name, "linear_weight", expected, sizes)
    classes = sum(sizes)
    counted = target != ignore_index
    wrong = counted & ((target < 0) | (target >= classes))
    if wrong.is_cpu and wrong.any():
        expected = f"in [0, {classes}) or {ignore_index}"
        _check.fail(IndexError, name, "target", expected, target[wrong][0].item())

    label = target - sum(sizes[:rank])
    mine = counted & (label >= 0) & (label < rows)
    wide = accumulate_dtype(input.dtype)

    def loss_of(labels, smoothed):
        shard_options = ("none", _IGNORED, smoothed, 0.0, softcap)
        return evaluate(
            ops, input, linear_weight, linear_bias, labels, weight, wide, shard_options,
            workspace_bytes, True,
        )  # fmt: skip

    share = smoothing * rows / classes
    cost, lse = _on_shard(loss_of, label, counted, mine, smoothing, share)
    # The shard's part of sum_c q_c: of the row's label, and of the smoothing.
    of_label, of_all = mine.to(wide), lse.new_full((), share)
    if weight is not None:
        weights = weight.detach().to(wide)
        of_label = weights[label.where(mine, 0)].where(mine, 0.0)
        of_all = share * weights.mean()
    mass = (1.0 - smoothing) * of_label + of_all

    # Relative to the ranks' largest lse: what is reduced has no offset that would cost it digits.
    peak = lse.detach().clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    peak = peak.where(peak.isfinite(), 0.0)
    above = lse - peak
    parts = [above.exp(), torch.where(mass != 0.0, mass * above - cost, 0.0)]
    if weight is not None:
        parts += [of_label, of_all.expand_as(of_label)]
    exponentials, pulled, *masses = _Sum.apply(torch.stack(parts), group)
    rise = exponentials.log()
    lse = torch.where(counted, peak + rise, 0.0)
    if masses:
        of_label, of_all = (m.detach() for m in masses)
        mass = (1.0 - smoothing) * of_label + of_all
    else:
        of_label, mass = counted, 1.0
    loss = mass * rise - pulled + z_loss * lse.square()
    loss = torch.where(counted, loss, 0.0).masked_fill(wrong, math.nan)
    if reduction != "none":
        loss = _total(loss) / _total(of_label) if reduction == "mean" else _total(loss)
    loss = loss.to(dtype)
    if shift:
        length = max(input.shape[-2] - shift, 0)
        loss, lse = (t[..., :length] if t.dim() else t for t in (loss, lse))
    return (loss, lse) if return_lse else loss


# ---- the sequence ----


def _chunks(layout: str, rank: int, ranks: int) -> tuple[int, ...]:
    """Which of the sequence's equal chunks a rank holds."""
    return (rank, 2 * ranks - 1 - rank) if layout == "zigzag" else (rank,)


def _take(tensor: Tensor, dim: int, layout: str, rank: int, ranks: int) -> Tensor:
    """A rank's part of a whole sequence."""
    held = _chunks(layout, rank, ranks)
    chunks = tensor.tensor_split(ranks * len(held), dim)
    return torch.cat([chunks[index] for index in held], dim)


def _collect(tensor: Tensor, dim: int, layout: str, group) -> Tensor:
    """The whole sequence of the ranks' parts."""
    tensor, ranks = tensor.contiguous(), dist.get_world_size(group)
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(parts, tensor, group=group)
    chunks = {}
    for rank, part in enumerate(parts):
        held = _chunks(layout, rank, ranks)
        chunks |= zip(held, part.tensor_split(len(held), dim), strict=True)
    return torch.cat([chunks[index] for index in range(len(chunks))], dim)


class _ShardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, layout, rank, ranks, group):
        ctx.dim, ctx.layout, ctx.group = dim, layout, group
        return _take(tensor, dim, layout, rank, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _collect(grad, ctx.dim, ctx.layout, ctx.group), *(None,) * 5


class _UnshardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, layout, rank, ranks, group):
        ctx.arguments = dim, layout, rank, ranks
        return _collect(tensor, dim, layout, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _take(grad, *ctx.arguments), *(None,) * 5


def _check_sequence(name, tensor, dim, layout, group) -> tuple[int, int, int]:
    """(length, rank, ranks)"""
    _check.tensor(name, tensor=tensor)
    _check.choice(name, "layout", layout, LAYOUTS)
    if not -tensor.dim() <= dim < tensor.dim():
        expected = f"a dimension of the tensor {tuple(tensor.shape)}"
        _check.fail(IndexError, name, "dim", expected, dim)
    return tensor.shape[dim], *_position(name, group)


def shard_sequence(
    tensor: Tensor,
    dim: int = -2,
    *,
    layout: str = "zigzag",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's part of a sequence that is whole on every rank.

    "zigzag" cuts it into 2n chunks for n ranks, of which rank r has the chunks r and 2n - 1 - r, so
    that causal attention is the same work for every rank; "contiguous" gives rank r the chunk r of
    n. The gradient is whole on every rank (an all-gather). The tokens' places, for rotary
    embeddings say, are `shard_sequence(torch.arange(S), 0)`.

    Args:
        tensor: any shape and dtype; 2n (n where contiguous) divides its length along dim.
        dim: of the sequence.
        layout: "zigzag" or "contiguous".
        group: the ranks; None is all.
    Returns:
        A contiguous copy of 1/n of the tensor.
    Raises:
        RuntimeError: a length that cannot be shared out.
        ValueError, IndexError, TypeError: other arguments that do not fit.
    Reference:
        Llama Team 2024 (arXiv:2407.21783), section 3.3.2, for the chunks of a rank.
    """
    name = "shard_sequence"
    length, rank, ranks = _check_sequence(name, tensor, dim, layout, group)
    chunks = ranks * len(_chunks(layout, rank, ranks))
    if length % chunks:
        expected = f"of a length along dimension {dim} that {chunks} divides"
        _check.fail(RuntimeError, name, "tensor", expected, length)
    return _ShardSequence.apply(tensor, dim, layout, rank, ranks, group)


def unshard_sequence(
    tensor: Tensor,
    dim: int = -2,
    *,
    layout: str = "zigzag",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The whole sequence on every rank, of the parts that `shard_sequence` makes.

    The gradient of a rank's part is that part of the rank's gradient: all ranks must go on alike.

    Args:
        tensor: a rank's part, of the same shape on every rank (which only the CPU checks).
        dim, layout, group: as for `shard_sequence`.
    Returns:
        The tensor with n times the length along dim.
    Raises:
        RuntimeError: parts of different shapes, or of an odd length in zigzag.
        ValueError, IndexError, TypeError: other arguments that do not fit.
    """
    name = "unshard_sequence"
    length, rank, ranks = _check_sequence(name, tensor, dim, layout, group)
    numbers = (tensor.dim(), tensor.numel(), length, LAYOUTS.index(layout))
    _alike(name, "tensor's shape", numbers, tensor.device, group)
    if length % len(_chunks(layout, rank, ranks)):
        expected = f"of an even length along dimension {dim}"
        _check.fail(RuntimeError, name, "tensor", expected, length)
    return _UnshardSequence.apply(tensor, dim, layout, rank, ranks, group)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    layout: str = "zigzag",
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastnn.scaled_dot_product_attention` with the sequence shared out over the ranks.

        out = sum_r exp(lse_r - lse) softmax(S_r) value_r,  lse = log sum_r exp(lse_r)

    where S_r are the scores of the rank's queries and of the keys of rank r, and lse_r their
    log-sum-exp. Keys and values pass around the ring of ranks while each attends to what it has;
    in the backward their gradients follow them. Parts are added up in float32. Memory beside
    arguments and results, whatever the number of ranks: two blocks of keys and values, and in the
    backward two of their gradients and one of the query's, in float32.

    Args:
        query: (..., Hq, Sq, D), the rank's part of the sequence (see `shard_sequence`); float32,
            bfloat16 or float16 (float64 on the CPU).
        key: (..., H, Sk, D). value: (..., H, Sk, Dv). Each of the same shape on every rank (which
            only the CPU checks).
        is_causal: a token sees those before it in the whole sequence, and itself; Sq = Sk.
        scale, enable_gqa, softcap: as for `scaled_dot_product_attention`.
        dropout_p: only 0: the mask would be another than that of one process.
        return_lse: also return the log-sum-exp of each row's scores, differentiable.
        layout: how the sequence is shared out, "zigzag" (Sk even where causal) or "contiguous";
            without `is_causal` both are the same.
        group: the ranks; None is all.
    Returns:
        The rank's part of the result, (..., Hq, Sq, Dv) of the query's dtype; with `return_lse`
        also (..., Hq, Sq) in float32 (float64 for float64).
    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or differ between ranks.
        ValueError: unknown `layout`, a `softcap` out of range.
        NotImplementedError: dropout.
        TypeError: an argument that is no tensor.
    Backends:
        native (CPU, and CUDA with head dimensions up to 256), triton, reference. On the CPU the
        backward makes each part of the result again. Autocast as for torch's function.
    Reference:
        Liu, Zaharia & Abbeel 2023 (arXiv:2310.01889) for the ring; Llama Team 2024
        (arXiv:2407.21783), section 3.3.2, for the chunks that balance causal work.
    """
    name = "context_parallel_attention"
    _check.tensor(name, query=query, key=key, value=value)
    _check.choice(name, "layout", layout, LAYOUTS)
    query, key, value = _autograd.autocast(query, key, value)
    refused = refused_by_kernels(query, None)
    if refused:
        _check.fail(NotImplementedError, name, *refused)
    check_arguments(
        name, query, key, value, None, dropout_p, is_causal, enable_gqa, "top_left", softcap
    )
    if dropout_p > 0.0:
        _check.fail(NotImplementedError, name, "dropout_p", "0", dropout_p)
    rank, ranks = _position(name, group)
    q, k, v, _, lead = as_batches(query, key, value, None, enable_gqa)
    zigzag = layout == "zigzag"
    numbers = (*k.shape, *v.shape, k.itemsize, is_causal, zigzag)
    _alike(name, "shape, dtype and options", numbers, k.device, group)
    rows, columns = q.shape[2], k.shape[2]
    if is_causal and (rows != columns or (zigzag and columns % 2)):
        expected = f"of the key's length{', an even one,' if zigzag else ''} with is_causal"
        _check.fail(RuntimeError, name, "query", expected, f"{rows} and {columns}")
    ops = backend.resolve(
        "attention", q, head_dim=q.shape[-1], value_dim=v.shape[-1], softcap=softcap is not None
    )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    ring = Ring(ops, scale, float(softcap or 0.0), is_causal, zigzag, rank, ranks, group)
    out, lse = RingAttention.apply(q, k, v, ring)
    if len(lead) != 2:
        out = out.reshape(*lead, *out.shape[-2:])
        lse = lse.reshape(*lead, lse.shape[-1])
    return (out, lse) if return_lse else out
