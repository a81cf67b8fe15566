"""The CUDA kernels compile for every target without spills; no device is needed."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastnn import _ops

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))
TARGETS = ("80", "90a", "100")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What ptxas says of each (source, target); they compile side by side."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: the CUDA kernels are not compiled here")
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(case):
        source, target = case
        return subprocess.run(
            [
                nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", "-cubin",
                f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v", "-Werror",
                "all-warnings", str(CSRC / "cuda" / source), "-o", f"{folder}/{source}.{target}",
            ],
            capture_output=True, text=True,
        )  # fmt: skip

    cases = [(source, target) for source in SOURCES for target in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(compile_one, cases), strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(reports, source, target):
    report = reports[source, target]
    assert report.returncode == 0, report.stderr
    kernels = list(KERNEL.finditer(report.stderr))
    assert len(kernels) == report.stderr.count("Compiling entry function") > 0
    spilled = [
        kernel[0] for kernel in kernels if any(int(kernel[k]) for k in ("stack", "stores", "loads"))
    ]
    assert not spilled, "\n".join(spilled)
    assert all(kernel["target"] == f"sm_{target}" for kernel in kernels)


@pytest.fixture(scope="module")
def listing(reports):
    """The machine code of a Hopper source: {kernel: its instructions}."""
    triton = importlib.util.find_spec("triton")
    tools = "" if triton is None else str(Path(triton.origin).parent / "backends/nvidia/bin")
    disassembler = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=tools)
    if disassembler is None:
        pytest.skip("cuobjdump was not found")

    def disassemble(source):
        cubin = reports[source, "90a"].args[-1]
        sass = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True).stdout
        _, *rest = re.split(r"Function : (\w+)", sass)
        return dict(zip(rest[::2], rest[1::2], strict=True))

    return disassemble


HOPPER = {
    "linear_act_sm90.cu": ("HGMMA.64x256x16", "UTMALDG.3D"),
    "attention_sm90.cu": ("HGMMA.64x", "UTMALDG.4D", "UTMASTG.4D", "STSM"),
    "attention_backward_sm90.cu": ("HGMMA.64x", "UTMALDG.4D", "UTMASTG.4D", "STSM"),
}


@pytest.mark.parametrize("source", HOPPER)
def test_hopper_kernels_have_hoppers_instructions(reports, listing, source):
    """wgmma (HGMMA), the copy engine (UTMALDG, UTMASTG), registers that change hands; and no
    product that the compiler makes the next one wait for."""
    assert "wgmma" not in reports[source, "90a"].stderr, reports[source, "90a"].stderr
    for name, code in listing(source).items():
        for instruction in (*HOPPER[source], "USETMAXREG"):
            assert instruction in code, (name, instruction)


def test_hopper_products_leave_by_the_copy_engine(listing):
    """Half types stored, floats added; evaluation's statistics leave by themselves."""
    kernels = listing("linear_act_sm90.cu").values()
    for instructions in (("STSM", "UTMASTG.3D"), ("UTMAREDG.3D",)):
        assert any(all(i in code for i in instructions) for code in kernels), instructions


@pytest.mark.parametrize("source", [name for name in HOPPER if name.startswith("attention")])
def test_exponentials_overlap_products(listing, source):
    """The kernel's loop: they lie between the wait for the scores and that for the other product,
    from where the compiler likes to move them behind both."""
    for name, code in listing(source).items():
        events = re.findall(r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]", code)
        line = "".join({"H": "g", "M": "e"}.get(event[0], event[-1]) for event in events)
        assert re.search(r"g1e{16,}0", line) or re.search(r"g1e{16,}g+0", line), (name, line)


def test_sources_are_found():
    assert {"cross_entropy.cu", "linear_act_sm90.cu", "attention.cu"} <= set(SOURCES)


def sources_of(*patterns):
    return [path for pattern in patterns for path in sorted((CSRC / "cuda").rglob(pattern))]


def test_inline_ptx_is_in_prim_only():
    ptx = re.compile(r"\basm\b")
    using = [
        path for path in sources_of("*.cu", "*.cuh", "*.h", "*.cpp") if ptx.search(path.read_text())
    ]
    assert using, "the pattern finds nothing"
    assert {path.parent.name for path in using} == {"prim"}


def test_kernels_need_no_torch_headers():
    header = re.compile(r'#include [<"](ATen|c10|torch)/')
    headers = [path for path in sources_of("*.h") if not path.stem.endswith("binding")]
    kernels = sources_of("*.cu", "*.cuh") + headers
    assert [path for path in kernels if header.search(path.read_text())] == []
    assert any(header.search(path.read_text()) for path in sources_of("*_binding.cpp"))


def test_cuda_build_registers_its_kernels():
    if _ops.NATIVE_MISSING is not None:
        pytest.skip(_ops.NATIVE_MISSING)
    import fastnn._C

    if fastnn._C.build_info()["cuda"] is None:
        pytest.skip("fastnn._C was built without CUDA")
    assert torch.version.cuda.split(".")[0] == fastnn._C.build_info()["cuda"].split(".")[0]
    for ops in _ops.FAMILIES.values():
        for op in ops:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{op}", "CUDA"), op
