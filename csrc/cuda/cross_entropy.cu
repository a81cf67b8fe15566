// Softmax cross-entropy of rows x = softcap(logits), t = label, w = class weights, u = w * q with q
// the smoothed probabilities, e = label_smoothing, C classes:
//   labels:        loss = (1 - e) w_t (lse - x_t) + e/C sum_c w_c (lse - x_c) + z_loss lse^2
//   probabilities: loss = sum_c u_c (lse - x_c) + z_loss lse^2
// Work: one pass with the online softmax (Milakov and Gimelshein 2018, algorithm 3), a row per warp
//   (few classes), block, cluster (many classes passed over twice, or few rows), or lane (strided).
// Memory: one read of the logits forward; one read and one write backward, also where loss and
//   gradient are made at once: the row stays in registers (131072 classes of 2 bytes; the rest is
//   read again from L2). 16-byte packets of contiguous classes, else single elements.
// Numerics: float; lse enters the loss as log(sum) and max apart, so that an offset common to the
//   logits costs no accuracy; the backward takes them apart again where lse is large.
// Limits: at most 2^30 classes and 2^31 - 1 rows. No atomics: same inputs, same bits.
#include <algorithm>

#include "cross_entropy.h"
#include "cross_entropy_row.cuh"

namespace fastnn {

namespace {

// Blocks of kMaxThreads that a multiprocessor has registers for.
constexpr int blocks_of(Kind kind) { return kind == Kind::kPlain ? 2 : 1; }

template <typename T, bool kVector, Kind kKind>
__global__ void __launch_bounds__(kMaxThreads, blocks_of(kKind))
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyProblem p, Layout layout,
                                 float* __restrict__ row_loss, float* __restrict__ row_lse,
                                 float* __restrict__ row_weight) {
  using R = Row<T, kKind>;
  __shared__ SharedSums shared;
  const RowThread thread = row_thread(layout);
  const bool active = thread.row < p.rows;
  const bool leader = active && thread.first == 0;
  begin_sums(layout);

  // The label's logit is asked for before the pass over the row, to hide its latency.
  R row;
  RowLabel label;
  SoftmaxSums sums = no_logits();
  bool skipped = false;
  if (active) {
    row = row_of<R>(p, thread.row);
    if (!R::kProb && (leader || p.skip_ignored)) label = read_label(p, row, leader);
    skipped = p.skip_ignored && label.kind == Label::kIgnored;
    if (!skipped) {
      Packet<T> held[kTileUnits];
      const Share<R, kVector> share(row, thread);
      sums = row_sums(row, share, p.label_smoothing > 0.f, held);
    }
  }
  sums = reduce_row<T>(sums, layout, shared);
  if (!leader) return;

  const float lse = lse_of(sums.max, logf(sums.sum));
  row_loss[row.place] = row_loss_of(p, row, label, sums, lse);
  row_lse[row.place] = skipped ? 0.f : lse;
  if (!R::kProb && row_weight != nullptr) row_weight[row.place] = label.weight;
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

// Where a row's gradients go; null where they are not wanted.
template <typename T>
struct RowOutput {
  T* logits;
  int64_t stride;
  void* probabilities;
  int64_t probability_stride;
};

// The gradients of classes c to c + kCount - 1, whose logits are elements `begin` on of a packet:
// of the logits in `grad`, and (with kProb) of the probabilities in `grad_probabilities`.
template <int kWidth, typename R, int kCount>
__device__ __forceinline__ void gradient_of(const R& row, const RowGradient& g, int c,
                                            const Packet<typename R::T>& packet, int begin,
                                            const Packet<typename R::T>& probabilities,
                                            float (&grad)[kCount],
                                            float (&grad_probabilities)[kCount]) {
  using T = typename R::T;
  float x[kCount];
  unpack_capped(row, packet, begin, x);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float below = (x[k] - g.max) - g.log_sum;
    grad[k] = g.scale * Math<T>::exp(below);
    if (R::kProb) grad_probabilities[k] = -g.upstream * row.keep * row.weight(c + k) * below;
  }
  if (R::kProb || (!R::kPlain && g.spread != 0.f)) {
    float weights[kCount];
    load_weights<kWidth>(row, c, probabilities, begin, weights);
#pragma unroll
    for (int k = 0; k < kCount; ++k) grad[k] -= (R::kProb ? g.upstream : g.spread) * weights[k];
  }
  if (c <= g.label && g.label < c + kCount) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) grad[k] -= c + k == g.label ? g.hit : 0.f;
  }
  if (!R::kPlain && row.softcap != 0.f) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float tanh = x[k] * row.inverse_softcap;
      grad[k] *= 1.f - tanh * tanh;
    }
  }
}

