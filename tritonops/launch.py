"""What kernels and launchers share: the interpreter, the tuner's candidates, dot, rounding."""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

# Shared memory one block may use on the smallest target, sm_80 (opt-in limit).
SHARED_SM80 = 166912


def configurations(on_gpu, interpreted):
    """Candidates for the autotuner; the interpreter takes a single one and measures nothing."""
    return [interpreted] if INTERPRETED else on_gpu


class Stored:
    """A kernel that is launched with the configuration its module has stored for such a call."""

    def __init__(self, kernel, configs, allowed, choose):
        self.fn, self.configs = kernel, configs
        self._allowed, self._choose = allowed, choose

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            every = {**dict(zip(self.fn.arg_names, arguments, strict=False)), **named}
            config = self._choose(self._allowed(self.configs, every, **named), every)
            return self.fn[grid](*arguments, **named, **config.all_kwargs())

        return launch


def stored_or_tuned(configs, interpreted, key, allowed, choose):
    """Decorates a kernel: choose(allowed(configs, arguments), arguments) is its configuration.

    FASTNN_TRITON_TUNE=1 measures the allowed ones instead, at the first call of each `key`.
    """

    def decorate(kernel):
        if INTERPRETED or os.environ.get("FASTNN_TRITON_TUNE") == "1":
            return triton.autotune(
                configurations(configs, interpreted), key=key,
                prune_configs_by={"early_config_prune": allowed},
            )(kernel)  # fmt: skip
        return Stored(kernel, configs, allowed, choose)

    return decorate


def _device_property(name):
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())[name]


def shared_limit() -> int:
    """Shared memory in bytes that one block may use on the current device."""
    return SHARED_SM80 if INTERPRETED else _device_property("max_shared_mem")


def processors() -> int:
    """Multiprocessors of the current device."""
    return 8 if INTERPRETED else _device_property("multiprocessor_count")


def dot_precision() -> str:
    """`input_precision` of tl.dot: fp32 products are exact unless torch's own may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in fp32."""
    # The interpreter multiplies bfloat16 blocks as the 16-bit integers it stores them in.
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """A fp32 block in DTYPE, rounded to nearest even."""
    # The interpreter cuts bfloat16 off: hand it values that need no rounding.
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


_FLOATS = ("scale", "smoothing", "z_loss", "softcap")


def aot_case(kernel, pointers, constexprs, config, aligned=True):
    """A launch to compile ahead of time: (kernel, signature, constexprs, options).

    Pointers that are not named are None, floats are known by name, and every other argument is an
    int32, a multiple of 16 if `aligned` (":16" in the signature, as Triton's own tools write it).
    """
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    constexprs = {**constexprs, **config.kwargs}
    suffix = ":16" if aligned else ""
    signature = {}
    for name in kernel.arg_names:
        if name in pointers:
            signature[name] = pointers[name] + suffix
        elif name.endswith("_ptr"):
            constexprs[name] = None
        elif name not in constexprs:
            signature[name] = "fp32" if name in _FLOATS else "i32" + suffix
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return kernel, signature, constexprs, options
