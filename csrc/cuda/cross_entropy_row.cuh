// What the forward and the backward share: which elements a thread has, and one pass over them.
#pragma once

#include "cross_entropy.h"
#include "prim/copy.cuh"
#include "prim/math.cuh"
#include "prim/online_softmax.cuh"
#include "prim/reduce.cuh"

namespace fastnn {

constexpr int kUnroll = 4;  // loads in flight per thread
constexpr int kMaxThreads = 512;
constexpr int kSharedThreads = 256;  // block size of the layouts with several rows per block

// How the threads of a block share its rows.
enum class Layout : int {
  kWarpPerRow,   // lanes across classes
  kBlockPerRow,  // threads across classes
  kLanePerRow,   // lanes across rows, warps across classes: for rows that are neighbours in memory
};

// This thread's row, and its classes: first, first + step, ...
struct RowThread {
  int64_t row;
  int first, step;
};

__device__ __forceinline__ RowThread row_thread(Layout layout) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const int64_t block = blockIdx.x;
  if (layout == Layout::kBlockPerRow) {
    return {block, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  }
  if (layout == Layout::kWarpPerRow) return {block * warps + warp, lane, kWarp};
  return {block * kWarp + lane, warp, warps};
}

// Combines the sums of a row's threads; every one of them gets the result. All threads of the block
// call it, those beyond the last row too.
template <typename T>
__device__ __forceinline__ SoftmaxSums reduce_row(SoftmaxSums sums, Layout layout,
                                                  SoftmaxSums* shared) {
  const auto combine = [](const SoftmaxSums& a, const SoftmaxSums& b) { return merge<T>(a, b); };
  if (layout == Layout::kWarpPerRow) return warp_reduce(sums, combine);
  if (layout == Layout::kBlockPerRow) return block_reduce(sums, shared, no_logits(), combine);
  return lane_reduce(sums, shared, combine);
}

// One row: the logits and, beside them, the target's probabilities and the class weights.
template <typename T>
struct Row {
  const T* logits;
  int64_t stride;
  int classes;
  const void* probabilities;
  int64_t probability_stride;
  Storage probability_storage;
  const float* class_weight;
  float softcap, inverse_softcap;
  float keep, spread;  // a smoothed probability is keep * p + spread

  __device__ __forceinline__ float capped(float x) const {
    return softcap == 0.f ? x : softcap * Math<T>::tanh(x * inverse_softcap);
  }
  __device__ __forceinline__ float weight(int c) const {
    return class_weight == nullptr ? 1.f : __ldg(class_weight + c);
  }
};

__device__ __forceinline__ int64_t row_offset(const Strides& strides, int64_t row, int64_t inner) {
  if (inner == 1) return row * strides.batch;
  return row / inner * strides.batch + row % inner * strides.inner;
}

template <typename T>
__device__ __forceinline__ Row<T> row_of(const CrossEntropyProblem& p, int64_t index) {
  Row<T> row;
  row.logits = static_cast<const T*>(p.logits) + row_offset(p.strides, index, p.inner);
  row.stride = p.strides.cls;
  row.classes = p.classes;
  row.probabilities = nullptr;
  row.probability_storage = p.probability_storage;
  row.probability_stride = p.probability_strides.cls;
  if (p.probabilities != nullptr) {
    row.probabilities = offset_by(
        p.probabilities, row_offset(p.probability_strides, index, p.inner), p.probability_storage);
  }
  row.class_weight = p.class_weight;
  row.softcap = p.softcap;
  row.inverse_softcap = p.softcap == 0.f ? 0.f : 1.f / p.softcap;
  row.keep = 1.f - p.label_smoothing;
  row.spread = p.label_smoothing / static_cast<float>(p.classes);
  return row;
}

// A unit is kWidth neighbouring classes: one packet, or one element at the row's class stride.
template <typename T, int kWidth>
__device__ __forceinline__ Packet<T> load_unit(const Row<T>& row, int c) {
  if constexpr (kWidth == 1) {
    Packet<T> packet;
    packet.values[0] = __ldg(row.logits + c * row.stride);
    return packet;
  } else {
    return load_packet(row.logits + c);
  }
}

// The branches on options are around loops over a unit, never inside: one element has only some 17
// instructions at full bandwidth.
template <typename T, int kWidth>
__device__ __forceinline__ void unpack_capped(const Row<T>& row, const Packet<T>& packet,
                                              float (&x)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) x[k] = to_float(packet.values[k]);
  if (row.softcap != 0.f) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] = row.capped(x[k]);
  }
}

