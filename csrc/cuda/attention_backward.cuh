// What the passes of the attention backward share: their tiles, and the step from a tile's products
// to P and dS.
#pragma once

#include "cuda/attention_tile.cuh"

namespace fastnn {
namespace attention {

// kKeys: rows are keys. kFull serves everything; without, nothing but the band and a positive
// scale, and nothing packed.
template <typename T, int kDim, bool kKeys, bool kFull>
struct BackwardShape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kThreads = kHalf || kDim < 256 ? 128 : 64;
  static constexpr int kRows = kThreads / 2;
  static constexpr int kCols =
      kHalf ? (kDim == 256 || (kFull && kDim == 128) ? 32 : 64) : 4096 / kDim;
  static constexpr int kParts = kKeys && kDim == 256 ? 2 : 1;
  static constexpr int kShared =
      (2 * (kRows + kCols) * static_cast<int>(sizeof(T)) + 8) * kDim + 8 * kCols;
};

// Whether rows of the query, the key, the value and dO can be copied 16 bytes at a time.
struct Aligned {
  bool query, key, value, grad_out;

  explicit Aligned(const AttentionBackward& p)
      : query(is_aligned(p.query, p.storage)),
        key(is_aligned(p.key, p.storage)),
        value(is_aligned(p.value, p.storage)),
        grad_out(is_aligned(p.grad_out, p.storage)) {}
};

// The scores s and dO V^T in ds become P keep (less its scale) and dS: the gradient of scale q k^T,
// or with at_mask that of the scores. keep(bits) draws them; lse(line, col) and delta(line, col)
// are the query's.
template <typename T, bool kFull, int kGroups, typename Keep, typename Lse, typename Delta>
__device__ __forceinline__ void finish_tile(const AttentionBackward& p, const Line (&lines)[2],
                                            int col0, int64_t mask_stride, bool whole, bool at_mask,
                                            const Keep& draw, const Lse& lse, const Delta& delta,
                                            float (&s)[1][kGroups][4], float (&ds)[1][kGroups][4]) {
  const bool dropout = kFull && p.seed != nullptr;
  uint32_t keep[1] = {~0u};
  if constexpr (kFull) {
    if (dropout) draw(keep);
  }
  for_each(s, [&](int i, int j, int e, int line, int col) {
    float& x = ds[i][j][e];
    if (dropout) x = keep[i] >> (4 * j + e) & 1 ? x * p.keep_scale : 0.f;
    x -= delta(line, col);
  });
  if constexpr (kFull) {
    finish_scores<T>(p, lines, col0, mask_stride, s, [&](int i, int j, int e, float slope) {
      if (!at_mask) ds[i][j][e] *= slope;
    });
  }
  if (!whole) hide_outside(lines, col0, s);
  const float factor = kFull ? kLog2e : p.scale * kLog2e;
  for_each(s, [&](int i, int j, int e, int line, int col) {
    const float prob = exp2_approx(fmaf(s[i][j][e], factor, -lse(line, col)));
    // What a hidden key brings may be NaN.
    ds[i][j][e] = prob == 0.f ? 0.f : prob * ds[i][j][e];
    s[i][j][e] = keep[i] >> (4 * j + e) & 1 ? prob : 0.f;
  });
}

// A row's (or column's) lse and delta, of a head whose rows begin at `first`; one that is none has
// P = 0.
template <bool kPacked>
__device__ __forceinline__ float row_stat(const AttentionBackward& p, int which, int64_t first,
                                          int queries, int query) {
  if (query >= queries) return which == 0 ? INFINITY : 0.f;
  return p.rows[which * all_rows<kPacked>(p) + first + query];
}

}  // namespace attention
}  // namespace fastnn
