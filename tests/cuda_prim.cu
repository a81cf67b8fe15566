// One of each of Hopper's instructions as csrc/cuda/prim wraps them, against plain loops: a program
// that tests/test_cuda_linear_act.py builds and runs. Prints a line per check; returns the
// failures.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/prim/copy.cuh"
#include "cuda/prim/mbarrier.cuh"
#include "cuda/prim/named_barrier.cuh"
#include "cuda/prim/tma.cuh"
#include "cuda/prim/wgmma.cuh"

using namespace fastnn;
using T = __nv_bfloat16;

static int failures = 0;

static void report(const char* what, bool right) {
  std::printf("%s %s\n", right ? "ok  " : "FAIL", what);
  failures += !right;
}

static void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(100);
}

template <typename V>
static V* to_device(const std::vector<V>& values) {
  V* data = nullptr;
  check_cuda(cudaMalloc(&data, values.size() * sizeof(V)), "cudaMalloc");
  check_cuda(cudaMemcpy(data, values.data(), values.size() * sizeof(V), cudaMemcpyDefault), "copy");
  return data;
}

template <typename V>
static std::vector<V> from_device(const V* data, size_t count) {
  std::vector<V> values(count);
  check_cuda(cudaMemcpy(values.data(), data, count * sizeof(V), cudaMemcpyDefault), "copy back");
  return values;
}

static std::vector<T> small_integers(size_t count) {  // their products and sums are exact
  std::vector<T> values(count);
  for (auto& value : values) value = __float2bfloat16_rn(static_cast<float>(std::rand() % 7 - 3));
  return values;
}

static float number(T x) { return __bfloat162float(x); }

template <typename... Parameters, typename... Arguments>
static void launch(void (*kernel)(Parameters...), int blocks, int threads, int shared,
                   const char* what, const Arguments&... arguments) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             what);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), what);
  check_cuda(cudaDeviceSynchronize(), what);
}

// --- a barrier's round trip: each of two blocks arrives at the other's, eight times

__global__ void round_trip_kernel(int* seen) {
  auto* barrier = reinterpret_cast<Mbarrier*>(dynamic_shared());
  if (threadIdx.x == 0) mbarrier_init(barrier, 2);
  if (threadIdx.x == 0) mbarrier_fence_init();
  cluster_barrier();
  for (int round = 0; round < 8; ++round) {
    if (threadIdx.x < 2) mbarrier_arrive_at(barrier, threadIdx.x);
    mbarrier_wait(barrier, round % 2);
    atomicAdd(seen, 1);
    __syncthreads();  // or a slow thread would find the barrier a whole turn further
  }
  cluster_barrier();
}

static void round_trip() {
  int* seen = to_device(std::vector<int>{0});
  launch(round_trip_kernel, 2, 64, 64, "round trip", seen);
  report("mbarrier: eight rounds between two blocks", from_device(seen, 1)[0] == 2 * 64 * 8);
}

// --- a box through shared memory: in, swizzled, to both blocks; out again, bounds cut off

struct BoxProblem {
  TensorMap from, to;
  int column, row, part;
  T* raw;  // shared memory of block 1 as it lies there
};

__global__ void box_kernel(const __grid_constant__ BoxProblem p) {
  char* box = dynamic_shared();
  auto* barrier = reinterpret_cast<Mbarrier*>(box + 64 * kSwizzleRow);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  if (threadIdx.x == 0) mbarrier_fence_init();
  cluster_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 64 * kSwizzleRow);
    if (block_rank_in_cluster() == 0) {
      load_box_multicast(box, p.from, p.column, p.row, p.part, barrier, 3);
    }
  }
  mbarrier_wait(barrier, 0);
  if (block_rank_in_cluster() == 1) {
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
      p.raw[i] = reinterpret_cast<const T*>(box)[i];
    }
    if (threadIdx.x == 0) {
      store_box(p.to, p.column, p.row, p.part, box);
      store_commit();
      store_wait_read();
    }
  }
  cluster_barrier();
}

static void box() {
  const int columns = 200, rows = 70, parts = 2, column = 150, row = 20, part = 1;
  const std::vector<T> source = small_integers(columns * rows * parts);
  const T mark = __float2bfloat16_rn(99.f);
  T* from = to_device(source);
  T* to = to_device(std::vector<T>(source.size(), mark));
  T* raw = to_device(std::vector<T>(64 * 64, mark));
  BoxProblem p = {};
  TensorView view = {from, columns, rows, parts, columns, columns * rows, 64};
  check_cuda(make_tensor_map(view, Storage::kBFloat16, &p.from), "tensor map");
  view.data = to;
  check_cuda(make_tensor_map(view, Storage::kBFloat16, &p.to), "tensor map");
  p.column = column, p.row = row, p.part = part, p.raw = raw;
  launch(box_kernel, 2, 128, 64 * kSwizzleRow + 64, "box", p);
  const auto lies = from_device(raw, 64 * 64), copied = from_device(to, source.size());
  bool swizzle = true, bounds = true;
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < 64; ++c) {
      const bool inside = row + r < rows && column + c < columns;
      const float wanted =
          inside ? number(source[(part * rows + row + r) * columns + column + c]) : 0.f;
      swizzle &= number(lies[swizzled(r * kSwizzleRow + c * 2) / 2]) == wanted;
    }
  }
  for (int q = 0; q < parts; ++q) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        const bool inside = q == part && r >= row && r < row + 64 && c >= column && c < column + 64;
        const int at = (q * rows + r) * columns + c;
        bounds &= number(copied[at]) == (inside ? number(source[at]) : 99.f);
      }
    }
  }
  report("copy engine: a box by multicast, swizzled, zeros outside", swizzle);
  report("copy engine: the box stored, nothing outside", bounds);
}

// --- a box of floats added to what is in memory, bounds cut off

struct SumProblem {
  TensorMap to;
  int column, row;
};

__global__ void sum_kernel(const __grid_constant__ SumProblem p) {
  char* box = dynamic_shared();
  for (int i = threadIdx.x; i < 64 * 32; i += blockDim.x) {
    const auto at = static_cast<uint32_t>(i / 32 * kSwizzleRow + i % 32 * 4);
    *reinterpret_cast<float*>(box + swizzled(at)) = static_cast<float>(i);
  }
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x != 0) return;
  add_box(p.to, p.column, p.row, 0, box);
  store_commit();
  store_wait_read();
}

static void sum() {
  const int columns = 100, rows = 70, column = 80, row = 20;
  float* to = to_device(std::vector<float>(columns * rows, 0.5f));
  SumProblem p = {};
  check_cuda(
      make_tensor_map({to, columns, rows, 1, columns, columns, 64}, Storage::kFloat32, &p.to),
      "tensor map");
  p.column = column, p.row = row;
  launch(sum_kernel, 1, 128, 64 * kSwizzleRow, "sum", p);
  const auto sums = from_device(to, static_cast<size_t>(columns * rows));
  bool right = true;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const bool inside = r >= row && c >= column && c < column + 32;
      const int i = (r - row) * 32 + c - column;
      right &= sums[r * columns + c] == 0.5f + (inside ? static_cast<float>(i) : 0.f);
    }
  }
  report("copy engine: a box of floats added", right);
}

// --- a box of a tensor of four dimensions, permuted in memory: in and out

__global__ void box_of_four_kernel(const __grid_constant__ BoxProblem p) {
  char* box = dynamic_shared();
  auto* barrier = reinterpret_cast<Mbarrier*>(box + 16 * kSwizzleRow);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(barrier, 16 * kSwizzleRow);
    load_box(box, p.from, p.column, p.row, p.part, 1, barrier);
    mbarrier_wait(barrier, 0);
    store_box(p.to, p.column, p.row, p.part, 1, box);
    store_commit();
    store_wait_read();
  }
}

static void box_of_four() {
  const int columns = 72, rows = 21, parts = 3, batches = 2, column = 64, row = 10, part = 2;
  const std::vector<T> source = small_integers(columns * rows * parts * batches);
  const T mark = __float2bfloat16_rn(99.f);
  T* to = to_device(std::vector<T>(source.size(), mark));
  BoxProblem p = {};
  // [batches, rows, parts, columns] in memory
  TensorView view = {to_device(source), columns, rows, parts, parts * columns, columns, 16,
                     batches, rows * parts * columns};
  check_cuda(make_tensor_map(view, Storage::kBFloat16, &p.from), "tensor map");
  view.data = to;
  check_cuda(make_tensor_map(view, Storage::kBFloat16, &p.to), "tensor map");
  p.column = column, p.row = row, p.part = part;
  launch(box_of_four_kernel, 1, 32, 16 * kSwizzleRow + 64, "box of four", p);
  const auto copied = from_device(to, source.size());
  bool right = true;
  for (int at = 0; at < static_cast<int>(source.size()); ++at) {
    const int c = at % columns, q = at / columns % parts, r = at / columns / parts % rows;
    const int b = at / columns / parts / rows;
    const bool inside = b == 1 && q == part && r >= row && r < row + 16 && c >= column;
    right &= number(copied[at]) == (inside ? number(source[at]) : 99.f);
  }
  report("copy engine: a box of four dimensions", right);
}

// --- barriers by number: three warps take turns, sixteen times

__global__ void turns_kernel(int* order) {
  const int warp = threadIdx.x / 32;
  auto* count = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  if (warp == 0) named_barrier_arrive(1, 64);
  for (int turn = 0; turn < 16; ++turn) {
    named_barrier_wait(1 + warp, 64);
    if (threadIdx.x % 32 == 0) {
      order[*count] = warp;
      ++*count;
    }
    __syncwarp();
    named_barrier_arrive(1 + (warp + 1) % 3, 64);
  }
  if (warp == 0) named_barrier_wait(1, 64);
}

static void turns() {
  int* order = to_device(std::vector<int>(48, -1));
  launch(turns_kernel, 1, 96, 64, "turns", order);
  const auto got = from_device(order, 48);
  bool right = true;
  for (int i = 0; i < 48; ++i) right &= got[i] == i % 3;
  report("named barriers: three warps in turn", right);
}

// --- one product of 64 x N x 16 of other widths: A from shared memory, then from registers

struct WidthProblem {
  TensorMap a, b;
  float* d;
};

template <int kN, bool kBAcross, bool kFromRegisters>
__global__ void __launch_bounds__(128) width_kernel(const __grid_constant__ WidthProblem p) {
  if constexpr (kHasWgmma) {
    constexpr int kBoxes = kBAcross ? (kN + 63) / 64 : 1, kRows = kBAcross ? 16 : kN;
    constexpr int kBoxB = kRows * kSwizzleRow, kBoxA = 64 * kSwizzleRow;
    char* a = dynamic_shared();
    char* b = a + kBoxA;
    auto* barrier = reinterpret_cast<Mbarrier*>(b + kBoxes * kBoxB);
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_fence_init();
      mbarrier_arrive_expect(barrier, kBoxA + kBoxes * kBoxB);
      load_box(a, p.a, 0, 0, 0, barrier);
      for (int i = 0; i < kBoxes; ++i) load_box(b + i * kBoxB, p.b, 64 * i, 0, 0, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
    float acc[kN / 2];
    const uint64_t db = matrix_descriptor(shared_address(b), kBoxB, kSwizzlePattern);
    if constexpr (kFromRegisters) {
      uint32_t words[4];
      for (int i = 0; i < 4; ++i) {
        const int at = fragment_row(threadIdx.x, 2 * i) * kSwizzleRow +
                       fragment_column(threadIdx.x, 2 * i) * 2;
        words[i] = *reinterpret_cast<const uint32_t*>(a + swizzled(at));
      }
      wgmma_fence();
      wgmma<T, kBAcross>(acc, words, db, false);
      wgmma_commit();
      wgmma_wait<0>();
    } else {
      wgmma_fence();
      wgmma<T, false, kBAcross>(acc, matrix_descriptor(shared_address(a), 0, kSwizzlePattern), db,
                                false);
      wgmma_commit();
      wgmma_wait<0>();
    }
    pin(acc);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      p.d[fragment_row(threadIdx.x, i) * kN + fragment_column(threadIdx.x, i)] = acc[i];
    }
  }
}

template <int kN, bool kBAcross, bool kFromRegisters>
static void width(const char* what) {
  const auto a = small_integers(64 * 64), b = small_integers(kN * 64);  // 16 of K are taken
  float* d = to_device(std::vector<float>(64 * kN, -1.f));
  const int columns = kBAcross ? kN : 64, rows = kBAcross ? 16 : kN;
  WidthProblem p = {};
  p.d = d;
  check_cuda(make_tensor_map({to_device(a), 64, 64, 1, 64, 64, 64}, Storage::kBFloat16, &p.a), "tensor map");
  check_cuda(
      make_tensor_map({to_device(b), columns, rows, 1, columns, columns, rows}, Storage::kBFloat16, &p.b),
      "tensor map");
  launch(width_kernel<kN, kBAcross, kFromRegisters>, 1, 128, (128 + kN) * kSwizzleRow, what, p);
  const auto got = from_device(d, 64 * kN);
  int wrong = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kN; ++n) {
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) {
        sum += number(a[m * 64 + k]) * number(b[kBAcross ? k * kN + n : n * 64 + k]);
      }
      wrong += got[m * kN + n] != sum;
    }
  }
  if (wrong > 0) std::printf("     %d of %d differ\n", wrong, 64 * kN);
  report(what, wrong == 0);
}

template <int kN>
static void widths(const char* shared, const char* registers) {
  width<kN, false, false>(shared);
  if constexpr (kN % 64 == 0) width<kN, true, true>(registers);
}

// --- one product of 64 x 256 x 64, each operand stored along and across K

struct TileProblem {
  TensorMap a, b;
  float* d;
};

template <bool kAAcross, bool kBAcross>
__global__ void __launch_bounds__(128) tile_kernel(const __grid_constant__ TileProblem p) {
  if constexpr (kHasWgmma) {
    constexpr int kBox = 64 * kSwizzleRow;
    char* a = dynamic_shared();
    char* b = a + kBox;
    auto* barrier = reinterpret_cast<Mbarrier*>(b + 4 * kBox);
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_fence_init();
      mbarrier_arrive_expect(barrier, 5 * kBox);
      load_box(a, p.a, 0, 0, 0, barrier);
      for (int i = 0; i < 4; ++i) {
        load_box(b + i * kBox, p.b, kBAcross ? 64 * i : 0, kBAcross ? 0 : 64 * i, 0, barrier);
      }
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
    float acc[128];
    const uint64_t da = matrix_descriptor(shared_address(a), kBox, kSwizzlePattern);
    const uint64_t db = matrix_descriptor(shared_address(b), kBox, kSwizzlePattern);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma<T, kAAcross, kBAcross>(acc, advanced(da, step * 16 * (kAAcross ? kSwizzleRow : 2)),
                                   advanced(db, step * 16 * (kBAcross ? kSwizzleRow : 2)),
                                   step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      p.d[fragment_row(threadIdx.x, i) * 256 + fragment_column(threadIdx.x, i)] = acc[i];
    }
  }
}

template <bool kAAcross, bool kBAcross>
static void tile(const char* what) {
  const auto a = small_integers(64 * 64), b = small_integers(256 * 64);  // a[m][k] or a[k][m], ...
  float* d = to_device(std::vector<float>(64 * 256, -1.f));
  const int width = kBAcross ? 256 : 64;
  TileProblem p = {};
  p.d = d;
  check_cuda(make_tensor_map({to_device(a), 64, 64, 1, 64, 64, 64}, Storage::kBFloat16, &p.a), "tensor map");
  check_cuda(
      make_tensor_map({to_device(b), width, 256 * 64 / width, 1, width, width, 64},
                      Storage::kBFloat16, &p.b),
      "tensor map");
  launch(tile_kernel<kAAcross, kBAcross>, 1, 128, 5 * 64 * kSwizzleRow + 64, what, p);
  const auto got = from_device(d, 64 * 256);
  int wrong = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 256; ++n) {
      float sum = 0.f;
      for (int k = 0; k < 64; ++k) {
        sum += number(a[kAAcross ? k * 64 + m : m * 64 + k]) *
               number(b[kBAcross ? k * 256 + n : n * 64 + k]);
      }
      wrong += got[m * 256 + n] != sum;
    }
  }
  if (wrong > 0) std::printf("     %d of 16384 differ\n", wrong);
  report(what, wrong == 0);
}

int main() {
  round_trip();
  box();
  sum();
  box_of_four();
  turns();
  widths<64>("wgmma of 64 columns", "wgmma of 64 columns: A from registers, B across K");
  widths<48>("wgmma of 48 columns", "");
  widths<80>("wgmma of 80 columns", "");
  widths<128>("wgmma of 128 columns", "wgmma of 128 columns: A from registers, B across K");
  widths<256>("wgmma of 256 columns", "wgmma of 256 columns: A from registers, B across K");
  tile<false, false>("wgmma: A along K, B along K");
  tile<false, true>("wgmma: A along K, B across K");
  tile<true, false>("wgmma: A across K, B along K");
  tile<true, true>("wgmma: A across K, B across K");
  return failures;
}
