// What the forward and the backward share: which elements a thread has, and one pass over them.
#pragma once

#include "cross_entropy.h"
#include "prim/copy.cuh"
#include "prim/math.cuh"
#include "prim/online_softmax.cuh"
#include "prim/reduce.cuh"

namespace fastnn {

constexpr int kTileUnits = 4;  // units that a thread holds at a time: its loads in flight
constexpr int kMaxThreads = 512;
constexpr int kSharedThreads = 256;  // block size of the layouts with several rows per block

// How the threads of a block share its rows.
enum class Layout : int {
  kWarpPerRow,     // lanes across classes
  kBlockPerRow,    // threads across classes
  kClusterPerRow,  // the threads of a cluster of blocks across classes
  kLanePerRow,  // lanes across rows, warps across classes: for rows that are neighbours in memory
};

// This thread's row, and its classes: first, first + step, ...
struct RowThread {
  unsigned row;
  int first, step;
};

__device__ __forceinline__ RowThread row_thread(Layout layout) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const unsigned block = blockIdx.x;
  if (layout == Layout::kBlockPerRow) return {block, thread, threads};
  if (layout == Layout::kClusterPerRow) {
    const int blocks = cluster_size();
    return {block / blocks, cluster_rank() * threads + thread, blocks * threads};
  }
  if (layout == Layout::kWarpPerRow) return {block * warps + warp, lane, kWarp};
  return {block * kWarp + lane, warp, warps};
}

// Combines the sums of a row's threads; every one of them gets the result. All threads of the block
// call it, those beyond the last row too, and begin_sums before their pass over the row.
struct SharedSums {
  SoftmaxSums of_threads[kSharedThreads], of_blocks[kMaxCluster];
};

__device__ __forceinline__ void begin_sums(Layout layout) {
  if (layout == Layout::kClusterPerRow) cluster_begin();
}

template <typename T>
__device__ __forceinline__ SoftmaxSums reduce_row(SoftmaxSums sums, Layout layout,
                                                  SharedSums& shared) {
  const auto combine = [](const SoftmaxSums& a, const SoftmaxSums& b) { return merge<T>(a, b); };
  if (layout == Layout::kWarpPerRow) {
    __syncwarp();  // as the barriers below do: no write in place comes before a read of the row
    return warp_reduce(sums, combine);
  }
  if (layout == Layout::kLanePerRow) return lane_reduce(sums, shared.of_threads, combine);
  sums = block_reduce(sums, shared.of_threads, no_logits(), combine);
  if (layout == Layout::kBlockPerRow) return sums;
  return cluster_reduce(sums, shared.of_blocks, combine);
}

// What is computed of a row: the branches that calls of its kind cannot take are left out.
enum class Kind {
  kPlain,  // labels, without softcap and label smoothing
  kLabels,
  kProbabilities,
};

// One row: the logits and, beside them, the target's probabilities and the class weights.
template <typename Element, Kind kKind>
struct Row {
  using T = Element;
  static constexpr bool kPlain = kKind == Kind::kPlain, kProb = kKind == Kind::kProbabilities;

  int64_t place;  // of the labels and of what else is per row
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
    return kPlain || softcap == 0.f ? x : softcap * Math<T>::tanh(x * inverse_softcap);
  }
  __device__ __forceinline__ float weight(int c) const {
    return class_weight == nullptr ? 1.f : __ldg(class_weight + c);
  }
};

__device__ __forceinline__ int64_t row_offset(const Strides& strides, unsigned row, int64_t inner) {
  if (inner == 1) return row * strides.batch;
  const unsigned step = static_cast<unsigned>(inner);
  return row / step * strides.batch + row % step * strides.inner;
}

// The strides of a contiguous (N, C, D).
__host__ __device__ inline Strides contiguous_rows(const CrossEntropyProblem& p) {
  return {p.classes * p.inner, p.inner, 1};
}

