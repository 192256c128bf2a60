// The pieces of expert_linear that depend on the instruction set, as tables of functions: one of them packs an operand,
// one multiplies a block of packed panels. Packed panels hold float, or double where the activations are double.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "dispatch.h"

namespace mtl {

// An operand in memory: rows dense, `stride` elements apart. With `saved`, gradients to be taken through `activation`.
struct Operand {
  const void* data;
  const void* saved;
  Activation activation;
  int64_t stride;
};

// Where a product's rows go: y[r][c] = act(sum + bias[c]) rounded to y's type, and z the same before act, if given.
struct Output {
  void* y;
  void* z;
  const void* bias;  // packed type, padded to whole panels; may be null
  Activation activation;
  int64_t stride;
};

// Packing, for one storage type. "wide" panels are B's, tile_cols wide; the others A's, tile_rows wide.
struct PackKernels {
  // Rows become panel width, columns are the depth.
  void (*rows)(const Operand&, int64_t rows, int64_t depth, void* panels);
  void (*rows_wide)(const Operand&, int64_t rows, int64_t depth, void* panels);
  // Columns become panel width, rows are the depth. sums (packed type, may be null) grows by each column's elements.
  void (*columns)(const Operand&, int64_t depth, int64_t cols, void* panels, void* sums);
  void (*columns_wide)(const Operand&, int64_t depth, int64_t cols, void* panels, void* sums);
  // n numbers of the storage type to the packed type and back.
  void (*widen)(const void* from, void* to, int64_t n);
  void (*narrow)(const void* from, void* to, int64_t n);
  // Product of packed panels a [rows/tile_rows] and b [cols/tile_cols] to rows of this storage type.
  void (*multiply)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Output&);
};

struct LinearKernels {
  int tile_rows;
  int tile_cols_float, tile_cols_double;
  PackKernels by_storage[4];
  // sums[r][c] (packed type, `stride` apart) = product of packed panels; with `add`, on top of what is there.
  void (*accumulate_float)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, void* sums,
                           int64_t stride, bool add);
  void (*accumulate_double)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, void* sums,
                            int64_t stride, bool add);
};

#define MTL_DECLARE_LINEAR(ISA)              \
  namespace ISA {                            \
  extern const LinearKernels linear_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_LINEAR)
#undef MTL_DECLARE_LINEAR

}  // namespace mtl
