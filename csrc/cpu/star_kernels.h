// What star_linear does to weights, as a table of functions for one instruction set. Its products of matrices are those
// of linear_kernels.h.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace mtl {

// For one storage type of the weights; "packed" is the type that sums are kept in, float or double.
struct StarKernels {
  // out[i] (packed) = w[i] * domain_w[i].
  void (*product)(const void* w, const void* domain_w, void* out, int64_t n);
  // From S, a domain's sum of dz^T x: domain_dw[i] = S[i] w[i], and dw[i] (packed) grows by S[i] domain_w[i]; either of
  // the two may be null.
  void (*gradients)(const void* sums, const void* w, const void* domain_w, void* domain_dw, void* dw, int64_t n);
};

#define MTL_DECLARE_STAR(ISA)               \
  namespace ISA {                           \
  extern const StarKernels star_kernels[4]; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_STAR)
#undef MTL_DECLARE_STAR

}  // namespace mtl
