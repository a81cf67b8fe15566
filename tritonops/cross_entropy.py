"""Softmax cross-entropy from logits: loss, lse and their gradient.

  z = softcap(logits),  lse = log sum_c exp z_c
  loss = (1 - s) w_y (lse - z_y) + s / C sum_c w_c (lse - z_c) + z_loss lse^2
  grad_c = g [(a + g_lse / g) p_c - (1 - s) w_y 1[c = y] - s / C w_c] softcap'(logits_c)
Milakov & Gimelshein 2018, algorithm 3 (online softmax). Logits are seen as (outer, class, inner)
with any strides, so that (N, C, d1, ...) is read where it lies. A program takes BLOCK_R rows of one
outer index and walks the classes BLOCK_V at a time: the maximum is a row's, the sum a lane's until
the end. Losses are summed by fixed ranges: no atomics.
Numerics: fp32, differences taken before sums so that a common offset of the logits cancels exactly.
A label outside [0, C) gives a NaN loss and NaN gradients.
"""

import math

import torch
import triton
import triton.language as tl

from tritonops.activation import tanh, tanh_derivative
from tritonops.launch import aot_case, configurations, rounded, stored_or_tuned


def refusal(features: dict) -> str | None:
    if features.get("prob_target"):
        return "probability targets are not supported by the Triton kernels"
    return None


@triton.jit
def capped(x, mask, softcap, SOFTCAP: tl.constexpr):
    """The logits as the softmax sees them: after the cap, -inf where masked."""
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    # After the cap, which would give the masked lanes a finite value.
    return tl.where(mask, x, -float("inf"))


@triton.jit
def load_target(
    target_ptr, weight_ptr, row, inside, classes, ignore_index, HAS_WEIGHT: tl.constexpr
):
    """(label, its weight, counted, valid) of a block of rows; the label is 0 unless valid."""
    label = tl.load(target_ptr + row, mask=inside, other=0).to(tl.int64)
    counted = inside & (label != ignore_index)
    valid = counted & (label >= 0) & (label < classes)
    label = tl.where(valid, label, 0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + label, mask=valid, other=0.0).to(tl.float32)
    else:
        weight = tl.where(counted, 1.0, 0.0)
    return label, weight, counted, valid


@triton.jit
def row_softmax(
    base, inside, label, valid, classes, class_stride, weight_ptr, softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Per row: lse, lse - z_y, sum_c w_c (pivot - z_c), lse - pivot.

    The pivot is z_y (0 where that is not finite): the smoothing sum is taken around it because
    sum(w) lse - sum(w z) would cancel when the logits share a large offset.
    """
    picked = tl.load(base + label * class_stride, mask=valid, other=0.0).to(tl.float32)
    picked = capped(picked, valid, softcap, SOFTCAP)
    pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0)
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    lanes = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    spread_lanes = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, classes, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = inside[:, None] & (cols < classes)[None, :]
        place = base[:, None] + cols.to(tl.int64)[None, :] * class_stride
        z = capped(tl.load(place, mask=mask, other=0.0).to(tl.float32), mask, softcap, SOFTCAP)
        new_top = tl.maximum(top, tl.max(z, 1))
        # Nothing can be subtracted from an infinite maximum: inf - inf would be NaN.
        shift = tl.where(tl.abs(new_top) == float("inf"), 0.0, new_top)
        rescale = tl.where(top == new_top, 1.0, tl.exp(top - new_top))
        lanes = lanes * rescale[:, None] + tl.exp(z - shift[:, None])
        top = new_top
        if SMOOTHING:
            distance = pivot[:, None] - z
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0)
                distance *= weight.to(tl.float32)[None, :]
            spread_lanes += tl.where(mask, distance, 0.0)
    infinite = tl.abs(top) == float("inf")
    shift = tl.where(infinite, 0.0, top)
    # A NaN logit may be lost in the maximum but not in the sum.
    log_sum = tl.log(tl.sum(lanes, 1))
    nll = tl.where(infinite, float("nan"), log_sum + (shift - picked))
    return log_sum + shift, nll, tl.sum(spread_lanes, 1), log_sum + (shift - pivot)


@triton.jit
def row_loss(
    lse, nll, spread, lse_over_pivot, weight, counted, valid, classes, weight_sum_ptr, smoothing,
    z_loss, SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    loss = weight * nll
    if SMOOTHING:
        weight_sum = tl.load(weight_sum_ptr) if HAS_WEIGHT else tl.cast(classes, tl.float32)
        smooth = spread + weight_sum * lse_over_pivot
        loss = (1.0 - smoothing) * loss + smoothing / classes * smooth
    loss += z_loss * lse * lse
    loss = tl.where(valid, loss, float("nan"))
    return tl.where(counted, loss, 0.0)


@triton.jit
def row_gradient_scales(
    lse, grad, grad_lse, weight, counted, valid, classes, weight_sum_ptr, smoothing, z_loss,
    SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Factors of p_c, of 1[c = y] and of w_c (to be subtracted) in the gradient of a row."""
    grad = tl.where(counted, grad, 0.0)
    at_label = grad * weight
    at_p = at_label
    everywhere = tl.zeros_like(grad)
    if SMOOTHING:
        weight_sum = tl.load(weight_sum_ptr) if HAS_WEIGHT else tl.cast(classes, tl.float32)
        at_label *= 1.0 - smoothing
        everywhere = grad * (smoothing / classes)
        at_p = at_label + everywhere * weight_sum
    at_p += grad * (2.0 * z_loss) * tl.where(counted, lse, 0.0)
    # An infinite lse is a NaN loss, as in torch.
    failed = (valid == 0) | (tl.abs(lse) == float("inf"))
    at_p = tl.where(counted & failed, float("nan"), at_p) + grad_lse
    return at_p, at_label, everywhere


@triton.jit
def tile_gradient(
    x, mask, cols, label, lse, at_p, at_label, everywhere, weight_ptr, classes, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits x, 0 where masked."""
    x = x.to(tl.float32)
    z = capped(x, mask, softcap, SOFTCAP)
    gradient = at_p[:, None] * tl.exp(z - lse[:, None])
    gradient -= tl.where(cols[None, :] == label[:, None], at_label[:, None], 0.0)
    if SMOOTHING:
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=cols < classes, other=0.0)
            gradient -= everywhere[:, None] * weight.to(tl.float32)[None, :]
        else:
            gradient -= everywhere[:, None]
    if SOFTCAP:
        gradient *= tanh_derivative(x / softcap)
    return tl.where(mask, gradient, 0.0)


def _row_config(block_r, block_v, warps):
    return triton.Config({"BLOCK_R": block_r, "BLOCK_V": block_v}, num_warps=warps)


def _elements(config):
    """Elements of a tile that each thread holds; beyond 16 only the plain loss fits registers."""
    return config.kwargs["BLOCK_R"] * config.kwargs["BLOCK_V"] // (32 * config.num_warps)


ROW_CONFIGS = [
    _row_config(1, 2048, 4),
    _row_config(1, 4096, 8),
    _row_config(1, 8192, 8),
    _row_config(1, 8192, 16),
    _row_config(4, 512, 4),
    _row_config(16, 128, 4),
    _row_config(64, 32, 4),
    _row_config(128, 16, 4),
]
_ROW_INTERPRETED = _row_config(4, 64, 4)


def _prune(configs, arguments, SMOOTHING, SOFTCAP, **_):
    """Tall tiles for rows that lie side by side, tiles about as wide as the classes otherwise."""
    if SMOOTHING or SOFTCAP:
        configs = [c for c in configs if _elements(c) <= 16]
    if arguments["class_stride"] != 1 and arguments["inner"] > 1:
        return [c for c in configs if c.kwargs["BLOCK_R"] >= 16] or configs
    width = min(max(triton.next_power_of_2(arguments["classes"]), 16), 2048)
    near = [c for c in configs if width <= c.kwargs["BLOCK_V"] <= 8 * width]
    return [c for c in near if c.kwargs["BLOCK_R"] == 1 or width < 2048] or configs


def stored_config(configs, arguments):
    """Tall tiles: 32 classes. Wide ones: the narrowest that hold a row, up to 4096 classes.

    Unmeasured: 8 programs of 4096 classes have 64 KB of 16-bit logits under way in a
    multiprocessor, which fills the memory system.
    """
    if all(config.kwargs["BLOCK_R"] >= 16 for config in configs):
        wanted = 32
    else:
        wanted = min(arguments["classes"], 4096)
    by_width = sorted(configs, key=lambda config: config.kwargs["BLOCK_V"])
    return next((c for c in by_width if c.kwargs["BLOCK_V"] >= wanted), by_width[-1])


_configured = stored_or_tuned(
    ROW_CONFIGS, _ROW_INTERPRETED, ["classes", "class_stride", "SMOOTHING", "SOFTCAP"], _prune,
    stored_config,
)  # fmt: skip


@_configured
@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, loss_ptr, lse_ptr, row_weight_ptr,
    classes, inner, outer_stride, class_stride, inner_stride, ignore_index, smoothing, z_loss,
    softcap, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(inner, BLOCK_R)
    outer_index = (tl.program_id(0) // blocks).to(tl.int64)
    inner_index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = inner_index < inner
    row = outer_index * inner + inner_index
    base = logits_ptr + outer_index * outer_stride + inner_index * inner_stride
    label, weight, counted, valid = load_target(
        target_ptr, weight_ptr, row, inside, classes, ignore_index, HAS_WEIGHT
    )
    lse, nll, spread, lse_over_pivot = row_softmax(
        base, inside, label, valid, classes, class_stride, weight_ptr, softcap,
        SOFTCAP, SMOOTHING, HAS_WEIGHT, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    loss = row_loss(
        lse, nll, spread, lse_over_pivot, weight, counted, valid, classes, weight_sum_ptr,
        smoothing, z_loss, SMOOTHING, HAS_WEIGHT,
    )  # fmt: skip
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(row_weight_ptr + row, weight, mask=inside)


@_configured
@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward_kernel(
    grad_loss_ptr, grad_lse_ptr, logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr,
    total_ptr, grad_ptr, classes, inner, outer_stride, class_stride, inner_stride,
    grad_outer_stride, grad_class_stride, grad_inner_stride, grad_loss_stride,
    ignore_index, smoothing, z_loss, softcap, MEAN: tl.constexpr, SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(classes, BLOCK_V)
    blocks = tl.cdiv(inner, BLOCK_R)
    block = tl.program_id(0) // tiles
    outer_index = (block // blocks).to(tl.int64)
    inner_index = (block % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = inner_index < inner
    row = outer_index * inner + inner_index
    label, weight, counted, valid = load_target(
        target_ptr, weight_ptr, row, inside, classes, ignore_index, HAS_WEIGHT
    )
    grad = tl.load(grad_loss_ptr + row * grad_loss_stride, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        grad = grad / tl.load(total_ptr)
    if grad_lse_ptr is not None:
        grad_lse = tl.load(grad_lse_ptr + row, mask=inside, other=0.0).to(tl.float32)
        needed = inside
    else:
        grad_lse = tl.zeros_like(grad)
        # An ignored row's logits are never read.
        needed = counted
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    at_p, at_label, everywhere = row_gradient_scales(
        lse, grad, grad_lse, weight, counted, valid, classes, weight_sum_ptr, smoothing, z_loss,
        SMOOTHING, HAS_WEIGHT,
    )  # fmt: skip
    cols = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_cols = cols < classes
    far = cols.to(tl.int64)[None, :]
    mask = needed[:, None] & inside_cols[None, :]
    place = logits_ptr + outer_index * outer_stride + inner_index[:, None] * inner_stride
    x = tl.load(place + far * class_stride, mask=mask, other=0.0)
    gradient = tile_gradient(
        x, mask, cols, label, lse, at_p, at_label, everywhere, weight_ptr, classes, softcap,
        SMOOTHING, SOFTCAP, HAS_WEIGHT,
    )  # fmt: skip
    place = grad_ptr + outer_index * grad_outer_stride + inner_index[:, None] * grad_inner_stride
    tl.store(
        place + far * grad_class_stride, rounded(gradient, grad_ptr.dtype.element_ty),
        mask=inside[:, None] & inside_cols[None, :],
    )  # fmt: skip


SUM_BLOCK, SUM_RANGE = 1024, 65536


@triton.jit
def row_sum_kernel(
    loss_ptr, weight_ptr, loss_sum_ptr, weight_sum_ptr, n, MEAN: tl.constexpr,
    RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * RANGE
    loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, tl.minimum(first + RANGE, n), BLOCK):
        row = start + tl.arange(0, BLOCK)
        loss += tl.load(loss_ptr + row, mask=row < n, other=0.0)
        weight += tl.load(weight_ptr + row, mask=row < n, other=0.0)
    loss_sum, weight_sum = tl.sum(loss, 0), tl.sum(weight, 0)
    if MEAN:
        loss_sum = loss_sum / weight_sum
    tl.store(loss_sum_ptr + tl.program_id(0), loss_sum)
    tl.store(weight_sum_ptr + tl.program_id(0), weight_sum)


def row_sums(loss, weight, mean):
    """Sums of the rows' losses (their mean, if asked) and weights, in an order fixed by n."""
    n = loss.numel()
    while n > SUM_RANGE:
        programs = triton.cdiv(n, SUM_RANGE)
        partial, partial_weight = loss.new_empty((programs,)), loss.new_empty((programs,))
        row_sum_kernel[(programs,)](
            loss, weight, partial, partial_weight, n, MEAN=False, RANGE=SUM_RANGE, BLOCK=SUM_BLOCK
        )
        loss, weight, n = partial, partial_weight, programs
    total, total_weight = loss.new_empty(()), loss.new_empty(())
    row_sum_kernel[(1,)](
        loss, weight, total, total_weight, n, MEAN=mean, RANGE=SUM_RANGE, BLOCK=SUM_BLOCK
    )
    return total, total_weight


class Rows:
    """Logits as (outer, class, inner): the sizes, the strides, and what the kernels ask of them."""

    def __init__(self, logits):
        if logits.dim() == 1:
            logits = logits[None]
        if logits.dim() > 2:
            logits = logits.reshape(*logits.shape[:2], math.prod(logits.shape[2:]))
            if logits.shape[2] == 1:
                logits = logits[..., 0]
        if logits.dim() == 2:
            logits = logits.t()[None]
        self.logits = logits
        self.outer, self.classes, self.inner = logits.shape
        self.count = self.outer * self.inner
        self.strides = logits.stride()


def loss_options(weight, label_smoothing, softcap):
    """(contiguous class weights, their sum if a kernel needs it, constexpr switches)."""
    weight_sum = None
    if weight is not None:
        weight = weight.contiguous()
        if label_smoothing:
            weight_sum = weight.sum(dtype=torch.float32)
    switches = {
        "SMOOTHING": label_smoothing != 0, "SOFTCAP": softcap != 0,
        "HAS_WEIGHT": weight is not None,
    }  # fmt: skip
    return weight, weight_sum, switches


@torch.no_grad()
def cross_entropy_forward(
    logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    rows = Rows(logits)
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    target = target.reshape(-1).contiguous()
    weight, weight_sum, switches = loss_options(weight, label_smoothing, softcap)
    losses, lse, row_weight = (
        logits.new_empty((rows.count,), dtype=torch.float32) for _ in range(3)
    )
    if rows.count:
        cross_entropy_forward_kernel[
            lambda meta: (rows.outer * triton.cdiv(rows.inner, meta["BLOCK_R"]),)
        ](
            rows.logits, target, weight, weight_sum, losses, lse, row_weight,
            rows.classes, rows.inner, *rows.strides, ignore_index, label_smoothing, z_loss, softcap,
            **switches,
        )  # fmt: skip
    loss, total_weight = row_sums(losses, row_weight, reduction == "mean")
    loss = losses.view(shape) if reduction == "none" else loss
    return loss, lse.view(shape), total_weight


@torch.no_grad()
def cross_entropy_backward(
    grad_loss, grad_lse, logits, target, weight, lse, total_weight, reduction, ignore_index,
    label_smoothing, z_loss, softcap, output_mask,
):  # fmt: skip
    """Class indices have no gradient: grad_target is always empty."""
    grad = logits.new_empty(logits.shape if output_mask[0] else (0,))
    if grad.numel():
        launch_gradient(
            grad_loss, grad_lse, logits, target, weight, lse, total_weight, reduction,
            ignore_index, label_smoothing, z_loss, softcap, grad,
        )  # fmt: skip
    return grad, target.new_empty((0,))


# For a gradient that overwrites its logits, which the autotuner must not run twice.
IN_PLACE_CONFIG = _row_config(1, 4096, 8)


def launch_gradient(
    grad_loss, grad_lse, logits, target, weight, lse, total_weight, reduction, ignore_index,
    label_smoothing, z_loss, softcap, grad,
):  # fmt: skip
    """Write the gradient of the loss into `grad`, which may be `logits` itself."""
    rows, grad_strides = Rows(logits), Rows(grad).strides
    weight, weight_sum, switches = loss_options(weight, label_smoothing, softcap)
    kernel, fixed = cross_entropy_backward_kernel, {}
    if grad is logits:
        kernel = kernel.fn
        fixed = configurations([IN_PLACE_CONFIG], _ROW_INTERPRETED)[0].all_kwargs()

    def grid(meta):
        tiles = triton.cdiv(rows.classes, meta["BLOCK_V"])
        return (rows.outer * triton.cdiv(rows.inner, meta["BLOCK_R"]) * tiles,)

    per_row = reduction == "none"
    kernel[grid](
        grad_loss.reshape(-1).contiguous(),
        None if grad_lse is None else grad_lse.reshape(-1).contiguous(),
        rows.logits, target.reshape(-1).contiguous(), weight, weight_sum,
        lse.reshape(-1), total_weight, grad, rows.classes, rows.inner, *rows.strides,
        *grad_strides, int(per_row), ignore_index, label_smoothing, z_loss, softcap,
        MEAN=reduction == "mean", **switches, **fixed,
    )  # fmt: skip


def aot_pointers(dtype, names, weighted):
    """Pointer types of a loss kernel's launch: logits, weights and their gradient in `dtype`."""
    kinds = {"target_ptr": "*i64", "logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}"}
    pointers = {name: kinds.get(name, "*fp32") for name in names if name.endswith("_ptr")}
    if weighted:
        pointers["weight_ptr"] = f"*{dtype}"
    else:
        del pointers["weight_ptr"], pointers["weight_sum_ptr"]
    return pointers


def aot():
    """Launches to compile ahead of time: the widest, the tallest, with everything and plain."""
    for kernel in (cross_entropy_forward_kernel, cross_entropy_backward_kernel):
        for dtype, config, full, strides in (
            ("bf16", ROW_CONFIGS[3], True, {"class_stride": 1, "grad_class_stride": 1}),
            ("bf16", ROW_CONFIGS[2], False, {"class_stride": 1, "grad_class_stride": 1}),
            ("fp32", ROW_CONFIGS[-1], True, {"inner_stride": 1, "grad_inner_stride": 1}),
        ):
            names = kernel.fn.arg_names
            switches = {"SMOOTHING": full, "SOFTCAP": full, "HAS_WEIGHT": full, "MEAN": True}
            constexprs = {k: v for k, v in {**strides, **switches}.items() if k in names}
            yield aot_case(kernel, aot_pointers(dtype, names, full), constexprs, config)
    pointers = dict.fromkeys(("loss_ptr", "weight_ptr", "loss_sum_ptr", "weight_sum_ptr"), "*fp32")
    ranges = triton.Config({"RANGE": SUM_RANGE, "BLOCK": SUM_BLOCK}, num_warps=4)
    yield aot_case(row_sum_kernel, pointers, {"MEAN": True}, ranges)
