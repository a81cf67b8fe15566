"""The error of a step against fp64: its largest deviation, relative to the fp64 result's maximum.

Dropout is no excuse: a provider's mask is drawn once more from the same seed and given to the fp64
oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import common
from fastnn import backend
from fastnn.linear_act import dropout_seed, keep_mask


def _keep_mask(case: common.Case, provider: common.Provider, device: torch.device) -> torch.Tensor:
    """The mask that the provider's next call draws after manual_seed(SEED), scaled by 1/(1-p)."""
    shape = common.FAMILIES[case.family].dropout_shape(case)
    p = case.options["dropout_p"]
    torch.manual_seed(common.SEED)
    if provider.backend is None:
        return F.dropout(torch.ones(shape, device=device, dtype=torch.float64), p)
    ones = torch.ones(shape, device=device)
    if case.family == "dropout":
        with provider.context():
            return common.functional().dropout(ones, p).double()
    # The mask is a function of the seed alone, whichever backend draws it.
    ops = backend.resolve("dropout", ones)
    return keep_mask(ops, shape, p, dropout_seed(device), ones).double()


class Oracle:
    """The fp64 result of a case; without dropout it is computed once for all providers."""

    def __init__(self, case: common.Case, tensors: dict):
        self.case, self.tensors = case, tensors
        self.device = next(iter(tensors.values())).device
        self._result = None

    def _compute(self, keep):
        tensors = {
            name: t.detach().double().requires_grad_(t.requires_grad)
            if t.is_floating_point()
            else t
            for name, t in self.tensors.items()
        }
        return common.make_step(
            self.case, common.FAMILIES[self.case.family].oracle(self.case, keep), tensors
        )()

    def errors(self, provider: common.Provider, step: Callable) -> dict[str, float] | None:
        """Relative error of the output and of each gradient; None where there is no oracle, or a
        provider's dropout mask cannot be replayed (compiled code and CUDA's eager dropout have
        generators of their own)."""
        if common.FAMILIES[self.case.family].oracle is None:
            return None
        if not self.case.options.get("dropout_p"):
            if self._result is None:
                self._result = self._compute(None)
            exact = self._result
        elif provider.compiled or (provider.backend is None and self.device.type == "cuda"):
            return None
        else:
            exact = self._compute(_keep_mask(self.case, provider, self.device))
        torch.manual_seed(common.SEED)
        with provider.context():
            got = step()
        names = ["out"]
        names += [f"grad_{name}" for name, t in self.tensors.items() if t.requires_grad]
        return {
            name: relative_error(ours, true)
            for name, ours, true in zip(names, got, exact, strict=True)
        }


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    worst = (got.double() - exact).abs().max()
    return (worst / exact.abs().max().clamp_min(1e-300)).item()
