// exp and tanh at the accuracy that a storage type can show: the library's functions for float, the
// special-function unit for the half types, whose rounding hides its error of 2^-22.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace fastnn {

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float log2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

template <typename T>
struct Math {
  static __device__ __forceinline__ float exp(float x) { return exp2_approx(x * 1.44269504f); }
  // The error is 1e-7 of the largest tanh, not of this one; tanh.approx's 2^-11 would be visible.
  static __device__ __forceinline__ float tanh(float x) {
    return 1.f - __fdividef(2.f, 1.f + exp(2.f * x));
  }
};

template <>
struct Math<float> {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
};

}  // namespace fastnn
