"""Exact attention in tiles, forward: out = softmax(softcap(scale q k^T) - alibi + mask) v, never
S x S in memory. Dao, "FlashAttention-2" (2023), algorithm 1.
Work: a program owns BLOCK_M queries of one head and walks the key tiles of their band, those that
  need no mask in a loop of their own; causal programs start with the longest rows. Packed
  sequences are a batch in one tensor: a program past the end of its sequence has no work. Of a
  few queries a program walks a part of the keys, and a second kernel adds the parts (decoding).
Memory: q, the running max m, sum l and out in registers; k and v stream through shared memory. GQA
  and broadcast masks are strides, never copies.
Numerics: fp32 sums, exp2; a hidden key has probability exactly 0, and one that no query of a tile
  sees gives no NaN either. Dropout acts on the normalized probabilities, lse does not know of it.
Limits: head dims up to 256, padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from tritonops.attention_backward import (
    DELTA_ROWS,
    attention_backward,  # noqa: F401  (the families' other ops)
    attention_backward_key_kernel,
    attention_backward_mask_kernel,
    attention_backward_query_kernel,
    attention_delta_kernel,
    varlen_attention_backward,  # noqa: F401
)
from tritonops.attention_tile import (
    ADDITIVE_MASK,
    DECODE_ROWS,
    DECODE_TILES,
    NO_MASK,
    TILES,
    UNSPECIALIZED,
    aot_case,
    bias_sees,
    configured,
    exponential,
    load_bias,
    load_key_bias,
    load_tile,
    packed_problem,
    packed_tiles,
    phase_bounds,
    problem,
    rows_before,
    score_tile,
    sequence,
    span,
    store_tile,
    unpacked,
)
from tritonops.launch import dot, processors, rounded
from tritonops.philox import dropout_keep

MAX_HEAD_DIM = 256


@configured("forward")
@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, alibi_ptr, seed_ptr, sinks_ptr, out_ptr, lse_ptr,
    starts_q_ptr, starts_k_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab, stride_ah, stride_sb, stride_sh,
    heads, pitch, seq_q, seq_k, low, high, shift, scale, cap, threshold, keep_scale, tune_q, tune_k,
    split_keys, split_rows,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    split = tl.program_id(1)
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
    query_ptr += b * stride_qb + h * stride_qh + first_row * stride_qs
    key_ptr += b * stride_kb + h // GROUP * stride_kh + first_key * stride_ks
    value_ptr += b * stride_vb + h // GROUP * stride_vh + first_key * stride_vs
    row = first + tl.arange(0, BLOCK_M)
    row_number = row_origin + h * pitch + row

    q = load_tile(
        query_ptr, first, 0, seq_q, stride_qs, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True
    )
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_ptr + b * stride_ab + h * stride_ah).to(tl.float32)
    # A sink is a key without a value: it opens the running maximum and sum.
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    if SINKS:
        sink = tl.load(sinks_ptr + b * stride_sb + h * stride_sh).to(tl.float32)
        m = tl.zeros([BLOCK_M], tl.float32) + sink
        l += tl.where(sink == float("-inf"), 0.0, 1.0)  # noqa: E741
        if SPLIT:  # the sink is in the first part
            m = tl.where(split == 0, m, float("-inf"))
            l = tl.where(split == 0, l, 0.0)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    begin, start, full_start, full_end, end = span(
        first, last, seq_k, low, high, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    if SPLIT:
        start = tl.maximum(start, split * split_keys)
        full_start = tl.maximum(full_start, split * split_keys)
        end = tl.minimum(end, (split + 1) * split_keys)
        full_end = tl.minimum(full_end, (split + 1) * split_keys)
    for phase in tl.static_range(0 if HAS_LOW else 1, 3):
        tile_start, tile_end = phase_bounds(phase, start, full_start, full_end, end)
        for n in tl.range(tile_start, tile_end, BLOCK_N):
            col = n + tl.arange(0, BLOCK_N)
            # S = q k^T
            k = load_tile(
                key_ptr, n, begin, end, stride_ks, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, phase != 1
            )
            qk = dot(q, tl.trans(k), None, "ieee")
            bias = qk
            if MASK:
                mask_base = mask_ptr + b * stride_mb + h * stride_mh
                if MASK_ROWS:
                    bias = load_bias(
                        mask_base, row[:, None], col[None, :], seq_q, seq_k, stride_mq, stride_mk,
                        MASK,
                    )  # fmt: skip
                else:
                    key_bias = load_key_bias(mask_base, col, seq_k, stride_mk, MASK)
                    bias = key_bias[None, :]
            s = score_tile(
                qk, bias, row[:, None], col[None, :], slope, seq_q, seq_k, low, high, shift, scale,
                cap, FOLD, MASK, ALIBI, SOFTCAP, phase != 1, HAS_LOW, HAS_HIGH,
            )  # fmt: skip
            # P = exp(S - m), the sums so far scaled to the new maximum
            row_max = tl.max(s, 1) * scale if FOLD else tl.max(s, 1)
            new_m = tl.maximum(m, row_max)
            subtract = new_m
            if phase != 1 or MASK:
                # A row that has seen no key yet: -inf - -inf would be NaN.
                subtract = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = exponential(s, subtract[:, None], scale, FOLD)
            correction = tl.exp2((m - subtract) * 1.4426950408889634)
            l = l * correction + tl.sum(p, 1)  # noqa: E741
            m = new_m
            if DROPOUT:
                keep = dropout_keep(seed_ptr, threshold, row_number, n, columns, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            # O += P v
            v = load_tile(
                value_ptr, n, begin, end, stride_vs, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM,
                phase != 1,
            )  # fmt: skip
            if MASK:
                # 0 * NaN: a value that no query of this tile sees must not enter the product.
                if MASK_ROWS:
                    seen = tl.max(bias_sees(bias, MASK).to(tl.int32), 0) != 0
                else:
                    seen = bias_sees(key_bias, MASK)
                v = tl.where(seen[:, None], v, 0.0)
            acc = acc * correction[:, None]
            acc = dot(rounded(p, v.dtype), v, acc, "ieee")

    empty = l == 0.0
    if DROPOUT:
        acc *= keep_scale
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("-inf"), m + tl.log(tl.where(empty, 1.0, l)))
    before = rows_before(b, h, heads, first_row, seq_q, PACKED)
    lse_ptr += row_origin + h * pitch
    if SPLIT:
        before += tl.cast(split, tl.int64) * split_rows
        lse_ptr += tl.cast(split, tl.int64) * split_rows
    store_tile(out_ptr, before, heads, first, seq_q, acc, BLOCK_M, BLOCK_DV, VALUE_DIM, PACKED)
    tl.store(lse_ptr + row, lse, mask=row < seq_q)


@triton.jit(do_not_specialize=("splits", "rows"))
def attention_merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, rows,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Each part is normalized on its own keys: weighted by exp(lse) of these, they add up.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        part_lse = part_lse_ptr + tl.cast(split, tl.int64) * rows
        m = tl.maximum(m, tl.load(part_lse + row, mask=row < rows, other=float("-inf")))
    base = tl.where(m == float("-inf"), 0.0, m)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in tl.range(0, splits):
        before = tl.cast(split, tl.int64) * rows
        weight = tl.load(part_lse_ptr + before + row, mask=row < rows, other=float("-inf"))
        weight = tl.exp2((weight - base) * 1.4426950408889634)
        part = load_tile(
            part_ptr + before * VALUE_DIM, first, 0, rows, VALUE_DIM, 1, BLOCK_M, BLOCK_DV,
            VALUE_DIM, True,
        )  # fmt: skip
        l += weight  # noqa: E741
        acc += weight[:, None] * part
    empty = l == 0.0
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("-inf"), base + tl.log(tl.where(empty, 1.0, l)))
    store_tile(out_ptr, first * 0, 1, first, rows, acc, BLOCK_M, BLOCK_DV, VALUE_DIM, False)
    tl.store(lse_ptr + row, lse, mask=row < rows)


MERGE_ROWS = 16
SPLIT_KEYS = 256  # keys of a part, at the least; a multiple of every tile's


def _part_of_keys(seq_q, seq_k, planes, has_low):
    """The keys that a program walks: of a few queries not all, so that every multiprocessor has
    programs for two."""
    if seq_q > DECODE_ROWS or has_low:
        return seq_k
    splits = max(1, 2 * processors() // planes)
    return triton.cdiv(triton.cdiv(seq_k, splits), SPLIT_KEYS) * SPLIT_KEYS


def attention_forward(
    query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, scale, softcap,
    bottom_right, window_left, window_right,
):  # fmt: skip
    batch, heads, seq_q, _ = query.shape
    out = query.new_empty((batch, heads, seq_q, value.shape[-1]))
    lse = query.new_empty((batch, heads, seq_q), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    arguments = problem(
        query, key, value, attn_mask, alibi_slopes, seed, dropout_p, scale, softcap,
        bottom_right, window_left, window_right,
    )  # fmt: skip
    stride_sb, stride_sh = (0, 0) if sinks is None else sinks.expand(batch, heads).stride()
    split_keys = _part_of_keys(seq_q, key.shape[2], batch * heads, arguments["HAS_LOW"])
    splits = max(1, triton.cdiv(key.shape[2], split_keys)) if split_keys else 1
    parts, part_lse = out, lse
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        part_lse = lse.new_empty((splits, *lse.shape))
    attention_forward_kernel[
        lambda tile: (triton.cdiv(seq_q, tile["BLOCK_M"]) * batch * heads, splits)
    ](
        **arguments, **unpacked(seq_q),
        sinks_ptr=sinks, out_ptr=parts, lse_ptr=part_lse, stride_sb=stride_sb, stride_sh=stride_sh,
        split_keys=split_keys, split_rows=lse.numel(), SINKS=sinks is not None, SPLIT=splits > 1,
    )  # fmt: skip
    if splits > 1:
        attention_merge_kernel[(triton.cdiv(lse.numel(), MERGE_ROWS),)](
            parts, part_lse, out, lse, splits, lse.numel(), VALUE_DIM=value.shape[-1],
            BLOCK_DV=arguments["BLOCK_DV"], BLOCK_M=MERGE_ROWS,
        )  # fmt: skip
    return out, lse


def varlen_attention_forward(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks,
    seed, dropout_p, scale, softcap, bottom_right, window_left, window_right,
):  # fmt: skip
    rows, heads, _ = query.shape
    sequences = cu_seqlens_q.numel() - 1
    out = query.new_empty((rows, heads, value.shape[-1]))
    lse = query.new_empty((heads, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    arguments = packed_problem(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes,
        seed, dropout_p, scale, softcap, bottom_right, window_left, window_right,
    )  # fmt: skip
    attention_forward_kernel[
        lambda tile: (triton.cdiv(max_seqlen_q, tile["BLOCK_M"]) * sequences * heads,)
    ](
        **arguments,
        sinks_ptr=sinks, out_ptr=out, lse_ptr=lse,
        stride_sb=0, stride_sh=0 if sinks is None else sinks.stride(0),
        split_keys=0, split_rows=0, SINKS=sinks is not None, SPLIT=False,
    )  # fmt: skip
    return out, lse


KERNELS = {
    "forward": (attention_forward_kernel, ()),
    "key": (attention_backward_key_kernel, ("grad_key_ptr", "grad_value_ptr")),
    "query": (attention_backward_query_kernel, ("grad_query_ptr",)),
    "mask": (attention_backward_mask_kernel, ("grad_mask_ptr",)),
}


def aot():
    """Launches to compile ahead of time: the largest tile of each width, and every feature once."""
    everything = {
        "MASK": ADDITIVE_MASK, "mask_type": "fp32", "ALIBI": True, "SINKS": True, "SOFTCAP": True,
        "DROPOUT": True, "FOLD": False, "HAS_LOW": True, "GROUP": 4,
    }  # fmt: skip
    for kind, (kernel, pointers) in KERNELS.items():
        plain = {"MASK": ADDITIVE_MASK, "FOLD": False} if kind == "mask" else {}
        for head_dim in (64, 128, 256):
            tile = TILES[kind][2, head_dim][0]
            yield aot_case(kernel.fn, tile, "bf16", head_dim, pointers, "bf16", **plain)
        yield aot_case(kernel.fn, TILES[kind][4, 64][0], "fp32", 64, pointers, "fp32", **plain)
        yield aot_case(kernel.fn, TILES[kind][2, 64][-1], "fp16", 48, pointers, **everything)
        if kind != "mask":
            packed = everything | {"MASK": NO_MASK, "PACKED": True}
            yield aot_case(kernel.fn, TILES[kind][2, 64][-1], "fp16", 48, pointers, **packed)
            for head_dim in (64, 128, 256):
                tile = packed_tiles(kind, TILES[kind][2, head_dim])[0]
                yield aot_case(kernel.fn, tile, "bf16", head_dim, pointers, PACKED=True)
    kernel, pointers = KERNELS["forward"]
    for (_, head_dim), tile in DECODE_TILES.items():
        for features in ({"GROUP": 4}, everything):
            yield aot_case(kernel.fn, tile, "bf16", head_dim, pointers, SPLIT=True, **features)
    yield aot_case(attention_merge_kernel, (MERGE_ROWS, 0, 4, 1), "bf16", 256)
    yield aot_case(attention_delta_kernel, (DELTA_ROWS, 0, 4, 1), "bf16", 128)


def refusal(features: dict) -> str | None:
    """Why these kernels cannot serve a call with `features`, or None when they can."""
    for name in ("head_dim", "value_dim"):
        if features.get(name, 0) > MAX_HEAD_DIM:
            return f"Triton attention serves a {name} up to {MAX_HEAD_DIM}, got {features[name]}"
    return None
