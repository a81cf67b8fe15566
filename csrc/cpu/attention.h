// What the forward and the backward of CPU attention share: the problem's views, the scores of a
// tile, and how tiles are loaded.
//   scores = softcap(scale q k^T) - slope |i + shift - j| + mask, -inf outside of the band
//   A tile is kQueryBlock rows of one head by kKeyBlock keys; both are constants of the shape, so
//   that no thread count changes a sum.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "../check.h"
#include "common.h"
#include "dropout.h"
#include "exp.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

inline constexpr int64_t kQueryBlock = 96;  // a multiple of the micro-kernel's 6 rows
inline constexpr int64_t kKeyBlock = 256;
inline constexpr int64_t kRowPad = kPanel;  // columns of a tile are padded to whole panels

inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

template <typename A>
inline constexpr A kInfinity = std::numeric_limits<A>::infinity();

// A (batch, head, row, column) tensor of any strides.
template <typename T>
struct View {
  T* data;
  int64_t batch, head, row, col;

  View(T* data, const at::Tensor& t)
      : data(data), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)), col(t.stride(3)) {}
  T* at(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * row; }
};

template <typename T>
View<const T> view(const at::Tensor& t) {
  return View<const T>(t.const_data_ptr<T>(), t);
}

struct Mask {
  const char* data = nullptr;
  at::ScalarType type;
  int64_t sizes[4], strides[4];  // in bytes, 0 where broadcast

  const char* at(int64_t b, int64_t h, int64_t q, int64_t k) const {
    return data + b * strides[0] + h * strides[1] + q * strides[2] + k * strides[3];
  }
};

inline Mask make_mask(const std::optional<at::Tensor>& tensor) {
  Mask mask;
  if (!tensor.has_value()) return mask;
  mask.data = static_cast<const char*>(tensor->const_data_ptr());
  mask.type = tensor->scalar_type();
  const int64_t missing = 4 - tensor->dim();
  for (int64_t i = 0; i < 4; ++i) {
    mask.sizes[i] = i < missing ? 1 : tensor->size(i - missing);
    mask.strides[i] = mask.sizes[i] == 1 ? 0 : tensor->stride(i - missing) * tensor->itemsize();
  }
  return mask;
}

// The keys [begin(q), end(q)) that the band lets row q see.
struct Band {
  int64_t keys, shift, left, right;

  int64_t begin(int64_t q) const {
    return left < 0 ? 0 : std::clamp<int64_t>(q + shift - left, 0, keys);
  }
  int64_t end(int64_t q) const {
    return right < 0 ? keys : std::clamp<int64_t>(q + shift + right + 1, 0, keys);
  }
};

// Arguments that both directions take, as the schema has them.
struct Options {
  const std::optional<at::Tensor>&mask, &slopes, &sinks, &seed;
  double dropout_p, scale, softcap;
  bool bottom_right;
  int64_t window_left, window_right;
};

// (batch, heads) values of the accumulation type, or undefined.
inline at::Tensor per_head(const std::optional<at::Tensor>& values, const at::Tensor& query,
                           at::ScalarType type) {
  if (!values.has_value()) return {};
  return values->to(type).expand({query.size(0), query.size(1)}).contiguous();
}

template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  int64_t batch, heads, kv_heads, group, queries, keys, dim, value_dim;
  int64_t query_blocks, key_block, key_blocks;
  View<const T> query, key, value;
  Mask mask;
  at::Tensor slopes_tensor, sinks_tensor;
  const A *slopes, *sinks;
  Band band;
  A scale, softcap;
  // Nothing but a positive scale stands between q k^T and the softmax: the scale is then folded
  // into the exponential.
  bool plain;
  bool dropout;
  PhiloxState philox{};
  DropoutRate rate;

  Problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options& o)
      : batch(q.size(0)),
        heads(q.size(1)),
        kv_heads(k.size(1)),
        group(kv_heads ? heads / kv_heads : 0),
        queries(q.size(2)),
        keys(k.size(2)),
        dim(q.size(3)),
        value_dim(v.size(3)),
        query_blocks(ceil_div(queries, kQueryBlock)),
        key_block(std::clamp(round_up(keys, kPanel), kPanel, kKeyBlock)),
        key_blocks(ceil_div(keys, key_block)),
        query(view<T>(q)),
        key(view<T>(k)),
        value(view<T>(v)),
        mask(make_mask(o.mask)),
        slopes_tensor(per_head(o.slopes, q, c10::CppTypeToScalarType<A>::value)),
        sinks_tensor(per_head(o.sinks, q, c10::CppTypeToScalarType<A>::value)),
        slopes(slopes_tensor.defined() ? slopes_tensor.const_data_ptr<A>() : nullptr),
        sinks(sinks_tensor.defined() ? sinks_tensor.const_data_ptr<A>() : nullptr),
        band{keys, o.bottom_right ? keys - queries : 0, o.window_left, o.window_right},
        scale(static_cast<A>(o.scale)),
        softcap(static_cast<A>(o.softcap)),
        plain(!softcap && !slopes && !mask.data && scale > 0),
        dropout(o.dropout_p > 0),
        rate(dropout_rate(o.dropout_p)) {
    if (dropout) philox = philox_state(*o.seed);
  }

  // What a score of finish_scores is still to be multiplied by.
  A factor() const { return plain ? scale : A(1); }
  int64_t rows_of(int64_t i) const { return std::min(kQueryBlock, queries - i * kQueryBlock); }
  int64_t cols_of(int64_t j) const { return std::min(key_block, keys - j * key_block); }
  // The key blocks [first, last) that some row of query block i may see.
  int64_t first_block(int64_t i) const { return band.begin(i * kQueryBlock) / key_block; }
  int64_t last_block(int64_t i) const {
    return ceil_div(band.end(i * kQueryBlock + rows_of(i) - 1), key_block);
  }
  int64_t row_index(int64_t b, int64_t h, int64_t q) const { return (b * heads + h) * queries + q; }
};

// A tile in the problem: its head, first row and first key, and extents.
struct Tile {
  int64_t b, h, q0, rows, k0, cols;
};

// Query block i against the keys of block j up to the last one that the band shows to a row of it.
template <typename T>
inline Tile tile_at(const Problem<T>& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const int64_t q0 = i * kQueryBlock, rows = p.rows_of(i), k0 = j * p.key_block;
  const int64_t seen = round_up(p.band.end(q0 + rows - 1) - k0, kPanel);
  return {b, h, q0, rows, k0, std::min(p.cols_of(j), seen)};
}

// C += A B for the first k rows of a B that was packed with `depth` of them.
template <typename C>
inline void gemm_first_rows(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda,
                            const C* packed, int64_t depth, accumulate_t<C>* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += kPanel) {
    tile_gemm<C>(m, std::min(kPanel, n - j), k, a, lda, packed + j * pad_k<C>(depth), c + j, ldc,
                 true);
  }
}

// Whether every number is finite: the exponent bits are not all ones.
template <typename C>
inline bool all_finite(const C* p, int64_t n) {
  using U = std::conditional_t<sizeof(C) == 2, uint16_t,
                               std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>>;
  constexpr U kExponent = std::is_same_v<C, double>         ? U(0x7FF0000000000000)
                          : std::is_same_v<C, at::BFloat16> ? U(0x7F80)
                                                            : U(0x7F800000);
  const U* bits = reinterpret_cast<const U*>(p);
  U bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (bits[i] & kExponent) == kExponent;
  return bad == 0;
}

// rows x cols elements of any strides as a row-major matrix of C, zeros up to `padded` columns.
template <typename T, typename C>
inline void load_rows(const T* src, int64_t stride_row, int64_t stride_col, int64_t rows,
                      int64_t cols, C* dst, int64_t padded) {
  using Vec = AccVec<T>;
  constexpr int64_t kLane = Vec::size();
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = src + r * stride_row;
    C* out = dst + r * padded;
    if constexpr (std::is_same_v<T, C>) {
      if (stride_col == 1) {
        std::memcpy(out, in, cols * sizeof(C));
      } else {
        for (int64_t c = 0; c < cols; ++c) out[c] = in[c * stride_col];
      }
    } else {
      int64_t c = 0;
      if (stride_col == 1) {
        for (; c + kLane <= cols; c += kLane) store_vec<C>(out + c, load_vec(in + c));
      }
      for (; c < cols; ++c) out[c] = static_cast<C>(in[c * stride_col]);
    }
    std::fill(out + cols, out + padded, C(0));
  }
}

// dst[c][r] = src[r][c], dst of `padded` columns whose last are zero; blocked so that the lines of
// both sides stay in L1.
template <typename T, typename C>
inline void transpose(const T* src, int64_t stride_row, int64_t stride_col, int64_t rows,
                      int64_t cols, C* dst, int64_t stride_dst, int64_t padded) {
  constexpr int64_t kBlock = 16;
  for (int64_t c0 = 0; c0 < cols; c0 += kBlock) {
    const int64_t c1 = std::min(cols, c0 + kBlock);
    for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
      const int64_t r1 = std::min(rows, r0 + kBlock);
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) {
          dst[c * stride_dst + r] = static_cast<C>(src[r * stride_row + c * stride_col]);
        }
      }
    }
    for (int64_t c = c0; c < c1; ++c) {
      std::fill(dst + c * stride_dst + rows, dst + c * stride_dst + padded, C(0));
    }
  }
}

// c[m][n] += sum over k of a[m][k] b[k][n], a zero in `a` hiding row k of b entirely: the exact
// path of tiles whose b holds NaN or infinities that 0 * b would let out.
template <typename E, typename T, typename A>
inline void accumulate_visible(int64_t m, int64_t n, int64_t k, const E* a, int64_t a_row,
                               int64_t a_col, const T* b, int64_t b_row, int64_t b_col, A* c,
                               int64_t c_row, int64_t c_col) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t p = 0; p < k; ++p) {
      const A scalar = static_cast<A>(a[i * a_row + p * a_col]);
      if (scalar == A(0)) continue;
      for (int64_t j = 0; j < n; ++j) {
        c[i * c_row + j * c_col] += scalar * static_cast<A>(b[p * b_row + j * b_col]);
      }
    }
  }
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

// Row q of the mask as numbers to add: -inf hides the key.
template <typename A>
inline void load_mask_row(const Mask& mask, const char* src, int64_t n, A* bias) {
  switch (mask.type) {
    case at::kBool:
      for (int64_t i = 0; i < n; ++i) {
        bias[i] = src[i * mask.strides[3]] ? A(0) : -kInfinity<A>;
      }
      return;
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

// Turns the products q k^T of a tile into scores (to be multiplied by factor()), hidden positions
// and the padding to whole panels being -inf. `bias` holds one row. `capped` (or null) gets the
// soft-capped products, of which the backward takes the derivative.
template <typename T>
inline void finish_scores(const Problem<T>& p, const Tile& t, accumulate_t<T>* s, int64_t ld,
                          accumulate_t<T>* bias, accumulate_t<T>* capped) {
  using A = accumulate_t<T>;
  using Vec = Vectorized<A>;
  constexpr int64_t kLane = Vec::size();
  const Vec hidden(-kInfinity<A>);
  const int64_t width = round_up(t.cols, kRowPad);
  for (int64_t r = 0; r < t.rows; ++r) {
    A* row = s + r * ld;
    const int64_t q = t.q0 + r;
    if (!p.plain) {
      if (p.softcap) {
        const Vec inside(p.scale / p.softcap), cap(p.softcap);
        for (int64_t c = 0; c < t.cols; c += kLane) {
          const Vec value = (Vec::loadu(row + c) * inside).tanh() * cap;
          value.store(row + c);
          if (capped) value.store(capped + r * ld + c);
        }
      } else {
        const Vec scale(p.scale);
        for (int64_t c = 0; c < t.cols; c += kLane) (Vec::loadu(row + c) * scale).store(row + c);
      }
      if (p.slopes) {
        const Vec slope(p.slopes[t.b * p.heads + t.h]);
        const Vec at_row(static_cast<A>(q + p.band.shift - t.k0));
        for (int64_t c = 0; c < t.cols; c += kLane) {
          const Vec distance = (at_row - Vec::arange(static_cast<A>(c), 1)).abs();
          (Vec::loadu(row + c) - slope * distance).store(row + c);
        }
      }
      if (p.mask.data) {
        if (r == 0 || p.mask.strides[2]) {
          load_mask_row(p.mask, p.mask.at(t.b, t.h, q, t.k0), t.cols, bias);
        }
        for (int64_t c = 0; c < t.cols; c += kLane) {
          const Vec add = Vec::loadu(bias + c);
          Vec::blendv(Vec::loadu(row + c) + add, hidden, add == hidden).store(row + c);
        }
      }
    }
    const int64_t begin = std::clamp<int64_t>(p.band.begin(q) - t.k0, 0, t.cols);
    const int64_t end = std::clamp<int64_t>(p.band.end(q) - t.k0, begin, t.cols);
    std::fill(row, row + begin, -kInfinity<A>);
    std::fill(row + end, row + width, -kInfinity<A>);
  }
}

// K and V of one (batch, kv head), packed by key block.
template <typename T, typename C>
struct Keys {
  const Problem<T>& p;
  int64_t size_k, size_v;  // elements of a block
  Buffer<C> k, v;          // K^T (dim x keys) and V (keys x value_dim) of each block
  Buffer<uint8_t> v_finite;

  Keys(const Problem<T>& p, int64_t heads)
      : p(p),
        size_k(packed_size<C>(p.dim, p.key_block)),
        size_v(packed_size<C>(p.key_block, p.value_dim)),
        k(heads * p.key_blocks * size_k),
        v(heads * p.key_blocks * size_v),
        v_finite(heads * p.key_blocks) {}

  // Packs key block j of (b, h) as block j of the slot-th head held.
  void pack(int64_t b, int64_t h, int64_t j, int64_t slot) const {
    const int64_t at = slot * p.key_blocks + j, cols = p.cols_of(j);
    pack_b<T, C>(p.key.at(b, h, j * p.key_block), p.key.col, p.key.row, p.dim, cols,
                 k.get() + at * size_k);
    C* packed = v.get() + at * size_v;
    pack_b<T, C>(p.value.at(b, h, j * p.key_block), p.value.row, p.value.col, cols, p.value_dim,
                 packed);
    v_finite.get()[at] = all_finite(packed, packed_size<C>(cols, p.value_dim));
  }
};

// Tasks in an order in which any contiguous share of them is about the same work when the work
// grows (or falls) along the blocks, as it does under a causal mask: 0, n-1, 1, n-2, ...
inline int64_t balanced(int64_t t, int64_t n) { return t % 2 ? n - 1 - t / 2 : t / 2; }

// Tasks of `work` multiplications each that make a thread worth waking.
inline int64_t grain(double work) {
  return std::max<int64_t>(1, static_cast<int64_t>(1e6 / std::max(work, 1.0)));
}

// Whether giving each thread whole heads keeps the threads as busy as splitting the heads would,
// where splitting costs `overhead` times the work.
inline bool whole_heads(int64_t heads, double overhead) {
  const int64_t threads = at::get_num_threads();
  return static_cast<double>(ceil_div(heads, threads) * threads) <= heads * overhead;
}

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key,
                     const at::Tensor& value, const Options& options);

}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn
