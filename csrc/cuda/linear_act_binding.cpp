// The ATen side of linear_act*.cu: checks, views, outputs, the choice of the product's kernel, the
// current stream, registration.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "check.h"
#include "cuda/gemm_binding.h"
#include "philox.h"

namespace fastnn {

namespace {

using at::Tensor;
using std::optional;

constexpr const char* kVariable = "FASTNN_LINEAR_ACT";

bool has_unit_columns(const Tensor& matrix) { return matrix.stride(1) == 1 || matrix.size(1) <= 1; }

Tensor with_unit_columns(const Tensor& matrix) {
  return has_unit_columns(matrix) ? matrix : matrix.contiguous();
}

// A product of two matrices whose kernel is still to be chosen; it keeps the operands alive.
struct Product {
  Tensor a, b;
  GemmProblem problem = {};
  Device device;
  GemmPath path;

  Product(const Tensor& a_, const Tensor& b_, GemmLayout layout, const Epilogue& epilogue)
      : a(a_), b(b_), device(current_device()), path(GemmPath::kCublas) {
    // cuBLAS takes transposed matrices as they are; ours would copy them.
    const auto forced = forced_path(kVariable);
    const bool unit = has_unit_columns(a) && has_unit_columns(b);
    if (!unit && (!forced || *forced == GemmPath::kCublas)) return;
    a = with_unit_columns(a);
    b = with_unit_columns(b);
    problem = gemm_problem(a, b, layout);
    problem.epilogue = epilogue;
    path = choose_path(problem, device, kVariable);
  }

  // For the paths that are ours.
  void run() const { run_gemm(path, problem, device); }
};

// A B^T, of any kernel.
Tensor plain_product(const Tensor& a, const Tensor& b, GemmLayout layout) {
  const bool along_a = layout != GemmLayout::kTN;
  Tensor out = at::empty({a.size(along_a ? 0 : 1), b.size(1)}, a.options());
  Epilogue epilogue = {};
  epilogue.out = out.mutable_data_ptr();
  epilogue.width = epilogue.out_stride = out.size(1);
  const Product product(a, b, layout, epilogue);
  if (product.path == GemmPath::kCublas) {
    at::mm_out(out, along_a ? a : a.t(), b);
  } else {
    product.run();
  }
  return out;
}

// The dropout arguments in the kernels' form; keeps the seed alive.
struct DropoutArguments {
  Tensor seed;
  const int64_t* data = nullptr;
  DropoutRate rate = {};

