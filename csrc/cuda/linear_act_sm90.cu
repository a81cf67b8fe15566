// The product with a fused epilogue on Hopper: wgmma from shared memory that the copy engine fills.
//   out = epilogue(A B^T), half types; A [M, K] and B [N, K] stored along K or across it.
// Work: clusters of 2 blocks stay resident and take tiles of 256 x 256 in L2-friendly order; a
// block
//   has 128 x 256 of one (gated: 128 columns of the gate and the same 128 of the up projection), a
//   B arriving once for both by multicast, half from each. Three warp groups: two multiply, 64 rows
//   each, and leave P = product + bias, rounded, in shared memory; of the first, one warp fills a
//   ring of 3 stages of 64 of K, and three store P and do the rest of the epilogue while the next
//   tile is multiplied, so that only rounding P is not hidden.
// Memory: 3 x 48 KB stages, 64 KB of P. Ragged M, N, K are the copy engine's bounds.
// Numerics: float accumulation; activation, dropout and residual of P as rounded, which is what is
//   saved and what the backward sees.
// Floor: the operations over the tensor cores' rate. Reached: not measured yet.
#include "cuda/linear_act.h"
#include "cuda/linear_act_epilogue.cuh"
#include "cuda/prim/mbarrier.cuh"
#include "cuda/prim/ring.cuh"
#include "cuda/prim/shared.cuh"
#include "cuda/prim/tma.cuh"
#include "cuda/prim/wgmma.cuh"
#include "cuda/tile_order.h"

namespace fastnn {

// Not an unnamed namespace, whose unused names the compiler reports for targets without wgmma.
namespace sm90 {

inline constexpr int kGroupThreads = 128;  // of a warp group
inline constexpr int kMultipliers = 2;     // warp groups
inline constexpr int kThreads = kGroupThreads * (1 + kMultipliers);
inline constexpr int kFinishers = kGroupThreads - 32;  // threads
inline constexpr int kBlocks = 2;                      // of a cluster, one above the other
inline constexpr int kTileM = 128, kTileN = 256, kDepth = 64;
inline constexpr int kStages = 3;
inline constexpr int kBoxRows = 128;                         // of an operand stored along K
inline constexpr int kBox = kSwizzleElements * kSwizzleRow;  // bytes of 64 rows
inline constexpr int kBytesA = kTileM * kSwizzleRow, kBytesB = kTileN * kSwizzleRow;
inline constexpr int kStageBytes = kBytesA + kBytesB;
inline constexpr int kProductBytes = kTileM * kTileN * 2;
inline constexpr int kShared =
    kStages * kStageBytes + kProductBytes + 2 * (kStages + kMultipliers) * sizeof(Mbarrier);
// Registers a thread; the launch bounds give 168 to each at first. A fourth warp group for the
// epilogue would leave 128, with which wgmma of 256 columns does not compile.
inline constexpr int kFirstRegisters = 120, kMultiplierRegisters = 192;
static_assert(kFirstRegisters + kMultipliers * kMultiplierRegisters <= 504,
              "all of a multiprocessor's registers");

struct Sm90Problem {
  TensorMap a, b, product;  // `product`: where P is stored, in whole boxes
  Epilogue epilogue;
  int m, k;
  bool store_product;  // P itself is an output: the preact, or `out` where nothing follows
  bool finish;         // something follows: `out` is computed from P
};

// One block's tiles and its place in them.
struct Tiles {
  TileOrder order;
  int width;  // columns of `out` a tile

