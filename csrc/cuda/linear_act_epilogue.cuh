// What follows a product, on groups of eight neighbouring columns: a 16-byte access of a half type,
// and one draw of the dropout generator.
#pragma once

#include "cuda/fast_float.cuh"
#include "cuda/linear_act.h"
#include "cuda/prim/copy.cuh"
#include "philox.h"

namespace fastnn {

constexpr int kGroup = 8;

// The number type in which activations of values stored as T are computed.
template <typename T>
struct ActivationNumber {
  using type = FastFloat;
};
template <>
struct ActivationNumber<float> {
  using type = float;
};

// x = act(x), and d = act'(x) where asked for; the choice of the activation is around the loop.
template <typename T, bool kGrad, int kSize>
__device__ __forceinline__ void activate_with(int id, float (&x)[kSize], float (&d)[kSize]) {
  using V = typename ActivationNumber<T>::type;
  const auto each = [&](auto act) {
    using Act = decltype(act);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const V v(x[i]);
      if constexpr (kGrad) d[i] = float(Act::grad(v));
      x[i] = float(Act::value(v));
    }
  };
  switch (id) {
#define FASTNN_CASE_true(Act)
#define FASTNN_CASE_false(Act) \
  case activation_id<Act>():   \
    each(Act{});               \
    break;
#define FASTNN_CASE(name, Act, gated) FASTNN_CASE_##gated(Act)
    FASTNN_ACTIVATIONS(FASTNN_CASE)
#undef FASTNN_CASE
#undef FASTNN_CASE_true
#undef FASTNN_CASE_false
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void activate(int id, float (&x)[kSize]) {
  activate_with<T, false>(id, x, x);
}

// Elements [0, count) of eight; the others read as 0.
template <typename T>
__device__ __forceinline__ void load_group(const T* from, int count, float (&x)[kGroup]) {
  constexpr int kWidth = Packet<T>::kSize;
  if (count >= kGroup && elements_to_alignment(from) == 0) {
#pragma unroll
    for (int begin = 0; begin < kGroup; begin += kWidth) {
      Packet<T> packet;
      *reinterpret_cast<uint4*>(&packet) = *reinterpret_cast<const uint4*>(from + begin);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[begin + i] = to_float(packet.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = i < count ? to_float(from[i]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void store_group(T* to, int count, const float (&x)[kGroup]) {
  constexpr int kWidth = Packet<T>::kSize;
  if (count >= kGroup && elements_to_alignment(to) == 0) {
#pragma unroll
    for (int begin = 0; begin < kGroup; begin += kWidth) {
      Packet<T> packet;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) packet.values[i] = from_float<T>(x[begin + i]);
      store_packet(to + begin, packet);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) to[i] = from_float<T>(x[i]);
    }
  }
}

__device__ __forceinline__ void add_group(float (&x)[kGroup], const float (&y)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] += y[i];
}

__device__ __forceinline__ void multiply_group(float (&x)[kGroup], const float (&y)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] *= y[i];
}

__device__ __forceinline__ void scale_group(float (&x)[kGroup], float factor) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] *= factor;
}

// The dropout of one matrix: what a kernel keeps of (seed, threshold, scale).
struct Dropout {
  PhiloxState state;
  uint32_t threshold;
  float scale;
  bool on;

  __device__ __forceinline__ Dropout(const int64_t* seed, uint32_t threshold, float scale)
      : state{0, 0}, threshold(threshold), scale(scale), on(seed != nullptr) {
    if (on) state = {static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1])};
  }
  // The mask's element of a 16-bit half: low half first.
  __device__ __forceinline__ float keep(uint32_t word, int half) const {
    return ((word >> (16 * half)) & 0xffffu) >= threshold ? scale : 0.f;
  }
  // Multiplies group `col / 8` of a row of `cols`.
  __device__ __forceinline__ void apply(int64_t row, int64_t cols, int64_t col,
                                        float (&x)[kGroup]) const {
    uint32_t words[4];
    philox(state, static_cast<uint64_t>(row * dropout_groups(cols) + col / kGroup), words);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] *= keep(words[i / 2], i % 2);
  }
};

// x: the product at (row, col...), `count` of whose columns exist; `up`: the same columns of the
// second half if gated. A plain product only adds `residual`.
template <typename T, bool kFull>
__device__ __forceinline__ void finish_group(const Epilogue& e, const Dropout& dropout, int64_t row,
                                             int64_t col, int count, float (&x)[kGroup],
                                             float (&up)[kGroup]) {
  float y[kGroup];
  if constexpr (kFull) {
    const int64_t columns = e.gated ? 2 * e.width : e.width;
    if (e.bias != nullptr) {
      const T* bias = static_cast<const T*>(e.bias) + col;
      load_group(bias, count, y);
      add_group(x, y);
      if (e.gated) {
        load_group(bias + e.width, count, y);
        add_group(up, y);
      }
    }
    if (e.preact != nullptr) {
      T* preact = static_cast<T*>(e.preact) + row * columns + col;
      store_group(preact, count, x);
      if (e.gated) store_group(preact + e.width, count, up);
    }
    activate<T>(e.activation, x);
    if (e.gated) multiply_group(x, up);
    if (dropout.on) dropout.apply(row, e.width, col, x);
  }
  const int64_t out = row * e.out_stride + col, residual = row * e.residual_stride + col;
  if (e.float_out) {
    if (e.residual != nullptr) {
      load_group(static_cast<const float*>(e.residual) + residual, count, y);
      add_group(x, y);
    }
    store_group(static_cast<float*>(e.out) + out, count, x);
  } else {
    if (e.residual != nullptr) {
      load_group(static_cast<const T*>(e.residual) + residual, count, y);
      add_group(x, y);
    }
    store_group(static_cast<T*>(e.out) + out, count, x);
  }
}

}  // namespace fastnn
