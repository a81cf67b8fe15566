"""The dropout generator of csrc/philox.h for Triton kernels: the same bits, from the same counters.

The mask over a matrix of `cols` columns is a pure function of (seed, row, col): one Philox4x32-10
call gives the 8 16-bit halves of 8 neighbouring columns, so a tile draws BLOCK_N / 8 times a row
and the backward replays it whatever its own tiling is.
"""

import triton
import triton.language as tl


def dropout_rate(p: float) -> tuple[int, float]:
    """The rate as the kernels use it: (threshold of the 16-bit halves, scale of what is kept)."""
    exact = p * 65536.0
    threshold = int(exact)
    threshold += exact - threshold >= 0.5
    return threshold, 0.0 if threshold == 65536 else 65536.0 / (65536 - threshold)


@triton.jit
def dropout_keep(seed_ptr, threshold, rows, col_start, cols, BLOCK_N: tl.constexpr):
    """The keep mask (bool, [len(rows), BLOCK_N]) of the tile at column `col_start`.

    `rows` is an int64 block of row numbers, `col_start` a multiple of 8, `seed_ptr` the int64 pair
    (key, offset) and `threshold` an integer in [0, 65536]. Rows and columns past the matrix give
    bits that mean nothing.
    """
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    in_row = col_start // 8 + tl.arange(0, BLOCK_N // 8)
    group = rows.to(tl.int64)[:, None] * ((cols + 7) // 8) + in_row[None, :]
    # The shift is masked because int64 shifts keep the sign; .to() alone wraps.
    c0 = (group & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((group >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros_like(c0) + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3, 10)
    # Columns 2k and 2k + 1 of a group take the low and the high half of word k.
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    halves = tl.interleave(words & 0xFFFF, words >> 16)
    return halves.to(tl.int32) >= threshold