template <typename R>
__device__ __forceinline__ R row_of(const CrossEntropyProblem& p, unsigned index) {
  using T = typename R::T;
  R row;
  row.place = p.row_index == nullptr ? index : p.row_index[index];
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
template <int kWidth, typename R>
__device__ __forceinline__ Packet<typename R::T> load_unit(const R& row, int c) {
  if constexpr (kWidth == 1) {
    Packet<typename R::T> packet;
    packet.values[0] = row.logits[c * row.stride];
    return packet;
  } else {
    return load_packet(row.logits + c);
  }
}

// Elements whose intermediate values a thread has in registers: half a packet of the half types.
template <int kWidth>
constexpr int kPart = kWidth < 4 ? kWidth : 4;

// The branches on options are around loops over a part, never inside: one element has only some 17
// instructions at full bandwidth.
template <typename R, int kCount>
__device__ __forceinline__ void unpack_capped(const R& row, const Packet<typename R::T>& packet,
                                              int begin, float (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = to_float(packet.values[begin + k]);
  if (!R::kPlain && row.softcap != 0.f) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = row.capped(x[k]);
  }
}

// The weights u of kCount classes from c on: class weights, times smoothed probabilities with
// kProb. `packet` has the probabilities where they are read in packets, from element `begin` on.
template <int kWidth, typename R, int kCount>
__device__ __forceinline__ void load_weights(const R& row, int c,
                                             const Packet<typename R::T>& packet, int begin,
                                             float (&weights)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) weights[k] = 1.f;
  if constexpr (R::kProb) {
    if constexpr (kWidth == 1) {
      weights[0] =
          load_as_float(row.probabilities, c * row.probability_stride, row.probability_storage);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) weights[k] = to_float(packet.values[begin + k]);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) weights[k] = row.keep * weights[k] + row.spread;
  }
  if (row.class_weight != nullptr) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) weights[k] *= __ldg(row.class_weight + c + k);
  }
}

// A packet of probabilities, where they are read in packets: where they have the logits' type and
// alignment.
template <int kWidth, typename R>
__device__ __forceinline__ Packet<typename R::T> load_probabilities(const R& row, int c) {
  if constexpr (R::kProb && kWidth > 1) {
    return load_packet(static_cast<const typename R::T*>(row.probabilities) + c);
  } else {
    return {};
  }
}

// A thread's units of a row: first, first + step, ... below `count`; classes begin at `offset`. It
// takes them in tiles of kUnits.
struct Units {
  int offset, count, first, step;
  __device__ __forceinline__ int tiles(int size) const {
    return (count + size * step - 1) / (size * step);
  }
};

// What adds nothing to the sums.
template <typename T>
__device__ __forceinline__ Packet<T> no_packet() {
  Packet<T> packet;
#pragma unroll
  for (int k = 0; k < Packet<T>::kSize; ++k) packet.values[k] = from_float<T>(-INFINITY);
  return packet;
}

template <int kWidth, typename R, int kUnits>
__device__ __forceinline__ void load_tile(const R& row, const Units& units, int tile,
                                          Packet<typename R::T> (&packets)[kUnits]) {
  const int unit = tile * kUnits * units.step + units.first;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (unit + u * units.step < units.count) {
      packets[u] = load_unit<kWidth>(row, units.offset + (unit + u * units.step) * kWidth);
    } else {
      packets[u] = no_packet<typename R::T>();
    }
  }
}

// Adds a tile to the sums. With kProb the weights u of the sums are weight * probability; else
// `weighted` asks for the class weights alone.
template <int kWidth, typename R, int kUnits>
__device__ __forceinline__ void add_tile(SoftmaxSums& sums, const R& row, bool weighted,
                                         const Units& units, int tile,
                                         const Packet<typename R::T> (&packets)[kUnits]) {
  using T = typename R::T;
  const int unit = tile * kUnits * units.step + units.first;
  if (unit >= units.count) return;
  float max = -INFINITY;
  if constexpr (kWidth == 1) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) max = fmaxf(max, to_float(packets[u].values[0]));
  } else {
    max = largest(packets);
  }
  // tanh is monotone: capping the maximum alone does for all.
  raise_max<T>(sums, row.capped(max));
  const float shift = finite_shift(sums.max);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int c = units.offset + (unit + u * units.step) * kWidth;
    if (unit + u * units.step >= units.count) break;
    const Packet<T> probabilities = load_probabilities<kWidth>(row, c);
    float partial = 0.f;
#pragma unroll
    for (int part = 0; part < kWidth; part += kPart<kWidth>) {
      float x[kPart<kWidth>];
      unpack_capped(row, packets[u], part, x);
#pragma unroll
      for (int k = 0; k < kPart<kWidth>; ++k) partial += Math<T>::exp(x[k] - shift);
      if (R::kProb || (!R::kPlain && weighted)) {
        float weights[kPart<kWidth>];
        load_weights<kWidth>(row, c + part, probabilities, part, weights);
#pragma unroll
        for (int k = 0; k < kPart<kWidth>; ++k) {
          sums.weight += weights[k];
          sums.deviation += weights[k] * (x[k] - shift);
        }
      }
    }
    sums.sum += partial;
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

