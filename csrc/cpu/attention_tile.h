// A tile of scores: which of it is seen, and the step from the products q k^T to scores.
//   A tile is held in panels of 64 columns, each kQueryBlock rows: the GEMM writes it so, and a
//   tile of floats so held is a packed operand. Its rows go in groups of kGroup; what the band, or
//   a mask that is the same for all rows, hides is left out by groups and panels.
#pragma once

#include "attention.h"
#include "exp.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

struct Range {
  int64_t begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
  bool operator==(const Range& other) const = default;
};

struct Tile {
  int64_t b, h, q0, rows, k0, cols;
  Range panels;                          // that some row sees
  Range of_group[kQueryBlock / kGroup];  // the panels that a group of rows sees
  Range of_panel[kPanels];               // the rows, in whole groups, that see a panel

  // The columns of a panel that are worth a product: half of it where the keys end there.
  int64_t width_of(int64_t panel) const {
    return cols - panel * kPanel > kPanel / 2 ? kPanel : kPanel / 2;
  }
};

// Where element (row r, column 0) of a panel lies in a tile.
inline constexpr int64_t tile_offset(int64_t panel, int64_t r) {
  return (panel * kQueryBlock + r) * kPanel;
}

template <typename C>
struct TileBuffer : Buffer<C> {
  TileBuffer() = default;
  explicit TileBuffer(int64_t cols) : Buffer<C>(tile_offset(panels(cols), 0)) {}
};

// x in the lanes whose bit is set, -inf in the others.
template <typename A>
inline Vectorized<A> hide_lanes(const Vectorized<A>& x, uint32_t bits) {
  const Vectorized<A> hidden(-kInfinity<A>);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(bits), x);
  }
#endif
  return keep_lanes(x, bits) | keep_lanes(hidden, ~bits);
}

// x where `prob` is not 0: what a hidden key brings may be NaN.
template <typename A>
inline Vectorized<A> where_seen(const Vectorized<A>& prob, const Vectorized<A>& x) {
  const Vectorized<A> zero(A(0));
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(prob, zero, _CMP_NEQ_UQ), x);
  }
#endif
  return Vectorized<A>::blendv(x, zero, prob == zero);
}

template <typename C, typename A>
inline void store_two(C* p, const Vectorized<A>& low, const Vectorized<A>& high) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<C, at::BFloat16>) {
    _mm512_storeu_si512(p, to_bf16(low, high));
    return;
  }
#endif
  store_vec<C>(p, low);
  store_vec<C>(p + Vectorized<A>::size(), high);
}

// Bits of up to 64 keys of a bool mask; those past n are set.
inline uint64_t mask_bits(const char* src, int64_t stride, int64_t n) {
  uint64_t hidden = 0;
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if (stride == 1) {
    const __mmask64 some = n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(some, src);
    return ~_mm512_mask_testn_epi8_mask(some, bytes, bytes);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  for (; stride == 1 && i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
    hidden |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(zero))) << i;
  }
#endif
  for (; i < n; ++i) hidden |= static_cast<uint64_t>(src[i * stride] == 0) << i;
  return ~hidden;
}

template <typename E, typename A>
inline void widen_mask(const char* src, int64_t stride, int64_t n, A* bias) {
  if (stride == sizeof(E)) {
    const E* in = reinterpret_cast<const E*>(src);
    for (int64_t i = 0; i < n; ++i) bias[i] = static_cast<A>(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      bias[i] = static_cast<A>(*reinterpret_cast<const E*>(src + i * stride));
    }
  }
}

// A row of a mask as numbers to add: -inf hides the key.
template <typename A>
inline void load_bias(const Mask& mask, const char* src, int64_t n, A* bias) {
  switch (mask.type) {
    case at::kBFloat16:
      return widen_mask<at::BFloat16>(src, mask.strides[3], n, bias);
    case at::kHalf:
      return widen_mask<at::Half>(src, mask.strides[3], n, bias);
    case at::kDouble:
      return widen_mask<double>(src, mask.strides[3], n, bias);
    default:
      return widen_mask<float>(src, mask.strides[3], n, bias);
  }
}

// The tile at hand, and what turns the products q k^T of its rows into scores.
template <typename T>
class Scores {
 public:
  using A = accumulate_t<T>;
  using Vec = Vectorized<A>;

  explicit Scores(const Problem<T>& p) : p_(p), bias_(p.mask.adds() ? p.key_block : 0) {}

  const Tile& tile() const { return t_; }

  // Takes up query block i of head h against key block j; whether any of it is seen.
  bool move_to(int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t q0 = i * kQueryBlock, k0 = j * p_.key_block;
    t_ = {b, h, q0, p_.rows_of(i), k0, p_.cols_of(j)};
    t_.panels = {0, fastnn::panels(t_.cols)};
    if (p_.mask.of_keys()) {
      load_mask(0);
      while (!t_.panels.empty() && hidden(t_.panels.end - 1)) --t_.panels.end;
      while (!t_.panels.empty() && hidden(t_.panels.begin)) ++t_.panels.begin;
    }
    Range seen;
    std::fill_n(t_.of_panel, kPanels, Range{});
    for (int64_t r = 0; r < t_.rows; r += kGroup) {
      const int64_t after = std::min(r + kGroup, t_.rows);
      const int64_t first = std::max<int64_t>(p_.band.begin(q0 + r) - k0, 0);
      const int64_t last = std::min(p_.band.end(q0 + after - 1) - k0, t_.cols);
      Range group{std::max(t_.panels.begin, first / kPanel),
                  std::min(t_.panels.end, fastnn::panels(last))};
      if (first >= last || group.empty()) group = {};
      t_.of_group[r / kGroup] = group;
      for (int64_t panel = group.begin; panel < group.end; ++panel) {
        Range& rows = t_.of_panel[panel];
        rows = {rows.empty() ? r : rows.begin, after};
      }
      if (group.empty()) continue;
      seen = seen.empty() ? group
                          : Range{std::min(seen.begin, group.begin), std::max(seen.end, group.end)};
    }
    t_.panels = seen;
    return !seen.empty();
  }

  // Finishes the panels `seen` of row r, which lie `stride` apart from s on; the scores are to be
  // multiplied by factor(). `capped` (or null) gets the soft-capped products, of which the backward
  // takes the derivative.
  void finish_row(int64_t r, const Range& seen, A* s, int64_t stride, A* capped) {
    const int64_t q = t_.q0 + r;
    if (p_.mask.data && !p_.mask.of_keys()) load_mask(r);
    const int64_t begin = p_.band.begin(q) - t_.k0;
    const int64_t end = std::min(p_.band.end(q) - t_.k0, t_.cols);
    for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
      A* x = s + panel * stride;
      const int64_t col = panel * kPanel;
      if (!p_.plain) transform(q, col, x, capped ? capped + panel * stride : nullptr);
      if (p_.mask.hides() && ~seen_bits_[panel]) {
        for (int64_t c = 0; c < kPanel; c += kLane) {
          hide_lanes(Vec::loadu(x + c), seen_bits_[panel] >> c).store(x + c);
        }
      }
      const int64_t from = std::clamp<int64_t>(begin - col, 0, kPanel);
      const int64_t to = std::clamp<int64_t>(end - col, from, kPanel);
      if (from > 0) std::fill(x, x + from, -kInfinity<A>);
      if (to < kPanel) std::fill(x + to, x + kPanel, -kInfinity<A>);
    }
  }

 private:
  static constexpr int64_t kLane = Vec::size();

  // What the mask says to row r of the tile.
  void load_mask(int64_t r) {
    const char* src = p_.mask.at(t_.b, t_.h, t_.q0 + r, t_.k0);
    if (p_.mask.adds()) return load_bias(p_.mask, src, t_.cols, bias_.get());
    for (int64_t c = 0; c < t_.cols; c += kPanel) {
      seen_bits_[c / kPanel] = mask_bits(src + c * p_.mask.strides[3], p_.mask.strides[3],
                                         std::min(kPanel, t_.cols - c));
    }
  }

  bool hidden(int64_t panel) const {
    const int64_t c = panel * kPanel, n = std::min(kPanel, t_.cols - c);
    if (p_.mask.hides()) return !(seen_bits_[panel] << (kPanel - n));
    const A* bias = bias_.get() + c;
    return std::all_of(bias, bias + n, [](A x) { return x == -kInfinity<A>; });
  }

  void transform(int64_t q, int64_t col, A* x, A* capped) const {
    const Vec scale(p_.scale), hidden(-kInfinity<A>);
    const Vec inside(p_.softcap ? p_.scale / p_.softcap : A(0)), cap(p_.softcap);
    const Vec slope(p_.slopes ? p_.slopes[t_.b * p_.heads + t_.h] : A(0));
    const Vec at_row(static_cast<A>(q + p_.band.shift - t_.k0 - col));
    for (int64_t c = 0; c < kPanel && col + c < t_.cols; c += kLane) {
      Vec y = Vec::loadu(x + c);
      y = p_.softcap ? (y * inside).tanh() * cap : y * scale;
      if (capped) y.store(capped + c);
      if (p_.slopes) y = y - slope * (at_row - Vec::arange(static_cast<A>(c), 1)).abs();
      if (p_.mask.adds()) {
        const Vec add = Vec::loadu(bias_.get() + col + c);
        y = Vec::blendv(y + add, hidden, add == hidden);
      }
      y.store(x + c);
    }
  }

  const Problem<T>& p_;
  Tile t_{};
  uint64_t seen_bits_[kPanels];
  Buffer<A> bias_;
};

// The keep bits of the panels `seen` of row q, a word per panel; their room is kKeepWords.
inline constexpr int64_t kKeepWords = kPanels + kDrawn / kPanel;

template <typename T>
inline void draw_keep(const Problem<T>& p, const Tile& t, int64_t r, const Range& seen,
                      uint64_t* keep) {
  dropout_bits(p.philox, p.rate, p.row_index(t.b, t.h, t.q0 + r), p.dropout_cols,
               t.k0 + seen.begin * kPanel, seen.size() * kPanel,
               reinterpret_cast<uint16_t*>(keep + seen.begin));
}

// Panels of C = A B over the rows that see them.
template <typename C>
inline void tile_products(const Tile& t, int64_t depth, const C* a, int64_t lda, const C* packed,
                          accumulate_t<C>* c) {
  for (int64_t panel = t.panels.begin; panel < t.panels.end; ++panel) {
    const Range& rows = t.of_panel[panel];
    if (rows.empty()) continue;
    tile_gemm<C>(rows.size(), t.width_of(panel), depth, a + rows.begin * lda, lda,
                 packed + panel * kPanel * pad_k<C>(depth), c + tile_offset(panel, rows.begin),
                 kPanel, false);
  }
}

// C += A B for row-major A (rows of the tile x its keys, 0 where a panel that the group sees is
// hidden) and B packed from the tile's keys.
template <typename C>
inline void add_rows(const Tile& t, int64_t n, const C* a, int64_t lda, const C* packed,
                     accumulate_t<C>* c, int64_t ldc) {
  const int64_t groups = ceil_div(t.rows, kGroup), depth = pad_k<C>(t.cols);
  for (int64_t g = 0; g < groups;) {
    const int64_t row = g * kGroup;
    const Range seen = t.of_group[g];
    while (g < groups && t.of_group[g] == seen) ++g;
    if (seen.empty()) continue;
    const int64_t rows = std::min(g * kGroup, t.rows) - row, key = seen.begin * kPanel;
    const int64_t keys = std::min(seen.end * kPanel, t.cols) - key;
    for (int64_t j = 0; j < n; j += kPanel) {
      tile_gemm<C>(rows, std::min(kPanel, n - j), keys, a + row * lda + key, lda,
                   packed + j * depth + key * kPanel, c + row * ldc + j, ldc, true);
    }
  }
}

}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn
