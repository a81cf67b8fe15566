// A product with a fused epilogue for every device from sm_80: any shape, stride and alignment.
//   out = epilogue(A B^T), A [M, K] and B [N, K] stored along K or across it (GemmLayout).
// Work: a block of 4 warps makes a tile of 128 x 128 (gated: 64 columns of the gate and the same 64
//   of the up projection), each warp 64 x 64 of it on mma.sync; tiles in L2-friendly order.
// Memory: 64 bytes of K of both operands a stage, 4 stages in flight by cp.async (16 bytes a
//   thread; single elements where rows are not 16-byte aligned). Rows are padded by 16 bytes, so
//   that ldmatrix and the float loads meet no bank twice. The product passes through shared memory
//   once more, for an epilogue of eight neighbouring columns a thread, or a row's statistics.
// Numerics: float accumulation; float32 operands on FFMA, or rounded to TF32 where that is allowed.
// Floor: the operations over the rate of tensor cores (FFMA, for float32). Not measured yet.
#include "cuda/linear_act.h"
#include "cuda/linear_act_epilogue.cuh"
#include "cuda/linear_cross_entropy_epilogue.cuh"
#include "cuda/prim/mma.cuh"
#include "cuda/prim/shared.cuh"
#include "cuda/tile_order.h"

namespace fastnn {

namespace {

constexpr int kThreads = 128;
constexpr int kTile = 128, kWarpTile = 64;
constexpr int kStages = 4;
constexpr int kBlocksM = kWarpTile / 16, kBlocksN = kWarpTile / 8;
constexpr int kPitch = kTile + 8;  // elements between rows of K of a tile stored across K

enum class Multiply { kHalf, kTf32, kFloat };

// A tile of one operand in shared memory: 128 rows of 64 bytes of K, or 64 / sizeof(T) rows of 128.
template <typename T, bool kAlongK>
struct OperandTile {
  static constexpr int kDepth = 64 / sizeof(T);  // K of a stage
  static constexpr int kRowPitch = kAlongK ? 80 / sizeof(T) : kPitch;
  static constexpr int kBytes = (kAlongK ? kTile : kDepth) * kRowPitch * sizeof(T);
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kChunksPerRow = (kAlongK ? kDepth : kTile) / kChunk;
  static constexpr int kChunks = (kAlongK ? kTile : kDepth) * kChunksPerRow / kThreads;

  static __device__ __forceinline__ const T* at(const char* tile, int mn, int k) {
    return reinterpret_cast<const T*>(tile) + (kAlongK ? mn * kRowPitch + k : k * kRowPitch + mn);
  }

  // Begins to copy the tile at K = k0. Its rows (columns) begin at `first`; of a gated B, those
  // from 64 on begin at `second` instead. Elements with a row, column or k beyond the limit become
  // 0.
  static __device__ __forceinline__ void load(char* tile, const Matrix& matrix, int64_t first,
                                              int64_t second, int64_t limit_first,
                                              int64_t limit_second, int64_t k0, int64_t k,
                                              bool aligned) {
    const T* data = static_cast<const T*>(matrix.data);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      const int row = chunk / kChunksPerRow, column = chunk % kChunksPerRow * kChunk;
      const int mn = kAlongK ? row : column;
      const int64_t global_mn = mn < kTile / 2 ? first + mn : second + mn - kTile / 2;
      const int64_t limit = mn < kTile / 2 ? limit_first : limit_second;
      const int64_t global_k = k0 + (kAlongK ? column : row);
      const int64_t left = kAlongK ? k - global_k : limit - global_mn;
      const bool inside = kAlongK ? global_mn < limit : global_k < k;
      const int count = inside && left > 0 ? static_cast<int>(min(left, int64_t{kChunk})) : 0;
      const T* from = data + (kAlongK ? global_mn * matrix.stride + global_k
                                      : global_k * matrix.stride + global_mn);
      T* to = reinterpret_cast<T*>(tile) + row * kRowPitch + column;
      if (aligned) {
        cp_async_16(to, count > 0 ? from : data, count * static_cast<int>(sizeof(T)));
      } else {
        Packet<T> packet;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          packet.values[e] = e < count ? from[e] : from_float<T>(0.f);
        }
        store_packet(to, packet);
      }
    }
  }
};

using Accumulators = float[kBlocksM][kBlocksN][4];

// acc += the warp's 64 x 64 of one stage; row0, col0: the warp's corner in the tile.
template <typename T, bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void multiply_half(Accumulators& acc, const char* a, const char* b,
                                              int row0, int col0) {
  using TileA = OperandTile<T, kAAlongK>;
  using TileB = OperandTile<T, kBAlongK>;
  const int lane = threadIdx.x % 32, inner = lane % 8, odd = lane / 8 % 2 * 8,
            upper = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < TileA::kDepth; k += 16) {
    uint32_t fa[kBlocksM][4], fb[kBlocksN / 2][4];
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
      const int row = row0 + 16 * i;
      // Matrices: the low rows, the high rows, then both of the next eight k.
      load_matrices<!kAAlongK>(fa[i], kAAlongK ? TileA::at(a, row + inner + odd, k + upper)
                                               : TileA::at(a, row + odd, k + inner + upper));
    }
