// What the attention kernels share: tiles in shared memory, a warp's products on them, the band,
// and the steps from a product q k^T to a score and to its dropout bits.
//   A warp owns blocks of 16 rows of a tile and all of its columns, in the layout of mma.sync's
//   accumulators; float32 keeps the same layout on FFMA. Rows are queries, or keys in the pass that
//   makes dK and dV: a line is what a row is to the columns, whichever of the two it is.
#pragma once

#include <type_traits>

#include "cuda/attention.h"
#include "cuda/prim/math.cuh"
#include "cuda/prim/mma.cuh"
#include "cuda/prim/reduce.cuh"
#include "cuda/prim/shared.cuh"
#include "philox.h"

namespace fastnn {
namespace attention {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

template <int kBlocks, int kCols>
using Fragment = float[kBlocks][kCols / 8][4];

// f(block, group of 8 columns, element, line, column) for the elements of a lane; the lines are 2
// a block.
template <int kBlocks, int kGroups, typename F>
__device__ __forceinline__ void for_each(const float (&)[kBlocks][kGroups][4], const F& f) {
  const int col = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(i, j, e, 2 * i + e / 2, 8 * j + col + e % 2);
    }
  }
}

// --- tiles

// Rows of kDim elements. The 16-byte chunks of a row are permuted by the row, so that ldmatrix and
// the float loads meet no bank twice.
template <typename T, int kDim>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kDim / kChunk;

  static __device__ __forceinline__ T* at(T* tile, int row, int col) {
    return tile + row * kDim + ((col / kChunk) ^ (row % 8)) * kChunk + col % kChunk;
  }

  // Begins to copy kRows rows. row_at(row) is where a row begins, or null: then it is 0, as the
  // columns from `dim` on are. `aligned`: 16 bytes at a time.
  template <int kRows, int kThreads, typename RowAt>
  static __device__ __forceinline__ void load(T* tile, const void* base, int dim, bool aligned,
                                              const RowAt& row_at) {
    static_assert(kRows * kChunks % kThreads == 0, "every thread copies as many chunks");
    // Unrolled, the copies' addresses would take registers that the products need.
#pragma unroll 1
    for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
      const int index = n * kThreads + threadIdx.x;
      const int row = index / kChunks, col = index % kChunks * kChunk;
      const T* from = row_at(row);
      const int count = from == nullptr ? 0 : max(0, min(dim - col, kChunk));
      T* const to = at(tile, row, col);
      if (aligned) {
        cp_async_16(to, count > 0 ? static_cast<const void*>(from + col) : base,
                    count * static_cast<int>(sizeof(T)));
      } else {
        Packet<T> packet;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          packet.values[e] = e < count ? from[col + e] : from_float<T>(0.f);
        }
        store_packet(to, packet);
      }
    }
  }

  // Whether this thread's share of a tile has NaN or infinities.
  template <int kRows, int kThreads>
  static __device__ __forceinline__ bool has_nonfinite(const T* tile) {
    bool found = false;
#pragma unroll 1
    for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
      const Packet<T> packet = reinterpret_cast<const Packet<T>*>(tile)[n * kThreads + threadIdx.x];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) found |= !(fabsf(to_float(packet.values[e])) < INFINITY);
    }
    return found;
  }

  // Sets them to 0; bit r of nonfinite[col] tells that row r had one there.
  template <int kRows, int kThreads>
  static __device__ __forceinline__ void clear_nonfinite(T* tile, uint64_t* nonfinite) {
#pragma unroll 1
    for (int col = threadIdx.x; col < kDim; col += kThreads) {
      uint64_t rows = 0;
#pragma unroll 1
      for (int row = 0; row < kRows; ++row) {
        T* const x = at(tile, row, col);
        if (fabsf(to_float(*x)) < INFINITY) continue;
        rows |= uint64_t{1} << row;
        *x = from_float<T>(0.f);
      }
      nonfinite[col] = rows;
    }
  }
};

// --- products

