"""Data sets of the examples. Nothing is stored in the repository."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(test_share: float = 0.2, seed: int = 0) -> Split:
    """scikit-learn's 1797 handwritten digits as (N, 64) float32 in [0, 1], shuffled and split.

    Source: UCI "Optical Recognition of Handwritten Digits"; it comes inside scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("this example needs scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).to(torch.float32) / 16.0
    y = torch.from_numpy(labels).to(torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([int(len(x) * test_share), len(x) - int(len(x) * test_share)])
    return Split(x[train], y[train], x[test], y[test])
