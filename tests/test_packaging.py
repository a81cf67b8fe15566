"""The package as a user gets it: wheel, sdist, an install without the extension, clear refusals."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]


def run(arguments, **environment):
    return subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )


def install(wheel, target):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(target, program, **environment):
    """Runs a program outside the checkout with the installed package first on the path."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=target,
        env=os.environ | {"PYTHONPATH": str(target), "TRITON_INTERPRET": "0"} | environment,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = run([*PIP, "wheel", *OFFLINE, "-w", str(folder), "."], FASTNN_CUDA="0")
    assert built.returncode == 0, built.stderr
    return next(folder.glob("fastnn-*.whl"))


CALL = """
import torch, fastnn
x, w = torch.randn(8, 16), torch.randn(4, 16)
print(fastnn.__file__)
torch.testing.assert_close(fastnn.linear_act(x, w, None, "gelu"),
                           torch.nn.functional.gelu(torch.nn.functional.linear(x, w)))
from fastnn import _ops
print(_ops.NATIVE_MISSING)
"""


def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("fastnn/_C.") for n in names) and "fastnn/py.typed" in names
    assert "tritonops/__init__.py" in names and not any(n.startswith("tests/") for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    target = install(wheel, tmp_path)
    result = python(target, CALL)
    assert result.returncode == 0, result.stderr
    assert str(target) in result.stdout and "None" in result.stdout


def test_wheel_refuses_a_torch_it_was_not_built_for(wheel, tmp_path):
    target = install(wheel, tmp_path)
    (target / "fastnn" / "_built_for.py").write_text('TORCH = "2.10.0"\n')
    result = python(target, "import fastnn")
    assert result.returncode != 0
    running = torch.__version__.split("+")[0]
    assert f"fastnn was built for torch 2.10.0 but torch {running} is installed" in result.stderr


def test_install_without_the_extension(tmp_path):
    built = run([*PIP, "wheel", *OFFLINE, "-w", str(tmp_path), "."], FASTNN_BUILD_EXT="0")
    assert built.returncode == 0, built.stderr
    target = install(next(tmp_path.glob("fastnn-*.whl")), tmp_path / "site")
    assert not list(target.glob("fastnn/_C*"))
    result = python(target, CALL)
    assert result.returncode == 0, result.stderr
    assert "FASTNN_BUILD_EXT=0" in result.stdout


def test_sdist_holds_the_sources(tmp_path):
    built = run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)])
    assert built.returncode == 0, built.stderr
    names = {Path(*Path(n).parts[1:]).as_posix() for n in
             tarfile.open(next(tmp_path.glob("*.tar.gz"))).getnames()}  # fmt: skip
    tracked = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.[ch]*")]
    assert tracked and set(tracked) <= names


@pytest.mark.parametrize(
    "environment, sentence",
    (
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler) was found: install g++"),
        ({"FASTNN_CUDA": "1"}, "FASTNN_CUDA=1, but"),
    ),
)
def test_setup_stops_with_one_sentence(tmp_path, environment, sentence):
    if "FASTNN_CUDA" in environment and torch.version.cuda is not None:
        pytest.skip("torch has CUDA")
    result = run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path)], **environment
    )
    assert result.returncode != 0
    assert sentence in result.stderr and "Traceback" not in result.stderr
