// Vector loads and stores of every dtype as vectors of its accumulation type, full or partial.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fastnn {
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

// float for float, bfloat16 and half; double for double
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using AccVec = Vectorized<accumulate_t<T>>;

template <typename T>
inline constexpr int64_t kLanes = AccVec<T>::size();

// kLanes<T> elements from `p`.
template <typename T>
inline AccVec<T> load_vec(const T* p) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return AccVec<T>::loadu(p);
  } else {
    AccVec<T> v;
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      at::vec::load_fp32_from_bf16(p, v);
    } else {
      at::vec::load_fp32_from_fp16(p, v);
    }
    return v;
  }
}

// The first n elements from `p`, zeros in the lanes beyond.
template <typename T>
inline AccVec<T> load_vec(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load_vec(p);
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return AccVec<T>::loadu(p, n);
  } else {
    T lanes[kLanes<T>] = {};
    std::copy_n(p, n, lanes);
    return load_vec(lanes);
  }
}

template <typename T>
inline void store_vec(T* p, const AccVec<T>& v) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    v.store(p);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    __m256i half;
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      half = at::vec::cvtfp32_bf16(v);
    } else {
      half = at::vec::cvtfp32_fp16(v);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#else
    at::vec::convert_from_float<T>(v, v).store(p, kLanes<T>);
#endif
  }
}

template <typename T>
inline void store_vec(T* p, const AccVec<T>& v, int64_t n) {
  if (n >= kLanes<T>) return store_vec(p, v);
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    v.store(p, n);
  } else {
    T lanes[kLanes<T>];
    store_vec(lanes, v);
    std::copy_n(lanes, n, p);
  }
}

// The functions that activation.h is written in, for vectors.
template <typename A>
inline Vectorized<A> act_exp(const Vectorized<A>& x) {
  return x.exp();
}
template <typename A>
inline Vectorized<A> act_erf(const Vectorized<A>& x) {
  return x.erf();
}
template <typename A>
inline Vectorized<A> act_tanh(const Vectorized<A>& x) {
  return x.tanh();
}
template <typename A>
inline Vectorized<A> act_select(const Vectorized<A>& x, const Vectorized<A>& positive,
                                const Vectorized<A>& otherwise) {
  return Vectorized<A>::blendv(otherwise, positive, x > Vectorized<A>(A(0)));
}

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
