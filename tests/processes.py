"""Processes of one gloo group, which wait for the functions of tests; what the functions share."""

import contextlib
import time
import traceback
from datetime import timedelta
from multiprocessing import connection

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def _serve(rank, ranks, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    while True:
        function, arguments = pipe.recv()
        try:
            torch.manual_seed(0)
            function(*arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


class Team:
    """Processes that wait for functions to run. After a failure new ones are started.

    None ends before the team does: a connection that one process closes may be lost to another
    that is still reading what came last.
    """

    def __init__(self, ranks, folder):
        self.ranks, self.folder, self.started, self.members = ranks, folder, 0, []

    def start(self):
        self.started += 1
        context = torch.multiprocessing.get_context("forkserver")
        # Imported once, and not by each process; before Python 3.13 only what is installed.
        context.set_forkserver_preload(["torch.distributed.tensor", "hypothesis", "pytest"])
        for rank in range(self.ranks):
            mine, theirs = context.Pipe()
            store = self.folder / str(self.started)
            arguments = rank, self.ranks, store, theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, mine))

    def stop(self):
        for process, pipe in self.members:
            process.kill()
            process.join()
            pipe.close()
        self.members = []

    def run(self, function, *arguments, seconds=90):
        """Runs it on every rank; fails with the first error, death or delay of one."""
        if not self.members:
            self.start()
        for _, pipe in self.members:
            pipe.send((function, arguments))
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self.members)}
        deadline = time.monotonic() + seconds
        failure = None
        while pending and not failure:
            ready = connection.wait(pending, max(deadline - time.monotonic(), 0.0))
            if not ready:
                failure = f"ranks {sorted(pending.values())} did not answer in {seconds} s"
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    error = pipe.recv()
                    failure = failure or (error and f"rank {rank}:\n{error}")
                except EOFError:
                    process = self.members[rank][0]
                    process.join()
                    failure = f"rank {rank} died with exit code {process.exitcode}"
        if failure:
            self.stop()
            pytest.fail(failure, pytrace=False)


@contextlib.contextmanager
def refused(kind, match):
    """Every rank raises, and none is left in a collective."""
    with pytest.raises(kind, match=match):
        yield
    dist.barrier()


def own_half():
    """Of both halves of the processes, the group of this one, and a seed of the half's own."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    halves = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    torch.manual_seed(rank // half)
    return halves[rank // half]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result