// acc = A B^T along kDim, A the rows of the tile `a` from row0 on, B the rows of the tile `b`.
template <typename T, int kDim, int kBlocks, int kGroups>
__device__ __forceinline__ void multiply(float (&acc)[kBlocks][kGroups][4], T* a, int row0, T* b) {
  using In = Tile<T, kDim>;
  const int lane = threadIdx.x % 32;
  for_each(acc, [&](int i, int j, int e, int, int) { acc[i][j][e] = 0.f; });
  if constexpr (sizeof(T) == 2) {
    // Unrolled further, the backward's kernels would keep addresses in registers that they need.
    constexpr int kUnroll = kGroups < 8 ? 4 : kDim / 16;
    const int inner = lane % 8, odd = lane / 8 % 2 * 8, upper = lane / 16 * 8;
#pragma unroll kUnroll
    for (int k = 0; k < kDim; k += 16) {
      uint32_t fa[kBlocks][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        load_matrices<false>(fa[i], In::at(a, row0 + 16 * i + inner + odd, k + upper));
      }
#pragma unroll
      for (int j = 0; j < kGroups; j += 2) {
        uint32_t fb[4];
        load_matrices<false>(fb, In::at(b, 8 * j + inner + upper, k + odd));
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          mma_m16n8k16<T>(acc[i][j], fa[i], fb[0], fb[1]);
          mma_m16n8k16<T>(acc[i][j + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < kDim; k += In::kChunk) {
      Packet<T> fa[2 * kBlocks];
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        fa[r] = *reinterpret_cast<const Packet<T>*>(In::at(a, row0 + 8 * r + g, k));
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto fb = *reinterpret_cast<const Packet<T>*>(In::at(b, 8 * j + 2 * t + e, k));
#pragma unroll
          for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
            for (int c = 0; c < In::kChunk; ++c) {
              float& sum = acc[r / 2][j][r % 2 * 2 + e];
              sum = fmaf(fa[r].values[c], fb.values[c], sum);
            }
          }
        }
      }
    }
  }
}

// acc += W B for weights in registers.
template <typename T, int kDim, int kBlocks, int kGroups>
__device__ __forceinline__ void accumulate(Fragment<kBlocks, kDim>& acc,
                                           const float (&w)[kBlocks][kGroups][4], T* b) {
  using In = Tile<T, kDim>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int inner = lane % 8, odd = lane / 8 % 2 * 8, upper = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kGroups; k += 2) {
      uint32_t fa[kBlocks][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const float* pair = w[i][k + part / 2] + part % 2 * 2;
          fa[i][part] = pack_pair<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t fb[4];
        load_matrices<true>(fb, In::at(b, 8 * k + inner + odd, 8 * d + upper));
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          mma_m16n8k16<T>(acc[i][d], fa[i], fb[0], fb[1]);
          mma_m16n8k16<T>(acc[i][d + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  } else {
    const int col = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        float weight[2 * kBlocks];
#pragma unroll
        for (int r = 0; r < 2 * kBlocks; ++r) {
          const float* const mine = w[r / 2][j] + r % 2 * 2;
          weight[r] = __shfl_sync(kAllLanes, k % 2 ? mine[1] : mine[0], lane / 4 * 4 + k / 2);
        }
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          const float2 x = *reinterpret_cast<const float2*>(In::at(b, 8 * j + k, 8 * d + col));
#pragma unroll
          for (int r = 0; r < 2 * kBlocks; ++r) {
            float* const sum = acc[r / 2][d] + r % 2 * 2;
            sum[0] = fmaf(weight[r], x.x, sum[0]);
            sum[1] = fmaf(weight[r], x.y, sum[1]);
          }
        }
      }
    }
  }
}

// What clear_nonfinite took out of B reaches the rows whose weight there is not 0.
template <int kBlocks, int kDims, int kGroups>
__device__ __forceinline__ void poison(float (&acc)[kBlocks][kDims][4],
                                       const float (&w)[kBlocks][kGroups][4],
                                       const uint64_t* nonfinite) {
#pragma unroll
  for (int r = 0; r < 2 * kBlocks; ++r) {
    uint64_t seen = 0;
    for_each(w, [&](int i, int j, int e, int line, int col) {
      if (line == r && w[i][j][e] != 0.f) seen |= uint64_t{1} << col;
    });
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2) {
      const auto low = static_cast<uint32_t>(seen), high = static_cast<uint32_t>(seen >> 32);
      seen |= __shfl_xor_sync(kAllLanes, low, lane) |
              uint64_t{__shfl_xor_sync(kAllLanes, high, lane)} << 32;
    }
    for_each(acc, [&](int i, int d, int e, int line, int col) {
      if (line == r && (nonfinite[col] & seen) != 0) acc[i][d][e] = NAN;
    });
  }
}

// acc += W B, where a weight of 0 hides the NaN and infinities of its row of B; all threads of the
// block. `scratch` has kDim words.
template <typename T, int kDim, int kThreads, int kBlocks, int kGroups>
__device__ __forceinline__ void accumulate_seen(Fragment<kBlocks, kDim>& acc,
                                                const float (&w)[kBlocks][kGroups][4], T* b,
                                                bool some_hidden, uint64_t* scratch) {
  using In = Tile<T, kDim>;
  constexpr int kRows = 8 * kGroups;
  if (some_hidden && __syncthreads_or(In::template has_nonfinite<kRows, kThreads>(b))) {
    In::template clear_nonfinite<kRows, kThreads>(b, scratch);
    __syncthreads();
    poison(acc, w, scratch);
  }
  accumulate<T, kDim>(acc, w, b);
}

// --- sequences

// The sequence of a batch: its lengths, and where it begins among the packed ones.
struct Sequence {
  int queries, keys;
  int64_t first_query, first_key;
};

// Without kPacked, in kernels that serve no packed ones.
template <bool kPacked>
__device__ __forceinline__ Sequence sequence_of(const AttentionProblem& p, int64_t b) {
  if (!kPacked || p.query_starts == nullptr) {
    return {static_cast<int>(p.queries), static_cast<int>(p.keys), 0, 0};
  }
  // Within the tensors, whatever the starts are.
  const auto at = [](const int32_t* starts, int64_t i, int64_t rows) {
    return min(max(starts[i], 0), static_cast<int>(rows));
  };
  const int query = at(p.query_starts, b, p.query_rows), key = at(p.key_starts, b, p.key_rows);
  return {at(p.query_starts, b + 1, p.query_rows) - query,
          at(p.key_starts, b + 1, p.key_rows) - key, query, key};
}

// Rows of lse.
template <bool kPacked = true>
__host__ __device__ __forceinline__ int64_t all_rows(const AttentionProblem& p) {
  return p.heads * (!kPacked || p.query_starts == nullptr ? p.batch * p.queries : p.query_rows);
}

// Of them, the first of plane b heads + h.
template <bool kPacked>
__device__ __forceinline__ int64_t first_row(const AttentionProblem& p, const Sequence& sequence,
                                             int64_t plane) {
  if (kPacked && p.query_starts != nullptr) {
    return plane % p.heads * p.query_rows + sequence.first_query;
  }
  return plane * p.queries;
}

// Row i of a plane in a result, [batch, heads, rows, columns] or packed, is its row first + i step.
struct Place {
  int64_t first, step;
};
template <bool kPacked>
__device__ __forceinline__ Place place_of(const AttentionProblem& p, int64_t plane, int64_t heads,
                                          int64_t rows, int64_t first) {
  if (kPacked && p.query_starts != nullptr) return {first * heads + plane % heads, heads};
  return {plane * rows, 1};
}

// --- the band

// Row i sees the columns [begin(i), end(i)).
struct Band {
  int size, shift, left, right;

  __host__ __device__ __forceinline__ int begin(int row) const {
    return left < 0 ? 0 : min(max(row + shift - left, 0), size);
  }
  __host__ __device__ __forceinline__ int end(int row) const {
    return right < 0 ? size : min(max(row + shift + right + 1, 0), size);
  }
};

// The keys as a query sees them, or the queries as a key does.
template <bool kPacked>
__device__ __forceinline__ Band make_band(const AttentionProblem& p, const Sequence& sequence,
                                          bool of_keys) {
  // Wider than both sequences is as good as unlimited, and fits an int.
  const int64_t most = p.queries + p.keys;
  const int left = static_cast<int>(min(p.left, most)),
            right = static_cast<int>(min(p.right, most));
  const bool own = kPacked && p.query_starts != nullptr && p.bottom_right;
  const int shift = own ? sequence.keys - sequence.queries : static_cast<int>(p.shift);
  if (of_keys) return {sequence.queries, -shift, right, left};
  return {sequence.keys, shift, left, right};
}

// --- scores

// A row of a tile, and what it is to the columns.
struct Line {
  int center;      // ALiBi's distance to a column is from here
  int begin, end;  // the columns that the band lets it see
  float slope;
  int64_t mask;  // where its mask begins
  int64_t draw;  // the number of its first group of dropout bits, where rows are queries
};

