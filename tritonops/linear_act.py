"""Linear + activation: out = residual + dropout(act(x W^T + b)), and dropout alone.

Forward: one GEMM whose epilogue has the fp32 tile in registers. Tiles are visited in groups of
GROUP_M rows so that neighbours share operands in L2; a gated tile holds the gate's and the up
columns' accumulators at once.
Backward: dP = dropout'(g) * act'(saved) by one elementwise kernel that also sums the columns (fixed
row ranges, then one sum over ranges: no atomics), then grad_input = dP W and grad_weight = dP^T x
by the same GEMM kernel. A long reduction over few tiles is split over programs, each with its own
fp32 partial.
Numerics: fp32 accumulation, one rounding at the end. Limits: fp16, bf16, fp32.
"""

import math

import torch
import triton
import triton.language as tl

from tritonops.activation import ACTIVATIONS, identity
from tritonops.launch import (
    INTERPRETED,
    SHARED_SM80,
    aot_case,
    dot,
    dot_precision,
    processors,
    rounded,
    shared_limit,
    stored_or_tuned,
)
from tritonops.philox import dropout_keep, dropout_rate


def refusal(features: dict) -> str | None:
    activation = features.get("activation", "identity")
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} has no Triton function"
    return None


def _gemm_config(m, n, k, stages, warps):
    meta = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return triton.Config(meta, num_stages=stages, num_warps=warps)


# BLOCK_N is halved in the kernel when the activation is gated: two accumulators share the tile.
# In each list, the first that fits is the best guess for a large product.
GEMM_CONFIGS = [
    _gemm_config(128, 256, 64, 3, 8),
    _gemm_config(128, 128, 64, 4, 8),
    _gemm_config(128, 64, 64, 4, 4),
    _gemm_config(64, 128, 64, 4, 4),
    _gemm_config(64, 64, 64, 4, 4),
    _gemm_config(32, 64, 128, 4, 4),
    _gemm_config(16, 64, 128, 4, 4),
]
# Exact fp32 products run outside the tensor cores, where a longer BLOCK_K only costs registers.
GEMM_CONFIGS_FP32 = [
    _gemm_config(128, 128, 16, 3, 8),
    _gemm_config(64, 128, 16, 3, 8),
    _gemm_config(64, 64, 32, 3, 4),
    _gemm_config(32, 32, 32, 3, 4),
]
# What an epilogue needs registers for, next to an activation
_HEAVY = ("residual_ptr", "seed_ptr", "preact_ptr")
# BLOCK_K of every configuration divides it
_K_MULTIPLE = 128
_GEMM_INTERPRETED = _gemm_config(32, 32, 32, 1, 4)


def gemm_configs(itemsize, light, limit):
    """The candidates that fit `limit` bytes of shared memory and, by compiling them, the registers.

    Only a light epilogue (bias alone) leaves room for more than 64 accumulators a thread.
    """
    if INTERPRETED:
        return [_GEMM_INTERPRETED]

    def fits(config):
        meta = config.kwargs
        tiles = (meta["BLOCK_M"] + meta["BLOCK_N"]) * meta["BLOCK_K"] * itemsize
        accumulators = meta["BLOCK_M"] * meta["BLOCK_N"] // (32 * config.num_warps)
        return tiles * config.num_stages <= limit and (light or accumulators <= 64)

    return [c for c in (GEMM_CONFIGS_FP32 if itemsize == 4 else GEMM_CONFIGS) if fits(c)]


def _prune(configs, arguments, VALUE, **_):
    light = VALUE is identity and all(arguments[name] is None for name in _HEAVY)
    allowed = gemm_configs(arguments["x_ptr"].element_size(), light, shared_limit())
    return [config for config in configs if config in allowed]


