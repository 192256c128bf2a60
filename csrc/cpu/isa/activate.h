// The activations and their gradients, over rows.
#pragma once

#include "../../common/activation.h"
#include "math.h"

namespace mtl::MTL_ISA {

template <class C>
inline C sigmoid(C z) {
  return C{1} / (C{1} + exponential(-z));
}

// Standard normal distribution and density, for the exact gelu.
template <class C>
inline C normal_cdf(C z) {
  return C{0.5} * complementary_error(-z * C{0.70710678118654752440});
}
template <class C>
inline C normal_density(C z) {
  return C{0.39894228040143267794} * exponential(C{-0.5} * z * z);
}

template <class C>
inline void activate(Activation activation, C* z, int64_t n) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      for (int64_t i = 0; i < n; ++i) z[i] = z[i] <= C{0} ? C{0} : z[i];  // so that a NaN stays one
      return;
    case Activation::kGelu:
      for (int64_t i = 0; i < n; ++i) z[i] *= normal_cdf(z[i]);
      return;
    case Activation::kSilu:
      for (int64_t i = 0; i < n; ++i) z[i] *= sigmoid(z[i]);
      return;
    case Activation::kTanh:
      for (int64_t i = 0; i < n; ++i) z[i] = hyperbolic_tangent(z[i]);
      return;
    case Activation::kSigmoid:
      for (int64_t i = 0; i < n; ++i) z[i] = sigmoid(z[i]);
      return;
  }
}

// out = grad * act'; `saved` is the activation's output, for gelu and silu its input. out may be saved or grad.
template <class G, class S, class C>
inline void activation_gradient(Activation activation, const G* grad, const S* saved, C* out, int64_t n) {
  constexpr int64_t chunk = 64;
  C g[chunk], s[chunk];
  for (int64_t i = 0; i < n; i += chunk, grad += chunk, saved += chunk, out += chunk) {
    const int64_t m = n - i < chunk ? n - i : chunk;
    const C *gp = g, *sp = s;
    if constexpr (std::is_same_v<G, C>)
      gp = grad;
    else
      widen(grad, g, m);
    if constexpr (std::is_same_v<S, C>)
      sp = saved;
    else
      widen(saved, s, m);
    switch (activation) {
      case Activation::kNone:
        for (int64_t j = 0; j < m; ++j) out[j] = gp[j];
        break;
      case Activation::kRelu:
        // y <= 0 cuts; a NaN in y lets the gradient through, as torch's threshold_backward does.
        for (int64_t j = 0; j < m; ++j) out[j] = sp[j] <= C{0} ? C{0} : gp[j];
        break;
      case Activation::kGelu:
        for (int64_t j = 0; j < m; ++j) out[j] = gp[j] * (normal_cdf(sp[j]) + sp[j] * normal_density(sp[j]));
        break;
      case Activation::kSilu:
        for (int64_t j = 0; j < m; ++j) {
          const C y = sigmoid(sp[j]);
          out[j] = gp[j] * y * (C{1} + sp[j] * (C{1} - y));
        }
        break;
      case Activation::kTanh:
        for (int64_t j = 0; j < m; ++j) out[j] = gp[j] * (C{1} - sp[j] * sp[j]);
        break;
      case Activation::kSigmoid:
        for (int64_t j = 0; j < m; ++j) out[j] = gp[j] * sp[j] * (C{1} - sp[j]);
        break;
    }
  }
}

// row = sums * act', row being the activation's output: a gradient takes the place of what it is by.
template <class S, class C>
inline void gradient_into(Activation activation, const C* sums, S* row, int64_t n) {
  if constexpr (std::is_same_v<S, C>) {
    activation_gradient(activation, sums, row, row, n);
  } else {
    constexpr int64_t chunk = 64;
    C exact[chunk];
    for (int64_t i = 0; i < n; i += chunk) {
      const int64_t m = n - i < chunk ? n - i : chunk;
      activation_gradient(activation, sums + i, row + i, exact, m);
      narrow(exact, row + i, m);
    }
  }
}

}  // namespace mtl::MTL_ISA
