// How many of a chunk's rows there are, where only the device knows: the ignored ones come last.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastnn {

// A product that sums over rows takes them in steps of so many, one at least: rows past the last
// one, up to a multiple of this, have to be zeros.
constexpr int kRowStep = 64;

struct RowCount {
  const int* total;  // of all chunks, on the device; null: all rows are there
  int first;         // the chunk's first row

  __device__ __forceinline__ int64_t of(int64_t rows) const {
    if (total == nullptr) return rows;
    const int64_t left = int64_t{*total} - first;
    return left < 0 ? 0 : left < rows ? left : rows;
  }
  __device__ __forceinline__ int64_t in_steps(int64_t rows) const {
    const int64_t there = of(rows);
    const int64_t steps = there == 0 ? kRowStep : (there + kRowStep - 1) / kRowStep * kRowStep;
    return steps < rows ? steps : rows;
  }
};

}  // namespace fastnn
