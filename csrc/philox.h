// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the one
// generator behind every dropout, on every backend.
//   A dropout mask over a matrix of `cols` columns is a pure function of (seed, row, col):
//     group = row * ceil(cols / 8) + col / 8,  words = philox(counter = (group, offset), key)
//     keep  = half (col % 8) of the 8 16-bit halves of words >= threshold, low halves first
//   so that the backward replays it, and no thread count or tiling can change it.
//   The rate is p rounded to 1/65536, and the scale is that of the rounded rate: E[mask] = 1.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTNN_HOST_DEVICE inline
#endif

namespace fastnn {

struct PhiloxState {
  uint64_t key;
  uint64_t offset;
};

// The dropout rate as the kernels use it: drop when a 16-bit half is below the threshold.
struct DropoutRate {
  uint32_t threshold;  // in [0, 65536]
  float scale;         // 1 / keep rate; 0 when everything is dropped
};

inline DropoutRate dropout_rate(double p) {
  const auto threshold = static_cast<uint32_t>(std::lround(p * 65536.0));
  const float scale =
      threshold == 65536 ? 0.f : static_cast<float>(65536.0 / (65536.0 - threshold));
  return {threshold, scale};
}

FASTNN_HOST_DEVICE int64_t dropout_groups(int64_t cols) { return (cols + 7) / 8; }

FASTNN_HOST_DEVICE void philox(const PhiloxState& state, uint64_t group, uint32_t words[4]) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(state.offset), c3 = static_cast<uint32_t>(state.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(state.key), k1 = static_cast<uint32_t>(state.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace fastnn