def stored_config(configs, m, n, splits, gated, multiprocessors):
    """The first whose tiles are not mostly padding and occupy the device, or the most tiles.

    Unmeasured: 128 x 256 x 64 with 8 warps is what Triton's products are at their best with on
    Hopper, and it reads each operand least often; smaller tiles only fill the device.
    """
    short = max(16, triton.next_power_of_2(m))
    useful = [c for c in configs if c.kwargs["BLOCK_M"] <= short] or configs[-1:]

    def tiles(config):
        cols = config.kwargs["BLOCK_N"] // (2 if gated else 1)
        return triton.cdiv(m, config.kwargs["BLOCK_M"]) * triton.cdiv(n, cols) * splits

    full = (config for config in useful if tiles(config) >= multiprocessors)
    return next(full, max(useful, key=tiles))


def _stored(configs, a):
    splits = triton.cdiv(a["K"], max(a["k_per_split"], 1))
    return stored_config(configs, a["M"], a["N"], max(splits, 1), a["GATED"], processors())


@stored_or_tuned(
    GEMM_CONFIGS + GEMM_CONFIGS_FP32, _GEMM_INTERPRETED, ["tuned_rows", "N", "K", "GATED"],
    _prune, _stored,
)  # fmt: skip
@triton.jit(do_not_specialize=["threshold", "tuned_rows"])
def linear_act_forward_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, seed_ptr, out_ptr, preact_ptr, M, N, K,
    x_row, x_col, w_row, w_col, residual_row, residual_col, threshold, scale,
    k_per_split, tuned_rows,
    VALUE: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    COLS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    # Grouped order: GROUP_M tiles down, then one to the right.
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, COLS)
    group = tile // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + in_group % group_rows
    col_start = in_group // group_rows * COLS

    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_start.to(tl.int64) + tl.arange(0, COLS)
    k_start = tl.program_id(1) * k_per_split
    k_end = tl.minimum(K, k_start + k_per_split)
    k = k_start.to(tl.int64) + tl.arange(0, BLOCK_K)
    # Rows and columns past the end wrap around: their products are never stored.
    x_tile = x_ptr + (rows % M)[:, None] * x_row + k[None, :] * x_col
    w_tile = w_ptr + (cols % N)[None, :] * w_row + k[:, None] * w_col
    up_offset = tl.cast(N, tl.int64) * w_row
    acc = tl.zeros((BLOCK_M, COLS), tl.float32)
    if GATED:
        up = tl.zeros((BLOCK_M, COLS), tl.float32)
    for start in range(k_start, k_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile)
            w = tl.load(w_tile)
        else:
            inside = start + tl.arange(0, BLOCK_K) < k_end
            x = tl.load(x_tile, mask=inside[None, :], other=0.0)
            w = tl.load(w_tile, mask=inside[:, None], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        if GATED:
            if EVEN_K:
                w = tl.load(w_tile + up_offset)
            else:
                w = tl.load(w_tile + up_offset, mask=inside[:, None], other=0.0)
            up = dot(x, w, up, PRECISION)
        x_tile += BLOCK_K * x_col
        w_tile += BLOCK_K * w_col

    inside_cols = cols < N
    inside = (rows < M)[:, None] & inside_cols[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=inside_cols, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptr + N + cols, mask=inside_cols, other=0.0).to(tl.float32)[None, :]
    if preact_ptr is not None:
        if GATED:
            saved = preact_ptr + rows[:, None] * (2 * N) + cols[None, :]
            tl.store(saved + N, rounded(up, preact_ptr.dtype.element_ty), mask=inside)
        else:
            saved = preact_ptr + rows[:, None] * N + cols[None, :]
        tl.store(saved, rounded(acc, preact_ptr.dtype.element_ty), mask=inside)
    out = VALUE(acc)
    if GATED:
        out *= up
    if seed_ptr is not None:
        keep = dropout_keep(seed_ptr, threshold, rows, col_start, N, COLS)
        out *= tl.where(keep, scale, 0.0)
    if residual_ptr is not None:
        residual = residual_ptr + rows[:, None] * residual_row + cols[None, :] * residual_col
        out += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    out_ptr += tl.program_id(1).to(tl.int64) * M * N
    place = out_ptr + rows[:, None] * N + cols[None, :]
    tl.store(place, rounded(out, out_ptr.dtype.element_ty), mask=inside)


def _gemm(
    x, w, out, *, bias=None, residual=None, seed=None, preact=None, activation="identity",
    dropout_p=0.0, splits=1, tuned=True,
):  # fmt: skip
    """out (M, N) = epilogue(x (M, K) @ w (N, K)^T); `out` is contiguous, the rest has any strides.

    With splits > 1, out is (splits, M, N), each a partial product, and there is no epilogue.
    Untuned calls may have `residual` as their `out`: the autotuner would add to it again and again.
    """
    (m, k), n = x.shape, out.shape[-1]
    if out.numel() == 0:
        return
    entry = ACTIVATIONS[activation]
    threshold, scale = dropout_rate(dropout_p)
    k_per_split = triton.cdiv(triton.cdiv(k, splits), _K_MULTIPLE) * _K_MULTIPLE

    def grid(meta):
        cols = meta["BLOCK_N"] // 2 if entry.gated else meta["BLOCK_N"]
        return triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, cols), splits

    kernel, fixed = linear_act_forward_kernel, {}
    if not tuned:
        fixed = gemm_configs(x.element_size(), False, shared_limit())[0].all_kwargs()
        kernel = kernel.fn
    kernel[grid](
        x, w, bias, residual, seed if dropout_p else None, out, preact, m, n, k,
        *x.stride(), *w.stride(), *((0, 0) if residual is None else residual.stride()),
        threshold, scale, k_per_split, triton.next_power_of_2(m),
        VALUE=entry.value, GATED=entry.gated, EVEN_K=k % _K_MULTIPLE == 0,
        PRECISION=dot_precision(), **fixed,
    )  # fmt: skip


