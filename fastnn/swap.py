"""`swap_` turns the stock modules of a model into fastnn's, in place; `unswap_` turns them back.

A module keeps its identity: only its class changes, to a fastnn class that reads the same
attributes. Parameters, buffers, hooks, training mode, weight tying and references to the module
therefore stay as they are, and optimizers, state_dict, deepcopy and pickle see no difference. The
one exception is an activation that a Linear takes over: its slot holds a `FusedActivation` (an
identity that keeps the stock module), because other places that share the activation still need it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fastnn._tracing import activations_after
from fastnn.cross_entropy import CrossEntropyLoss
from fastnn.linear_act import Dropout, LinearAct
from fastnn.linear_cross_entropy import LinearCrossEntropyLoss
from fastnn.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    activation_name,
    is_hooked,
)

FilterFn = Callable[[nn.Module, str], bool]

# Classes that read the same attributes as the stock ones, whatever surrounds them.
_BY_CLASS: dict[type, type] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.Dropout: Dropout,
}
# Instances to read the attributes from that fastnn's classes have and the stock ones have not.
_LIKE: dict[type, Callable[[], nn.Module]] = {nn.CrossEntropyLoss: CrossEntropyLoss}
_LINEAR_LOSSES = [LinearCrossEntropyLoss]
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    _LINEAR_LOSSES.append(nn.LinearCrossEntropyLoss)
    _BY_CLASS[nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss
    _LIKE[nn.LinearCrossEntropyLoss] = lambda: LinearCrossEntropyLoss(1, 1, device="meta")
_STOCK = "_fastnn_stock"


class _Stock(NamedTuple):
    """What `unswap_` needs: both classes, the attributes that were added, old values of others."""

    kind: type
    ours: type
    added: tuple[str, ...]
    changed: dict[str, Any]


@dataclass(frozen=True)
class SwapRow:
    """One module of a report; `target` is None where the module was left as it was."""

    name: str
    source: str
    target: str | None
    reason: str


@dataclass
class SwapReport:
    """What `swap_` or `unswap_` did, a row per module; `str` gives a table."""

    rows: list[SwapRow] = field(default_factory=list)

    @property
    def swapped(self) -> list[SwapRow]:
        """The modules that changed."""
        return [row for row in self.rows if row.target is not None]

    @property
    def skipped(self) -> list[SwapRow]:
        """The modules that were left alone, each with its reason."""
        return [row for row in self.rows if row.target is None]

    def __str__(self) -> str:
        lines = [("module", "from", "to", "reason")]
        lines += [
            (row.name or "(model)", row.source, row.target or "-", row.reason) for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]])
            for line in lines
        ]
        table.append(f"{len(self.swapped)} swapped, {len(self.skipped)} left")
        return "\n".join(line.rstrip() for line in table)


class FusedActivation(nn.Identity):
    """Holds the slot, and the stock module, of an activation that the Linear before it computes.

    Where that is no longer so, because the Linear was turned back or replaced, it computes the
    activation; where the Linear is inside of something else since, such as an adapter, it refuses.
    """

    def __init__(self, stock: nn.Module, parent: nn.Module, sources: tuple[str, ...]) -> None:
        super().__init__()
        # Not sub-modules: they are not part of the computation, nor of state_dict.
        self.__dict__.update(stock=stock, parent=parent, sources=sources)
        self.training = stock.training

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layers = [self.parent._modules.get(source) for source in self.sources]
        if all(_is_swapped(layer) for layer in layers):
            return input
        if any(_is_swapped(part) for layer in layers if layer for part in layer.modules()):
            raise RuntimeError(
                f"swap_ gave a {type(self.stock).__name__} to {', '.join(self.sources)} of a"
                f" {type(self.parent).__name__}, which changed since: unswap_ first, then change"
                " it, then swap_ again"
            )
        return self.stock(input)

    def extra_repr(self) -> str:
        return f"{type(self.stock).__name__} in the layer before"


def _is_swapped(module: nn.Module | None) -> bool:
    return hasattr(module, _STOCK)


def _become(module: nn.Module, kind: type, attributes: dict[str, Any]) -> None:
    added = tuple(name for name in attributes if name not in module.__dict__)
    changed = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__[_STOCK] = _Stock(type(module), kind, added, changed)
    module.__dict__.update(attributes)
    module.__class__ = kind


def _new_attributes(module: nn.Module, like: nn.Module) -> dict[str, Any]:
    """What a constructor of fastnn sets beyond the stock one's attributes."""
    return {name: value for name, value in like.__dict__.items() if name not in module.__dict__}


