// The dropout mask of csrc/philox.h: drawn in vector registers as bits, applied by masked moves.
// Drawing costs about 0.1 ns a column on AVX-512.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "vec.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {

inline PhiloxState philox_state(const at::Tensor& seed) {
  const int64_t* words = seed.const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
}

// Columns that one step draws: 16 groups of 8.
inline constexpr int64_t kDrawn = 128;

// Keep bits of the 16 groups from `group` on: bit i is column 8 * group + i. The words lie in the
// low halves of 64-bit lanes, where the widening multiply reads them and leaves both its halves;
// what a lane's upper half holds is never read.
#if defined(CPU_CAPABILITY_AVX512)
inline void draw_bits(const PhiloxState& state, uint32_t threshold, uint64_t group,
                      uint64_t bits[2]) {
  __m512i c0[2], c1[2], c2[2], c3[2];
  for (int i = 0; i < 2; ++i) {
    // In the order in which the unpacking below lines the groups up.
    c0[i] = _mm512_add_epi64(_mm512_set1_epi64(group + 8 * i),
                             _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    c1[i] = _mm512_srli_epi64(c0[i], 32);
    c2[i] = _mm512_set1_epi64(state.offset);
    c3[i] = _mm512_set1_epi64(state.offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(state.key), k1 = static_cast<uint32_t>(state.key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi32(k0), key1 = _mm512_set1_epi32(k1);
    for (int i = 0; i < 2; ++i) {
      const __m512i p0 = _mm512_mul_epu32(c0[i], _mm512_set1_epi64(0xD2511F53u));
      const __m512i p1 = _mm512_mul_epu32(c2[i], _mm512_set1_epi64(0xCD9E8D57u));
      c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[i], key0, 0x96);  // a ^ b ^ c
      c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[i], key1, 0x96);
      c1[i] = p1;
      c3[i] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  for (int i = 0; i < 2; ++i) {
    const __m512i low = _mm512_mask_shuffle_epi32(c0[i], 0xAAAA, c1[i], _MM_PERM_CCAA);
    const __m512i high = _mm512_mask_shuffle_epi32(c2[i], 0xAAAA, c3[i], _MM_PERM_CCAA);
    const uint64_t first = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), least);
    const uint64_t last = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), least);
    bits[i] = first | last << 32;
  }
}
#elif defined(CPU_CAPABILITY_AVX2)
inline void draw_bits(const PhiloxState& state, uint32_t threshold, uint64_t group,
                      uint64_t bits[2]) {
  const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  for (int i = 0; i < 2; ++i) {
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int j = 0; j < 2; ++j) {
      c0[j] = _mm256_add_epi64(_mm256_set1_epi64x(group + 8 * i + 4 * j),
                               _mm256_setr_epi64x(0, 1, 2, 3));
      c1[j] = _mm256_srli_epi64(c0[j], 32);
      c2[j] = _mm256_set1_epi64x(state.offset);
      c3[j] = _mm256_set1_epi64x(state.offset >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(state.key), k1 = static_cast<uint32_t>(state.key >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi32(k0), key1 = _mm256_set1_epi32(k1);
      for (int j = 0; j < 2; ++j) {
        const __m256i p0 = _mm256_mul_epu32(c0[j], _mm256_set1_epi64x(0xD2511F53u));
        const __m256i p1 = _mm256_mul_epu32(c2[j], _mm256_set1_epi64x(0xCD9E8D57u));
        c0[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[j]), key0);
        c2[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[j]), key1);
        c1[j] = p1;
        c3[j] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint64_t kept[2];
    for (int j = 0; j < 2; ++j) {
      const __m256i low = _mm256_blend_epi32(c0[j], _mm256_slli_epi64(c1[j], 32), 0xAA);
      const __m256i high = _mm256_blend_epi32(c2[j], _mm256_slli_epi64(c3[j], 32), 0xAA);
      const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
      const auto at_least = [&](__m256i x) {
        return _mm256_cmpeq_epi16(_mm256_max_epu16(x, least), x);
      };
      kept[j] = static_cast<uint32_t>(
          _mm256_movemask_epi8(_mm256_packs_epi16(at_least(even), at_least(odd))));
    }
    bits[i] = kept[0] | kept[1] << 32;
  }
}
#else
inline void draw_bits(const PhiloxState& state, uint32_t threshold, uint64_t group,
                      uint64_t bits[2]) {
  for (int i = 0; i < 2; ++i) {
    bits[i] = 0;
    for (int j = 0; j < 8; ++j) {
      uint32_t words[4];
      philox(state, group + 8 * i + j, words);
      for (int half = 0; half < 8; ++half) {
        const uint32_t drawn = words[half / 2] >> (16 * (half % 2)) & 0xFFFFu;
        bits[i] |= static_cast<uint64_t>(drawn >= threshold) << (8 * j + half);
      }
    }
  }
}
#endif

// Bit i % 16 of bits[i / 16] is set where column col + i of `row` is kept; col is a multiple of 8,
// and `bits` has room for n rounded up to kDrawn columns.
inline void dropout_bits(const PhiloxState& state, const DropoutRate& rate, int64_t row,
                         int64_t cols, int64_t col, int64_t n, uint16_t* bits) {
  const uint64_t first = static_cast<uint64_t>(row) * dropout_groups(cols) + col / 8;
  for (int64_t begin = 0; begin < n; begin += kDrawn) {
    uint64_t drawn[2] = {0, 0};
    // A threshold of 65536, which is no 16-bit number, keeps nothing.
    if (rate.threshold < 65536) draw_bits(state, rate.threshold, first + begin / 8, drawn);
    std::memcpy(bits + begin / 16, drawn, sizeof(drawn));
  }
}

// v in the lanes whose bit is set, 0 in the others.
inline Vectorized<float> keep_lanes(const Vectorized<float>& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), lane);
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)), v);
#else
  float lanes[Vectorized<float>::size()];
  v.store(lanes);
  for (int i = 0; i < Vectorized<float>::size(); ++i) lanes[i] = bits >> i & 1 ? lanes[i] : 0.f;
  return Vectorized<float>::loadu(lanes);
#endif
}

inline Vectorized<double> keep_lanes(const Vectorized<double>& v, uint32_t bits) {
  double lanes[Vectorized<double>::size()];
  v.store(lanes);
  for (int i = 0; i < Vectorized<double>::size(); ++i) lanes[i] = bits >> i & 1 ? lanes[i] : 0.0;
  return Vectorized<double>::loadu(lanes);
}

// The bits of the lanes of a vector that starts at column i.
inline uint32_t bits_at(const uint16_t* bits, int64_t i) {
  return static_cast<uint32_t>(bits[i / 16]) >> (i % 16);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
