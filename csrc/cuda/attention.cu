// Attention forward for every device from sm_80: O = dropout(softmax(S)) V and each row's lse.
//   FlashAttention-2 (Dao 2023, algorithm 1): per tile of query rows one pass over the key tiles of
//   their band with a running maximum m and sum l; S and P live in registers only.
// Work: a block of 4 warps makes a tile of 64 or 128 rows of a head, each warp 16 or 32 of them by
//   all keys of a tile on mma.sync. A few query rows: the heads of a group share a tile, and the
//   keys are split over blocks, whose sums a second kernel puts together in order.
// Memory: Q, and one tile of K and of V, which cp.async fills while the other is multiplied.
// Numerics: float sums; exp2 with the scale folded in; P is rounded to the type of V. A key that is
//   hidden from a row does not reach it, NaN or not.
// Floor: the two products' operations over the tensor cores' rate (FFMA's for float32). Reached:
// not measured yet.
#include "cuda/attention_tile.cuh"

namespace fastnn {

using namespace attention;

namespace {

// kFull serves everything; without, nothing but the band and a positive scale, and nothing packed.
template <typename T, int kDim, bool kFull>
struct ForwardShape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBlocks = kHalf && !kFull && kDim <= 128 ? 2 : 1;  // of 16 rows a warp
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / 32 * 16 * kBlocks;
  // Of more keys, the scores would not leave the registers that the rest needs.
  static constexpr int kCols = !kHalf ? 4096 / kDim : kFull && kDim == 256 ? 32 : 64;
  static constexpr int kShared = ((kRows + 2 * kCols) * static_cast<int>(sizeof(T)) + 8) * kDim;
};

// Rows are packed: row r of a tile is query r / pack of head r % pack of the group.
struct Plan {
  int pack, tiles, splits, tiles_per_split;
  bool query_aligned, key_aligned, value_aligned;
};

// Up to this many rows of a kv head, all of them share a tile, and the keys are split into parts of
// no fewer than this.
constexpr int kFewRows = 64, kFewKeys = 256;

bool packs(const AttentionProblem& p) { return p.queries < kFewRows && p.heads > p.kv_heads; }

int64_t rows_of(const AttentionProblem& p) {
  return packs(p) ? p.queries * (p.heads / p.kv_heads) : p.queries;
}

bool is_plain(const AttentionProblem& p) {
  return p.scale > 0.f && p.softcap == 0.f && p.slopes == nullptr && p.mask.data == nullptr &&
         p.sinks == nullptr && p.seed == nullptr && p.query_starts == nullptr &&
         rows_of(p) > kFewRows;
}

// The larger of a quad's values, and their sum.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// What ends a row: the factor of its sum o, and its lse, from m (times log2 e) and l.
__device__ __forceinline__ float row_factor(const AttentionProblem& p, float l) {
  return l == 0.f ? 0.f : (p.seed != nullptr ? p.keep_scale : 1.f) / l;
}
__device__ __forceinline__ float row_lse(float m, float l) {
  return l == 0.f ? -INFINITY : m * kLn2 + logf(l);
}

template <typename T, int kDim, bool kFull>
__global__ void __launch_bounds__(128, 1) attention_forward_kernel(AttentionForward p, Plan plan) {
  using Shape = ForwardShape<T, kDim, kFull>;
  using In = Tile<T, kDim>;
  constexpr int kBlocks = Shape::kBlocks, kRows = Shape::kRows, kCols = Shape::kCols;
  constexpr int kThreads = Shape::kThreads, kLines = 2 * kBlocks;
  T* const q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const k_tile = q_tile + kRows * kDim;
  T* const v_tile = k_tile + kCols * kDim;
  uint64_t* const nonfinite = reinterpret_cast<uint64_t*>(v_tile + kCols * kDim);

  int tile = static_cast<int>(blockIdx.x) % plan.tiles;
  const int split = static_cast<int>(blockIdx.x) / plan.tiles % plan.splits;
  const int plane = static_cast<int>(blockIdx.x) / plan.tiles / plan.splits;
  if (p.right >= 0) tile = plan.tiles - 1 - tile;  // the longest first
  const int packed_heads = static_cast<int>(p.heads) / plan.pack;
  const int b = plane / packed_heads, h0 = plane % packed_heads * plan.pack;
  const int kv = h0 / static_cast<int>(p.heads / p.kv_heads);
  const Sequence sequence = sequence_of<kFull>(p, b);
  const Band band = make_band<kFull>(p, sequence, false);
  const int rows = sequence.queries * plan.pack, row0 = tile * kRows;
  if (kFull && row0 >= rows) return;
  const int warp_row = threadIdx.x / 32 * 16 * kBlocks, g = threadIdx.x % 32 / 4;

  // The keys [begin, end) that the tile's rows see, and those that all of them see.
  const int first = row0 / plan.pack, last = (min(row0 + kRows, rows) - 1) / plan.pack;
  const int split0 = split * plan.tiles_per_split * kCols;
  const int begin = max(band.begin(first), split0) / kCols * kCols;
  const int end = min(band.end(last), split0 + plan.tiles_per_split * kCols);
  const int all_begin = band.begin(last), all_end = band.end(first);

  const auto load_keys = [&](T* to, const AttentionOperand& operand, int64_t dim, bool aligned,
                             int col0) {
    const T* const base = row_of<T>(operand, b, kv, sequence.first_key + col0);
    const int left = sequence.keys - col0;
    In::template load<kCols, kThreads>(
        to, operand.data, static_cast<int>(dim), aligned,
        [&](int row) { return row < left ? base + row * operand.row : nullptr; });
    cp_async_commit();
  };
  if (begin < end) {
    In::template load<kRows, kThreads>(
        q_tile, p.query.data, static_cast<int>(p.dim), plan.query_aligned, [&](int row) {
          row += row0;
          return row < rows ? row_of<T>(p.query, b, h0 + row % plan.pack,
                                        sequence.first_query + row / plan.pack)
                            : nullptr;
        });
    load_keys(k_tile, p.key, p.dim, plan.key_aligned, begin);
  }

  float m[kLines], l[kLines];
  Fragment<kBlocks, kDim> o = {};
#pragma unroll
  for (int r = 0; r < kLines; ++r) {
    const int row = row0 + warp_row + 8 * r + g;
    // A sink is a key that every row sees, whose value is 0. Each lane of a quad has a part of l.
    const bool sink = kFull && p.sinks != nullptr && split == 0 && row < rows;
    m[r] = sink ? p.sinks[b * p.heads + h0 + row % plan.pack] * kLog2e : -INFINITY;
    l[r] = sink && threadIdx.x % 4 == 0 && m[r] != -INFINITY ? 1.f : 0.f;
  }
  const float factor = kFull ? kLog2e : p.scale * kLog2e;

  for (int col0 = begin; col0 < end; col0 += kCols) {
    cp_async_wait<0>();
    __syncthreads();  // K is here, and all are done with V
    load_keys(v_tile, p.value, p.value_dim, plan.value_aligned, col0);
    // S = Q K^T
    Fragment<kBlocks, kCols> s;
    multiply<T, kDim>(s, q_tile, warp_row, k_tile);
    cp_async_wait<0>();
    __syncthreads();  // V is here, and all are done with K
    if (col0 + kCols < end) load_keys(k_tile, p.key, p.dim, plan.key_aligned, col0 + kCols);

    const bool whole = col0 >= all_begin && col0 + kCols <= all_end;
    // Made for every tile: they would take registers that the products need.
    Line lines[kLines];
    if (kFull || !whole) {
#pragma unroll
      for (int r = 0; r < kLines; ++r) {
        const int row = row0 + warp_row + 8 * r + g, query = row / plan.pack;
        const int h = h0 + row % plan.pack;
        lines[r] = make_line(p, band, row < rows, query, b, h,
                             first_row<kFull>(p, sequence, b * p.heads + h), query, 0);
      }
    }
    bool some_hidden = !whole;
    if constexpr (kFull) {
      finish_scores<T>(p, lines, col0, p.mask.col, s, [](int, int, int, float) {});
      some_hidden |= p.mask.data != nullptr;
    }
    if (!whole) hide_outside(lines, col0, s);

    // P = exp(S - m), and the sums so far on the new maximum
    float largest[kLines], base[kLines];
#pragma unroll
    for (int r = 0; r < kLines; ++r) largest[r] = -INFINITY;
    for_each(s, [&](int i, int j, int e, int line, int) {
      largest[line] = fmaxf(largest[line], s[i][j][e]);
    });
#pragma unroll
    for (int r = 0; r < kLines; ++r) {
      const float next = fmaxf(m[r], quad_max(largest[r]) * factor);
      base[r] = next == -INFINITY ? 0.f : next;
      const float alpha = exp2_approx(m[r] - base[r]);
      m[r] = next;
      l[r] *= alpha;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        o[r / 2][d][r % 2 * 2] *= alpha;
        o[r / 2][d][r % 2 * 2 + 1] *= alpha;
      }
    }
    for_each(s, [&](int i, int j, int e, int line, int) {
      s[i][j][e] = exp2_approx(fmaf(s[i][j][e], factor, -base[line]));
      l[line] += s[i][j][e];
    });
    if constexpr (kFull) {
      if (p.seed != nullptr) {
        uint32_t keep[kBlocks];
        draw_along_columns<kBlocks, kCols / 8>(p, lines, col0, keep);
        for_each(s, [&](int i, int j, int e, int, int) {
          if (!(keep[i] >> (4 * j + e) & 1)) s[i][j][e] = 0.f;
        });
      }
    }
    // O += P V
    accumulate_seen<T, kDim, kThreads>(o, s, v_tile, some_hidden, nonfinite);
  }

#pragma unroll
  for (int r = 0; r < kLines; ++r) {
    const int row = row0 + warp_row + 8 * r + g;
    l[r] = quad_sum(l[r]);
    if (row >= rows) continue;
    const int64_t h = h0 + row % plan.pack, query = row / plan.pack;
    const int64_t at = first_row<kFull>(p, sequence, b * p.heads + h) + query;
    if (plan.splits == 1) {
      const Place place =
          place_of<kFull>(p, b * p.heads + h, p.heads, p.queries, sequence.first_query);
      store_line(static_cast<T*>(p.out) + (place.first + query * place.step) * p.value_dim,
                 static_cast<int>(p.value_dim), row_factor(p, l[r]), o[r / 2], r % 2);
      if (threadIdx.x % 4 == 0) p.lse[at] = row_lse(m[r], l[r]);
    } else {
      float* const part = p.partial + (at * plan.splits + split) * (p.value_dim + 2);
      store_line(part, static_cast<int>(p.value_dim), 1.f, o[r / 2], r % 2);
      if (threadIdx.x % 4 == 0) {
        part[p.value_dim] = m[r];
        part[p.value_dim + 1] = l[r];
      }
    }
  }
}

