// A block's shared memory: the dynamic part, and addresses in it as the instructions take them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastnn {

// Aligned for the 128-byte swizzle, whose pattern repeats every 1024 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char fastnn_shared_memory[];
  return fastnn_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace fastnn
