// The small kernels around the products of linear cross-entropy: they drop the ignored rows without
// the host knowing how many there are, merge what a product's tiles left of its rows, and scale
// finished gradients.
// Work: the compaction is one block's prefix sum over the labels (8192 of them: 8 rounds); rows are
//   moved by a block each; tiles are merged by a lane per row and eight warps, in a fixed order;
//   the scaling strides over the tensor with a few blocks a multiprocessor, so that the usual scale
//   of 1 costs a launch.
#include <algorithm>

#include "cross_entropy_row.cuh"
#include "linear_cross_entropy.h"
#include "linear_cross_entropy_epilogue.cuh"

namespace fastnn {

namespace {

constexpr int kCompactThreads = 1024, kMoveThreads = 256, kScaleThreads = 256;
constexpr int kScaleBlocks = 2048;

__global__ void __launch_bounds__(kCompactThreads)
    compact_rows_kernel(const int64_t* __restrict__ labels, int rows, int classes,
                        int64_t ignore_index, const float* __restrict__ class_weight,
                        int* __restrict__ place, int* __restrict__ kept,
                        float* __restrict__ row_weight) {
  __shared__ int kept_of_warps[kCompactThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int before = 0;  // kept rows of the rounds so far
  for (int first = 0; first < rows; first += kCompactThreads) {
    const int row = first + static_cast<int>(threadIdx.x);
    const int64_t label = row < rows ? labels[row] : ignore_index;
    const bool keep = label != ignore_index;
    const unsigned of_warp = __ballot_sync(kAllLanes, keep);
    if (lane == 0) kept_of_warps[warp] = __popc(of_warp);
    __syncthreads();
    int rank = before + __popc(of_warp & ((1u << lane) - 1));  // kept rows before this one
    for (int other = 0; other < kCompactThreads / kWarp; ++other) {
      if (other < warp) rank += kept_of_warps[other];
      before += kept_of_warps[other];
    }
    if (row < rows) {
      place[keep ? rank : rows - 1 - (row - rank)] = row;
      if (row_weight != nullptr) {
        const bool counted = keep && label >= 0 && label < classes;
        row_weight[row] = !counted ? 0.f : class_weight == nullptr ? 1.f : class_weight[label];
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *kept = before;
}

__global__ void gemm_scalars_kernel(const float* total_weight, const int* kept, float* scalars) {
  scalars[0] = kept != nullptr && *kept == 0 ? 0.f
               : total_weight == nullptr     ? 1.f
                                             : 1.f / *total_weight;
  scalars[1] = 0.f;
  scalars[2] = 1.f;
}

template <typename Unit>
__global__ void __launch_bounds__(kMoveThreads)
    move_rows_kernel(const Unit* __restrict__ from, int64_t from_stride, Unit* __restrict__ to,
                     int64_t to_stride, int units, const int* __restrict__ place, RowCount there,
                     int rows, bool scatter) {
  const int row = blockIdx.x, moved = place[row];
  from += from_stride * (scatter ? row : moved);
  to += to_stride * (scatter ? moved : row);
  const bool present = row < there.of(rows);
  for (int unit = threadIdx.x; unit < units; unit += kMoveThreads) {
    to[unit] = present ? from[unit] : Unit{};
  }
}

template <typename T>
__global__ void __launch_bounds__(kSharedThreads)
    merge_statistics_kernel(const __grid_constant__ CrossEntropyProblem p, RowStatistics s,
                            int64_t tiles, float* __restrict__ row_loss, float* __restrict__ lse) {
  using R = Row<T, Kind::kLabels>;
  __shared__ SoftmaxSums shared[kSharedThreads];
  const RowThread thread = row_thread(Layout::kLanePerRow);
  const bool active = thread.row < p.rows;
  R row;
  RowLabel label;
  SoftmaxSums sums = no_logits();
  if (active) {
    row = row_of<R>(p, thread.row);
    label = read_label(p, row, false);
    if (label.kind != Label::kIgnored) {
#pragma unroll 4
      for (int64_t tile = thread.first; tile < tiles; tile += thread.step) {
        const float* from = sums_of(s, p.rows, thread.row, tile);
        SoftmaxSums part = {from[0], from[1], 0.f, 0.f};
        if (s.weighted) part = *reinterpret_cast<const SoftmaxSums*>(from);
        sums = merge<T>(sums, part);
      }
    }
  }
  sums = lane_reduce(sums, shared,
                     [](const SoftmaxSums& a, const SoftmaxSums& b) { return merge<T>(a, b); });
  if (!active || thread.first != 0) return;
  if (label.kind == Label::kCounted) label.logit = s.label_logit[thread.row];
  const float row_lse = lse_of(sums.max, logf(sums.sum));
  row_loss[row.place] = row_loss_of(p, row, label, sums, row_lse);
  lse[row.place] = label.kind == Label::kIgnored ? 0.f : row_lse;
}

template <typename T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(T* __restrict__ data, int64_t count, const float* __restrict__ scale) {
  const float factor = *scale;
  if (factor == 1.f) return;
  constexpr int kWidth = Packet<T>::kSize;
  const int head = static_cast<int>(min(static_cast<int64_t>(elements_to_alignment(data)), count));
  const int64_t packets = (count - head) / kWidth, tail = head + packets * kWidth;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScaleThreads;
  for (int64_t unit = thread; unit < packets; unit += step) {
    Packet<T> packet = load_packet(data + head + unit * kWidth);
    float x[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] = to_float(packet.values[k]) * factor;
    pack(packet, 0, x);
    store_packet(data + head + unit * kWidth, packet);
  }
  if (thread < head) data[thread] = from_float<T>(to_float(data[thread]) * factor);
  if (thread < count - tail) {
    data[tail + thread] = from_float<T>(to_float(data[tail + thread]) * factor);
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(int64_t blocks, int threads, cudaStream_t stream, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace

cudaError_t compact_rows_cuda(const int64_t* labels, int rows, int classes, int64_t ignore_index,
                              const float* class_weight, int* place, int* kept, float* row_weight,
                              cudaStream_t stream) {
  return launch(1, kCompactThreads, stream, compact_rows_kernel, labels, rows, classes,
                ignore_index, class_weight, place, kept, row_weight);
}

cudaError_t gemm_scalars_cuda(const float* total_weight, const int* kept, float* scalars,
                              cudaStream_t stream) {
  return launch(1, kWarp, stream, gemm_scalars_kernel, total_weight, kept, scalars);
}

cudaError_t move_rows_cuda(RowBytes from, RowBytes to, int64_t bytes, int element_size,
                           const int* place, RowCount there, int rows, bool scatter,
                           cudaStream_t stream) {
  if (rows == 0 || bytes == 0) return cudaSuccess;
  const auto move = [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int64_t kSize = sizeof(Unit);
    return launch(rows, kMoveThreads, stream, move_rows_kernel<Unit>,
                  static_cast<const Unit*>(from.data), from.stride / kSize,
                  static_cast<Unit*>(to.data), to.stride / kSize, static_cast<int>(bytes / kSize),
                  place, there, rows, scatter);
  };
  const auto bits = reinterpret_cast<uintptr_t>(from.data) | reinterpret_cast<uintptr_t>(to.data) |
                    static_cast<uintptr_t>(from.stride | to.stride | bytes);
  if (bits % sizeof(uint4) == 0) return move(uint4{});
  return element_size == 2 ? move(uint16_t{}) : move(uint32_t{});
}

cudaError_t merge_statistics_cuda(const CrossEntropyProblem& problem,
                                  const RowStatistics& statistics, int64_t tiles, float* row_loss,
                                  float* lse, cudaStream_t stream) {
  const int64_t blocks = (problem.rows + kWarp - 1) / kWarp;
  return by_storage(problem.storage, [&](auto type) {
    return launch(blocks, kSharedThreads, stream, merge_statistics_kernel<decltype(type)>, problem,
                  statistics, tiles, row_loss, lse);
  });
}

cudaError_t scale_cuda(void* data, Storage storage, int64_t count, const float* scale,
                       cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return by_storage(storage, [&](auto type) {
    using T = decltype(type);
    const int64_t blocks = (count + kScaleThreads - 1) / kScaleThreads;
    return launch(std::min<int64_t>(blocks, kScaleBlocks), kScaleThreads, stream, scale_kernel<T>,
                  static_cast<T*>(data), count, scale);
  });
}

}  // namespace fastnn
