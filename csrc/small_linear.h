#pragma once

#include <pybind11/pybind11.h>

namespace fastnn {

// Python's small_linear(input, weight, bias or None, products): torch's linear layer if the call is
// a plain one of float32 on the CPU with at most so many products M N K, else None. Outside of
// torch.func, and not for tensors that have a __torch_function__.
// The questions alone cost 3 % of the smallest training step where Python asks them.
PyObject* small_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastnn
