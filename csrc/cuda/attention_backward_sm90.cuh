// What the passes of Hopper's attention backward share: how they are cut, their shared memory, and
// the copying group's warps, which fill it.
//   A block's own rows are queries, which have the queries' and dO's, and keys and values are
//   streamed; or keys, which have the keys' and values', and queries and dO are streamed.
#pragma once

#include "cuda/attention_finite_sm90.cuh"

namespace fastnn {
namespace attention_sm90 {

constexpr int kBackwardGroups = 2;
constexpr int kBackwardThreads = kGroupThreads * (1 + kBackwardGroups);
constexpr int kBackwardRows = kRows * kBackwardGroups;
constexpr int kBackwardCopyRegisters = 40, kBackwardRegisters = 232;

// How a kernel is cut: rows of a streamed tile, of which each stage has two operands' and, where
// queries are streamed, their lse and delta.
template <int kHeadDim, bool kQueriesStreamed>
struct BackwardCut {
  static constexpr int kD = kHeadDim;
  static constexpr bool kStreamQueries = kQueriesStreamed;
  static constexpr int kStreamed = kD == 256        ? 48
                                   : kStreamQueries ? (kD == 64 ? 80 : 64)
                                                    : (kD == 64 ? 128 : 80);
  static constexpr int kStages = kD == 256 ? 2 : kStreamQueries ? 4 : 3;
  static constexpr int kStreamedBox = kStreamed * kSwizzleRow;
  static constexpr int kStreamedBytes = kD / kSwizzleElements * kStreamedBox;  // of an operand
  static constexpr int kOwnBytes = kD / kSwizzleElements * kBox;               // of a warp group
  static constexpr int kStageBytes = 2 * kStreamedBytes + (kStreamQueries ? kSwizzlePattern : 0);
  static constexpr int kBarriers = 2 * kBackwardGroups + 3 * kStages;
  static constexpr int kShared = 2 * kBackwardGroups * kOwnBytes + kStages * kStageBytes +
                                 kBarriers * sizeof(Mbarrier) + kTilesUnderWay * sizeof(int);
  static_assert(kStages < kTilesUnderWay);
  // Threads of the copying group that clean tiles, and bytes of what the last products of a stage
  // take: its keys, or its queries and dO.
  static constexpr int kCleaning = kGroupThreads - (kStreamQueries ? 64 : 32);
  static constexpr int kCleanBytes = (kStreamQueries ? 2 : 1) * kStreamedBytes;
};

struct BackwardMaps {
  TensorMap own[2], streamed[2];  // the own ones in boxes of 64 rows
  TensorMap grad[2];              // of query, or of key and value
  Schedule schedule;
  Band band;
  Scores scores;
  AttentionOperand sources[2];  // what is streamed, and its columns
  int columns[2];
  const float *lse, *delta;  // lse of base 2
  float scale;
  int first_own, first_streamed;  // rows where the maps begin
  int heads, group;               // query heads, and of them those of a key head
};

// A query's lse and delta, as a pair of columns needs them.
struct alignas(8) RowOf {
  float lse, delta;
};

template <typename Cut>
struct BackwardMemory {
  char* base;

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
  __device__ __forceinline__ Mbarrier* cut(int stage) const { return empty(Cut::kStages + stage); }
  __device__ __forceinline__ int* cleaned() const {
    return reinterpret_cast<int*>(own_full(Cut::kBarriers));
  }
  // A warp group is done with a stage; and with its own rows, when its gradients have left them.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty(stage));
  }
  __device__ __forceinline__ void release_own(int group) const {
    if (threadIdx.x % kGroupThreads != 0) return;
    store_wait_read();
    mbarrier_arrive(own_empty(group));
  }
  __device__ __forceinline__ void init() const {
    for (int group = 0; group < kBackwardGroups; ++group) {
      mbarrier_init(own_full(group), 1);
      mbarrier_init(own_empty(group), 1);
    }
    for (int stage = 0; stage < Cut::kStages; ++stage) {
      mbarrier_init(full(stage), Cut::kStreamQueries ? 1 + 32 : 1);  // with copy_rows
      mbarrier_init(cut(stage), 1);
      mbarrier_init(empty(stage), kBackwardGroups * 4);  // a lane of each warp
    }
    for (int i = 0; i < kTilesUnderWay; ++i) cleaned()[i] = -1;
    mbarrier_fence_init();
  }
};

// What of the stream an own row sees, or is seen by: [first, end).
template <typename Cut>
__device__ __forceinline__ int first_seen(const Band& band, int row) {
  return Cut::kStreamQueries ? band.first_query(row) : band.first_key(row);
}
template <typename Cut>
__device__ __forceinline__ int end_seen(const Band& band, int row) {
  return Cut::kStreamQueries ? band.end_query(row) : band.end_key(row);
}

// The stream's tiles of a block's rows.
template <typename Cut>
__device__ __forceinline__ Span span_of(const BackwardMaps& p, int row) {
  const int rows = Cut::kStreamQueries ? p.band.keys : p.band.queries;
  const int last = min(row + kBackwardRows, rows) - 1;
  return {first_seen<Cut>(p.band, row), end_seen<Cut>(p.band, last), Cut::kStreamed};
}

// Those that are for a part of the block's rows alone: is_cut(first row) of them.
template <typename Cut>
__device__ __forceinline__ auto cuts_of(const BackwardMaps& p, int row) {
  const Whole whole = Cut::kStreamQueries ? p.band.whole_queries(row, kBackwardRows)
                                          : p.band.whole_keys(row, kBackwardRows);
  const int size = Cut::kStreamQueries ? p.band.queries : p.band.keys;
  return [=](int streamed) { return whole.cuts(streamed, Cut::kStreamed, size); };
}

// f(head) of what is streamed: the group's key head, or all its query heads.
template <typename Cut, typename F>
__device__ __forceinline__ void each_head(const BackwardMaps& p, const Schedule::Tile& tile,
                                          const F& f) {
  if constexpr (Cut::kStreamQueries) {
    for (int member = 0; member < p.group; ++member) f(tile.head * p.group + member);
  } else {
    f(tile.head / p.group);
  }
}

// f(head, row) of each stage.
template <typename Cut, typename F>
__device__ __forceinline__ void each_stage(const BackwardMaps& p, const Schedule::Tile& tile,
                                           const F& f) {
  const Span span = span_of<Cut>(p, tile.row);
  each_head<Cut>(p, tile, [&](int head) {
    for (int j = 0; j < span.count; ++j) f(head, (span.first + j) * Cut::kStreamed);
  });
}

// One thread: two operands' tiles, own or of a stage.
template <int kD>
__device__ __forceinline__ void copy_pair(char* first, char* second, int bytes, int box,
                                          const TensorMap (&maps)[2], int row, int head, int batch,
                                          Mbarrier* full) {
  mbarrier_arrive_expect(full, 2 * bytes);
  load_tile<kD>(first, box, maps[0], row, head, batch, full);
  load_tile<kD>(second, box, maps[1], row, head, batch, full);
}

// One thread: a block's own rows, when those of its last tile are done with, and the stream.
template <typename Cut>
__device__ __forceinline__ void copy_tiles(const BackwardMaps& p,
                                           const BackwardMemory<Cut>& memory) {
  Ring<Cut::kStages> ring;
  int parity = 0;
  p.schedule.each([&](const Schedule::Tile& tile) {
    for (int group = 0; group < kBackwardGroups; ++group) {
      mbarrier_wait(memory.own_empty(group), parity ^ 1);
      copy_pair<Cut::kD>(memory.own(0, group), memory.own(1, group), Cut::kOwnBytes, kBox, p.own,
                         tile.row + group * kRows - p.first_own, tile.head, tile.batch,
                         memory.own_full(group));
    }
    const auto is_cut = cuts_of<Cut>(p, tile.row);
    each_stage<Cut>(p, tile, [&](int head, int row) {
      mbarrier_wait(memory.empty(ring.slot), ring.parity() ^ 1);
      copy_pair<Cut::kD>(memory.streamed(0, ring.slot), memory.streamed(1, ring.slot),
                         Cut::kStreamedBytes, Cut::kStreamedBox, p.streamed, row - p.first_streamed,
                         head, tile.batch,
                         is_cut(row) ? memory.cut(ring.slot) : memory.full(ring.slot));
      ring.next();
    });
    parity ^= 1;
  });
}

// One warp: the lse and delta of streamed queries.
template <typename Cut>
__device__ __forceinline__ void copy_rows(const BackwardMaps& p,
                                          const BackwardMemory<Cut>& memory) {
  Ring<Cut::kStages> ring;
  p.schedule.each([&](const Schedule::Tile& tile) {
    each_stage<Cut>(p, tile, [&](int head, int first) {
      const int64_t before = (static_cast<int64_t>(tile.batch) * p.heads + head) * p.band.queries;
      mbarrier_wait(memory.empty(ring.slot), ring.parity() ^ 1);
      for (int r = threadIdx.x % 32; r < Cut::kStreamed; r += 32) {
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

// The group's other warps: tiles that are cut.
template <typename T, typename Cut>
__device__ __forceinline__ void clean_tiles(const BackwardMaps& p,
                                            const BackwardMemory<Cut>& memory) {
  Ring<Cut::kStages> ring;
  Cleaner<T, Cut::kCleaning> cleaner{static_cast<int>(threadIdx.x) -
                                     (kGroupThreads - Cut::kCleaning)};
  p.schedule.each([&](const Schedule::Tile& tile) {
    const auto is_cut = cuts_of<Cut>(p, tile.row);
    each_stage<Cut>(p, tile, [&](int, int row) {
      if (is_cut(row)) {
        cleaner.clean(ring.slot, memory.cut(ring.slot), memory.full(ring.slot),
                      memory.streamed(0, ring.slot), Cut::kCleanBytes, memory.cleaned());
      }
      ring.next();
    });
    ++cleaner.turn;
  });
}

// A warp group's sum of operand `which` of the stream, of a block's turn: what was taken out of it
// comes back. Whether there was any.
template <typename T, typename Cut, int kCount>
__device__ __forceinline__ bool put_back(float (&sum)[kCount], const BackwardMaps& p,
                                         const BackwardMemory<Cut>& memory, int which,
                                         const Schedule::Tile& tile, int row, int turn) {
  if (!was_cleaned(memory.cleaned(), turn)) return false;
  const int thread = threadIdx.x % kGroupThreads;
  const AttentionOperand& from = p.sources[which];
  each_head<Cut>(p, tile, [&](int head) {
    put_back_nonfinite(
        sum, rows_of<T>(from, tile.batch, head), from.row, p.columns[which], Cut::kStreamed,
        cuts_of<Cut>(p, tile.row),
        [&](int r) { return first_seen<Cut>(p.band, row + fragment_row(thread, 2 * r)); },
        [&](int r) { return end_seen<Cut>(p.band, row + fragment_row(thread, 2 * r)); });
  });
  return true;
}

}  // namespace attention_sm90
}  // namespace fastnn
