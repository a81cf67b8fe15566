"""Linear projection + softmax cross-entropy, without ever holding the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnn import _autograd, _check, backend, reference
from fastnn.cross_entropy import check_loss_options, check_target


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Returns (loss, lse, total_weight, *unit gradients).

    `unit_mask` says which gradients the forward makes, for an upstream gradient of 1; the first
    backward scales them in place, later ones (and those with a gradient of lse) recompute.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        ops, input, linear_weight, linear_bias, target, weight, dtype, options, workspace, unit_mask
    ):
        loss, *others = ops.linear_cross_entropy_forward(
            input, linear_weight, linear_bias, target, weight, *options, workspace, unit_mask
        )
        return loss.to(dtype), *others

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ops, input, linear_weight, linear_bias, target, weight = inputs[:6]
        ctx.dtype, ctx.options, ctx.workspace, unit_mask = inputs[6:]
        _, lse, total_weight, *units = output
        ctx.mark_non_differentiable(total_weight, *units)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, lse, total_weight)
        # Detached: an output kept on its own node would be a cycle.
        ctx.units = [unit.detach() for unit in units] if any(unit_mask) else None

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, *_):
        if grad_loss is None and grad_lse is None:
            return (None,) * 10
        input, linear_weight, linear_bias, target, weight, lse, total_weight = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[1:4])
        if _autograd.wants_composite():

            def composite(input, linear_weight, linear_bias):
                loss, lse = _reference(
                    input, linear_weight, linear_bias, target, weight, ctx.options
                )
                return loss.to(ctx.dtype), lse

            gradients = _autograd.composite_gradients(
                composite, (input, linear_weight, linear_bias), (grad_loss, grad_lse)
            )
            return None, *gradients, *(None,) * 6
        if ctx.units is not None and grad_lse is None:
            gradients, ctx.units = ctx.units, None
            for gradient in gradients:
                ctx.ops.scale_(gradient, grad_loss)
        else:
            if grad_loss is None:
                grad_loss = lse.new_zeros(lse.shape if ctx.options[0] == "none" else ())
            gradients = ctx.ops.linear_cross_entropy_backward(
                grad_loss, grad_lse, input, linear_weight, linear_bias, target, weight, lse,
                total_weight, *ctx.options, ctx.workspace, wanted,
            )  # fmt: skip
        gradients = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        return None, *gradients, *(None,) * 6


def _reference(input, linear_weight, linear_bias, target, weight, options):
    reduction, ignore_index, label_smoothing, z_loss, softcap = options
    soft = target.is_floating_point()
    loss, lse = reference.linear_cross_entropy(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=None if soft else ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, return_lse=True,
    )  # fmt: skip
    return loss, lse if soft else lse.masked_fill(target == ignore_index, 0.0)


def _shifted(target, shift, ignore_index):
    """target[..., i + shift] at i; the last `shift` positions are ignored."""
    out = torch.full_like(target, ignore_index)
    if shift < target.shape[-1]:
        out[..., :-shift] = target[..., shift:]
    return out


def _check_arguments(name, input, linear_weight, linear_bias, target, weight):
    _check.tensor(
        name, input=input, linear_weight=linear_weight, target=target,
        linear_bias_or_none=linear_bias, weight_or_none=weight,
    )  # fmt: skip
    if input.dim() == 0:
        _check.fail(RuntimeError, name, "input", "at least 1-D", "a scalar")
    if linear_weight.dim() < 2:
        _check.fail(RuntimeError, name, "linear_weight", "at least 2-D", tuple(linear_weight.shape))
    if input.shape[-1] != linear_weight.shape[-1]:
        expected = f"of shape (*, {linear_weight.shape[-1]})"
        _check.fail(RuntimeError, name, "input", expected, tuple(input.shape))
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        expected = f"of shape {tuple(linear_weight.shape[:-1])}"
        _check.fail(RuntimeError, name, "linear_bias", expected, tuple(linear_bias.shape))
    if linear_weight.dim() > 2 and input.dim() != 2:
        expected = "(N, in) for a linear_weight of more than 2 dimensions"
        _check.fail(RuntimeError, name, "input", expected, tuple(input.shape))
    if not input.is_floating_point():
        _check.fail(NotImplementedError, name, "input", "floating point", input.dtype)
    _check.same_kind(name, "input", input, linear_weight=linear_weight, linear_bias=linear_bias)


def prepare(
    name, input, linear_weight, linear_bias, target, weight, reduction, ignore_index,
    label_smoothing, z_loss, softcap, shift,
):  # fmt: skip
    """Checks the arguments of `linear_cross_entropy` and casts them as autocast would.

    Returns (input, linear_weight, linear_bias, target, dtype of the loss, options of the
    operators), the target moved by `shift`.
    """
    _check.tensor(name, input=input)
    dtype = input.dtype
    autocast = _autograd.autocast_dtype(input)
    if autocast is not None and dtype != torch.float64:
        # As F.linear casts its arguments, and cross_entropy then its input.
        input, linear_weight, linear_bias = (
            t.to(autocast) if isinstance(t, Tensor) and t.dtype != torch.float64 else t
            for t in (input, linear_weight, linear_bias)
        )
        dtype = torch.float32
    _check_arguments(name, input, linear_weight, linear_bias, target, weight)
    classes = linear_weight.shape[0]
    check_loss_options(name, weight, classes, reduction, label_smoothing, z_loss, softcap)
    if shift < 0 or (shift > 0 and (input.dim() < 2 or linear_weight.dim() > 2)):
        _check.fail(ValueError, name, "shift", "at least 0 (with input (*, S, in))", shift)
    rows = input.shape[:-1]
    features = linear_weight.shape[1:-1]
    soft = check_target(name, "input", input, target, rows + features, (*rows, classes, *features))
    if soft and ignore_index is not None:
        expected = "None where target is probabilities"
        _check.fail(RuntimeError, name, "ignore_index", expected, ignore_index)
    if weight is not None and not soft and dtype == input.dtype:
        _check.same_kind(name, "input", input, weight=weight)
    ignore_index = -100 if ignore_index is None else ignore_index
    if not soft and target.dtype != torch.int64:
        target = target.long()
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    if shift and soft:
        input, target = input[..., : rows[-1] - shift, :], target[..., shift:, :]
    elif shift:
        target = _shifted(target, shift, ignore_index)
    return input, linear_weight, linear_bias, target, dtype, options


def evaluate(
    ops, input, linear_weight, linear_bias, target, weight, dtype, options, workspace_bytes,
    return_lse,
):  # fmt: skip
    """(loss, lse) of prepared arguments on `ops`, or in plain PyTorch where that is None."""
    if ops is None:
        loss, lse = _reference(input, linear_weight, linear_bias, target, weight, options)
        return loss.to(dtype), lse
    workspace = -1 if workspace_bytes is None else workspace_bytes
    wanted = tuple(
        t is not None and t.requires_grad and torch.is_grad_enabled()
        for t in (input, linear_weight, linear_bias)
    )
    # What only the forward may make: gradients of a scalar whose lse nobody differentiates, and
    # where ctx may be changed by the backward.
    plain = not torch.compiler.is_compiling() and not _autograd.transforming()
    unit_mask = wanted if plain and options[0] != "none" and not return_lse else (False,) * 3
    if _autograd.is_recorded(input, linear_weight, linear_bias):
        loss, lse, *_ = _autograd.apply(
            LinearCrossEntropyFunction, ops, input, linear_weight, linear_bias, target, weight,
            dtype, options, workspace, unit_mask,
        )  # fmt: skip
        return loss, lse
    loss, lse, *_ = ops.linear_cross_entropy_forward(
        input, linear_weight, linear_bias, target, weight, *options, workspace, unit_mask
    )
    return loss.to(dtype), lse


def linear_cross_entropy(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear projection + softmax cross-entropy in chunks of rows, never holding all logits.

        loss = cross_entropy(input linear_weight^T + linear_bias, target)

    Gradients are made with the loss, chunk by chunk ("none" and a used lse recompute the logits);
    that of `linear_weight` is accumulated in float32. Ignored rows cost nothing.

    Args:
        input: (*, in), float32, bfloat16 or float16 (float64 on the CPU).
        linear_weight: (C, in), or (C, d1, ..., in) for a K-dimensional loss (then through the
            logits, as in torch), of the input's dtype.
        target: (*) class indices (int64 or uint8), or (*, C) probabilities.
        linear_bias: (C,), or (C, d1, ...).
        weight: (C,), rescales each class.
        reduction: "none", "mean" or "sum".
        ignore_index: label of rows that do not count; None is -100, and the only choice where
            target is probabilities.
        label_smoothing, z_loss, softcap: as for `cross_entropy`.
        shift: pairs input[..., i, :] with target[..., i + shift], as causal language models do, by
            moving the target: the last `shift` rows count nowhere and are cut from the results.
        return_lse: also return lse = log sum exp of the (capped) logits, differentiable, float32;
            0 for ignored rows, whose logits are not computed.
        workspace_bytes: memory for a chunk of logits; None chooses for speed.
    Returns:
        The loss in the input's dtype (float32 under autocast): a scalar, or (*) for "none"; with
        `return_lse` the pair (loss, lse).
    Raises:
        ValueError, RuntimeError: options or shapes that do not fit, as torch raises them.
        IndexError: a label out of range, on the CPU (NaN on CUDA).
        TypeError: an argument that is no tensor.
    Backends:
        native (CPU, CUDA), triton, reference.
    Reference:
        Wijmans et al. 2024 (arXiv:2411.09009) for the problem; Hsu et al. 2024 (arXiv:2410.10989)
        for gradients made in the forward, by chunks.
    """
    input, linear_weight, linear_bias, target, dtype, options = prepare(
        "linear_cross_entropy", input, linear_weight, linear_bias, target, weight, reduction,
        ignore_index, label_smoothing, z_loss, softcap, shift,
    )  # fmt: skip
    soft, features = target.is_floating_point(), linear_weight.shape[1:-1]
    only_plain = None
    if features:
        only_plain = "a K-dimensional linear_weight"
    elif torch.is_grad_enabled() and soft and target.requires_grad:
        only_plain = "the gradient of probabilities"
    elif torch.is_grad_enabled() and weight is not None and weight.requires_grad:
        only_plain = "the gradient of class weights"
    ops = backend.resolve("linear_cross_entropy", input, only_plain, prob_target=soft)
    loss, lse = evaluate(
        ops, input, linear_weight, linear_bias, target, weight, dtype, options, workspace_bytes,
        return_lse,
    )  # fmt: skip
    if shift and not soft:
        length = max(input.shape[-2] - shift, 0)
        loss = loss[..., :length] if reduction == "none" else loss
        lse = lse[..., :length]
    return (loss, lse) if return_lse else loss


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` (torch 2.13) on fastnn's kernels, with its state_dict.

    Args:
        in_features, num_classes, out_features, bias, device, dtype, reduction, weight,
        ignore_index, label_smoothing: as torch's.
        z_loss, softcap, shift, workspace_bytes: as for `fastnn.functional.linear_cross_entropy`.
    """

    def __init__(
        self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None,
        reduction="mean", weight=None, ignore_index=None, label_smoothing=0.0, z_loss=0.0,
        softcap=None, shift=0, workspace_bytes=None,
    ):  # fmt: skip
        super().__init__()
        check_loss_options(
            type(self).__name__, weight, num_classes, reduction, label_smoothing, z_loss, softcap
        )
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.shift = shift
        self.workspace_bytes = workspace_bytes
        self.register_buffer("weight", weight)
        rows = torch.Size((num_classes, *self.out_features)).numel()
        self.linear = nn.Linear(in_features, rows, bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*shape, -1) if self.out_features else self.linear.weight,
            target,
            linear_bias=bias if bias is None else bias.view(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            shift=self.shift,
            workspace_bytes=self.workspace_bytes,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None},"
            f" reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}"
        )
