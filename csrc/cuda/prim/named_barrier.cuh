// Barriers by number (1 to 15; 0 is __syncthreads') of some of a block's warps: `threads` counts
// those that wait and those that only arrive.
#pragma once

#include <cuda_runtime.h>

namespace fastnn {

__device__ __forceinline__ void named_barrier_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace fastnn
