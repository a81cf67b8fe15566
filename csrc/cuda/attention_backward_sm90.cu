// Attention's backward on Hopper, of half types: with P = exp(S - lse) and
//   dS = P (dO V^T - delta):  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO;
//   where S is capped, dS takes the cap's derivative too.
// Dao, "FlashAttention-2" (2023), algorithm 2; Shah et al., "FlashAttention-3" (2024).
// Work: one kernel has 128 queries a block and streams keys and values for dQ; one has 128 keys a
//   block and streams queries and dO, of all the heads that share the keys, for dK and dV. So S and
//   dP are made twice, 7 products in place of 5 (8 past 128 columns, where no registers hold dK and
//   dV together); but no sum leaves its block, none depends on an order of blocks, and P and dS go
//   from registers into the next product. Two warp groups have 64 rows each; a third copies.
// Memory: a block's own rows and a ring of streamed tiles; gradients leave through the own rows.
// Numerics: float sums; P and dS rounded for their products. NaN as in the forward.
// Limits: attention_backward_sm90_serves. Not measured on a GPU yet.
#include "cuda/attention_backward_sm90.cuh"

namespace fastnn {
namespace attention_sm90 {

// Starts S and dP, of a warp group's own rows by a stage's, a group of products each.
template <typename T, typename Cut, int kCount>
__device__ __forceinline__ void multiply_scores(float (&s)[kCount], float (&dp)[kCount],
                                                const BackwardMemory<Cut>& memory, int group,
                                                int stage) {
  multiply_along<T, Cut::kD>(s, memory.own(0, group), kBox, memory.streamed(0, stage),
                             Cut::kStreamedBox);
  wgmma_commit();
  multiply_along<T, Cut::kD>(dp, memory.own(1, group), kBox, memory.streamed(1, stage),
                             Cut::kStreamedBox);
  wgmma_commit();
}

// A warp group's gradient leaves by the memory of an own operand.
template <typename T, typename Cut, int kCount>
__device__ __forceinline__ void store_gradient(float (&x)[kCount], float factor,
                                               const BackwardMaps& p,
                                               const BackwardMemory<Cut>& memory, int operand,
                                               int group, const Schedule::Tile& tile) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factor;
  store_product<T>(x, memory.own(operand, group), group, p.grad[operand], tile.row + group * kRows,
                   tile.head, tile.batch);
}

// P and dS are hidden where the band does, at the end: what a hidden row brings, its lse too, may
// be NaN.

// dQ, a warp group.
template <typename T, typename Cut>
__device__ __forceinline__ void sum_for_queries(const BackwardMaps& p,
                                                const BackwardMemory<Cut>& memory, int group) {
  constexpr int kKeys = Cut::kStreamed, kD = Cut::kD;
  const int thread = threadIdx.x % kGroupThreads;
  Ring<Cut::kStages> ring;
  int turn = 0;
  float s[kKeys / 2], dp[kKeys / 2], dq[kD / 2];
  uint32_t ds[kKeys / 16][4];

  p.schedule.each([&](const Schedule::Tile& tile) {
    const int row = tile.row + group * kRows;
    const Span keys = span_of<Cut>(p, tile.row);
    const int64_t head = static_cast<int64_t>(tile.batch) * p.heads + tile.head;
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = row + fragment_row(thread, 2 * r);
      const bool inside = query < p.band.queries;
      lse[r] = inside ? p.lse[head * p.band.queries + query] : INFINITY;
      delta[r] = inside ? p.delta[head * p.band.queries + query] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dq[i] = 0.f;
    mbarrier_wait(memory.own_full(group), turn % 2);

    // The products of the next step are started behind dQ's, before they are waited for.
    int former = 0;
    const auto take_step = [&](int step) {
      wgmma_wait<1>();
      pin(s);
      if (step > 0) memory.release(former);
      former = ring.slot;
      p.scores.to_cap<T>(s);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        s[i] = exp2_approx(s[i] * p.scores.exponent - lse[row_of(i)]);
      }
      pin(s);
      ring.next();
      // Before the wait for dP, so that the compiler leaves the exponentials there too.
      if (step + 1 < keys.count) mbarrier_wait(memory.full(ring.slot), ring.parity());
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) dp[i] = s[i] * (dp[i] - delta[row_of(i)]);
      if (p.scores.cap > 0.f) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) dp[i] *= p.scores.slope(s[i], lse[row_of(i)]);
      }
      hide_keys(0.f, p.band, row, (keys.first + step) * kKeys, dp);
      pack<T>(ds, dp);
    };
    mbarrier_wait(memory.full(ring.slot), ring.parity());
    wgmma_fence();
    multiply_scores<T>(s, dp, memory, group, ring.slot);
    take_step(0);
    for (int step = 1; step < keys.count; ++step) {
      wgmma_fence();
      multiply_across<T>(dq, ds, memory.streamed(0, former), Cut::kStreamedBox);
      wgmma_commit();
      multiply_scores<T>(s, dp, memory, group, ring.slot);
      take_step(step);
    }
    wgmma_fence();
    multiply_across<T>(dq, ds, memory.streamed(0, former), Cut::kStreamedBox);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
    memory.release(former);
    if (put_back<T>(dq, p, memory, 0, tile, row, turn)) spread_nan(dq);
    store_gradient<T>(dq, p.scale, p, memory, 0, group, tile);
    memory.release_own(group);
    ++turn;
  });
}

