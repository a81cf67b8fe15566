import ctypes
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

ROOT = Path(__file__).parents[1]

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One rounding of the half types; a few of float32, whose sums are long.
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def small_calls_stay_here(monkeypatch):
    """Shapes so small that `auto` would leave them to torch test fastnn's kernels all the same."""
    monkeypatch.setattr("fastnn.attention._TORCH_UP_TO", 0)
    # The package's name for the module is the function's.
    monkeypatch.setattr(sys.modules["fastnn.linear_act"], "_TORCH_UP_TO", 0)


@pytest.fixture(scope="session", autouse=True)
def interpreted_products_are_torchs():
    """Triton's interpreter takes numpy's products, and what BLAS that brings may sum in an order of
    each shape's own, as with OPENBLAS_CORETYPE=Haswell: a forward's scores and its backward's are
    then further apart than torch's whole error, as on no GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        with _disable_current_modes(), torch.autocast("cpu", enabled=False):
            product = (torch.from_numpy(a.data) @ torch.from_numpy(b.data)).numpy()
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


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


def memcheck(program):
    """Runs a Python program under compute-sanitizer: no access out of bounds."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found")
    run = subprocess.run(
        [sanitizer, "--error-exitcode", "9", sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def host_binary(output, *arguments):
    """Kernels compiled for this machine, on tests/cuda_on_host; skips where that is impossible."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs a C++ compiler with _Float16 on x86-64")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    # GCC would have all libraries of a process share their inline variables and static locals.
    own = [] if "clang" in version else ["-fno-gnu-unique"]
    command = [
        compiler, *own, "-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas",
        "-fsanitize=alignment,signed-integer-overflow,shift,bounds",
        "-fsanitize-undefined-trap-on-error", f"-I{ROOT / 'tests/cuda_on_host'}",
        f"-I{ROOT / 'csrc'}", *arguments, "-o", str(output),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return str(output)


def host_library(folder, *stems):
    """The sources of tests/cuda_on_host as a library."""
    sources = [str(ROOT / f"tests/cuda_on_host/{stem}.cpp") for stem in stems]
    return ctypes.CDLL(host_binary(folder / f"{stems[0]}.so", "-shared", *sources))


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def team(request, tmp_path_factory):
    """So many processes, for tests of what runs on several: see processes.py."""
    from processes import Team

    team = Team(request.param, tmp_path_factory.mktemp("team"))
    # The kernels are the native ones: Triton's interpreter would only be imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        yield team
    team.stop()
