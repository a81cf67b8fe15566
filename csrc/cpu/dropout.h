// The dropout mask of csrc/philox.h, drawn a row at a time in vector registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../philox.h"
#include "vec.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {

inline PhiloxState philox_state(const at::Tensor& seed) {
  const int64_t* words = seed.const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
}

// The 16-bit halves of kGroups consecutive groups, in the order of their columns. Written as loops
// over lanes that the compiler turns into widening vector multiplies.
inline constexpr int64_t kGroups = 16;

inline void philox_halves(const PhiloxState& state, uint64_t group, uint16_t* halves) {
  alignas(64) uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int64_t lane = 0; lane < kGroups; ++lane) {
    const uint64_t counter = group + lane;
    c0[lane] = static_cast<uint32_t>(counter);
    c1[lane] = static_cast<uint32_t>(counter >> 32);
    c2[lane] = static_cast<uint32_t>(state.offset);
    c3[lane] = static_cast<uint32_t>(state.offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(state.key), k1 = static_cast<uint32_t>(state.key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t lane = 0; lane < kGroups; ++lane) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[lane];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2[lane];
      c0[lane] = static_cast<uint32_t>(p1 >> 32) ^ c1[lane] ^ k0;
      c1[lane] = static_cast<uint32_t>(p1);
      c2[lane] = static_cast<uint32_t>(p0 >> 32) ^ c3[lane] ^ k1;
      c3[lane] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int64_t lane = 0; lane < kGroups; ++lane) {
    const uint32_t words[4] = {c0[lane], c1[lane], c2[lane], c3[lane]};
    for (int half = 0; half < 8; ++half) {
      halves[lane * 8 + half] = static_cast<uint16_t>(words[half / 2] >> (16 * (half % 2)));
    }
  }
}

// mask[i] = scale or 0 for the columns [col, col + n) of `row`; col is a multiple of 8.
template <typename A>
inline void dropout_row(const PhiloxState& state, const DropoutRate& rate, int64_t row,
                        int64_t cols, int64_t col, int64_t n, A* mask) {
  const uint64_t first = static_cast<uint64_t>(row) * dropout_groups(cols) + col / 8;
  const A scale = static_cast<A>(rate.scale);
  alignas(64) uint16_t halves[kGroups * 8];
  for (int64_t begin = 0; begin < n; begin += kGroups * 8) {
    philox_halves(state, first + begin / 8, halves);
    const int64_t count = std::min(n - begin, kGroups * 8);
    for (int64_t i = 0; i < count; ++i) {
      mask[begin + i] = halves[i] >= rate.threshold ? scale : A(0);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
