import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One rounding of the half types; a few of float32, whose sums are long.
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def assert_close_to_oracle(ours, torchs, oracle, factor=2.0, what="result"):
    """Our error against the float64 oracle is at most `factor` times torch's own in that dtype.

    The epsilon, relative to the oracle's largest element, is for results so few that torch's own
    error happens to be zero; where errors are compared, take shapes with some dozens of results.
    """
    assert ours.shape == oracle.shape, f"{what}: shape {ours.shape}, expected {oracle.shape}"
    assert ours.dtype == torchs.dtype, f"{what}: dtype {ours.dtype}, torch gives {torchs.dtype}"
    if ours.numel() == 0:
        return
    oracle = oracle.double()
    nan = oracle.isnan()
    assert torch.equal(ours.isnan(), nan), f"{what}: NaN where the oracle has none, or none where"
    infinite = oracle.isinf()
    assert torch.equal(ours.double()[infinite], oracle[infinite]), f"{what}: infinities differ"
    finite = ~(nan | infinite)
    if not finite.any():
        return
    wanted = oracle[finite]
    error = (ours.double()[finite] - wanted).abs().max().item()
    allowed = factor * (torchs.double()[finite] - wanted).abs().nan_to_num(0.0).max().item()
    allowed += EPSILON[ours.dtype] * wanted.abs().max().item() + 1e-30
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
