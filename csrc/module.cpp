// The extension module. Importing it registers the operators' C++ kernels.

#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "activation.h"
#include "cpu/registry.h"
#include "small_linear.h"
#ifdef FASTNN_CUDA
#include "cuda/attention.h"
#include "cuda/linear_act_paths.h"
#endif

namespace fastnn {

namespace {

std::vector<std::pair<const char*, RegisterFunction>>& cpu_registry() {
  static std::vector<std::pair<const char*, RegisterFunction>> registry;
  return registry;
}

// The instruction set whose kernels run. ATEN_CPU_CAPABILITY lowers it, as it does torch's own.
const char* cpu_capability() {
  const std::string torch_uses = at::get_cpu_capability();
  if (torch_uses == "AVX512") return "AVX512";
  return torch_uses == "AVX2" ? "AVX2" : "none";
}

}  // namespace

CpuKernels::CpuKernels(const char* capability, RegisterFunction function) {
  cpu_registry().emplace_back(capability, function);
}

}  // namespace fastnn

PYBIND11_MODULE(_C, m) {
  static PyMethodDef functions[] = {
      {"small_linear", reinterpret_cast<PyCFunction>(fastnn::small_linear), METH_FASTCALL,
       "torch.nn.functional.linear where torch serves it best, else None."},
      {nullptr, nullptr, 0, nullptr}};
  PyModule_AddFunctions(m.ptr(), functions);
  // Here, not in a static initializer: by now every variant is in the registry.
  static auto library = MAKE_TORCH_LIBRARY_IMPL(fastnn, CPU);
  for (const auto& [capability, function] : fastnn::cpu_registry()) {
    if (std::strcmp(capability, fastnn::cpu_capability()) == 0) function(library);
  }
  m.def(
      "activations",
      [] {
        pybind11::dict table;
#define FASTNN_ROW(name, Act, gated) table[name] = gated;
        FASTNN_ACTIVATIONS(FASTNN_ROW)
#undef FASTNN_ROW
        return table;
      },
      "Activation name -> whether it is gated.");
  m.def("cpu_capability", &fastnn::cpu_capability, "Instruction set of the CPU kernels in use.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;  // at::parallel_for is serial in what is compiled without it
#endif
#ifdef FASTNN_CUDA
        info["cuda"] = FASTNN_STRINGIFY(FASTNN_CUDA);
        pybind11::dict paths;
        paths["attention"] = fastnn::kAttentionPaths;
        paths["linear_act"] = fastnn::describe(fastnn::kPaths);
        paths["linear_cross_entropy"] = fastnn::describe(fastnn::kCountedPaths);
        info["cuda_paths"] = paths;
#else
        info["cuda"] = pybind11::none();
#endif
        return info;
      },
      "What the extension was built with.");
}
