// exp, log1p, tanh and erfc without branches, so that loops over them become vectors; double takes the standard
// library's.
#pragma once

#include "vector.h"

namespace mtl::MTL_ISA {

inline double exponential(double x) { return std::exp(x); }

// Error below 1.5 units in the last place; exp(-inf) = 0, overflow gives inf, NaN stays NaN.
inline float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  // Nearest integer through the rounding of an addition: 1.5 * 2^23 leaves no fraction bits.
  const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  float r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact times any n here
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: one alone leaves float's exponent range where the result is subnormal or infinite.
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  return p * __builtin_bit_cast(float, (half + 127) << 23) * __builtin_bit_cast(float, (whole - half + 127) << 23);
}

inline double log_one_plus(double x) { return std::log1p(x); }

// log(1 + x) for x in [0,1] as 2 atanh(x / (2 + x)), a series in odd powers: error below 2.5 units in the last place,
// relative for small x too; NaN stays NaN.
inline float log_one_plus(float x) {
  const float s = x / (2.0f + x), z = s * s;
  float p = 0.134257490114f;
  p = p * z + 0.141183099027f;
  p = p * z + 0.200037803225f;
  p = p * z + 0.333333201683f;
  return (s + s) * (z * p) + (s + s);
}

inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// Below 0.625 an odd polynomial, for 1 - 2 / (exp(2x) + 1) cancels there; above, that.
inline float hyperbolic_tangent(float x) {
  const float a = x < 0 ? -x : x, z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  const float large = 1.0f - 2.0f / (exponential(2.0f * a) + 1.0f);
  return a < 0.625f ? small : x < 0 ? -large : large;
}

inline double complementary_error(double x) { return std::erfc(x); }

// Chebyshev fit of exp(x^2) erfc(x) in 1 / (1 + x/2), relative error 1.2e-7 (Press et al., Numerical Recipes, 6.2).
inline float complementary_error(float x) {
  const float a = x < 0 ? -x : x, t = 1.0f / (1.0f + 0.5f * a);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = t * exponential(p - a * a);
  return x < 0 ? 2.0f - tail : tail;
}

}  // namespace mtl::MTL_ISA
