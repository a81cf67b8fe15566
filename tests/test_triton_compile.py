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