#pragma unroll
    for (int j = 0; j < kBlocksN / 2; ++j) {
      const int col = col0 + 16 * j;
      // Matrices: the low k, the high k, then both of the next eight columns.
      load_matrices<!kBAlongK>(fb[j], kBAlongK ? TileB::at(b, col + inner + upper, k + odd)
                                               : TileB::at(b, col + upper, k + inner + odd));
    }
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j) {
        mma_m16n8k16<T>(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

template <bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void multiply_tf32(Accumulators& acc, const char* a, const char* b,
                                              int row0, int col0) {
  using TileA = OperandTile<float, kAAlongK>;
  using TileB = OperandTile<float, kBAlongK>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < TileA::kDepth; k += 8) {
    uint32_t fa[kBlocksM][4], fb[kBlocksN][2];
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        fa[i][e] = to_tf32(*TileA::at(a, row0 + 16 * i + g + e % 2 * 8, k + t + e / 2 * 4));
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        fb[j][e] = to_tf32(*TileB::at(b, col0 + 8 * j + g, k + t + e * 4));
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j) mma_m16n8k8_tf32(acc[i][j], fa[i], fb[j][0], fb[j][1]);
    }
  }
}

// On FFMA, with the accumulators where mma.sync would have them.
template <bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void multiply_float(Accumulators& acc, const char* a, const char* b,
                                               int row0, int col0) {
  using TileA = OperandTile<float, kAAlongK>;
  using TileB = OperandTile<float, kBAlongK>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 2
  for (int k = 0; k < TileA::kDepth; ++k) {
    float fa[kBlocksM][2], fb[kBlocksN][2];
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) fa[i][e] = *TileA::at(a, row0 + 16 * i + g + 8 * e, k);
    }
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) fb[j][e] = *TileB::at(b, col0 + 8 * j + 2 * t + e, k);
    }
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] += fa[i][e / 2] * fb[j][e % 2];
      }
    }
  }
}

// A row of the product in shared memory as logits of T: with the bias, rounded.
template <typename T>
struct LogitsOfRow {
  const float* product;
  const T* bias;  // at the tile's first column; or null

  __device__ __forceinline__ T element(int i) const {
    return from_float<T>(product[i] + (bias == nullptr ? 0.f : to_float(bias[i])));
  }
  __device__ __forceinline__ Packet<T> packet(int first) const {
    Packet<T> packet;
#pragma unroll
    for (int i = 0; i < Packet<T>::kSize; ++i) packet.values[i] = element(first + i);
    return packet;
  }
};

// Whether an operand's rows may be copied 16 bytes at a time.
struct Alignment {
  bool a, b;
};