template <typename R>
__device__ __forceinline__ Split split_row(const R& row) {
  constexpr int kWidth = Packet<typename R::T>::kSize;
  const int head = min(elements_to_alignment(row.logits), row.classes);
  const int packets = (row.classes - head) / kWidth;
  return {head, packets, row.classes - packets * kWidth};
}

// A thread's share of a row: units, and one of the edges. Every layout that takes packets has at
// least 32 threads to a row, and a row has at most 14 edges.
template <typename R, bool kVector>
struct Share {
  static constexpr int kWidth = kVector ? Packet<typename R::T>::kSize : 1;
  Units units, edge;

  __device__ __forceinline__ Share(const R& row, const RowThread& thread) {
    units = {0, row.classes, thread.first, thread.step};
    edge = {0, 0, 0, 1};
    if constexpr (kVector) {
      const Split split = split_row(row);
      units = {split.head, split.packets, thread.first, thread.step};
      if (thread.first < split.edges) edge = {split.edge_class<kWidth>(thread.first), 1, 0, 1};
    }
  }
};

// One pass over a thread's share, the last tile first: the first one, which is full, stays in
// `held`.
template <typename R, bool kVector>
__device__ __forceinline__ SoftmaxSums row_sums(const R& row, const Share<R, kVector>& share,
                                                bool weighted,
                                                Packet<typename R::T> (&held)[kTileUnits]) {
  constexpr int kWidth = Share<R, kVector>::kWidth;
  SoftmaxSums sums = no_logits();
  if constexpr (kVector) {
    Packet<typename R::T> packet[1];
    load_tile<1>(row, share.edge, 0, packet);
    add_tile<1>(sums, row, weighted, share.edge, 0, packet);
  }
#pragma unroll 1
  for (int tile = share.units.tiles(kTileUnits) - 1; tile >= 0; --tile) {
    load_tile<kWidth>(row, share.units, tile, held);
    add_tile<kWidth>(sums, row, weighted, share.units, tile, held);
  }
  return sums;
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

enum class Label { kCounted, kIgnored, kInvalid };

__device__ __forceinline__ Label classify(const CrossEntropyProblem& p, int64_t label) {
  if (label == p.ignore_index) return Label::kIgnored;
  return label >= 0 && label < p.classes ? Label::kCounted : Label::kInvalid;
}

// What the leading thread of a row knows of its label.
struct RowLabel {
  Label kind = Label::kCounted;
  int index = -1;  // where counted
  float logit = 0.f, weight = 0.f;
};

template <typename R>
__device__ __forceinline__ RowLabel read_label(const CrossEntropyProblem& p, const R& row,
                                               bool wants_logit) {
  RowLabel label;
  const int64_t value = p.labels[row.place];
  label.kind = classify(p, value);
  if (label.kind == Label::kCounted) {
    label.index = static_cast<int>(value);
    label.weight = row.weight(label.index);
    if (wants_logit) label.logit = to_float(row.logits[label.index * row.stride]);
  }
  return label;
}

// A row with an infinite logit has NaN for its sum; its log-sum-exp is that logit.
__device__ __forceinline__ float lse_of(float max, float log_sum) {
  return max == INFINITY ? max : max + log_sum;
}

template <typename R>
__device__ __forceinline__ float row_loss_of(const CrossEntropyProblem& p, const R& row,
                                             const RowLabel& label, const SoftmaxSums& sums,
                                             float lse) {
  if (label.kind == Label::kIgnored) return 0.f;
  if (label.kind == Label::kInvalid) return not_a_number();
  const float log_sum = logf(sums.sum);
  float loss = sums.weight * log_sum - sums.deviation;
  if (!R::kProb) {
    const float smoothed = !R::kPlain && p.label_smoothing > 0.f ? row.spread * loss : 0.f;
    loss = row.keep * label.weight * (log_sum + (sums.max - row.capped(label.logit))) + smoothed;
  }
  if (p.z_loss != 0.f) loss += p.z_loss * lse * lse;
  return loss;
}

// Calls `function` with a value of the logits' type.
template <typename Function>
cudaError_t by_storage(Storage storage, const Function& function) {
  switch (storage) {
    case Storage::kFloat32:
      return function(float{});
    case Storage::kFloat16:
      return function(__half{});
    case Storage::kBFloat16:
      return function(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastnn
