"""The tables agree: operators, fakes, activations, public names."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn
from fastnn import _ops, backend
from fastnn.reference import ACTIVATIONS

ROOT = Path(__file__).parents[1]
BUILT = pytest.mark.skipif(_ops.NATIVE_MISSING is not None, reason=str(_ops.NATIVE_MISSING))


def test_every_op_belongs_to_a_family():
    assert sorted(op for ops in _ops.FAMILIES.values() for op in ops) == sorted(_ops.OPS)


@BUILT
@pytest.mark.parametrize("op", _ops.OPS)
def test_every_op_has_its_kernels(op):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"fastnn::{op}", "CPU")
    if _ops.TRITON_MISSING is None:
        assert has(f"fastnn_triton::{op}", "CUDA")
    for ns in ("fastnn", "fastnn_triton"):
        assert has(f"{ns}::{op}", "Meta")


@BUILT
def test_kernels_are_threaded():
    import fastnn._C

    assert fastnn._C.build_info()["openmp"]


@BUILT
def test_activation_tables_agree():
    import fastnn._C

    from tritonops.activation import ACTIVATIONS as TRITON_ACTIVATIONS

    gated = {name: act.gated for name, act in ACTIVATIONS.items()}
    assert fastnn._C.activations() == gated
    assert {name: act.gated for name, act in TRITON_ACTIVATIONS.items()} == gated


def test_output_suffices_means_what_it_says():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    for name, act in ACTIVATIONS.items():
        if not act.output_suffices:
            continue
        (at_input,) = torch.autograd.grad(act.value(x).sum(), x)
        y = act.value(x).detach().requires_grad_()
        (at_output,) = torch.autograd.grad(act.value(y).sum(), y)
        assert torch.equal(at_input, at_output), name


def test_public_names_exist_and_are_documented():
    for name in fastnn.__all__:
        item = getattr(fastnn, name)
        assert item.__doc__ and len(item.__doc__.split()) > 5, name
    for name in fastnn.functional.__all__:
        doc = getattr(fastnn.functional, name).__doc__
        for section in ("Args:", "Returns:", "Raises:", "Backends:", "Reference:"):
            assert section in doc, f"{name} does not document {section}"


def test_use_backend():
    x = torch.randn(4, 8, dtype=torch.float64)
    w = torch.randn(3, 8, dtype=torch.float64)
    assert fastnn.current_backend() == "auto"
    with fastnn.use_backend("reference"):
        assert fastnn.current_backend() == "reference"
        assert backend.resolve("linear_act", x, activation="relu") is None
    with fastnn.use_backend("triton"), pytest.raises(NotImplementedError) as caught:
        fastnn.linear_act(x, w)
    assert "native: can serve it" in str(caught.value) and "triton: " in str(caught.value)
    assert fastnn.current_backend() == "auto"
    with pytest.raises(ValueError, match="backend must be one of auto, native"), \
            fastnn.use_backend("cuda"):  # fmt: skip
        pass


@BUILT
def test_auto_serves_what_torch_serves():
    x, w = torch.randn(4, 8, dtype=torch.complex64), torch.randn(3, 8, dtype=torch.complex64)
    torch.testing.assert_close(fastnn.linear_act(x, w), torch.nn.functional.linear(x, w))
    with fastnn.use_backend("native"), pytest.raises(NotImplementedError, match="complex64"):
        fastnn.linear_act(x, w)


@pytest.mark.parametrize(
    "variable, value, expected",
    (
        ("FASTNN_DISABLE", "1", "reference"),
        ("FASTNN_BACKEND", "native", "native"),
        ("FASTNN_BACKEND", "fast", "FASTNN_BACKEND must be one of"),
    ),
)
def test_environment(variable, value, expected):
    run = subprocess.run(
        [sys.executable, "-c", "import fastnn; print(fastnn.current_backend())"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), variable: value},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr


def test_import_patches_nothing():
    program = """
import torch
before = {(n, k): id(v) for n, m in (("F", torch.nn.functional), ("nn", torch.nn), ("torch", torch))
          for k, v in vars(m).items()}
import fastnn, fastnn.functional
after = {(n, k): id(v) for n, m in (("F", torch.nn.functional), ("nn", torch.nn), ("torch", torch))
         for k, v in vars(m).items()}
assert all(after[k] == v for k, v in before.items())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
