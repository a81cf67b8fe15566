// The order in which a product's tiles are visited: down columns of kGroup tiles, so that the
// blocks running at one time share rows of A and rows of B in L2.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTNN_TILE __host__ __device__ __forceinline__
#else
#define FASTNN_TILE inline
#endif

namespace fastnn {

struct TileOrder {
  static constexpr int kGroup = 8;
  struct Tile {
    int m, n;
  };
  int tiles_m, tiles_n;

  FASTNN_TILE int count() const { return tiles_m * tiles_n; }
  FASTNN_TILE Tile at(int index) const {
    const int per_group = kGroup * tiles_n;
    const int first = index / per_group * kGroup, within = index % per_group;
    const int height = tiles_m - first < kGroup ? tiles_m - first : kGroup;
    return {first + within % height, within / height};
  }
};

}  // namespace fastnn