template <typename T, GemmLayout kLayout, Multiply kMultiply>
__global__ void __launch_bounds__(kThreads) gemm_kernel(GemmProblem p, Alignment aligned) {
  constexpr bool kAAlongK = kLayout != GemmLayout::kTN, kBAlongK = kLayout == GemmLayout::kNT;
  constexpr bool kFull = kLayout == GemmLayout::kNT;
  const int64_t rows = p.m;  // there may be fewer
  if constexpr (kLayout == GemmLayout::kTN) {
    p.k = p.rows.of(p.k);
  } else {
    p.m = p.rows.of(p.m);
  }
  using TileA = OperandTile<T, kAAlongK>;
  using TileB = OperandTile<T, kBAlongK>;
  constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  char* const shared = dynamic_shared();
  const Epilogue& e = p.epilogue;
  static_assert(kThreads == kTile, "a thread for each row's statistics");

  const int tile_width = e.gated ? kTile / 2 : kTile;
  const TileOrder order{static_cast<int>((p.m + kTile - 1) / kTile),
                        static_cast<int>((e.width + tile_width - 1) / tile_width)};
  if (blockIdx.x >= order.count()) return;
  const TileOrder::Tile tile = order.at(blockIdx.x);
  const int64_t row0 = int64_t{tile.m} * kTile, col0 = int64_t{tile.n} * tile_width;
  const int64_t up0 = e.gated ? e.width + col0 : col0 + kTile / 2;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp % 2 * kWarpTile, warp_col = warp / 2 * kWarpTile;

  const int stages = static_cast<int>((p.k + TileA::kDepth - 1) / TileA::kDepth);
  const auto load = [&](int stage) {
    char* a = shared + stage % kStages * kStageBytes;
    const int64_t k0 = int64_t{stage} * TileA::kDepth;
    TileA::load(a, p.a, row0, row0 + kTile / 2, p.m, p.m, k0, p.k, aligned.a);
    TileB::load(a + TileA::kBytes, p.b, col0, up0, e.width, p.n, k0, p.k, aligned.b);
  };
  // A group is committed every step, empty or not, so that the count of pending ones is constant.
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < stages) load(stage);
    cp_async_commit();
  }
  Accumulators acc = {};
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is here for all, and all are done with the one before it
    if (stage + kStages - 1 < stages) load(stage + kStages - 1);
    cp_async_commit();
    const char* a = shared + stage % kStages * kStageBytes;
    const char* b = a + TileA::kBytes;
    if constexpr (kMultiply == Multiply::kHalf) {
      multiply_half<T, kAAlongK, kBAlongK>(acc, a, b, warp_row, warp_col);
    } else if constexpr (kMultiply == Multiply::kTf32) {
      multiply_tf32<kAAlongK, kBAlongK>(acc, a, b, warp_row, warp_col);
    } else {
      multiply_float<kAAlongK, kBAlongK>(acc, a, b, warp_row, warp_col);
    }
  }

  // The product to shared memory, and from there in groups of eight columns.
  cp_async_wait<0>();
  __syncthreads();
  float* const product = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * i + lane / 4 + 8 * half;
        float2* to =
            reinterpret_cast<float2*>(product + row * kPitch + warp_col + 8 * j) + lane % 4;
        *to = make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
      }
    }
  }
  __syncthreads();
  if (kFull && e.statistics.sums != nullptr) {
    const int64_t row = row0 + threadIdx.x;
    const T* bias = e.bias == nullptr ? nullptr : static_cast<const T*>(e.bias) + col0;
    if (row < p.m) {
      leave_statistics<T>(e.statistics, rows, row, tile.n, static_cast<int>(col0),
                          static_cast<int>(min(e.width - col0, int64_t{kTile})),
                          LogitsOfRow<T>{product + threadIdx.x * kPitch, bias});
    }
    return;
  }
  const Dropout dropout(kFull ? e.seed : nullptr, e.threshold, e.scale);
  const int groups = tile_width / kGroup;
  for (int index = threadIdx.x; index < kTile * groups; index += kThreads) {
    const int row = index / groups, col = index % groups * kGroup;
    const int64_t left = e.width - (col0 + col);
    if (row0 + row >= p.m || left <= 0) continue;
    float x[kGroup], up[kGroup];
    load_group(product + row * kPitch + col, kGroup, x);
    if (e.factor != nullptr) scale_group(x, *e.factor);
    if (kFull && e.gated) load_group(product + row * kPitch + kTile / 2 + col, kGroup, up);
    finish_group<T, kFull>(e, dropout, row0 + row, col0 + col,
                           static_cast<int>(min(left, int64_t{kGroup})), x, up);
  }
}

template <typename T, GemmLayout kLayout, Multiply kMultiply>
cudaError_t launch(const GemmProblem& p, cudaStream_t stream) {
  constexpr int kStageBytes = OperandTile<T, kLayout != GemmLayout::kTN>::kBytes +
                              OperandTile<T, kLayout == GemmLayout::kNT>::kBytes;
  constexpr int kProductBytes = kTile * kPitch * static_cast<int>(sizeof(float));
  constexpr int kShared =
      kProductBytes > kStages * kStageBytes ? kProductBytes : kStages * kStageBytes;
  const auto kernel = gemm_kernel<T, kLayout, kMultiply>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const auto aligned = [](const Matrix& matrix) {
    return elements_to_alignment(static_cast<const T*>(matrix.data)) == 0 &&
           matrix.stride % (16 / static_cast<int64_t>(sizeof(T))) == 0;
  };
  const int64_t tile_width = p.epilogue.gated ? kTile / 2 : kTile;
  const int64_t tiles =
      (p.m + kTile - 1) / kTile * ((p.epilogue.width + tile_width - 1) / tile_width);
  if (tiles >= int64_t{1} << 31) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p, Alignment{aligned(p.a), aligned(p.b)});
}

template <typename T, Multiply kMultiply>
cudaError_t launch_layout(const GemmProblem& p, cudaStream_t stream) {
  switch (p.layout) {
    case GemmLayout::kNT:
      return launch<T, GemmLayout::kNT, kMultiply>(p, stream);
    case GemmLayout::kNN:
      return launch<T, GemmLayout::kNN, kMultiply>(p, stream);
    default:
      return launch<T, GemmLayout::kTN, kMultiply>(p, stream);
  }
}

}  // namespace

int64_t gemm_portable_tiles(int64_t columns) { return (columns + kTile - 1) / kTile; }

cudaError_t gemm_portable_cuda(const GemmProblem& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  switch (p.storage) {
    case Storage::kFloat16:
      return launch_layout<__half, Multiply::kHalf>(p, stream);
    case Storage::kBFloat16:
      return launch_layout<__nv_bfloat16, Multiply::kHalf>(p, stream);
    case Storage::kFloat32:
      return p.tf32 ? launch_layout<float, Multiply::kTf32>(p, stream)
                    : launch_layout<float, Multiply::kFloat>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastnn
