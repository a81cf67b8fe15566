"""Linear + activation, and the dropout that shares its generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnn import _autograd, _check, backend, reference
from fastnn._ops import small_linear
from fastnn.reference import ACTIVATIONS

# On the CPU, `auto` leaves float32 calls of so few products M N K to torch where there is next to
# nothing to fuse. Measured as eager's time over ours, forward + backward, relu: 2^12 0.7, 2^18 0.8,
# 2^24 0.95, 2^26 0.93, 2^27 1.02, 2^31 1.09; gelu 1.0 and more from the smallest on.
_TORCH_UP_TO = 2**26
_CHEAP = frozenset(("identity", "relu", "leaky_relu", "sigmoid", "tanh", "silu"))
LEFT_TO_TORCH = (
    f"float32 calls of at most {_TORCH_UP_TO} products M N K, without dropout and residual, and"
    f" with {', '.join(sorted(_CHEAP))}, outside of torch.compile and torch.func: torch's calls"
    " cost less"
)


def dropout_seed(device: torch.device) -> Tensor:
    """A (key, offset) pair for csrc/philox.h, drawn on the device from torch's own generator."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=device)


def keep_mask(ops, shape, p: float, seed: Tensor, like: Tensor) -> Tensor:
    """The scaled dropout mask that the kernels apply to a tensor of `shape`."""
    return ops.dropout(like.new_ones(shape), seed, p)


class LinearActFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(ops, input, weight, bias, residual, seed, activation, dropout_p):
        act = ACTIVATIONS[activation]
        from_output = act.output_suffices and residual is None
        return ops.linear_act_forward(
            input, weight, bias, residual, seed, activation, dropout_p,
            not from_output and activation != "identity", act.gated,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ops, input, weight, bias, residual, seed, ctx.activation, ctx.dropout_p = inputs
        out, preact = output
        ctx.mark_non_differentiable(preact)
        ctx.set_materialize_grads(False)
        from_output = ACTIVATIONS[ctx.activation].output_suffices and residual is None
        saved = out if from_output and ctx.activation != "identity" else preact
        ctx.save_for_backward(input, weight, bias, residual, seed, saved)

    @staticmethod
    def backward(ctx, grad_out, _grad_preact):
        if grad_out is None:
            return (None,) * 8
        input, weight, bias, residual, seed, saved = ctx.saved_tensors
        _, wants_input, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
        if _autograd.wants_composite():
            keep = None
            if ctx.dropout_p > 0:
                keep = keep_mask(ctx.ops, grad_out.shape, ctx.dropout_p, seed, input.detach())

            def composite(input, weight, bias, residual):
                return reference.linear_act(
                    input, weight, bias, ctx.activation, residual=residual, keep=keep
                )

            gradients = _autograd.composite_gradients(
                composite, (input, weight, bias, residual), (grad_out,)
            )
            return None, *gradients, None, None, None
        grad_input, grad_weight, grad_bias = ctx.ops.linear_act_backward(
            grad_out, input, weight, saved, seed, ctx.activation, ctx.dropout_p,
            ACTIVATIONS[ctx.activation].gated, (wants_input, wants_weight, wants_bias),
        )  # fmt: skip
        return (
            None,
            grad_input if wants_input else None,
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
            grad_out if wants_residual else None,
            None,
            None,
            None,
        )


def _check_linear_act(name, input, weight, bias, activation, residual, dropout_p):
    if activation not in ACTIVATIONS:
        _check.choice(name, "activation", activation, ACTIVATIONS)
    _check.probability(name, "dropout_p", dropout_p)
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        _check.tensor(name, input=input, weight=weight, bias_or_none=bias)
    if residual is not None:
        _check.tensor(name, residual=residual)
    if input.is_nested:
        return  # those have no shape to check; torch does it
    if weight.dim() != 2:
        _check.fail(RuntimeError, name, "weight", "a matrix", tuple(weight.shape))
    rows, columns = weight.shape
    if input.dim() == 0 or input.shape[-1] != columns:
        _check.fail(RuntimeError, name, "input", f"of shape (*, {columns})", tuple(input.shape))
    gated = ACTIVATIONS[activation].gated
    if gated and rows % 2:
        expected = f"of an even number of rows for {activation!r}"
        _check.fail(RuntimeError, name, "weight", expected, tuple(weight.shape))
    _check.same_kind(name, "input", input, weight=weight, bias=bias, residual=residual)
    if bias is not None and bias.shape != (rows,):
        _check.fail(RuntimeError, name, "bias", f"of shape ({rows},)", tuple(bias.shape))
    if residual is not None:
        shape = (*input.shape[:-1], rows // 2 if gated else rows)
        if residual.shape != shape:
            _check.fail(RuntimeError, name, "residual", f"of shape {shape}", tuple(residual.shape))


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "identity",
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """One GEMM with bias, activation, dropout and residual in its epilogue.

        out = residual + dropout(act(input weight^T + bias))

    The backward folds the activation's derivative and the bias gradient into the gradient GEMMs;
    the dropout mask is never stored but replayed from a counter-based generator.

    Args:
        input: (*, in), float32, bfloat16 or float16 (float64 on the CPU).
        weight: (out, in) of the input's dtype; (2 * out, in) for a gated activation, the gate's
            rows first: act(gate) * up.
        bias: (out,), or (2 * out,) if gated.
        activation: identity, relu, gelu, gelu_tanh, silu, sigmoid, tanh, leaky_relu (slope 0.01),
            relu2; gated: glu, swiglu, geglu, geglu_tanh, reglu.
        residual: (*, out), added after the dropout.
        dropout_p: the probability of dropping an element, rounded to 1/65536.
        training: without it there is no dropout.
    Returns:
        (*, out), of the input's dtype (autocast as for `torch.nn.functional.linear`).
    Raises:
        ValueError: unknown activation, `dropout_p` outside [0, 1].
        RuntimeError: shapes, dtypes or devices that do not fit.
        TypeError: an argument that is no tensor.
    Backends:
        native (CPU, CUDA), triton, reference. Under `auto`, float32 calls of up to 2^26 products M
        N K on the CPU with identity, relu, leaky_relu, sigmoid, tanh or silu, without dropout and
        residual, outside of torch.compile and torch.func, are torch's own, which cost less.
    Reference:
        Hendrycks & Gimpel 2016 (arXiv:1606.08415); Shazeer 2020 (arXiv:2002.05202); Salmon et al.
        2011 for the generator.
    """
    if (
        activation in _CHEAP
        and residual is None
        and (not dropout_p or (not training and 0.0 < dropout_p <= 1.0))
        and backend.chosen == "auto"
        and not torch.compiler.is_compiling()  # the graph would be of these sizes only
        and (preact := small_linear(input, weight, bias, _TORCH_UP_TO)) is not None
    ):
        return ACTIVATIONS[activation].value(preact)
    dtype = _autograd.autocast_dtype(input) if isinstance(input, Tensor) else None
    if dtype is not None:
        input, weight, bias, residual = (
            t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t
            for t in (input, weight, bias, residual)
        )
    _check_linear_act("linear_act", input, weight, bias, activation, residual, dropout_p)
    if not training:
        dropout_p = 0.0
    ops = backend.resolve("linear_act", input, activation=activation)
    if ops is None:
        return reference.linear_act(
            input, weight, bias, activation, residual=residual, dropout_p=dropout_p
        )
    seed = dropout_seed(input.device) if dropout_p > 0.0 else None
    if _autograd.is_recorded(input, weight, bias, residual):
        return _autograd.apply(
            LinearActFunction, ops, input, weight, bias, residual, seed, activation, dropout_p
        )[0]
    gated = ACTIVATIONS[activation].gated
    return ops.linear_act_forward(
        input, weight, bias, residual, seed, activation, dropout_p, False, gated
    )[0]


class DropoutFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(ops, input, seed, p):
        return ops.dropout(input, seed, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ops, _, seed, ctx.p = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad_out):
        (seed,) = ctx.saved_tensors
        # Linear in its input: the gradient is the same masking, and differentiable itself.
        return None, _autograd.apply(DropoutFunction, ctx.ops, grad_out, seed, ctx.p), None, None


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zeroes elements with probability p and scales the rest.

        out = input * mask / (1 - p)

    The mask is replayed in the backward, not stored. p is rounded to 1/65536.

    Args:
        input: any shape, float32, bfloat16 or float16 (float64 on the CPU).
        p: probability of dropping an element.
        training: without it the input is returned.
    Returns:
        The input's shape and dtype.
    Raises:
        ValueError: p outside [0, 1].
        TypeError: an input that is no tensor.
    Backends:
        native (CPU, CUDA), triton, reference.
    Reference:
        Srivastava et al. 2014; Salmon et al. 2011 for the generator.
    """
    _check.probability("dropout", "p", p)
    _check.tensor("dropout", input=input)
    if not training or p == 0.0:
        return input
    ops = backend.resolve("dropout", input)
    if ops is None:
        return reference.dropout(input, p)
    # Groups of eight neighbours share a draw of the generator: one long row wastes none.
    flat = input.reshape(-1) if input.is_contiguous() else input
    out = _autograd.apply(DropoutFunction, ops, flat, dropout_seed(input.device), p)
    return out.view(input.shape) if flat is not input else out


class LinearAct(nn.Linear):
    """`torch.nn.Linear` followed by an activation, dropout and residual, as one call.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`. For a gated
            activation `out_features` is the width of the output; the weight has twice its rows.
        activation, dropout_p: as for `fastnn.functional.linear_act`.
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *,
        activation="identity", dropout_p=0.0,
    ):  # fmt: skip
        _check.choice("LinearAct", "activation", activation, ACTIVATIONS)
        _check.probability("LinearAct", "dropout_p", dropout_p)
        rows = out_features * (2 if ACTIVATIONS[activation].gated else 1)
        super().__init__(in_features, rows, bias, device, dtype)
        self.activation = activation
        self.dropout_p = dropout_p

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear_act(
            input, self.weight, self.bias, self.activation, residual=residual,
            dropout_p=self.dropout_p, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, dropout_p={self.dropout_p}"


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` on fastnn's generator; `inplace` is not supported."""

    def __init__(self, p: float = 0.5, inplace: bool = False):
        if inplace:
            _check.fail(ValueError, "Dropout", "inplace", "False", inplace)
        super().__init__(p)

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


class MLP(nn.Module):
    """Two linear layers with an activation between them: linear2(dropout(act(linear1(x)))).

    Args:
        in_features, hidden_features: widths; `out_features` defaults to `in_features`.
        activation: a plain (not gated) activation of `linear_act`.
        bias: whether both layers have one.
        dropout_p: after the activation and after the second layer.
    """

    _gated = False

    def __init__(
        self, in_features, hidden_features, out_features=None, *, activation="gelu", bias=True,
        dropout_p=0.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        allowed = [name for name, act in ACTIVATIONS.items() if act.gated == self._gated]
        _check.choice(type(self).__name__, "activation", activation, allowed)
        out_features = in_features if out_features is None else out_features
        options = {"device": device, "dtype": dtype, "dropout_p": dropout_p}
        self.linear1 = LinearAct(
            in_features, hidden_features, bias, activation=activation, **options
        )
        self.linear2 = LinearAct(hidden_features, out_features, bias, **options)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.linear2(self.linear1(input), residual)


class GatedMLP(MLP):
    """An MLP whose first layer is gated: linear2(dropout(act(gate(x)) * up(x))).

    `linear1.weight` holds the gate's rows, then the up projection's; `activation` is one of glu,
    swiglu, geglu, geglu_tanh, reglu.
    """

    _gated = True

    def __init__(
        self, in_features, hidden_features, out_features=None, *, activation="swiglu", **options
    ):
        super().__init__(
            in_features, hidden_features, out_features, activation=activation, **options
        )
