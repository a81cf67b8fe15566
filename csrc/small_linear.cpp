#include "small_linear.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

namespace fastnn {

namespace {

bool are_plain(PyObject* const* tensors, int count) {
  if (at::impl::torch_function_mode_enabled()) return false;
  for (int i = 0; i < count; i++) {
    if (!THPVariable_CheckExact(tensors[i])) return false;
  }
  return true;
}

bool transformed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

bool is_float_on_cpu(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && !tensor.is_nested();
}

bool is_small(const at::Tensor& input, const at::Tensor& weight, const at::Tensor* bias,
              int64_t products) {
  if (!is_float_on_cpu(input) || !is_float_on_cpu(weight) || input.dim() == 0 ||
      weight.dim() != 2 || input.size(-1) != weight.size(1)) {
    return false;
  }
  const int64_t columns = weight.size(1), size = weight.numel(), elements = input.numel();
  if (bias != nullptr &&
      (!is_float_on_cpu(*bias) || bias->dim() != 1 || bias->numel() * columns != size)) {
    return false;
  }
  return elements > 0 && size > 0 && elements <= products * columns / size;
}

}  // namespace

PyObject* small_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "small_linear takes 4 arguments, got ", count);
  const bool biased = arguments[2] != Py_None;
  if (!are_plain(arguments, biased ? 3 : 2) || transformed()) Py_RETURN_NONE;
  const at::Tensor& input = THPVariable_Unpack(arguments[0]);
  const at::Tensor& weight = THPVariable_Unpack(arguments[1]);
  const at::Tensor* bias = biased ? &THPVariable_Unpack(arguments[2]) : nullptr;
  const int64_t products = PyLong_AsLongLong(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  if (!is_small(input, weight, bias, products)) Py_RETURN_NONE;
  at::Tensor out;
  {
    pybind11::gil_scoped_release without_gil;
    out = at::linear(input, weight, biased ? std::optional<at::Tensor>(*bias) : std::nullopt);
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastnn
