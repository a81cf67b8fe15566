"""Which activation a module's forward applies to a Linear's output, read off a torch.fx trace.

torch.fx follows one side of every Python branch, so a trace proves something only where the code it
ran has none: every function that ran, outside torch, is checked for branches and loops. The trace
runs on a copy, whose activations are placeholders, so that it neither leaves proxies in the module
nor mistakes a call past the module's slot (through a list, say) for one of the slot.
"""

from __future__ import annotations

import copy
import dis
import functools
import gc
import os
import sys
import sysconfig
from collections.abc import Callable
from types import CodeType

import torch
from torch import fx, nn

_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep


class _Tracer(fx.Tracer):
    """Records the code that the traced forward, and nothing before it, runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[CodeType] = set()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def create_args_for_root(self, *arguments):
        forward, args = super().create_args_for_root(*arguments)

        @functools.wraps(forward)
        def watched(*args):
            def note(frame, event, argument):
                if event == "call" and _is_a_models(frame.f_code):
                    self.ran.add(frame.f_code)

            before, collects = sys.getprofile(), gc.isenabled()
            gc.disable()  # its callbacks and finalizers are none of the forward's code
            sys.setprofile(note)
            try:
                return forward(*args)
            finally:
                sys.setprofile(before)
                if collects:
                    gc.enable()

        return watched, args


def _is_a_models(code: CodeType) -> bool:
    """Whether code that ran in a trace is neither torch's nor Python's own."""
    path = code.co_filename
    if path.startswith(_LIBRARY) and "-packages" not in path:
        return False
    return not path.startswith((_TORCH, __file__, "<frozen"))


def _branches(code: CodeType) -> bool:
    # Python 3.11 keeps `try` and `with` in a table, 3.10 in SETUP_* instructions.
    return bool(getattr(code, "co_exceptiontable", b"")) or any(
        name == "FOR_ITER" or name.startswith("SETUP_") or ("JUMP" in name and "IF" in name)
        for name in (instruction.opname for instruction in dis.get_instructions(code))
    )


def _copy(module: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A copy with other sub-modules, sharing the parameters."""
    kept = [*module.children(), *module.parameters(recurse=False)]
    copied = copy.deepcopy(module, {id(thing): thing for thing in kept})
    copied._modules = modules
    return copied


def _trace(module: nn.Module) -> tuple[fx.Graph, bool]:
    """The graph of the forward, and whether that is all it can do."""
    tracer = _Tracer()
    with torch.random.fork_rng(devices=[]):
        graph = tracer.trace(module)
    return graph, not any(_branches(code) for code in tracer.ran)


def activations_after(
    parent: nn.Module, is_linear: Callable, is_activation: Callable
) -> tuple[dict[str, list[str]], str]:
    """Slots of activations that are applied to nothing but outputs of Linears.

    Returns: {the activation's slot: the slots of its Linears}, where each Linear is called once, on
        one argument, and nothing else reads its output; and why other Linears are not among them.
    """
    kind = type(parent).__name__
    if "forward" in parent.__dict__:
        return {}, f"the forward of {kind} was replaced"
    stand_ins = {
        slot: nn.Identity() if is_activation(child) else child
        for slot, child in parent._modules.items()
    }
    try:
        graph, certain = _trace(_copy(parent, stand_ins))
    except Exception:  # whatever the forward, or the copy, raises when it meets a proxy
        return {}, f"torch.fx cannot trace the forward of {kind}"
    if not certain:
        return {}, f"the forward of {kind} branches"
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    found = {}
    for slot, child in parent._modules.items():
        if not is_activation(child) or slot not in calls:
            continue
        sources = [
            call.args[0] if len(call.args) == 1 and not call.kwargs else None
            for call in calls[slot]
        ]
        if all(
            isinstance(source, fx.Node)
            and source.op == "call_module"
            and is_linear(parent._modules.get(source.target))
            and len(calls[source.target]) == 1
            and list(source.users) == [call]
            for source, call in zip(sources, calls[slot], strict=True)
        ):
            found[slot] = [source.target for source in sources]
    return found, f"the forward of {kind} applies no activation to it alone"
