"""What the attention kernels share: a tile of scores, the keys that a band shows it, tile sizes.

Scores S are of two kinds: where nothing is added to q k^T and nothing bends it (FOLD), S is q k^T
itself, and S scale - m is one multiply-add; elsewhere S is the natural score. A hidden score is
-inf, and its probability is exactly 0.
"""

import torch
import triton
import triton.language as tl

from tritonops.activation import tanh, tanh_derivative
from tritonops.launch import processors, rounded, stored_or_tuned
from tritonops.philox import dropout_rate

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2


@triton.jit
def load_rows(
    base, start, chosen, stride_row, stride_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of a matrix `WIDTH` wide from row `start`; if CHOSEN, 0 where not `chosen`."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    base += tl.cast(start, tl.int64) * stride_row
    pointers = base + row[:, None] * stride_row + col[None, :] * stride_col
    if CHOSEN and WIDTH < COLS:
        return tl.load(pointers, mask=chosen[:, None] & (col < WIDTH)[None, :], other=0.0)
    elif CHOSEN:
        return tl.load(pointers, mask=chosen[:, None], other=0.0)
    elif WIDTH < COLS:
        return tl.load(pointers, mask=(col < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_tile(
    base, start, begin, end, stride_row, stride_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The same; if BOUNDED, 0 for rows outside [begin, end)."""
    row = start + tl.arange(0, ROWS)
    inside = (row >= begin) & (row < end)
    return load_rows(base, start, inside, stride_row, stride_col, ROWS, COLS, WIDTH, BOUNDED)


@triton.jit
def store_tile(
    base, before, heads, start, size, tile, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write a tile into rows `start` to `size` of one head, which is WIDTH wide and has `before`
    rows of all heads before it: its own lie side by side or, of a packed tensor, `heads` apart."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    step = WIDTH
    if PACKED:
        step = heads * WIDTH
    base += before * WIDTH + tl.cast(start, tl.int64) * step
    inside = (start + row < size)[:, None] & (col < WIDTH)[None, :]
    tile = rounded(tile, base.dtype.element_ty)
    tl.store(base + row[:, None] * step + col[None, :], tile, mask=inside)


@triton.jit
def sequence(
    starts_q_ptr, starts_k_ptr, b, heads, pitch, seq_q, seq_k, low, high, shift,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Sequence b: (row_origin, first_row, first_key, seq_q, seq_k, low, high, shift).

    Rows of head h are numbered row_origin + h pitch and up, for lse and dropout. Packed sequences
    lie one behind the other from their starts on; seq_q and seq_k are then the longest ones'
    lengths, and `shift` is 1 where the last row is to see the last key.
    """
    if PACKED:
        first_row = tl.load(starts_q_ptr + b)
        first_key = tl.load(starts_k_ptr + b)
        seq_q = tl.load(starts_q_ptr + b + 1) - first_row
        seq_k = tl.load(starts_k_ptr + b + 1) - first_key
        shift = shift * (seq_k - seq_q)
        first_row = first_row.to(tl.int64)
        return (
            first_row, first_row, first_key.to(tl.int64), seq_q, seq_k, low + shift, high + shift,
            shift,
        )  # fmt: skip
    else:
        return b * heads * pitch, b * 0, b * 0, seq_q, seq_k, low, high, shift


@triton.jit
def rows_before(b, h, heads, first, size, PACKED: tl.constexpr):
    """The rows of all heads that lie before head h of a result: see store_tile."""
    if PACKED:
        return first * heads + h
    else:
        return (b * heads + h) * size


@triton.jit
def load_bias(base, row, col, seq_q, seq_k, stride_q, stride_k, MASK: tl.constexpr):
    """The mask at (row, col), which broadcast to the tile, whichever way it lies."""
    pointers = base + row.to(tl.int64) * stride_q + col.to(tl.int64) * stride_k
    inside = (row < seq_q) & (col < seq_k)
    # What is outside must look hidden: see bias_sees.
    if MASK == 1:
        return tl.load(pointers, mask=inside, other=0)
    else:
        return tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def load_key_bias(base, col, seq_k, stride_k, MASK: tl.constexpr):
    """The same for a mask that is one row for all queries."""
    pointers = base + col.to(tl.int64) * stride_k
    if MASK == 1:
        return tl.load(pointers, mask=col < seq_k, other=0)
    else:
        return tl.load(pointers, mask=col < seq_k, other=float("-inf")).to(tl.float32)


@triton.jit
def bias_sees(bias, MASK: tl.constexpr):
    if MASK == 1:
        return bias != 0
    else:
        return bias != float("-inf")


@triton.jit
def score_tile(
    qk, bias, row, col, slope, seq_q, seq_k, low, high, shift, scale, cap,
    FOLD: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
):  # fmt: skip
    """The scores S of a tile of q k^T."""
    if SOFTCAP:
        s = cap * tanh(qk * scale)
    elif FOLD:
        s = qk
    else:
        s = qk * scale
    if ALIBI:
        s -= slope * tl.abs(row + shift - col).to(tl.float32)
    if MASK == 1:
        s = tl.where(bias != 0, s, float("-inf"))
    elif MASK == 2:
        # -inf hides a key even where its own score is NaN.
        s = tl.where(bias != float("-inf"), s + bias, float("-inf"))
    if EDGE:
        # A row past the end would see NaN keys that no query sees.
        visible = (row < seq_q) & (col < seq_k)
        if HAS_LOW:
            visible = visible & (col - row >= low)
        if HAS_HIGH:
            visible = visible & (col - row <= high)
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def exponential(s, m, scale, FOLD: tl.constexpr):
    """exp of the score less m. To have log2(e) in `scale` would save a multiplication, and round m,
    which is the maximum or the lse, otherwise than the scores: of scores about 200, dv then has 1.6
    times torch's error, else 1.0."""
    if FOLD:
        s = s * scale
    return tl.exp2((s - m) * 1.4426950408889634)


@triton.jit
def softcap_slope(qk, scale):
    return tanh_derivative(qk * scale)


@triton.jit
def span(first, last, size, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """Which partners the positions first..last see: position p sees [p + low, p + high].

    Returns (begin, start, full_start, full_end, end): partners outside [begin, end) are hidden from
    all; tiles from `start` to `full_start` and from `full_end` on need a mask, the tiles between
    are visible to all. Multiples of BLOCK, but `begin` and `end`. Every division is of a number
    >= 0, because Triton rounds towards zero.
    """
    begin = size * 0
    full_start = size * 0
    end = size
    full_end = size // BLOCK * BLOCK
    if HAS_LOW:
        begin = tl.maximum(first + low, 0)
        full_start = (tl.maximum(last + low, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_HIGH:
        end = tl.minimum(size, tl.maximum(last + high + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first + high + 1, 0) // BLOCK * BLOCK)
    return begin, begin // BLOCK * BLOCK, full_start, full_end, end


@triton.jit
def phase_bounds(phase: tl.constexpr, start, full_start, full_end, end):
    """The three loops over tiles: masked before the full ones (0), full (1), masked after (2)."""
    if phase == 0:
        return start, tl.minimum(full_start, end)
    elif phase == 1:
        return full_start, full_end
    else:
        return tl.maximum(full_start, full_end), end


# Tiles (BLOCK_M, BLOCK_N, warps, stages) by kernel, bytes of an element and padded head dim (the
# largest of D and Dv, at least 64). Each fits every device from sm_80 on; the first of a row is the
# largest, the last has registers to spare for masks, dropout and softcap.
TILES = {
    "forward": {
        (2, 64): [
            (128, 128, 8, 3),
            (128, 64, 8, 3),
            (128, 64, 4, 3),
            (64, 64, 4, 3),
            (64, 32, 8, 1),
        ],
        (2, 128): [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 8, 2)],
        (2, 256): [(64, 32, 8, 2)],
        (4, 64): [(32, 32, 8, 1)],
        (4, 128): [(32, 16, 8, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "key": {
        (2, 64): [(32, 128, 8, 2), (32, 64, 4, 2), (16, 32, 8, 1)],
        (2, 128): [(32, 128, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1)],
        (2, 256): [(16, 32, 8, 1)],
        (4, 64): [(16, 32, 8, 1)],
        (4, 128): [(16, 32, 8, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "query": {
        (2, 64): [(128, 32, 8, 2), (64, 32, 4, 2), (16, 32, 8, 1)],
        (2, 128): [(128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 1)],
        (2, 256): [(32, 32, 4, 1), (64, 16, 4, 2)],
        (4, 64): [(32, 32, 8, 1)],
        (4, 128): [(32, 16, 8, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "mask": {
        (2, 64): [(64, 32, 8, 1), (32, 32, 8, 1)],
        (2, 128): [(64, 32, 8, 1)],
        (2, 256): [(32, 16, 8, 1)],
        (4, 64): [(32, 32, 8, 1)],
        (4, 128): [(32, 16, 8, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
}
# The same of the forward for up to so many queries (decoding), with every feature
DECODE_ROWS = 16
DECODE_TILES = {(2, 64): (16, 64, 4, 3), (2, 128): (16, 64, 4, 3), (2, 256): (16, 32, 4, 3)}
INTERPRETER_TILE = (32, 32, 4, 1)


def tile_key(itemsize: int, block_d: int, block_dv: int) -> tuple[int, int]:
    return itemsize, max(64, block_d, block_dv)


def _config(tile):
    m, n, warps, stages = tile
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def packed_tiles(kind, row):
    """The tiles of a row that packed sequences leave enough registers on every target."""
    return row[1:] or row if kind == "forward" else row


def stored_tile(kind, row, a, multiprocessors):
    """The first tile of a row of the table that gives every multiprocessor a program, or the one
    with the most programs; the last where the scores need more than a scale and a band.

    Unmeasured: a larger tile reads keys and values less often, which is all that it is for.
    """
    if a["MASK"] or a["ALIBI"] or a["SOFTCAP"] or a["DROPOUT"]:
        return row[-1]
    if a.get("PACKED"):
        row = packed_tiles(kind, row)
    # A tile much longer than the queries only computes padding.
    row = [tile for tile in row if tile[0] <= 2 * max(a["seq_q"], 16)] or row[-1:]
    planes = a["query_ptr"].shape[0] * a["heads"]

    def programs(tile):
        if kind == "key":
            return triton.cdiv(a["seq_k"], tile[1]) * (planes // a["GROUP"])
        return triton.cdiv(a["seq_q"], tile[0]) * planes

    full = (tile for tile in row if programs(tile) >= multiprocessors)
    return next(full, max(row, key=programs))


def configured(kind: str):
    """Launches a kernel with the tile stored for the call, or tunes those of its table row."""
    table = TILES[kind]
    few = DECODE_TILES if kind == "forward" else {}
    configs = {tile: _config(tile) for row in (*table.values(), few.values()) for tile in row}

    def row(a):
        key = tile_key(a["query_ptr"].element_size(), a["BLOCK_D"], a["BLOCK_DV"])
        return [few[key]] if key in few and a["seq_q"] <= DECODE_ROWS else table[key]

    return stored_or_tuned(
        list(configs.values()), _config(INTERPRETER_TILE),
        ["tune_q", "tune_k", "BLOCK_D", "BLOCK_DV", "GROUP", "MASK", "MASK_ROWS", "ALIBI",
         "SOFTCAP", "DROPOUT", "HAS_LOW", "HAS_HIGH"],
        lambda _, arguments, **named: [configs[tile] for tile in row({**arguments, **named})],
        lambda _, a: configs[stored_tile(kind, row(a), a, processors())],
    )  # fmt: skip


# Lengths and positions vary from call to call: none may compile a kernel of its own.
UNSPECIALIZED = (
    "heads", "pitch", "seq_q", "seq_k", "low", "high", "shift", "threshold", "tune_q", "tune_k",
    "split_keys", "split_rows",
)  # fmt: skip


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def addressable(tensor: torch.Tensor) -> torch.Tensor:
    """The offsets inside a tile are 32-bit numbers."""
    return tensor if max(tensor.stride()[-2:]) < 2**22 else tensor.contiguous()


def problem(
    query, key, value, attn_mask, alibi_slopes, seed, dropout_p, scale, softcap,
    bottom_right, window_left, window_right,
):  # fmt: skip
    """The arguments that every attention kernel takes, by name."""
    batch, heads, seq_q, head_dim = query.shape
    heads_k, seq_k = key.shape[1:3]
    query, key, value = addressable(query), addressable(key), addressable(value)
    mask, mask_kind, mask_strides = None, NO_MASK, (0, 0, 0, 0)
    if attn_mask is not None:
        mask_kind = BOOL_MASK if attn_mask.dtype == torch.bool else ADDITIVE_MASK
        mask = attn_mask.view(torch.uint8) if mask_kind == BOOL_MASK else attn_mask
        mask_strides = mask.expand(batch, heads, seq_q, seq_k).stride()
    alibi_strides = (0, 0)
    if alibi_slopes is not None:
        alibi_strides = alibi_slopes.expand(batch, heads).stride()
    # The query at row i sees the keys i + low .. i + high.
    shift = seq_k - seq_q if bottom_right else 0
    has_low = 0 <= window_left < seq_q - 1 + shift
    has_high = 0 <= window_right < seq_k - 1 - shift
    threshold, keep_scale = dropout_rate(dropout_p)
    # max(scale q k^T) is scale max(q k^T) only for a positive scale.
    fold = not softcap and alibi_slopes is None and mask_kind != ADDITIVE_MASK and scale > 0
    arguments = {
        "query_ptr": query, "key_ptr": key, "value_ptr": value,
        "mask_ptr": mask, "alibi_ptr": alibi_slopes, "seed_ptr": seed if dropout_p else None,
    }  # fmt: skip
    for name, strides, dims in (
        ("q", query.stride(), "bhsd"), ("k", key.stride(), "bhsd"), ("v", value.stride(), "bhsd"),
        ("m", mask_strides, "bhqk"), ("a", alibi_strides, "bh"),
    ):  # fmt: skip
        arguments |= {
            f"stride_{name}{dim}": stride for dim, stride in zip(dims, strides, strict=True)
        }
    return arguments | {
        "heads": heads, "seq_q": seq_q, "seq_k": seq_k,
        "low": shift - window_left if has_low else 0,
        "high": shift + window_right if has_high else 0,
        "shift": shift,
        "scale": scale / softcap if softcap else scale, "cap": softcap,
        "threshold": threshold, "keep_scale": keep_scale,
        "tune_q": triton.next_power_of_2(seq_q), "tune_k": triton.next_power_of_2(seq_k),
        "HEAD_DIM": head_dim, "VALUE_DIM": value.shape[-1],
        "BLOCK_D": _padded(head_dim), "BLOCK_DV": _padded(value.shape[-1]),
        "GROUP": heads // max(heads_k, 1), "MASK": mask_kind, "MASK_ROWS": mask_strides[2] != 0,
        "ALIBI": alibi_slopes is not None, "SOFTCAP": softcap != 0.0, "DROPOUT": dropout_p != 0.0,
        "FOLD": fold, "HAS_LOW": has_low, "HAS_HIGH": has_high,
    }  # fmt: skip


def unpacked(seq_q: int) -> dict:
    """What the kernels that serve packed sequences take beyond that, for others."""
    return {"starts_q_ptr": None, "starts_k_ptr": None, "pitch": seq_q, "PACKED": False}


def packed_problem(
    query, key, value, starts_q, starts_k, longest_q, longest_k, alibi_slopes, seed, dropout_p,
    scale, softcap, bottom_right, window_left, window_right,
):  # fmt: skip
    """The arguments for sequences packed in (T, H, D) tensors: a batch of them, each of which is
    somewhere in the same tensor."""
    batch = starts_q.numel() - 1
    views = (
        addressable(tensor.transpose(0, 1)).expand(batch, -1, -1, -1)
        for tensor in (query, key, value)
    )
    arguments = problem(
        *views, None, alibi_slopes, seed, dropout_p, scale, softcap, False, -1, -1
    )  # fmt: skip
    # A window that hides nothing of any sequence would only overflow.
    has_low = 0 <= window_left < longest_q + longest_k
    has_high = 0 <= window_right < longest_q + longest_k
    return arguments | {
        "starts_q_ptr": starts_q.contiguous(), "starts_k_ptr": starts_k.contiguous(),
        "pitch": query.shape[0],
        "seq_q": longest_q, "seq_k": longest_k, "shift": int(bottom_right),
        "low": -window_left if has_low else 0, "high": window_right if has_high else 0,
        "tune_q": triton.next_power_of_2(longest_q), "tune_k": triton.next_power_of_2(longest_k),
        "HAS_LOW": has_low, "HAS_HIGH": has_high, "PACKED": True,
    }  # fmt: skip


def aot_case(kernel, tile, dtype, head_dim, pointers=(), mask_type=None, **features):
    """A launch to compile ahead of time: (kernel, signature, constexprs, options), rows contiguous.

    `pointers` are the kernel's own pointers to elements of `dtype`; without features it is causal.
    """
    constexprs = {
        "HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "BLOCK_D": _padded(head_dim),
        "BLOCK_DV": _padded(head_dim), "GROUP": 1, "MASK": NO_MASK, "MASK_ROWS": True,
        "ALIBI": False, "SINKS": False, "SOFTCAP": False, "DROPOUT": False, "FOLD": True,
        "HAS_LOW": False, "HAS_HIGH": True, "SUM_ROWS": False, "SUM_COLS": False, "PACKED": False,
        "SPLIT": False, "BLOCK_M": tile[0], "BLOCK_N": tile[1], **features,
    }  # fmt: skip
    elements = ("query_ptr", "key_ptr", "value_ptr", "grad_out_ptr", "out_ptr", *pointers)
    types = dict.fromkeys(elements, f"*{dtype}:16")
    types |= dict.fromkeys(
        ("delta_ptr", "row_lse_ptr", "lse_ptr", "part_ptr", "part_lse_ptr"), "*fp32:16"
    )
    types |= {"out_ptr": "*fp32:16"} if constexprs["SPLIT"] else {}
    types |= dict.fromkeys(("scale", "cap", "keep_scale", "grad_scale"), "fp32")
    if constexprs["MASK"]:
        types["mask_ptr"] = f"*{mask_type or 'u8'}:16"
    types |= {"alibi_ptr": "*fp32:16"} if constexprs["ALIBI"] else {}
    types |= {"sinks_ptr": "*fp32:16"} if constexprs["SINKS"] else {}
    types |= {"seed_ptr": "*i64:16"} if constexprs["DROPOUT"] else {}
    if constexprs["PACKED"]:
        types |= {"starts_q_ptr": "*i32:16", "starts_k_ptr": "*i32:16"}
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in constexprs:
            constants[name] = constexprs[name]
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr"):
            constants[name] = None
        elif name in ("stride_qd", "stride_kd", "stride_vd", "stride_gd", "stride_od", "stride_mk"):
            constants[name] = 1
        else:
            signature[name] = "i32:16" if name.startswith("stride_") else "i32"
    return kernel, signature, constants, {"num_warps": tile[2], "num_stages": tile[3]}
