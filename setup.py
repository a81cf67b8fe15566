"""Builds fastnn._C from csrc/: the CPU kernels always, the CUDA kernels where torch and nvcc allow.

FASTNN_BUILD_EXT=0    no extension: calls are served by Triton or by plain PyTorch
FASTNN_CUDA=0|1       without / with the CUDA kernels (default: with them if torch has CUDA and nvcc
                      is found); TORCH_CUDA_ARCH_LIST chooses their targets
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
TORCH_SUPPORTED = ("2.11", "2.12", "2.13")
CAPABILITIES = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip


def stop(sentence):
    raise SystemExit(f"fastnn: {sentence}")


def find_cuda_home():
    """The toolkit's root; nvcc itself is asked, as the one on the PATH may be a wrapper script."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("/usr/local/cuda")
    dryrun = subprocess.run(
        [nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"TOP=(\S+)", dryrun.stderr)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def ask_nvcc(option):
    nvcc = str(find_cuda_home() / "bin" / "nvcc")
    return subprocess.run([nvcc, option], capture_output=True, text=True).stdout


def wants_cuda(torch):
    choice = os.environ.get("FASTNN_CUDA")
    if choice == "0":
        return False
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is a build without CUDA"
    elif not (find_cuda_home() / "bin" / "nvcc").exists():
        missing = "nvcc was not found: put it on the PATH or set CUDA_HOME"
    else:
        # Two runtimes of different major versions in one process do not share their state.
        toolkit = re.search(r"release (\d+)", ask_nvcc("--version"))
        if toolkit and toolkit[1] == torch.version.cuda.split(".")[0]:
            return True
        missing = f"nvcc is not of CUDA {torch.version.cuda}, which torch was built for"
    if choice == "1":
        stop(f"FASTNN_CUDA=1, but {missing}")
    if torch.version.cuda is not None:
        print(f"fastnn: building without the CUDA kernels: {missing}", file=sys.stderr)
    return False


def ninja_file(torch, build_dir, output):
    """Our own build.ninja: torch's BuildExtension has no flags per file, and csrc/cpu is compiled
    once per instruction set. The baseline objects come first, so that inline functions that several
    objects share are taken from the smallest instruction set."""
    import pybind11
    from torch.utils import cpp_extension

    def objects_of(sources, rule, tag="", **variables):
        lines = []
        for source in sources:
            path = Path(source)
            target = build_dir / f"{path.parent.name}-{path.stem}{tag}.o"
            lines.append(f"build {target}: {rule} {ROOT / path}")
            lines += [f"  {key} = {value}" for key, value in variables.items()]
            objects.append(str(target))
        return lines

    objects = []
    includes = [
        *cpp_extension.include_paths(),
        sysconfig.get_paths()["include"],
        pybind11.get_include(),
        ROOT / "csrc",
    ]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    common = f"-std=c++20 -O3 -fopenmp -fPIC -fvisibility=hidden -DNDEBUG {abi}"
    # gcc 12 finds its own AVX-512 intrinsics uninitialized.
    warnings = (
        "-Wall -Wno-sign-compare -Wno-unknown-pragmas -Wno-psabi"
        " -Wno-uninitialized -Wno-maybe-uninitialized"
    )
    libraries = ["c10", "torch_cpu", "torch", "torch_python"]
    link_flags = [f"-L{path}" for path in cpp_extension.library_paths()]
    cuda = wants_cuda(torch)
    if cuda:
        home = find_cuda_home()
        wheel = Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
        # The toolkit's own headers first; the wheels' for libraries that it lacks.
        includes += [home / "include", wheel / "include"]
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
        link_flags += [f"-L{home}/lib64", f"-L{home}/lib", f"-L{wheel}/lib"]
        common += f" -DFASTNN_CUDA={torch.version.cuda}"
    include_flags = " ".join(f"-I{path}" for path in includes)
    lines = [
        f"builddir = {build_dir}",
        f"cflags = {common} -fno-math-errno -fno-trapping-math {warnings} {include_flags}",
        "rule cxx",
        f"  command = {os.environ.get('CXX', 'c++')} -MMD -MF $out.d $cflags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'c++')} -shared -fopenmp $in -o $out $libs",
    ]
    lines += objects_of(sorted(glob("csrc/*.cpp", root_dir=ROOT)), "cxx")
    cpu_sources = sorted(glob("csrc/cpu/*.cpp", root_dir=ROOT))
    if platform.machine() in ("x86_64", "AMD64"):
        for name, flags in CAPABILITIES.items():
            flags = f"{' '.join(flags)} -DCPU_CAPABILITY={name} -DCPU_CAPABILITY_{name}"
            lines += objects_of(cpu_sources, "cxx", f"-{name}", flags=flags)
    else:
        flags = "-DCPU_CAPABILITY=DEFAULT -DCPU_CAPABILITY_DEFAULT"
        lines += objects_of(cpu_sources, "cxx", flags=flags)
    if cuda:
        lines += [
            "rule nvcc",
            f"  command = {home}/bin/nvcc -MMD -MF $out.d $nvcc_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "nvcc_flags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
            f" --expt-relaxed-constexpr {architecture_flags()} -I{ROOT / 'csrc'}",
        ]
        lines += objects_of(sorted(glob("csrc/cuda/*.cpp", root_dir=ROOT)), "cxx")
        lines += objects_of(sorted(glob("csrc/cuda/*.cu", root_dir=ROOT)), "nvcc", "-cu")
    libs = " ".join(link_flags + [f"-l{name}" for name in libraries])
    lines += [f"build {output}: link {' '.join(objects)}", f"  libs = {libs}"]
    return "\n".join(lines) + "\n"


def architecture_flags():
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        # A toolkit before 12.8 does not know Blackwell.
        known = "compute_100" in ask_nvcc("--list-gpu-arch")
        listed = (ARCHITECTURES if known else "8.0;9.0a;9.0+PTX").split(";")
    flags = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST must list numbers such as {ARCHITECTURES}, got {entry!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def commands():
    from setuptools.command.build_ext import build_ext

    class NinjaBuild(build_ext):
        """Runs ninja over csrc/, and records the torch that the extension was built for."""

        def build_extension(self, ext):
            import torch

            version = torch.__version__.split("+")[0]
            if not version.startswith(tuple(f"{v}." for v in TORCH_SUPPORTED)):
                stop(
                    f"torch {' to '.join((TORCH_SUPPORTED[0], TORCH_SUPPORTED[-1]))} is supported,"
                    f" but torch {version} is installed: pip install torch==2.13.0"
                )
            compiler = os.environ.get("CXX", "c++")
            if shutil.which(compiler) is None:
                stop(
                    f"no C++ compiler ({compiler}) was found: install g++ 11 or later,"
                    " or set FASTNN_BUILD_EXT=0"
                )
            # Not build_temp, which pip makes anew for every editable install.
            name = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
            build_dir = ROOT / "build" / name
            build_dir.mkdir(parents=True, exist_ok=True)
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            (build_dir / "build.ninja").write_text(ninja_file(torch, build_dir, output))
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            build = subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir), *jobs])
            if build.returncode:
                stop("the C++ extension did not compile: the compiler's message is above")
            record = f'"""Written by setup.py."""\n\nTORCH = "{version}"\n'
            (output.parent / "_built_for.py").write_text(record)

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            shutil.copy(Path(self.build_lib, "fastnn", "_built_for.py"), ROOT / "fastnn")

    return {"build_ext": NinjaBuild}


if sys.version_info < (3, 10):  # noqa: UP036  (pip may not have looked)
    stop(f"Python 3.10 or later is needed, this is {platform.python_version()}")
if os.environ.get("FASTNN_BUILD_EXT") == "0":
    setup()
else:
    setup(ext_modules=[Extension("fastnn._C", sources=[])], cmdclass=commands())
