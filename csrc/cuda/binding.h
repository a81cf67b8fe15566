// What every CUDA operator's ATen side needs.
#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace fastnn
