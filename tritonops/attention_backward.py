"""The gradients of attention in tiles. Dao, "FlashAttention-2" (2023), algorithm 2:
  P = exp(S - lse), delta = rowsum(dO O) - d lse, dP = dO v^T, dS = P (dP - delta),
  dv = P^T dO, dk = scale dS^T q, dq = scale dS k, d mask = dS, d sink = -exp(sink - lse) delta.
  With dropout P is dropped in dv and dP is; with softcap dS gains 1 - tanh^2 after d mask.
Work: delta first; then one program a key tile, which walks the queries of its GQA group (dk, dv),
  one program a query tile (dq), one program a tile of the mask, which walks all batches,
  heads, rows or columns that the mask was broadcast over. No atomics: same inputs, same bits.
Memory: delta and lse, O(S); P is made again in each kernel, the dropout mask drawn again.
Numerics: fp32 sums; a hidden pair contributes exactly 0, whichever of the two is NaN.
Limits: those of the forward.
"""

import torch
import triton
import triton.language as tl

from tritonops.attention_tile import (
    ADDITIVE_MASK,
    UNSPECIALIZED,
    addressable,
    bias_sees,
    configured,
    exponential,
    load_bias,
    load_key_bias,
    load_rows,
    load_tile,
    packed_problem,
    phase_bounds,
    problem,
    rows_before,
    score_tile,
    sequence,
    softcap_slope,
    span,
    store_tile,
    unpacked,
)
from tritonops.launch import dot, rounded
from tritonops.philox import dropout_keep


@triton.jit(do_not_specialize=("heads", "seq_q"))
def attention_delta_kernel(
    grad_out_ptr, grad_lse_ptr, out_ptr, lse_ptr, delta_ptr, row_lse_ptr,
    stride_gb, stride_gh, stride_gs, stride_gd, stride_ob, stride_oh, stride_os, stride_od,
    stride_lb, stride_lh, stride_ls, stride_eb, stride_eh, stride_es, heads, seq_q,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = plane // heads, plane % heads
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < seq_q
    grad_out = load_tile(
        grad_out_ptr + b * stride_gb + h * stride_gh, first, 0, seq_q, stride_gs, stride_gd,
        BLOCK_M, BLOCK_DV, VALUE_DIM, True,
    )  # fmt: skip
    out = load_tile(
        out_ptr + b * stride_ob + h * stride_oh, first, 0, seq_q, stride_os, stride_od,
        BLOCK_M, BLOCK_DV, VALUE_DIM, True,
    )  # fmt: skip
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        grad_lse = grad_lse_ptr + b * stride_lb + h * stride_lh + row * stride_ls
        delta -= tl.load(grad_lse, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + b * stride_eb + h * stride_eh + row * stride_es, mask=inside, other=0.0)
    # A row without a key: exp(S - inf) is 0 whatever S is, and its delta is not to be heard of.
    empty = lse == float("-inf")
    tl.store(delta_ptr + plane * seq_q + row, tl.where(empty, 0.0, delta), mask=inside)
    # Of a row with NaN, exp(S - lse) is infinite where it sees a key and 0 where it does not.
    sound = (tl.abs(delta) < float("inf")) & (lse < float("inf"))
    row_lse = tl.where(sound, lse, -1e30)
    row_lse = tl.where(empty, float("inf"), row_lse)
    tl.store(row_lse_ptr + plane * seq_q + row, row_lse, mask=inside)


@configured("key")
@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_key_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, alibi_ptr, seed_ptr,
    grad_out_ptr, delta_ptr, row_lse_ptr, grad_key_ptr, grad_value_ptr, starts_q_ptr, starts_k_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab, stride_ah, stride_gb, stride_gh, stride_gs, stride_gd,
    heads, pitch, seq_q, seq_k, low, high, shift, scale, cap, threshold, keep_scale, tune_q, tune_k,
    grad_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles lie transposed, keys x queries: P^T and dS^T are then the left factors of dv and dk.
    tiles = tl.cdiv(seq_k, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    plane = tl.program_id(0) // tiles
    heads_k = heads // GROUP
    b, head_k = (plane // heads_k).to(tl.int64), (plane % heads_k).to(tl.int64)
    columns = seq_k
    row_origin, first_row, first_key, seq_q, seq_k, low, high, shift = sequence(
        starts_q_ptr, starts_k_ptr, b, heads, pitch, seq_q, seq_k, low, high, shift, PACKED
    )
    if PACKED:
        if first >= seq_k:
            return
    last = tl.minimum(first + BLOCK_N, seq_k) - 1
    col = first + tl.arange(0, BLOCK_N)
    k = load_tile(
        key_ptr + b * stride_kb + head_k * stride_kh + first_key * stride_ks, first, 0, seq_k,
        stride_ks, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, True,
    )  # fmt: skip
    v = load_tile(
        value_ptr + b * stride_vb + head_k * stride_vh + first_key * stride_vs, first, 0, seq_k,
        stride_vs, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM, True,
    )  # fmt: skip
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # The band seen from a key: queries j - high .. j - low.
    _, start, full_start, full_end, end = span(
        first, last, seq_q, -high, -low, HAS_HIGH, HAS_LOW, BLOCK_M
    )
    for member in range(GROUP):
        h = head_k * GROUP + member
        query_base = query_ptr + b * stride_qb + h * stride_qh + first_row * stride_qs
        grad_out_base = grad_out_ptr + b * stride_gb + h * stride_gh + first_row * stride_gs
        row_number = row_origin + h * pitch
        slope = 0.0
        if ALIBI:
            slope = tl.load(alibi_ptr + b * stride_ab + h * stride_ah).to(tl.float32)
        if MASK:
            mask_base = mask_ptr + b * stride_mb + h * stride_mh
            key_bias = load_key_bias(mask_base, col, seq_k, stride_mk, MASK)
        for phase in tl.static_range(0 if HAS_HIGH else 1, 3):
            tile_start, tile_end = phase_bounds(phase, start, full_start, full_end, end)
            for i in tl.range(tile_start, tile_end, BLOCK_M):
                row = i + tl.arange(0, BLOCK_M)
                row_lse = tl.load(
                    row_lse_ptr + row_number + row, mask=row < seq_q, other=float("inf")
                )
                # A row with NaN is read as 0: hidden pairs add 0 then, and the others inf 0 = NaN.
                sound = tl.abs(row_lse) < 1e30
                q = load_rows(
                    query_base, i, sound, stride_qs, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM,
                    phase != 1 or MASK,
                )  # fmt: skip
                qk = dot(k, tl.trans(q), None, "ieee")
                bias = qk
                if MASK:
                    bias = key_bias[:, None]
                    if MASK_ROWS:
                        bias = load_bias(
                            mask_base, row[None, :], col[:, None], seq_q, seq_k,
                            stride_mq, stride_mk, MASK,
                        )  # fmt: skip
                s = score_tile(
                    qk, bias, row[None, :], col[:, None], slope, seq_q, seq_k, low, high, shift,
                    scale, cap, FOLD, MASK, ALIBI, SOFTCAP, phase != 1, HAS_LOW, HAS_HIGH,
                )  # fmt: skip
                delta = tl.load(delta_ptr + row_number + row, mask=row < seq_q, other=0.0)
                p = exponential(s, row_lse[None, :], scale, FOLD)
                dropped = p
                if DROPOUT:
                    keep = tl.trans(
                        dropout_keep(seed_ptr, threshold, row_number + row, first, columns, BLOCK_N)
                    )
                    dropped = tl.where(keep, p, 0.0)
                # dV += P^T dO
                grad_out = load_rows(
                    grad_out_base, i, sound, stride_gs, stride_gd, BLOCK_M, BLOCK_DV, VALUE_DIM,
                    phase != 1 or MASK,
                )  # fmt: skip
                grad_v = dot(rounded(dropped, grad_out.dtype), grad_out, grad_v, "ieee")
                grad_p = dot(v, tl.trans(grad_out), None, "ieee")
                if DROPOUT:
                    grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
                # dS = P (dP - delta), 0 where hidden even if dP is NaN
                grad_s = p * (grad_p - delta[None, :])
                if SOFTCAP:
                    grad_s *= softcap_slope(qk, scale)
                if phase != 1 or MASK:
                    grad_s = tl.where(p == 0.0, 0.0, grad_s)
                # dK += dS^T q
                grad_k = dot(rounded(grad_s, q.dtype), q, grad_k, "ieee")
    if DROPOUT:
        grad_v *= keep_scale
    before = rows_before(b, head_k, heads_k, first_key, seq_k, PACKED)
    store_tile(
        grad_key_ptr, before, heads_k, first, seq_k, grad_k * grad_scale,
        BLOCK_N, BLOCK_D, HEAD_DIM, PACKED,
    )  # fmt: skip
    store_tile(
        grad_value_ptr, before, heads_k, first, seq_k, grad_v,
        BLOCK_N, BLOCK_DV, VALUE_DIM, PACKED,
    )  # fmt: skip


@triton.jit
def _grad_score_tile(
    q, k, v, grad_out, bias, row, col, first_col, slope, row_lse, delta, seed_ptr, dropout_row,
    columns, seq_q, seq_k, low, high, shift, scale, cap, threshold, keep_scale,
    FOLD: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EDGE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS, queries x keys: the gradient of what the softcap gives if CAPPED, else of scale q k^T."""
    qk = dot(q, tl.trans(k), None, "ieee")
    if MASK == 0:
        bias = qk
    s = score_tile(
        qk, bias, row[:, None], col[None, :], slope, seq_q, seq_k, low, high, shift, scale, cap,
        FOLD, MASK, ALIBI, SOFTCAP, EDGE, HAS_LOW, HAS_HIGH,
    )  # fmt: skip
    p = exponential(s, row_lse[:, None], scale, FOLD)
    grad_p = dot(grad_out, tl.trans(v), None, "ieee")
    if DROPOUT:
        keep = dropout_keep(seed_ptr, threshold, dropout_row, first_col, columns, BLOCK_N)
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    grad_s = p * (grad_p - delta[:, None])
    if SOFTCAP:
        if not CAPPED:
            grad_s *= softcap_slope(qk, scale)
    if EDGE or MASK:
        grad_s = tl.where(p == 0.0, 0.0, grad_s)
    return grad_s


@configured("query")
@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_query_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, alibi_ptr, seed_ptr,
    grad_out_ptr, delta_ptr, row_lse_ptr, grad_query_ptr, starts_q_ptr, starts_k_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab, stride_ah, stride_gb, stride_gh, stride_gs, stride_gd,
    heads, pitch, seq_q, seq_k, low, high, shift, scale, cap, threshold, keep_scale, tune_q, tune_k,
    grad_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if HAS_HIGH:
        tile = tiles - 1 - tile
    first = tile * BLOCK_M
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    columns = seq_k
    row_origin, first_row, first_key, seq_q, seq_k, low, high, shift = sequence(
        starts_q_ptr, starts_k_ptr, b, heads, pitch, seq_q, seq_k, low, high, shift, PACKED
    )
    if PACKED:
        if first >= seq_q:
            return
    last = tl.minimum(first + BLOCK_M, seq_q) - 1
    key_ptr += b * stride_kb + h // GROUP * stride_kh + first_key * stride_ks
    value_ptr += b * stride_vb + h // GROUP * stride_vh + first_key * stride_vs
    row = first + tl.arange(0, BLOCK_M)
    row_number = row_origin + h * pitch + row
    q = load_tile(
        query_ptr + b * stride_qb + h * stride_qh + first_row * stride_qs, first, 0, seq_q,
        stride_qs, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True,
    )  # fmt: skip
    grad_out = load_tile(
        grad_out_ptr + b * stride_gb + h * stride_gh + first_row * stride_gs, first, 0, seq_q,
        stride_gs, stride_gd, BLOCK_M, BLOCK_DV, VALUE_DIM, True,
    )  # fmt: skip
    row_lse = tl.load(row_lse_ptr + row_number, mask=row < seq_q, other=float("inf"))
    delta = tl.load(delta_ptr + row_number, mask=row < seq_q, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_ptr + b * stride_ab + h * stride_ah).to(tl.float32)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, start, full_start, full_end, end = span(
        first, last, seq_k, low, high, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    for phase in tl.static_range(0 if HAS_LOW else 1, 3):
        tile_start, tile_end = phase_bounds(phase, start, full_start, full_end, end)
        for n in tl.range(tile_start, tile_end, BLOCK_N):
            col = n + tl.arange(0, BLOCK_N)
            k = load_tile(
                key_ptr, n, begin, end, stride_ks, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, phase != 1
            )
            v = load_tile(
                value_ptr, n, begin, end, stride_vs, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM,
                phase != 1,
            )  # fmt: skip
            bias = row_lse
            if MASK:
                mask_base = mask_ptr + b * stride_mb + h * stride_mh
                if MASK_ROWS:
                    bias = load_bias(
                        mask_base, row[:, None], col[None, :], seq_q, seq_k, stride_mq, stride_mk,
                        MASK,
                    )  # fmt: skip
                    seen = tl.max(bias_sees(bias, MASK).to(tl.int32), 0) != 0
                else:
                    key_bias = load_key_bias(mask_base, col, seq_k, stride_mk, MASK)
                    bias = key_bias[None, :]
                    seen = bias_sees(key_bias, MASK)
            grad_s = _grad_score_tile(
                q, k, v, grad_out, bias, row, col, n, slope, row_lse, delta, seed_ptr, row_number,
                columns, seq_q, seq_k, low, high, shift, scale, cap, threshold, keep_scale, FOLD,
                MASK, ALIBI, SOFTCAP, DROPOUT, phase != 1, HAS_LOW, HAS_HIGH, False, BLOCK_N,
            )  # fmt: skip
            if MASK:
                # 0 * NaN, as in the forward
                k = tl.where(seen[:, None], k, 0.0)
            grad_q = dot(rounded(grad_s, k.dtype), k, grad_q, "ieee")
    store_tile(
        grad_query_ptr, rows_before(b, h, heads, first_row, seq_q, PACKED), heads, first, seq_q,
        grad_q * grad_scale, BLOCK_M, BLOCK_D, HEAD_DIM, PACKED,
    )  # fmt: skip


@configured("mask")
@triton.jit(do_not_specialize=(*UNSPECIALIZED, "batches", "mask_b", "mask_h", "mask_q", "mask_k"))
def attention_backward_mask_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, alibi_ptr, seed_ptr,
    grad_out_ptr, delta_ptr, row_lse_ptr, grad_mask_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab, stride_ah, stride_gb, stride_gh, stride_gs, stride_gd,
    heads, seq_q, seq_k, low, high, shift, scale, cap, threshold, keep_scale, tune_q, tune_k,
    batches, mask_b, mask_h, mask_q, mask_k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One tile of the gradient, which has the mask's own shape (mask_b, mask_h, mask_q, mask_k).
    out_tiles_q = 1 if SUM_ROWS else tl.cdiv(seq_q, BLOCK_M)
    out_tiles_k = 1 if SUM_COLS else tl.cdiv(seq_k, BLOCK_N)
    pid = tl.program_id(0)
    out_k = pid % out_tiles_k
    out_q = pid // out_tiles_k % out_tiles_q
    plane = pid // out_tiles_k // out_tiles_q
    out_h, out_b = plane % mask_h, plane // mask_h
    # What is summed into it: the batches, heads, row tiles and column tiles it was broadcast over.
    sum_b = batches // mask_b
    sum_h = heads // mask_h
    sum_q = tl.cdiv(seq_q, BLOCK_M) if SUM_ROWS else 1
    sum_k = tl.cdiv(seq_k, BLOCK_N) if SUM_COLS else 1
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, sum_b * sum_h * sum_q * sum_k):
        first_row = (out_q + step % sum_q) * BLOCK_M
        step = step // sum_q
        first_col = (out_k + step % sum_k) * BLOCK_N
        step = step // sum_k
        h = (out_h + step % sum_h).to(tl.int64)
        b = (out_b + step // sum_h).to(tl.int64)
        outside = False
        if HAS_LOW:
            outside = first_col + BLOCK_N - 1 - first_row < low
        if HAS_HIGH:
            outside = outside | (first_col - (first_row + BLOCK_M - 1) > high)
        if not outside:
            row = first_row + tl.arange(0, BLOCK_M)
            col = first_col + tl.arange(0, BLOCK_N)
            q = load_tile(
                query_ptr + b * stride_qb + h * stride_qh, first_row, 0, seq_q,
                stride_qs, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True,
            )  # fmt: skip
            k = load_tile(
                key_ptr + b * stride_kb + h // GROUP * stride_kh, first_col, 0, seq_k,
                stride_ks, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, True,
            )  # fmt: skip
            v = load_tile(
                value_ptr + b * stride_vb + h // GROUP * stride_vh, first_col, 0, seq_k,
                stride_vs, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM, True,
            )  # fmt: skip
            grad_out = load_tile(
                grad_out_ptr + b * stride_gb + h * stride_gh, first_row, 0, seq_q,
                stride_gs, stride_gd, BLOCK_M, BLOCK_DV, VALUE_DIM, True,
            )  # fmt: skip
            row_number = (b * heads + h) * seq_q + row
            row_lse = tl.load(row_lse_ptr + row_number, mask=row < seq_q, other=float("inf"))
            delta = tl.load(delta_ptr + row_number, mask=row < seq_q, other=0.0)
            slope = 0.0
            if ALIBI:
                slope = tl.load(alibi_ptr + b * stride_ab + h * stride_ah).to(tl.float32)
            bias = load_bias(
                mask_ptr + b * stride_mb + h * stride_mh, row[:, None], col[None, :],
                seq_q, seq_k, stride_mq, stride_mk, MASK,
            )  # fmt: skip
            grad_s = _grad_score_tile(
                q, k, v, grad_out, bias, row, col, first_col, slope, row_lse, delta, seed_ptr,
                row_number, seq_k, seq_q, seq_k, low, high, shift, scale, cap, threshold,
                keep_scale, FOLD, MASK, ALIBI, SOFTCAP, DROPOUT, True, HAS_LOW, HAS_HIGH, True,
                BLOCK_N,
            )  # fmt: skip
            acc += grad_s

    if SUM_ROWS:
        row = tl.zeros([1], tl.int32)
        acc = tl.sum(acc, 0)[None, :]
    else:
        row = out_q * BLOCK_M + tl.arange(0, BLOCK_M)
    if SUM_COLS:
        col = tl.zeros([1], tl.int32)
        acc = tl.sum(acc, 1)[:, None]
    else:
        col = out_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = (plane.to(tl.int64) * mask_q + row[:, None]) * mask_k + col[None, :]
    tl.store(
        grad_mask_ptr + offsets,
        rounded(acc, grad_mask_ptr.dtype.element_ty),
        mask=(row < mask_q)[:, None] & (col < mask_k)[None, :],
    )


DELTA_ROWS = 32


def _grad_mask(arguments, attn_mask, batch):
    """The gradient of an additive mask, in its own shape."""
    grad_mask = torch.empty_like(attn_mask, memory_format=torch.contiguous_format)
    shape = (1,) * (4 - attn_mask.dim()) + attn_mask.shape
    seq_q, seq_k = arguments["seq_q"], arguments["seq_k"]
    sum_rows, sum_cols = shape[2] < seq_q, shape[3] < seq_k
    if 0 in (grad_mask.numel(), seq_q, seq_k):
        return grad_mask.zero_()

    def grid(tile):
        tiles_q = 1 if sum_rows else triton.cdiv(seq_q, tile["BLOCK_M"])
        tiles_k = 1 if sum_cols else triton.cdiv(seq_k, tile["BLOCK_N"])
        return (tiles_q * tiles_k * shape[0] * shape[1],)

    attention_backward_mask_kernel[grid](
        **arguments,
        grad_mask_ptr=grad_mask, batches=batch,
        mask_b=shape[0], mask_h=shape[1], mask_q=shape[2], mask_k=shape[3],
        SUM_ROWS=sum_rows, SUM_COLS=sum_cols,
    )  # fmt: skip
    return grad_mask


def _deltas(grad_out, grad_lse, out, lse):
    """delta and lse as the kernels take them, (B, H, Sq)."""
    batch, heads, seq_q, value_dim = grad_out.shape
    delta = lse.new_empty(lse.shape, dtype=torch.float32)
    row_lse = torch.empty_like(delta)
    if delta.numel():
        grad_lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
        attention_delta_kernel[(triton.cdiv(seq_q, DELTA_ROWS) * batch * heads,)](
            grad_out, grad_lse, out, lse, delta, row_lse,
            *grad_out.stride(), *out.stride(), *grad_lse_strides, *lse.stride(), heads, seq_q,
            VALUE_DIM=value_dim,
            BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
            BLOCK_M=DELTA_ROWS,
        )  # fmt: skip
    return delta, row_lse


def _input_gradients(arguments, query, key, value, scale, wanted):
    """Those of queries, keys and values that are wanted, of `batch` sequences."""
    batch = arguments["query_ptr"].shape[0]
    grad_query = grad_key = grad_value = skipped = query.new_empty((0,))
    if wanted[0]:
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        if grad_query.numel():
            planes = batch * arguments["heads"]
            attention_backward_query_kernel[
                lambda tile: (triton.cdiv(arguments["seq_q"], tile["BLOCK_M"]) * planes,)
            ](**arguments, grad_query_ptr=grad_query, grad_scale=scale)
    if wanted[1] or wanted[2]:
        grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
        grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
        if grad_key.numel() or grad_value.numel():
            planes_k = batch * arguments["heads"] // arguments["GROUP"]
            attention_backward_key_kernel[
                lambda tile: (triton.cdiv(arguments["seq_k"], tile["BLOCK_N"]) * planes_k,)
            ](
                **arguments, grad_key_ptr=grad_key, grad_value_ptr=grad_value, grad_scale=scale
            )  # fmt: skip
        grad_key = grad_key if wanted[1] else skipped
        grad_value = grad_value if wanted[2] else skipped
    return grad_query, grad_key, grad_value


def _grad_sinks(sinks, delta, lse):
    with torch.no_grad():
        probability = torch.exp(sinks[..., None].float() - lse)
        grad = (probability * delta).masked_fill(lse == -torch.inf, 0.0).sum(-1)
        return -grad.sum_to_size(sinks.shape).to(sinks.dtype)


def attention_backward(
    grad_out, grad_lse, query, key, value, attn_mask, alibi_slopes, sinks, seed, out, lse,
    dropout_p, scale, softcap, bottom_right, window_left, window_right, output_mask,
):  # fmt: skip
    batch, _, seq_q, _ = query.shape
    grad_out = addressable(grad_out)
    arguments = problem(
        query, key, value, attn_mask, alibi_slopes, seed, dropout_p, scale, softcap,
        bottom_right, window_left, window_right,
    )  # fmt: skip
    delta, row_lse = _deltas(grad_out, grad_lse, out, lse)
    arguments |= {
        "grad_out_ptr": grad_out, "delta_ptr": delta, "row_lse_ptr": row_lse,
        "stride_gb": grad_out.stride(0), "stride_gh": grad_out.stride(1),
        "stride_gs": grad_out.stride(2), "stride_gd": grad_out.stride(3),
    }  # fmt: skip
    gradients = _input_gradients(
        arguments | unpacked(seq_q), query, key, value, scale, output_mask
    )  # fmt: skip
    grad_mask = grad_sinks = query.new_empty((0,))
    if output_mask[3] and arguments["MASK"] == ADDITIVE_MASK:
        grad_mask = _grad_mask(arguments, attn_mask, batch)
    if output_mask[4]:
        grad_sinks = _grad_sinks(sinks, delta, lse)
    return *gradients, grad_mask, grad_sinks


def varlen_attention_backward(
    grad_out, grad_lse, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    alibi_slopes, sinks, seed, out, lse, dropout_p, scale, softcap, bottom_right, window_left,
    window_right, output_mask,
):  # fmt: skip
    arguments = packed_problem(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes,
        seed, dropout_p, scale, softcap, bottom_right, window_left, window_right,
    )  # fmt: skip
    grad_out = addressable(grad_out.transpose(0, 1))
    # Row by row, all of them are one sequence.
    delta, row_lse = _deltas(
        grad_out[None], None if grad_lse is None else grad_lse[None],
        out.transpose(0, 1)[None], lse[None],
    )  # fmt: skip
    arguments |= {
        "grad_out_ptr": grad_out, "delta_ptr": delta, "row_lse_ptr": row_lse,
        "stride_gb": 0, "stride_gh": grad_out.stride(0),
        "stride_gs": grad_out.stride(1), "stride_gd": grad_out.stride(2),
    }  # fmt: skip
    gradients = _input_gradients(arguments, query, key, value, scale, output_mask)
    grad_sinks = query.new_empty((0,))
    if output_mask[3]:
        grad_sinks = _grad_sinks(sinks, delta[0], lse)
    return *gradients, grad_sinks
