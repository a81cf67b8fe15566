// Attention on CUDA: launchers on raw pointers and a stream, no torch headers.
//   forward   O = dropout(softmax(S)) V,  lse = log(sum(exp(S)))
//             S = softcap(scale Q K^T) - slope |i + shift - j| + mask, -inf outside of the band
//   backward  dS = P (keep dO V^T - delta),  delta = rowsum(dO O) - grad_lse;  dQ, dK, dV and the
//             mask's and the sinks' gradients, in an order that only the shape decides
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/prim/copy.cuh"

namespace fastnn {

// A (batch, head, row, column) tensor with contiguous columns; strides in elements.
struct AttentionOperand {
  const void* data;
  int64_t batch, head, row;
};

// Strides in elements, 0 where the mask is broadcast.
struct AttentionMask {
  const void* data;  // null: no mask
  bool boolean;      // true takes part; otherwise numbers to add, -inf hides
  Storage storage;   // of the numbers
  int64_t batch, head, row, col;
};

struct AttentionProblem {
  Storage storage;                 // of query, key, value, out and their gradients; no float64
  int64_t batch, heads, kv_heads;  // heads is a multiple of kv_heads: head h reads h / group
  int64_t queries, keys;
  int64_t dim, value_dim;  // 1 to 256
  AttentionOperand query, key, value;
  float scale;
  float softcap;  // 0: none
  // Row i sees the keys from i + shift - left to i + shift + right; -1 is unlimited. shift is
  // keys - queries for the bottom-right alignment, else 0; ALiBi measures from i + shift too.
  int64_t shift, left, right;
  AttentionMask mask;
  const float* slopes;  // [batch, heads], or null
  const float* sinks;   // [batch, heads]: a key that every row sees, whose value is 0; or null
  // Dropout of philox.h over rows (b * heads + h) * queries + i of `keys` columns.
  const int64_t* seed;  // (key, offset), on the device; null without dropout
  uint32_t threshold;   // of DropoutRate
  float keep_scale;
  // Packed sequences, or null. Then `batch` of them lie one behind the other in tensors [rows,
  // heads, columns], whose batch stride is 0: sequence b is [starts[b], starts[b + 1]) of
  // query_rows and of key_rows. queries and keys are the longest's, shift is that of bottom_right
  // or 0. The results are packed too; lse, and the rows of the dropout mask, are [heads,
  // query_rows].
  const int32_t *query_starts, *key_starts;
  int64_t query_rows, key_rows;
  bool bottom_right;
};

struct AttentionForward : AttentionProblem {
  void* out;   // [batch, heads, queries, value_dim], rows without gaps
  float* lse;  // [batch, heads, queries]; -inf for a row that sees no key
  // The keys may be cut into `splits` parts, merged by a second kernel, so that a few rows keep a
  // whole device busy; `partial` has attention_split_scratch floats, null where splits is 1.
  int64_t splits;
  float* partial;
};

struct AttentionBackward : AttentionProblem {
  AttentionOperand grad_out, out;
  const float* lse;       // [batch, heads, queries]
  const float* grad_lse;  // [batch, heads, queries], or null
  // [2] times what lse has, written by attention_rows_cuda: log2(e) lse, which is +inf for a
  // row that sees no key, and delta.
  float* rows;
  // Without gaps; null where not wanted.
  void *grad_query, *grad_key, *grad_value;  // [batch, heads or kv_heads, queries or keys, dim]
  float* grad_sinks;                         // [batch, heads]
  // The mask's own sizes (1 where broadcast) and a float per element of it; `mask_parts` such
  // arrays as scratch, of which attention_mask_parts says how many.
  int64_t mask_sizes[4];
  float* grad_mask;
  float* mask_partial;
  int64_t mask_parts;
  float* sink_rows;  // of the shape of lse: scratch of grad_sinks
};

// attention.cu, attention_backward.cu: every device from sm_80, any stride and alignment.
// The parts to cut the keys into, and the floats that they need.
int64_t attention_splits(const AttentionProblem& problem, int multiprocessors);
int64_t attention_split_scratch(const AttentionProblem& problem, int64_t splits);
cudaError_t attention_forward_portable_cuda(const AttentionForward& problem, cudaStream_t stream);

// What every backward starts with: the rows' lse and delta.
cudaError_t attention_rows_cuda(const AttentionBackward& problem, cudaStream_t stream);
// dQ, dK and dV, whichever are wanted.
cudaError_t attention_backward_portable_cuda(const AttentionBackward& problem, cudaStream_t stream);
// The sinks' gradient and the mask's, each of a pass of its own after attention_rows_cuda: O is too
// coarse for the one, and no other kernel holds all that the mask is broadcast to.
cudaError_t attention_sinks_gradient_cuda(const AttentionBackward& problem, cudaStream_t stream);
int64_t attention_mask_parts(const AttentionBackward& problem);
cudaError_t attention_mask_gradient_cuda(const AttentionBackward& problem, cudaStream_t stream);

// attention_sm90.cu, attention_backward_sm90.cu: Hopper's copy engine and warp-group products; what
// they serve, and whether the running device's code has them.
bool attention_sm90_built();
// In words, for fastnn.info.
constexpr char kAttentionPaths[] =
    "Hopper (compute capability 9.0): bfloat16 and float16; head dimensions in steps of 8, to 256;"
    " rows of whole 16 bytes; from 64 queries, in the backward also 64 keys, and the gradients of"
    " key and value together; a positive scale, causal, a window, softcap (in the forward of more"
    " than 64 columns); no mask, ALiBi, sinks, dropout or packed sequences. Portable: everything"
    " else";
bool attention_forward_sm90_serves(const AttentionForward& problem);
cudaError_t attention_forward_sm90_cuda(const AttentionForward& problem, int multiprocessors,
                                        cudaStream_t stream);
// After attention_rows_cuda: dQ, and dK and dV (both or neither), where wanted.
bool attention_backward_sm90_serves(const AttentionBackward& problem);
cudaError_t attention_backward_sm90_cuda(const AttentionBackward& problem, int multiprocessors,
                                         cudaStream_t stream);

}  // namespace fastnn
