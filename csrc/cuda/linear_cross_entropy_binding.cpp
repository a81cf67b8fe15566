// Softmax cross-entropy of logits = X W^T + b, X (N, D), W (V, D), without the N x V logits.
//   Per chunk of rows: logits in X's dtype by one product; statistics, loss and (in place) gradient
//   by one launch of cross_entropy.cu; then dW += dlogits^T X and dX = dlogits W. So the forward
//   makes gradients for an upstream gradient of 1, which the backward scales; "none" recomputes.
//   Without gradients our own products store no logits: a tile leaves its rows' statistics.
// Ignored rows are moved to the end on the device, and no call waits for it. Our own products ask
//   it for the number of rows (kCountedPaths); cuBLAS, which has it from here, multiplies zeros.
// Memory: a chunk of logits and of X, dW in float over several chunks of a half type; one chunk if
//   its logits need no more. Unstored: a chunk of X, and 8 or 16 bytes per row and tile.
// Numerics: logits as F.linear gives them, else float; the products apply the mean's divisor.
// Floor: three GEMMs; reading and writing the logits is 4.3 % of them at 8192 x 128256, D = 4096,
//   and 3.0 TB/s. Not measured yet.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "cuda/gemm_binding.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/loss_binding.h"

namespace fastnn {

namespace {

using at::Tensor;
using std::optional;

// At 4096 rows the GEMMs are at their best, and reading and writing dW once per chunk is hidden.
constexpr int64_t kDefaultRows = 4096;
constexpr int64_t kDefaultWorkspace = int64_t{1} << 30;
constexpr int64_t kDefaultStatistics = int64_t{15} << 20;  // the workspace of logits not stored
constexpr int64_t kTileRows = 256;                         // of a GEMM

// Rows of a chunk. `row` is what a row takes in bytes, `sum_bytes` what dW takes in float if there
// are several chunks.
int64_t rows_per_chunk(int64_t rows, int64_t row, int64_t sum_bytes, int64_t workspace_bytes) {
  int64_t most = std::max<int64_t>(1, workspace_bytes / row);
  if (workspace_bytes < 0) {
    most = std::clamp<int64_t>(kDefaultWorkspace / row, 1, kDefaultRows);
    if (rows <= most + sum_bytes / row) most = rows;
  }
  most = std::max<int64_t>(1, std::min(most, rows));
  if (most < rows && most >= kTileRows) most -= most % kTileRows;
  const int64_t chunks = (rows + most - 1) / most;
  const int64_t even = chunks == 0 ? 0 : (rows + chunks - 1) / chunks;
  return std::min(most, (even + kTileRows - 1) / kTileRows * kTileRows);
}

cudaDataType_t cuda_type(at::ScalarType dtype) {
  return dtype == at::kHalf ? CUDA_R_16F : dtype == at::kBFloat16 ? CUDA_R_16BF : CUDA_R_32F;
}

// A chunk's products: by cuBLAS, or by our own kernels, which leave out rows that are not there.
// Both sum half types in float and read their factor from the device.
struct Products {
  GemmPath path;
  Device device;
  const float* scalars;  // {factor, 0, 1}

  // c = factor * a^T b, or += where `adds`; with `transposed` false, a b. Row-major matrices, of
  // which a chunk's rows are those of a.
  void run(const Tensor& a, bool transposed, const Tensor& b, const Tensor& c, bool adds,
           RowCount rows) const {
    if (c.numel() == 0) return;
    if (path == GemmPath::kCublas) return run_cublas(a, transposed, b, c, adds);
    GemmProblem problem = gemm_problem(a, b, transposed ? GemmLayout::kTN : GemmLayout::kNN);
    problem.rows = rows;
    problem.epilogue = stored(c);
    problem.epilogue.float_out = c.scalar_type() != a.scalar_type();
    problem.epilogue.factor = scalars;
    if (adds) problem.epilogue.residual = c.const_data_ptr();
    // The bias' gradient has one column, which is not for the copy engine.
    run_gemm(path_serves(path, problem, device.capability) ? path : GemmPath::kPortable, problem,
             device);
  }

  static Epilogue stored(const Tensor& out) {
    Epilogue epilogue = {};
    epilogue.out = out.mutable_data_ptr();
    epilogue.width = out.size(1);
    epilogue.out_stride = epilogue.residual_stride = out.stride(0);
    return epilogue;
  }

 private:
  void run_cublas(const Tensor& a, bool transposed, const Tensor& b, const Tensor& c,
                  bool adds) const {
    const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
    cublasPointerMode_t pointer_mode;
    cublasMath_t math_mode;
    TORCH_CUDABLAS_CHECK(cublasGetPointerMode(handle, &pointer_mode));
    TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle, &math_mode));
    TORCH_CUDABLAS_CHECK(cublasSetPointerMode(handle, CUBLAS_POINTER_MODE_DEVICE));
    const int exact = math_mode | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle, static_cast<cublasMath_t>(exact)));
    // To cuBLAS, which counts columns first, it is c^T = b^T a.
    const cublasStatus_t status =
        cublasGemmEx(handle, CUBLAS_OP_N, transposed ? CUBLAS_OP_T : CUBLAS_OP_N, c.size(1),
                     c.size(0), b.size(0), scalars, b.const_data_ptr(), cuda_type(b.scalar_type()),
                     b.stride(0), a.const_data_ptr(), cuda_type(a.scalar_type()), a.stride(0),
                     scalars + (adds ? 2 : 1), c.mutable_data_ptr(), cuda_type(c.scalar_type()),
                     c.stride(0), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    TORCH_CUDABLAS_CHECK(cublasSetPointerMode(handle, pointer_mode));
    TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle, math_mode));
    TORCH_CUDABLAS_CHECK(status);
  }
};

// Rows of neighbouring elements that do not overlap.
Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  const Tensor matrix = tensor.reshape({rows, columns});
  return matrix.stride(1) == 1 && matrix.stride(0) >= columns ? matrix : matrix.contiguous();
}

RowBytes row_bytes(const Tensor& matrix) {
  return {const_cast<void*>(matrix.const_data_ptr()), matrix.stride(0) * matrix.element_size()};
}

// One call: the arguments that forward and backward share, and the loop over the chunks.
struct Call : LossArguments {
  Tensor x, w, bias;
  Tensor place, kept, scalars;           // labels: the compaction; and the GEMMs' factors
  Tensor grad_input, grad_w, grad_bias;  // as the caller gets them, of shape (0) where not wanted
  at::DimVector shape;                   // of the rows
  int64_t rows, features, classes, workspace_bytes;
  std::array<bool, 3> wants;
  cudaStream_t stream;

  Call(const char* op, const Tensor& input, const Tensor& linear_weight,
       const optional<Tensor>& linear_bias, const Tensor& target, const optional<Tensor>& weight,
       std::string_view reduction, int64_t ignore_index, double label_smoothing, double z_loss,
       double softcap, int64_t workspace_bytes_, std::array<bool, 3> output_mask)
      : workspace_bytes(workspace_bytes_), wants(output_mask) {
    check_float(input, false, op, "input");
    FASTNN_CHECK(input.dim() >= 1, op, "input", "at least 1-D", input.dim());
    FASTNN_CHECK(linear_weight.dim() == 2 && linear_weight.size(1) == input.size(-1), op,
                 "linear_weight", "of shape (classes, in)", linear_weight.sizes());
    check_dtype(linear_weight, input.scalar_type(), op, "linear_weight");
    check_device(linear_weight, input, op, "linear_weight");
    classes = linear_weight.size(0);
    if (linear_bias.has_value()) {
      check_shape(*linear_bias, {classes}, op, "linear_bias");
      check_dtype(*linear_bias, input.scalar_type(), op, "linear_bias");
      check_device(*linear_bias, input, op, "linear_bias");
      bias = linear_bias->contiguous();
    }
    stream = c10::cuda::getCurrentCUDAStream();
    shape = at::DimVector(input.sizes().slice(0, input.dim() - 1));
    rows = c10::multiply_integers(shape);
    features = input.size(-1);
    x = as_matrix(input, rows, features);
    w = as_matrix(linear_weight, classes, features);
    set_rows(op, "linear_weight", rows, classes);
    set_options(op, reduction, ignore_index, label_smoothing, z_loss, softcap);
    at::DimVector soft_shape = shape;
    soft_shape.push_back(classes);
    set_target(op, input, target, weight, shape, soft_shape, /*classes_last=*/true);
    problem.storage = storage_of(x);
    problem.skip_ignored = true;

    const auto gradient = [&](bool wanted, const Tensor& like, at::IntArrayRef sizes) {
      return at::empty(wanted ? sizes : at::IntArrayRef({0}), like.options());
    };
    grad_input = gradient(wants[0], input, input.sizes());
    grad_w = gradient(wants[1], linear_weight, linear_weight.sizes());
    grad_bias = at::zeros({wants[2] ? classes : 0}, x.options().dtype(at::kFloat));
    scalars = at::empty({3}, x.options().dtype(at::kFloat));
    if (labels.defined()) {
      place = at::empty({rows}, x.options().dtype(at::kInt));
      kept = at::empty({1}, x.options().dtype(at::kInt));
    }
    if (wants_gradient()) set_weight_sum();
  }

  bool wants_gradient() const { return wants[0] || wants[1] || wants[2]; }

  void compact(float* row_weight) {
    if (!labels.defined()) return;
    C10_CUDA_CHECK(compact_rows_cuda(
        problem.labels, static_cast<int>(rows), problem.classes, problem.ignore_index,
        problem.class_weight, place.data_ptr<int>(), kept.data_ptr<int>(), row_weight, stream));
  }

  // The chunk's rows that are there, from row `first` on.
  RowCount there(int64_t first) const {
    return {labels.defined() ? kept.const_data_ptr<int>() : nullptr, static_cast<int>(first)};
  }

  // to[r] = from[place[first + r]], or the other way; zeros where there is no row.
  void move(const Tensor& from, const Tensor& to, int64_t first, int64_t count,
            bool scatter) const {
    const int64_t element = x.element_size();
    C10_CUDA_CHECK(move_rows_cuda(row_bytes(from), row_bytes(to), features * element,
                                  static_cast<int>(element), place.const_data_ptr<int>() + first,
                                  there(first), static_cast<int>(count), scatter, stream));
  }

  // The chunk of the loss' problem from row `first` on; its logits are to be set.
  CrossEntropyProblem chunk_of(int64_t first, int64_t count) const {
    CrossEntropyProblem chunk = problem;
    chunk.rows = count;
    if (labels.defined()) {
      chunk.row_index = place.const_data_ptr<int>() + first;
    } else {
      chunk.probabilities = probabilities.narrow(0, first, count).const_data_ptr();
    }
    return chunk;
  }

  GemmProblem logits_of(const Tensor& part, int64_t first) const {
    GemmProblem product = gemm_problem(part, w, GemmLayout::kNT);
    product.rows = there(first);
    product.epilogue.width = product.epilogue.out_stride = classes;
    if (bias.defined()) product.epilogue.bias = bias.const_data_ptr();
    return product;
  }

  // By cuBLAS where every row is there: probabilities, for which nothing is ignored.
  GemmPath choose(const Device& device) const {
    if (!labels.defined() || rows == 0 || features == 0) return GemmPath::kCublas;
    GemmProblem product = logits_of(x, 0);
    product.a = {nullptr, features};  // the moved rows, in memory of their own
    product.epilogue.out_stride = pitch();
    return choose_path(product, device, "FASTNN_LINEAR_CROSS_ENTROPY");
  }

  int64_t pitch() const {
    const int64_t per_packet = 16 / x.element_size();
    return (classes + per_packet - 1) / per_packet * per_packet;
  }

  // Losses and log-sum-exps of rows whose logits no one needs; false where that is not for us.
  bool run_without_logits(float* row_loss, float* lse) {
    const Device device = current_device();
    const GemmPath path = choose(device);
    if (wants_gradient() || path == GemmPath::kCublas) return false;
    const bool weighted = problem.label_smoothing > 0.f;
    const int64_t tiles =
        path == GemmPath::kSm90 ? gemm_sm90_tiles(classes) : gemm_portable_tiles(classes);
    const int64_t sums = tiles * (weighted ? 4 : 2), moved_bytes = features * x.element_size();
    const int64_t step = rows_per_chunk(rows, moved_bytes + sums * int64_t{sizeof(float)}, 0,
                                        workspace_bytes < 0 ? kDefaultStatistics : workspace_bytes);
    const auto floats = x.options().dtype(at::kFloat);
    const Tensor moved = at::empty({step, features}, x.options());
    const Tensor left = at::empty({step, sums}, floats), label_logit = at::empty({step}, floats);
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t count = std::min(step, rows - first);
      const Tensor part = moved.narrow(0, 0, count);
      move(x, part, first, count, /*scatter=*/false);
      CrossEntropyProblem chunk = chunk_of(first, count);
      chunk.strides = {};
      GemmProblem product = logits_of(part, first);
      product.epilogue.statistics = {left.data_ptr<float>(),
                                     label_logit.data_ptr<float>(),
                                     chunk.labels,
                                     chunk.row_index,
                                     chunk.class_weight,
                                     chunk.softcap,
                                     weighted};
      run_gemm(path, product, device);
      C10_CUDA_CHECK(
          merge_statistics_cuda(chunk, product.epilogue.statistics, tiles, row_loss, lse, stream));
    }
    return true;
  }

  // Calls rows_of_chunk(problem, first, rows), which makes the gradient over the logits (or no
  // gradient, where none is wanted), chunk after chunk; `total_weight` divides the gradients.
  template <typename Function>
  void run(const float* total_weight, const Function& rows_of_chunk) {
    const int* kept_rows = labels.defined() ? kept.const_data_ptr<int>() : nullptr;
    C10_CUDA_CHECK(gemm_scalars_cuda(total_weight, kept_rows, scalars.data_ptr<float>(), stream));
    const Device device = current_device();
    const Products products{choose(device), device, scalars.const_data_ptr<float>()};
    const bool own = products.path != GemmPath::kCublas;
    const int64_t element = x.element_size();
    const bool narrow = x.scalar_type() != at::kFloat;
    const int64_t sum_bytes = wants[1] && narrow ? classes * features * int64_t{4} : 0;
    const int64_t step = rows_per_chunk(rows, pitch() * element, sum_bytes, workspace_bytes);
    const Tensor buffer = at::empty({step, pitch()}, x.options());
    const Tensor moved = labels.defined() ? at::empty({step, features}, x.options()) : Tensor();
    Tensor ones, dw = grad_w;
    if (wants[2]) ones = at::ones({step, 1}, x.options());
    if (sum_bytes > 0 && step < rows) dw = at::empty(dw.sizes(), x.options().dtype(at::kFloat));
    if (wants[1] && rows == 0) grad_w.zero_();
    const Tensor dx = wants[0] ? grad_input.view({rows, features}) : Tensor();

    for (int64_t first = 0; first < rows; first += step) {
      const int64_t count = std::min(step, rows - first);
      const RowCount counted = own ? there(first) : RowCount{};
      Tensor part = x.narrow(0, first, count);
      if (labels.defined()) {
        part = moved.narrow(0, 0, count);
        move(x, part, first, count, /*scatter=*/false);
      }
      Tensor logits = buffer.narrow(0, 0, count).narrow(1, 0, classes);
      if (own) {
        GemmProblem product = logits_of(part, first);
        product.epilogue.out = logits.mutable_data_ptr();
        product.epilogue.out_stride = pitch();
        run_gemm(products.path, product, device);
      } else if (bias.defined()) {
        at::addmm_out(logits, bias, part, w.t());
      } else {
        at::mm_out(logits, part, w.t());
      }

      CrossEntropyProblem chunk = chunk_of(first, count);
      chunk.logits = logits.const_data_ptr();
      chunk.strides = {pitch(), 1, 1};
      rows_of_chunk(chunk, labels.defined() ? 0 : first, counted);
      if (!wants_gradient()) continue;

      if (wants[1]) products.run(logits, true, part, dw, first > 0, counted);
      if (wants[2]) {
        products.run(logits, true, ones.narrow(0, 0, count), grad_bias.unsqueeze(1), first > 0,
                     counted);
      }
      if (!wants[0]) continue;
      if (labels.defined()) {
        products.run(logits, false, w, part, false, counted);  // X's chunk has been used
        move(part, dx, first, count, /*scatter=*/true);
      } else {
        products.run(logits, false, w, dx.narrow(0, first, count), false, counted);
      }
    }
    if (wants[1] && !dw.is_same(grad_w)) grad_w.copy_(dw);
    grad_bias = grad_bias.to(w.scalar_type());
  }
};

// The GEMMs below are ATen's: no graph of their own, and no cast by autocast.
struct Guards {
  explicit Guards(const Tensor& input, const char* op) : device(cuda_device(input, op)) {}
  at::AutoDispatchBelowADInplaceOrView no_grad;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::cuda::CUDAGuard device;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& input, const Tensor& linear_weight, const optional<Tensor>& linear_bias,
    const Tensor& target, const optional<Tensor>& weight, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
    int64_t workspace_bytes, std::array<bool, 3> output_mask) {
  constexpr const char* kOp = "linear_cross_entropy_forward";
  const Guards guards(input, kOp);
  Call call(kOp, input, linear_weight, linear_bias, target, weight, reduction, ignore_index,
            label_smoothing, z_loss, softcap, workspace_bytes, output_mask);
  const int64_t rows = call.rows;
  const auto options = input.options().dtype(at::kFloat);
  Tensor row_loss = at::empty(call.shape, options), lse = at::empty(call.shape, options);
  Tensor total_weight = at::empty({}, options), scratch, row_weight;
  Tensor loss = call.per_row ? row_loss : at::empty({}, options);
  scratch = at::empty({reduce_loss_scratch(rows)}, options);
  float* row_weight_data = nullptr;
  if (call.labels.defined()) {
    row_weight = at::empty({rows}, options);
    row_weight_data = row_weight.data_ptr<float>();
  }
  float *row_loss_data = row_loss.data_ptr<float>(), *lse_data = lse.data_ptr<float>();
  float* total_data = total_weight.data_ptr<float>();
  const auto reduce = [&](const float* losses, float* result) {
    C10_CUDA_CHECK(reduce_loss_cuda(losses, row_weight_data, rows, call.mean,
                                    scratch.data_ptr<float>(), result, total_data, call.stream));
  };

  call.compact(row_weight_data);
  if (call.mean && call.wants_gradient()) reduce(nullptr, nullptr);
  const auto rows_of_chunk = [&](const CrossEntropyProblem& p, int64_t first, RowCount counted) {
    if (!call.wants_gradient()) {
      C10_CUDA_CHECK(cross_entropy_forward_cuda(p, row_loss_data + first, lse_data + first, nullptr,
                                                call.stream));
      return;
    }
    CrossEntropyGradient gradient = {};
    gradient.grad_logits = const_cast<void*>(p.logits);
    gradient.grad_strides = p.strides;
    gradient.row_loss = row_loss_data + first;
    gradient.row_lse = lse_data + first;
    gradient.rows = counted;
    C10_CUDA_CHECK(cross_entropy_backward_cuda(p, gradient, call.stream));
  };
  if (!call.run_without_logits(row_loss_data, lse_data)) {
    call.run(call.mean ? total_data : nullptr, rows_of_chunk);
  }
  reduce(call.per_row ? nullptr : row_loss_data, call.per_row ? nullptr : loss.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, lse, total_weight, call.grad_input, call.grad_w, call.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad_loss, const optional<Tensor>& grad_lse, const Tensor& input,
    const Tensor& linear_weight, const optional<Tensor>& linear_bias, const Tensor& target,
    const optional<Tensor>& weight, const Tensor& lse, const Tensor& total_weight,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap, int64_t workspace_bytes, std::array<bool, 3> output_mask) {
  constexpr const char* kOp = "linear_cross_entropy_backward";
  const Guards guards(input, kOp);
  Call call(kOp, input, linear_weight, linear_bias, target, weight, reduction, ignore_index,
            label_smoothing, z_loss, softcap, workspace_bytes, output_mask);
  const auto floats = [&](const Tensor& tensor, at::IntArrayRef shape, const char* name) {
    return as_floats(tensor, input, shape, kOp, name);
  };
  const at::IntArrayRef shape = call.shape;
  const Tensor upstream = floats(grad_loss, call.per_row ? shape : at::IntArrayRef{}, "grad_loss");
  const Tensor upstream_lse =
      grad_lse.has_value() ? floats(*grad_lse, shape, "grad_lse") : Tensor();
  const Tensor row_lse = floats(lse, shape, "lse");
  const Tensor divisor = floats(total_weight, {}, "total_weight");
  if (!call.wants_gradient()) return {call.grad_input, call.grad_w, call.grad_bias};

  call.compact(nullptr);
  call.run(nullptr, [&](const CrossEntropyProblem& p, int64_t first, RowCount counted) {
    CrossEntropyGradient gradient = {};
    gradient.grad_loss = upstream.const_data_ptr<float>() + (call.per_row ? first : 0);
    gradient.grad_per_row = call.per_row;
    if (upstream_lse.defined()) gradient.grad_lse = upstream_lse.const_data_ptr<float>() + first;
    gradient.lse = row_lse.const_data_ptr<float>() + first;
    gradient.total_weight = call.mean ? divisor.const_data_ptr<float>() : nullptr;
    gradient.grad_logits = const_cast<void*>(p.logits);
    gradient.grad_strides = p.strides;
    gradient.rows = counted;
    C10_CUDA_CHECK(cross_entropy_backward_cuda(p, gradient, call.stream));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {call.grad_input, call.grad_w, call.grad_bias};
}

void scale_(Tensor& tensor, const Tensor& scale) {
  constexpr const char* kOp = "scale_";
  const Guards guards(tensor, kOp);
  check_float(tensor, false, kOp, "tensor");
  FASTNN_CHECK(tensor.is_contiguous(), kOp, "tensor", "contiguous", tensor.strides());
  const Tensor factor = as_floats(scale, tensor, {}, kOp, "scale");
  C10_CUDA_CHECK(scale_cuda(tensor.mutable_data_ptr(), storage_of(tensor), tensor.numel(),
                            factor.const_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

}  // namespace fastnn

TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("linear_cross_entropy_forward", fastnn::linear_cross_entropy_forward);
  m.impl("linear_cross_entropy_backward", fastnn::linear_cross_entropy_backward);
  m.impl("scale_", fastnn::scale_);
}
