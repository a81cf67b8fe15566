// How attention's operands are loaded: rows, packed panels, and the exact path around NaN.
#pragma once

#include "attention.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

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

// pack_b for rows that lie in memory as they are: pairs of bfloat16 rows are interleaved in
// registers.
template <typename T, typename C>
inline void pack_lines(const T* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n,
                       C* packed) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, C> && std::is_same_v<C, at::BFloat16>) {
    if (stride_n == 1) {
      const int64_t depth = pad_k<C>(k);
      alignas(64) uint16_t order[2][32];
      for (int i = 0; i < 64; ++i) order[i / 32][i % 32] = i / 2 + i % 2 * 32;
      const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
      for (int64_t j = 0; j < panels(n) * kPanel; j += 32) {
        C* line = packed + j / kPanel * kPanel * depth + j % kPanel * 2;
        const int64_t cols = std::clamp<int64_t>(n - j, 0, 32);
        const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << cols) - 1);
        for (int64_t i = 0; i < k; i += 2) {
          const T* row = b + i * stride_k + j;
          const __m512i x = _mm512_maskz_loadu_epi16(some, row);
          const __m512i y = _mm512_maskz_loadu_epi16(i + 1 < k ? some : 0, row + stride_k);
          _mm512_storeu_si512(line + i * kPanel, _mm512_permutex2var_epi16(x, first, y));
          _mm512_storeu_si512(line + i * kPanel + 32, _mm512_permutex2var_epi16(x, second, y));
        }
      }
      return;
    }
  }
#endif
  pack_b<T, C>(b, stride_k, stride_n, k, n, packed);
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
    const int64_t key = p.first_key + j * p.key_block;
    pack_b<T, C>(p.key.at(b, h, key), p.key.col, p.key.row, p.dim, cols, k.get() + at * size_k);
    C* packed = v.get() + at * size_v;
    pack_lines<T, C>(p.value.at(b, h, key), p.value.row, p.value.col, cols, p.value_dim, packed);
    v_finite.get()[at] = all_finite(packed, packed_size<C>(cols, p.value_dim));
  }
};

}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn
