"""Each activation once: value and derivative, as functions of fp32 blocks.

A kernel takes them as constexpr function arguments (`VALUE: tl.constexpr`, `DERIVATIVE:
tl.constexpr`) and calls them like any other function. A gated activation is `value(gate) * up`.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime import JITFunction


@triton.jit
def identity(x):
    return x


@triton.jit
def identity_derivative(x):
    return tl.full(x.shape, 1.0, tl.float32)


# The comparisons below let NaN through, as torch does.
@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_derivative(x):
    return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def leaky_relu(x):
    return tl.where(x < 0.0, 0.01 * x, x)


@triton.jit
def leaky_relu_derivative(x):
    return tl.where(x > 0.0, 1.0, 0.01)


@triton.jit
def relu2(x):
    return relu(x) * relu(x)


@triton.jit
def relu2_derivative(x):
    return 2.0 * relu(x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_derivative(x):
    s = sigmoid(x)
    return s * (1.0 - s)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_derivative(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e), e = exp(-2 |x|); its Taylor series where 1 - e would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0.0, -far, far)
    s = x * x
    series = -1382.0 / 155925.0
    series = series * s + 62.0 / 2835.0
    series = series * s - 17.0 / 315.0
    series = series * s + 2.0 / 15.0
    series = series * s - 1.0 / 3.0
    near = x + x * s * series
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def tanh_derivative(x):
    """4 e / (1 + e)^2, e = exp(-2 |x|): 1 - tanh(x)^2 without its cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def gelu_tanh(x):
    # 0.5 (1 + tanh(u)) = sigmoid(2 u)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * sigmoid(2.0 * u)


@triton.jit
def gelu_tanh_derivative(x):
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    s = sigmoid(2.0 * u)
    return s + 2.0 * x * s * (1.0 - s) * slope


class Activation(NamedTuple):
    value: JITFunction
    derivative: JITFunction
    gated: bool = False


ACTIVATIONS = {
    "identity": Activation(identity, identity_derivative),
    "relu": Activation(relu, relu_derivative),
    "gelu": Activation(gelu, gelu_derivative),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_derivative),
    "silu": Activation(silu, silu_derivative),
    "sigmoid": Activation(sigmoid, sigmoid_derivative),
    "tanh": Activation(tanh, tanh_derivative),
    "leaky_relu": Activation(leaky_relu, leaky_relu_derivative),
    "relu2": Activation(relu2, relu2_derivative),
    "glu": Activation(sigmoid, sigmoid_derivative, gated=True),
    "swiglu": Activation(silu, silu_derivative, gated=True),
    "geglu": Activation(gelu, gelu_derivative, gated=True),
    "geglu_tanh": Activation(gelu_tanh, gelu_tanh_derivative, gated=True),
    "reglu": Activation(relu, relu_derivative, gated=True),
}