// The line of row `row`; query and key are those of its column 0, first is the first_row of its
// head. A row that is none sees nothing.
__device__ __forceinline__ Line make_line(const AttentionProblem& p, const Band& band, bool is_row,
                                          int row, int64_t b, int64_t h, int64_t first,
                                          int64_t query, int64_t key) {
  Line line;
  line.center = row + band.shift;
  line.begin = is_row ? band.begin(row) : 0;
  line.end = is_row ? band.end(row) : 0;
  line.slope = p.slopes != nullptr && is_row ? p.slopes[b * p.heads + h] : 0.f;
  line.mask = b * p.mask.batch + h * p.mask.head + query * p.mask.row + key * p.mask.col;
  line.draw = (first + query) * dropout_groups(p.keys);
  return line;
}

// Products q k^T to scores, -inf where a mask hides. The tile's columns begin at col0; mask_stride
// is the mask's along them. through_cap(i, j, e, slope) takes the derivative by scale q k^T.
template <typename T, int kBlocks, int kGroups, typename ThroughCap>
__device__ __forceinline__ void finish_scores(const AttentionProblem& p,
                                              const Line (&lines)[2 * kBlocks], int col0,
                                              int64_t mask_stride, float (&x)[kBlocks][kGroups][4],
                                              const ThroughCap& through_cap) {
  if (p.softcap > 0.f) {
    const float inside = p.scale / p.softcap;
    for_each(x, [&](int i, int j, int e, int, int) {
      const float tanh = Math<T>::tanh(x[i][j][e] * inside);
      x[i][j][e] = p.softcap * tanh;
      through_cap(i, j, e, 1.f - tanh * tanh);
    });
  } else {
    for_each(x, [&](int i, int j, int e, int, int) { x[i][j][e] *= p.scale; });
  }
  if (p.slopes != nullptr) {
    for_each(x, [&](int i, int j, int e, int line, int col) {
      const int distance = abs(lines[line].center - (col0 + col));
      x[i][j][e] -= lines[line].slope * static_cast<float>(distance);
    });
  }
  if (p.mask.data == nullptr) return;
  const auto each_seen = [&](const auto& f) {
    for_each(x, [&](int i, int j, int e, int line, int col) {
      const bool seen = col0 + col >= lines[line].begin && col0 + col < lines[line].end;
      if (seen) f(x[i][j][e], lines[line].mask + (col0 + col) * mask_stride);
    });
  };
  const auto add = [](float& score, float bias) {
    // Not a sum: -inf hides a NaN.
    score = bias == -INFINITY ? bias : score + bias;
  };
  if (p.mask.boolean) {
    each_seen([&](float& score, int64_t at) {
      if (static_cast<const unsigned char*>(p.mask.data)[at] == 0) score = -INFINITY;
    });
  } else if (p.mask.storage == Storage::kFloat32) {
    each_seen([&](float& s, int64_t at) { add(s, static_cast<const float*>(p.mask.data)[at]); });
  } else {
    each_seen(
        [&](float& s, int64_t at) { add(s, to_float(static_cast<const T*>(p.mask.data)[at])); });
  }
}

template <int kBlocks, int kGroups>
__device__ __forceinline__ void hide_outside(const Line (&lines)[2 * kBlocks], int col0,
                                             float (&x)[kBlocks][kGroups][4]) {
  for_each(x, [&](int i, int j, int e, int line, int col) {
    if (col0 + col < lines[line].begin || col0 + col >= lines[line].end) x[i][j][e] = -INFINITY;
  });
}

// --- dropout

// Keep bits of eight columns, of which the generator makes one draw.
__device__ __forceinline__ uint32_t draw_keep(const AttentionProblem& p, int64_t group) {
  uint32_t words[4], bits = 0;
  philox({static_cast<uint64_t>(p.seed[0]), static_cast<uint64_t>(p.seed[1])},
         static_cast<uint64_t>(group), words);
#pragma unroll
  for (int half = 0; half < 8; ++half) {
    const uint32_t drawn = words[half / 2] >> (16 * (half % 2)) & 0xffffu;
    bits |= static_cast<uint32_t>(drawn >= p.threshold) << half;
  }
  return bits;
}