// S, keys by queries, to P; `rows` begin at the thread's first column.
template <int kCount>
__device__ __forceinline__ void to_probabilities(float (&s)[kCount], const Scores& scores,
                                                 const RowOf* rows) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s[i] = exp2_approx(s[i] * scores.exponent - rows[column_of(i)].lse);
  }
}

// Whether the kernel of dK and dV has registers for scores that are capped: with heads of 128
// columns ptxas would spill 64 bytes of a thread's, and each gradient has a kernel of its own.
template <int kD>
constexpr bool kCapsBoth = kD == 64;

// dK, and dV where it is not made alone, a warp group: everything is transposed, keys by queries.
template <typename T, bool kWithValue, typename Cut>
__device__ __forceinline__ void sum_for_keys(const BackwardMaps& p,
                                             const BackwardMemory<Cut>& memory, int group) {
  constexpr int kQueries = Cut::kStreamed, kD = Cut::kD;
  constexpr bool kCapped = !kWithValue || kCapsBoth<kD>;
  const int thread = threadIdx.x % kGroupThreads;
  Ring<Cut::kStages> ring;
  int turn = 0;
  float s[kQueries / 2], dp[kQueries / 2], dk[kD / 2], dv[kWithValue ? kD / 2 : 1];
  uint32_t weights[kQueries / 16][4], ds[kQueries / 16][4];

  p.schedule.each([&](const Schedule::Tile& tile) {
    const int row = tile.row + group * kRows;
    const Span queries = span_of<Cut>(p, tile.row);
    int j = 0;  // which of them; the group's heads follow each other
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) {
      dk[i] = 0.f;
      if constexpr (kWithValue) dv[i] = 0.f;
    }
    mbarrier_wait(memory.own_full(group), turn % 2);

    const int steps = p.group * queries.count;
    mbarrier_wait(memory.full(ring.slot), ring.parity());
    for (int step = 0; step < steps; ++step) {
      const int stage = ring.slot;
      wgmma_fence();
      multiply_scores<T>(s, dp, memory, group, stage);
      wgmma_wait<1>();
      pin(s);
      const int query = (queries.first + j) * kQueries;
      if (++j == queries.count) j = 0;
      const RowOf* const rows = memory.rows(stage) + fragment_column(thread, 0);
      if constexpr (kCapped) p.scores.to_cap<T>(s);
      to_probabilities(s, p.scores, rows);
      pin(s);
      ring.next();
      if (step + 1 < steps) mbarrier_wait(memory.full(ring.slot), ring.parity());
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        dp[i] = s[i] * (dp[i] - rows[column_of(i)].delta);
      }
      if constexpr (kCapped) {
        if (p.scores.cap > 0.f) {
#pragma unroll
          for (int i = 0; i < kQueries / 2; ++i) {
            dp[i] *= p.scores.slope(s[i], rows[column_of(i)].lse);
          }
        }
      }
      hide_queries(0.f, p.band, row, query, s, dp);
      if constexpr (kWithValue) pack<T>(weights, s);
      pack<T>(ds, dp);
      wgmma_fence();
      if constexpr (kWithValue) {
        multiply_across<T>(dv, weights, memory.streamed(1, stage), Cut::kStreamedBox);
      }
      multiply_across<T>(dk, ds, memory.streamed(0, stage), Cut::kStreamedBox);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dk);
      if constexpr (kWithValue) pin(dv);
      memory.release(stage);
    }
    put_back<T>(dk, p, memory, 0, tile, row, turn);
    store_gradient<T>(dk, p.scale, p, memory, 0, group, tile);
    if constexpr (kWithValue) {
      put_back<T>(dv, p, memory, 1, tile, row, turn);
      store_gradient<T>(dv, 1.f, p, memory, 1, group, tile);
    }
    memory.release_own(group);
    ++turn;
  });
}

// dV alone, a warp group: S of the next queries and dV += P^T dO are under way together.
template <typename T, typename Cut>
__device__ __forceinline__ void sum_for_values(const BackwardMaps& p,
                                               const BackwardMemory<Cut>& memory, int group) {
  constexpr int kQueries = Cut::kStreamed, kD = Cut::kD;
  const int thread = threadIdx.x % kGroupThreads;
  Ring<Cut::kStages> ring;
  int turn = 0;
  float s[kQueries / 2], dv[kD / 2];
  uint32_t weights[kQueries / 16][4];

  p.schedule.each([&](const Schedule::Tile& tile) {
    const int row = tile.row + group * kRows;
    const Span queries = span_of<Cut>(p, tile.row);
    int j = 0;  // which of them; the group's heads follow each other
    const auto start_scores = [&](int stage) {
      wgmma_fence();
      multiply_along<T, kD>(s, memory.own(0, group), kBox, memory.streamed(0, stage),
                            Cut::kStreamedBox);
      wgmma_commit();
    };
    const auto start_values = [&](int stage) {
      wgmma_fence();
      multiply_across<T>(dv, weights, memory.streamed(1, stage), Cut::kStreamedBox);
      wgmma_commit();
    };
    const auto finish_scores = [&](int stage) {
      p.scores.to_cap<T>(s);
      to_probabilities(s, p.scores, memory.rows(stage) + fragment_column(thread, 0));
      hide_queries(0.f, p.band, row, (queries.first + j) * kQueries, s);
      if (++j == queries.count) j = 0;
    };
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dv[i] = 0.f;
    mbarrier_wait(memory.own_full(group), turn % 2);

    int former = ring.slot;
    mbarrier_wait(memory.full(former), ring.parity());
    start_scores(former);
    wgmma_wait<0>();
    pin(s);
    finish_scores(former);
    pack<T>(weights, s);
    ring.next();
    const int steps = p.group * queries.count;
    for (int step = 1; step < steps; ++step, ring.next()) {
      const int stage = ring.slot;
      mbarrier_wait(memory.full(stage), ring.parity());
      start_scores(stage);
      start_values(former);
      wgmma_wait<1>();
      pin(s);
      finish_scores(stage);
      // Two hurdles for the compiler, or it has the exponentials wait for the product; this one is
      // over already.
      pin(s);
      mbarrier_wait(memory.full(stage), ring.parity());
      wgmma_wait<0>();
      pin(dv);
      memory.release(former);
      former = stage;
      pack<T>(weights, s);
    }
    start_values(former);
    wgmma_wait<0>();
    pin(dv);
    memory.release(former);
    put_back<T>(dv, p, memory, 1, tile, row, turn);
    store_gradient<T>(dv, 1.f, p, memory, 1, group, tile);
    memory.release_own(group);
    ++turn;
  });
}

// What a kernel makes.
enum class Sums { kQuery, kKeyAndValue, kKey, kValue };

template <typename T, int kD, Sums kSums>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ BackwardMaps p) {
  constexpr bool kStreamQueries = kSums != Sums::kQuery;
  if constexpr (kHasWgmma) {
    using C = BackwardCut<kD, kStreamQueries>;
    const BackwardMemory<C> memory{dynamic_shared()};
    if (threadIdx.x == 0) memory.init();
    __syncthreads();
    const int group = threadIdx.x / kGroupThreads;
    if (group == 0) {
      give_registers<kBackwardCopyRegisters>();
      if (threadIdx.x == 0) copy_tiles(p, memory);
      if (kStreamQueries && threadIdx.x / 32 == 1) copy_rows(p, memory);
      if (threadIdx.x >= kGroupThreads - C::kCleaning) clean_tiles<T>(p, memory);
    } else {
      take_registers<kBackwardRegisters>();
      if constexpr (kSums == Sums::kQuery) sum_for_queries<T>(p, memory, group - 1);
      if constexpr (kSums == Sums::kKeyAndValue) sum_for_keys<T, true>(p, memory, group - 1);
      if constexpr (kSums == Sums::kKey) sum_for_keys<T, false>(p, memory, group - 1);
      if constexpr (kSums == Sums::kValue) sum_for_values<T>(p, memory, group - 1);
    }
  }
}

