"""Softmax cross-entropy from logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnn import _autograd, _check, backend, reference
from fastnn._ops import REDUCTIONS, accumulate_dtype

_BYTE_LABELS = torch.uint8
# On the CPU, `auto` leaves plain losses of so few logits to torch: its graph is made in C++, ours
# in Python, and that difference (about 35 us a step) is more than the kernels can win back.
_TORCH_UP_TO = 32768
_TORCH_ROWS = 256
_TORCH_ANY_ROWS = 2560  # logits; fewer are not worth a look at their shape
_TORCH_REDUCTION = {name: code for code, name in enumerate(REDUCTIONS)}
_torch_loss = torch._C._nn.cross_entropy_loss
LEFT_TO_TORCH = (
    f"losses of at most {_TORCH_ANY_ROWS} logits, or {_TORCH_ROWS} rows and {_TORCH_UP_TO} logits,"
    " without z_loss, softcap and return_lse: torch's call costs less"
)


def _loss_dtype(input: Tensor) -> torch.dtype:
    """torch's: the input's, but float32 under autocast."""
    return input.dtype if _autograd.autocast_dtype(input) is None else accumulate_dtype(input.dtype)


def check_loss_options(name, weight, classes, reduction, label_smoothing, z_loss, softcap):
    """The checks that both losses share."""
    if reduction not in REDUCTIONS:
        _check.choice(name, "reduction", reduction, REDUCTIONS)
    if not 0.0 <= label_smoothing <= 1.0:
        _check.fail(RuntimeError, name, "label_smoothing", "in [0, 1]", label_smoothing)
    if softcap is not None and softcap <= 0.0:
        _check.fail(ValueError, name, "softcap", "positive or None", softcap)
    if z_loss < 0.0:
        _check.fail(ValueError, name, "z_loss", "at least 0", z_loss)
    if weight is not None and weight.shape != (classes,):
        _check.fail(RuntimeError, name, "weight", f"of shape ({classes},)", tuple(weight.shape))


def check_target(name, like_name, like, target, rows_shape, soft_shape):
    """The target has one label a row, or a probability for each class; returns which (soft)."""
    if target.device != like.device:
        expected = f"on {like_name}'s device {like.device}"
        _check.fail(RuntimeError, name, "target", expected, target.device)
    soft = target.is_floating_point()
    expected_shape = soft_shape if soft else rows_shape
    if soft and target.shape == rows_shape and rows_shape != soft_shape:
        _check.fail(RuntimeError, name, "target", "int64 class indices", target.dtype)
    if target.shape != expected_shape:
        # As in torch, where only another number of rows is a ValueError.
        rows_differ = not soft and target.dim() == len(rows_shape)
        kind = ValueError if rows_differ and target.shape[0] != rows_shape[0] else RuntimeError
        what = f"of shape {tuple(expected_shape)}"
        _check.fail(kind, name, "target", what, tuple(target.shape))
    if not soft and target.dtype not in (torch.int64, _BYTE_LABELS):
        _check.fail(RuntimeError, name, "target", "int64 class indices", target.dtype)
    return soft


class CrossEntropyFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(ops, input, target, weight, dtype, options):
        loss, lse, total_weight = ops.cross_entropy_forward(input, target, weight, *options)
        return loss.to(dtype), lse, total_weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ops, input, target, weight, ctx.dtype, ctx.options = inputs
        _, lse, total_weight = output
        ctx.mark_non_differentiable(total_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, total_weight)

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, _grad_total_weight):
        if grad_loss is None and grad_lse is None:
            return (None,) * 6
        input, target, weight, lse, total_weight = ctx.saved_tensors
        _, wants_input, wants_target, *_ = ctx.needs_input_grad
        if _autograd.wants_composite():

            def composite(input, target):
                # In the loss's dtype, as torch's autocast would have it.
                return _reference(input.to(ctx.dtype), target, weight, ctx.options, True)

            gradients = _autograd.composite_gradients(
                composite, (input, target), (grad_loss, grad_lse)
            )
            return None, *gradients, None, None, None
        if grad_loss is None:
            rows = lse.shape if ctx.options[0] == "none" else ()
            grad_loss = lse.new_zeros(rows)
        grad_input, grad_target = ctx.ops.cross_entropy_backward(
            grad_loss, grad_lse, input, target, weight, lse, total_weight, *ctx.options,
            (wants_input, wants_target),
        )  # fmt: skip
        return (
            None,
            grad_input if wants_input else None,
            grad_target if wants_target else None,
            None,
            None,
            None,
        )


def _reference(input, target, weight, options, return_lse):
    reduction, ignore_index, label_smoothing, z_loss, softcap = options
    return reference.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, return_lse=return_lse,
    )  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax cross-entropy, as `torch.nn.functional.cross_entropy`, in one read of the logits.

        z = softcap * tanh(input / softcap),  lse = log sum_c exp(z_c)
        loss = sum_c q_c (lse - z_c) + z_loss * lse^2

    q is the target's distribution with class weights and label smoothing, exactly torch's; `mean`
    divides by the sum of the targets' weights. The input is never changed.

    Args:
        input: logits (N, C), (C) or (N, C, d1, ...); float32, bfloat16, float16 (float64 on the
            CPU), any strides.
        target: class indices, int64 or uint8, of the input's shape without C; or probabilities of
            the input's shape and a floating type.
        weight: (C,), of the input's dtype: rescales each class.
        ignore_index: label of rows that count neither in the loss nor in its mean.
        reduction: "none", "mean" or "sum".
        label_smoothing: in [0, 1].
        z_loss: weight of lse^2, added per counted row and reduced with it.
        softcap: bounds the logits to (-softcap, softcap) first.
        return_lse: also return lse, differentiable, float32 (float64 for float64).
    Returns:
        The loss in the input's dtype (float32 under autocast): a scalar, or the target's shape for
        "none"; with `return_lse` the pair (loss, lse). The mean of no counted row is NaN.
    Raises:
        ValueError, RuntimeError: options or shapes that do not fit, as torch raises them.
        IndexError: a label out of range, on the CPU (NaN on CUDA).
        TypeError: an argument that is no tensor.
    Backends:
        native (CPU, CUDA), triton, reference. Under `auto`, losses of up to 2560 logits on the CPU,
        or of up to 256 rows and 32768 logits of an input (N, C, ...), without z_loss, softcap and
        return_lse, are torch's own, whose call costs less.
    Reference:
        Milakov & Gimelshein 2018 (arXiv:1805.02867); Chowdhery et al. 2022 (arXiv:2204.02311) for
        z_loss.
    """
    # First, and in few words: a microsecond here is 2 % of the call that is left to torch, and to
    # make the shape costs half of that.
    if (
        softcap is None
        and not z_loss
        and not return_lse
        and isinstance(input, Tensor)
        and input.is_cpu
        and (logits := input.numel()) <= _TORCH_UP_TO
        and (
            logits <= _TORCH_ANY_ROWS
            or (input.dim() > 1 and logits <= _TORCH_ROWS * input.shape[1])
        )
        and backend.chosen == "auto"
        and (code := _TORCH_REDUCTION.get(reduction)) is not None
    ):
        return _torch_loss(input, target, weight, code, ignore_index, label_smoothing)
    name = "cross_entropy"
    _check.tensor(name, input=input, target=target, weight_or_none=weight)
    shape = input.shape
    dims = len(shape)
    if dims == 0:
        _check.fail(RuntimeError, name, "input", "at least 1-D", "a scalar")
    if not input.is_floating_point():
        _check.fail(NotImplementedError, name, "input", "floating point", input.dtype)
    classes = shape[1 if dims > 1 else 0]
    check_loss_options(name, weight, classes, reduction, label_smoothing, z_loss, softcap)
    rows_shape = shape[:1] + shape[2:] if dims > 1 else shape[1:]
    if dims == 1 and target.shape == (1,) and not target.is_floating_point():
        # torch takes it, and answers as for a scalar.
        target = target.squeeze(0)
    soft = check_target(name, "input", input, target, rows_shape, shape)
    if soft and ignore_index >= 0:
        expected = "negative where target is probabilities"
        _check.fail(RuntimeError, name, "ignore_index", expected, ignore_index)
    dtype = _loss_dtype(input)
    if weight is not None:
        if weight.dtype != input.dtype and not soft and dtype == input.dtype:
            _check.same_kind(name, "input", input, weight=weight)
    if soft and dtype == input.dtype and (target.dtype != dtype or weight is not None):
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if target.dtype == _BYTE_LABELS:
        target = target.long()
    only_plain = None
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        only_plain = "the gradient of class weights"
    ops = backend.resolve(name, input, only_plain, prob_target=soft, k_dim=dims > 2)
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    if ops is None:
        return _reference(input, target, weight, options, return_lse)
    if _autograd.is_recorded(input, target):
        loss, lse, _ = _autograd.apply(
            CrossEntropyFunction, ops, input, target, weight, dtype, options
        )
    else:
        loss, lse, _ = ops.cross_entropy_forward(input, target, weight, *options)
        loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on fastnn's kernels.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch's.
        z_loss, softcap: as for `fastnn.functional.cross_entropy`.
    """

    def __init__(
        self, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0, *, z_loss=0.0, softcap=None,
    ):  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
        )  # fmt: skip
