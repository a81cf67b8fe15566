"""The attention cases under pytest-benchmark."""

import pytest

from benchmarks import common


@pytest.mark.parametrize(("case", "provider"), common.parameters("attention"))
def test_attention(time_step, case, provider):
    time_step(case, provider)