template <typename T, int kD, Sums kSums>
cudaError_t launch(const AttentionBackward& p, int multiprocessors, cudaStream_t stream) {
  constexpr bool kStreamQueries = kSums != Sums::kQuery;
  using C = BackwardCut<kD, kStreamQueries>;
  BackwardMaps maps = {};
  maps.band = make_band(p);
  // The last queries and the first keys of a causal problem have the most work.
  maps.schedule =
      kStreamQueries
          ? make_schedule(p, p.kv_heads, p.keys, kBackwardRows, p.right < 0, multiprocessors)
          : make_schedule(p, p.heads, p.queries, kBackwardRows, p.right >= 0, multiprocessors);
  maps.scores = make_scores(p);
  maps.lse = p.rows;
  maps.delta = p.rows + p.batch * p.heads * p.queries;
  maps.scale = p.scale;
  maps.heads = static_cast<int>(p.heads);
  maps.group = static_cast<int>(p.heads / p.kv_heads);
  const Seen seen(maps.band);
  (kStreamQueries ? maps.first_own : maps.first_streamed) = seen.first;
  maps.sources[0] = kStreamQueries ? p.query : p.key;
  maps.sources[1] = kStreamQueries ? p.grad_out : p.value;
  maps.columns[0] = static_cast<int>(p.dim);
  maps.columns[1] = static_cast<int>(p.value_dim);

  const auto map_pair = [&](const AttentionOperand& first, const AttentionOperand& second,
                            int64_t heads, int64_t begin, int64_t end, int box_rows,
                            TensorMap(&to)[2]) {
    const cudaError_t error =
        make_map(first, p.storage, p.batch, heads, begin, end, p.dim, box_rows, &to[0]);
    if (error != cudaSuccess) return error;
    return make_map(second, p.storage, p.batch, heads, begin, end, p.value_dim, box_rows, &to[1]);
  };
  cudaError_t error =
      map_pair(p.query, p.grad_out, p.heads, 0, p.queries, kStreamQueries ? C::kStreamed : kRows,
               kStreamQueries ? maps.streamed : maps.own);
  if (error != cudaSuccess) return error;
  error =
      map_pair(p.key, p.value, p.kv_heads, seen.first, seen.end,
               kStreamQueries ? kRows : C::kStreamed, kStreamQueries ? maps.own : maps.streamed);
  if (error != cudaSuccess) return error;
  if constexpr (kStreamQueries) {
    error = map_pair(contiguous(p.grad_key, p.kv_heads, p.keys, p.dim),
                     contiguous(p.grad_value, p.kv_heads, p.keys, p.value_dim), p.kv_heads, 0,
                     p.keys, kRows, maps.grad);
  } else {
    error = make_map(contiguous(p.grad_query, p.heads, p.queries, p.dim), p.storage, p.batch,
                     p.heads, 0, p.queries, p.dim, kRows, &maps.grad[0]);
  }
  if (error != cudaSuccess) return error;
  return launch_blocks(attention_backward_sm90_kernel<T, kD, kSums>, maps, maps.schedule,
                       kBackwardThreads, C::kShared, stream);
}

template <typename T, int kD>
cudaError_t launch_all(const AttentionBackward& p, int multiprocessors, cudaStream_t stream) {
  if (p.grad_query != nullptr) {
    const cudaError_t error = launch<T, kD, Sums::kQuery>(p, multiprocessors, stream);
    if (error != cudaSuccess) return error;
  }
  if (p.grad_key == nullptr) return cudaSuccess;
  if constexpr (kD <= 128) {
    if (kCapsBoth<kD> || p.softcap == 0.f) {
      return launch<T, kD, Sums::kKeyAndValue>(p, multiprocessors, stream);
    }
  }
  if constexpr (!kCapsBoth<kD>) {
    const cudaError_t error = launch<T, kD, Sums::kKey>(p, multiprocessors, stream);
    if (error != cudaSuccess) return error;
    return launch<T, kD, Sums::kValue>(p, multiprocessors, stream);
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_dim(const AttentionBackward& p, int multiprocessors, cudaStream_t stream) {
  const int64_t dim = std::max(p.dim, p.value_dim);
  return dim <= 64    ? launch_all<T, 64>(p, multiprocessors, stream)
         : dim <= 128 ? launch_all<T, 128>(p, multiprocessors, stream)
                      : launch_all<T, 256>(p, multiprocessors, stream);
}

}  // namespace attention_sm90

bool attention_backward_sm90_serves(const AttentionBackward& p) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  // A tile has 128 queries or keys; dK and dV come of one kernel.
  return p.queries >= 64 && p.keys >= 64 && attention_sm90::serves(p) &&
         attention_sm90::copies(p.grad_out, p.batch, p.heads, p.queries) &&
         (p.grad_key == nullptr) == (p.grad_value == nullptr) && aligned(p.grad_query) &&
         aligned(p.grad_key) && aligned(p.grad_value);
}

cudaError_t attention_backward_sm90_cuda(const AttentionBackward& p, int multiprocessors,
                                         cudaStream_t stream) {
  return p.storage == Storage::kFloat16
             ? attention_sm90::launch_dim<__half>(p, multiprocessors, stream)
             : attention_sm90::launch_dim<__nv_bfloat16>(p, multiprocessors, stream);
}

}  // namespace fastnn
