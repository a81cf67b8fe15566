// csrc/cuda/prim/wgmma.cuh for the host: a product is computed when it is waited for, from what
// shared memory holds then.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/prim/copy.cuh"
#include "cuda/prim/wgmma_layout.cuh"
#include "mma.cuh"
#include "shared.cuh"

namespace fastnn {

constexpr bool kHasWgmma = true;

inline void wgmma_fence() {}
inline void wgmma_commit() { on_host::commit_group(); }

// The whole warp group's products are over when one thread's wait is.
template <int kPending>
void wgmma_wait() {
  auto& barrier = on_host::block->groups[threadIdx.x / 128];
  barrier.size = 128;
  on_host::wait(barrier, false);
  on_host::wait_groups(kPending);
  on_host::wait(barrier, false);
}

template <int kCount>
void pin(float (&)[kCount]) {}

// Element (mn, k) of the operand that a descriptor describes, as the PTX manual's canonical layouts
// of the 128-byte swizzle place it.
template <typename T, bool kAcross>
float described(const char* shared, uint64_t descriptor, int mn, int k) {
  const auto field = [&](int shift) {
    return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4;
  };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) std::abort();
  const int along = kAcross ? k : mn, inner = kAcross ? mn % 64 : k;
  const uint32_t offset = static_cast<uint32_t>(along / 8) * field(32) +
                          static_cast<uint32_t>(along % 8 * kSwizzleRow + inner * 2) +
                          (kAcross ? static_cast<uint32_t>(mn / 64) * field(16) : 0);
  return to_float(*reinterpret_cast<const T*>(shared + swizzled(field(0) + offset)));
}

// D += A B of one thread: its two rows of A are left[.][k].
template <typename T, bool kBAcross, int kRegisters>
void multiply_add(float (&d)[kRegisters], const float (&left)[2][16], uint64_t b, bool accumulate) {
  const int thread = threadIdx.x % 128;
  const char* const shared = on_host::block->shared;
  for (int i = 0; i < kRegisters; ++i) {
    if (i / 2 % 2 == 1) continue;  // the same columns as i - 2
    float right[16];
    for (int k = 0; k < 16; ++k) {
      right[k] = described<T, kBAcross>(shared, b, fragment_column(thread, i), k);
    }
    for (int half = 0; half < 2; ++half) {
      float sum = accumulate ? d[i + 2 * half] : 0.f;
      for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
      d[i + 2 * half] = sum;
    }
  }
}

template <typename T, bool kAAcross, bool kBAcross, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  on_host::fiber().open.push_back([=, &d] {
    float left[2][16];
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 16; ++k) {
        left[i][k] = described<T, kAAcross>(on_host::block->shared, a,
                                            fragment_row(threadIdx.x % 128, 2 * i), k);
      }
    }
    multiply_add<T, kBAcross>(d, left, b, accumulate);
  });
}

// A from registers, which other lanes of the row hold too: they are exchanged when the product is
// due, so that one that was touched meanwhile shows.
template <typename T, bool kBAcross, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  on_host::fiber().open.push_back([=, &d, &a] {
    float left[2][16];
    const int lane = threadIdx.x % 32;
    on_host::exchange(&a, [&](const void* const* lanes) {
      for (int t = 0; t < 4; ++t) {
        const auto* words = static_cast<const uint32_t*>(lanes[lane / 4 * 4 + t]);
        for (int i = 0; i < 4; ++i) {
          T pair[2];
          std::memcpy(pair, &words[i], sizeof(pair));
          for (int e = 0; e < 2; ++e) left[i % 2][i / 2 * 8 + 2 * t + e] = to_float(pair[e]);
        }
      }
    });
    multiply_add<T, kBAcross>(d, left, b, accumulate);
  });
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void store_matrices(void* row, const uint32_t (&r)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  on_host::exchange(row, [&](const void* const* rows) {
    for (int m = 0; m < 4; ++m) {
      auto* to = static_cast<char*>(const_cast<void*>(rows[8 * m + g])) + 4 * t;
      std::memcpy(to, &r[m], sizeof(r[m]));
    }
  });
}

}  // namespace fastnn
