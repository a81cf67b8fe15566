// The product with a fused epilogue on Hopper: wgmma from shared memory that the copy engine fills.
//   out = epilogue(A B^T), half types; A [M, K] and B [N, K] stored along K or across it.
// Work: clusters of 2 blocks stay resident and take tiles of 256 x 256 in L2-friendly order; a
//   block has 128 x 256 (gated: 128 columns of gate and up projection each), B by multicast. Two of
//   three warp groups multiply, 64 rows each, and leave P = product + bias, rounded, in shared
//   memory; of the first, one warp fills a ring of 3 stages of 64 of K, and three store P and do
//   the rest (epilogue, or statistics of logits) while the next tile is multiplied. Float results
//   leave in two turns, and the copy engine adds them.
// Memory: 3 x 48 KB stages, 64 KB of P. Ragged M, N, K are the copy engine's bounds.
// Numerics: float accumulation; what follows is of P as rounded, as the backward sees it.
// Floor: the operations over the tensor cores' rate. Reached: not measured yet.
#include "cuda/linear_act.h"
#include "cuda/linear_act_epilogue.cuh"
#include "cuda/linear_cross_entropy_epilogue.cuh"
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
inline constexpr int kHalfM = 64;                      // rows of a multiplier
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

static_assert(kDepth == kRowStep, "K beyond the rows that there are is zeros");

// What becomes of a tile: P and an epilogue, float32, or the statistics of its rows.
enum class Output { kHalf, kFloat, kStatistics };

struct Sm90Problem {
  TensorMap a, b, product;  // `product`: where P is stored, in whole boxes
  Epilogue epilogue;
  RowCount rows;
  int m, k;
  bool store_product;  // P itself is an output: the preact, or `out` where nothing follows
  bool finish;         // something follows: `out` is computed from P
};

// One block's tiles and its place in them.
struct Tiles {
  int m, k;   // as far as there are rows
  int width;  // columns of `out` a tile
  TileOrder order;

  __device__ __forceinline__ Tiles(const Sm90Problem& p, bool rows_are_k)
      : m(rows_are_k ? p.m : static_cast<int>(p.rows.of(p.m))),
        k(rows_are_k ? static_cast<int>(p.rows.in_steps(p.k)) : p.k),
        width(p.epilogue.gated ? kTileN / 2 : kTileN),
        order{(m + kBlocks * kTileM - 1) / (kBlocks * kTileM),
              static_cast<int>((p.epilogue.width + width - 1) / width)} {}
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
    for (int k = 0; k < tiles.k; k += kDepth) {
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

// Half of a warp group's float products to shared memory: 128 columns, in boxes of 32.
__device__ __forceinline__ void leave_floats(const float* acc, int thread, char* out) {
  const int lane = thread % 32;
#pragma unroll
  for (int j = 0; j < kTileN / 16; ++j) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int row = thread / 32 * 16 + lane / 4 + 8 * upper;
      const uint32_t at = row * kSwizzleRow + j % 4 * 32 + lane % 4 * 8;
      *reinterpret_cast<float2*>(out + j / 4 * kBox + swizzled(at)) =
          make_float2(acc[4 * j + 2 * upper], acc[4 * j + 2 * upper + 1]);
    }
  }
}

