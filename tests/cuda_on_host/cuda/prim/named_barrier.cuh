// csrc/cuda/prim/named_barrier.cuh for the host.
#pragma once

#include <cuda_runtime.h>

namespace fastnn {

inline on_host::Barrier& named_barrier(int number, int threads) {
  if (number < 1 || number > 15 || threads % 32 != 0) std::abort();
  auto& barrier = on_host::block->named[number];
  if (barrier.arrived > 0 && barrier.size != threads) std::abort();
  barrier.size = threads;
  return barrier;
}

inline void named_barrier_wait(int number, int threads) {
  on_host::wait(named_barrier(number, threads), false);
}

inline void named_barrier_arrive(int number, int threads) {
  on_host::arrive(named_barrier(number, threads), false);
}

}  // namespace fastnn
