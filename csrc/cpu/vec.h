// Vector loads and stores of every dtype as vectors of its accumulation type, full or partial.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <cpuinfo.h>

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

#if defined(CPU_CAPABILITY_AVX512)
// Not a function's static: the call behind its guard would spill the vectors of a loop.
inline const bool kHasAvx512Bf16 = cpuinfo_initialize() && cpuinfo_has_x86_avx512bf16();

// Two vectors, or one, as bfloat16, `low` in the low half, where kHasAvx512Bf16: an instruction
// that the compiler is not told of, in place of eight. As oneDNN's, it takes denormals for 0.
inline __m512i to_bf16(const __m512& low, const __m512& high) {
  __m512i both;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return both;
}

inline __m256i to_bf16(const __m512& x) {
  __m256i half;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(x));
  return half;
}
#endif

// kLanes<T> elements from `p`.
template <typename T>
C10_ALWAYS_INLINE AccVec<T> load_vec(const T* p) {
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
C10_ALWAYS_INLINE AccVec<T> load_vec(const T* p, int64_t n) {
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
C10_ALWAYS_INLINE void store_vec(T* p, const AccVec<T>& v) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    v.store(p);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    __m256i half;
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      half = kHasAvx512Bf16 ? to_bf16(v) : at::vec::cvtfp32_bf16(v);
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
C10_ALWAYS_INLINE void store_vec(T* p, const AccVec<T>& v, int64_t n) {
  if (n >= kLanes<T>) return store_vec(p, v);
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    v.store(p, n);
  } else {
    T lanes[kLanes<T>];
    store_vec(lanes, v);
    std::copy_n(lanes, n, p);
  }
}

// Whether a vector of T may be streamed to `p`.
template <typename T>
inline bool streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes<T> * sizeof(T)) == 0;
}

// Writes past the caches; end_stream() before another thread reads.
template <typename T>
inline void stream_vec(T* p, const AccVec<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_stream_ps(p, v);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_stream_pd(p, v);
  } else {
    alignas(32) T lanes[kLanes<T>];
    store_vec(lanes, v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
#else
  store_vec(p, v);
#endif
}

inline void end_stream() {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_sfence();
#endif
}

// The functions that activation.h is written in, for vectors. Those of float are inlined, so that
// what a value and its derivative share is computed once. On one Zen 4 core, ns an element against
// libtorch's calls, AVX-512 and AVX2: exp 0.27 of 0.31, 0.50 of 0.80; tanh 0.53 of 1.48, 1.00 of
// 2.69; gelu 0.60 of 0.67, 1.03 of 1.29; its derivative 0.60 of 1.02, 1.08 of 2.25.
template <typename A>
C10_ALWAYS_INLINE Vectorized<A> act_exp(const Vectorized<A>& x) {
  return x.exp();
}
template <typename A>
C10_ALWAYS_INLINE Vectorized<A> act_tanh(const Vectorized<A>& x) {
  return x.tanh();
}
template <typename A>
C10_ALWAYS_INLINE Vectorized<A> act_normal_cdf(const Vectorized<A>& x) {
  const Vectorized<A> half(A(0.5));
  return half + half * (x * Vectorized<A>(A(0.70710678118654752440))).erf();
}
template <typename A>
C10_ALWAYS_INLINE Vectorized<A> act_select(const Vectorized<A>& x, const Vectorized<A>& positive,
                                           const Vectorized<A>& otherwise) {
  return Vectorized<A>::blendv(otherwise, positive, x > Vectorized<A>(A(0)));
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// coefficients[0] + coefficients[1] x + ...
template <size_t n>
C10_ALWAYS_INLINE Vectorized<float> polynomial(const Vectorized<float>& x,
                                               const float (&coefficients)[n]) {
  Vectorized<float> sum(coefficients[n - 1]);
#pragma GCC unroll 16
  for (size_t i = n - 1; i-- > 0;) {
    sum = at::vec::fmadd(sum, x, Vectorized<float>(coefficients[i]));
  }
  return sum;
}

// 2^n exp(r), |r| <= ln(2) / 2: relative error at most 1e-7, denormals and infinity included.
C10_ALWAYS_INLINE Vectorized<float> act_exp(const Vectorized<float>& x) {
  using Vec = Vectorized<float>;
  const Vec bounded = at::vec::clamp(x, Vec(-104.f), Vec(89.f));  // 0 and infinity lie beyond
  const Vec n = (bounded * Vec(1.44269504f)).round();
  Vec r = at::vec::fnmadd(n, Vec(0.693359375f), bounded);  // ln(2) in two parts
  r = at::vec::fnmadd(n, Vec(-2.12194440e-4f), r);
  const Vec power =
      polynomial(r, {1.f, 1.f, 0.49999993f, 0.1666652f, 0.04166839f, 0.00836875f, 0.00138145f});
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(power, n);
#else
  // In two steps, each with an exponent that a float has.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const auto two_to = [](__m256i i) {
    return Vec(
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23)));
  };
  return power * two_to(half) * two_to(_mm256_sub_epi32(whole, half));
#endif
}

// 1 - 2 / (exp(2 |x|) + 1) with the sign of x; near 0, where that cancels, a polynomial.
C10_ALWAYS_INLINE Vectorized<float> act_tanh(const Vectorized<float>& x) {
  using Vec = Vectorized<float>;
  const Vec size = x.abs(), square = x * x;
  const Vec large = Vec(1.f) - Vec(2.f) / (act_exp(size + size) + Vec(1.f));
  const Vec small = at::vec::fmadd(
      x * square,
      polynomial(square, {-0.33333282f, 0.13331442f, -0.05373969f, 0.02063901f, -0.0057049f}), x);
  return Vec::blendv(act_select(x, large, Vec(0.f) - large), small, size < Vec(0.625f));
}

// The tail exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.35 |x|), after Abramowitz & Stegun 7.1.26 with a
// polynomial of higher degree: relative error at most 3e-7. The exp is the one in the density.
C10_ALWAYS_INLINE Vectorized<float> act_normal_cdf(const Vectorized<float>& x) {
  using Vec = Vectorized<float>;
#if defined(CPU_CAPABILITY_AVX512)
  // A Newton step from 14 bits, in less time than a division: 3 % of linear_act's forward. Bounded,
  // as the step makes NaN of infinity.
  const Vec u = at::vec::fmadd(at::vec::clamp_max(x.abs(), Vec(1e4f)), Vec(0.35f), Vec(1.f));
  const Vec guess = _mm512_rcp14_ps(u);
  const Vec t = at::vec::fmadd(at::vec::fnmadd(u, guess, Vec(1.f)), guess, guess);
#else
  const Vec t = Vec(1.f) / at::vec::fmadd(x.abs(), Vec(0.35f), Vec(1.f));
#endif
  const Vec tail = act_exp(x * x * Vec(-0.5f)) * t *
                   polynomial(t, {0.13962131f, 0.13986352f, 0.11982126f, 0.1055526f, -0.023212588f,
                                  0.15932003f, -0.25583929f, 0.14403106f, -0.029157913f});
  return act_select(x, Vec(1.f) - tail, tail);
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
