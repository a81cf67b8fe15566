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

#include "check.h"
#include "cuda/cross_entropy.h"

namespace fastnn {

namespace {

using at::Tensor;
using std::optional;

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Storage::kFloat16;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kDouble:
      return Storage::kFloat64;
    default:
      return Storage::kFloat32;
  }
}

// (C), (N, C) or (N, C, d1, ...) as (N, C, D); a view wherever the strides allow one.
Tensor as_rows(const Tensor& tensor) {
  if (tensor.dim() == 1) return tensor.view({1, tensor.size(0), 1});
  return tensor.reshape(
      {tensor.size(0), tensor.size(1), c10::multiply_integers(tensor.sizes().slice(2))});
}

Strides strides_of(const Tensor& rows) {
  // The stride of a dimension of one element says nothing.
  const auto stride = [&](int dim) { return rows.size(dim) == 1 ? 1 : rows.stride(dim); };
  return {stride(0), stride(1), stride(2)};
}

at::DimVector rows_shape(const Tensor& logits) {
  at::DimVector shape(logits.sizes());
  if (logits.dim() == 1) return {};
  shape.erase(shape.begin() + 1);
  return shape;
}

// Any CUDA argument brings a call here, so the logits may still be elsewhere.
c10::Device cuda_device(const Tensor& logits, const char* op) {
  FASTNN_CHECK(logits.is_cuda(), op, "logits", "on a CUDA device", logits.device());
  return logits.device();
}

// The arguments that forward and backward share, and the tensors that keep them alive.
struct Arguments {
  CrossEntropyProblem problem = {};
  Tensor logits, labels, probabilities, class_weight, weight_sum;
  at::DimVector shape;  // of the rows
  bool mean = false, per_row = false;

  Arguments(const char* op, const Tensor& logits_, const Tensor& target,
            const optional<Tensor>& weight, std::string_view reduction, int64_t ignore_index,
            double label_smoothing, double z_loss, double softcap) {
    check_float(logits_, false, op, "logits");
    FASTNN_CHECK(logits_.dim() >= 1, op, "logits", "of at least one dimension", logits_.sizes());
    const int64_t classes = logits_.size(logits_.dim() == 1 ? 0 : 1);
    FASTNN_CHECK(classes >= 1 && classes <= (int64_t{1} << 30), op, "logits",
                 "of 1 to 2^30 classes", logits_.sizes());
    FASTNN_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, "label_smoothing",
                 "in [0, 1]", label_smoothing);
    FASTNN_CHECK(softcap >= 0.0, op, "softcap", "positive, or 0 for none", softcap);
    mean = reduction == "mean";
    per_row = reduction == "none";
    FASTNN_CHECK(mean || per_row || reduction == "sum", op, "reduction", "none, mean or sum",
                 reduction);
    check_device(target, logits_, op, "target");
    shape = rows_shape(logits_);
    logits = as_rows(logits_);
    problem.logits = logits.const_data_ptr();
    problem.storage = storage_of(logits);
    problem.strides = strides_of(logits);
    problem.rows = logits.size(0) * logits.size(2);
    problem.inner = logits.size(2);
    problem.classes = static_cast<int>(classes);
    if (target.is_floating_point()) {
      check_shape(target, logits_.sizes(), op, "target");
      check_float(target, true, op, "target");
      probabilities = as_rows(target);
      problem.probabilities = probabilities.const_data_ptr();
      problem.probability_storage = storage_of(probabilities);
      problem.probability_strides = strides_of(probabilities);
    } else {
      check_shape(target, shape, op, "target");
      check_dtype(target, at::kLong, op, "target");
      labels = target.contiguous();
      problem.labels = labels.const_data_ptr<int64_t>();
    }
    if (weight.has_value()) {
      check_shape(*weight, {classes}, op, "weight");
      check_device(*weight, logits_, op, "weight");
      class_weight = weight->to(at::kFloat).contiguous();
      problem.class_weight = class_weight.const_data_ptr<float>();
    }
    problem.ignore_index = ignore_index;
    problem.label_smoothing = static_cast<float>(label_smoothing);
    problem.z_loss = static_cast<float>(z_loss);
    problem.softcap = static_cast<float>(softcap);
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
  // Fresh float32 copies where the caller's are not: kept alive until the launch.
  const auto floats = [&](const Tensor& tensor, at::IntArrayRef shape, const char* name) {
    check_shape(tensor, shape, kOp, name);
    check_device(tensor, logits, kOp, name);
    return tensor.to(at::kFloat).contiguous();
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
  if (arguments.class_weight.defined() && label_smoothing > 0.0) {
    arguments.weight_sum = arguments.class_weight.sum();
    arguments.problem.weight_sum = arguments.weight_sum.const_data_ptr<float>();
  }
  CrossEntropyGradient gradient = {};
  gradient.grad_loss = upstream.const_data_ptr<float>();
  gradient.grad_per_row = arguments.per_row;
  gradient.grad_lse = upstream_lse.defined() ? upstream_lse.const_data_ptr<float>() : nullptr;
  gradient.lse = row_lse.const_data_ptr<float>();
  gradient.total_weight = arguments.mean ? divisor.const_data_ptr<float>() : nullptr;
  gradient.grad_logits = output_mask[0] ? grad_logits.mutable_data_ptr() : nullptr;
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
