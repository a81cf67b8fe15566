// csrc/cuda/prim/shared.cuh for the host. Shared addresses are offsets into the block's memory.
#pragma once

#include <cuda_runtime.h>

namespace fastnn {

inline char* dynamic_shared() { return on_host::block->shared; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - on_host::block->shared);
}

}  // namespace fastnn
