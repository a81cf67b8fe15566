// Float with the special-function unit's exp, division, tanh and normal cdf, for activation.h: the
// errors, a few 1e-7, vanish in the rounding to a half type.
#pragma once

#include <cuda_fp16.h>

#include "activation.h"
#include "cuda/prim/math.cuh"

namespace fastnn {

struct FastFloat {
  float value;
  __device__ __forceinline__ explicit FastFloat(float x) : value(x) {}
  __device__ __forceinline__ explicit operator float() const { return value; }
};

__device__ __forceinline__ FastFloat operator+(FastFloat a, FastFloat b) {
  return FastFloat(a.value + b.value);
}
__device__ __forceinline__ FastFloat operator-(FastFloat a, FastFloat b) {
  return FastFloat(a.value - b.value);
}
__device__ __forceinline__ FastFloat operator*(FastFloat a, FastFloat b) {
  return FastFloat(a.value * b.value);
}
__device__ __forceinline__ FastFloat operator/(FastFloat a, FastFloat b) {
  return FastFloat(__fdividef(a.value, b.value));
}

using FastMath = Math<__half>;

__device__ __forceinline__ FastFloat act_exp(FastFloat x) {
  return FastFloat(FastMath::exp(x.value));
}
__device__ __forceinline__ FastFloat act_tanh(FastFloat x) {
  return FastFloat(FastMath::tanh(x.value));
}
// erf by Abramowitz and Stegun 1964, 7.1.26: absolute error at most 1.5e-7.
__device__ __forceinline__ FastFloat act_normal_cdf(FastFloat x) {
  const float z = x.value * 0.70710678118654752440f;
  const float size = fabsf(z), t = __fdividef(1.f, 1.f + 0.3275911f * size);
  const float p =
      t * (0.254829592f +
           t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float erf = copysignf(1.f - p * FastMath::exp(-size * size), z);
  return FastFloat(0.5f + 0.5f * erf);
}
__device__ __forceinline__ FastFloat act_select(FastFloat x, FastFloat positive,
                                                FastFloat otherwise) {
  return x.value > 0.f ? positive : otherwise;
}

}  // namespace fastnn