template <int kWidth, typename R, int kUnits>
__device__ __forceinline__ void write_tile(const R& row, const RowGradient& g,
                                           const RowOutput<typename R::T>& out, const Units& units,
                                           int tile,
                                           const Packet<typename R::T> (&packets)[kUnits]) {
  using T = typename R::T;
  const int unit = tile * kUnits * units.step + units.first;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (unit + u * units.step >= units.count) break;
    const int c = units.offset + (unit + u * units.step) * kWidth;
    const Packet<T> probabilities = load_probabilities<kWidth>(row, c);
    Packet<T> grad, grad_probabilities;
    float value[kPart<kWidth>], of_probabilities[kPart<kWidth>];
#pragma unroll
    for (int part = 0; part < kWidth; part += kPart<kWidth>) {
      gradient_of<kWidth>(row, g, c + part, packets[u], part, probabilities, value,
                          of_probabilities);
      pack(grad, part, value);
      if (R::kProb) pack(grad_probabilities, part, of_probabilities);
    }
    if constexpr (kWidth == 1) {
      if (out.logits != nullptr) out.logits[c * out.stride] = grad.values[0];
      if (R::kProb && out.probabilities != nullptr) {
        store_from_float(out.probabilities, c * out.probability_stride, row.probability_storage,
                         of_probabilities[0]);
      }
    } else {
      if (out.logits != nullptr) store_packet(out.logits + c, grad);
      if (R::kProb && out.probabilities != nullptr) {
        store_packet(static_cast<T*>(out.probabilities) + c, grad_probabilities);
      }
    }
  }
}

// The gradient of a thread's share; `held` has its first tile if `holds`.
template <typename R, bool kVector>
__device__ __forceinline__ void write_row(const R& row, const RowGradient& g,
                                          const RowOutput<typename R::T>& out,
                                          const Share<R, kVector>& share, bool holds,
                                          Packet<typename R::T> (&held)[kTileUnits]) {
  constexpr int kWidth = Share<R, kVector>::kWidth;
  if constexpr (kVector) {
    Packet<typename R::T> packet[1];
    load_tile<1>(row, share.edge, 0, packet);
    write_tile<1>(row, g, out, share.edge, 0, packet);
  }
  const int tiles = share.units.tiles(kTileUnits);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile > 0 || !holds) load_tile<kWidth>(row, share.units, tile, held);
    write_tile<kWidth>(row, g, out, share.units, tile, held);
  }
}

template <typename R, bool kVector>
__device__ __forceinline__ void write_zeros(const RowOutput<typename R::T>& out,
                                            const Share<R, kVector>& share) {
  using T = typename R::T;
  constexpr int kWidth = Share<R, kVector>::kWidth;
  const Units& units = share.units;
  const T zero = from_float<T>(0.f);
  Packet<T> zeros;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) zeros.values[k] = zero;
  for (int unit = units.first; unit < units.count; unit += units.step) {
    if constexpr (kVector) {
      store_packet(out.logits + units.offset + unit * kWidth, zeros);
    } else {
      out.logits[unit * out.stride] = zero;
    }
  }
  if (share.edge.count > 0) out.logits[share.edge.offset] = zero;
}

