"""fastnn: fused kernels for PyTorch, drop-in for torch.nn and torch.nn.functional."""

from fastnn import functional
from fastnn.backend import current_backend, use_backend
from fastnn.cross_entropy import CrossEntropyLoss
from fastnn.functional import (
    cross_entropy,
    dropout,
    linear_act,
    linear_cross_entropy,
    scaled_dot_product_attention,
    varlen_attention,
)
from fastnn.linear_act import MLP, Dropout, GatedMLP, LinearAct
from fastnn.linear_cross_entropy import LinearCrossEntropyLoss
from fastnn.swap import swap_, unswap_
from fastnn.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "Dropout",
    "GatedMLP",
    "LinearAct",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "cross_entropy",
    "current_backend",
    "dropout",
    "functional",
    "linear_act",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
    "swap_",
    "unswap_",
    "use_backend",
    "varlen_attention",
]
