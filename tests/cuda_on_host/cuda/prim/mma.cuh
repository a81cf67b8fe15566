// csrc/cuda/prim/mma.cuh for the host: each lane computes its own results from the fragments of the
// whole warp; a copy happens at once or when it is waited for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/prim/copy.cuh"
#include "shared.cuh"

namespace fastnn {

inline void cp_async_16(void* shared, const void* global, int bytes) {
  const auto copy = [=] {
    alignas(16) char packet[16] = {};
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(packet);  // 16-byte aligned
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) std::abort();
    std::memcpy(shared, global, static_cast<size_t>(bytes));
  };
  if (on_host::random_number() % 2) {
    copy();
  } else {
    on_host::fiber().open.push_back(copy);
  }
}

inline void cp_async_commit() { on_host::commit_group(); }

template <int kPending>
void cp_async_wait() {
  on_host::wait_groups(kPending);
}

template <bool kTranspose>
void load_matrices(uint32_t (&r)[4], const void* row) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  on_host::exchange(row, [&](const void* const* rows) {
    const auto element = [&](int matrix, int i, int j) {
      return uint32_t{static_cast<const uint16_t*>(rows[8 * matrix + i])[j]};
    };
    for (int m = 0; m < 4; ++m) {
      r[m] = kTranspose ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                        : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
    }
  });
}

struct WarpOperands {
  uint32_t a[4], b[2];
};

// D += A B for 16 x kDepth times kDepth x 8; a_at(operands of all lanes, row, k) and b_at(.., k,
// n).
template <int kDepth, typename A, typename B>
void warp_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const A& a_at,
                  const B& b_at) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const WarpOperands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  on_host::exchange(&mine, [&](const void* const* offers) {
    const auto all = reinterpret_cast<const WarpOperands* const*>(offers);
    for (int e = 0; e < 4; ++e) {
      for (int k = 0; k < kDepth; ++k)
        d[e] += a_at(all, g + e / 2 * 8, k) * b_at(all, k, 2 * t + e % 2);
    }
  });
}

template <typename T>
float half_of(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  warp_product<16>(
      d, a, b0, b1,
      [](const WarpOperands* const* all, int row, int k) {
        return half_of<T>(all[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k % 2);
      },
      [](const WarpOperands* const* all, int k, int n) {
        return half_of<T>(all[n * 4 + k % 8 / 2]->b[k / 8], k % 2);
      });
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits + 0x1000) & ~0x1fffu;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto value = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  };
  warp_product<8>(
      d, a, b0, b1,
      [&](const WarpOperands* const* all, int row, int k) {
        return value(all[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2]);
      },
      [&](const WarpOperands* const* all, int k, int n) {
        return value(all[n * 4 + k % 4]->b[k / 4]);
      });
}

}  // namespace fastnn