  DropoutArguments(double p, const optional<Tensor>& seed_, const Tensor& like, const char* op) {
    check_dropout(p, seed_, op);
    if (p == 0.0) return;
    check_device(*seed_, like, op, "seed");
    seed = seed_->contiguous();
    data = seed.const_data_ptr<int64_t>();
    rate = dropout_rate(p);
  }
};

NamedActivation checked_activation(std::string_view name, bool gated, const char* op) {
  const NamedActivation act = find_activation(name);
#define FASTNN_NAME(label, Act, gated) " " label
  FASTNN_CHECK(act.id >= 0, op, "activation", "one of" FASTNN_ACTIVATIONS(FASTNN_NAME), name);
#undef FASTNN_NAME
  FASTNN_CHECK(act.gated == gated, op, "gated", "as the activation is", gated);
  return act;
}

void check_operands(const Tensor& input, const Tensor& weight, bool gated, const char* op) {
  FASTNN_CHECK(input.is_cuda(), op, "input", "on a CUDA device", input.device());
  check_float(input, false, op, "input");
  check_dtype(weight, input.scalar_type(), op, "weight");
  check_device(weight, input, op, "weight");
  FASTNN_CHECK(weight.dim() == 2, op, "weight", "a matrix", weight.sizes());
  FASTNN_CHECK(input.dim() >= 1 && input.size(-1) == weight.size(1), op, "input",
               "of shape (*, " + std::to_string(weight.size(1)) + ")", input.sizes());
  FASTNN_CHECK(!gated || weight.size(0) % 2 == 0, op, "weight", "of an even number of rows",
               weight.sizes());
}

// An optional argument of the input's type and device and of this shape.
void check_like(const Tensor& tensor, const Tensor& input, at::IntArrayRef shape, const char* op,
                const char* name) {
  check_shape(tensor, shape, op, name);
  check_dtype(tensor, input.scalar_type(), op, name);
  check_device(tensor, input, op, name);
}

std::tuple<Tensor, Tensor> linear_act_forward(const Tensor& input, const Tensor& weight,
                                              const optional<Tensor>& bias,
                                              const optional<Tensor>& residual,
                                              const optional<Tensor>& seed,
                                              std::string_view activation, double dropout_p,
                                              bool save_preact, bool gated) {
  constexpr const char* kOp = "linear_act_forward";
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  check_operands(input, weight, gated, kOp);
  const c10::cuda::CUDAGuard device(input.device());
  const NamedActivation act = checked_activation(activation, gated, kOp);
  const DropoutArguments dropout(dropout_p, seed, input, kOp);
  const int64_t k = weight.size(1), n = weight.size(0), width = gated ? n / 2 : n;
  at::DimVector shape(input.sizes()), preact_shape(input.sizes());
  shape.back() = width;
  preact_shape.back() = n;
  Tensor bias_row, residual_rows;
  if (bias) {
    check_like(*bias, input, {n}, kOp, "bias");
    bias_row = bias->contiguous();
  }
  if (residual) {
    check_like(*residual, input, shape, kOp, "residual");
    if (width > 0) residual_rows = with_unit_columns(residual->reshape({-1, width}));
  }
  Tensor out = at::empty(shape, input.options());
  Tensor preact =
      at::empty(save_preact ? at::IntArrayRef(preact_shape) : at::IntArrayRef{0}, input.options());
  if (out.numel() == 0) return {out, preact};

  const int64_t m = out.numel() / width;
  Epilogue e = {};
  e.out = out.mutable_data_ptr();
  e.preact = save_preact ? preact.mutable_data_ptr() : nullptr;
  e.bias = bias ? bias_row.const_data_ptr() : nullptr;
  e.residual = residual ? residual_rows.const_data_ptr() : nullptr;
  e.residual_stride = residual ? residual_rows.stride(0) : 0;
  e.width = e.out_stride = width;
  e.seed = dropout.data;
  e.threshold = dropout.rate.threshold;
  e.scale = dropout.rate.scale;
  e.activation = act.id;
  e.gated = gated;
  const Product product(input.reshape({m, k}), weight, GemmLayout::kNT, e);
  if (product.path != GemmPath::kCublas) {
    product.run();
    return {out, preact};
  }
  // The product with its bias is the pre-activation, or the output where nothing follows.
  const bool follows =
      activation != "identity" || dropout.data != nullptr || residual || save_preact;
  Tensor result = save_preact ? preact.view({m, n})
                  : follows   ? at::empty({m, n}, input.options())
                              : out.view({m, n});
  if (bias) {
    at::addmm_out(result, bias_row, product.a, product.b.t());
  } else {
    at::mm_out(result, product.a, product.b.t());
  }
  if (!follows) return {out, preact};
  e.preact = result.mutable_data_ptr();
  C10_CUDA_CHECK(apply_epilogue_cuda(e, storage_of(input), m, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, preact};
}

std::tuple<Tensor, Tensor, Tensor> linear_act_backward(const Tensor& grad_out, const Tensor& input,
                                                       const Tensor& weight, const Tensor& saved,
                                                       const optional<Tensor>& seed,
                                                       std::string_view activation,
                                                       double dropout_p, bool gated,
                                                       std::array<bool, 3> output_mask) {
  constexpr const char* kOp = "linear_act_backward";
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  check_operands(input, weight, gated, kOp);
  const c10::cuda::CUDAGuard device(input.device());
  const NamedActivation act = checked_activation(activation, gated, kOp);
  const DropoutArguments dropout(dropout_p, seed, input, kOp);
  const int64_t k = weight.size(1), n = weight.size(0), width = gated ? n / 2 : n;
  at::DimVector shape(input.sizes());
  shape.back() = width;
  check_like(grad_out, input, shape, kOp, "grad_out");
  const bool identity = activation == "identity";
  Tensor saved_rows;
  if (!identity) {
    shape.back() = n;
    check_like(saved, input, shape, kOp, "saved");
    saved_rows = saved.contiguous();
  }
  const auto empty = [&](bool wanted, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, input.options());
  };
  Tensor grad_bias = empty(output_mask[2], {n});
  if (n == 0) {
    return {empty(output_mask[0], input.sizes()).zero_(), empty(output_mask[1], weight.sizes()),
            grad_bias};
  }

  const Tensor upstream = grad_out.contiguous();
  const int64_t m = upstream.numel() / width;
  // The gradient of the pre-activation is grad_out itself where nothing lies between.
  const bool same = identity && dropout.data == nullptr;
  const bool wants_product = output_mask[0] || output_mask[1];
  Tensor grad_preact = same            ? upstream.view({m, n})
                       : wants_product ? at::empty({m, n}, input.options())
                                       : Tensor();
  if (output_mask[2] || (!same && wants_product)) {
    PreactGradient g = {};
    g.grad_out = upstream.const_data_ptr();
    g.saved = identity ? nullptr : saved_rows.const_data_ptr();
    g.grad_preact = !same && wants_product ? grad_preact.mutable_data_ptr() : nullptr;
    Tensor scratch;
    if (output_mask[2]) {
      scratch = at::empty({preact_grad_scratch(m, n)}, input.options().dtype(at::kFloat));
      g.grad_bias = grad_bias.mutable_data_ptr();
      g.scratch = scratch.mutable_data_ptr<float>();
    }
    g.rows = m;
    g.width = width;
    g.seed = dropout.data;
    g.threshold = dropout.rate.threshold;
    g.scale = dropout.rate.scale;
    g.activation = act.id;
    g.gated = gated;
    C10_CUDA_CHECK(preact_grad_cuda(g, storage_of(input), c10::cuda::getCurrentCUDAStream()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  Tensor grad_input = output_mask[0]
                          ? plain_product(grad_preact, weight, GemmLayout::kNN).view(input.sizes())
                          : empty(false, {});
  Tensor grad_weight = output_mask[1]
                           ? plain_product(grad_preact, input.reshape({m, k}), GemmLayout::kTN)
                           : empty(false, {});
  return {grad_input, grad_weight, grad_bias};
}

Tensor dropout(const Tensor& input, const Tensor& seed, double p) {
  constexpr const char* kOp = "dropout";
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  FASTNN_CHECK(input.is_cuda(), kOp, "input", "on a CUDA device", input.device());
  check_float(input, false, kOp, "input");
  const c10::cuda::CUDAGuard device(input.device());
  FASTNN_CHECK(p >= 0.0 && p <= 1.0, kOp, "dropout_p", "in [0, 1]", p);
  const Tensor in = input.contiguous();
  Tensor out = at::empty_like(in);
  if (out.numel() == 0 || p == 0.0) return p == 0.0 ? out.copy_(in) : out;
  const DropoutArguments arguments(p, seed, input, kOp);
  const int64_t cols = in.dim() > 0 ? in.size(-1) : 1;
  C10_CUDA_CHECK(dropout_cuda(in.const_data_ptr(), out.mutable_data_ptr(), storage_of(in),
                              in.numel() / cols, cols, arguments.data, arguments.rate.threshold,
                              arguments.rate.scale, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

}  // namespace fastnn

TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("linear_act_forward", fastnn::linear_act_forward);
  m.impl("linear_act_backward", fastnn::linear_act_backward);
  m.impl("dropout", fastnn::dropout);
}