// With kLoss it makes the loss too, of rows that it may overwrite with their gradient.
template <typename T, bool kVector, Kind kKind, bool kLoss>
__global__ void __launch_bounds__(kMaxThreads, blocks_of(kKind))
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyProblem p,
                                  const __grid_constant__ CrossEntropyGradient g, Layout layout) {
  using R = Row<T, kKind>;
  __shared__ SharedSums shared;
  const RowThread thread = row_thread(layout);
  const bool active = thread.row < p.rows;

  // Another pass: for the loss; with probabilities, as the scale of P needs the sum of u; and where
  // lse is too large to have been stored with the accuracy that P needs.
  bool zero = false, again = false;
  float lse = 0.f;
  if (active) {
    const R row = row_of<R>(p, thread.row);
    if (!kLoss) lse = g.lse[row.place];
    if (!R::kProb && read_label(p, row, false).kind == Label::kIgnored) {
      zero = p.skip_ignored || g.grad_lse == nullptr || g.grad_lse[row.place] == 0.f;
    }
    again = !zero && (kLoss || R::kProb || !(fabsf(lse) <= accurate_lse<T>()));
  }
  if (layout == Layout::kLanePerRow) again = __syncthreads_or(again);
  Packet<T> held[kTileUnits];
  float max = lse, log_sum = 0.f, weight = 0.f;
  if (again) {
    begin_sums(layout);
    SoftmaxSums sums = no_logits();
    float label_logit = 0.f;  // read before it is overwritten
    if (active) {
      const R row = row_of<R>(p, thread.row);
      if (!R::kProb && kLoss && thread.first == 0) label_logit = read_label(p, row, true).logit;
      const bool weighted = kLoss && p.label_smoothing > 0.f;
      sums = row_sums(row, Share<R, kVector>(row, thread), weighted, held);
    }
    sums = reduce_row<T>(sums, layout, shared);
    max = sums.max;
    log_sum = logf(sums.sum);
    weight = sums.weight;
    if (kLoss) lse = lse_of(sums.max, log_sum);
    if (kLoss && active && thread.first == 0) {
      const R row = row_of<R>(p, thread.row);
      RowLabel label;
      if (!R::kProb) label = read_label(p, row, false);
      label.logit = label_logit;
      g.row_loss[row.place] = row_loss_of(p, row, label, sums, lse);
      g.row_lse[row.place] = lse;
    }
  }
  if (!active) return;

  // Read again where there was a pass before: nothing of this is held in registers through it.
  const R row = row_of<R>(p, thread.row);
  if (kLoss && zero && thread.first == 0) g.row_loss[row.place] = g.row_lse[row.place] = 0.f;
  RowGradient terms = {};
  terms.max = max;
  terms.log_sum = log_sum;
  terms.label = -1;
  terms.upstream = g.grad_loss == nullptr ? 1.f : g.grad_loss[g.grad_per_row ? row.place : 0];
  if (g.total_weight != nullptr) terms.upstream /= *g.total_weight;
  bool invalid = false;
  if (!R::kProb) {
    const RowLabel label = read_label(p, row, false);
    invalid = label.kind == Label::kInvalid;
    // Chosen, not multiplied: where every row is ignored, upstream is NaN.
    if (label.kind != Label::kCounted) terms.upstream = 0.f;
    terms.label = label.index;
    weight = row.keep * label.weight;
    terms.hit = terms.upstream * weight;
    terms.spread = terms.upstream * row.spread;
    if (terms.spread != 0.f) {
      weight += row.spread * (p.weight_sum == nullptr ? p.classes : *p.weight_sum);
    }
  }
  const float grad_lse = g.grad_lse == nullptr ? 0.f : g.grad_lse[row.place];
  terms.scale = grad_lse;
  // An lse may be infinite.
  if (terms.upstream != 0.f) terms.scale += terms.upstream * (weight + 2.f * p.z_loss * lse);
  if (invalid) terms.scale = not_a_number();

  RowOutput<T> out = {};
  if (g.grad_logits != nullptr) {
    out.logits = static_cast<T*>(g.grad_logits) + row_offset(g.grad_strides, thread.row, p.inner);
    out.stride = g.grad_strides.cls;
  }
  if (R::kProb && g.grad_probabilities != nullptr) {
    const Strides contiguous = contiguous_rows(p);
    out.probabilities = offset_by(g.grad_probabilities, row_offset(contiguous, thread.row, p.inner),
                                  p.probability_storage);
    out.probability_stride = contiguous.cls;
  }
  const Share<R, kVector> share(row, thread);
  if (zero) {
    if (thread.row < g.rows.in_steps(p.rows)) write_zeros(out, share);
  } else {
    write_row(row, terms, out, share, again, held);
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
  int cluster = 1;
};

// What the current device has, where the kernel was compiled for it: multiprocessors, clusters.
struct Device {
  int processors = 1;
  bool clusters = false;
};

template <typename Kernel>
Device current_device(Kernel kernel) {
  Device device;
  int index = 0, clusters = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return device;
  cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index);
  cudaFuncAttributes attributes = {};
  device.clusters = clusters != 0 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
                    attributes.ptxVersion >= 90;
  return device;
}

