// What every CUDA operator's ATen side needs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>

#include "cuda/prim/copy.cuh"

namespace fastnn {

inline Storage storage_of(const at::Tensor& tensor) {
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

struct Device {
  int capability, multiprocessors;
};

inline Device current_device() {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return {10 * major + minor, multiprocessors};
}

}  // namespace fastnn
