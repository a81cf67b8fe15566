"""The linear + activation and dropout cases under pytest-benchmark."""

import pytest

from benchmarks import common


@pytest.mark.parametrize(("case", "provider"), common.parameters("linear_act", "dropout"))
def test_linear_act(time_step, case, provider):
    time_step(case, provider)
