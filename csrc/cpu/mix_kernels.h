// The kernels of mix that depend on the instruction set, and the plan they follow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dispatch.h"

namespace mtl {

enum class Storage : int { kDouble, kFloat, kBFloat16, kHalf };

// Which expert each output row uses, as lists; dense calls, masks, packed routes and native weights all come to this.
struct MixPlan {
  int64_t rows, experts, width;         // T, E, D
  int64_t logit_cols;                   // logits a batch row: T * E, or R when packed
  bool softmax;                         // whether there are logits at all
  bool dense;                           // every row uses every expert: route r's logit is the r-th
  bool by_channel;                      // static is [T,E,D], and there are no routes
  std::vector<int64_t> begin;           // [T+1] the routes of row t are begin[t] .. begin[t+1]
  std::vector<int32_t> expert, column;  // of each route: its expert, its place among the logits
  std::vector<int32_t> leader;          // [T] first row of the run of rows with the same experts as this one
  // The same by expert: which rows use it, and by which route.
  std::vector<int64_t> user_begin;
  std::vector<int32_t> user_row, user_route;
};

// One call's memory. Strides in elements; the last dimension is dense everywhere.
struct MixArgs {
  const MixPlan* plan;
  const void* experts;
  int64_t batch_stride, expert_stride;
  const void* logits;
  Storage logits_type;
  const void* fixed;     // static weight of each route, in the type of sums; may be null
  const void* channels;  // [T,E,D] weights in the type of sums, in place of all others; may be null
  void* out;             // [B,T,D]
  void* lse;             // [B,T] in the type of sums
  bool stream;           // the outputs are too large to be found in a cache by whoever reads them next
  // Backward only.
  const void* grad;  // [B,T,D]
  const void* grad_lse;
  void* dexperts;  // [B,E,D], or null
  void* dlogits;   // like logits, or null
  void* dfixed;    // [R] or [T,E,D] sums of these batch rows in the type of sums, or null
};

// Batch rows [begin, end). `memory` holds scratch_bytes.
struct MixKernels {
  std::size_t (*scratch_bytes)(const MixPlan&);
  void (*forward)(const MixArgs&, int64_t begin, int64_t end, void* memory);
  void (*backward)(const MixArgs&, int64_t begin, int64_t end, void* memory);
};

struct MixTable {
  MixKernels by_storage[4];
};

#define MTL_DECLARE_MIX(ISA)         \
  namespace ISA {                    \
  extern const MixTable mix_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_MIX)
#undef MTL_DECLARE_MIX

}  // namespace mtl
