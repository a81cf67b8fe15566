// Attention's backward on Hopper, of half types and head dims to 128: with P = exp(S - lse) and
//   dS = P (dO V^T - delta):  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
// Dao, "FlashAttention-2" (2023), algorithm 2; Shah et al., "FlashAttention-3" (2024).
// Work: one kernel has 128 queries a block and streams keys and values for dQ; one has 128 keys a
//   block and streams queries and dO, of all the heads that share the keys, for dK and dV. So S and
//   dP are made twice, 7 products in place of 5; but no sum leaves its block, none depends on an
//   order of blocks, and P and dS go from registers into the next product. Two warp groups, one in
//   its exponentials while the other multiplies, have 64 rows each; a third copies.
// Memory: a block's own rows and a ring of streamed tiles; gradients leave through the own rows.
// Numerics: float sums; P and dS rounded for their products. NaN as in the forward.
// Limits: attention_backward_sm90_serves. Not measured on a GPU yet.
#include "cuda/attention_sm90.cuh"

namespace fastnn {
namespace attention_sm90 {

constexpr int kBackwardGroups = 2;
constexpr int kBackwardThreads = kGroupThreads * (1 + kBackwardGroups);
constexpr int kBackwardRows = kRows * kBackwardGroups;
constexpr int kBackwardCopyRegisters = 40, kBackwardRegisters = 232;

// How a kernel is cut: rows of a streamed tile, of which each stage has two operands' and, where
// queries are streamed, their lse and delta.
template <int kD, bool kStreamQueries>
struct BackwardCut {
  static constexpr int kStreamed = kStreamQueries ? (kD == 64 ? 80 : 64) : (kD == 64 ? 128 : 80);
  static constexpr int kStages = kStreamQueries ? 4 : 3;
  static constexpr int kStreamedBox = kStreamed * kSwizzleRow;
  static constexpr int kStreamedBytes = kD / kSwizzleElements * kStreamedBox;  // of an operand
  static constexpr int kOwnBytes = kD / kSwizzleElements * kBox;               // of a warp group
  static constexpr int kStageBytes = 2 * kStreamedBytes + (kStreamQueries ? kSwizzlePattern : 0);
  static constexpr int kShared = 2 * kBackwardGroups * kOwnBytes + kStages * kStageBytes +
                                 2 * (kBackwardGroups + kStages) * sizeof(Mbarrier);
};

struct BackwardMaps {
  TensorMap query, key, value, grad_out;  // the own ones in boxes of 64 rows
  TensorMap grad_query, grad_key, grad_value;
  Schedule schedule;
  Band band;
  const float *lse, *delta;  // lse of base 2
  float scale;
  int first_key;     // where the maps of keys and values begin
  int heads, group;  // query heads, and of them those of a key head
};

// A query's lse and delta, as a pair of columns needs them.
struct alignas(8) RowOf {
  float lse, delta;
};

template <typename Cut>
struct BackwardMemory {
  char* base;

