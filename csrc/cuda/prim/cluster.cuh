// Thread-block clusters: blocks that run side by side and reach each other's shared memory (sm_90
// and later; before, a cluster is one block).
#pragma once

#include <cuda_runtime.h>

namespace fastnn {

constexpr int kMaxCluster = 8;  // blocks: what every device that has clusters can place

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(__clusterRelativeBlockRank());
}
// A barrier of all the cluster's threads in two halves: what was written before the first is seen
// after the second, but for begin: that only says that this block runs.
__device__ __forceinline__ void cluster_begin() { __cluster_barrier_arrive_relaxed(); }
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
// Where block `rank` of the cluster keeps its copy of a shared variable.
template <typename S>
__device__ __forceinline__ S* in_block(S* shared, int rank) {
  return static_cast<S*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
}

#else

__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_begin() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename S>
__device__ __forceinline__ S* in_block(S* shared, int) {
  return shared;
}

#endif

}  // namespace fastnn