def _common_reason(module: nn.Module, name: str, filter_fn: FilterFn | None) -> str | None:
    if is_hooked(module):
        return "it has hooks"
    for method in module.__dict__:
        if callable(getattr(type(module), method, None)):
            return f"its {method} was replaced"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn refused it"
    return None


def _changed_class(module: nn.Module, stock: type) -> str | None:
    if type(module) is stock:
        return None
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    return f"a subclass of {stock.__name__} may compute something else"


class _Pair(NamedTuple):
    """A Linear, and the activation that its parent applies to it."""

    parent: nn.Module
    slot: str  # of the activation
    activation: nn.Module
    sources: tuple[str, ...]  # the slots of the Linears that it serves, this one included

    @property
    def mates(self) -> list[nn.Module]:
        return [self.parent._modules[source] for source in self.sources]


class _Swap:
    """One run of `swap_` over a model."""

    def __init__(self, model: nn.Module, filter_fn: FilterFn | None, lm_loss: bool) -> None:
        self.model = model
        self.filter_fn = filter_fn
        self.lm_loss = lm_loss
        self.report = SwapReport()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.uses = Counter(
            id(child) for parent in model.modules() for child in parent._modules.values()
        )
        self.pairs: dict[int, _Pair] = {}  # by the id of the Linear
        self.unpaired: dict[int, str] = {}  # why a Linear has none

    def run(self) -> SwapReport:
        modules = list(self.model.named_modules())
        for name, module in modules:
            stock = next((kind for kind in _BY_CLASS if isinstance(module, kind)), None)
            if stock is not None:
                if type(module) is not _BY_CLASS[stock]:
                    self._swap_class(name, module, stock)
            elif _is_from_transformers(module):
                self._swap_from_transformers(name, module)
        # After the layers, so that what those call themselves is known.
        inside = {id(child) for parent in self.model.modules() for child in _called_by(parent)}
        for parent in self.model.modules():
            self._find_pairs(parent, inside)
        for name, module in modules:
            if type(module) is nn.TransformerEncoder:
                self._keep_padded(name, module)
            elif _is_linear(module) and _STOCK not in module.__dict__ and id(module) not in inside:
                self._swap_linear(name, module)
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        self.report.rows.sort(key=lambda row: order[row.name])
        return self.report

    def _row(self, name: str, module: nn.Module, target: type | None, reason: str = "") -> None:
        kind = target.__name__ if target is not None else None
        self.report.rows.append(SwapRow(name, type(module).__name__, kind, reason))

    def _swap_class(self, name: str, module: nn.Module, stock: type) -> None:
        reason = _changed_class(module, stock) or _common_reason(module, name, self.filter_fn)
        if reason is None and stock is nn.Dropout and module.inplace:
            reason = "it works in place"
        if reason is not None:
            self._row(name, module, None, reason)
            return
        kind = _BY_CLASS[stock]
        self._row(name, module, kind)
        like = _LIKE.get(stock)
        _become(module, kind, _new_attributes(module, like()) if like else {})

    def _swap_from_transformers(self, name: str, module: nn.Module) -> None:
        from fastnn.integrations import transformers as integration

        if _STOCK in module.__dict__ or _is_linear(module):
            return
        plan = integration.plan(module, self.lm_loss)
        if plan is None:
            return
        reason = None
        if self.filter_fn is not None and not self.filter_fn(module, name):
            reason = "filter_fn refused it"
        elif plan.kind is None:
            reason = plan.reason
        if reason is not None:
            self._row(name, module, None, reason)
            return
        self._row(name, module, plan.kind, plan.reason)
        _become(module, plan.kind, plan.attributes)
        if integration.ATTENTION in plan.attributes:
            integration.use_attention(module)

    def _find_pairs(self, parent: nn.Module, inside: set[int]) -> None:
        children = parent._modules
        linears = [child for child in children.values() if _is_linear(child)]
        linears = [child for child in linears if id(child) not in inside]
        if not linears:
            return
        found: dict[str, list[str]] = {}
        why = "no activation follows it"
        # A subclass of nn.Sequential may call its children in another order.
        if type(parent) is nn.Sequential:
            why = "no activation follows it in an nn.Sequential"
            slots = list(children)
            for slot, follower in zip(slots, slots[1:], strict=False):
                if _is_linear(children[slot]):
                    found[follower] = [slot]
        elif any(_is_activation(child) for child in children.values()):
            known = None
            if _is_from_transformers(parent):
                from fastnn.integrations import transformers as integration

                known = integration.known_pair(parent)
            if known is not None:
                found = {known[1]: [known[0]]}
            else:
                found, why = activations_after(parent, _is_linear, _is_activation)
        for child in linears:
            self.unpaired.setdefault(id(child), why)
        for slot, sources in found.items():
            pair = _Pair(parent, slot, children[slot], tuple(sources))
            for mate in pair.mates:
                self.pairs[id(mate)] = pair

    def _swap_linear(self, name: str, module: nn.Module) -> None:
        reason = self._linear_reason(module)
        pair = self.pairs.get(id(module))
        for mate in pair.mates if reason is None else ():
            if (theirs := self._linear_reason(mate)) is not None:
                kind = type(pair.activation).__name__
                reason = f"its {kind} also serves {self.names[id(mate)]}: {theirs}"
        if reason is not None:
            self._row(name, module, None, reason)
            return
        kind = _act_class(module)
        self._row(name, module, kind, f"with {type(pair.activation).__name__}")
        # On the meta device: no memory, and no numbers drawn from the generator.
        like = LinearAct(1, 1, activation=activation_name(pair.activation), device="meta")
        attributes = {name: like.__dict__[name] for name in ("activation", "dropout_p")}
        _become(module, kind, attributes)
        pair.parent._modules[pair.slot] = FusedActivation(
            pair.activation, pair.parent, pair.sources
        )

    def _linear_reason(self, module: nn.Module) -> str | None:
        if _STOCK in module.__dict__:
            return None  # it was swapped with its mates
        changed = _changed_class(module, nn.Linear) if isinstance(module, nn.Linear) else None
        if changed is not None:
            return changed
        pair = self.pairs.get(id(module))
        if pair is None:
            return self.unpaired.get(id(module), "no activation follows it")
        if self.uses[id(module)] > 1:
            return "it is shared: another use may not want the activation"
        kind = type(pair.activation).__name__
        if not _is_activation(pair.activation):
            shown = f"{kind}({pair.activation.extra_repr()})"
            return f"{shown} follows it, no activation of linear_act"
        if is_hooked(pair.activation):
            return f"the {kind} after it has hooks"
        if not module.weight.dtype.is_floating_point:
            return f"{module.weight.dtype} is not served"
        return _common_reason(module, self.names[id(module)], self.filter_fn)

    def _keep_padded(self, name: str, module: nn.TransformerEncoder) -> None:
        """Stops torch's encoder from handing nested tensors to layers of fastnn."""
        ours = any(type(layer) is TransformerEncoderLayer for layer in module.layers)
        if ours and getattr(module, "use_nested_tensor", False) and _STOCK not in module.__dict__:
            self._row(name, module, type(module), "without conversion to nested tensors")
            _become(module, type(module), {"use_nested_tensor": False})


