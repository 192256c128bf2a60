// The activations of expert_linear, by number, as the kernels take them.
#pragma once

#include <stdexcept>
#include <string>

namespace mtl {

enum class Activation : int { kNone, kRelu, kGelu, kSilu, kTanh, kSigmoid };

// gelu and silu: the derivative needs z, the value before the activation; the others' follows from the output.
inline bool needs_input(Activation a) { return a == Activation::kGelu || a == Activation::kSilu; }

inline Activation activation_from(const std::string& name) {
  if (name.empty()) return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  throw std::invalid_argument("activation must be empty, relu, gelu, silu, tanh or sigmoid; got " + name);
}

}  // namespace mtl
