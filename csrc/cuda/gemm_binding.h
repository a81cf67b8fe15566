// The ATen side of products by our own kernels: a problem of two tensors, the device, the choice.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <optional>
#include <string_view>

#include "cuda/binding.h"
#include "cuda/linear_act.h"
#include "cuda/linear_act_paths.h"

namespace fastnn {

// A B^T of matrices whose neighbouring columns are neighbours in memory; the epilogue is to be set.
inline GemmProblem gemm_problem(const at::Tensor& a, const at::Tensor& b, GemmLayout layout) {
  const bool along_a = layout != GemmLayout::kTN, along_b = layout == GemmLayout::kNT;
  GemmProblem problem = {};
  problem.a = {a.const_data_ptr(), a.stride(0)};
  problem.b = {b.const_data_ptr(), b.stride(0)};
  problem.layout = layout;
  problem.storage = storage_of(a);
  problem.m = a.size(along_a ? 0 : 1);
  problem.k = a.size(along_a ? 1 : 0);
  problem.n = b.size(along_b ? 0 : 1);
  problem.tf32 = at::globalContext().float32Precision(
                     at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
  return problem;
}

// FASTNN_LINEAR_ACT and FASTNN_LINEAR_CROSS_ENTROPY = sm90|portable|cublas override the tables
// where that kernel serves the product. Read at every call, so that one process can compare them.
inline std::optional<GemmPath> forced_path(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') return std::nullopt;
  const std::string_view name = value;
  if (name == "sm90") return GemmPath::kSm90;
  if (name == "portable") return GemmPath::kPortable;
  TORCH_CHECK(name == "cublas", variable, " must be sm90, portable or cublas, got ", name);
  return GemmPath::kCublas;
}

inline GemmPath choose_path(const GemmProblem& problem, const Device& device,
                            const char* variable) {
  const auto forced = forced_path(variable);
  return forced && path_serves(*forced, problem, device.capability)
             ? *forced
             : choose_path(problem, device.capability);
}

// For the paths that are ours.
inline void run_gemm(GemmPath path, const GemmProblem& problem, const Device& device) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(path == GemmPath::kSm90 ? gemm_sm90_cuda(problem, device.multiprocessors, stream)
                                         : gemm_portable_cuda(problem, stream));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastnn
