// exp of vectors, inlined (libtorch's is a call a vector): the one behind every softmax here.
#pragma once

#include "vec.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {

// exp(x) for x <= 88, exactly 0 below the smallest normal number; NaN stays NaN.
// 2^n times a polynomial in the remainder, fitted at Chebyshev nodes: relative error 3e-9 before
// rounding. ln 2 needs one float: what it misses, times n, is below the last bit where exp(x)
// counts beside 1.
inline Vectorized<float> exp_below(const Vectorized<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147181f), x);
  __m512 y = _mm512_set1_ps(0.0013941108f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0083751264f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0416663529f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.1666641551f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0000000377f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, y, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693147181f), x);
  __m256 y = _mm256_set1_ps(0.0013941108f);
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.0083751264f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.0416663529f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.1666641551f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.5f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0000000377f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.f));
  // 2^n by its exponent bits; n = 127 at most.
  const __m256i power =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 small = _mm256_cmp_ps(x, _mm256_set1_ps(-87.33f), _CMP_LT_OQ);
  return _mm256_andnot_ps(small, _mm256_mul_ps(y, _mm256_castsi256_ps(power)));
#else
  return x.exp();
#endif
}

inline Vectorized<double> exp_below(const Vectorized<double>& x) { return x.exp(); }

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
