"""Triton kernels compile for sm_80, sm_90 and sm_100 without a GPU, fit, and spill nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parent / "tritonops").glob("*.py"))
# Shared memory that one block may use (opt-in)
LIMITS = {80: 166912, 90: 232448, 100: 232448}


def launchable_kernels():
    """The kernels that the sources define: what their `aot()` must cover."""
    found = [re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M) for path in SOURCES]
    return {name for names in found for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_compiles_for(capability):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    modules = [f"tritonops.{path.stem}" for path in SOURCES if path.stem != "__init__"]
    command = [sys.executable, str(HERE / "compile_triton.py"), str(capability), *modules]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    failures = [
        row for row in rows if row["stack"] or row["local"] or row["shared"] > LIMITS[capability]
    ]
    assert not failures, "spills, or too much shared memory:\n" + "\n".join(map(str, failures))
    seen = {row["kernel"].rpartition(".")[2] for row in rows}
    missing = launchable_kernels() - seen
    assert not missing, f"no aot() covers {sorted(missing)}"


def test_stored_configurations():
    """Large products get the largest tile, short ones no padding; rows get as much as they have."""
    from tritonops import cross_entropy, linear_act

    def tile(m, n, splits=1, gated=False, light=True):
        fitting = linear_act.GEMM_CONFIGS if light else linear_act.GEMM_CONFIGS[1:]
        config = linear_act.stored_config(fitting, m, n, splits, gated, 132)
        return config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]

    assert tile(8192, 4096) == tile(4096, 4096) == (128, 256)
    assert tile(8192, 4096, light=False) == (128, 128)
    assert tile(2048, 2048) == (128, 128) and tile(2048, 1024, gated=True) == (128, 128)
    assert tile(16, 14336)[0] == tile(1, 64)[0] == 16
    assert tile(512, 512, splits=16) == (128, 128)

    def row(classes, class_stride=1, inner=1, options=False):
        arguments = {"classes": classes, "class_stride": class_stride, "inner": inner}
        allowed = cross_entropy._prune(
            cross_entropy.ROW_CONFIGS, arguments, SMOOTHING=options, SOFTCAP=options
        )
        config = cross_entropy.stored_config(allowed, arguments)
        return config.kwargs["BLOCK_R"], config.kwargs["BLOCK_V"]

    assert row(131072) == row(4096) == row(131072, options=True) == (1, 4096)
    assert row(1000) == (1, 2048) and row(300) == (4, 512) and row(20) == (64, 32)
    assert row(21, class_stride=65, inner=65) == (64, 32)


def test_stored_attention_tiles():
    """The largest tile that fills the device, none much longer than the queries; the last for
    scores that need registers."""
    from types import SimpleNamespace

    from tritonops.attention_tile import TILES, stored_tile

    def tile(kind, batch, seq_q, seq_k, multiprocessors=132, **features):
        a = {"MASK": 0, "ALIBI": False, "SOFTCAP": False, "DROPOUT": False, "GROUP": 1, "heads": 16}
        a |= {"query_ptr": SimpleNamespace(shape=(batch,)), "seq_q": seq_q, "seq_k": seq_k}
        return stored_tile(kind, TILES[kind][2, 64], a | features, multiprocessors)

    row = TILES["forward"][2, 64]
    assert tile("forward", 8, 2048, 2048) == row[0]
    assert tile("forward", 8, 2048, 2048, DROPOUT=True) == row[-1]
    assert tile("forward", 8, 2048, 2048, PACKED=True) == row[1]
    assert tile("forward", 1, 256, 2048)[0] == 64
    assert tile("forward", 32, 32, 2048)[0] == 64
    assert tile("key", 8, 2048, 2048) == TILES["key"][2, 64][0]
    assert tile("key", 1, 2048, 512, GROUP=16)[1] == 32
    assert tile("query", 1, 64, 2048)[0] == 16


def test_a_stored_launch():
    """The choice sees positional and named arguments; what it chooses joins the launch."""
    import triton

    from tritonops.launch import Stored

    class Kernel:
        arg_names = ["x_ptr", "n", "FLAG", "BLOCK"]

        def __getitem__(self, grid):
            return lambda *arguments, **named: (grid, arguments, named)

    configs = [triton.Config({"BLOCK": size}, num_warps=2, num_stages=1) for size in (16, 32)]
    kernel = Stored(
        Kernel(), configs, lambda configs, a, FLAG: configs if FLAG else configs[:1],
        lambda configs, a: configs[-1] if a["n"] > 20 else configs[0],
    )  # fmt: skip
    for n, flag, block in ((30, True, 32), (30, False, 16), (10, True, 16)):
        grid, arguments, named = kernel[(5,)]("x", n, FLAG=flag)
        assert grid == (5,) and arguments == ("x", n) and named["FLAG"] is flag
        assert named["BLOCK"] == block and named["num_warps"] == 2
