// NaN and infinities in Hopper's attention: a row gets none from a row that is hidden from it.
//   A product makes NaN of 0 NaN. So where the band hides a row of a streamed tile from some of a
//   block's rows and not from others, the copying group's idle warps take what is not finite out of
//   the tile before it is multiplied, and the block's results get it back at the end, from memory,
//   for the rows that see it. What all of a block's rows see is left as it is.
#pragma once

#include "cuda/attention_sm90.cuh"

namespace fastnn {
namespace attention_sm90 {

constexpr int kCleanBarrier = 12;
// The tiles of a block that may be under way together are fewer: they share a ring of stages.
constexpr int kTilesUnderWay = 8;

// Bits 15 and 31 tell which half of a word is NaN or infinite: its exponent, all ones, overflows.
template <typename T>
__device__ __forceinline__ uint32_t nonfinite_halves(uint32_t word) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  constexpr uint32_t kExponent = kHalf ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t kOne = kHalf ? 0x04000400u : 0x00800080u;
  return ((word & kExponent) + kOne) & 0x80008000u;
}

// kThreads threads: what is not finite in a tile becomes 0. Whether this thread found any.
template <typename T, int kThreads>
__device__ __forceinline__ bool take_out_nonfinite(char* tile, int bytes, int thread) {
  uint32_t found = 0;
#pragma unroll 2
  for (int at = 16 * thread; at < bytes; at += 16 * kThreads) {
    const uint4 words = *reinterpret_cast<const uint4*>(tile + at);
    found |= nonfinite_halves<T>(words.x) | nonfinite_halves<T>(words.y) |
             nonfinite_halves<T>(words.z) | nonfinite_halves<T>(words.w);
  }
  if (found == 0) return false;
#pragma unroll 1
  for (int at = 16 * thread; at < bytes; at += at % 16 == 12 ? 16 * kThreads - 12 : 4) {
    auto* const word = reinterpret_cast<uint32_t*>(tile + at);
    *word &= ~(nonfinite_halves<T>(*word) / 0x8000u * 0xffffu);
  }
  return true;
}

// kThreads threads of the copying group. A cut tile comes by a barrier of its own, and is full when
// it is clean.
template <typename T, int kThreads>
struct Cleaner {
  int thread, turn = 0;   // which tile of the block
  uint32_t parities = 0;  // of the stages' barriers, a bit each

  __device__ __forceinline__ void clean(int stage, Mbarrier* cut, Mbarrier* full, char* tile,
                                        int bytes, int* cleaned) {
    mbarrier_wait(cut, parities >> stage & 1);
    parities ^= 1u << stage;
    if (take_out_nonfinite<T, kThreads>(tile, bytes, thread)) {
      cleaned[turn % kTilesUnderWay] = turn;
    }
    fence_async_proxy();
    named_barrier_wait(kCleanBarrier, kThreads);
    if (thread == 0) mbarrier_arrive(full);
  }
};

// Whether something was taken out of the tiles that were streamed for the block's turn.
__device__ __forceinline__ bool was_cleaned(const int* cleaned, int turn) {
  return cleaned[turn % kTilesUnderWay] == turn;
}

// A warp group: NaN in a row of x where a row of `from` that it sees has what is not finite, in the
// tiles that are_cut(first row of it); the two rows r of a thread see first(r) to end(r).
template <typename T, int kCount, typename AreCut, typename First, typename End>
__device__ __forceinline__ void put_back_nonfinite(float (&x)[kCount], const T* from,
                                                   int64_t stride, int columns, int tile,
                                                   const AreCut& are_cut, const First& first,
                                                   const End& end) {
  const int left = fragment_column(threadIdx.x % kGroupThreads, 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int last = end(r);
#pragma unroll 1
    for (int at = first(r); at < last; ++at) {
      if (!are_cut(at / tile * tile)) {
        at = at / tile * tile + tile - 1;
        continue;
      }
      const T* const row = from + at * stride + left;
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) {
        if (left + column_of(i) >= columns) continue;
        const auto word = *reinterpret_cast<const uint32_t*>(row + column_of(i));
        const uint32_t nonfinite = nonfinite_halves<T>(word);
        if (nonfinite & 0x8000u) x[i] = NAN;
        if (nonfinite >> 31) x[i + 1] = NAN;
      }
    }
  }
}

// A row of x with NaN has nothing else: what made it was computed without the numbers taken out.
template <int kCount>
__device__ __forceinline__ void spread_nan(float (&x)[kCount]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (row_of(i) == r) sum += x[i] * 0.f;
    }
    sum = sum_of_four(sum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (row_of(i) == r) x[i] += sum;
    }
  }
}

}  // namespace attention_sm90
}  // namespace fastnn
