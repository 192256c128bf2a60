// star_linear's products of weights, for one instruction set.
#include "../star_kernels.h"

#include <algorithm>

#include "vector.h"

namespace mtl::MTL_ISA {

namespace {

constexpr int64_t kChunk = 256;

// n numbers as C: where they lie, or widened into `buffer`.
template <class S, class C>
const C* widened(const S* from, C* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, C>) return from;
  widen(from, buffer, n);
  return buffer;
}

template <class S, class C = SumOf<S>>
void product(const void* w, const void* domain_w, void* out, int64_t n) {
  const S *a = static_cast<const S*>(w), *b = static_cast<const S*>(domain_w);
  C* to = static_cast<C*>(out);
  C a_buffer[kChunk], b_buffer[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    const C *p = widened(a + i, a_buffer, m), *q = widened(b + i, b_buffer, m);
    for (int64_t j = 0; j < m; ++j) to[i + j] = p[j] * q[j];
  }
}

template <class S, class C = SumOf<S>>
void gradients(const void* sums, const void* w, const void* domain_w, void* domain_dw, void* dw, int64_t n) {
  const C* s = static_cast<const C*>(sums);
  C buffer[kChunk], rounded[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    if (domain_dw) {
      const C* p = widened(static_cast<const S*>(w) + i, buffer, m);
      for (int64_t j = 0; j < m; ++j) rounded[j] = s[i + j] * p[j];
      narrow(rounded, static_cast<S*>(domain_dw) + i, m);
    }
    if (dw) {
      const C* p = widened(static_cast<const S*>(domain_w) + i, buffer, m);
      C* to = static_cast<C*>(dw) + i;
      for (int64_t j = 0; j < m; ++j) to[j] += s[i + j] * p[j];
    }
  }
}

template <class S>
constexpr StarKernels kernels_for = {product<S>, gradients<S>};

}  // namespace

extern const StarKernels star_kernels[4] = {kernels_for<double>, kernels_for<float>, kernels_for<BFloat16>,
                                            kernels_for<Half>};

}  // namespace mtl::MTL_ISA