// The weights u of a unit: class weights, times smoothed probabilities with kProb. Packets of
// probabilities are used only where they have the logits' type and alignment.
template <typename T, bool kProb, int kWidth>
__device__ __forceinline__ void load_weights(const Row<T>& row, int c, float (&weights)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) weights[k] = 1.f;
  if constexpr (kProb) {
    if constexpr (kWidth == 1) {
      weights[0] =
          load_as_float(row.probabilities, c * row.probability_stride, row.probability_storage);
    } else {
      const Packet<T> packet = load_packet(static_cast<const T*>(row.probabilities) + c);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) weights[k] = to_float(packet.values[k]);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weights[k] = row.keep * weights[k] + row.spread;
  }
  if (row.class_weight != nullptr) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weights[k] *= __ldg(row.class_weight + c + k);
  }
}

// Adds units first, first + step, ... below `units`, whose classes begin at `offset`. With kProb
// the weights u of the sums are weight * probability; else `weighted` asks for the class weights
// alone.
template <typename T, bool kProb, int kWidth, int kUnits>
__device__ __forceinline__ void add_units(SoftmaxSums& sums, const Row<T>& row, bool weighted,
                                          int offset, int units, int first, int step) {
  for (int unit = first; unit < units; unit += kUnits * step) {
    Packet<T> packets[kUnits];
    float max = -INFINITY;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (unit + u * step < units) {
        packets[u] = load_unit<T, kWidth>(row, offset + (unit + u * step) * kWidth);
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) packets[u].values[k] = from_float<T>(-INFINITY);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) max = fmaxf(max, to_float(packets[u].values[k]));
    }
    // tanh is monotone: capping the maximum alone does for all (the first unit is never absent).
    raise_max<T>(sums, row.capped(max));
    const float shift = finite_shift(sums.max);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int c = offset + (unit + u * step) * kWidth;
      if (unit + u * step >= units) break;
      float x[kWidth], partial = 0.f;
      unpack_capped<T, kWidth>(row, packets[u], x);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) partial += Math<T>::exp(x[k] - shift);
      if (kProb || weighted) {
        float weights[kWidth];
        load_weights<T, kProb, kWidth>(row, c, weights);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          sums.weight += weights[k];
          sums.deviation += weights[k] * (x[k] - shift);
        }
      }
      sums.sum += partial;
    }
  }
}

// The classes of a row that are in whole, aligned packets, and the few before and after them.
struct Split {
  int head, packets, edges;
  template <int kWidth>
  __device__ __forceinline__ int edge_class(int edge) const {
    return edge < head ? edge : edge + packets * kWidth;
  }
};

template <typename T>
__device__ __forceinline__ Split split_row(const Row<T>& row) {
  constexpr int kWidth = Packet<T>::kSize;
  const int head = min(elements_to_alignment(row.logits), row.classes);
  const int packets = (row.classes - head) / kWidth;
  return {head, packets, row.classes - packets * kWidth};
}

// One thread's share of a row. Every layout that takes packets has at least 32 threads to a row,
// and a row has at most 14 edges.
template <typename T, bool kVector, bool kProb>
__device__ __forceinline__ SoftmaxSums row_sums(const Row<T>& row, bool weighted, int first,
                                                int step) {
  SoftmaxSums sums = no_logits();
  if constexpr (kVector) {
    constexpr int kWidth = Packet<T>::kSize;
    const Split split = split_row(row);
    add_units<T, kProb, kWidth, kUnroll>(sums, row, weighted, split.head, split.packets, first,
                                         step);
    if (first < split.edges) {
      add_units<T, kProb, 1, 1>(sums, row, weighted, split.edge_class<kWidth>(first), 1, 0, 1);
    }
  } else {
    add_units<T, kProb, 1, kUnroll>(sums, row, weighted, 0, row.classes, first, step);
  }
  return sums;
}

}  // namespace fastnn
