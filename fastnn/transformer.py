"""Multi-head attention and the Transformer layers of torch.nn, on fastnn's kernels.

Each class is torch's own with another forward: constructors, initialisation, parameters and
state_dict keys are inherited, and `isinstance` still says torch.nn. A layer looks at its
sub-modules at every call: one that was replaced, parametrized or hooked since is called as a
module, so that adapters and hooks keep working, and the rest stays fused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn import _autograd, _check
from fastnn.attention import scaled_dot_product_attention
from fastnn.linear_act import Dropout, dropout, linear_act
from fastnn.varlen_attention import varlen_attention

_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu", F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid", F.tanh: "tanh", torch.tanh: "tanh", F.leaky_relu: "leaky_relu",
}  # fmt: skip
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
# Those of Hugging Face's transformers by name: it is not imported for them.
_TRANSFORMERS = {
    "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh", "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu", "ReLUSquaredActivation": "relu2",
}  # fmt: skip


def activation_name(activation: Callable) -> str | None:
    """linear_act's name for an activation function or module, or None when it has none."""
    if type(activation) in _MODULES:
        return _MODULES[type(activation)]
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if type(activation) is nn.LeakyReLU:
        return "leaky_relu" if activation.negative_slope == 0.01 else None
    if type(activation).__module__ == "transformers.activations":
        return _TRANSFORMERS.get(type(activation).__name__)
    # Compared one by one: another callable need not be hashable.
    return next((name for known, name in _FUNCTIONS.items() if known is activation), None)


def is_hooked(module: nn.Module) -> bool:
    """Whether something watches or changes the module's calls, which a fused call would skip."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return not is_hooked(module) and "forward" not in module.__dict__


def is_plain(module: nn.Module, *kinds: type) -> bool:
    return type(module) in kinds and is_untouched(module)


def _dropout(module: nn.Module, x: Tensor) -> Tensor:
    if is_plain(module, nn.Dropout, Dropout):
        return dropout(x, module.p, module.training)
    return module(x)


def add_linear(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, drop: nn.Module
) -> Tensor:
    """residual + drop(x weight^T + bias)"""
    if not is_plain(drop, nn.Dropout, Dropout):
        return residual + drop(linear_act(x, weight, bias))
    dtype = _autograd.autocast_dtype(x) or x.dtype
    rate = {"dropout_p": drop.p, "training": drop.training}
    if residual.dtype != dtype:
        # Autocast keeps the residual stream in float32; a fused sum would round it.
        return residual + linear_act(x, weight, bias, **rate)
    return linear_act(x, weight, bias, residual=residual, **rate)


def _feed_forward(layer: nn.Module, x: Tensor, residual: Tensor, drop: nn.Module) -> Tensor:
    """residual + drop(linear2(layer.dropout(activation(linear1(x)))))"""
    name = activation_name(layer.activation)
    if isinstance(layer.activation, nn.Module) and not is_untouched(layer.activation):
        name = None
    if name is not None and is_plain(layer.linear1, nn.Linear):
        inner = layer.dropout
        fused = is_plain(inner, nn.Dropout, Dropout)
        hidden = linear_act(
            x, layer.linear1.weight, layer.linear1.bias, name,
            dropout_p=inner.p if fused else 0.0, training=inner.training,
        )  # fmt: skip
        if not fused:
            hidden = inner(hidden)
    else:
        hidden = _dropout(layer.dropout, layer.activation(layer.linear1(x)))
    if is_plain(layer.linear2, nn.Linear):
        return add_linear(residual, hidden, layer.linear2.weight, layer.linear2.bias, drop)
    return residual + _dropout(drop, layer.linear2(hidden))


def _rows(name: str, argument: str, nested: Tensor) -> Tensor:
    """The rows (T, E), sequence after sequence, of a jagged nested tensor (N, j, E)."""
    jagged = nested.is_nested and nested.layout == torch.jagged
    if not jagged or nested.dim() != 3 or nested._ragged_idx != 1 or nested.lengths() is not None:
        expected = "(N, j, E), jagged and without holes, if one input is nested"
        _check.fail(ValueError, name, argument, expected, f"{nested.layout} {nested.shape}")
    return nested.values()


def _like(nested: Tensor, rows: Tensor) -> Tensor:
    """Rows as a jagged nested tensor of the same sequences; a known longest length stays known."""
    return torch.nested.nested_tensor_from_jagged(
        rows, nested.offsets(), min_seqlen=nested._maybe_min_seqlen,
        max_seqlen=nested._maybe_max_seqlen,
    )  # fmt: skip


def _attention_block(
    attention: nn.Module, query: Tensor, memory: Tensor, masks: tuple, residual: Tensor,
    drop: nn.Module,
) -> Tensor:  # fmt: skip
    """residual + drop(attention(query, memory, memory))

    The last of `masks` is None, or the jagged tensors whose rows `query` and `memory` are.
    """
    attn_mask, key_padding_mask, is_causal, jagged = masks
    if is_plain(attention, MultiheadAttention):
        return attention._attend(
            query, memory, memory, key_padding_mask, attn_mask, is_causal, jagged, residual, drop
        )
    if jagged is not None:
        itself = memory is query
        query = _like(jagged[0], query)
        memory = query if itself else _like(jagged[1], memory)
    out = attention(
        query, memory, memory, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
        is_causal=is_causal, need_weights=False,
    )[0]  # fmt: skip
    if jagged is not None:
        out = out.values()
    return residual + _dropout(drop, out)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention with torch.nn.MultiheadAttention's arguments, parameters and results.

    `out = concat_h(softmax(q_h k_h^T / sqrt(d) + masks) v_h) W_o^T + b_o`, where q, k, v are the
    projections of `query`, `key`, `value`.

    With `need_weights=False` the projections are `linear_act`, and the attention is
    `scaled_dot_product_attention`, which never holds an L x S matrix; a padding mask stays (N, S)
    in memory and is broadcast. With `need_weights=True` torch's own forward runs, as the
    probabilities themselves are asked for.

    Jagged nested tensors (N, j, E) (`torch.nested.nested_tensor_from_jagged`) are sequences without
    padding: everything runs on their values, the attention is `varlen_attention`, and the result is
    jagged as `query`. They take no masks; `is_causal` alone makes each sequence causal. The longest
    length is read from the offsets once where the tensor does not know it (give `max_seqlen` to
    spare a GPU that wait). Not under torch.compile. Nested tensors of the strided layout go to
    torch's own forward.

    Args: as torch.nn.MultiheadAttention.
    Shapes: query (L, N, E), key (S, N, kdim), value (S, N, vdim), or batch first, or without N;
        attn_mask (L, S) or (N * num_heads, L, S); key_padding_mask (N, S); True hides, floats are
        added. Or all three jagged (N, j, E), and no masks. All of one dtype: float64 (CPU),
        float32, bfloat16 or float16.
    Returns: (out (L, N, E), weights or None).
    Raises: ValueError for shapes that do not fit, TypeError for masks of another kind, RuntimeError
        for `is_causal` without `attn_mask`, as torch does. For jagged tensors ValueError also for
        masks and holes, NotImplementedError for `add_bias_kv` and `add_zero_attn`.
    Backends: those of linear_act, scaled_dot_product_attention and varlen_attention.
    Reference: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (query, key, value)
        nested = any(x.is_nested for x in inputs)
        if nested and not need_weights and all(x.layout == torch.jagged for x in inputs):
            return self._attend_jagged(*inputs, key_padding_mask, attn_mask, is_causal), None
        if nested or need_weights:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        return self._attend(query, key, value, key_padding_mask, attn_mask, is_causal), None

    def _attend_jagged(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> Tensor:
        name = "MultiheadAttention"
        # Rows are the same object where the tensors are: _projections knows self-attention by it.
        q = _rows(name, "query", query)
        k = q if key is query else _rows(name, "key", key)
        v = k if value is key else _rows(name, "value", value)
        if value.offsets() is not key.offsets():
            _check.fail(ValueError, name, "value", f"of key's shape {key.shape[:2]}", value.shape)
        out = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal, (query, key))
        return _like(query, out)

    def _attend(
        self, query, key, value, key_padding_mask, attn_mask, is_causal, jagged=None, residual=None,
        drop=None,
    ) -> Tensor:  # fmt: skip
        """The output, or residual + drop(output); of rows where `jagged` tells their sequences."""
        if jagged is None:
            out = self._heads(query, key, value, key_padding_mask, attn_mask, is_causal)
        else:
            out = self._packed_heads(
                query, key, value, key_padding_mask, attn_mask, is_causal, jagged
            )
        weight, bias = self.out_proj.weight, self.out_proj.bias
        if residual is None:
            return linear_act(out, weight, bias)
        return add_linear(residual, out, weight, bias, drop)

    def _packed_heads(
        self, query, key, value, key_padding_mask, attn_mask, is_causal, jagged
    ) -> Tensor:
        """The heads' results side by side, (T, E), without padding."""
        name = "MultiheadAttention"
        for argument, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is not None:
                _check.fail(ValueError, name, argument, "None for jagged tensors", mask.shape)
        bias_kv = self.bias_k is not None
        for argument, on in (("add_bias_kv", bias_kv), ("add_zero_attn", self.add_zero_attn)):
            if on:
                _check.fail(NotImplementedError, name, argument, "False for jagged tensors", on)
        self._check(query, key, value, None, None, False)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim))
            for x in self._projections(query, key, value)
        )
        out = varlen_attention(
            q, k, v, *(x.offsets() for x in jagged), *(x._get_max_seqlen() for x in jagged),
            self.dropout if self.training else 0.0, is_causal,
        )  # fmt: skip
        return out.flatten(1)

    def _heads(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> Tensor:
        """The heads' results side by side, of query's shape but for the features."""
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        # Without a batch dimension, the sequence comes first and the batch of one follows.
        batch_first = self.batch_first and batched
        q, k, v = self._projections(query, key, value)
        q, k, v = (self._by_head(x if batched else x.unsqueeze(1), batch_first) for x in (q, k, v))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        k, v, extra_keys = self._with_extra_keys(k, v)

        window = None
        if is_causal:
            # The hint stands for the mask, as in torch without padding. With padding, where torch
            # reads the mask, the band does too, so that the padding mask alone is broadcast; keys
            # beyond the mask's own need the mask.
            if key_padding_mask is None:
                attn_mask = None
            elif not extra_keys:
                attn_mask, is_causal, window = None, False, (-1, 0)
            else:
                is_causal = False
        mask = self._merged_mask(attn_mask, key_padding_mask, q, extra_keys)
        dropout_p = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, window=window)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
        return out if batched else out.squeeze(1)

    def _projections(self, query, key, value) -> tuple[Tensor, Tensor, Tensor]:
        """Projected query, key and value (..., embed_dim), with as few GEMMs as they allow."""
        width = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias

        def separate(weights):
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            calls = zip((query, key, value), weights, biases, strict=True)
            return tuple(linear_act(*arguments) for arguments in calls)

        if not self._qkv_same_embed_dim:
            return separate((self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        if query is key and key is value:
            # unbind, not slices: its backward writes the packed gradient in one pass.
            return linear_act(query, weight, bias).unflatten(-1, (3, width)).unbind(-2)
        if key is value:
            w_q, w_kv = weight.split((width, 2 * width))
            b_q, b_kv = (None, None) if bias is None else bias.split((width, 2 * width))
            packed = linear_act(key, w_kv, b_kv).unflatten(-1, (2, width))
            return linear_act(query, w_q, b_q), *packed.unbind(-2)
        return separate(weight.chunk(3))

    def _by_head(self, x: Tensor, batch_first: bool) -> Tensor:
        """(N, H, L, D) view of projected rows."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        extra = 0
        if self.bias_k is not None:
            shape = (k.shape[0], self.num_heads, 1, self.head_dim)
            k, v = (
                torch.cat([x, b.view(1, *shape[1:]).expand(shape)], dim=2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        return k, v, extra

    def _merged_mask(self, attn_mask, key_padding_mask, q, extra_keys) -> Tensor | None:
        """One mask in scaled_dot_product_attention's sense, expanded no further than its parts."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            # torch.nn hides where True, scaled_dot_product_attention where False.
            visible = ~(masks[0] | masks[1] if len(masks) == 2 else masks[0])
            return F.pad(visible, (0, extra_keys), value=True) if extra_keys else visible
        masks = [_additive(mask, q.dtype) for mask in masks]
        added = masks[0] + masks[1] if len(masks) == 2 else masks[0]
        return F.pad(added, (0, extra_keys)) if extra_keys else added

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> None:
        name = "MultiheadAttention"
        if is_causal and attn_mask is None:
            _check.fail(RuntimeError, name, "attn_mask", "given with the is_causal hint", None)
        if query.dim() not in (2, 3):
            _check.fail(ValueError, name, "query", "2-D or 3-D", f"{query.dim()}-D")
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for argument, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != query.dim():
                _check.fail(ValueError, name, argument, f"{query.dim()}-D as query", f"{x.dim()}-D")
            if x.shape[-1] != sizes[argument]:
                expected = f"of {sizes[argument]} features"
                _check.fail(ValueError, name, argument, expected, x.shape[-1])
        if key.shape[:-1] != value.shape[:-1]:
            expected = f"of key's shape {tuple(key.shape[:-1])} but for the features"
            _check.fail(ValueError, name, "value", expected, tuple(value.shape[:-1]))
        sequence = 1 if self.batch_first and query.dim() == 3 else 0
        batch = query.shape[1 - sequence] if query.dim() == 3 else 1
        if query.dim() == 3 and key.shape[1 - sequence] != batch:
            _check.fail(ValueError, name, "key", f"a batch of {batch}", key.shape[1 - sequence])
        length, keys = query.shape[sequence], key.shape[sequence]
        for argument, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [key.shape[:-1]]),
            ("attn_mask", attn_mask, [(length, keys), (batch * self.num_heads, length, keys)]),
        ):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                _check.fail(TypeError, name, argument, "boolean or floating point", mask.dtype)
            if argument == "key_padding_mask" and query.dim() == 3:
                shapes = [(batch, keys)]
            if tuple(mask.shape) not in [tuple(shape) for shape in shapes]:
                expected = "of shape " + " or ".join(str(tuple(shape)) for shape in shapes)
                _check.fail(ValueError, name, argument, expected, tuple(mask.shape))


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """A Transformer encoder layer with torch.nn.TransformerEncoderLayer's arguments and parameters.

    `x = norm1(x + dropout(attention(x))); x = norm2(x + dropout(W_2 dropout(act(W_1 x))))`, or with
    each norm before its block (`norm_first`).

    Activation, dropouts and residual sums are epilogues of the GEMMs. Torch's inference fast path
    is not taken: evaluation runs the same kernels as training. A jagged nested tensor is taken
    apart once: norms and GEMMs run on its rows (T, E), so that padding costs nothing, also inside
    of nn.TransformerEncoder. A strided one goes to torch's forward; `swap_` turns off the
    conversion to such tensors in nn.TransformerEncoder.

    Args: as torch.nn.TransformerEncoderLayer; an `activation` that linear_act does not have is
        called between the two GEMMs.
    Shapes: src (L, N, E), (N, L, E) batch first, or (L, E); masks as MultiheadAttention's. Or
        jagged (N, j, E), without masks.
    Returns: a tensor of src's shape.
    Raises: as MultiheadAttention.
    Backends: those of MultiheadAttention.
    Reference: Vaswani et al. 2017; Xiong et al. 2020, figure 1, for `norm_first`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        # torch's constructor builds (and initialises) its own class, of which ours is a subclass.
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        jagged = (src, src) if src.is_nested else None
        if jagged and src.layout != torch.jagged:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask, is_causal, jagged)
        x = _rows("TransformerEncoderLayer", "src", src) if jagged else src
        if self.norm_first:
            y = self.norm1(x)
            x = _attention_block(self.self_attn, y, y, masks, x, self.dropout1)
            x = _feed_forward(self, self.norm2(x), x, self.dropout2)
        else:
            x = self.norm1(_attention_block(self.self_attn, x, x, masks, x, self.dropout1))
            x = self.norm2(_feed_forward(self, x, x, self.dropout2))
        return _like(src, x) if jagged else x


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """A Transformer decoder layer with torch.nn.TransformerDecoderLayer's arguments and parameters.

    As TransformerEncoderLayer, with a block that attends from `tgt` to `memory` between the two.

    Args: as torch.nn.TransformerDecoderLayer.
    Shapes: tgt (L, N, E), memory (S, N, E), or batch first, or without N; masks as
        MultiheadAttention's, `tgt_*` for the first block and `memory_*` for the second. Or
        both jagged (N, j, E), and no masks.
    Returns: a tensor of tgt's shape.
    Raises: as MultiheadAttention.
    Backends: those of MultiheadAttention.
    Reference: Vaswani et al. 2017; Xiong et al. 2020, figure 1, for `norm_first`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        nested = tgt.is_nested or memory.is_nested
        jagged = (tgt, memory) if nested else None
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal, (tgt, tgt) if nested else None)
        cross = (memory_mask, memory_key_padding_mask, memory_is_causal, jagged)
        x = tgt
        if nested:
            x = _rows("TransformerDecoderLayer", "tgt", tgt)
            memory = _rows("TransformerDecoderLayer", "memory", memory)
        if self.norm_first:
            y = self.norm1(x)
            x = _attention_block(self.self_attn, y, y, own, x, self.dropout1)
            y = self.norm2(x)
            x = _attention_block(self.multihead_attn, y, memory, cross, x, self.dropout2)
            x = _feed_forward(self, self.norm3(x), x, self.dropout3)
        else:
            x = self.norm1(_attention_block(self.self_attn, x, x, own, x, self.dropout1))
            x = self.norm2(
                _attention_block(self.multihead_attn, x, memory, cross, x, self.dropout2)
            )
            x = self.norm3(_feed_forward(self, x, x, self.dropout3))
        return _like(tgt, x) if nested else x
