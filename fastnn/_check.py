"""Argument errors of the public functions, in the wording of csrc/check.h."""

from __future__ import annotations

from typing import NoReturn

import torch


def fail(kind: type[Exception], function: str, argument: str, expected: str, got) -> NoReturn:
    raise kind(f"{function}: {argument} must be {expected}, got {got}")


def tensor(function: str, **arguments) -> None:
    """Each argument is a tensor; a name that ends in `_or_none` may be None."""
    for name, value in arguments.items():
        optional = name.endswith("_or_none")
        if not isinstance(value, torch.Tensor) and not (optional and value is None):
            expected = "a Tensor or None" if optional else "a Tensor"
            got = type(value).__name__
            fail(TypeError, function, name.removesuffix("_or_none"), expected, got)


def probability(function: str, argument: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        fail(ValueError, function, argument, "in [0, 1]", value)


def choice(function: str, argument: str, value, allowed) -> None:
    if value not in allowed:
        fail(ValueError, function, argument, f"one of {', '.join(allowed)}", repr(value))


def same_kind(function: str, like_name: str, like: torch.Tensor, **others) -> None:
    """Every other tensor (None is skipped) has the dtype and device of `like`."""
    dtype, device = like.dtype, like.device
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != dtype:
            fail(RuntimeError, function, name, f"of {like_name}'s dtype {dtype}", other.dtype)
        if other.device != device:
            fail(RuntimeError, function, name, f"on {like_name}'s device {device}", other.device)
