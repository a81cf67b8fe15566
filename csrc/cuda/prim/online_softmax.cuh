// The running maximum m and the sum s of exp(x - m) (Milakov and Gimelshein 2018, "Online
// normalizer calculation for softmax", algorithm 3), and weighted sums taken against the same
// maximum:
//   weight = sum of u, deviation = sum of u * (x - m), so that  sum of u * (lse - x) =
//   weight * log(s) - deviation  has terms of one sign only, whatever offset the logits have.
#pragma once

#include "math.cuh"

namespace fastnn {

struct alignas(16) SoftmaxSums {
  float max, sum, weight, deviation;
};

__device__ __forceinline__ SoftmaxSums no_logits() { return {-INFINITY, 0.f, 0.f, 0.f}; }

// What to subtract before exp: not -inf, or a row's hidden (-inf) logits would give inf - inf.
__device__ __forceinline__ float finite_shift(float max) { return max == -INFINITY ? 0.f : max; }

// Moves the sums to a maximum of at least `max`. A NaN logit never is the maximum (fmaxf drops it)
// but reaches `sum`.
template <typename T>
__device__ __forceinline__ void raise_max(SoftmaxSums& s, float max) {
  if (max <= s.max) return;
  const float step = finite_shift(s.max) - max;
  s.sum *= Math<T>::exp(s.max - max);
  // weight is 0 before the first element: 0 * step must not become NaN for an infinite step.
  if (s.weight != 0.f) s.deviation += s.weight * step;
  s.max = max;
}

template <typename T>
__device__ __forceinline__ SoftmaxSums merge(SoftmaxSums a, SoftmaxSums b) {
  const float max = fmaxf(a.max, b.max);
  raise_max<T>(a, max);
  raise_max<T>(b, max);
  return {max, a.sum + b.sum, a.weight + b.weight, a.deviation + b.deviation};
}

}  // namespace fastnn
