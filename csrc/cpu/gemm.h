// C = (C +) A B on one thread, with B packed into panels of 64 columns: the GEMM inside every CPU
// kernel, called per tile so that the caller's epilogue finds the tile in cache.
//   Tiles of float and double run on the micro-kernel below; tiles of bfloat16 on AMX through
//   libtorch's brgemm where the CPU has it, else on AVX512-BF16 (dpbf16), else as float.
//   Half is multiplied as float. Accumulation is float (double for double).
//   A panel is K x 64, row by row; of bfloat16, pairs of rows are interleaved (VNNI), K padded to
//   even with zeros. The last panel is padded with zero columns.
//   Floor: on Zen 4 the FMAs of a core give 115 GFLOP/s in float and 231 in bfloat16. Tiles alone
//   reach 100 and 222, on Zen 5 262 and 540 (torch's own products 105 and 450); register tiles of
//   12x32, 14x32, 8x48 and 9x48, and prefetching, were slower or within the noise, and libtorch's
//   brgemm in float was even with the kernel below.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <functional>

#include "vec.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {

inline constexpr int64_t kPanel = 64;
// Depth of one pass over a panel, which stays in cache while A's rows go by. The sums of a pass are
// added up apart: short passes halve the rounding error of float sums, at 1 to 2 % of the time. Of
// bfloat16, whose panels come from L2 in any case, 1024 is 2 % faster than 512 at K = 768.
template <typename C>
inline constexpr int64_t kDepth = std::is_same_v<C, at::BFloat16> ? 1024 : 128;

inline bool has_amx_bf16() {
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has;
}

// Calls f with a value of the type in which tiles of T are multiplied on this machine.
template <typename T, typename F>
inline auto visit_tile_type(const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    return f(double{});
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      if (has_amx_bf16() || kHasAvx512Bf16) return f(at::BFloat16{});
    }
#endif
    return f(float{});
  }
}

template <typename C>
inline int64_t pad_k(int64_t k) {
  return std::is_same_v<C, at::BFloat16> ? (k + 1) / 2 * 2 : k;
}

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

template <typename C>
inline int64_t packed_size(int64_t k, int64_t n) {
  return pad_k<C>(k) * panels(n) * kPanel;
}

// dst[j][i] = src[i][j] for rows x cols elements: blocks of 16 x 16 in registers, the rest one by
// one.
template <typename W>
inline void transpose(const W* src, int64_t ld_src, W* dst, int64_t ld_dst, int64_t rows,
                      int64_t cols) {
  constexpr int64_t kBlock = 16;
  const int64_t full_rows = rows / kBlock * kBlock, full_cols = cols / kBlock * kBlock;
  for (int64_t i = 0; i < full_rows; i += kBlock) {
    for (int64_t j = 0; j < full_cols; j += kBlock) {
      at::vec::transpose_mxn<W, kBlock, kBlock>(src + i * ld_src + j, ld_src, dst + j * ld_dst + i,
                                                ld_dst);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < full_rows ? full_cols : 0; j < cols; ++j) {
      dst[j * ld_dst + i] = src[i * ld_src + j];
    }
  }
}

// n elements of T, `stride` apart, as C.
template <typename T, typename C>
inline void convert_row(const T* in, int64_t stride, int64_t n, C* out) {
  if constexpr (std::is_same_v<C, accumulate_t<T>>) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int64_t width = std::min(kLanes<T>, n - i);
        load_vec(in + i, width).store(out + i, width);
      }
      return;
    }
  }
  if constexpr (std::is_same_v<T, C>) {
    if (stride == 1) {
      std::copy_n(in, n, out);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(in[i * stride]);
}

#if defined(CPU_CAPABILITY_AVX512)
// A line of a bfloat16 panel: n <= 64 elements of two rows in turn; zeros for a null second row.
inline void interleave(const at::BFloat16* first, const at::BFloat16* second, int64_t n,
                       at::BFloat16* line) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < n; j += 32) {
    const __mmask32 mask = n - j >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - j)) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(mask, first + j);
    const __m512i b = second ? _mm512_maskz_loadu_epi16(mask, second + j) : _mm512_setzero_si512();
    _mm512_storeu_si512(line + 2 * j, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(line + 2 * j + 32, _mm512_permutex2var_epi16(a, high, b));
  }
}
#endif

// Packs the panel of columns [64 * panel, ...) of the k x n matrix b.
template <typename T, typename C>
inline void pack_panel(const T* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n,
                       int64_t panel, C* packed) {
  constexpr int64_t kPair = std::is_same_v<C, at::BFloat16> ? 2 : 1;
  C* out = packed + panel * kPanel * pad_k<C>(k);
  const T* in = b + panel * kPanel * stride_n;
  const int64_t cols = std::min(kPanel, n - panel * kPanel);
  int64_t done = 0;  // rows of b
  if constexpr (std::is_same_v<T, C> && sizeof(T) * kPair == sizeof(float)) {
    if (stride_k == 1 && stride_n % kPair == 0) {
      // Floats, or pairs of bfloat16 taken as one word: columns of b become lines of the panel.
      transpose(reinterpret_cast<const float*>(in), stride_n / kPair, reinterpret_cast<float*>(out),
                kPanel, cols, k / kPair);
      done = k / kPair * kPair;
    }
  }
  for (int64_t i = done; i < k; i += kPair) {
    C* line = out + i * kPanel;
    const T* source = in + i * stride_k;
    if constexpr (kPair == 1) {
      convert_row(source, stride_n, cols, line);
    } else {
#if defined(CPU_CAPABILITY_AVX512)
      const T* next = i + 1 < k ? source + stride_k : nullptr;
      if constexpr (std::is_same_v<T, C>) {
        if (stride_n == 1) {
          interleave(source, next, cols, line);
          continue;
        }
      }
#endif
      alignas(64) C pair[2][kPanel] = {};
      for (int64_t r = 0; r < std::min(kPair, k - i); ++r) {
        convert_row(source + r * stride_k, stride_n, cols, pair[r]);
      }
      for (int64_t j = 0; j < kPanel; ++j) {
        line[2 * j] = pair[0][j];
        line[2 * j + 1] = pair[1][j];
      }
    }
  }
  if (cols == kPanel) return;
  for (int64_t i = 0; i < pad_k<C>(k); i += kPair) {
    C* line = out + i * kPanel;
    std::fill(line + cols * kPair, line + kPanel * kPair, C(0));
  }
}

template <typename T, typename C>
inline void pack_b(const T* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n,
                   C* packed) {
  for (int64_t panel = 0; panel < panels(n); ++panel) {
    pack_panel<T, C>(b, stride_k, stride_n, k, n, panel, packed);
  }
}

// kRows x (kVecs vectors) of C in registers over the whole depth. What C held is added last, so
// that the small sums of this pass are not rounded to its size at every step.
template <typename C, int kRows, int kVecs>
inline void micro_kernel(int64_t k, const C* __restrict a, int64_t lda, const C* __restrict b,
                         C* __restrict c, int64_t ldc, int64_t n, bool accumulate) {
  using Vec = Vectorized<C>;
  constexpr int64_t kLane = Vec::size();
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec(C(0));
  }
  for (int64_t p = 0; p < k; ++p) {
    Vec line[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) line[j] = Vec::loadu(b + p * kPanel + j * kLane);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec scalar(a[i * lda + p]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = at::vec::fmadd(scalar, line[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      const int64_t width = std::clamp<int64_t>(n - j * kLane, 0, kLane);
      if (width <= 0) continue;
      C* out = c + i * ldc + j * kLane;
      (accumulate ? Vec::loadu(out, width) + sum[i][j] : sum[i][j]).store(out, width);
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
template <int kRows, int kVecs>
__attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq"))) inline void
micro_kernel_bf16(int64_t k, const at::BFloat16* __restrict a, int64_t lda,
                  const at::BFloat16* __restrict b, float* __restrict c, int64_t ldc, int64_t n,
                  bool accumulate) {
  __m512 sum[kRows][kVecs];
  __mmask16 mask[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const int64_t width = n - j * 16;
    mask[j] = width >= 16 ? 0xFFFF : width <= 0 ? 0 : static_cast<__mmask16>((1u << width) - 1);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < k; p += 2) {
    __m512bh line[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) line[j] = (__m512bh)_mm512_loadu_si512(b + p * kPanel + j * 32);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int pair;
      std::memcpy(&pair, a + i * lda + p, sizeof(pair));
      const __m512bh scalar = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], scalar, line[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* out = c + i * ldc + j * 16;
      if (accumulate) sum[i][j] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask[j], out), sum[i][j]);
      _mm512_mask_storeu_ps(out, mask[j], sum[i][j]);
    }
  }
}
#endif

// kRows rows of C against one panel, n <= 64 columns of it; half a panel where that is enough.
template <typename C, int kRows>
inline void panel_rows(int64_t k, const C* a, int64_t lda, const C* b, accumulate_t<C>* c,
                       int64_t ldc, int64_t n, bool accumulate) {
  if constexpr (std::is_same_v<C, at::BFloat16>) {
#if defined(CPU_CAPABILITY_AVX512)
    if (n > kPanel / 2) {
      micro_kernel_bf16<kRows, 4>(k, a, lda, b, c, ldc, n, accumulate);
    } else {
      micro_kernel_bf16<kRows, 2>(k, a, lda, b, c, ldc, n, accumulate);
    }
#endif
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    constexpr int kVecs = 4;  // 6 x 4 sums of 32 registers
#else
    constexpr int kVecs = 2;  // 6 x 2 sums of 16 registers
#endif
    constexpr int64_t kStep = kVecs * Vectorized<C>::size();
    for (int64_t j = 0; j < n; j += kStep) {
      if (n - j > kStep / 2) {
        micro_kernel<C, kRows, kVecs>(k, a, lda, b + j, c + j, ldc, n - j, accumulate);
      } else {
        micro_kernel<C, kRows, kVecs / 2>(k, a, lda, b + j, c + j, ldc, n - j, accumulate);
      }
    }
  }
}

// Asks for part `part` of `parts` of n elements. On AVX2 a register tile takes one line in four of
// a panel, which the hardware does not foresee: without this the float backward of linear_act took
// 1.35 times as long on one core. AVX-512 reads whole rows of a panel, and gains nothing.
template <typename C>
inline void prefetch_part([[maybe_unused]] const C* next, [[maybe_unused]] int64_t n,
                          [[maybe_unused]] int64_t part, [[maybe_unused]] int64_t parts) {
#if defined(CPU_CAPABILITY_AVX2)
  constexpr int64_t kLine = 64 / sizeof(C);
  for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i += kLine) {
    __builtin_prefetch(next + i, 0, 2);
  }
#endif
}

