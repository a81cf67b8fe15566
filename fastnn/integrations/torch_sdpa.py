"""Sends calls of `torch.nn.functional.scaled_dot_product_attention` to fastnn, for code that is not
to be changed.

    with fastnn.integrations.torch_sdpa.routed():
        model(x).sum().backward()

The function is replaced in torch.nn.functional, in every thread: what looks it up there when it
calls (F.scaled_dot_product_attention, nn.MultiheadAttention, most libraries) is served, a name that
was imported from there before is not. Calls that fastnn cannot serve go to torch's own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch.nn.functional as F
from torch.overrides import has_torch_function

from fastnn import attention

_lock = threading.Lock()
_depth = 0
_stock = F.scaled_dot_product_attention


@functools.wraps(_stock)
def _routed(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
            enable_gqa=False):  # fmt: skip
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    # Somebody may have kept this function beyond `disable`.
    plain = _depth and not has_torch_function((query, key, value, attn_mask))
    if plain and query.device.type in ("cpu", "cuda"):
        with contextlib.suppress(NotImplementedError):  # a backend by name that cannot serve it
            return attention.scaled_dot_product_attention(*arguments, **options)
    return _stock(*arguments, **options)


def enable() -> None:
    """Starts routing; calls nest, each wants its `disable`."""
    global _depth, _stock
    with _lock:
        _depth += 1
        if _depth == 1:
            _stock = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = _routed


def disable() -> None:
    """Ends what the last `enable` began; after the outermost torch's function is back.

    Raises: RuntimeError without a matching `enable`.
    """
    global _depth
    with _lock:
        if not _depth:
            raise RuntimeError("torch_sdpa.disable: routing is not enabled")
        _depth -= 1
        # Where somebody replaced it since, it is theirs to put back: `_routed` then passes on.
        if not _depth and F.scaled_dot_product_attention is _routed:
            F.scaled_dot_product_attention = _stock


@contextlib.contextmanager
def routed() -> Iterator[None]:
    """Routes within the block (forward; the backward follows it)."""
    enable()
    try:
        yield
    finally:
        disable()