  // Of the own rows: queries and dO, or keys and values.
  __device__ __forceinline__ char* own(int operand, int group) const {
    return base + (operand * kBackwardGroups + group) * Cut::kOwnBytes;
  }
  __device__ __forceinline__ char* streamed(int operand, int stage) const {
    return own(2, 0) + stage * Cut::kStageBytes + operand * Cut::kStreamedBytes;
  }
  __device__ __forceinline__ RowOf* rows(int stage) const {
    return reinterpret_cast<RowOf*>(streamed(2, stage));
  }
  __device__ __forceinline__ Mbarrier* own_full(int group) const {
    return reinterpret_cast<Mbarrier*>(streamed(0, Cut::kStages)) + group;
  }
  __device__ __forceinline__ Mbarrier* own_empty(int group) const {
    return own_full(kBackwardGroups + group);
  }
  __device__ __forceinline__ Mbarrier* full(int stage) const {
    return own_full(2 * kBackwardGroups + stage);
  }
  __device__ __forceinline__ Mbarrier* empty(int stage) const { return full(Cut::kStages + stage); }
  // A warp group is done with a stage.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty(stage));
  }
  __device__ __forceinline__ void init(int copying) const {
    for (int group = 0; group < kBackwardGroups; ++group) {
      mbarrier_init(own_full(group), 1);
      mbarrier_init(own_empty(group), 1);
    }
    for (int stage = 0; stage < Cut::kStages; ++stage) {
      mbarrier_init(full(stage), copying);
      mbarrier_init(empty(stage), kBackwardGroups * 4);  // a lane of each warp
    }
    mbarrier_fence_init();
  }
};

// The tiles of keys that a block's queries see, and those of queries that see a block's keys.
template <typename Cut>
__device__ __forceinline__ Span keys_of(const BackwardMaps& p, int row) {
  const int last = min(row + kBackwardRows, p.band.queries) - 1;
  return {p.band.first_key(row), p.band.end_key(last), Cut::kStreamed};
}
template <typename Cut>
__device__ __forceinline__ Span queries_of(const BackwardMaps& p, int row) {
  const int last = min(row + kBackwardRows, p.band.keys) - 1;
  return {p.band.first_query(row), p.band.end_query(last), Cut::kStreamed};
}

// One thread: a block's own rows of two operands, when those of its last tile are done with.
template <int kD, typename Cut>
__device__ __forceinline__ void copy_own(const BackwardMemory<Cut>& memory, int parity,
                                         const TensorMap& first, const TensorMap& second, int row,
                                         int head, int batch) {
  for (int group = 0; group < kBackwardGroups; ++group) {
    Mbarrier* const full = memory.own_full(group);
    mbarrier_wait(memory.own_empty(group), parity ^ 1);
    mbarrier_arrive_expect(full, 2 * Cut::kOwnBytes);
    load_tile<kD>(memory.own(0, group), kBox, first, row + group * kRows, head, batch, full);
    load_tile<kD>(memory.own(1, group), kBox, second, row + group * kRows, head, batch, full);
  }
}

// One thread: two operands' tile of the stream.
template <int kD, typename Cut>
__device__ __forceinline__ void copy_streamed(const BackwardMemory<Cut>& memory, int stage,
                                              const TensorMap& first, const TensorMap& second,
                                              int row, int head, int batch) {
  Mbarrier* const full = memory.full(stage);
  mbarrier_arrive_expect(full, 2 * Cut::kStreamedBytes);
  load_tile<kD>(memory.streamed(0, stage), Cut::kStreamedBox, first, row, head, batch, full);
  load_tile<kD>(memory.streamed(1, stage), Cut::kStreamedBox, second, row, head, batch, full);
}

// Starts S and dP, of a warp group's own rows by a stage's, a group of products each.
template <typename T, int kD, typename Cut, int kCount>
__device__ __forceinline__ void multiply_scores(float (&s)[kCount], float (&dp)[kCount],
                                                const BackwardMemory<Cut>& memory, int group,
                                                int stage) {
  multiply_along<T, kD>(s, memory.own(0, group), kBox, memory.streamed(0, stage),
                        Cut::kStreamedBox);
  wgmma_commit();
  multiply_along<T, kD>(dp, memory.own(1, group), kBox, memory.streamed(1, stage),
                        Cut::kStreamedBox);
  wgmma_commit();
}

template <int kCount>
__device__ __forceinline__ void multiply_by(float (&x)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factor;
}

// dQ, one thread: the queries and dO of a tile stay, keys and values pass.
template <int kD>
__device__ __forceinline__ void copy_for_queries(
    const BackwardMaps& p, const BackwardMemory<BackwardCut<kD, false>>& memory) {
  using C = BackwardCut<kD, false>;
  Ring<C::kStages> ring;
  int parity = 0;
  p.schedule.each([&](const Schedule::Tile& tile) {
    const Span keys = keys_of<C>(p, tile.row);
    copy_own<kD>(memory, parity, p.query, p.grad_out, tile.row, tile.head, tile.batch);
    for (int j = 0; j < keys.count; ++j, ring.next()) {
      mbarrier_wait(memory.empty(ring.slot), ring.parity() ^ 1);
      copy_streamed<kD>(memory, ring.slot, p.key, p.value,
                        (keys.first + j) * C::kStreamed - p.first_key, tile.head / p.group,
                        tile.batch);
    }
    parity ^= 1;
  });
}

// dQ, a warp group.
template <typename T, int kD>
__device__ __forceinline__ void sum_for_queries(
    const BackwardMaps& p, const BackwardMemory<BackwardCut<kD, false>>& memory, int group) {
  using C = BackwardCut<kD, false>;
  constexpr int kKeys = C::kStreamed;
  const int thread = threadIdx.x % kGroupThreads;
  const float scale = p.scale * kLog2E;
  Ring<C::kStages> ring;
  int parity = 0;
  float s[kKeys / 2], dp[kKeys / 2], dq[kD / 2];
  uint32_t ds[kKeys / 16][4];

  p.schedule.each([&](const Schedule::Tile& tile) {
    const int row = tile.row + group * kRows;
    const Span keys = keys_of<C>(p, tile.row);
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
    mbarrier_wait(memory.own_full(group), parity);

    // The products of the next step are started behind dQ's, before they are waited for.
    int former = 0;
    const auto take_step = [&](int step) {
      wgmma_wait<1>();
      pin(s);
      if (step > 0) memory.release(former);
      former = ring.slot;
      hide_keys(s, p.band, row, (keys.first + step) * kKeys);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = exp2_approx(s[i] * scale - lse[row_of(i)]);
      pin(s);
      ring.next();
      // Before the wait for dP, so that the compiler leaves the exponentials there too.
      if (step + 1 < keys.count) mbarrier_wait(memory.full(ring.slot), ring.parity());
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) dp[i] = s[i] * (dp[i] - delta[row_of(i)]);
      pack<T>(ds, dp);
    };
    mbarrier_wait(memory.full(ring.slot), ring.parity());
    wgmma_fence();
    multiply_scores<T, kD>(s, dp, memory, group, ring.slot);
    take_step(0);
    for (int step = 1; step < keys.count; ++step) {
      wgmma_fence();
      multiply_across<T>(dq, ds, memory.streamed(0, former), C::kStreamedBox);
      wgmma_commit();
      multiply_scores<T, kD>(s, dp, memory, group, ring.slot);
      take_step(step);
    }
    wgmma_fence();
    multiply_across<T>(dq, ds, memory.streamed(0, former), C::kStreamedBox);
    wgmma_commit();
    wgmma_wait<0>();
    memory.release(former);
    pin(dq);
    multiply_by(dq, p.scale);
    store_product<T>(dq, memory.own(0, group), group, p.grad_query, row, tile.head, tile.batch);
    if (thread == 0) {
      store_wait_read();
      mbarrier_arrive(memory.own_empty(group));
    }
    parity ^= 1;
  });
}

// dK and dV: calls f(head, query) of what is streamed, queries and dO of the group's heads.
template <typename Cut, typename F>
__device__ __forceinline__ void each_stage(const BackwardMaps& p, const Schedule::Tile& tile,
                                           const F& f) {
  const Span queries = queries_of<Cut>(p, tile.row);
  for (int member = 0; member < p.group; ++member) {
    for (int j = 0; j < queries.count; ++j) {
      f(tile.head * p.group + member, (queries.first + j) * Cut::kStreamed);
    }
  }
}

// One thread: the keys and values of a tile stay, queries and dO pass.
template <int kD>
__device__ __forceinline__ void copy_for_keys(const BackwardMaps& p,
                                              const BackwardMemory<BackwardCut<kD, true>>& memory) {
  using C = BackwardCut<kD, true>;
  Ring<C::kStages> ring;
  int parity = 0;
  p.schedule.each([&](const Schedule::Tile& tile) {
    copy_own<kD>(memory, parity, p.key, p.value, tile.row - p.first_key, tile.head, tile.batch);
    each_stage<C>(p, tile, [&](int head, int query) {
      mbarrier_wait(memory.empty(ring.slot), ring.parity() ^ 1);
      copy_streamed<kD>(memory, ring.slot, p.query, p.grad_out, query, head, tile.batch);
      ring.next();
    });
    parity ^= 1;
  });
}

// One warp: their lse and delta.
template <int kD>
__device__ __forceinline__ void copy_rows(const BackwardMaps& p,
                                          const BackwardMemory<BackwardCut<kD, true>>& memory) {
  using C = BackwardCut<kD, true>;
  Ring<C::kStages> ring;
  p.schedule.each([&](const Schedule::Tile& tile) {
    each_stage<C>(p, tile, [&](int head, int first) {
      const int64_t before = (static_cast<int64_t>(tile.batch) * p.heads + head) * p.band.queries;
      mbarrier_wait(memory.empty(ring.slot), ring.parity() ^ 1);
      for (int r = threadIdx.x % 32; r < C::kStreamed; r += 32) {
        const int query = first + r;
        const bool inside = query < p.band.queries;
        memory.rows(ring.slot)[r] = {inside ? p.lse[before + query] : INFINITY,
                                     inside ? p.delta[before + query] : 0.f};
      }
      mbarrier_arrive(memory.full(ring.slot));
      ring.next();
    });
  });
}

// dK and dV, a warp group: everything is transposed, keys by queries.
template <typename T, int kD>
__device__ __forceinline__ void sum_for_keys(const BackwardMaps& p,
                                             const BackwardMemory<BackwardCut<kD, true>>& memory,
                                             int group) {
  using C = BackwardCut<kD, true>;
  constexpr int kQueries = C::kStreamed;
  const int thread = threadIdx.x % kGroupThreads;
  const float scale = p.scale * kLog2E;
  Ring<C::kStages> ring;
  int parity = 0;
  float s[kQueries / 2], dp[kQueries / 2], dk[kD / 2], dv[kD / 2];
  uint32_t weights[kQueries / 16][4], ds[kQueries / 16][4];

  p.schedule.each([&](const Schedule::Tile& tile) {
    const int row = tile.row + group * kRows;
    const Span queries = queries_of<C>(p, tile.row);
    int j = 0;  // which of them; the group's heads follow each other
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;
    mbarrier_wait(memory.own_full(group), parity);

    const int steps = p.group * queries.count;
    mbarrier_wait(memory.full(ring.slot), ring.parity());
    for (int step = 0; step < steps; ++step) {
      const int stage = ring.slot;
      wgmma_fence();
      multiply_scores<T, kD>(s, dp, memory, group, stage);
      wgmma_wait<1>();
      pin(s);
      hide_queries(s, p.band, row, (queries.first + j) * kQueries);
      if (++j == queries.count) j = 0;
      const RowOf* const rows = memory.rows(stage) + fragment_column(thread, 0);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        s[i] = exp2_approx(s[i] * scale - rows[column_of(i)].lse);
      }
      pin(s);
      ring.next();
      if (step + 1 < steps) mbarrier_wait(memory.full(ring.slot), ring.parity());
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        dp[i] = s[i] * (dp[i] - rows[column_of(i)].delta);
      }
      pack<T>(weights, s);
      pack<T>(ds, dp);
      wgmma_fence();
      multiply_across<T>(dv, weights, memory.streamed(1, stage), C::kStreamedBox);
      multiply_across<T>(dk, ds, memory.streamed(0, stage), C::kStreamedBox);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dk);
      pin(dv);
      memory.release(stage);
    }
    multiply_by(dk, p.scale);
    store_product<T>(dk, memory.own(0, group), group, p.grad_key, row, tile.head, tile.batch);
    store_product<T>(dv, memory.own(1, group), group, p.grad_value, row, tile.head, tile.batch);
    if (thread == 0) {
      store_wait_read();
      mbarrier_arrive(memory.own_empty(group));
    }
    parity ^= 1;
  });
}

template <typename T, int kD, bool kStreamQueries>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ BackwardMaps p) {
  if constexpr (kHasWgmma) {
    const BackwardMemory<BackwardCut<kD, kStreamQueries>> memory{dynamic_shared()};
    if (threadIdx.x == 0) memory.init(kStreamQueries ? 1 + 32 : 1);
    __syncthreads();
    const int group = threadIdx.x / kGroupThreads;
    if (group == 0) {
      give_registers<kBackwardCopyRegisters>();
      if constexpr (kStreamQueries) {
        if (threadIdx.x == 0) copy_for_keys<kD>(p, memory);
        if (threadIdx.x / 32 == 1) copy_rows<kD>(p, memory);
      } else {
        if (threadIdx.x == 0) copy_for_queries<kD>(p, memory);
      }
    } else {
      take_registers<kBackwardRegisters>();
      if constexpr (kStreamQueries) {
        sum_for_keys<T, kD>(p, memory, group - 1);
      } else {
        sum_for_queries<T, kD>(p, memory, group - 1);
      }
    }
  }
}

template <typename T, int kD, bool kStreamQueries>
cudaError_t launch(const AttentionBackward& p, int multiprocessors, cudaStream_t stream) {
  using C = BackwardCut<kD, kStreamQueries>;
  constexpr int kQueryBox = kStreamQueries ? C::kStreamed : kRows;
  constexpr int kKeyBox = kStreamQueries ? kRows : C::kStreamed;
  BackwardMaps maps = {};
  maps.band = make_band(p);
  // The last queries and the first keys of a causal problem have the most work.
  maps.schedule = kStreamQueries
                      ? make_schedule(p, p.kv_heads, p.keys, kBackwardRows, p.right < 0)
                      : make_schedule(p, p.heads, p.queries, kBackwardRows, p.right >= 0);
  maps.lse = p.rows;
  maps.delta = p.rows + p.batch * p.heads * p.queries;
  maps.scale = p.scale;
  maps.heads = static_cast<int>(p.heads);
  maps.group = static_cast<int>(p.heads / p.kv_heads);
  const Seen seen(maps.band);
  maps.first_key = seen.first;
  const auto of_queries = [&](const AttentionOperand& x, int64_t columns, int rows, TensorMap* to) {
    return make_map(x, p.storage, p.batch, p.heads, 0, p.queries, columns, rows, to);
  };
  const auto of_keys = [&](const AttentionOperand& x, int64_t first, int64_t end, int64_t columns,
                           int rows, TensorMap* to) {
    return make_map(x, p.storage, p.batch, p.kv_heads, first, end, columns, rows, to);
  };
  cudaError_t error = of_queries(p.query, p.dim, kQueryBox, &maps.query);
  if (error != cudaSuccess) return error;
  error = of_queries(p.grad_out, p.value_dim, kQueryBox, &maps.grad_out);
  if (error != cudaSuccess) return error;
  error = of_keys(p.key, seen.first, seen.end, p.dim, kKeyBox, &maps.key);
  if (error != cudaSuccess) return error;
  error = of_keys(p.value, seen.first, seen.end, p.value_dim, kKeyBox, &maps.value);
  if (error != cudaSuccess) return error;
  if constexpr (kStreamQueries) {
    error = of_keys(contiguous(p.grad_key, p.kv_heads, p.keys, p.dim), 0, p.keys, p.dim, kRows,
                    &maps.grad_key);
    if (error != cudaSuccess) return error;
    error = of_keys(contiguous(p.grad_value, p.kv_heads, p.keys, p.value_dim), 0, p.keys,
                    p.value_dim, kRows, &maps.grad_value);
  } else {
    error = of_queries(contiguous(p.grad_query, p.heads, p.queries, p.dim), p.dim, kRows,
                       &maps.grad_query);
  }
  if (error != cudaSuccess) return error;
  return launch_blocks(attention_backward_sm90_kernel<T, kD, kStreamQueries>, maps, maps.schedule,
                       kBackwardThreads, C::kShared, multiprocessors, stream);
}

template <typename T, int kD>
cudaError_t launch_both(const AttentionBackward& p, int multiprocessors, cudaStream_t stream) {
  if (p.grad_query != nullptr) {
    const cudaError_t error = launch<T, kD, false>(p, multiprocessors, stream);
    if (error != cudaSuccess) return error;
  }
  return p.grad_key == nullptr ? cudaSuccess : launch<T, kD, true>(p, multiprocessors, stream);
}

template <typename T>
cudaError_t launch_dim(const AttentionBackward& p, int multiprocessors, cudaStream_t stream) {
  return std::max(p.dim, p.value_dim) <= 64 ? launch_both<T, 64>(p, multiprocessors, stream)
                                            : launch_both<T, 128>(p, multiprocessors, stream);
}

}  // namespace attention_sm90

bool attention_backward_sm90_serves(const AttentionBackward& p) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  // A tile has 128 queries or keys; dK and dV come of one kernel.
  return p.queries >= 64 && p.keys >= 64 && attention_sm90::serves(p, 128) &&
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
