"""fastnn inside Hugging Face transformers: its attention under the name "fastnn".

    from fastnn.integrations import transformers as fastnn_transformers

    fastnn_transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="fastnn")
    model.set_attn_implementation("fastnn")  # or on a model that exists

Nothing is registered, nor transformers imported, before `register` is called.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn import _check
from fastnn.attention import scaled_dot_product_attention
from fastnn.cross_entropy import cross_entropy
from fastnn.linear_act import linear_act
from fastnn.linear_cross_entropy import linear_cross_entropy
from fastnn.transformer import add_linear, is_plain
from fastnn.varlen_attention import varlen_attention

NAME = "fastnn"
# What padding-free batches come with, in varlen_attention's order.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def register() -> None:
    """Makes `attn_implementation="fastnn"` known to transformers; a second call does nothing.

    The mask function is registered with it: without one, transformers hands out no mask, and padded
    batches are silently wrong.

    Raises: ImportError where transformers is missing, or older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "fastnn.integrations.transformers needs transformers 5 or later:"
            " pip install 'fastnn[transformers]'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention that transformers calls, by the rules of its `sdpa_attention_forward`.

    Served are grouped key and value heads (never repeated), boolean and additive masks, dropout,
    `position_bias`, `sliding_window`, `softcap` and sinks (`s_aux`). A paged cache, a request for
    the probabilities and torch.jit tracing are handed on to `sdpa_attention_forward`.

    Padding-free batches (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`) have their
    sequences one behind the other, told by `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
    `max_length_k`: `varlen_attention` then serves each as its own, and as with flash attention
    those four stand for the mask.

    Args:
        module: the caller; its `is_causal` counts where the argument is None.
        query: (B, Hq, Sq, D). key, value: (B, H, Sk, D), where H divides Hq.
        attention_mask: (B, 1 or Hq, Sq, Sk), True takes part, or numbers to add. Without one, more
            than one query is causal where asked for, from the first key on.
        position_bias: (1 or B, Hq, Sq, Sk), added to the scores, differentiable.
        sliding_window: a causal query without mask sees so many keys, its own included; a mask
            holds the window already. In packed sequences that are not causal, to both sides.
        s_aux: (Hq,), the logits of a further key without value.
    Returns: (B, Sq, Hq, D) and None for the probabilities.
    Raises: NotImplementedError for packed sequences with `position_bias`.
    """
    if cache is not None or kwargs.get("output_attentions") or torch.jit.is_tracing():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # By name: from transformers 5.24 on, it has no parameter `cache`.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, cache=cache,
            sliding_window=sliding_window, softcap=softcap, s_aux=s_aux, **kwargs,
        )  # fmt: skip
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped = key.shape[1] != query.shape[1]
    packed = [kwargs.get(name) for name in _PACKED]
    if all(value is not None for value in packed):
        if position_bias is not None:
            expected = f"None with {_PACKED[0]}"
            _check.fail(NotImplementedError, NAME, "position_bias", expected, "a tensor")
        side = sliding_window - 1 if sliding_window else -1
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = varlen_attention(
            *rows, *packed, dropout, scale=scaling, enable_gqa=grouped,
            causal_alignment="bottom_right", window=(side, 0 if causal else side),
            softcap=softcap, sinks=s_aux,
        )  # fmt: skip
        return out.unflatten(0, (query.shape[0], -1)), None
    causal = query.shape[2] > 1 and attention_mask is None and causal
    # A band rather than `is_causal`: it goes together with a bias in the mask's place.
    window = (sliding_window - 1 if sliding_window else -1, 0) if causal else None
    mask = attention_mask
    if position_bias is not None:
        mask = _with_bias(position_bias, attention_mask, key.dtype)
    out = scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling,
        enable_gqa=grouped, window=window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        # Not -inf: a row that sees no key gives the values' mean, as with transformers' own.
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return bias + mask


# What follows serves `fastnn.swap_`.

ATTENTION = "_fastnn_attention"


class PreviousAttention:
    """The attention that a swapped model had. Unpickled with it, it registers the one it has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        register()


def use_attention(model: nn.Module) -> None:
    register()
    model.config._attn_implementation_internal = NAME


def restore_attention(model: nn.Module) -> None:
    """Undoes `use_attention` where the model holds a record, and nobody changed it since."""
    previous = model.__dict__.get(ATTENTION)
    if previous is not None and model.config._attn_implementation == NAME:
        model.config._attn_implementation_internal = previous.name


def _token_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index):
    # transformers widens, too, and returns float32 whatever the model's dtype.
    loss = cross_entropy(
        logits.float().view(-1, vocab_size), labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index, reduction="mean" if num_items_in_batch is None else "sum",
    )  # fmt: skip
    return _per_item(loss, num_items_in_batch)