// A warp puts the parts of a row together.
template <typename T>
__global__ void __launch_bounds__(128) attention_merge_kernel(AttentionForward p) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= all_rows(p)) return;
  const int64_t to =
      p.query_starts == nullptr ? row : row % p.query_rows * p.heads + row / p.query_rows;
  const int64_t width = p.value_dim + 2;
  const float* const parts = p.partial + row * p.splits * width;
  float m = -INFINITY, l = 0.f;
  for (int64_t s = 0; s < p.splits; ++s) m = fmaxf(m, parts[s * width + p.value_dim]);
  const float base = m == -INFINITY ? 0.f : m;
  for (int64_t s = 0; s < p.splits; ++s) {
    const float* const part = parts + s * width + p.value_dim;
    l += part[1] * exp2_approx(part[0] - base);
  }
  const float factor = row_factor(p, l);
  for (int64_t d = threadIdx.x % 32; d < p.value_dim; d += 32) {
    float sum = 0.f;
    for (int64_t s = 0; s < p.splits; ++s) {
      const float* const part = parts + s * width;
      sum += part[d] * exp2_approx(part[p.value_dim] - base);
    }
    static_cast<T*>(p.out)[to * p.value_dim + d] = from_float<T>(sum * factor);
  }
  if (threadIdx.x % 32 == 0) p.lse[row] = row_lse(m, l);
}

