"""fastnn: fused kernels for PyTorch, drop-in for torch.nn and torch.nn.functional."""

from fastnn import functional
from fastnn.backend import current_backend, use_backend
from fastnn.functional import dropout, linear_act
from fastnn.linear_act import MLP, Dropout, GatedMLP, LinearAct

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "Dropout",
    "GatedMLP",
    "LinearAct",
    "current_backend",
    "dropout",
    "functional",
    "linear_act",
    "use_backend",
]
