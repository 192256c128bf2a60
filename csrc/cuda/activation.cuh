// The activations of expert_linear and their derivatives, in float32.
#pragma once

#include <cmath>

#include "../common/activation.h"

namespace mtl {

// Written so that a NaN stays one, and so that no difference of near numbers is taken far from zero.
__device__ inline float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::kRelu:
      return z <= 0.0f ? 0.0f : z;
    case Activation::kGelu:
      return 0.5f * z * erfcf(-0.70710678f * z);
    case Activation::kSilu:
      return z / (1.0f + expf(-z));
    case Activation::kTanh:
      return tanhf(z);
    case Activation::kSigmoid:
      return 1.0f / (1.0f + expf(-z));
    default:
      return z;
  }
}

// grad * act'; saved is the value before the activation for gelu and silu, the one after it for the others.
__device__ inline float activation_gradient(Activation activation, float grad, float saved) {
  switch (activation) {
    case Activation::kRelu:
      return saved <= 0.0f ? 0.0f : grad;
    case Activation::kGelu:
      return grad * (0.5f * erfcf(-0.70710678f * saved) + 0.39894228f * saved * expf(-0.5f * saved * saved));
    case Activation::kSilu: {
      const float s = 1.0f / (1.0f + expf(-saved));
      return grad * s * (1.0f + saved * (1.0f - s));
    }
    case Activation::kTanh:
      return grad * (1.0f - saved * saved);
    case Activation::kSigmoid:
      return grad * (saved * (1.0f - saved));
    default:
      return grad;
  }
}

}  // namespace mtl
