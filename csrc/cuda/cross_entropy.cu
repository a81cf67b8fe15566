// Softmax cross-entropy of rows x = softcap(logits), t = label, w = class weights, u = w * q with q
// the smoothed probabilities, e = label_smoothing, C classes:
//   labels:        loss = (1 - e) w_t (lse - x_t) + e/C sum_c w_c (lse - x_c) + z_loss lse^2
//   probabilities: loss = sum_c u_c (lse - x_c) + z_loss lse^2
// One pass with the online softmax (Milakov and Gimelshein 2018, algorithm 3).
// Work: a row per warp (few classes), per block, or per lane (classes strided, rows adjacent).
// Memory: one read of the logits forward; one read and one write backward. 16-byte packets where
// the classes are contiguous and both sides are aligned alike, else single elements at any stride.
// Numerics: float throughout; lse enters the loss as log(sum) and max apart, so that a common
// offset of the logits costs no accuracy; the backward takes them apart again where lse is large.
// Limits: at most 2^30 classes. No atomics: same inputs, same bits.
#include <algorithm>

#include "cross_entropy.h"
#include "cross_entropy_row.cuh"

namespace fastnn {

namespace {

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

enum class Label { kCounted, kIgnored, kInvalid };

__device__ __forceinline__ Label classify(const CrossEntropyProblem& p, int64_t label) {
  if (label == p.ignore_index) return Label::kIgnored;
  return label >= 0 && label < p.classes ? Label::kCounted : Label::kInvalid;
}

template <typename T, bool kVector, bool kProb>
__global__ void __launch_bounds__(kMaxThreads, kProb ? 1 : 2)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyProblem p, Layout layout,
                                 float* __restrict__ row_loss, float* __restrict__ row_lse,
                                 float* __restrict__ row_weight) {
  __shared__ SoftmaxSums shared[kSharedThreads];
  const RowThread thread = row_thread(layout);
  const bool active = thread.row < p.rows;
  const bool leader = active && thread.first == 0;

  // The label's logit is asked for before the pass over the row, to hide its latency.
  Row<T> row;
  Label kind = Label::kCounted;
  float label_logit = 0.f, label_weight = 1.f;
  SoftmaxSums sums = no_logits();
  if (active) {
    row = row_of<T>(p, thread.row);
    if (!kProb && leader) {
      const int64_t label = p.labels[thread.row];
      kind = classify(p, label);
      if (kind == Label::kCounted) {
        label_logit = to_float(row.logits[label * row.stride]);
        label_weight = row.weight(static_cast<int>(label));
      }
    }
    sums = row_sums<T, kVector, kProb>(row, p.label_smoothing > 0.f, thread.first, thread.step);
  }
  sums = reduce_row<T>(sums, layout, shared);
  if (!leader) return;

  const float log_sum = logf(sums.sum);
  // A row with an infinite logit has NaN for its sum; its log-sum-exp is that logit.
  const float lse = sums.max == INFINITY ? sums.max : sums.max + log_sum;
  row_lse[thread.row] = lse;
  float loss = 0.f;
  if (kProb) {
    loss = sums.weight * log_sum - sums.deviation;
  } else if (kind == Label::kCounted) {
    loss = row.keep * label_weight * (log_sum + (sums.max - row.capped(label_logit)));
    if (p.label_smoothing > 0.f) loss += row.spread * (sums.weight * log_sum - sums.deviation);
  }
  if (p.z_loss != 0.f) loss += p.z_loss * lse * lse;
  if (kind == Label::kIgnored) loss = 0.f;
  if (kind == Label::kInvalid) loss = not_a_number();
  row_loss[thread.row] = loss;
  if (!kProb) row_weight[thread.row] = kind == Label::kCounted ? label_weight : 0.f;
}

// The gradient of a row's logit x_c (capped), of probability P_c:
//   labels:        scale * P_c - spread * w_c - [c = label] hit
//   probabilities: scale * P_c - upstream * u_c
struct RowGradient {
  float max, log_sum;  // P = exp(x - max - log_sum)
  float scale, spread, hit, upstream;
  int label;
};

// The relative error of P is the rounding of lse, half an ulp: below these sizes it is at most
// 2^-20 for float, and a quarter of the gradient's own rounding for the half types.
template <typename T>
__device__ __forceinline__ float accurate_lse() {
  return sizeof(T) == 4 ? 32.f : 1024.f;
}

constexpr int kWriteUnroll = 2;

template <typename T, bool kProb, int kWidth, int kUnits>
__device__ __forceinline__ void write_units(const Row<T>& row, const RowGradient& g, T* grad_logits,
                                            void* grad_probabilities, int64_t grad_stride,
                                            int offset, int units, int first, int step) {
  for (int unit = first; unit < units; unit += kUnits * step) {
    Packet<T> packets[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (unit + u * step < units) {
        packets[u] = load_unit<T, kWidth>(row, offset + (unit + u * step) * kWidth);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (unit + u * step >= units) break;
      const int c = offset + (unit + u * step) * kWidth;
      float x[kWidth], below[kWidth], value[kWidth], weights[kWidth];
      unpack_capped<T, kWidth>(row, packets[u], x);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        below[k] = (x[k] - g.max) - g.log_sum;
        value[k] = g.scale * Math<T>::exp(below[k]);
      }
      if (kProb || g.spread != 0.f) {
        load_weights<T, kProb, kWidth>(row, c, weights);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) value[k] -= (kProb ? g.upstream : g.spread) * weights[k];
      }
      if (c <= g.label && g.label < c + kWidth) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) value[k] -= c + k == g.label ? g.hit : 0.f;
      }
      if (row.softcap != 0.f) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const float tanh = x[k] * row.inverse_softcap;
          value[k] *= 1.f - tanh * tanh;
        }
      }
      Packet<T> grad;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) grad.values[k] = from_float<T>(value[k]);
      if (grad_logits != nullptr) {
        if constexpr (kWidth == 1) {
          grad_logits[c * grad_stride] = grad.values[0];
        } else {
          store_packet(grad_logits + c, grad);
        }
      }
      if constexpr (kProb) {
        if (grad_probabilities != nullptr) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            value[k] = -g.upstream * row.keep * row.weight(c + k) * below[k];
          }
          if constexpr (kWidth == 1) {
            store_from_float(grad_probabilities, c * grad_stride, row.probability_storage,
                             value[0]);
          } else {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) grad.values[k] = from_float<T>(value[k]);
            store_packet(static_cast<T*>(grad_probabilities) + c, grad);
          }
        }
      }
    }
  }
}

