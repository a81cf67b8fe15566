// Every file of csrc/cpu is compiled once per instruction set. Each variant hands its registration
// function to the registry, and module.cpp runs those of the best set that this CPU has: no call
// pays for the choice, and no code of a larger set runs on a smaller CPU.
#pragma once

#include <torch/library.h>

namespace fastnn {

using RegisterFunction = void (*)(torch::Library&);

// Adds a variant's registration; `capability` is "AVX2" or "AVX512".
struct CpuKernels {
  CpuKernels(const char* capability, RegisterFunction function);
};

}  // namespace fastnn

#define FASTNN_STRINGIFY_(x) #x
#define FASTNN_STRINGIFY(x) FASTNN_STRINGIFY_(x)

// FASTNN_CPU_KERNELS(m) { m.impl("op", op_cpu); } at the foot of a file registers its kernels.
#define FASTNN_CPU_KERNELS(m)                                                     \
  static void register_cpu_kernels(torch::Library&);                              \
  static const ::fastnn::CpuKernels cpu_kernels(FASTNN_STRINGIFY(CPU_CAPABILITY), \
                                                &register_cpu_kernels);           \
  static void register_cpu_kernels(torch::Library& m)
