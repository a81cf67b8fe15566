// csrc/cuda/prim/mbarrier.cuh for the host.
#pragma once

#include <new>

#include "shared.cuh"

namespace fastnn {

using Mbarrier = uint64_t;

struct HostMbarrier {
  std::atomic<unsigned> generation;  // counts phases
  uint8_t count, pending;
  int16_t packets;  // of 16 bytes, still to be copied; negative when they came before they were due

  static HostMbarrier& of(Mbarrier* barrier) { return *reinterpret_cast<HostMbarrier*>(barrier); }

  void advance() {
    if (pending != 0 || packets != 0) return;
    ++generation;
    pending = count;
  }
  void arrive() {
    if (pending == 0) {
      std::fprintf(stderr, "more arrivals than the barrier counts\n");
      std::abort();
    }
    --pending;
    advance();
  }
  void expect(int bytes) { packets = static_cast<int16_t>(packets + bytes / 16); }
};
static_assert(sizeof(HostMbarrier) == sizeof(Mbarrier));

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  new (barrier) HostMbarrier{0, count, count, 0};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(Mbarrier* barrier) { HostMbarrier::of(barrier).arrive(); }
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  HostMbarrier::of(barrier).expect(bytes);
  HostMbarrier::of(barrier).arrive();
}

// The dynamic shared memory of block `rank` of the cluster.
inline char* memory_of(unsigned rank) {
  return on_host::cluster == nullptr ? on_host::block->shared : on_host::cluster->shared[rank];
}
inline void mbarrier_arrive_at(Mbarrier* barrier, uint32_t rank) {
  mbarrier_arrive(reinterpret_cast<Mbarrier*>(memory_of(rank) + shared_address(barrier)));
}

inline void mbarrier_wait(Mbarrier* barrier, int parity) {
  const HostMbarrier& b = HostMbarrier::of(barrier);
  while (b.generation % 2 == static_cast<unsigned>(parity)) {
    on_host::wait_for(b.generation, b.generation);
  }
  on_host::dawdle();
}

inline uint32_t block_rank_in_cluster() { return on_host::rank; }
inline void cluster_barrier() {
  if (on_host::cluster == nullptr) return __syncthreads();
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

}  // namespace fastnn