template <typename T, bool kVector>
__device__ __forceinline__ void write_zeros(const Row<T>& row, T* grad_logits, int64_t grad_stride,
                                            int first, int step) {
  const T zero = from_float<T>(0.f);
  if constexpr (kVector) {
    constexpr int kWidth = Packet<T>::kSize;
    Packet<T> zeros;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) zeros.values[k] = zero;
    const Split split = split_row(row);
    for (int unit = first; unit < split.packets; unit += step) {
      store_packet(grad_logits + split.head + unit * kWidth, zeros);
    }
    if (first < split.edges) grad_logits[split.edge_class<kWidth>(first)] = zero;
  } else {
    for (int c = first; c < row.classes; c += step) grad_logits[c * grad_stride] = zero;
  }
}

template <typename T, bool kVector, bool kProb>
__global__ void __launch_bounds__(kMaxThreads, kProb ? 1 : 2)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyProblem p,
                                  const __grid_constant__ CrossEntropyGradient g, Layout layout) {
  __shared__ SoftmaxSums shared[kSharedThreads];
  const RowThread thread = row_thread(layout);
  const bool active = thread.row < p.rows;

  Row<T> row;
  RowGradient terms = {};
  terms.label = -1;
  float grad_lse = 0.f;
  bool invalid = false, zero = false;
  if (active) {
    row = row_of<T>(p, thread.row);
    terms.max = g.lse[thread.row];
    if (g.grad_lse != nullptr) grad_lse = g.grad_lse[thread.row];
    terms.upstream = g.grad_loss[g.grad_per_row ? thread.row : 0];
    if (g.total_weight != nullptr) terms.upstream /= *g.total_weight;
    if (!kProb) {
      const int64_t label = p.labels[thread.row];
      const Label kind = classify(p, label);
      float label_weight = 0.f;
      if (kind == Label::kCounted) {
        terms.label = static_cast<int>(label);
        label_weight = row.weight(terms.label);
      } else {
        // Chosen, not multiplied: where every row is ignored, upstream is NaN.
        terms.upstream = 0.f;
      }
      invalid = kind == Label::kInvalid;
      zero = kind == Label::kIgnored && grad_lse == 0.f;
      terms.hit = terms.upstream * row.keep * label_weight;
      terms.spread = terms.upstream * row.spread;
    }
  }

  // Another pass: with probabilities, as the scale of P needs the sum of u; and where lse is too
  // large to have been stored with the accuracy that P needs.
  bool again = active && !zero && (kProb || !(fabsf(terms.max) <= accurate_lse<T>()));
  if (layout == Layout::kLanePerRow) again = __syncthreads_or(again);
  const float lse = terms.max;
  float weight = 0.f;
  if (again) {
    SoftmaxSums sums = no_logits();
    if (active) sums = row_sums<T, kVector, kProb>(row, false, thread.first, thread.step);
    sums = reduce_row<T>(sums, layout, shared);
    terms.max = sums.max;
    terms.log_sum = logf(sums.sum);
    weight = sums.weight;
  }
  if (!active) return;

  if (!kProb) {
    weight = terms.label < 0 ? 0.f : row.keep * row.weight(terms.label);
    if (terms.spread != 0.f) {
      weight += row.spread * (p.weight_sum == nullptr ? p.classes : *p.weight_sum);
    }
  }
  terms.scale = terms.upstream * (weight + 2.f * p.z_loss * lse) + grad_lse;
  if (terms.upstream == 0.f) terms.scale = grad_lse;  // lse may be infinite
  if (invalid) terms.scale = not_a_number();

  // Gradients are contiguous (N, C, D).
  const Strides out = {p.classes * p.inner, p.inner, 1};
  const int64_t base = row_offset(out, thread.row, p.inner);
  T* grad_logits = g.grad_logits == nullptr ? nullptr : static_cast<T*>(g.grad_logits) + base;
  void* grad_probabilities = nullptr;
  if (kProb && g.grad_probabilities != nullptr) {
    grad_probabilities = offset_by(g.grad_probabilities, base, p.probability_storage);
  }
  if (zero) {
    write_zeros<T, kVector>(row, grad_logits, out.cls, thread.first, thread.step);
  } else if constexpr (kVector) {
    constexpr int kWidth = Packet<T>::kSize;
    const Split split = split_row(row);
    write_units<T, kProb, kWidth, kWriteUnroll>(row, terms, grad_logits, grad_probabilities, 1,
                                                split.head, split.packets, thread.first,
                                                thread.step);
    if (thread.first < split.edges) {
      write_units<T, kProb, 1, 1>(row, terms, grad_logits, grad_probabilities, 1,
                                  split.edge_class<kWidth>(thread.first), 1, 0, 1);
    }
  } else {
    write_units<T, kProb, 1, kUnroll>(row, terms, grad_logits, grad_probabilities, out.cls, 0,
                                      row.classes, thread.first, thread.step);
  }
}

