// The pieces of expert_linear that depend on the instruction set, as tables of functions: one of them packs an operand,
// one multiplies a block of packed panels. Packed panels hold float, or double where the activations are double.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/activation.h"
#include "ahead.h"
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
// With `stream`, past the caches where the instruction set writes whole lines. `ahead`: what to fetch meanwhile, if
// given.
struct Output {
  void* y;
  void* z;
  const void* bias;  // packed type, padded to whole panels; may be null
  Activation activation;
  int64_t stride;
  bool stream = false;
  Ahead* ahead = nullptr;
};

// Packing and multiplying, for one storage type. A's operand is rows of numbers to sum, side by side; B's panels of
// tile_cols columns [panel][depth][tile_cols].
struct PackKernels {
  // rows x depth numbers, then zeros up to a whole number of tiles: A's operand.
  void (*rows)(const Operand&, int64_t rows, int64_t depth, void* to);
  // B's: each row of the operand becomes a column of a panel, or each of its columns does.
  void (*rows_wide)(const Operand&, int64_t rows, int64_t depth, void* panels);
  void (*columns_wide)(const Operand&, int64_t depth, int64_t cols, void* panels);
  // n numbers of the storage type to the packed type and back.
  void (*widen)(const void* from, void* to, int64_t n);
  void (*narrow)(const void* from, void* to, int64_t n);
  // row = sums * act', n numbers; row, of the storage type, is the activation's output.
  void (*gradient_into)(Activation, const void* sums, void* row, int64_t n);
  // Product of rows a, `a_stride` numbers apart and readable up to a whole tile, and panels b, to rows of this type.
  void (*multiply)(const void* a, int64_t a_stride, const void* b, int64_t rows, int64_t cols, int64_t depth,
                   const Output&);
  // The same with its result turned: a column of the product is a row of y, and the bias is by rows of the product, of
  // which there are up to kTurnedTiles * tile_rows. A's rows are `depth` apart.
  void (*multiply_turned)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Output&);
};

constexpr int64_t kPastEnd = 128;
constexpr int kTurnedTiles = 8;

// Where a product is kept in the packed type: at[r][c], rows `stride` apart; with `add`, on top of what is there.
// `stream` and `ahead` as in Output.
struct Sums {
  void* at;
  int64_t stride;
  bool add, stream = false;
  Ahead* ahead = nullptr;
};

// The same for the packed type, float or double.
struct SumKernels {
  int tile_cols;
  // The product of rows a [rows][depth] and panels b [depth][cols].
  void (*accumulate)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Sums&);
  // The same for A from `turn`.
  void (*accumulate_turned)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Sums&);
  // A's operand whose rows are the columns of rows [depth][cols]. Reads and writes up to kPastEnd bytes past their
  // ends.
  void (*turn)(const void* rows, int64_t depth, int64_t cols, void* to);
  // sums[c] += the sum of column c, row after row; the rows are sums, or, in the second, as `rows` packed them.
  void (*add_rows)(const void* rows, int64_t n, int64_t cols, void* sums);
  void (*add_packed)(const void* rows, int64_t n, int64_t cols, void* sums);
};

// bfloat16 packed in pairs along the depth, where the processor multiplies those: a pair is as large as a float, and
// the depth of a packed operand counts pairs, the last one filled up with a zero.
struct PairKernels {
  PackKernels pack;
  SumKernels sums;
};

struct LinearKernels {
  int tile_rows;
  PackKernels by_storage[4];
  SumKernels for_float, for_double;
  const PairKernels* pairs;  // may be null
  const SumKernels& of_size(size_t packed) const { return packed == sizeof(double) ? for_double : for_float; }
};

#define MTL_DECLARE_LINEAR(ISA)              \
  namespace ISA {                            \
  extern const LinearKernels linear_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_LINEAR)
#undef MTL_DECLARE_LINEAR

inline const LinearKernels& linear_kernels() { return MTL_BEST_ISA(linear_kernels); }

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The operand from that corner on; `element`: bytes of its numbers.
inline Operand moved(Operand o, int64_t row, int64_t col, size_t element) {
  const int64_t offset = (row * o.stride + col) * int64_t(element);
  o.data = static_cast<const char*>(o.data) + offset;
  if (o.saved) o.saved = static_cast<const char*>(o.saved) + offset;
  return o;
}

}  // namespace mtl
