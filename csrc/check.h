// Argument errors of the operators, in one wording: "<op>: <argument> must be <expected>, got
// <got>".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#define FASTNN_CHECK(condition, op, argument, expected, got) \
  TORCH_CHECK(condition, op, ": ", argument, " must be ", expected, ", got ", got)

namespace fastnn {

inline void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* op,
                        const char* argument) {
  TORCH_CHECK(tensor.sizes() == shape, op, ": ", argument, " must be of shape ", shape, ", got ",
              tensor.sizes());
}

inline void check_dtype(const at::Tensor& tensor, at::ScalarType dtype, const char* op,
                        const char* argument) {
  TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", argument, " must be ", dtype, ", got ",
              tensor.scalar_type());
}

inline void check_device(const at::Tensor& tensor, const at::Tensor& like, const char* op,
                         const char* argument) {
  TORCH_CHECK(tensor.device() == like.device(), op, ": ", argument, " must be on ", like.device(),
              ", got ", tensor.device());
}

// The float types that every kernel takes; float64 only where `allow_double`.
inline void check_float(const at::Tensor& tensor, bool allow_double, const char* op,
                        const char* argument) {
  const auto dtype = tensor.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
                     (allow_double && dtype == at::kDouble);
  TORCH_CHECK(known, op, ": ", argument, " must be float32, bfloat16 or float16",
              allow_double ? " or float64" : "", ", got ", dtype);
}

inline void check_dropout(double p, const std::optional<at::Tensor>& seed, const char* op) {
  FASTNN_CHECK(p >= 0.0 && p <= 1.0, op, "dropout_p", "in [0, 1]", p);
  if (p == 0.0) return;
  FASTNN_CHECK(seed.has_value(), op, "seed", "given when dropout_p > 0", "none");
  check_shape(*seed, {2}, op, "seed");
  check_dtype(*seed, at::kLong, op, "seed");
  FASTNN_CHECK(seed->is_contiguous(), op, "seed", "contiguous", seed->strides());
}

}  // namespace fastnn
