"""How a public function enters its autograd.Function."""

from __future__ import annotations

import torch

# Whether a torch.func transform is active: a backward may then run more than once.
transforming = torch._C._are_functorch_transforms_active


def apply(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`, without torch's binding of the arguments where nothing needs it.

    A Function with `setup_context` (what torch.func asks for) pays about 20 us in `apply` for
    inspecting its signature, more than a small layer's kernel; positional arguments need none.
    """
    if torch.compiler.is_compiling() or transforming():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def is_recorded(*tensors) -> bool:
    """Whether a call has to go through its autograd.Function."""
    if not torch.is_grad_enabled():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    # Inside of vmap a tensor does not say that what it wraps requires a gradient.
    return not torch.compiler.is_compiling() and transforming()


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast casts to on the tensor's device; None outside of it."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Tensors as autocast, on the device of the first, casts the arguments of a function."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def wants_composite() -> bool:
    """Whether a backward is itself differentiated (create_graph=True) and must be a composite."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def composite_gradients(function, tensors, grad_outputs):
    """Differentiable gradients of `function(*tensors)`, None for tensors that need none."""
    with torch.enable_grad():
        # Each argument apart: where one is computed from another (a residual that is also the
        # input), its gradient must not count the paths through the other.
        tensors = tuple(t.view_as(t) if t is not None and t.requires_grad else t for t in tensors)
        outputs = function(*tensors)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True,
                allow_unused=True,
            )
        )  # fmt: skip
    return tuple(next(gradients) if t is not None and t.requires_grad else None for t in tensors)
