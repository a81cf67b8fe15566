"""The public functions, under torch.nn.functional's names where torch has them."""

from fastnn.attention import scaled_dot_product_attention
from fastnn.cross_entropy import cross_entropy
from fastnn.linear_act import dropout, linear_act
from fastnn.linear_cross_entropy import linear_cross_entropy
from fastnn.varlen_attention import varlen_attention

__all__ = [
    "cross_entropy",
    "dropout",
    "linear_act",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
    "varlen_attention",
]
