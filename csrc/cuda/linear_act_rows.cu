// What linear + activation does element by element, bandwidth bound: the epilogue of a product that
// cuBLAS made, the gradient dP of the pre-activation with its column sums, and dropout alone.
//   dP = act'(saved) * mask * grad_out;  gated: dgate = act'(gate) * up * g, dup = act(gate) * g
// Work: a thread has eight neighbouring columns (16 bytes of a half type, one draw of the dropout
//   generator); dP: a block has 256 columns and a range of rows, its 8 warps every eighth of them.
// Numerics: float; grad_bias adds up float dP per warp, block and range, in an order that only the
//   shape decides: no atomics, same inputs, same bits.
// Floor: reading grad_out and saved and writing dP at memory's speed. Reached: not measured yet.
#include "cuda/linear_act.h"
#include "cuda/linear_act_epilogue.cuh"

namespace fastnn {

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kBlockCols = kLanes * kGroup;
constexpr int64_t kMaxRanges = 64;  // of rows; each has a partial sum per column

template <typename T>
__global__ void __launch_bounds__(kThreads) epilogue_kernel(Epilogue e, int64_t rows) {
  const int64_t groups = dropout_groups(e.width);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= rows * groups) return;
  const int64_t row = index / groups, col = index % groups * kGroup;
  const int count = static_cast<int>(min(e.width - col, int64_t{kGroup}));
  const T* preact = static_cast<const T*>(e.preact) + row * (e.gated ? 2 * e.width : e.width) + col;
  float x[kGroup], up[kGroup];
  load_group(preact, count, x);
  if (e.gated) load_group(preact + e.width, count, up);
  const Dropout dropout(e.seed, e.threshold, e.scale);
  Epilogue rest = e;
  rest.preact = nullptr;
  rest.bias = nullptr;
  finish_group<T, true>(rest, dropout, row, col, count, x, up);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* in, T* out, int64_t rows, int64_t cols, const int64_t* seed,
                   uint32_t threshold, float scale) {
  const int64_t groups = dropout_groups(cols);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= rows * groups) return;
  const int64_t row = index / groups, col = index % groups * kGroup;
  const int count = static_cast<int>(min(cols - col, int64_t{kGroup}));
  float x[kGroup];
  load_group(in + row * cols + col, count, x);
  Dropout(seed, threshold, scale).apply(row, cols, col, x);
  store_group(out + row * cols + col, count, x);
}

struct RowRanges {
  int64_t height;
  int count;
};

RowRanges row_ranges(int64_t rows) {
  const int64_t even = (rows + kMaxRanges - 1) / kMaxRanges;
  const int64_t height = even < 64 ? 64 : even;
  return {height, static_cast<int>((rows + height - 1) / height)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) preact_grad_kernel(PreactGradient p, RowRanges ranges) {
  __shared__ float sums[kWarps][kBlockCols];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t col0 = int64_t{blockIdx.x} / ranges.count * kBlockCols;
  const int range = blockIdx.x % ranges.count;
  const int64_t col = col0 + lane * kGroup;
  const int64_t begin = range * ranges.height, end = min(begin + ranges.height, p.rows);
  const int count = static_cast<int>(max(min(p.width - col, int64_t{kGroup}), int64_t{0}));
  const int64_t columns = p.gated ? 2 * p.width : p.width;
  const Dropout dropout(p.seed, p.threshold, p.scale);
  float sum[kGroup] = {}, up_sum[kGroup] = {};

  for (int64_t row = begin + warp; row < end && count > 0; row += kWarps) {
    float g[kGroup];
    load_group(static_cast<const T*>(p.grad_out) + row * p.width + col, count, g);
    if (dropout.on) dropout.apply(row, p.width, col, g);
    const int64_t at = row * columns + col;
    if (p.saved != nullptr) {
      const T* saved = static_cast<const T*>(p.saved) + at;
      float x[kGroup], d[kGroup];
      load_group(saved, count, x);
      activate_with<T, true>(p.activation, x, d);
      if (p.gated) {
        float up[kGroup];
        load_group(saved + p.width, count, up);
        multiply_group(x, g);  // dup
        multiply_group(g, up);
        add_group(up_sum, x);
        if (p.grad_preact != nullptr) {
          store_group(static_cast<T*>(p.grad_preact) + at + p.width, count, x);
        }
      }
      multiply_group(g, d);
    }
    add_group(sum, g);
    if (p.grad_preact != nullptr) store_group(static_cast<T*>(p.grad_preact) + at, count, g);
  }

  if (p.grad_bias == nullptr) return;
  // Columns past the end hold zeros, as load_group's do.
  for (int part = 0; part < (p.gated ? 2 : 1); ++part) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sums[warp][lane * kGroup + i] = part == 0 ? sum[i] : up_sum[i];
    }
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) total += sums[other][threadIdx.x];
    const int64_t mine = col0 + threadIdx.x;
    if (mine < p.width) p.scratch[range * columns + part * p.width + mine] = total;
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_grad_kernel(const float* scratch, T* grad_bias, int64_t columns, int ranges) {
  __shared__ float sums[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t col = int64_t{blockIdx.x} * kLanes + lane;
  float sum = 0.f;
  for (int range = warp; range < ranges && col < columns; range += kWarps) {
    sum += scratch[range * columns + col];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || col >= columns) return;
  float total = 0.f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) total += sums[other][lane];
  grad_bias[col] = from_float<T>(total);
}

cudaError_t grid_of(int64_t blocks, cudaStream_t stream, cudaLaunchConfig_t& config) {
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaSuccess;
}

// Calls f with a value of the storage's type.
template <typename F>
cudaError_t visit_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kFloat16:
      return f(__half{});
    case Storage::kBFloat16:
      return f(__nv_bfloat16{});
    case Storage::kFloat32:
      return f(float{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t apply_epilogue_cuda(const Epilogue& epilogue, Storage storage, int64_t rows,
                                cudaStream_t stream) {
  const int64_t groups = rows * dropout_groups(epilogue.width);
  if (groups == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  const cudaError_t error = grid_of((groups + kThreads - 1) / kThreads, stream, config);
  if (error != cudaSuccess) return error;
  return visit_storage(storage, [&](auto tag) {
    return cudaLaunchKernelEx(&config, epilogue_kernel<decltype(tag)>, epilogue, rows);
  });
}

cudaError_t dropout_cuda(const void* in, void* out, Storage storage, int64_t rows, int64_t cols,
                         const int64_t* seed, uint32_t threshold, float scale,
                         cudaStream_t stream) {
  const int64_t groups = rows * dropout_groups(cols);
  if (groups == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  const cudaError_t error = grid_of((groups + kThreads - 1) / kThreads, stream, config);
  if (error != cudaSuccess) return error;
  return visit_storage(storage, [&](auto tag) {
    using T = decltype(tag);
    return cudaLaunchKernelEx(&config, dropout_kernel<T>, static_cast<const T*>(in),
                              static_cast<T*>(out), rows, cols, seed, threshold, scale);
  });
}

int64_t preact_grad_scratch(int64_t rows, int64_t columns) {
  return row_ranges(rows).count * columns;
}

cudaError_t preact_grad_cuda(const PreactGradient& p, Storage storage, cudaStream_t stream) {
  if (p.width == 0) return cudaSuccess;
  const RowRanges ranges = row_ranges(p.rows);
  const int64_t columns = p.gated ? 2 * p.width : p.width;
  cudaLaunchConfig_t config = {};
  cudaError_t error =
      grid_of((p.width + kBlockCols - 1) / kBlockCols * ranges.count, stream, config);
  if (error != cudaSuccess) return error;
  return visit_storage(storage, [&](auto tag) {
    using T = decltype(tag);
    if (p.rows > 0) {
      error = cudaLaunchKernelEx(&config, preact_grad_kernel<T>, p, ranges);
      if (error != cudaSuccess) return error;
    }
    if (p.grad_bias == nullptr) return cudaSuccess;
    error = grid_of((columns + kLanes - 1) / kLanes, stream, config);
    if (error != cudaSuccess) return error;
    return cudaLaunchKernelEx(&config, bias_grad_kernel<T>, const_cast<const float*>(p.scratch),
                              static_cast<T*>(p.grad_bias), columns, ranges.count);
  });
}

}  // namespace fastnn