// A warp group: its 64 rows of P, for every tile.
template <typename T, bool kAAlongK, bool kBAlongK, Output kOutput>
__device__ __forceinline__ void multiply_tiles(const Sm90Problem& p, const Tiles& tiles,
                                               const Memory& memory, int half) {
  constexpr int kPairs = kTileN / 8;  // neighbouring columns that a thread has
  constexpr int kStepA = 16 * (kAAlongK ? 2 : kSwizzleRow);  // bytes to the next 16 of K
  constexpr int kStepB = 16 * (kBAlongK ? 2 : kSwizzleRow);
  const int thread = threadIdx.x % kGroupThreads;
  const T* bias = static_cast<const T*>(p.epilogue.bias);
  const float factor = p.epilogue.factor == nullptr ? 1.f : *p.epilogue.factor;
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
        if (at + 1 < p.epilogue.width) {
          bias_pairs[j] = *reinterpret_cast<const uint32_t*>(from);
        } else {
          bias_pairs[j] = at < p.epilogue.width ? *reinterpret_cast<const uint16_t*>(from) : 0;
        }
      }
    }

    int previous = -1;
    for (int k = 0; k < tiles.k; k += kDepth) {
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
    if (factor != 1.f) {
#pragma unroll
      for (float& sum : acc) sum *= factor;
    }

    if constexpr (kOutput == Output::kFloat) {
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        mbarrier_wait(memory.taken(half), parity ^ 1);
        leave_floats(acc + turn * (kTileN / 4), thread, memory.product(half));
        fence_async_proxy();
        mbarrier_arrive(memory.ready(half));
        parity ^= 1;
      }
      return;
    }
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
      const int row = row0 + half * kHalfM;
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
        for (int index = thread; index < kHalfM * groups; index += kFinishers) {
          const int box = index / (kHalfM * kGroups), r = index / kGroups % kHalfM;
          const int group = index % kGroups;
          const int64_t col = column + box * kSwizzleElements + group * kGroup;
          if (row + r >= tiles.m || col >= e.width) continue;
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

// A warp for each half: its sums go to memory, or are added to what is there.
__device__ __forceinline__ void store_floats(const Sm90Problem& p, const Tiles& tiles,
                                             const Memory& memory, int half) {
  constexpr int kColumns = kSwizzleRow / sizeof(float), kBoxes = kTileN / 2 / kColumns;
  const bool adds = p.epilogue.residual != nullptr;
  int parity = 0;
  tiles.each([&](int row, int column) {
    for (int turn = 0; turn < 2; ++turn) {
      mbarrier_wait(memory.ready(half), parity);
      for (int box = 0; box < kBoxes; ++box) {
        const char* const from = memory.product(half) + box * kBox;
        const int to = column + (turn * kBoxes + box) * kColumns;
        if (adds) {
          add_box(p.product, to, row + half * kHalfM, 0, from);
        } else {
          store_box(p.product, to, row + half * kHalfM, 0, from);
        }
      }
      store_commit();
      store_wait_read();
      mbarrier_arrive(memory.taken(half));
      parity ^= 1;
    }
  });
}

// A row of P in shared memory. Eight neighbouring rows' packets lie in different banks.
template <typename T>
struct LogitsOfRow {
  const char* product;
  int row;

  __device__ __forceinline__ const T* at(int i) const {
    const uint32_t offset = row * kSwizzleRow + i % kSwizzleElements * sizeof(T);
    return reinterpret_cast<const T*>(product + i / kSwizzleElements * kBox + swizzled(offset));
  }
  __device__ __forceinline__ T element(int i) const { return *at(i); }
  __device__ __forceinline__ Packet<T> packet(int first) const {
    Packet<T> packet;
    *reinterpret_cast<uint4*>(&packet) = *reinterpret_cast<const uint4*>(at(first));
    return packet;
  }
};

// Three warps, of which two have a row of P a thread.
template <typename T>
__device__ __forceinline__ void gather_statistics(const Sm90Problem& p, const Tiles& tiles,
                                                  const Memory& memory) {
  const int thread = threadIdx.x - (kGroupThreads - kFinishers);
  int parity = 0;
  tiles.each([&](int row0, int column) {
    for (int half = 0; half < kMultipliers; ++half) {
      const int row = row0 + half * kHalfM + thread;
      mbarrier_wait(memory.ready(half), parity);
      if (thread < kHalfM && row < tiles.m) {
        leave_statistics<T>(p.epilogue.statistics, p.m, row, column / kTileN, column,
                            static_cast<int>(min(p.epilogue.width - column, int64_t{kTileN})),
                            LogitsOfRow<T>{memory.product(half), thread});
      }
      mbarrier_arrive(memory.taken(half));
    }
    parity ^= 1;
  });
}

template <typename T, bool kAAlongK, bool kBAlongK, Output kOutput>
__device__ __forceinline__ void make_tiles(const Sm90Problem& p) {
  const Memory memory{dynamic_shared()};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(memory.full(stage), 1);
      mbarrier_init(memory.empty(stage), kBlocks * kMultipliers);
    }
    for (int half = 0; half < kMultipliers; ++half) {
      mbarrier_init(memory.ready(half), kGroupThreads);
      mbarrier_init(memory.taken(half), kOutput == Output::kFloat ? 1 : kFinishers);
    }
    mbarrier_fence_init();
  }
  cluster_barrier();
  const Tiles tiles(p, /*rows_are_k=*/!kAAlongK);
  const int group = threadIdx.x / kGroupThreads;
  if (group == 0) {
    give_registers<kFirstRegisters>();
    if (threadIdx.x == 0) {
      load_tiles<kAAlongK, kBAlongK>(p, tiles, memory);
    } else if (threadIdx.x < kGroupThreads - kFinishers) {
      // the rest of the loader's warp
    } else if constexpr (kOutput == Output::kFloat) {
      const int half = threadIdx.x / 32 - 1;
      if (half < kMultipliers && threadIdx.x % 32 == 0) store_floats(p, tiles, memory, half);
    } else if constexpr (kOutput == Output::kStatistics) {
      gather_statistics<T>(p, tiles, memory);
    } else {
      finish_tiles<T>(p, tiles, memory);
    }
  } else {
    take_registers<kMultiplierRegisters>();
    multiply_tiles<T, kAAlongK, kBAlongK, kOutput>(p, tiles, memory, group - 1);
  }
  // No block ends while the other may still copy into it or arrive at its barriers.
  cluster_barrier();
}

