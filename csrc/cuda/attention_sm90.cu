// Attention's forward on Hopper: out = softmax(scale Q K^T) V and lse, of half types. Dao,
// "FlashAttention-2" (2023), algorithm 1; Shah et al., "FlashAttention-3" (2024), its overlaps.
// Work: resident blocks take tiles of 128 queries (192 for head dims to 64) of a head, longest
//   first. One thread has the copy engine fill rings of keys and values, last keys first. Of the
//   other warp groups each has 64 queries, starts Q K^T of the next keys before P V of these, so
//   that its softmax is hidden, and takes turns with its neighbours in starting products.
// Memory: Q, two stages of K and V, and out (in Q's place for head dims above 128) in shared
//   memory; scores, probabilities and the sum in registers. Other head dims are padded with zeros
//   by the copy engine, ragged sizes are its bounds.
// Numerics: float sums, exp2 with the scale folded in, P rounded for its product.
//   A key that a query does not see does not reach it, NaN or not (attention_finite_sm90.cuh).
// Limits: attention_forward_sm90_serves. Not measured on a GPU yet.
#include "cuda/attention_finite_sm90.cuh"
#include "cuda/prim/online_softmax.cuh"

namespace fastnn {
namespace attention_sm90 {

// How a head dim is cut: warp groups that multiply, keys of a tile; registers a thread of theirs
// and of the copying one.
template <int kD>
struct Cut {
  static constexpr int kGroups = kD == 64 ? 3 : 2;
  static constexpr int kKeys = kD == 256 ? 80 : 128;
  static constexpr int kStages = 2;
  static constexpr bool kCaps = kD > 64;         // three groups have no registers left for it
  static constexpr bool kTurns = kD <= 128;      // of its few keys a wide head's groups need none
  static constexpr bool kOutInQuery = kD > 128;  // there is no memory left
  static constexpr int kThreads = kGroupThreads * (1 + kGroups);
  static constexpr int kCopyRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kRegisters = kGroups == 3 ? 160 : 232;
  static constexpr int kKeyBox = kKeys * kSwizzleRow;
  static constexpr int kQueryBytes = kD / kSwizzleElements * kBox;  // of a warp group
  static constexpr int kKeyBytes = kD / kSwizzleElements * kKeyBox;
  static constexpr int kOutBytes = kOutInQuery ? 0 : kQueryBytes;
  static constexpr int kBarriers = 2 * kGroups + 5 * kStages;
  static constexpr int kShared = kGroups * (kQueryBytes + kOutBytes) + 2 * kStages * kKeyBytes +
                                 kBarriers * sizeof(Mbarrier) + kTilesUnderWay * sizeof(int);
  static_assert(kStages < kTilesUnderWay);
};

struct ForwardMaps {
  TensorMap query, key, value, out;
  Schedule schedule;
  Band band;
  Scores scores;
  AttentionOperand values;
  int value_dim;
  float* lse;
  int first_key;  // where the maps of keys and values begin
  int group;      // query heads of a key head
};

template <int kD>
struct ForwardMemory {
  using C = Cut<kD>;
  char* base;

  __device__ __forceinline__ char* query(int group) const { return base + group * C::kQueryBytes; }
  __device__ __forceinline__ char* out(int group) const {
    return C::kOutInQuery ? query(group) : query(C::kGroups) + group * C::kOutBytes;
  }
  __device__ __forceinline__ char* key(int stage) const {
    return base + C::kGroups * (C::kQueryBytes + C::kOutBytes) + stage * C::kKeyBytes;
  }
  __device__ __forceinline__ char* value(int stage) const { return key(C::kStages + stage); }
  __device__ __forceinline__ Mbarrier* barrier(int i) const {
    return reinterpret_cast<Mbarrier*>(key(2 * C::kStages)) + i;
  }
  __device__ __forceinline__ Mbarrier* query_full(int group) const { return barrier(group); }
  __device__ __forceinline__ Mbarrier* query_empty(int group) const {
    return barrier(C::kGroups + group);
  }
  __device__ __forceinline__ Mbarrier* key_full(int stage) const {
    return barrier(2 * C::kGroups + stage);
  }
  __device__ __forceinline__ Mbarrier* key_empty(int stage) const {
    return key_full(C::kStages + stage);
  }
  __device__ __forceinline__ Mbarrier* value_full(int stage) const {
    return key_full(2 * C::kStages + stage);
  }
  __device__ __forceinline__ Mbarrier* value_empty(int stage) const {
    return key_full(3 * C::kStages + stage);
  }
  __device__ __forceinline__ Mbarrier* value_cut(int stage) const {
    return key_full(4 * C::kStages + stage);
  }
  __device__ __forceinline__ int* cleaned() const {
    return reinterpret_cast<int*>(barrier(C::kBarriers));
  }
  __device__ __forceinline__ void init() const {
    for (int group = 0; group < C::kGroups; ++group) {
      mbarrier_init(query_full(group), 1);
      mbarrier_init(query_empty(group), 1);
    }
    for (int stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(key_full(stage), 1);
      mbarrier_init(value_full(stage), 1);
      mbarrier_init(value_cut(stage), 1);
      mbarrier_init(key_empty(stage), C::kGroups);
      mbarrier_init(value_empty(stage), C::kGroups);
    }
    for (int i = 0; i < kTilesUnderWay; ++i) cleaned()[i] = -1;
    mbarrier_fence_init();
  }
};

// The tiles of keys that a tile of queries sees.
template <int kD>
__device__ __forceinline__ Span keys_of(const ForwardMaps& p, int row) {
  using C = Cut<kD>;
  const int last = min(row + C::kGroups * kRows, p.band.queries) - 1;
  return {p.band.first_key(row), p.band.end_key(last), C::kKeys};
}

// Those that are seen by a part of the queries alone: is_cut(key) of them.
template <int kD>
__device__ __forceinline__ auto cuts_of(const ForwardMaps& p, int row) {
  const Whole whole = p.band.whole_keys(row, Cut<kD>::kGroups * kRows);
  return [whole, keys = p.band.keys](int key) { return whole.cuts(key, Cut<kD>::kKeys, keys); };
}

// One thread: Q of a tile, and its keys and values from last to first.
template <int kD>
__device__ __forceinline__ void copy_tiles(const ForwardMaps& p, const ForwardMemory<kD>& memory) {
  using C = Cut<kD>;
  for (const TensorMap* map : {&p.query, &p.key, &p.value}) prefetch_map(*map);
  Ring<C::kStages> ring;
  int parity = 0;
  p.schedule.each([&](const Schedule::Tile& tile) {
    const int head = tile.head / p.group;
    const Span keys = keys_of<kD>(p, tile.row);
    const auto is_cut = cuts_of<kD>(p, tile.row);
    for (int j = keys.count - 1; j >= 0; --j, ring.next()) {
      const int first = (keys.first + j) * C::kKeys, key = first - p.first_key;
      mbarrier_wait(memory.key_empty(ring.slot), ring.parity() ^ 1);
      mbarrier_arrive_expect(memory.key_full(ring.slot), C::kKeyBytes);
      load_tile<kD>(memory.key(ring.slot), C::kKeyBox, p.key, key, head, tile.batch,
                    memory.key_full(ring.slot));
      for (int group = 0; j == keys.count - 1 && group < C::kGroups; ++group) {
        mbarrier_wait(memory.query_empty(group), parity ^ 1);
        mbarrier_arrive_expect(memory.query_full(group), C::kQueryBytes);
        load_tile<kD>(memory.query(group), kBox, p.query, tile.row + group * kRows, tile.head,
                      tile.batch, memory.query_full(group));
      }
      mbarrier_wait(memory.value_empty(ring.slot), ring.parity() ^ 1);
      Mbarrier* const full =
          is_cut(first) ? memory.value_cut(ring.slot) : memory.value_full(ring.slot);
      mbarrier_arrive_expect(full, C::kKeyBytes);
      load_tile<kD>(memory.value(ring.slot), C::kKeyBox, p.value, key, head, tile.batch, full);
    }
    parity ^= 1;
  });
}

// The group's other warps: values that a part of the queries sees.
constexpr int kCleaning = kGroupThreads - 32;
template <typename T, int kD>
__device__ __forceinline__ void clean_values(const ForwardMaps& p,
                                             const ForwardMemory<kD>& memory) {
  using C = Cut<kD>;
  Ring<C::kStages> ring;
  Cleaner<T, kCleaning> cleaner{static_cast<int>(threadIdx.x) - 32};
  p.schedule.each([&](const Schedule::Tile& tile) {
    const Span keys = keys_of<kD>(p, tile.row);
    const auto is_cut = cuts_of<kD>(p, tile.row);
    for (int j = keys.count - 1; j >= 0; --j, ring.next()) {
      if (!is_cut((keys.first + j) * C::kKeys)) continue;
      cleaner.clean(ring.slot, memory.value_cut(ring.slot), memory.value_full(ring.slot),
                    memory.value(ring.slot), C::kKeyBytes, memory.cleaned());
    }
    ++cleaner.turn;
  });
}

// The warp groups issue their products one after the other.
template <bool kTurns, int kGroups>
struct Turns {
  static constexpr int kPair = 2 * kGroupThreads;  // one waits, one arrives
  int group;
  __device__ __forceinline__ explicit Turns(int group) : group(group) {
    if (kTurns && group == 0) named_barrier_arrive(kTurnBarrier, kPair);
  }
  __device__ __forceinline__ void take() const {
    if (kTurns) named_barrier_wait(kTurnBarrier + group, kPair);
  }
  __device__ __forceinline__ void pass() const {
    if (kTurns) named_barrier_arrive(kTurnBarrier + (group + 1) % kGroups, kPair);
  }
  // The last turn passed is nobody's.
  __device__ __forceinline__ void end() const {
    if (group == 0) take();
  }
};

// Of a thread's two rows: the running maximum of the scores, and this thread's part of the sum.
struct Softmax {
  float scale;  // log2(e) of the scores'
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  // Scores to exp(score - max); `factor` is for what was summed before.
  template <int kCount>
  __device__ __forceinline__ void step(float (&s)[kCount], float (&factor)[2]) {
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = max[r];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (row_of(i) == r) most = fmaxf(most, s[i]);
      }
      most = largest_of_four(most);
      shift[r] = finite_shift(most) * scale;
      factor[r] = exp2_approx(max[r] * scale - shift[r]);
      max[r] = most;
      sum[r] *= factor[r];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] = exp2_approx(s[i] * scale - shift[row_of(i)]);
      sum[row_of(i)] += s[i];
    }
  }
};

// A warp group: its 64 queries of every tile.
template <typename T, int kD>
__device__ __forceinline__ void attend(const ForwardMaps& p, const ForwardMemory<kD>& memory,
                                       int group) {
  using C = Cut<kD>;
  const int thread = threadIdx.x % kGroupThreads;
  const auto arrive = [&](Mbarrier* barrier) {
    if (thread == 0) mbarrier_arrive(barrier);
  };
  const Turns<C::kTurns, C::kGroups> turns(group);
  Ring<C::kStages> keys, values;
  int turn = 0;
  float s[C::kKeys / 2], out[kD / 2];
  uint32_t weights[C::kKeys / 16][4];

  p.schedule.each([&](const Schedule::Tile& tile) {
    const int row = tile.row + group * kRows;
    const Span span = keys_of<kD>(p, tile.row);
    Softmax softmax{p.scores.exponent};
    float factor[2];
    const auto finish_scores = [&](int j) {
      if constexpr (C::kCaps) p.scores.to_cap<T>(s);
      hide_keys(-INFINITY, p.band, row, (span.first + j) * C::kKeys, s);
    };
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;

    // S = Q K^T of the last keys, and its P.
    mbarrier_wait(memory.query_full(group), turn % 2);
    mbarrier_wait(memory.key_full(keys.slot), keys.parity());
    turns.take();
    wgmma_fence();
    multiply_along<T, kD>(s, memory.query(group), kBox, memory.key(keys.slot), C::kKeyBox);
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>();
    pin(s);
    arrive(memory.key_empty(keys.slot));
    keys.next();
    finish_scores(span.count - 1);
    softmax.step(s, factor);
    pack<T>(weights, s);

    if (span.count > 1) mbarrier_wait(memory.key_full(keys.slot), keys.parity());
    for (int j = span.count - 2; j >= 0; --j) {
      // S of the next keys and out += P V of the former ones are under way together.
      turns.take();
      wgmma_fence();
      multiply_along<T, kD>(s, memory.query(group), kBox, memory.key(keys.slot), C::kKeyBox);
      wgmma_commit();
      mbarrier_wait(memory.value_full(values.slot), values.parity());
      wgmma_fence();
      multiply_across<T>(out, weights, memory.value(values.slot), C::kKeyBox);
      wgmma_commit();
      turns.pass();
      wgmma_wait<1>();
      pin(s);
      arrive(memory.key_empty(keys.slot));
      keys.next();
      finish_scores(j);
      softmax.step(s, factor);
      // Two hurdles for the compiler, or it has the exponentials wait for the product.
      pin(s);
      if (j > 0) mbarrier_wait(memory.key_full(keys.slot), keys.parity());
      wgmma_wait<0>();
      pin(out);
      arrive(memory.value_empty(values.slot));
      values.next();
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) out[i] *= factor[row_of(i)];
      pack<T>(weights, s);
    }
    if (!C::kOutInQuery) arrive(memory.query_empty(group));
    mbarrier_wait(memory.value_full(values.slot), values.parity());
    wgmma_fence();
    multiply_across<T>(out, weights, memory.value(values.slot), C::kKeyBox);
    wgmma_commit();
    wgmma_wait<0>();
    pin(out);
    arrive(memory.value_empty(values.slot));
    values.next();
    if (was_cleaned(memory.cleaned(), turn)) {
      put_back_nonfinite(
          out, rows_of<T>(p.values, tile.batch, tile.head / p.group), p.values.row, p.value_dim,
          C::kKeys, cuts_of<kD>(p, tile.row),
          [&](int r) { return p.band.first_key(row + fragment_row(thread, 2 * r)); },
          [&](int r) { return p.band.end_key(row + fragment_row(thread, 2 * r)); });
    }

    // out = sum / l, lse = max + log l; a row that sees no key has 0 and -inf.
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_four(softmax.sum[r]);
      const int query = row + fragment_row(thread, 2 * r);
      inverse[r] = sum == 0.f ? 0.f : 1.f / sum;
      if (thread % 4 == 0 && query < p.band.queries) {
        const int64_t head = static_cast<int64_t>(tile.batch) * p.schedule.heads + tile.head;
        p.lse[head * p.band.queries + query] = softmax.max[r] * p.scores.unit + logf(sum);
      }
    }
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] *= inverse[row_of(i)];
    store_product<T>(out, memory.out(group), group, p.out, row, tile.head, tile.batch);
    if (C::kOutInQuery && thread == 0) {
      store_wait_read();
      mbarrier_arrive(memory.query_empty(group));
    }
    ++turn;
  });
  turns.end();
  if (thread == 0) store_wait_read();
}

template <typename T, int kD>
__global__ void __launch_bounds__(Cut<kD>::kThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ ForwardMaps p) {
  if constexpr (kHasWgmma) {
    const ForwardMemory<kD> memory{dynamic_shared()};
    if (threadIdx.x == 0) memory.init();
    __syncthreads();
    const int group = threadIdx.x / kGroupThreads;
    if (group == 0) {
      give_registers<Cut<kD>::kCopyRegisters>();
      if (threadIdx.x == 0) copy_tiles<kD>(p, memory);
      if (threadIdx.x >= kGroupThreads - kCleaning) clean_values<T, kD>(p, memory);
    } else {
      take_registers<Cut<kD>::kRegisters>();
      attend<T, kD>(p, memory, group - 1);
    }
  }
}

template <typename T, int kD>
cudaError_t launch(const AttentionForward& p, int multiprocessors, cudaStream_t stream) {
  using C = Cut<kD>;
  ForwardMaps maps = {};
  maps.band = make_band(p);
  maps.scores = make_scores(p);
  maps.values = p.value;
  maps.value_dim = static_cast<int>(p.value_dim);
  maps.schedule =
      make_schedule(p, p.heads, p.queries, C::kGroups * kRows, p.right >= 0, multiprocessors);
  maps.lse = p.lse;
  maps.group = static_cast<int>(p.heads / p.kv_heads);
  const Seen seen(maps.band);
  maps.first_key = seen.first;
  const auto map = [&](const AttentionOperand& x, int64_t heads, int64_t first, int64_t end,
                       int64_t columns, int rows, TensorMap* to) {
    return make_map(x, p.storage, p.batch, heads, first, end, columns, rows, to);
  };
  const AttentionOperand out = contiguous(p.out, p.heads, p.queries, p.value_dim);
  for (const cudaError_t error :
       {map(p.query, p.heads, 0, p.queries, p.dim, kRows, &maps.query),
        map(p.key, p.kv_heads, seen.first, seen.end, p.dim, C::kKeys, &maps.key),
        map(p.value, p.kv_heads, seen.first, seen.end, p.value_dim, C::kKeys, &maps.value),
        map(out, p.heads, 0, p.queries, p.value_dim, kRows, &maps.out)}) {
    if (error != cudaSuccess) return error;
  }
  const auto kernel = attention_forward_sm90_kernel<T, kD>;
  return launch_blocks(kernel, maps, maps.schedule, C::kThreads, C::kShared, stream);
}

template <typename T>
cudaError_t launch_dim(const AttentionForward& p, int multiprocessors, cudaStream_t stream) {
  const int64_t dim = std::max(p.dim, p.value_dim);
  return dim <= 64    ? launch<T, 64>(p, multiprocessors, stream)
         : dim <= 128 ? launch<T, 128>(p, multiprocessors, stream)
                      : launch<T, 256>(p, multiprocessors, stream);
}

}  // namespace attention_sm90

bool attention_sm90_built() {
  static const bool built = [] {
    cudaFuncAttributes found = {};
    const auto kernel = attention_sm90::attention_forward_sm90_kernel<__half, 64>;
    // What other targets have under this name is empty and needs no registers.
    return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.numRegs > 100;
  }();
  return built;
}

bool attention_forward_sm90_serves(const AttentionForward& p) {
  // A tile has 128 queries; for few, the keys are to be split among the blocks.
  return p.splits <= 1 && p.queries >= 64 && attention_sm90::serves(p) &&
         (p.softcap == 0.f || std::max(p.dim, p.value_dim) > 64) &&
         reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

cudaError_t attention_forward_sm90_cuda(const AttentionForward& p, int multiprocessors,
                                        cudaStream_t stream) {
  return p.storage == Storage::kFloat16
             ? attention_sm90::launch_dim<__half>(p, multiprocessors, stream)
             : attention_sm90::launch_dim<__nv_bfloat16>(p, multiprocessors, stream);
}

}  // namespace fastnn