def _is_from_transformers(module: nn.Module) -> bool:
    return "transformers" in sys.modules and any(
        kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _act_class(module: nn.Module) -> type:
    """The class that adds an activation to a layer that `_is_linear` accepts."""
    if isinstance(module, nn.Linear):
        return LinearAct
    from fastnn.integrations import transformers as integration

    return integration.counterpart(type(module))


def _is_linear(module: nn.Module | None) -> bool:
    """Whether it is a Linear that may take an activation over, or one that was changed."""
    if isinstance(module, nn.Linear):
        return type(module) is not LinearAct
    return _name_of(type(module)) == "transformers.pytorch_utils.Conv1D"


def _is_activation(module: nn.Module | None) -> bool:
    return (
        module is not None and activation_name(module) is not None
        and "forward" not in module.__dict__
    )  # fmt: skip


def _called_by(parent: nn.Module) -> list[nn.Module]:
    """The Linears whose parameters their parent reads itself."""
    if isinstance(parent, nn.MultiheadAttention):
        return [parent.out_proj]
    if type(parent) in (TransformerEncoderLayer, TransformerDecoderLayer):
        return [parent.linear1, parent.linear2]
    if isinstance(parent, tuple(_LINEAR_LOSSES)):
        return [parent.linear]
    return [getattr(parent, slot) for slot in getattr(parent, "_fastnn_reads", ())]


def swap_(
    model: nn.Module, *, filter_fn: FilterFn | None = None, lm_loss: bool = False
) -> SwapReport:
    """Turns the modules of `model` that fastnn can serve into fastnn's, in place.

    Swapped are nn.Linear with the ReLU, GELU, SiLU, Sigmoid, Tanh or LeakyReLU(0.01) applied to it
    (one `LinearAct`; the activation's slot becomes an identity), MultiheadAttention,
    TransformerEncoderLayer, TransformerDecoderLayer, CrossEntropyLoss, LinearCrossEntropyLoss and
    Dropout. That an activation is applied is known from an nn.Sequential, or proved by tracing the
    parent's forward with torch.fx, where that has no branches.

    In models of Hugging Face's transformers (5 or later) also: the attention, where it is "sdpa" or
    "eager" and the model supports "sdpa" (`fastnn.integrations.transformers`; it is set on the
    model's configuration, which models built from the same object share), linear layers with their
    activation (those of a gated feed-forward apart: the gate with its activation, then a product),
    BERT's dropout and residual sums, and the loss of language models with a `loss_function`.

    Left alone, with the reason in the report: subclasses, parametrized and hooked modules (pruned
    ones are), modules whose forward was replaced, shared Linears, dropout in place, and Linears
    without an activation (torch's own GEMM is all they need). Outputs, gradients and state_dict
    keys stay those of the stock model, except that dropout draws other masks of the same rate, and
    that nn.TransformerEncoder no longer writes zeros at padded positions in evaluation (it stops
    converting to nested tensors; jagged ones pass through its layers), that a model whose attention
    was "eager" has no `output_attentions` to give, and that a part of an nn.Sequential cut off
    before an activation's slot has applied it. Adapters go in before `swap_`; torch.jit takes stock
    models only (`unswap_`).

    Args:
        model: any module; it may itself be one of those above.
        filter_fn: called as `filter_fn(module, name)` before each swap; False leaves that module
            (its sub-modules are asked about on their own).
        lm_loss: GPT-2, Llama, Mistral, Qwen2 and Qwen3 for causal language modelling, called with
            labels, make the loss from the last hidden states by `linear_cross_entropy`, which never
            holds the logits: the output's `logits` are then None. Without labels, with
            `logits_to_keep`, or for a tuple as output, nothing changes.
    Returns: the report. A second call finds nothing left to swap.
    Raises: TypeError where `model` is not a module.
    Backends: all; `use_backend` and FASTNN_DISABLE choose at each call.
    Reference: the functions behind the modules, `linear_act`, `cross_entropy`,
        `linear_cross_entropy`, `scaled_dot_product_attention` and `dropout`.
    """
    _check_module("swap_", model)
    return _Swap(model, filter_fn, lm_loss).run()


def unswap_(model: nn.Module) -> SwapReport:
    """Undoes `swap_`, in place: the same module objects, of their stock classes again.

    Parameters, buffers and the training mode stay as they are now. Modules of fastnn that the model
    was built with are kept.

    Args:
        model: a model, or a part or a copy of one, that went through `swap_`.
    Returns: the report.
    Raises: TypeError where `model` is not a module.
    """
    _check_module("unswap_", model)
    report = SwapReport()
    for name, module in list(model.named_modules()):
        for slot, child in module._modules.items():
            if type(child) is FusedActivation:
                child.stock.train(child.training)
                module._modules[slot] = child.stock
        stock = module.__dict__.pop(_STOCK, None)
        if stock is None:
            continue
        report.rows.append(SwapRow(name, type(module).__name__, stock.kind.__name__, ""))
        kept = set()
        if _is_from_transformers(module):
            from fastnn.integrations import transformers as integration

            integration.restore_attention(module)
            kept = integration.set_since(module)
        module.__class__ = _rebased(type(module), stock)
        for attribute in set(stock.added) - kept:
            del module.__dict__[attribute]
        module.__dict__.update(stock.changed)
    return report


def _rebased(kind: type, stock: _Stock) -> type:
    """The stock class, or with it as base what parametrize or fully_shard since made of ours."""
    if kind is stock.ours:
        return stock.kind
    bases = tuple(stock.kind if base is stock.ours else base for base in kind.__bases__)
    members = {
        name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")
    }
    return type(kind.__name__, bases, members)


def _check_module(function: str, model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
