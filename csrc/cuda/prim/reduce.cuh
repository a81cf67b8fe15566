// Reductions over a warp, the warps of a block or the blocks of a cluster, in a fixed order: same
// inputs, same bits.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"

namespace fastnn {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The other lane's copy of a struct of floats.
template <typename S>
__device__ __forceinline__ S shuffle_xor(const S& value, int mask) {
  static_assert(sizeof(S) % sizeof(float) == 0, "made of floats");
  S other;
  const float* from = reinterpret_cast<const float*>(&value);
  float* to = reinterpret_cast<float*>(&other);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(S) / sizeof(float)); ++i) {
    to[i] = __shfl_xor_sync(kAllLanes, from[i], mask);
  }
  return other;
}

// Every lane gets the combination of all 32.
template <typename S, typename Combine>
__device__ __forceinline__ S warp_reduce(S value, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// Every thread gets the combination of the whole block; `shared` holds one value per warp and is
// used once per kernel, as nothing separates a second use from the first one's reads.
template <typename S, typename Combine>
__device__ __forceinline__ S block_reduce(S value, S* shared, const S& identity, Combine combine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_reduce(value, combine);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / kWarp ? shared[lane] : identity;
  return warp_reduce(value, combine);
}

// Every thread gets the combination of the cluster's blocks, whose own `value` all their threads
// have; `shared` holds kMaxCluster values, used once per kernel. The kernel has called
// cluster_begin() before: no block writes to another that has not begun.
template <typename S, typename Combine>
__device__ __forceinline__ S cluster_reduce(S value, S* shared, Combine combine) {
  const int blocks = cluster_size(), thread = threadIdx.x;
  cluster_wait();
  if (thread < blocks) *in_block(shared + cluster_rank(), thread) = value;
  cluster_arrive();
  cluster_wait();
  value = shared[0];
  for (int rank = 1; rank < blocks; ++rank) value = combine(value, shared[rank]);
  return value;
}

// Thread (lane, warp) gets the combination of its lane over the block's warps; `shared` holds one
// value per thread, used once per kernel.
template <typename S, typename Combine>
__device__ __forceinline__ S lane_reduce(S value, S* shared, Combine combine) {
  const int lane = threadIdx.x % kWarp;
  shared[threadIdx.x] = value;
  __syncthreads();
  value = shared[lane];
  for (int other = lane + kWarp; other < static_cast<int>(blockDim.x); other += kWarp) {
    value = combine(value, shared[other]);
  }
  return value;
}

}  // namespace fastnn
