"""Glue to pytest-benchmark: `pytest benchmarks` times what `python -m benchmarks` times."""

import math

import pytest
import torch

from benchmarks import accuracy, common, timing


@pytest.fixture
def time_step(benchmark):
    """Times one case with one provider; its error against fp64 goes into the extra info."""

    def run(case: common.Case, provider: common.Provider):
        device = common.default_device()
        tensors = common.make_inputs(case, device)
        step = common.prepare(case, provider, tensors)
        errors = accuracy.Oracle(case, tensors).errors(provider, step)
        clock = timing.Clock(device)
        with provider.context():
            once = clock.sample(step, 1)

            def timed():
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            iterations = max(1, min(1000, math.ceil(0.02 / max(once, 1e-6))))
            benchmark.pedantic(timed, rounds=3, iterations=iterations, warmup_rounds=1)
        benchmark.group = f"{case.family}: {case.label}"
        benchmark.extra_info.update(case=case.label, provider=provider.label, errors=errors)

    return run
