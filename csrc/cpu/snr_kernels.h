// The pieces of snr_linear that depend on the instruction set. C is the type of sums: float, or double where the
// activations are double.
//
// Its products are over lists of blocks: the same rows against another choice of their parts for every output. So rows
// are not packed, which each list would do anew (half of the gates closed, N = 64: as long as the product itself); the
// tile reads them where they lie, part by part.
#pragma once

#include "linear_kernels.h"

namespace mtl {

// Left side of a product: rows of C, `stride` apart, whole tiles of them. `count` parts of `width` numbers take part,
// the n-th from `offsets[n]` on.
struct Parts {
  const void* rows;
  int64_t stride;
  const int64_t* offsets;
  int64_t count, width;
};

// A block of weights, depth x cols, where each step along either is so many elements.
struct Block {
  const void* data;
  int64_t depth, cols, depth_step, col_step;
};

// For one storage type.
struct SnrKernels {
  // A row on the left side: to[0..n) in C, grad * act' where `saved` is given, else the numbers as they are.
  void (*row)(Activation activation, const void* from, const void* saved, void* to, int64_t n);
  // gate * block in C, into panels of tile_cols columns that are `panel` numbers apart; columns past the last are zero.
  void (*panels)(const Block& block, double gate, void* to, int64_t panel);
  // Rows of parts against panels, whose depth is that of the parts side by side.
  void (*multiply)(const Parts& a, const void* panels, int64_t rows, int64_t cols, const Output& out);
  // Of a block of the weights: dweight = gate * sums; returns <weight, sums>, the gate's gradient. sums in C may be
  // dweight itself; dweight null: the product alone.
  double (*finish)(const void* weight, const void* sums, double gate, void* dweight, int64_t n);
};

struct SnrTable {
  SnrKernels by_storage[4];
};

#define MTL_DECLARE_SNR(ISA)         \
  namespace ISA {                    \
  extern const SnrTable snr_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_SNR)
#undef MTL_DECLARE_SNR

}  // namespace mtl