// Bit 4 * (j % 8) + e of keep[i] is set where element (i, j, e) is kept. The lanes that share draws
// make each once. Rows are queries, and draws lie along the columns:
template <int kBlocks, int kGroups>
__device__ __forceinline__ void draw_along_columns(const AttentionProblem& p,
                                                   const Line (&lines)[2 * kBlocks], int col0,
                                                   uint32_t (&keep)[kBlocks]) {
  const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    uint32_t mine = 0;
#pragma unroll 1
    for (int n = 0; n < 2 * ((kGroups + 3) / 4); ++n) {
      const int64_t first = n % 2 == 0 ? lines[2 * i].draw : lines[2 * i + 1].draw;
      mine |= draw_keep(p, first + col0 / 8 + 4 * (n / 2) + t) << (8 * n);
    }
    keep[i] = 0;
#pragma unroll
    for (int from = 0; from < 4; ++from) {
      const uint32_t theirs = __shfl_sync(kAllLanes, mine, lane / 4 * 4 + from) >> (2 * t);
#pragma unroll
      for (int j = from; j < kGroups; j += 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          keep[i] |= (theirs >> (16 * (j / 4) + 8 * half) & 3u) << (4 * j + 2 * half);
        }
      }
    }
  }
}

// Rows are keys, from key0 of the warp's on, and draws lie along them: query0 is the number of the
// row of column 0 among all the rows of the dropout mask.
template <int kBlocks, int kGroups>
__device__ __forceinline__ void draw_along_rows(const AttentionProblem& p, int key0, int64_t query0,
                                                uint32_t (&keep)[kBlocks]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t groups = dropout_groups(p.keys);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    uint32_t mine = 0;
    // This lane draws for group j = 2 m + g / 4, element g % 4.
#pragma unroll 1
    for (int m = 0; m < kGroups / 2; ++m) {
      const int64_t query = query0 + 8 * (2 * m + g / 4) + 2 * t + g % 2;
      const int64_t group = query * groups + (key0 + 16 * i) / 8 + g / 2 % 2;
      mine |= draw_keep(p, group) << (8 * m);
    }
    keep[i] = 0;
#pragma unroll
    for (int from = 0; from < 8; ++from) {
      const uint32_t theirs = __shfl_sync(kAllLanes, mine, 4 * from + t) >> g;
#pragma unroll
      for (int m = 0; m < kGroups / 2; ++m) {
        keep[i] |= (theirs >> (8 * m) & 1u) << (4 * (2 * m + from / 4) + from % 4);
      }
    }
  }
}

// --- results

// Row `to` of `dim` columns gets a line's two elements of every group of 8 columns, times factor.
template <typename T, int kGroups>
__device__ __forceinline__ void store_line(T* to, int dim, float factor,
                                           const float (&x)[kGroups][4], int half) {
  const int col0 = threadIdx.x % 4 * 2;
  const bool pairs = sizeof(T) == 2 && dim % 2 == 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int col = 8 * j + col0;
    const float first = x[j][2 * half] * factor, second = x[j][2 * half + 1] * factor;
    if constexpr (sizeof(T) == 2) {
      if (pairs) {
        if (col < dim) *reinterpret_cast<uint32_t*>(to + col) = pack_pair<T>(first, second);
        continue;
      }
    }
    if (col < dim) to[col] = from_float<T>(first);
    if (col + 1 < dim) to[col + 1] = from_float<T>(second);
  }
}

// --- launches

// f(T, the padded head dimension) of the problem's.
template <typename F>
cudaError_t visit_width(const AttentionProblem& p, const F& f) {
  const int64_t width = p.dim > p.value_dim ? p.dim : p.value_dim;
  const auto of = [&](auto value) {
    if (width <= 64) return f(value, std::integral_constant<int, 64>());
    if (width <= 128) return f(value, std::integral_constant<int, 128>());
    return f(value, std::integral_constant<int, 256>());
  };
  if (width > 256 || p.queries + p.keys >= int64_t{1} << 29) return cudaErrorInvalidValue;
  switch (p.storage) {
    case Storage::kFloat16:
      return of(__half());
    case Storage::kBFloat16:
      return of(__nv_bfloat16());
    case Storage::kFloat32:
      return of(float());
    default:
      return cudaErrorInvalidValue;
  }
}

// Whether rows can be copied 16 bytes at a time.
inline bool is_aligned(const AttentionOperand& operand, Storage storage) {
  const int64_t elements = storage == Storage::kFloat32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && operand.batch % elements == 0 &&
         operand.head % elements == 0 && operand.row % elements == 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <typename T>
__device__ __forceinline__ const T* row_of(const AttentionOperand& operand, int64_t b, int64_t h,
                                           int64_t row) {
  return static_cast<const T*>(operand.data) + b * operand.batch + h * operand.head +
         row * operand.row;
}

}  // namespace attention
}  // namespace fastnn
