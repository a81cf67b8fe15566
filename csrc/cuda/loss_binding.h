// The ATen side that both losses share: target, class weights and options, checked and as the
// kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>

#include <optional>
#include <string_view>

#include "check.h"
#include "cuda/binding.h"
#include "cuda/cross_entropy.h"

namespace fastnn {

// (C), (N, C) or (N, C, d1, ...) as (N, C, D); a view wherever the strides allow one.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 1) return tensor.view({1, tensor.size(0), 1});
  return tensor.reshape(
      {tensor.size(0), tensor.size(1), c10::multiply_integers(tensor.sizes().slice(2))});
}

inline Strides strides_of(const at::Tensor& rows) {
  // The stride of a dimension of one element says nothing.
  const auto stride = [&](int dim) { return rows.size(dim) == 1 ? 1 : rows.stride(dim); };
  return {stride(0), stride(1), stride(2)};
}

// Any CUDA argument brings a call here, so this one may still be elsewhere.
inline c10::Device cuda_device(const at::Tensor& tensor, const char* op) {
  FASTNN_CHECK(tensor.is_cuda(), op, "the input", "on a CUDA device", tensor.device());
  return tensor.device();
}

// A float tensor of this shape, contiguous: fresh where the caller's is not, and to be kept alive
// until the launch.
inline at::Tensor as_floats(const at::Tensor& tensor, const at::Tensor& like, at::IntArrayRef shape,
                            const char* op, const char* argument) {
  check_shape(tensor, shape, op, argument);
  check_device(tensor, like, op, argument);
  return tensor.to(at::kFloat).contiguous();
}

// The arguments, and the tensors that keep them alive.
struct LossArguments {
  CrossEntropyProblem problem = {};
  at::Tensor labels, probabilities, class_weight, weight_sum;
  bool mean = false, per_row = false;

  void set_rows(const char* op, const char* argument, int64_t rows, int64_t classes) {
    FASTNN_CHECK(classes >= 1 && classes <= (int64_t{1} << 30), op, argument,
                 "of 1 to 2^30 classes", classes);
    FASTNN_CHECK(rows < (int64_t{1} << 31), op, argument, "of less than 2^31 rows", rows);
    problem.rows = rows;
    problem.classes = static_cast<int>(classes);
    problem.inner = 1;
  }

  void set_options(const char* op, std::string_view reduction, int64_t ignore_index,
                   double label_smoothing, double z_loss, double softcap) {
    FASTNN_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, "label_smoothing",
                 "in [0, 1]", label_smoothing);
    FASTNN_CHECK(softcap >= 0.0, op, "softcap", "positive, or 0 for none", softcap);
    mean = reduction == "mean";
    per_row = reduction == "none";
    FASTNN_CHECK(mean || per_row || reduction == "sum", op, "reduction", "none, mean or sum",
                 reduction);
    problem.ignore_index = ignore_index;
    problem.label_smoothing = static_cast<float>(label_smoothing);
    problem.z_loss = static_cast<float>(z_loss);
    problem.softcap = static_cast<float>(softcap);
  }

  // Labels of shape `shape`, or probabilities of shape `soft_shape`; on the device of `like`.
  void set_target(const char* op, const at::Tensor& like, const at::Tensor& target,
                  const std::optional<at::Tensor>& weight, at::IntArrayRef shape,
                  at::IntArrayRef soft_shape, bool classes_last) {
    check_device(target, like, op, "target");
    if (target.is_floating_point()) {
      check_shape(target, soft_shape, op, "target");
      check_float(target, true, op, "target");
      probabilities =
          as_rows(classes_last ? target.reshape({problem.rows, problem.classes}) : target);
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
      check_shape(*weight, {problem.classes}, op, "weight");
      check_device(*weight, like, op, "weight");
      class_weight = weight->to(at::kFloat).contiguous();
      problem.class_weight = class_weight.const_data_ptr<float>();
    }
  }

  // For a gradient: smoothing spreads over the sum of the class weights.
  void set_weight_sum() {
    if (!class_weight.defined() || problem.label_smoothing == 0.f) return;
    weight_sum = class_weight.sum();
    problem.weight_sum = weight_sum.const_data_ptr<float>();
  }
};

}  // namespace fastnn
