// The kernels of expert_mix that depend on the instruction set: all that is not a matrix product (linear_kernels.h).
// Buffers of weights, h, z and their gradients have room for 15 numbers more than they hold.
// Numbers are of the type of sums throughout; only logits, and their gradients, come in any storage type.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/activation.h"
#include "mix_kernels.h"

namespace mtl {

// Who uses whom, among all experts or those of one set. A route is a pair of an output row and an expert it uses.
struct Routing {
  Lists uses;                   // of each output row: its experts; a place on its index is a route
  Lists users;                  // of each expert: its output rows
  std::vector<int32_t> route;   // of each place on users.index: its route
  std::vector<int32_t> column;  // of each route: its place among a batch row's logits, and among the static weights
  std::vector<char> adjacent;   // of each output row: whether its columns follow one another

  int64_t routes() const { return int64_t(column.size()); }
};

// Where the weights of the mix come from.
struct Gates {
  bool softmax;        // whether there are logits at all
  const void* logits;  // [B, columns]
  Storage logits_type;
  int64_t columns;
  const void* fixed;          // [columns] static weights; may be null
  void *top, *inverse, *lse;  // [B,T]: largest logit, one over the sum of exponentials, and the logarithm of that sum
};

struct ExpertMixKernels {
  // Fills top, inverse and lse of batch rows [begin, end); memory holds 2 * columns numbers.
  void (*normalise)(const Gates&, const Routing& all, int64_t begin, int64_t end, void* memory);
  // a [rows, routes of the set] of batch rows [begin, end).
  void (*weights)(const Gates&, const Routing& set, int64_t begin, int64_t end, void* a);
  // out [rows,T,width] = sum over the set of a * h, h [rows,experts of the set,width]; with `add`, on top of out.
  void (*mix)(const Routing& set, int64_t rows, int64_t width, const void* a, const void* h, void* out, bool add);
  // dh = sum over the users of a * grad, da[row][column of the route] = <grad, h>; grad [rows,T,width], `columns` long
  // rows of da.
  void (*gradients)(const Routing& set, int64_t rows, int64_t width, const void* a, const void* h, const void* grad,
                    void* dh, void* da, int64_t columns);
  // h = act(z).
  void (*activate)(Activation, const void* z, void* h, int64_t n);
  // grad *= act', from the activation's output, for gelu and silu its input.
  void (*through)(Activation, const void* saved, void* grad, int64_t n);
  // dlogits of batch rows [begin, end) from da [B, columns]; memory as for normalise.
  void (*logits_gradient)(const Gates&, const Routing& all, int64_t begin, int64_t end, const void* da,
                          const void* grad_lse, void* dlogits, void* memory);
};

struct ExpertMixTable {
  ExpertMixKernels of_float, of_double;
};

#define MTL_DECLARE_EXPERT_MIX(ISA)               \
  namespace ISA {                                 \
  extern const ExpertMixTable expert_mix_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_EXPERT_MIX)
#undef MTL_DECLARE_EXPERT_MIX

}  // namespace mtl
