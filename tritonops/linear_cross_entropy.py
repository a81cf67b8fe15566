"""Linear layer + softmax cross-entropy without the N x V logits.

Rows are taken in chunks whose logits fit `workspace_bytes`. Of each chunk: logits = x W^T + b
(library GEMM, input dtype), then one kernel reads a row twice, the second time mostly from L2: it
reduces the row to its loss and lse (cross_entropy.py's online softmax) and overwrites the logits
with their gradient; then grad_x = dZ W (library GEMM) and grad_W += dZ^T x (linear_act.py's GEMM,
accumulated in float32 over the chunks). Without gradients only the first pass runs. The backward
recomputes the logits, for gradients that were not asked for, or whose upstream was not known, in
the forward.
Memory: one chunk of logits, and float32 grad_W when there are several. No host sync, no atomics.
"""

import torch
import triton
import triton.language as tl

from tritonops.cross_entropy import (
    aot_pointers,
    cross_entropy_forward,
    launch_gradient,
    load_target,
    loss_options,
    row_gradient_scales,
    row_loss,
    row_softmax,
    row_sums,
    tile_gradient,
)
from tritonops.cross_entropy import refusal as refusal  # the same features, the same reasons
from tritonops.launch import INTERPRETED, aot_case, rounded
from tritonops.linear_act import column_sums, matmul, matmul_add_

# Rows of a chunk are worth more than its memory until grad_W's read-modify-write is hidden, at
# about 2048 rows: this gives as many at a vocabulary of 128K in 16 bits.
DEFAULT_WORKSPACE_BYTES = 512 * 2**20


@triton.jit
def row_weight_kernel(
    target_ptr, weight_ptr, row_weight_ptr, n, classes, ignore_index,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    _, weight, _, _ = load_target(
        target_ptr, weight_ptr, row, inside, classes, ignore_index, HAS_WEIGHT
    )
    tl.store(row_weight_ptr + row, weight, mask=inside)


# Not autotuned: it overwrites its input.
LOSS_GRADIENT_BLOCK, LOSS_GRADIENT_WARPS = (64, 4) if INTERPRETED else (4096, 8)


@triton.jit(do_not_specialize=["ignore_index"])
def loss_and_gradient_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, total_ptr, loss_ptr, lse_ptr,
    classes, row_stride, ignore_index, smoothing, z_loss, softcap, MEAN: tl.constexpr,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    inside = row >= 0
    base = logits_ptr + row * row_stride
    label, weight, counted, valid = load_target(
        target_ptr, weight_ptr, row, inside, classes, ignore_index, HAS_WEIGHT
    )
    lse, nll, spread, lse_over_pivot = row_softmax(
        base, inside, label, valid, classes, 1, weight_ptr, softcap,
        SOFTCAP, SMOOTHING, HAS_WEIGHT, 1, BLOCK,
    )  # fmt: skip
    loss = row_loss(
        lse, nll, spread, lse_over_pivot, weight, counted, valid, classes, weight_sum_ptr,
        smoothing, z_loss, SMOOTHING, HAS_WEIGHT,
    )  # fmt: skip
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    grad = tl.full((1,), 1.0, tl.float32)
    if MEAN:
        grad = grad / tl.load(total_ptr)
    at_p, at_label, everywhere = row_gradient_scales(
        lse, grad, tl.zeros_like(grad), weight, counted, valid, classes, weight_sum_ptr,
        smoothing, z_loss, SMOOTHING, HAS_WEIGHT,
    )  # fmt: skip
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside_cols = (cols < classes)[None, :]
        place = base[:, None] + cols[None, :]
        mask = counted[:, None] & inside_cols
        gradient = tile_gradient(
            tl.load(place, mask=mask, other=0.0), mask, cols, label, lse, at_p, at_label,
            everywhere, weight_ptr, classes, softcap, SMOOTHING, SOFTCAP, HAS_WEIGHT,
        )  # fmt: skip
        tl.store(place, rounded(gradient, logits_ptr.dtype.element_ty), mask=inside_cols)


@triton.jit
def scale_kernel(tensor_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while (start < count) & (scale != 1.0):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        x = tl.load(tensor_ptr + place, mask=inside, other=0.0).to(tl.float32) * scale
        tl.store(tensor_ptr + place, rounded(x, tensor_ptr.dtype.element_ty), mask=inside)
        start += step


SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1024  # programs that stride: without work they cost a launch


def scale_(tensor, scale):
    if not tensor.is_contiguous():
        tensor.mul_(scale)
    elif tensor.numel():
        programs = min(triton.cdiv(tensor.numel(), SCALE_BLOCK), SCALE_PROGRAMS)
        scale_kernel[(programs,)](tensor, scale, tensor.numel(), BLOCK=SCALE_BLOCK, num_warps=8)


class _Chunks:
    """The rows in chunks of equal size, and the one buffer that holds a chunk's logits."""

    def __init__(self, x, weight, bias, workspace_bytes):
        self.x, self.weight, self.bias = x, weight, bias
        n, classes = x.shape[0], weight.shape[0]
        # Rows of the buffer begin on 32 bytes whatever the vocabulary: tensor cores and 16-byte
        # loads ask for it.
        pitch = triton.cdiv(classes, 16) * 16
        budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes < 0 else workspace_bytes
        most = max(1, budget // max(1, pitch * x.element_size()))
        self.size = triton.cdiv(n, triton.cdiv(n, most)) if n else 0
        if most >= self.size + 127:
            self.size = triton.cdiv(self.size, 128) * 128
        self.size = min(self.size, n)
        self.starts = range(0, n, self.size) if n else ()
        self.buffer = x.new_empty((self.size, pitch))[:, :classes]

    def __iter__(self):
        """(slice of the rows, their logits), chunk after chunk in the same memory."""
        for start in self.starts:
            rows = slice(start, min(start + self.size, self.x.shape[0]))
            x, logits = self.x[rows], self.buffer[: rows.stop - start]
            if self.bias is None:
                torch.mm(x, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=logits)
            yield rows, logits


class _Gradients:
    """Gradients of input, weight and bias, gathered from the chunks' logit gradients."""

    def __init__(self, chunks, output_mask):
        self.chunks = chunks
        self.wants_input, self.wants_weight, self.wants_bias = output_mask
        x, weight = chunks.x, chunks.weight
        self.input = x.new_empty(x.shape if self.wants_input else (0,))
        self.one_chunk = len(chunks.starts) == 1
        self.weight = self.bias = None
        if self.wants_weight and not self.one_chunk:
            self.weight = weight.new_zeros(weight.shape, dtype=torch.float32)
        if self.wants_bias:
            self.bias = weight.new_zeros(weight.shape[:1], dtype=torch.float32)

    def add(self, rows, grad_logits):
        x, weight = self.chunks.x[rows], self.chunks.weight
        if self.wants_input:
            torch.mm(grad_logits, weight, out=self.input[rows])
        if self.wants_weight:
            if self.one_chunk:
                self.weight = matmul(grad_logits.t(), x.t(), weight.dtype)
            else:
                matmul_add_(self.weight, grad_logits.t(), x.t())
        if self.wants_bias:
            self.bias += column_sums(grad_logits)

    def results(self, input_shape, divisor=None):
        x, dtype = self.chunks.x, self.chunks.weight.dtype
        wanted = [total for total in (self.input, self.weight, self.bias) if total is not None]
        if divisor is not None:
            for total in wanted:
                total /= divisor
        return (
            self.input.view(input_shape) if self.wants_input else x.new_empty((0,)),
            self.weight.to(dtype) if self.wants_weight else x.new_empty((0,)),
            self.bias.to(dtype) if self.wants_bias else x.new_empty((0,)),
        )


def _matrix(input):
    return input.reshape(input.shape[:-1].numel(), input.shape[-1])


@torch.no_grad()
def linear_cross_entropy_forward(
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing,
    z_loss, softcap, workspace_bytes, output_mask,
):  # fmt: skip
    """The gradients are those of an upstream gradient of 1 for the loss (for each row's, without
    reduction) and 0 for lse."""
    x, shape = _matrix(input), input.shape[:-1]
    n, classes = x.shape[0], linear_weight.shape[0]
    target = target.reshape(-1).contiguous()
    chunks = _Chunks(x, linear_weight, linear_bias, workspace_bytes)
    loss, lse, row_weight = (x.new_empty((n,), dtype=torch.float32) for _ in range(3))
    class_weight, weight_sum, switches = loss_options(weight, label_smoothing, softcap)
    if n:
        row_weight_kernel[(triton.cdiv(n, 1024),)](
            target, class_weight, row_weight, n, classes, ignore_index,
            HAS_WEIGHT=weight is not None, BLOCK=1024,
        )  # fmt: skip
    total_weight = row_sums(row_weight, row_weight, mean=False)[1]
    wants_gradient = any(output_mask)
    gradients = _Gradients(chunks, output_mask) if wants_gradient else None
    # A row's share of a mean is below float16's smallest numbers: divide the products instead.
    late = reduction == "mean" and x.dtype == torch.float16
    for rows, logits in chunks:
        if not wants_gradient:
            loss[rows], lse[rows], _ = cross_entropy_forward(
                logits, target[rows], weight, "none", ignore_index, label_smoothing, z_loss, softcap
            )
            continue
        loss_and_gradient_kernel[(logits.shape[0],)](
            logits, target[rows], class_weight, weight_sum, total_weight, loss[rows], lse[rows],
            classes, logits.stride(0), ignore_index, label_smoothing, z_loss, softcap,
            MEAN=reduction == "mean" and not late, **switches, BLOCK=LOSS_GRADIENT_BLOCK,
            num_warps=LOSS_GRADIENT_WARPS,
        )  # fmt: skip
        gradients.add(rows, logits)
    reduced, _ = row_sums(loss, row_weight, reduction == "mean")
    result = loss.view(shape) if reduction == "none" else reduced
    if wants_gradient:
        grads = gradients.results(input.shape, total_weight if late else None)
    else:
        grads = tuple(x.new_empty((0,)) for _ in range(3))
    return result, lse.view(shape), total_weight, *grads


@torch.no_grad()
def linear_cross_entropy_backward(
    grad_loss, grad_lse, input, linear_weight, linear_bias, target, weight, lse, total_weight,
    reduction, ignore_index, label_smoothing, z_loss, softcap, workspace_bytes, output_mask,
):  # fmt: skip
    x = _matrix(input)
    target, lse = target.reshape(-1), lse.reshape(-1)
    chunks = _Chunks(x, linear_weight, linear_bias, workspace_bytes)
    gradients = _Gradients(chunks, output_mask)
    if reduction == "none":
        grad_loss = grad_loss.reshape(-1)
    if grad_lse is not None:
        grad_lse = grad_lse.reshape(-1)
    for rows, logits in chunks:
        launch_gradient(
            grad_loss[rows] if reduction == "none" else grad_loss,
            None if grad_lse is None else grad_lse[rows], logits, target[rows], weight, lse[rows],
            total_weight, reduction, ignore_index, label_smoothing, z_loss, softcap, logits,
        )  # fmt: skip
        gradients.add(rows, logits)
    return gradients.results(input.shape)


def aot():
    """Launches to compile ahead of time."""
    tile = triton.Config({"BLOCK": LOSS_GRADIENT_BLOCK}, num_warps=LOSS_GRADIENT_WARPS)
    for dtype, full in (("bf16", True), ("bf16", False), ("fp32", True)):
        pointers = aot_pointers(dtype, loss_and_gradient_kernel.arg_names, full)
        switches = {"SMOOTHING": full, "SOFTCAP": full, "HAS_WEIGHT": full, "MEAN": True}
        yield aot_case(loss_and_gradient_kernel, pointers, switches, tile)
    tile = triton.Config({"BLOCK": SCALE_BLOCK}, num_warps=8)
    yield aot_case(scale_kernel, {"tensor_ptr": "*bf16", "scale_ptr": "*fp32"}, {}, tile)
    pointers = {"target_ptr": "*i64", "weight_ptr": "*fp32", "row_weight_ptr": "*fp32"}
    tile = triton.Config({"BLOCK": 1024}, num_warps=4)
    yield aot_case(row_weight_kernel, pointers, {"HAS_WEIGHT": True}, tile)