template <typename T, int kDim, bool kFull>
cudaError_t launch_forward(const AttentionForward& p, cudaStream_t stream) {
  using Shape = ForwardShape<T, kDim, kFull>;
  Plan plan;
  plan.pack = packs(p) ? static_cast<int>(p.heads / p.kv_heads) : 1;
  plan.tiles = static_cast<int>(tiles_of(rows_of(p), Shape::kRows));
  plan.splits = static_cast<int>(p.splits);
  plan.tiles_per_split = static_cast<int>(tiles_of(tiles_of(p.keys, Shape::kCols), p.splits));
  plan.query_aligned = is_aligned(p.query, p.storage);
  plan.key_aligned = is_aligned(p.key, p.storage);
  plan.value_aligned = is_aligned(p.value, p.storage);
  const int64_t blocks = p.batch * (p.heads / plan.pack) * plan.tiles * p.splits;
  const cudaError_t error = launch(attention_forward_kernel<T, kDim, kFull>, blocks,
                                   Shape::kThreads, Shape::kShared, stream, p, plan);
  if (error != cudaSuccess || p.splits == 1) return error;
  return launch(attention_merge_kernel<T>, tiles_of(all_rows(p), 4), 128, 0, stream, p);
}

}  // namespace

int64_t attention_splits(const AttentionProblem& p, int multiprocessors) {
  const int64_t rows = rows_of(p);
  if (rows > kFewRows || p.kv_heads == 0) return 1;
  // Two blocks a multiprocessor.
  const int64_t planes = p.batch * (packs(p) ? p.kv_heads : p.heads);
  const int64_t most = tiles_of(p.keys, kFewKeys);
  const int64_t wanted = tiles_of(2 * multiprocessors, planes > 0 ? planes : 1);
  return wanted < 2 || most < 2 ? 1 : wanted < most ? wanted : most;
}

int64_t attention_split_scratch(const AttentionProblem& p, int64_t splits) {
  return splits == 1 ? 0 : all_rows(p) * splits * (p.value_dim + 2);
}

cudaError_t attention_forward_portable_cuda(const AttentionForward& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries == 0) return cudaSuccess;
  return visit_width(p, [&](auto value, auto width) {
    using T = decltype(value);
    constexpr int kDim = decltype(width)::value;
    if constexpr (sizeof(T) == 2) {
      if (is_plain(p)) return launch_forward<T, kDim, false>(p, stream);
    }
    return launch_forward<T, kDim, true>(p, stream);
  });
}

}  // namespace fastnn
