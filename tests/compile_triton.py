"""Compiles the Triton kernels of one target ahead of time; run by test_triton_compile.py.

usage: python compile_triton.py CAPABILITY MODULE...

A module with kernels offers `aot()` or `AOT`: (kernel, signature, constexprs[, options]). Prints one JSON object
a kernel: its name and constexprs, registers, stack and local bytes, and shared memory.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
OPTIONS = ("num_warps", "num_stages")


def cases(module_name):
    module = import_module(module_name)
    offered = getattr(module, "aot", getattr(module, "AOT", ()))
    return list(offered() if callable(offered) else offered)


def compiled(kernel, signature, constexprs, options, capability):
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    options = {**options, **{name: constexprs[name] for name in OPTIONS if name in constexprs}}
    constexprs = {name: value for name, value in constexprs.items() if name not in OPTIONS}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16")
    }
    types = {name: "constexpr" for name in constexprs}
    types |= {name: kind.partition(":")[0] for name, kind in signature.items()}
    types = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def measured(job):
    module_name, index, capability = job
    kernel, signature, constexprs, *options = cases(module_name)[index]
    result = compiled(kernel, signature, constexprs, options[0] if options else {}, capability)
    named = {name: getattr(value, "__name__", value) for name, value in constexprs.items()}
    return {
        "kernel": f"{module_name}.{result.metadata.name}", "constexprs": named,
        "shared": result.metadata.shared, **usage(result.asm["cubin"]),
    }  # fmt: skip


def main():
    capability, modules = int(sys.argv[1]), sys.argv[2:]
    jobs = [(name, i, capability) for name in modules for i in range(len(cases(name)))]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for row in pool.imap_unordered(measured, jobs):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
