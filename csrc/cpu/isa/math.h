// exp without branches, so that loops over it become vectors; double takes the standard library's.
#pragma once

#include "vector.h"

namespace mtl::MTL_ISA {

inline double exponential(double x) {
  return std::exp(x);
}

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
  const int32_t bits[2] = {(half + 127) << 23, (whole - half + 127) << 23};
  float scale[2];
  std::memcpy(scale, bits, sizeof(scale));
  return p * scale[0] * scale[1];
}

}  // namespace mtl::MTL_ISA
