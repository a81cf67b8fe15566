"""The public functions, under torch.nn.functional's names where torch has them."""

from fastnn.linear_act import dropout, linear_act

__all__ = ["dropout", "linear_act"]