// A warp takes a row of up to 128 units, or 512 where the rows are enough to fill the device with
// warps. A cluster takes a row that is passed over `twice` and that one block cannot hold, and
// splits rows that are too few for the device.
template <typename Kernel>
Launch plan(const CrossEntropyProblem& p, int64_t class_stride, int width, bool twice,
            Kernel kernel) {
  const int64_t units = p.classes / width;
  Launch launch;
  int64_t blocks = p.rows;
  int threads = kSharedThreads;
  if (class_stride != 1 && p.inner >= kWarp) {
    launch.layout = Layout::kLanePerRow;
    blocks = (p.rows + kWarp - 1) / kWarp;
  } else if (units <= kWarp * kTileUnits || (!twice && units <= 512 && p.rows >= 4096)) {
    launch.layout = Layout::kWarpPerRow;
    blocks = (p.rows + threads / kWarp - 1) / (threads / kWarp);
  } else {
    launch.layout = Layout::kBlockPerRow;
    if (units > (twice ? 256 * kTileUnits : 2048)) threads = kMaxThreads;
    if (units > kMaxThreads * kTileUnits) {
      const Device device = current_device(kernel);
      const auto enough = [&](int cluster) {
        const bool held = !twice || units <= int64_t{cluster} * kMaxThreads * kTileUnits;
        const bool filled =
            p.rows * cluster >= 2 * device.processors || units < 2 * int64_t{cluster} * kMaxThreads;
        return held && filled;
      };
      while (device.clusters && launch.cluster < kMaxCluster && !enough(launch.cluster)) {
        launch.cluster *= 2;
      }
      if (launch.cluster > 1) launch.layout = Layout::kClusterPerRow;
      blocks *= launch.cluster;
    }
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
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = launch.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Calls `function` with the kind of the problem, as a constant.
template <typename Function>
auto by_kind(const CrossEntropyProblem& p, const Function& function) {
  if (p.probabilities != nullptr) {
    return function(std::integral_constant<Kind, Kind::kProbabilities>{});
  }
  if (p.softcap == 0.f && p.label_smoothing == 0.f) {
    return function(std::integral_constant<Kind, Kind::kPlain>{});
  }
  return function(std::integral_constant<Kind, Kind::kLabels>{});
}

// Single elements are no case for speed: one kernel does for all labels.
constexpr Kind elements(Kind kind) { return kind == Kind::kPlain ? Kind::kLabels : kind; }

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
    const auto kernel = by_kind(p, [&](auto kind) {
      return vector ? cross_entropy_forward_kernel<T, true, kind>
                    : cross_entropy_forward_kernel<T, false, elements(kind)>;
    });
    const Launch launch =
        plan(p, p.strides.cls, vector ? Packet<T>::kSize : 1, /*twice=*/false, kernel);
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
    const auto alike = [&](const void* other, const Strides& strides) {
      return other == nullptr ||
             (strides.cls == 1 &&
              aligned_alike(p.logits, p.strides, other, strides, sizeof(T), p.rows, p.inner));
    };
    const bool vector = p.strides.cls == 1 && alike(g.grad_logits, g.grad_strides) &&
                        alike(g.grad_probabilities, contiguous_rows(p)) &&
                        alike(p.probabilities, p.probability_strides) &&
                        (p.probabilities == nullptr || p.probability_storage == p.storage);
    if (g.row_loss != nullptr && !vector && p.probabilities == nullptr) {
      return cudaErrorInvalidValue;  // logits that are no rows of packets, or not overwritten
    }
    const auto kernel = by_kind(p, [&](auto kind) {
      constexpr Kind kKind = kind;
      if (g.row_loss == nullptr) {
        return vector ? cross_entropy_backward_kernel<T, true, kKind, false>
                      : cross_entropy_backward_kernel<T, false, elements(kKind), false>;
      }
      return vector ? cross_entropy_backward_kernel<T, true, kKind, true>
                    : cross_entropy_backward_kernel<T, false, Kind::kProbabilities, true>;
    });
    const int64_t class_stride = std::max(p.strides.cls, g.grad_strides.cls);
    const bool twice = g.row_loss != nullptr || p.probabilities != nullptr;
    const Launch launch = plan(p, class_stride, vector ? Packet<T>::kSize : 1, twice, kernel);
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
