// The ATen side of cross_entropy.cu: checks, views, outputs, the current stream, registration.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "cuda/loss_binding.h"

namespace fastnn {

namespace {

using at::Tensor;
using std::optional;

at::DimVector rows_shape(const Tensor& logits) {
  at::DimVector shape(logits.sizes());
  if (logits.dim() == 1) return {};
  shape.erase(shape.begin() + 1);
  return shape;
}

// The arguments that forward and backward share, and the tensors that keep them alive.
struct Arguments : LossArguments {
  Tensor logits;
  at::DimVector shape;  // of the rows

  Arguments(const char* op, const Tensor& logits_, const Tensor& target,
            const optional<Tensor>& weight, std::string_view reduction, int64_t ignore_index,
            double label_smoothing, double z_loss, double softcap) {
    check_float(logits_, false, op, "logits");
    FASTNN_CHECK(logits_.dim() >= 1, op, "logits", "of at least one dimension", logits_.sizes());
    shape = rows_shape(logits_);
    logits = as_rows(logits_);
    problem.logits = logits.const_data_ptr();
    problem.storage = storage_of(logits);
    problem.strides = strides_of(logits);
    set_rows(op, "logits", logits.size(0) * logits.size(2), logits.size(1));
    problem.inner = logits.size(2);
    set_options(op, reduction, ignore_index, label_smoothing, z_loss, softcap);
    set_target(op, logits_, target, weight, shape, logits_.sizes(), /*classes_last=*/false);
  }

  bool is_empty() const { return problem.rows == 0; }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         const optional<Tensor>& weight,
                                                         std::string_view reduction,
                                                         int64_t ignore_index,
                                                         double label_smoothing, double z_loss,
                                                         double softcap) {
  constexpr const char* kOp = "cross_entropy_forward";
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  const c10::cuda::CUDAGuard device(cuda_device(logits, kOp));
  const Arguments arguments(kOp, logits, target, weight, reduction, ignore_index, label_smoothing,
                            z_loss, softcap);
  const int64_t rows = arguments.problem.rows;
  const auto options = logits.options().dtype(at::kFloat);
  const auto stream = c10::cuda::getCurrentCUDAStream();

  Tensor row_loss = at::empty(arguments.shape, options);
  Tensor lse = at::empty(arguments.shape, options);
  Tensor total_weight = at::empty({}, options);
  Tensor loss = arguments.per_row ? row_loss : at::empty({}, options);
  Tensor scratch = at::empty({reduce_loss_scratch(rows)}, options);
  Tensor row_weight;
  float* row_weight_data = nullptr;
  if (arguments.labels.defined()) {
    row_weight = at::empty({rows}, options);
    row_weight_data = row_weight.data_ptr<float>();
  }
  float* row_loss_data = row_loss.data_ptr<float>();
  C10_CUDA_CHECK(cross_entropy_forward_cuda(arguments.problem, row_loss_data, lse.data_ptr<float>(),
                                            row_weight_data, stream));
  C10_CUDA_CHECK(reduce_loss_cuda(arguments.per_row ? nullptr : row_loss_data, row_weight_data,
                                  rows, arguments.mean, scratch.data_ptr<float>(),
                                  arguments.per_row ? nullptr : loss.data_ptr<float>(),
                                  total_weight.data_ptr<float>(), stream));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, lse, total_weight};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(
    const Tensor& grad_loss, const optional<Tensor>& grad_lse, const Tensor& logits,
    const Tensor& target, const optional<Tensor>& weight, const Tensor& lse,
    const Tensor& total_weight, std::string_view reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, std::array<bool, 2> output_mask) {
  constexpr const char* kOp = "cross_entropy_backward";
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  const c10::cuda::CUDAGuard device(cuda_device(logits, kOp));
  Arguments arguments(kOp, logits, target, weight, reduction, ignore_index, label_smoothing, z_loss,
                      softcap);
  const auto floats = [&](const Tensor& tensor, at::IntArrayRef shape, const char* name) {
    return as_floats(tensor, logits, shape, kOp, name);
  };
  const Tensor upstream =
      floats(grad_loss, arguments.per_row ? at::IntArrayRef(arguments.shape) : at::IntArrayRef{},
             "grad_loss");
  const Tensor upstream_lse =
      grad_lse.has_value() ? floats(*grad_lse, arguments.shape, "grad_lse") : Tensor();
  const Tensor row_lse = floats(lse, arguments.shape, "lse");
  const Tensor divisor = floats(total_weight, {}, "total_weight");
  const bool wants_target = output_mask[1] && arguments.probabilities.defined();
  FASTNN_CHECK(!output_mask[1] || wants_target, kOp, "output_mask[1]", "false for class indices",
               "true");

  Tensor grad_logits = at::empty(output_mask[0] ? logits.sizes() : at::IntArrayRef({0}),
                                 logits.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor grad_target = at::empty(
      wants_target ? target.sizes() : at::IntArrayRef({0}),
      (wants_target ? target : logits).options().memory_format(at::MemoryFormat::Contiguous));
  if (arguments.is_empty()) return {grad_logits, grad_target};
  arguments.set_weight_sum();
  CrossEntropyGradient gradient = {};
  gradient.grad_loss = upstream.const_data_ptr<float>();
  gradient.grad_per_row = arguments.per_row;
  gradient.grad_lse = upstream_lse.defined() ? upstream_lse.const_data_ptr<float>() : nullptr;
  gradient.lse = row_lse.const_data_ptr<float>();
  gradient.total_weight = arguments.mean ? divisor.const_data_ptr<float>() : nullptr;
  gradient.grad_logits = output_mask[0] ? grad_logits.mutable_data_ptr() : nullptr;
  const int64_t inner = arguments.problem.inner;
  gradient.grad_strides = {arguments.problem.classes * inner, inner, 1};
  gradient.grad_probabilities = wants_target ? grad_target.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(
      cross_entropy_backward_cuda(arguments.problem, gradient, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_logits, grad_target};
}

}  // namespace

}  // namespace fastnn

TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("cross_entropy_forward", fastnn::cross_entropy_forward);
  m.impl("cross_entropy_backward", fastnn::cross_entropy_backward);
}
