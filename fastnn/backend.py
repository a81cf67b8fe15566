"""Which kernels serve a call: C++ (`native`), Triton, or plain PyTorch (`reference`).

`auto` takes the first of native, triton, reference that serves the call. A backend chosen by name
serves it or raises an error that lists, per backend, why not. `FASTNN_BACKEND` sets the default,
`use_backend` overrides it for a block, and `FASTNN_DISABLE=1` sends everything to the reference.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

from fastnn import _ops

BACKENDS = ("auto", "native", "triton", "reference")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_HEAD_DIM = 256  # kMaxHeadDim of csrc/cuda/attention_binding.cpp


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _default() -> str:
    if os.environ.get("FASTNN_DISABLE") == "1":
        return "reference"
    return _checked(os.environ.get("FASTNN_BACKEND", "auto"), "FASTNN_BACKEND")


# Read as it is where a call of current_backend() would cost too much. A plain global, which
# torch.compile guards on; it cannot trace a ContextVar.
chosen = _default()


def current_backend() -> str:
    """The backend that calls use now: `auto`, `native`, `triton` or `reference`."""
    return chosen


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for the calls inside the block (their backward included).

    Args:
        name: `auto`, `native`, `triton` or `reference`.
    Raises:
        ValueError: for any other name.
    """
    global chosen
    before, chosen = chosen, _checked(name, "backend")
    try:
        yield
    finally:
        chosen = before


# Looked up once: torch.compile cannot trace the dispatcher.
_NATIVE_KERNELS = {
    (family, device_type): all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{op}", device_type.upper())
        for op in ops
    )
    for family, ops in _ops.FAMILIES.items()
    for device_type in ("cpu", "cuda")
}


def native_limit(device_type: str, features: dict) -> str | None:
    """Why the C++ kernels, where they are built, cannot serve a call with `features`, or None."""
    for name in ("head_dim", "value_dim"):
        if device_type == "cuda" and features.get(name, 0) > _CUDA_HEAD_DIM:
            return f"CUDA attention serves a {name} up to {_CUDA_HEAD_DIM}, got {features[name]}"
    return None


def _native_refusal(family, device_type, dtype, features) -> str | None:
    if _ops.NATIVE_MISSING is not None:
        return _ops.NATIVE_MISSING
    if not _NATIVE_KERNELS.get((family, device_type), False):
        return f"no {device_type} kernel for {family} in this build"
    if dtype not in _DTYPES and not (dtype == torch.float64 and device_type == "cpu"):
        return f"{dtype} is not supported on {device_type}"
    return native_limit(device_type, features)


def _triton_refusal(family, device_type, dtype, features) -> str | None:
    if _ops.TRITON_MISSING is not None:
        return _ops.TRITON_MISSING
    if device_type != "cuda" and not _ops.tritonops.INTERPRETED:
        return f"Triton does not run on {device_type}"
    if dtype not in _DTYPES:
        return f"{dtype} is not supported by the Triton kernels"
    return _ops.tritonops.refusal(family, features)


_REFUSAL = {"native": _native_refusal, "triton": _triton_refusal}
_HANDLES = {"native": _ops.NATIVE, "triton": _ops.TRITON}


def refusal(backend: str, family: str, device_type: str, dtype: torch.dtype, **features):
    """Why `backend` cannot serve such a call of `family`, or None when it can.

    `features` names what the call uses beyond the plain case (see `tritonops.refusal`).
    """
    if backend == "reference":
        return None
    return _REFUSAL[backend](family, device_type, dtype, features)


def _only_plain(tensor: torch.Tensor) -> str | None:
    """What about a call no kernel serves, whatever its family; None where some may."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested or sparse tensors"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def resolve(
    family: str, tensor: torch.Tensor, only_plain: str | None = None, **features
) -> SimpleNamespace | None:
    """The operator handles that serve a call of `family` on `tensor`; None is the reference.

    `only_plain` names what of the call plain PyTorch alone serves, if anything.
    """
    choice = chosen
    if choice == "reference":
        return None
    only_plain = only_plain or _only_plain(tensor)
    if only_plain is not None:
        if choice == "auto":
            return None
        raise NotImplementedError(f"backend {choice!r} cannot serve {family} with {only_plain}")
    device_type, dtype = tensor.device.type, tensor.dtype
    if choice != "auto":
        if refusal(choice, family, device_type, dtype, **features) is None:
            return _HANDLES[choice]
        raise NotImplementedError(_explain(choice, family, device_type, dtype, features))
    for name, handles in _HANDLES.items():
        if _REFUSAL[name](family, device_type, dtype, features) is None:
            return handles
    return None


def _explain(choice, family, device_type, dtype, features) -> str:
    lines = [f"backend {choice!r} cannot serve {family} on {device_type} in {dtype}:"]
    for name in _HANDLES:
        reason = refusal(name, family, device_type, dtype, **features)
        lines.append(f"  {name}: {reason or 'can serve it'}")
    return "\n".join(lines)
