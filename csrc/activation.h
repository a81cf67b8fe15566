// Each activation once: its value and its derivative at the pre-activation x, for scalars (host and
// device) and for vectors (cpu/vec.h declares the same act_* functions for them and is included
// first). To add one: a struct here, a row in FASTNN_ACTIVATIONS, and a row each in
// tritonops/activation.py and fastnn/reference.py.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FASTNN_ACT __host__ __device__ __forceinline__
#else
#define FASTNN_ACT __attribute__((always_inline)) inline
#endif

namespace fastnn {

FASTNN_ACT float act_exp(float x) { return expf(x); }
FASTNN_ACT double act_exp(double x) { return exp(x); }
FASTNN_ACT float act_normal_cdf(float x) { return 0.5f + 0.5f * erff(x * 0.70710678118654752440f); }
FASTNN_ACT double act_normal_cdf(double x) { return 0.5 + 0.5 * erf(x * 0.70710678118654752440); }
FASTNN_ACT float act_tanh(float x) { return tanhf(x); }
FASTNN_ACT double act_tanh(double x) { return tanh(x); }
FASTNN_ACT float act_select(float x, float positive, float otherwise) {
  return x > 0 ? positive : otherwise;
}
FASTNN_ACT double act_select(double x, double positive, double otherwise) {
  return x > 0 ? positive : otherwise;
}

struct Identity {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return x;
  }
  template <typename V>
  static FASTNN_ACT V grad(const V&) {
    return V(1);
  }
};

struct Relu {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return act_select(V(0) - x, V(0), x);  // a NaN stays a NaN, as in torch
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    return act_select(x, V(1), V(0));
  }
};

// x Phi(x)
struct Gelu {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return x * act_normal_cdf(x);
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    return act_normal_cdf(x) + x * V(0.39894228040143267794) * act_exp(x * x * V(-0.5));
  }
};

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
struct GeluTanh {
  template <typename V>
  static FASTNN_ACT V inner(const V& x) {
    return act_tanh(V(0.79788456080286535588) * (x + V(0.044715) * x * x * x));
  }
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return V(0.5) * x * (V(1) + inner(x));
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    const V t = inner(x);
    const V slope = V(0.79788456080286535588) * (V(1) + V(3 * 0.044715) * x * x);
    return V(0.5) * (V(1) + t) + V(0.5) * x * (V(1) - t * t) * slope;
  }
};

struct Sigmoid {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return V(1) / (V(1) + act_exp(V(0) - x));
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    const V s = value(x);
    return s * (V(1) - s);
  }
};

struct Silu {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return x * Sigmoid::value(x);
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    const V s = Sigmoid::value(x);
    return s * (V(1) + x * (V(1) - s));
  }
};

struct Tanh {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return act_tanh(x);
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    const V t = act_tanh(x);
    return V(1) - t * t;
  }
};

// Slope 0.01 below zero, torch's default.
struct LeakyRelu {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    return act_select(x, x, x * V(0.01));
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    return act_select(x, V(1), V(0.01));
  }
};

struct Relu2 {
  template <typename V>
  static FASTNN_ACT V value(const V& x) {
    const V r = Relu::value(x);
    return r * r;
  }
  template <typename V>
  static FASTNN_ACT V grad(const V& x) {
    return V(2) * Relu::value(x);
  }
};

// X(name, struct, gated); a gated one is act(gate) * up.
#define FASTNN_ACTIVATIONS(X)       \
  X("identity", Identity, false)    \
  X("relu", Relu, false)            \
  X("gelu", Gelu, false)            \
  X("gelu_tanh", GeluTanh, false)   \
  X("silu", Silu, false)            \
  X("sigmoid", Sigmoid, false)      \
  X("tanh", Tanh, false)            \
  X("leaky_relu", LeakyRelu, false) \
  X("relu2", Relu2, false)          \
  X("glu", Sigmoid, true)           \
  X("swiglu", Silu, true)           \
  X("geglu", Gelu, true)            \
  X("geglu_tanh", GeluTanh, true)   \
  X("reglu", Relu, true)

}  // namespace fastnn
