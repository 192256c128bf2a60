// Sums and maxima of short rows.
#pragma once

#include "vector.h"

namespace mtl::MTL_ISA {

template <class C>
inline C total(Vector<C> v) {
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) sum += v[i];
  return sum;
}

// The largest of n numbers, passing over NaN (which the softmax's sum catches); -inf of none.
template <class C>
inline C largest(const C* x, int64_t n) {
  C top = -INFINITY;
  int64_t i = 0;
  if (n >= kLanes<C>) {
    Vector<C> v = Vector<C>{} - C(INFINITY);
    for (; i + kLanes<C> <= n; i += kLanes<C>) {
      const Vector<C> w = load(x + i);
      v = w > v ? w : v;
    }
    for (int l = 0; l < kLanes<C>; ++l) top = v[l] > top ? v[l] : top;
  }
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// sum of x * y, or of x alone.
template <class C>
inline C dot(const C* x, const C* y, int64_t n) {
  Vector<C> v{};
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) v += y ? load(x + i) * load(y + i) : load(x + i);
  C sum = total<C>(v);
  for (; i < n; ++i) sum += y ? x[i] * y[i] : x[i];
  return sum;
}

// da[i] = the sum over all lanes of v[i], n of them.
template <int n, class C>
inline void totals(const Vector<C> (*v)[2], C* da) {
#if defined(__AVX2__)
  if constexpr (n == 4 && std::is_same_v<C, float>) {
    __m256 w[4];
    for (int i = 0; i < 4; ++i) {
      const Vector<C> both = v[i][0] + v[i][1];
      __m256 half[sizeof(both) / sizeof(__m256)];
      std::memcpy(half, &both, sizeof(both));
      w[i] = half[0];
      if constexpr (sizeof(both) > sizeof(__m256)) w[i] = _mm256_add_ps(half[0], half[1]);
    }
    const __m256 q = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
    _mm_storeu_ps(da, _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1)));
    return;
  }
#endif
  for (int i = 0; i < n; ++i) da[i] = total<C>(v[i][0] + v[i][1]);
}

}  // namespace mtl::MTL_ISA