template <typename T, GemmLayout kLayout, Output kOutput>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ Sm90Problem p) {
  if constexpr (kHasWgmma) {
    make_tiles<T, kLayout != GemmLayout::kTN, kLayout == GemmLayout::kNT, kOutput>(p);
  }
}

// Whether P itself is not the output.
bool something_follows(const Epilogue& e) {
  return e.gated || e.activation != activation_id<Identity>() || e.seed != nullptr ||
         e.residual != nullptr || e.preact != nullptr;
}

bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

template <typename T, GemmLayout kLayout, Output kOutput>
cudaError_t launch(const GemmProblem& p, int multiprocessors, cudaStream_t stream) {
  constexpr bool kAAlongK = kLayout != GemmLayout::kTN, kBAlongK = kLayout == GemmLayout::kNT;
  const Epilogue& e = p.epilogue;
  const int64_t parts = e.gated ? 2 : 1;
  Sm90Problem problem = {};
  problem.epilogue = e;
  problem.rows = p.rows;
  problem.m = static_cast<int>(p.m);
  problem.k = static_cast<int>(p.k);
  problem.finish = something_follows(e);
  problem.store_product = kOutput == Output::kFloat ||
                          (kOutput == Output::kHalf && (!problem.finish || e.preact != nullptr));
  const auto map = [&](const Matrix& matrix, int64_t columns, int64_t rows, int64_t parts,
                       int box_rows, TensorMap* to) {
    return make_tensor_map(
        {matrix.data, columns, rows, parts, matrix.stride, rows * matrix.stride, box_rows},
        p.storage, to);
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
    const int64_t part_stride = parts == 1 ? stride : e.width;
    error = make_tensor_map(
        {preact ? e.preact : e.out, e.width, p.m, parts, stride, part_stride, kHalfM},
        kOutput == Output::kFloat ? Storage::kFloat32 : p.storage, &problem.product);
    if (error != cudaSuccess) return error;
  }

  const auto kernel = gemm_sm90_kernel<T, kLayout, kOutput>;
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
  const auto run = [&](auto launcher) { return launcher(p, multiprocessors, stream); };
  switch (p.layout) {
    case GemmLayout::kNT:
      return p.epilogue.statistics.sums == nullptr
                 ? run(launch<T, GemmLayout::kNT, Output::kHalf>)
                 : run(launch<T, GemmLayout::kNT, Output::kStatistics>);
    case GemmLayout::kNN:
      return run(launch<T, GemmLayout::kNN, Output::kHalf>);
    default:
      return p.epilogue.float_out ? run(launch<T, GemmLayout::kTN, Output::kFloat>)
                                  : run(launch<T, GemmLayout::kTN, Output::kHalf>);
  }
}

}  // namespace sm90

bool gemm_sm90_serves(const GemmProblem& p) {
  const Epilogue& e = p.epilogue;
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool half = p.storage == Storage::kFloat16 || p.storage == Storage::kBFloat16;
  const bool sizes = p.m > 0 && p.n > 0 && p.k > 0 && p.m < kMost && p.n < kMost && p.k < kMost;
  // Sums in float are stored as they are, or added to what is there.
  const bool out = !e.float_out ||
                   (p.layout == GemmLayout::kTN && (e.residual == nullptr || e.residual == e.out));
  // The copy engine's rows are multiples of 16 bytes.
  return half && sizes && out && sm90::aligned(p.a.data, p.a.stride) &&
         sm90::aligned(p.b.data, p.b.stride) && (e.width % 8 == 0 || !sm90::something_follows(e)) &&
         sm90::aligned(e.out, e.out_stride) && sm90::aligned(e.preact, 0) &&
         sm90::aligned(e.bias, 0);
}

bool gemm_sm90_built() {
  static const bool built = [] {
    cudaFuncAttributes found = {};
    const auto kernel = sm90::gemm_sm90_kernel<__half, GemmLayout::kNT, sm90::Output::kHalf>;
    // What other targets have under this name is empty and needs no registers.
    return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.numRegs > 100;
  }();
  return built;
}

int64_t gemm_sm90_tiles(int64_t columns) { return (columns + sm90::kTileN - 1) / sm90::kTileN; }

cudaError_t gemm_sm90_cuda(const GemmProblem& p, int multiprocessors, cudaStream_t stream) {
  return p.storage == Storage::kFloat16
             ? sm90::launch_layout<__half>(p, multiprocessors, stream)
             : sm90::launch_layout<__nv_bfloat16>(p, multiprocessors, stream);
}

}  // namespace fastnn