// One block's part of the sums over rows; the launch with one block finishes.
constexpr int kReduceThreads = 512;
constexpr int64_t kReduceRows = 8192;  // per block

struct LossAndWeight {
  float loss, weight;
};

__global__ void __launch_bounds__(kReduceThreads)
    reduce_loss_kernel(const float* __restrict__ row_loss, const float* __restrict__ row_weight,
                       int64_t count, int64_t rows, bool last, bool mean, float* __restrict__ loss,
                       float* __restrict__ weight) {
  __shared__ LossAndWeight shared[kWarp];
  LossAndWeight sums = {0.f, 0.f};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    if (row_loss != nullptr) sums.loss += row_loss[i];
    if (row_weight != nullptr) sums.weight += row_weight[i];
  }
  sums = block_reduce(sums, shared, LossAndWeight{0.f, 0.f},
                      [](const LossAndWeight& a, const LossAndWeight& b) {
                        return LossAndWeight{a.loss + b.loss, a.weight + b.weight};
                      });
  if (threadIdx.x != 0) return;
  if (last && row_weight == nullptr) sums.weight = static_cast<float>(rows);
  if (loss != nullptr) loss[blockIdx.x] = last && mean ? sums.loss / sums.weight : sums.loss;
  weight[blockIdx.x] = sums.weight;
}

int64_t reduce_blocks(int64_t rows) {
  return std::clamp<int64_t>((rows + kReduceRows - 1) / kReduceRows, 1, 1024);
}

struct Launch {
  Layout layout;
  dim3 grid, block;
};

// A warp takes a row of up to 128 units, or 512 where the rows are enough to fill the device with
// warps.
Launch plan(const CrossEntropyProblem& p, int64_t class_stride, int width) {
  const int64_t units = p.classes / width;
  Launch launch;
  int64_t blocks = p.rows;
  int threads = kSharedThreads;
  if (class_stride != 1 && p.inner >= kWarp) {
    launch.layout = Layout::kLanePerRow;
    blocks = (p.rows + kWarp - 1) / kWarp;
  } else if (units <= 128 || (units <= 512 && p.rows >= 4096)) {
    launch.layout = Layout::kWarpPerRow;
    blocks = (p.rows + threads / kWarp - 1) / (threads / kWarp);
  } else {
    launch.layout = Layout::kBlockPerRow;
    if (units > 2048) threads = kMaxThreads;
  }
  launch.grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, UINT32_MAX)));
  launch.block = dim3(threads);
  return launch;
}