def _per_item(loss: Tensor, num_items_in_batch) -> Tensor:
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def causal_lm_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """transformers' ForCausalLMLoss on `fastnn.cross_entropy`."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _token_loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **_):
    """transformers' ForMaskedLMLoss on `fastnn.cross_entropy`."""
    return _token_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index)


_LOSSES = {None: causal_lm_loss, "ForCausalLM": causal_lm_loss, "ForMaskedLM": masked_lm_loss}


def _head_loss(
    hidden, head, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """`causal_lm_loss` of head(hidden), without its logits."""
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    labels = labels if shift_labels is None else shift_labels
    # Autocast to the dtype that the tensors have: the loss is then float32, as the stock one is.
    with torch.autocast(hidden.device.type, hidden.dtype) if half else nullcontext():
        loss = linear_cross_entropy(
            hidden, head.weight, labels.to(hidden.device), linear_bias=head.bias,
            ignore_index=ignore_index, shift=int(shift_labels is None),
            reduction="mean" if num_items_in_batch is None else "sum",
        )  # fmt: skip
    return _per_item(loss.float(), num_items_in_batch)


def _has_own_loss(model: nn.Module) -> bool:
    """Whether somebody set the model's `loss_function`."""
    return model.__dict__.get("_loss_function") not in (None, *_LOSSES.values())


def set_since(model: nn.Module) -> set[str]:
    """Which of the attributes that `swap_` added are not its own any more."""
    return {"_loss_function"} if _has_own_loss(model) else set()


def _causal_lm(stock: type) -> dict[str, Any]:
    """A causal language model: base model, then `lm_head`, then loss."""
    names = list(inspect.signature(stock.forward).parameters)[1:]
    outputs_of = importlib.import_module("transformers.modeling_outputs")
    crossed = stock.__name__ == "GPT2LMHeadModel"
    output = outputs_of.CausalLMOutputWithPast
    if crossed:
        output = outputs_of.CausalLMOutputWithCrossAttentions
    kept = ["past_key_values", "hidden_states", "attentions"] + ["cross_attentions"] * crossed

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        kwargs.update(zip(names, args, strict=False))
        head, keep = self.lm_head, kwargs.get("logits_to_keep", 0)
        if (
            kwargs.get("labels") is None or isinstance(keep, Tensor) or keep
            or not kwargs.get("return_dict", self.config.return_dict)
            or not is_plain(head, nn.Linear) or _has_own_loss(self)
        ):  # fmt: skip
            return stock.forward(self, **kwargs)
        for name in ("logits_to_keep", "return_dict"):
            kwargs.pop(name, None)
        labels = kwargs.pop("labels")
        outputs = getattr(self, self.base_model_prefix)(**kwargs)
        loss = _head_loss(outputs.last_hidden_state, head, labels, **kwargs)
        return output(loss=loss, **{name: getattr(outputs, name, None) for name in kept})

    return {"forward": forward}


def _conv1d(stock: type) -> dict[str, Any]:
    """GPT-2's linear layer, whose weight is (in, out), and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_act(x, self.weight.t(), self.bias, self.activation)

    return {"forward": forward}


def _add_and_norm(stock: type) -> dict[str, Any]:
    """LayerNorm(input_tensor + dropout(dense(hidden_states)))"""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense = self.dense
        if not is_plain(dense, nn.Linear):
            return stock.forward(self, hidden_states, input_tensor)
        return self.LayerNorm(
            add_linear(input_tensor, hidden_states, dense.weight, dense.bias, self.dropout)
        )

    return {"forward": forward, "_fastnn_reads": ("dense",)}


# Name of a class -> the module it is in, and what makes our sub-class's members.
_CLASSES: dict[str, tuple[str, Callable[[type], dict[str, Any]]]] = {
    "Conv1D": ("transformers.pytorch_utils", _conv1d),
    "BertSelfOutput": ("transformers.models.bert.modeling_bert", _add_and_norm),
    "BertOutput": ("transformers.models.bert.modeling_bert", _add_and_norm),
    "GPT2LMHeadModel": ("transformers.models.gpt2.modeling_gpt2", _causal_lm),
    "LlamaForCausalLM": ("transformers.models.llama.modeling_llama", _causal_lm),
    "MistralForCausalLM": ("transformers.models.mistral.modeling_mistral", _causal_lm),
    "Qwen2ForCausalLM": ("transformers.models.qwen2.modeling_qwen2", _causal_lm),
    "Qwen3ForCausalLM": ("transformers.models.qwen3.modeling_qwen3", _causal_lm),
}
# (Linear, activation) where the forward has branches, though none that parts these two.
_PAIRS = {
    "transformers.models.t5.modeling_t5.T5DenseActDense": ("wi", "act"),
    "transformers.models.t5.modeling_t5.T5DenseGatedActDense": ("wi_0", "act"),
    "transformers.models.bart.modeling_bart.BartEncoderLayer": ("fc1", "activation_fn"),
    "transformers.models.bart.modeling_bart.BartDecoderLayer": ("fc1", "activation_fn"),
}


def __getattr__(name: str) -> type:
    """Our sub-classes, made when first asked for: by `swap_`, or by pickle."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, members = _CLASSES[name]
    stock = getattr(importlib.import_module(path), name)
    kind = type(name, (stock,), {"__module__": __name__, **members(stock)})
    globals()[name] = kind
    return kind


def counterpart(kind: type) -> type | None:
    """Our sub-class of a class of transformers, or None."""
    path, _ = _CLASSES.get(kind.__name__, (None, None))
    if path is None or kind.__module__ != path:
        return None
    return globals().get(kind.__name__) or __getattr__(kind.__name__)


def known_pair(module: nn.Module) -> tuple[str, str] | None:
    """The slots of a Linear and the activation that `module` applies to nothing else, if known."""
    kind = type(module)
    return _PAIRS.get(f"{kind.__module__}.{kind.__qualname__}")


class Plan(NamedTuple):
    """What `swap_` is to do: the class, or None, the attributes to add, and a row's reason."""

    kind: type | None
    attributes: dict[str, Any]
    reason: str


def plan(module: nn.Module, lm_loss: bool) -> Plan | None:
    """The swap of a module that is no Linear; None where there is nothing to say about it."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return _model_plan(module, lm_loss)
    kind = counterpart(type(module))
    return None if kind is None else Plan(kind, {}, "dropout and residual with the GEMM")


def _model_plan(model: nn.Module, lm_loss: bool) -> Plan | None:
    kind, attributes, said = type(model), {}, []
    attention = model.config._attn_implementation
    if attention != NAME:
        why_not = _attention_reason(model)
        if why_not is None:
            attributes[ATTENTION] = PreviousAttention(attention)
            lost = ", with it output_attentions" if attention == "eager" else ""
            said.append(f"attention, was {attention!r}{lost}")
        else:
            said.append(f"attention {attention!r} stays: {why_not}")
    calls_loss = "loss_function" in inspect.unwrap(kind.forward).__code__.co_names
    loss = _LOSSES.get(getattr(model, "loss_type", None))
    if calls_loss and loss is not None and "_loss_function" not in model.__dict__:
        attributes["_loss_function"] = loss
        said.append("loss")
    if lm_loss and model.get_output_embeddings() is not None:
        ours = counterpart(kind)
        if ours is not None and "forward" not in model.__dict__ and not _has_own_loss(model):
            kind = ours
            said.append("loss without logits")
        else:
            said.append("no loss without logits for this model")
    if not said:
        return None
    changed = bool(attributes) or kind is not type(model)
    return Plan(kind if changed else None, attributes, "; ".join(said))


def _attention_reason(model: nn.Module) -> str | None:
    config = model.config
    if importlib.util.find_spec("transformers.masking_utils") is None:
        return "it needs transformers 5 or later"
    if config._attn_implementation not in ("sdpa", "eager"):
        return "it was chosen by name"
    if getattr(config, "output_attentions", False):
        return "the probabilities are asked for"
    if not model._supports_sdpa:
        return "the model does not support 'sdpa'; set_attn_implementation('fastnn') may serve it"
    if not model._can_set_attn_implementation():
        return "the model does not look it up"
    return None
