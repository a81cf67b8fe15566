// Softmax cross-entropy on CUDA: launchers on raw pointers and a stream, no torch headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prim/copy.cuh"
#include "row_count.h"

namespace fastnn {

// Element (n, c, d) of a tensor is at n * batch + c * cls + d * inner, in elements.
struct Strides {
  int64_t batch, cls, inner;
};

// Logits of shape (N, C, D): one row of C classes for each (n, d); row = n * D + d.
struct CrossEntropyProblem {
  const void* logits;
  Storage storage;
  Strides strides;
  int64_t rows;   // N * D
  int64_t inner;  // D
  int classes;    // C, at most 2^30
  // Class indices, one per row; or null, and the probabilities instead.
  const int64_t* labels;
  const void* probabilities;
  Storage probability_storage;
  Strides probability_strides;
  const float* class_weight;  // C of them, or null
  const float* weight_sum;    // their sum, on the device; read in the backward when smoothing
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap 0: off
  // Row r of the logits is row row_index[r] of the labels and of all that is per row; null: r.
  const int* row_index;
  bool skip_ignored;  // rows of an ignored label are not read: loss and lse are 0
};

// Writes, per row, the loss, the log-sum-exp and (for class indices, unless null) the weight that
// `mean` divides by. A label out of range gives a NaN loss.
cudaError_t cross_entropy_forward_cuda(const CrossEntropyProblem& problem, float* row_loss,
                                       float* lse, float* row_weight, cudaStream_t stream);

// total_weight = sum of row_weight (null: `rows`); loss = sum of row_loss, divided by that if
// `mean`; a null `loss` asks for total_weight alone. `scratch` holds reduce_loss_scratch(rows)
// floats.
int64_t reduce_loss_scratch(int64_t rows);
cudaError_t reduce_loss_cuda(const float* row_loss, const float* row_weight, int64_t rows,
                             bool mean, float* scratch, float* loss, float* total_weight,
                             cudaStream_t stream);

struct CrossEntropyGradient {
  const float* grad_loss;     // null: 1
  bool grad_per_row;          // grad_loss has a value per row, else one
  const float* grad_lse;      // per row, or null
  const float* lse;           // per row
  const float* total_weight;  // divides grad_loss; null unless `mean`
  void* grad_logits;          // of the logits' type, or null; may be the logits themselves
  Strides grad_strides;       // its strides
  void* grad_probabilities;   // contiguous (N, C, D) of the probabilities' type, or null
  // Written per row if not null: then `lse` is not read, and one launch does the forward as well.
  float* row_loss;
  float* row_lse;
  RowCount rows;  // ignored rows beyond its last step are not even given zeros
};

cudaError_t cross_entropy_backward_cuda(const CrossEntropyProblem& problem,
                                        const CrossEntropyGradient& gradient, cudaStream_t stream);

}  // namespace fastnn
