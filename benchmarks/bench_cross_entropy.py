"""The cross-entropy and linear + cross-entropy cases under pytest-benchmark."""

import pytest

from benchmarks import common


@pytest.mark.parametrize(
    ("case", "provider"), common.parameters("cross_entropy", "linear_cross_entropy")
)
def test_cross_entropy(time_step, case, provider):
    time_step(case, provider)
