"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, spills nothing, and fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
MODULES = ("linear_act", "cross_entropy", "linear_cross_entropy", "attention")
# Shared memory that one block may use (opt-in)
LIMITS = {80: 166912, 90: 232448, 100: 232448}


def jit_kernels(module):
    """The names of the launchable kernels in a module's source: what `aot()` must cover."""
    source = (HERE.parent / "tritonops" / f"{module}.py").read_text()
    return {
        line.split("(")[0].removeprefix("def ")
        for line in source.splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_compiles_for(capability):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    modules = [f"tritonops.{name}" for name in MODULES]
    command = [sys.executable, str(HERE / "compile_triton.py"), str(capability), *modules]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    failures = [
        row
        for row in rows
        if row["stack"] or row["local"] or row["shared"] > LIMITS[capability]
    ]
    assert not failures, "spills, or too much shared memory:\n" + "\n".join(map(str, failures))
    seen = {row["kernel"].rpartition(".")[2] for row in rows}
    for module in MODULES:
        missing = jit_kernels(module) - seen
        assert not missing, f"tritonops.{module}.aot() leaves out {missing}"