  __device__ __forceinline__ Tiles(const Sm90Problem& p)
      : order{(p.m + kBlocks * kTileM - 1) / (kBlocks * kTileM), 0},
        width(p.epilogue.gated ? kTileN / 2 : kTileN) {
    order.tiles_n = static_cast<int>((p.epilogue.width + width - 1) / width);
  }
  // Calls f(row, column) of every tile that this block has.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    const int rank = static_cast<int>(block_rank_in_cluster()), clusters = gridDim.x / kBlocks;
    for (int i = blockIdx.x / kBlocks; i < order.count(); i += clusters) {
      const TileOrder::Tile tile = order.at(i);
      f((tile.m * kBlocks + rank) * kTileM, tile.n * width);
    }
  }
};

// Shared memory: the stages, P in 2 x 4 boxes of 64 x 64, the barriers.
struct Memory {
  char* base;
  __device__ __forceinline__ char* a(int stage) const { return base + stage * kStageBytes; }
  __device__ __forceinline__ char* b(int stage) const { return a(stage) + kBytesA; }
  __device__ __forceinline__ char* product(int half) const {
    return base + kStages * kStageBytes + half * (kProductBytes / kMultipliers);
  }
  __device__ __forceinline__ Mbarrier* barriers() const {
    return reinterpret_cast<Mbarrier*>(base + kStages * kStageBytes + kProductBytes);
  }
  __device__ __forceinline__ Mbarrier* full(int stage) const { return barriers() + stage; }
  __device__ __forceinline__ Mbarrier* empty(int stage) const {
    return barriers() + kStages + stage;
  }
  __device__ __forceinline__ Mbarrier* ready(int half) const {
    return barriers() + 2 * kStages + half;
  }
  __device__ __forceinline__ Mbarrier* taken(int half) const {
    return barriers() + 2 * kStages + kMultipliers + half;
  }
};

// One thread: fills a stage as soon as both blocks are done with it, for B goes to both.
template <bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void load_tiles(const Sm90Problem& p, const Tiles& tiles,
                                           const Memory& memory) {
  constexpr uint16_t kBoth = (1 << kBlocks) - 1;
  const int rank = static_cast<int>(block_rank_in_cluster());
  prefetch_map(p.a);
  prefetch_map(p.b);
  Ring<kStages> ring;
  tiles.each([&](int row, int column) {
    // This block's half of B: of a gated one the gate's rows or the up projection's.
    const int part = p.epilogue.gated ? rank : 0;
    const int half = p.epilogue.gated ? column : column + rank * kBoxRows;
    for (int k = 0; k < p.k; k += kDepth) {
      mbarrier_wait(memory.empty(ring.slot), ring.parity() ^ 1);
      Mbarrier* const full = memory.full(ring.slot);
      mbarrier_arrive_expect(full, kStageBytes);
      char* const a = memory.a(ring.slot);
      char* const b = memory.b(ring.slot) + rank * (kBytesB / kBlocks);
      if constexpr (kAAlongK) {
        load_box(a, p.a, k, row, 0, full);
      } else {
        load_box(a, p.a, row, k, 0, full);
        load_box(a + kBox, p.a, row + kSwizzleElements, k, 0, full);
      }
      if constexpr (kBAlongK) {
        load_box_multicast(b, p.b, k, half, part, full, kBoth);
      } else {
        load_box_multicast(b, p.b, half, k, 0, full, kBoth);
        load_box_multicast(b + kBox, p.b, half + kSwizzleElements, k, 0, full, kBoth);
      }
      ring.next();
    }
  });
}

// A warp group: its 64 rows of P, for every tile.
template <typename T, bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void multiply_tiles(const Sm90Problem& p, const Tiles& tiles,
                                               const Memory& memory, int half) {
  constexpr int kPairs = kTileN / 8;  // neighbouring columns that a thread has
  constexpr int kStepA = 16 * (kAAlongK ? 2 : kSwizzleRow);  // bytes to the next 16 of K
  constexpr int kStepB = 16 * (kBAlongK ? 2 : kSwizzleRow);
  const int thread = threadIdx.x % kGroupThreads;
  const T* bias = static_cast<const T*>(p.epilogue.bias);
  Ring<kStages> ring;
  int parity = 0;
  float acc[kTileN / 2];
  const auto release = [&](int slot) {
    if (thread < kBlocks) mbarrier_arrive_at(memory.empty(slot), thread);
  };

  tiles.each([&](int, int column) {
    // The tile's bias, in registers by the time it is needed.
    uint32_t bias_pairs[kPairs];
    if (bias != nullptr) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int within = fragment_column(thread, 4 * j);
        const bool up = p.epilogue.gated && within >= kTileN / 2;
        const int64_t at = column + (up ? within - kTileN / 2 : within);
        const T* from = bias + at + (up ? p.epilogue.width : 0);
        bias_pairs[j] = at < p.epilogue.width ? *reinterpret_cast<const uint32_t*>(from) : 0;
      }
    }

    int previous = -1;
    for (int k = 0; k < p.k; k += kDepth) {
      mbarrier_wait(memory.full(ring.slot), ring.parity());
      const uint64_t a = matrix_descriptor(shared_address(memory.a(ring.slot)) + half * kBox, kBox,
                                           kSwizzlePattern);
      const uint64_t b =
          matrix_descriptor(shared_address(memory.b(ring.slot)), kBox, kSwizzlePattern);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        wgmma<T, !kAAlongK, !kBAlongK>(acc, advanced(a, step * kStepA), advanced(b, step * kStepB),
                                       k + step > 0);
      }
      wgmma_commit();
      // One step stays under way; the one before it is over, and its stage free.
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = ring.slot;
      ring.next();
    }
    wgmma_wait<0>();
    release(previous);

    // P to shared memory, where the last tile's has been taken away.
    mbarrier_wait(memory.taken(half), parity ^ 1);
    const int lane = thread % 32, row = thread / 32 * 16 + lane % 16;
    char* const out = memory.product(half);
#pragma unroll
    for (int j = 0; j < kPairs; j += 2) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = acc[4 * j + i];
      if (bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto* pair = reinterpret_cast<const T*>(&bias_pairs[j + i / 4]);
          x[i] += to_float(pair[i % 2]);
        }
      }
      const uint32_t words[4] = {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]),
                                 pack_pair<T>(x[4], x[5]), pack_pair<T>(x[6], x[7])};
      const uint32_t at = row * kSwizzleRow + (j % 8 + lane / 16) * 16;
      store_matrices(out + j / 8 * kBox + swizzled(at), words);
    }
    fence_async_proxy();
    mbarrier_arrive(memory.ready(half));
    parity ^= 1;
  });
}

// Three warps: store P, and compute the output from it where more is to be done.
template <typename T>
__device__ __forceinline__ void finish_tiles(const Sm90Problem& p, const Tiles& tiles,
                                             const Memory& memory) {
  constexpr int kBoxes = kTileN / kSwizzleElements;
  constexpr int kGroups = kSwizzleElements / kGroup;  // of a box's row
  const Epilogue& e = p.epilogue;
  const int thread = threadIdx.x - (kGroupThreads - kFinishers);
  const Dropout dropout(e.seed, e.threshold, e.scale);
  Epilogue rest = e;  // bias and preact are done
  rest.bias = nullptr;
  rest.preact = nullptr;
  int parity = 0;
  tiles.each([&](int row0, int column) {
    for (int half = 0; half < kMultipliers; ++half) {
      const char* const product = memory.product(half);
      const int row = row0 + half * 64;
      mbarrier_wait(memory.ready(half), parity);
      if (p.store_product && thread == 0) {
        for (int box = 0; box < kBoxes; ++box) {
          const int part = e.gated ? box / (kBoxes / 2) : 0;
          const int within = (e.gated ? box % (kBoxes / 2) : box) * kSwizzleElements;
          store_box(p.product, column + within, row, part, product + box * kBox);
        }
        store_commit();
      }
      if (p.finish) {
        const int groups = kGroups * (e.gated ? kBoxes / 2 : kBoxes);
        for (int index = thread; index < 64 * groups; index += kFinishers) {
          const int box = index / (64 * kGroups), r = index / kGroups % 64;
          const int group = index % kGroups;
          const int64_t col = column + box * kSwizzleElements + group * kGroup;
          if (row + r >= p.m || col >= e.width) continue;
          const T* from = reinterpret_cast<const T*>(product + box * kBox +
                                                     swizzled(r * kSwizzleRow + group * 16));
          float x[kGroup], up[kGroup];
          load_group(from, kGroup, x);
          if (e.gated) load_group(from + kBoxes / 2 * kBox / sizeof(T), kGroup, up);
          finish_group<T, true>(rest, dropout, row + r, col, kGroup, x, up);
        }
      }
      if (p.store_product && thread == 0) store_wait_read();
      mbarrier_arrive(memory.taken(half));
    }
    parity ^= 1;
  });
}

template <typename T, bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void make_tiles(const Sm90Problem& p) {
  const Memory memory{dynamic_shared()};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(memory.full(stage), 1);
      mbarrier_init(memory.empty(stage), kBlocks * kMultipliers);
    }
    for (int half = 0; half < kMultipliers; ++half) {
      mbarrier_init(memory.ready(half), kGroupThreads);
      mbarrier_init(memory.taken(half), kFinishers);
    }
    mbarrier_fence_init();
  }
  cluster_barrier();
  const Tiles tiles(p);
  const int group = threadIdx.x / kGroupThreads;
  if (group == 0) {
    give_registers<kFirstRegisters>();
    if (threadIdx.x == 0) {
      load_tiles<kAAlongK, kBAlongK>(p, tiles, memory);
    } else if (threadIdx.x >= kGroupThreads - kFinishers) {
      finish_tiles<T>(p, tiles, memory);
    }
  } else {
    take_registers<kMultiplierRegisters>();
    multiply_tiles<T, kAAlongK, kBAlongK>(p, tiles, memory, group - 1);
  }
  // No block ends while the other may still copy into it or arrive at its barriers.
  cluster_barrier();
}

template <typename T, GemmLayout kLayout>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ Sm90Problem p) {
  if constexpr (kHasWgmma) {
    make_tiles<T, kLayout != GemmLayout::kTN, kLayout == GemmLayout::kNT>(p);
  }
}

bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

template <typename T, GemmLayout kLayout>
cudaError_t launch(const GemmProblem& p, int multiprocessors, cudaStream_t stream) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr bool kAAlongK = kLayout != GemmLayout::kTN, kBAlongK = kLayout == GemmLayout::kNT;
  const Epilogue& e = p.epilogue;
  const int64_t parts = e.gated ? 2 : 1;
  Sm90Problem problem = {};
  problem.epilogue = e;
  problem.m = static_cast<int>(p.m);
  problem.k = static_cast<int>(p.k);
  problem.finish = e.gated || e.activation != activation_id<Identity>() || e.seed != nullptr ||
                   e.residual != nullptr || e.preact != nullptr;
  problem.store_product = !problem.finish || e.preact != nullptr;
  const auto map = [&](const Matrix& matrix, int64_t columns, int64_t rows, int64_t parts,
                       int box_rows, TensorMap* to) {
    return make_tensor_map(
        {matrix.data, columns, rows, parts, matrix.stride, rows * matrix.stride, box_rows},
        kBFloat16, to);
  };
  cudaError_t error = kAAlongK ? map(p.a, p.k, p.m, 1, kBoxRows, &problem.a)
                               : map(p.a, p.m, p.k, 1, kDepth, &problem.a);
  if (error != cudaSuccess) return error;
  error = kBAlongK ? map(p.b, p.k, e.width, parts, kBoxRows, &problem.b)
                   : map(p.b, p.n, p.k, 1, kDepth, &problem.b);
  if (error != cudaSuccess) return error;
  if (problem.store_product) {
    const bool preact = e.preact != nullptr;
    const int64_t stride = preact ? parts * e.width : e.out_stride;
    error = make_tensor_map(
        {preact ? e.preact : e.out, e.width, p.m, parts, stride, e.width, kSwizzleElements},
        kBFloat16, &problem.product);
    if (error != cudaSuccess) return error;
  }

  const auto kernel = gemm_sm90_kernel<T, kLayout>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t rows = kBlocks * kTileM, columns = kTileN / parts;
  const int64_t tiles = (p.m + rows - 1) / rows * ((e.width + columns - 1) / columns);
  const int64_t clusters = multiprocessors / kBlocks;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(kBlocks * (tiles < clusters ? tiles : clusters)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, problem);
}

template <typename T>
cudaError_t launch_layout(const GemmProblem& p, int multiprocessors, cudaStream_t stream) {
  switch (p.layout) {
    case GemmLayout::kNT:
      return launch<T, GemmLayout::kNT>(p, multiprocessors, stream);
    case GemmLayout::kNN:
      return launch<T, GemmLayout::kNN>(p, multiprocessors, stream);
    default:
      return launch<T, GemmLayout::kTN>(p, multiprocessors, stream);
  }
}

}  // namespace sm90

bool gemm_sm90_serves(const GemmProblem& p) {
  const Epilogue& e = p.epilogue;
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool half = p.storage == Storage::kFloat16 || p.storage == Storage::kBFloat16;
  const bool sizes = p.m > 0 && p.n > 0 && p.k > 0 && p.m < kMost && p.n < kMost && p.k < kMost;
  // The copy engine's rows are multiples of 16 bytes.
  return half && sizes && !e.float_out && sm90::aligned(p.a.data, p.a.stride) &&
         sm90::aligned(p.b.data, p.b.stride) && e.width % 8 == 0 &&
         sm90::aligned(e.out, e.out_stride) && sm90::aligned(e.preact, 0) &&
         sm90::aligned(e.bias, 0);
}

bool gemm_sm90_built() {
  static const bool built = [] {
    cudaFuncAttributes found = {};
    const auto kernel = sm90::gemm_sm90_kernel<__half, GemmLayout::kNT>;
    // What other targets have under this name is empty and needs no registers.
    return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.numRegs > 100;
  }();
  return built;
}

cudaError_t gemm_sm90_cuda(const GemmProblem& p, int multiprocessors, cudaStream_t stream) {
  return p.storage == Storage::kFloat16
             ? sm90::launch_layout<__half>(p, multiprocessors, stream)
             : sm90::launch_layout<__nv_bfloat16>(p, multiprocessors, stream);
}

}  // namespace fastnn
