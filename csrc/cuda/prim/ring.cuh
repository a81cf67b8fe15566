// A ring of stages in shared memory, each with a barrier that says it is full and one that it is
// empty.
#pragma once

#include <cuda_runtime.h>

namespace fastnn {

// Counts uses of the slots: which slot, and how often the ring was gone round.
template <int kSlots>
struct Ring {
  int slot = 0, round = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) {
      slot = 0;
      ++round;
    }
  }
  __device__ __forceinline__ int parity() const { return round % 2; }
};

}  // namespace fastnn
