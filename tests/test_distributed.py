"""The example of fastnn.distributed as a program, and the processes that its tests run on."""

import os
import subprocess
import sys
import time

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

import torch.distributed as dist
from conftest import ROOT


def test_example(tmp_path):
    program = "-m examples.distributed --quick"
    run = subprocess.run(
        [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(),
         *program.split()],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "largest relative difference" in run.stdout


def die_on_the_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    dist.barrier()


def hang_on_the_last_rank():
    if dist.get_rank() < dist.get_world_size() - 1:
        dist.barrier()
    time.sleep(30)


@pytest.mark.parametrize("team", [2], indirect=True)
def test_failures_of_a_process_are_seen(team):
    """A rank that raises, dies or hangs fails the test that runs on it."""
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        team.run(divmod, 1, 0)
    with pytest.raises(pytest.fail.Exception, match="rank 1 died with exit code 7|rank 0:"):
        team.run(die_on_the_last_rank)
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] did not answer in 1 s"):
        team.run(hang_on_the_last_rank, seconds=1)
