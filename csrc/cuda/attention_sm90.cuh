// What Hopper's attention kernels share: the band, the schedule, tiles in shared memory and their
// products.
#pragma once

#include <algorithm>

#include "cuda/attention.h"
#include "cuda/prim/math.cuh"
#include "cuda/prim/mbarrier.cuh"
#include "cuda/prim/named_barrier.cuh"
#include "cuda/prim/ring.cuh"
#include "cuda/prim/shared.cuh"
#include "cuda/prim/tma.cuh"
#include "cuda/prim/wgmma.cuh"

namespace fastnn {
namespace attention_sm90 {

constexpr int kGroupThreads = 128;         // of a warp group
constexpr int kRows = 64;                  // of a warp group's products
constexpr int kBox = kRows * kSwizzleRow;  // bytes of as many rows of 64 columns
constexpr int kTurnBarrier = 1;            // numbers of barriers, the first warp group's
constexpr int kGroupBarrier = 8;
constexpr float kLog2E = 1.44269504f;
constexpr int64_t kSectionBytes = 32 << 20;  // keys and values that stay in L2

// A warp group's columns of a product of 64 x N: of accumulator i, less those of accumulator 0.
__host__ __device__ __forceinline__ constexpr int column_of(int i) { return fragment_column(0, i); }
// Its two rows of the 64 that a thread has.
__host__ __device__ __forceinline__ constexpr int row_of(int i) { return i / 2 % 2; }

__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// What all of a tile's rows see: [first, end).
struct Whole {
  int first, end;

  // Whether `count` of `size` from `begin` on are for a part of the rows alone.
  __device__ __forceinline__ bool cuts(int begin, int count, int size) const {
    return begin < first || min(begin + count, size) > end;
  }
};

// Query i sees the keys from i + shift - left to i + shift + right, -1 is unlimited.
struct Band {
  int queries, keys, shift, left, right;

  static __host__ __device__ __forceinline__ int clamp(int x, int most) {
    return x < 0 ? 0 : x < most ? x : most;
  }
  __host__ __device__ __forceinline__ int first_key(int query) const {
    return left < 0 ? 0 : clamp(query + shift - left, keys);
  }
  __host__ __device__ __forceinline__ int end_key(int query) const {
    return right < 0 ? keys : clamp(query + shift + right + 1, keys);
  }
  __host__ __device__ __forceinline__ int first_query(int key) const {
    return right < 0 ? 0 : clamp(key - shift - right, queries);
  }
  __host__ __device__ __forceinline__ int end_query(int key) const {
    return left < 0 ? queries : clamp(key - shift + left + 1, queries);
  }
  __device__ __forceinline__ Whole whole_keys(int query, int rows) const {
    return {first_key(min(query + rows, queries) - 1), end_key(query)};
  }
  __device__ __forceinline__ Whole whole_queries(int key, int rows) const {
    return {first_query(min(key + rows, keys) - 1), end_query(key)};
  }
};

// From a product q k^T to a score: cap tanh(inside q k^T) times `unit`, which is 1, or where there
// is no cap the product times `unit`.
struct Scores {
  float unit, inside, cap;
  float exponent;  // unit log2(e)
  float per_cap;   // ln(2) / cap

  // A branch costs the others nothing.
  template <typename T, int kCount>
  __device__ __forceinline__ void to_cap(float (&s)[kCount]) const {
    if (cap == 0.f) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] = cap * Math<T>::tanh(s[i] * inside);
  }
  // The derivative, from a probability and its row's lse of base 2: the score is their logarithm.
  __device__ __forceinline__ float slope(float probability, float lse) const {
    const float tanh = (log2_approx(probability) + lse) * per_cap;
    return probability == 0.f ? 0.f : 1.f - tanh * tanh;
  }
};

inline Scores make_scores(const AttentionProblem& p) {
  if (p.softcap == 0.f) return {p.scale, 0.f, 0.f, p.scale * kLog2E, 0.f};
  return {1.f, p.scale / p.softcap, p.softcap, kLog2E, 1.f / (kLog2E * p.softcap)};
}

// Tiles of [begin, end), one at least: the first of them and how many.
struct Span {
  int first, count;
  __device__ __forceinline__ Span(int begin, int end, int tile)
      : first(begin / tile), count((end + tile - 1) / tile - first) {
    if (count < 1) count = 1;
  }
};

// What each block does, in order: tiles of `rows` rows of all the heads. Those with the most work
// come first, a section of the heads after the other; every other round of the blocks goes
// backwards, so that no block always has the longer one.
struct Schedule {
  int blocks, heads, all_heads, section, tiles, rows;
  bool falling;  // the last tile has the most work

  struct Tile {
    int row, head, batch;
  };

  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    const int block = blockIdx.x, count = all_heads * tiles;
    int step = 2 * (blocks - block) - 1;  // to the block's place in a round that goes backwards
    for (int index = block; index < count; index += step, step = 2 * blocks - step) {
      const int first = index / (section * tiles) * section, within = index % (section * tiles);
      const int width = min(section, all_heads - first);
      const int place = within / width, head = first + within % width;
      f(Tile{(falling ? tiles - 1 - place : place) * rows, head % heads, head / heads});
    }
  }
};

inline Schedule make_schedule(const AttentionProblem& p, int64_t heads, int64_t rows, int tile_rows,
                              bool falling, int multiprocessors) {
  const int64_t group = heads / p.kv_heads;
  const int64_t fits = kSectionBytes / (p.keys * (p.dim + p.value_dim) * 2);
  const int64_t all = p.batch * heads, section = std::max<int64_t>(fits, 1) * group;
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  return {static_cast<int>(std::min(all * tiles, static_cast<int64_t>(multiprocessors))),
          static_cast<int>(heads),
          static_cast<int>(all),
          static_cast<int>(std::min(section, all)),
          static_cast<int>(tiles),
          tile_rows,
          falling};
}

inline Band make_band(const AttentionProblem& p) {
  const int64_t far = p.queries + p.keys;  // as good as unlimited
  return {static_cast<int>(p.queries), static_cast<int>(p.keys), static_cast<int>(p.shift),
          static_cast<int>(std::min(p.left, far)), static_cast<int>(std::min(p.right, far))};
}

// The keys [first, end) that some query sees. Of the others not even a NaN is to be read: the maps
// of keys and values begin and end with them, and the copy engine reads 0 beyond.
struct Seen {
  int first, end;
  explicit Seen(const Band& band) : first(band.first_key(0)), end(band.end_key(band.queries - 1)) {}
};

// A [batch, heads, rows, columns] operand in boxes of `box_rows` x 64, from row `first` to `end`.
inline cudaError_t make_map(const AttentionOperand& x, Storage storage, int64_t batch,
                            int64_t heads, int64_t first, int64_t end, int64_t columns,
                            int box_rows, TensorMap* map) {
  const auto stride = [](int64_t size, int64_t given) { return size == 1 ? 8 : given; };
  const auto* data = static_cast<const char*>(x.data) + first * x.row * 2;
  return make_tensor_map({data, columns, end - first, heads, stride(end - first, x.row),
                          stride(heads, x.head), box_rows, batch, stride(batch, x.batch)},
                         storage, map);
}

inline bool copies(const AttentionOperand& x, int64_t batch, int64_t heads, int64_t rows) {
  constexpr int64_t kMost = int64_t{1} << 38;
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < kMost);
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && fits(batch, x.batch) &&
         fits(heads, x.head) && fits(rows, x.row);
}

// The rows of a head.
template <typename T>
__device__ __forceinline__ const T* rows_of(const AttentionOperand& x, int batch, int head) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
}

inline AttentionOperand contiguous(const void* data, int64_t heads, int64_t rows, int64_t columns) {
  return {data, heads * rows * columns, rows * columns, columns};
}

// What both directions ask of a problem: scores within a band, capped or not, in rows of 16 bytes.
inline bool serves(const AttentionProblem& p) {
  constexpr int64_t kMost = int64_t{1} << 29, kMostDim = 256;
  const bool half = p.storage == Storage::kFloat16 || p.storage == Storage::kBFloat16;
  const bool plain = p.scale > 0 && p.mask.data == nullptr && p.slopes == nullptr &&
                     p.sinks == nullptr && p.seed == nullptr && p.query_starts == nullptr;
  const int64_t longer = std::max(p.queries, p.keys);
  const bool sizes = p.queries > 0 && p.keys > 0 && p.batch > 0 && p.heads > 0 && p.dim > 0 &&
                     p.value_dim > 0 && longer < kMost &&
                     p.batch * p.heads * (longer / kRows + 1) < kMost;
  if (!half || !plain || !sizes || p.dim > kMostDim || p.value_dim > kMostDim) return false;
  const Seen seen(make_band(p));
  return seen.first < seen.end && p.dim % 8 == 0 && p.value_dim % 8 == 0 &&
         copies(p.query, p.batch, p.heads, p.queries) &&
         copies(p.key, p.batch, p.kv_heads, p.keys) && copies(p.value, p.batch, p.kv_heads, p.keys);
}

template <typename Maps>
cudaError_t launch_blocks(void (*kernel)(const Maps), const Maps& maps, const Schedule& schedule,
                          int threads, int shared, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(schedule.blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, maps);
}

// One thread: a tile of kD / 64 boxes, each of the map's rows and `bytes` long.
template <int kD>
__device__ __forceinline__ void load_tile(char* to, int bytes, const TensorMap& map, int row,
                                          int head, int batch, Mbarrier* full) {
#pragma unroll
  for (int box = 0; box < kD / kSwizzleElements; ++box) {
    load_box(to + box * bytes, map, box * kSwizzleElements, row, head, batch, full);
  }
}

// D[64, N] = A B^T over kD: 64 rows of A and N of B, both in boxes of 64 of kD, so many bytes each.
template <typename T, int kD, int kRegisters>
__device__ __forceinline__ void multiply_along(float (&d)[kRegisters], const char* a, int box_a,
                                               const char* b, int box_b) {
  const uint64_t left = matrix_descriptor(shared_address(a), 0, kSwizzlePattern);
  const uint64_t right = matrix_descriptor(shared_address(b), 0, kSwizzlePattern);
#pragma unroll
  for (int k = 0; k < kD; k += 16) {
    const int box = k / kSwizzleElements, within = k % kSwizzleElements * 2;
    wgmma<T, false, false>(d, advanced(left, box * box_a + within),
                           advanced(right, box * box_b + within), k > 0);
  }
}

// D[64, N] += W B: W of 64 x 16 kSteps from registers, B of 16 kSteps rows in boxes of 64 of N.
template <typename T, int kSteps, int kRegisters>
__device__ __forceinline__ void multiply_across(float (&d)[kRegisters],
                                                const uint32_t (&w)[kSteps][4], const char* b,
                                                int box) {
  const uint64_t right = matrix_descriptor(shared_address(b), box, kSwizzlePattern);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<T, true>(d, w[step], advanced(right, step * 16 * kSwizzleRow), true);
  }
}

// An accumulator as the left operand of the next product, rounded.
template <typename T, int kSteps>
__device__ __forceinline__ void pack(uint32_t (&w)[kSteps][4], const float (&x)[8 * kSteps]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) w[i / 4][i % 4] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
}

// `as` in the columns of each row that are not from first(row) to end(row); all the scores begin at
// (row, column).
template <typename First, typename End, int kCount, typename... More>
__device__ __forceinline__ void hide(float as, int row, int column, const First& first,
                                     const End& end, float (&s)[kCount], More&... more) {
  const int thread = threadIdx.x % kGroupThreads, left = column + fragment_column(thread, 0);
  int from[2], to[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + fragment_row(thread, 2 * r);
    from[r] = first(at) - left;
    to[r] = end(at) - left;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool seen = column_of(i) >= from[row_of(i)] && column_of(i) < to[row_of(i)];
    s[i] = seen ? s[i] : as;
    ((more[i] = seen ? more[i] : as), ...);
  }
}

// Of queries by keys, where the band cuts them.
template <int kCount, typename... More>
__device__ __forceinline__ void hide_keys(float as, const Band& band, int query, int key,
                                          float (&s)[kCount], More&... more) {
  if (key >= band.first_key(query + kRows - 1) && key + 2 * kCount <= band.end_key(query)) return;
  hide(
      as, query, key, [&](int q) { return band.first_key(q); },
      [&](int q) { return band.end_key(q); }, s, more...);
}
// Of keys by queries.
template <int kCount, typename... More>
__device__ __forceinline__ void hide_queries(float as, const Band& band, int key, int query,
                                             float (&s)[kCount], More&... more) {
  if (query >= band.first_query(key + kRows - 1) && query + 2 * kCount <= band.end_query(key)) {
    return;
  }
  hide(
      as, key, query, [&](int k) { return band.first_query(k); },
      [&](int k) { return band.end_query(k); }, s, more...);
}

// A warp group: its product, rounded, to `memory` (boxes of 64 x 64) and from there to `map`. The
// first thread of the group copies; `memory` may be written again when its store_wait_read is over.
template <typename T, int kRegisters>
__device__ __forceinline__ void store_product(const float (&x)[kRegisters], char* memory, int group,
                                              const TensorMap& map, int row, int head, int batch) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32;
  const int within = thread / 32 * 16 + lane % 16;
  if (thread == 0) store_wait_read();
  named_barrier_wait(kGroupBarrier + group, kGroupThreads);
#pragma unroll
  for (int i = 0; i < kRegisters; i += 8) {
    const uint32_t words[4] = {pack_pair<T>(x[i], x[i + 1]), pack_pair<T>(x[i + 2], x[i + 3]),
                               pack_pair<T>(x[i + 4], x[i + 5]), pack_pair<T>(x[i + 6], x[i + 7])};
    const uint32_t at =
        within * kSwizzleRow + (column_of(i) % kSwizzleElements / 8 + lane / 16) * 16;
    store_matrices(memory + column_of(i) / kSwizzleElements * kBox + swizzled(at), words);
  }
  fence_async_proxy();
  named_barrier_wait(kGroupBarrier + group, kGroupThreads);
  if (thread == 0) {
    for (int box = 0; box < 2 * kRegisters / kSwizzleElements; ++box) {
      store_box(map, box * kSwizzleElements, row, head, batch, memory + box * kBox);
    }
    store_commit();
  }
}

}  // namespace attention_sm90
}  // namespace fastnn