// Every row begins at the same distance from a 16-byte boundary in both tensors.
bool aligned_alike(const void* a, const Strides& sa, const void* b, const Strides& sb, int size,
                   int64_t rows, int64_t inner) {
  const auto differ = [&](int64_t x, int64_t y) { return (x - y) * size % 16 != 0; };
  if ((reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % 16 != 0) return false;
  if (rows > inner && differ(sa.batch, sb.batch)) return false;
  return inner == 1 || !differ(sa.inner, sb.inner);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const Launch& launch, cudaStream_t stream, void (*kernel)(Parameters...),
                          Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
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

}  // namespace

cudaError_t cross_entropy_forward_cuda(const CrossEntropyProblem& p, float* row_loss, float* lse,
                                       float* row_weight, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return by_storage(p.storage, [&](auto type) {
    using T = decltype(type);
    bool vector = p.strides.cls == 1;
    if (p.probabilities != nullptr) {
      vector = vector && p.probability_storage == p.storage && p.probability_strides.cls == 1 &&
               aligned_alike(p.logits, p.strides, p.probabilities, p.probability_strides, sizeof(T),
                             p.rows, p.inner);
    }
    const auto kernel = p.probabilities == nullptr
                            ? (vector ? cross_entropy_forward_kernel<T, true, false>
                                      : cross_entropy_forward_kernel<T, false, false>)
                            : (vector ? cross_entropy_forward_kernel<T, true, true>
                                      : cross_entropy_forward_kernel<T, false, true>);
    const Launch launch = plan(p, p.strides.cls, vector ? Packet<T>::kSize : 1);
    return launch_kernel(launch, stream, kernel, p, launch.layout, row_loss, lse, row_weight);
  });
}

cudaError_t cross_entropy_backward_cuda(const CrossEntropyProblem& p, const CrossEntropyGradient& g,
                                        cudaStream_t stream) {
  if (p.rows == 0 || (g.grad_logits == nullptr && g.grad_probabilities == nullptr)) {
    return cudaSuccess;
  }
  return by_storage(p.storage, [&](auto type) {
    using T = decltype(type);
    const Strides out = {p.classes * p.inner, p.inner, 1};
    const auto alike = [&](const void* other, const Strides& strides) {
      return other == nullptr ||
             (strides.cls == 1 &&
              aligned_alike(p.logits, p.strides, other, strides, sizeof(T), p.rows, p.inner));
    };
    const bool vector = p.strides.cls == 1 && alike(g.grad_logits, out) &&
                        alike(g.grad_probabilities, out) &&
                        alike(p.probabilities, p.probability_strides) &&
                        (p.probabilities == nullptr || p.probability_storage == p.storage);
    const auto kernel = p.probabilities == nullptr
                            ? (vector ? cross_entropy_backward_kernel<T, true, false>
                                      : cross_entropy_backward_kernel<T, false, false>)
                            : (vector ? cross_entropy_backward_kernel<T, true, true>
                                      : cross_entropy_backward_kernel<T, false, true>);
    const Launch launch = plan(p, std::max(p.strides.cls, out.cls), vector ? Packet<T>::kSize : 1);
    return launch_kernel(launch, stream, kernel, p, g, launch.layout);
  });
}

int64_t reduce_loss_scratch(int64_t rows) { return 2 * reduce_blocks(rows); }

cudaError_t reduce_loss_cuda(const float* row_loss, const float* row_weight, int64_t rows,
                             bool mean, float* scratch, float* loss, float* total_weight,
                             cudaStream_t stream) {
  const int64_t blocks = reduce_blocks(rows);
  Launch launch = {Layout::kBlockPerRow, dim3(static_cast<unsigned>(blocks)), dim3(kReduceThreads)};
  int64_t count = rows;
  if (blocks > 1) {
    float* weights = scratch + blocks;
    const cudaError_t error = launch_kernel(launch, stream, reduce_loss_kernel, row_loss,
                                            row_weight, rows, rows, false, mean, scratch, weights);
    if (error != cudaSuccess) return error;
    row_loss = row_loss == nullptr ? nullptr : scratch;
    row_weight = row_weight == nullptr ? nullptr : weights;
    count = blocks;
    launch.grid = dim3(1);
  }
  return launch_kernel(launch, stream, reduce_loss_kernel, row_loss, row_weight, count, rows, true,
                       mean, loss, total_weight);
}

}  // namespace fastnn
