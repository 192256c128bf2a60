// The kernels of the losses that depend on the instruction set.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace mtl {

// Types of labels and masks: those of Storage, by the same numbers, and integers. bool is read as kByte.
enum class LabelType : int { kDouble, kFloat, kBFloat16, kHalf, kByte, kInt, kLong };

struct Labels {
  const void* data = nullptr;
  LabelType type = LabelType::kByte;
};

struct EsmmArgs {
  const void *ctr, *cvr;  // [B]
  Labels click, conversion;
  double weight, scale;  // scale: 1 / B
  void *dctr, *dcvr;     // [B] in the type of sums
};

struct BceArgs {
  int64_t tasks;
  int64_t period;      // numbers treated as one row: rows_of_period * tasks
  const void* logits;  // [B,T]
  Labels labels, mask;
  const double* totals;  // [T]: the sum of each task's mask
  void* dlogits;         // [B,T] in the type of sums
};

struct LossKernels {
  // Rows [begin, end): returns their summed loss. A row with labels that do not fit sets *bad to its index.
  double (*esmm)(const EsmmArgs&, int64_t begin, int64_t end, int64_t* bad);
  // Numbers [begin, end) of [B,T], begin a multiple of T: each task's sum of mask * loss / total goes to sums [T]. A
  // number whose label does not fit sets *bad to its index. `memory`: scratch(1, bce_bytes(period)).
  void (*bce)(const BceArgs&, int64_t begin, int64_t end, double* sums, int64_t* bad, void* memory);
  // The sums of the mask itself, in the same way; *bad for a weight that is negative, infinite or NaN.
  void (*count)(const BceArgs&, int64_t begin, int64_t end, double* sums, int64_t* bad, void* memory);
  int64_t (*bce_bytes)(int64_t period);
};

// to[i] = grad[i] * from[i], grad repeating every `period` numbers; begin is a multiple of it. Where from is 0 so is
// to: what comes from above a masked number may be infinite. In the type of sums.
struct ScaleKernels {
  void (*scale)(const void* grad, int64_t period, const void* from, void* to, int64_t begin, int64_t end);
};

struct LossTable {
  LossKernels by_storage[4];
  ScaleKernels by_sum[2];  // double, float
};

#define MTL_DECLARE_LOSSES(ISA)        \
  namespace ISA {                      \
  extern const LossTable loss_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_LOSSES)
#undef MTL_DECLARE_LOSSES

}  // namespace mtl