// a: m x k with pad_k(k) readable columns whose padding is finite; packed_b: from pack_b.
template <typename C>
inline void tile_gemm(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* packed_b,
                      accumulate_t<C>* c, int64_t ldc, bool accumulate) {
  constexpr int kRows = 6;
  const int64_t depth = pad_k<C>(k);
  if (depth == 0) {
    if (accumulate) return;
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, accumulate_t<C>(0));
    return;
  }
  for (int64_t begin = 0; begin < depth; begin += kDepth<C>) {
    const int64_t deep = std::min(kDepth<C>, depth - begin);
    const bool add = accumulate || begin > 0;
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t cols = std::min(kPanel, n - j);
      const C* b = packed_b + j * depth + begin * kPanel;
      const C* rows = a + begin;
      accumulate_t<C>* out = c + j;
      if constexpr (std::is_same_v<C, at::BFloat16>) {
        if (has_amx_bf16()) {
          at::native::cpublas::brgemm(m, cols, deep, lda, kPanel, ldc, add, rows, b, out, true);
          continue;
        }
      }
      // What is read after this panel, at times past the last; a prefetch may miss.
      const C* next = packed_b + (j + kPanel < n ? (j + kPanel) * depth + begin * kPanel
                                                 : (begin + deep) * kPanel);
      int64_t i = 0;
      for (; i + kRows <= m; i += kRows) {
        prefetch_part(next, deep * kPanel, i / kRows, m / kRows);
        panel_rows<C, kRows>(deep, rows + i * lda, lda, b, out + i * ldc, ldc, cols, add);
      }
      rows += i * lda;
      out += i * ldc;
      switch (m - i) {
        case 5:
          panel_rows<C, 5>(deep, rows, lda, b, out, ldc, cols, add);
          break;
        case 4:
          panel_rows<C, 4>(deep, rows, lda, b, out, ldc, cols, add);
          break;
        case 3:
          panel_rows<C, 3>(deep, rows, lda, b, out, ldc, cols, add);
          break;
        case 2:
          panel_rows<C, 2>(deep, rows, lda, b, out, ldc, cols, add);
          break;
        case 1:
          panel_rows<C, 1>(deep, rows, lda, b, out, ldc, cols, add);
          break;
      }
    }
  }
}

// kRows x kCols of A B^T as sums of products along rows of both.
template <typename T, int kRows, int kCols>
inline void dot_kernel(int64_t k, const accumulate_t<T>* a, int64_t lda, const T* b, int64_t ldb,
                       accumulate_t<T>* c, int64_t ldc) {
  using Vec = AccVec<T>;
  Vec sum[kRows][kCols];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) sum[i][j] = Vec(accumulate_t<T>(0));
  }
  const auto step = [&](int64_t p, auto width) {
    Vec column[kCols];
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) column[j] = load_vec(b + j * ldb + p, width);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec row = load_vec(a + i * lda + p, width);
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) sum[i][j] = at::vec::fmadd(row, column[j], sum[i][j]);
    }
  };
  int64_t p = 0;
  for (; p + kLanes<T> <= k; p += kLanes<T>) step(p, std::integral_constant<int64_t, kLanes<T>>{});
  if (p < k) step(p, k - p);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      c[i * ldc + j] = at::vec::vec_reduce_all(std::plus<Vec>(), sum[i][j]);
    }
  }
}

// C = A B^T for few rows of A, where packing B would cost more than the product: B is read once,
// in place. Only its columns (of n rows) need to lie side by side.
template <typename T>
inline void few_rows_gemm(int64_t m, int64_t n, int64_t k, const accumulate_t<T>* a, int64_t lda,
                          const T* b, int64_t ldb, accumulate_t<T>* c, int64_t ldc) {
  constexpr int kTile = 4;
  const auto columns = [&](int64_t j, auto cols) {
    int64_t i = 0;
    for (; i + kTile <= m; i += kTile) {
      dot_kernel<T, kTile, cols.value>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
    }
    for (; i < m; ++i) {
      dot_kernel<T, 1, cols.value>(k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
    }
  };
  int64_t j = 0;
  for (; j + kTile <= n; j += kTile) columns(j, std::integral_constant<int, kTile>{});
  for (; j < n; ++j) columns(j, std::integral_constant<int, 1>{});
}

// Frees the AMX state that brgemm holds; call at the end of a thread's work.
inline void release_tiles() {
  if (has_amx_bf16()) at::native::cpublas::brgemm_release();
}

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
