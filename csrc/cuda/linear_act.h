// Linear + activation on CUDA: launchers on raw pointers and a stream, no torch headers.
//   forward   P = X W^T + bias,  out = residual + dropout(act(P));  gated: act(gate) * up
//   backward  dP = act'(saved) * mask * grad_out, then the plain products dX = dP W, dW = dP^T X
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string_view>
#include <type_traits>

#include "activation.h"
#include "cuda/prim/copy.cuh"
#include "cuda/row_count.h"

namespace fastnn {

// Which index of A [M, K] and of B [N, K] is contiguous in memory: K of both (forward), K of A and
// N of B (grad_input), or M of A and N of B (grad_weight).
enum class GemmLayout : int { kNT, kNN, kTN };

// A matrix of rows; `stride` from one to the next, in elements.
struct Matrix {
  const void* data;
  int64_t stride;
};

// What a kNT product of logits leaves where it is not stored: for each of its tiles of columns, a
// row's sums of the online softmax. A row r of the product is row row_index[r] of the labels.
struct RowStatistics {
  float* sums;         // [tiles, M, weighted ? 4 : 2]: max, sum, (weight, deviation); null: stored
  float* label_logit;  // [M]
  const int64_t* labels;
  const int* row_index;
  const float* class_weight;  // or null
  float softcap;              // 0: off
  bool weighted;              // the sums of the class weights too, for label smoothing
};

// What is done to a product before it is stored. Plain products use `out`, `residual`, `width` and
// `factor`.
struct Epilogue {
  void* out;             // [M, width]
  void* preact;          // [M, parts * width], rows without gaps; or null
  const void* bias;      // [parts * width], or null
  const void* residual;  // of the output's type, or null; may be `out` itself, to add to it
  int64_t out_stride, residual_stride;
  int64_t width;        // columns of `out`
  const int64_t* seed;  // (key, offset) of philox.h, on the device; null without dropout
  uint32_t threshold;   // of DropoutRate
  float scale;
  int activation;       // activation_id
  bool gated;           // P has 2 * width columns, the gate's first
  bool float_out;       // `out` and `residual` are float32, the operands a half type
  const float* factor;  // multiplies the product, first of all; on the device; null: 1
  RowStatistics statistics;
};

struct GemmProblem {
  Matrix a, b;
  GemmLayout layout;
  Storage storage;  // of the operands
  int64_t m, n, k;  // n = columns of P
  bool tf32;        // float32 operands may be rounded to TF32
  Epilogue epilogue;
  RowCount rows;  // as A is stored: of kTN they are K, else M, and `out` has no others
};

// An activation's number: its row in FASTNN_ACTIVATIONS, for a gated one the plain row of the same
// function.
template <typename Act>
constexpr int activation_id() {
  int row = 0, found = -1;
#define FASTNN_ROW(name, Other, gated)                                \
  if (found < 0 && !gated && std::is_same_v<Act, Other>) found = row; \
  ++row;
  FASTNN_ACTIVATIONS(FASTNN_ROW)
#undef FASTNN_ROW
  return found;
}

static_assert(activation_id<Identity>() == 0, "what a zeroed epilogue has");

struct NamedActivation {
  int id;  // -1: there is none of this name
  bool gated;
};

inline NamedActivation find_activation(std::string_view name) {
#define FASTNN_ROW(label, Act, gated)                                             \
  static_assert(activation_id<Act>() >= 0, "a gated function needs a plain row"); \
  if (name == label) return {activation_id<Act>(), gated};
  FASTNN_ACTIVATIONS(FASTNN_ROW)
#undef FASTNN_ROW
  return {-1, false};
}

// linear_act.cu: every device from sm_80, any shape, stride and alignment.
cudaError_t gemm_portable_cuda(const GemmProblem& problem, cudaStream_t stream);
int64_t gemm_portable_tiles(int64_t columns);  // whose statistics are apart

// linear_act_sm90.cu: Hopper's copy engine and warp-group products; what it serves, and whether the
// running device's code has it.
bool gemm_sm90_serves(const GemmProblem& problem);
bool gemm_sm90_built();
cudaError_t gemm_sm90_cuda(const GemmProblem& problem, int multiprocessors, cudaStream_t stream);
int64_t gemm_sm90_tiles(int64_t columns);

// linear_act_rows.cu: what is done element by element, around products that cuBLAS makes.
// out = residual + dropout(act(preact)); the epilogue's preact is the input, its bias unused.
cudaError_t apply_epilogue_cuda(const Epilogue& epilogue, Storage storage, int64_t rows,
                                cudaStream_t stream);

struct PreactGradient {
  const void* grad_out;  // [rows, width]
  const void* saved;     // [rows, parts * width]; null: the identity
  void* grad_preact;     // [rows, parts * width], or null
  void* grad_bias;       // [parts * width], or null
  float* scratch;        // preact_grad_scratch floats where grad_bias is wanted
  int64_t rows, width;
  const int64_t* seed;
  uint32_t threshold;
  float scale;
  int activation;
  bool gated;
};

// dP, and its column sums in an order that only the shape decides.
int64_t preact_grad_scratch(int64_t rows, int64_t columns);
cudaError_t preact_grad_cuda(const PreactGradient& gradient, Storage storage, cudaStream_t stream);

cudaError_t dropout_cuda(const void* in, void* out, Storage storage, int64_t rows, int64_t cols,
                         const int64_t* seed, uint32_t threshold, float scale, cudaStream_t stream);

}  // namespace fastnn
