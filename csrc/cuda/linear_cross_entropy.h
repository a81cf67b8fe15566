// What linear cross-entropy on CUDA needs beside GEMMs and cross_entropy.h: launchers on raw
// pointers and a stream, no torch headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cross_entropy.h"
#include "linear_act.h"

namespace fastnn {

// place[0 .. *kept) = the rows whose label is not ignored, in order; the ignored rows follow.
// row_weight (or null) gets the weight that a row has in the mean.
cudaError_t compact_rows_cuda(const int64_t* labels, int rows, int classes, int64_t ignore_index,
                              const float* class_weight, int* place, int* kept, float* row_weight,
                              cudaStream_t stream);

// The scalars of a GEMM on the device: {scale, 0, 1} with scale = 1 / *total_weight (null: 1), or 0
// where no row was kept.
cudaError_t gemm_scalars_cuda(const float* total_weight, const int* kept, float* scalars,
                              cudaStream_t stream);

// Rows of `bytes` bytes, at a distance of `stride` bytes.
struct RowBytes {
  void* data;
  int64_t stride;
};

// to[r] = from[place[r]], or to[place[r]] = from[r] if `scatter`, for r < rows; 0 instead of `from`
// for the rows that are not there.
cudaError_t move_rows_cuda(RowBytes from, RowBytes to, int64_t bytes, int element_size,
                           const int* place, RowCount there, int rows, bool scatter,
                           cudaStream_t stream);

// row_loss and lse of a chunk's rows from the statistics that a product left, `tiles` a row; the
// problem's logits are not there.
cudaError_t merge_statistics_cuda(const CrossEntropyProblem& problem,
                                  const RowStatistics& statistics, int64_t tiles, float* row_loss,
                                  float* lse, cudaStream_t stream);

// data[i] *= *scale; a scale of 1 touches nothing.
cudaError_t scale_cuda(void* data, Storage storage, int64_t count, const float* scale,
                       cudaStream_t stream);

}  // namespace fastnn