def matmul(x, w, dtype):
    """x (M, K) @ w (N, K)^T as a fresh `dtype` tensor; any strides."""
    (m, k), n = x.shape, w.shape[0]
    # Few tiles and a long sum leave most of the device idle: give each program a part of the sum.
    # The count depends on the shape alone, so that the bits do not depend on the device.
    tiles = triton.cdiv(m, 128) * triton.cdiv(n, 128)
    splits = max(1, min(128 // tiles if tiles else 1, k // 2048))
    if splits == 1:
        out = x.new_empty((m, n), dtype=dtype)
        _gemm(x, w, out)
        return out
    partials = x.new_empty((splits, m, n), dtype=torch.float32)
    _gemm(x, w, partials, splits=splits)
    return partials.sum(0).to(dtype)


def matmul_add_(total, x, w):
    """total (M, N), contiguous float32, += x (M, K) @ w (N, K)^T."""
    _gemm(x, w, total, residual=total, tuned=False)


def _matrix(tensor):
    """The tensor as (rows, last dimension); copies only where the leading dimensions must."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


@torch.no_grad()
def linear_act_forward(
    input, weight, bias, residual, seed, activation, dropout_p, save_preact, gated
):
    rows, width = input.shape[:-1], weight.shape[0]
    features = width // 2 if gated else width
    out = input.new_empty((*rows, features))
    preact = input.new_empty((*rows, width) if save_preact else (0,))
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = _matrix(residual)
    _gemm(
        _matrix(input), weight, _matrix(out), bias=bias,
        residual=residual, seed=seed, preact=preact if save_preact else None,
        activation=activation, dropout_p=dropout_p,
    )  # fmt: skip
    return out, preact


BACKWARD_BLOCK_M, BACKWARD_BLOCK_N = 32, 128


@triton.jit(do_not_specialize=["threshold"])
def linear_act_backward_kernel(
    grad_ptr, saved_ptr, seed_ptr, grad_preact_ptr, sums_ptr, M, N, grad_row, grad_col,
    saved_row, saved_col, threshold, scale, rows_per_program,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    col_start = tl.program_id(0) * BLOCK_N
    cols = col_start.to(tl.int64) + tl.arange(0, BLOCK_N)
    inside_cols = cols < N
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    width = tl.cast(2 * N if GATED else N, tl.int64)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    up_sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, tl.minimum(M, first + rows_per_program), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & inside_cols[None, :]
        place = grad_ptr + rows[:, None] * grad_row + cols[None, :] * grad_col
        grad = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, threshold, rows, col_start, N, BLOCK_N)
            grad *= tl.where(keep, scale, 0.0)
        if saved_ptr is not None:
            place = saved_ptr + rows[:, None] * saved_row + cols[None, :] * saved_col
            saved = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(place + tl.cast(N, tl.int64) * saved_col, mask=inside, other=0.0)
            grad_up = tl.where(inside, grad * VALUE(saved), 0.0)
            up_sums += tl.sum(grad_up, 0)
            grad *= up.to(tl.float32)
        if saved_ptr is not None:
            grad *= DERIVATIVE(saved)
        grad = tl.where(inside, grad, 0.0)
        sums += tl.sum(grad, 0)
        if grad_preact_ptr is not None:
            dtype = grad_preact_ptr.dtype.element_ty
            place = grad_preact_ptr + rows[:, None] * width + cols[None, :]
            tl.store(place, rounded(grad, dtype), mask=inside)
            if GATED:
                tl.store(place + N, rounded(grad_up, dtype), mask=inside)
    if sums_ptr is not None:
        place = sums_ptr + tl.program_id(1) * width + cols
        tl.store(place, sums, mask=inside_cols)
        if GATED:
            tl.store(place + N, up_sums, mask=inside_cols)


def _grad_preact(grad, saved, seed, activation, dropout_p, write, sum_columns):
    """dP (M, width) in grad's dtype if `write`, and its column sums in float32 if wanted."""
    entry = ACTIVATIONS[activation]
    m, n = grad.shape
    width = 2 * n if entry.gated else n
    grad_preact = grad.new_empty((m, width)) if write else None
    if m == 0 or n == 0:
        return grad_preact, grad.new_zeros((width,), dtype=torch.float32)
    tiles_n, tiles_m = triton.cdiv(n, BACKWARD_BLOCK_N), triton.cdiv(m, BACKWARD_BLOCK_M)
    rows_per_program = triton.cdiv(tiles_m, max(1, 2048 // tiles_n)) * BACKWARD_BLOCK_M
    programs = triton.cdiv(m, rows_per_program)
    sums = grad.new_empty((programs, width), dtype=torch.float32) if sum_columns else None
    if entry.value is identity:
        saved = None
    else:
        saved = _matrix(saved)
    threshold, scale = dropout_rate(dropout_p)
    linear_act_backward_kernel[(tiles_n, programs)](
        grad, saved, seed if dropout_p else None, grad_preact, sums, m, n, *grad.stride(),
        *((0, 0) if saved is None else saved.stride()), threshold, scale, rows_per_program,
        VALUE=entry.value, DERIVATIVE=entry.derivative, GATED=entry.gated,
        BLOCK_M=BACKWARD_BLOCK_M, BLOCK_N=BACKWARD_BLOCK_N, num_warps=4,
    )  # fmt: skip
    return grad_preact, sums.sum(0) if sum_columns else None


def column_sums(matrix):
    """Float32 sums over the rows of a matrix, in an order that depends on its shape alone."""
    return _grad_preact(matrix, None, None, "identity", 0.0, write=False, sum_columns=True)[1]


@torch.no_grad()
def linear_act_backward(
    grad_out, input, weight, saved, seed, activation, dropout_p, gated, output_mask
):
    wants_input, wants_weight, wants_bias = output_mask
    grad, x = _matrix(grad_out), _matrix(input)
    plain = activation == "identity" and not dropout_p
    write = (wants_input or wants_weight) and not plain
    grad_preact, sums = None, None
    if write or wants_bias:
        grad_preact, sums = _grad_preact(
            grad, saved, seed, activation, dropout_p, write, sum_columns=wants_bias
        )
    if plain:
        grad_preact = grad
    grad_input, grad_weight, grad_bias = (input.new_empty((0,)) for _ in range(3))
    if wants_input:
        grad_input = matmul(grad_preact, weight.t(), input.dtype).view(input.shape)
    if wants_weight:
        grad_weight = matmul(grad_preact.t(), x.t(), weight.dtype)
    if wants_bias:
        grad_bias = sums.to(weight.dtype)
    return grad_input, grad_weight, grad_bias


@triton.jit(do_not_specialize=["threshold"])
def dropout_kernel(
    x_ptr, seed_ptr, out_ptr, M, N, x_row, x_col, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    col_start = tl.program_id(0) % tiles_n * BLOCK_N
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_start.to(tl.int64) + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    place = x_ptr + rows[:, None] * x_row + cols[None, :] * x_col
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    keep = dropout_keep(seed_ptr, threshold, rows, col_start, N, BLOCK_N)
    out = x * tl.where(keep, scale, 0.0)
    place = out_ptr + rows[:, None] * N + cols[None, :]
    tl.store(place, rounded(out, out_ptr.dtype.element_ty), mask=inside)


DROPOUT_TILE = 2048


@torch.no_grad()
def dropout(input, seed, p):
    out = input.new_empty(input.shape)
    if out.numel() == 0:
        return out
    x = _matrix(input) if input.dim() else input.reshape(1, 1)
    n = x.shape[1]
    block_n = min(max(triton.next_power_of_2(n), 8), 512)
    block_m = DROPOUT_TILE // block_n
    threshold, scale = dropout_rate(p)
    tiles = triton.cdiv(x.shape[0], block_m) * triton.cdiv(n, block_n)
    dropout_kernel[(tiles,)](
        x, seed, out, x.shape[0], n, *x.stride(), threshold, scale,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


def aot():
    """Launches to compile ahead of time: the largest and the smallest tile of each kind."""
    everything = ("x_ptr", "w_ptr", "bias_ptr", "residual_ptr", "out_ptr", "preact_ptr")
    ones = dict.fromkeys(("x_col", "w_col", "residual_col"), 1)
    for dtype, itemsize, activation, given, index, even in (
        ("bf16", 2, "identity", ("x_ptr", "w_ptr", "bias_ptr", "out_ptr"), 0, True),
        ("bf16", 2, "gelu", everything, 0, True),
        ("bf16", 2, "gelu_tanh", everything, -1, False),
        ("fp16", 2, "geglu", everything, 0, True),
        ("fp32", 4, "tanh", everything, 0, True),
    ):
        entry, light = ACTIVATIONS[activation], activation == "identity"
        pointers = dict.fromkeys(given, f"*{dtype}")
        if not light:
            pointers["seed_ptr"] = "*i64"
        switches = {
            "VALUE": entry.value, "GATED": entry.gated, "EVEN_K": even, "PRECISION": "ieee",
        }  # fmt: skip
        config = gemm_configs(itemsize, light, SHARED_SM80)[index]
        yield aot_case(
            linear_act_forward_kernel, pointers, {**ones, **switches}, config, aligned=even
        )
    tile = triton.Config({"BLOCK_M": BACKWARD_BLOCK_M, "BLOCK_N": BACKWARD_BLOCK_N}, num_warps=4)
    ones = dict.fromkeys(("grad_col", "saved_col"), 1)
    for activation in ("gelu", "geglu"):
        entry = ACTIVATIONS[activation]
        pointers = dict.fromkeys(("grad_ptr", "saved_ptr", "grad_preact_ptr"), "*bf16")
        pointers |= {"seed_ptr": "*i64", "sums_ptr": "*fp32"}
        switches = {"VALUE": entry.value, "DERIVATIVE": entry.derivative, "GATED": entry.gated}
        yield aot_case(linear_act_backward_kernel, pointers, {**ones, **switches}, tile)
    tile = triton.Config({"BLOCK_M": DROPOUT_TILE // 512, "BLOCK_N": 512}, num_warps=4)
    pointers = {"x_ptr": "*bf16", "seed_ptr": "*i64", "out_ptr": "*bf16"}
    yield aot_case(dropout_kernel, pointers, {"x_col": 1}, tile)
