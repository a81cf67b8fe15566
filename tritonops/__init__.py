"""Triton kernels of every operator of fastnn's table, with their launchers.

A launcher has its operator's name and arguments. Imports torch and triton only, never fastnn.
"""

from tritonops.launch import INTERPRETED  # first: the kernels' modules read it from here

# isort: split

from tritonops import attention, cross_entropy, linear_act, linear_cross_entropy
from tritonops.attention import (
    attention_backward,
    attention_forward,
    varlen_attention_backward,
    varlen_attention_forward,
)
from tritonops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from tritonops.linear_act import dropout, linear_act_backward, linear_act_forward
from tritonops.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    scale_,
)

__all__ = [
    "INTERPRETED",
    "attention_backward",
    "attention_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout",
    "linear_act_backward",
    "linear_act_forward",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "refusal",
    "scale_",
    "varlen_attention_backward",
    "varlen_attention_forward",
]

_REFUSALS = {
    "attention": attention.refusal,
    "cross_entropy": cross_entropy.refusal,
    "dropout": lambda features: None,
    "linear_act": linear_act.refusal,
    "linear_cross_entropy": linear_cross_entropy.refusal,
    "varlen_attention": attention.refusal,
}


def refusal(family: str, features: dict) -> str | None:
    """Why the Triton kernels of `family` cannot serve a call with these features, or None.

    `features` names what the call uses: `activation` for linear_act; `prob_target` and `k_dim` for
    the losses; `head_dim`, `value_dim`, `mask_grad`, `alibi` and `sinks` for attention.
    """
    return _REFUSALS[family](features)
