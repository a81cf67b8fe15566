// What follows a product of logits that are not stored: a tile's part of each row's statistics,
// from the logits rounded to T as they would be stored, so that both ways give the same numbers.
#pragma once

#include "cuda/cross_entropy_row.cuh"
#include "cuda/linear_act.h"

namespace fastnn {

// Where the sums of a row are in one tile of columns.
__device__ __forceinline__ float* sums_of(const RowStatistics& s, int64_t rows, int64_t row,
                                          int64_t tile) {
  return s.sums + (tile * rows + row) * (s.weighted ? 4 : 2);
}

// One thread's row of a tile: `count` logits from class `column` on. tile.packet(i) is the packet
// that begins at the tile's column i, tile.element(i) the logit there.
template <typename T, typename Tile>
__device__ __forceinline__ void leave_statistics(const RowStatistics& s, int64_t rows, int64_t row,
                                                 int tile_index, int column, int count,
                                                 const Tile& tile) {
  constexpr int kWidth = Packet<T>::kSize;
  Row<T, Kind::kLabels> classes = {};
  classes.class_weight = s.class_weight;
  classes.softcap = s.softcap;
  classes.inverse_softcap = s.softcap == 0.f ? 0.f : 1.f / s.softcap;
  SoftmaxSums sums = no_logits();
  const Units units = {column, count / kWidth, 0, 1};
#pragma unroll 1
  for (int i = 0; i < units.tiles(kTileUnits); ++i) {
    Packet<T> packets[kTileUnits];
#pragma unroll
    for (int u = 0; u < kTileUnits; ++u) {
      const int unit = i * kTileUnits + u;
      packets[u] = unit < units.count ? tile.packet(unit * kWidth) : no_packet<T>();
    }
    add_tile<kWidth>(sums, classes, s.weighted, units, i, packets);
  }
#pragma unroll 1
  for (int i = units.count * kWidth; i < count; ++i) {
    Packet<T> one[1];
    one[0].values[0] = tile.element(i);
    add_tile<1>(sums, classes, s.weighted, Units{column + i, 1, 0, 1}, 0, one);
  }

  float* const out = sums_of(s, rows, row, tile_index);
  if (s.weighted) {
    *reinterpret_cast<SoftmaxSums*>(out) = sums;
  } else {
    *reinterpret_cast<float2*>(out) = make_float2(sums.max, sums.sum);
  }
  const int64_t label = s.labels[s.row_index[row]] - column;
  if (label >= 0 && label < count) {
    s.label_logit[row] = to_float(tile.element(static_cast<int>(label)));
  }
}

}  // namespace fastnn
