"""fastnn: fused kernels for PyTorch, drop-in for torch.nn and torch.nn.functional."""

from fastnn.backend import current_backend, use_backend

__version__ = "0.1.0"
__all__ = ["current_backend", "use_backend"]
