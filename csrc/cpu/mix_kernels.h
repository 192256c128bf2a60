// The kernels of mix that depend on the instruction set, and the plan they follow.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../common/activation.h"
#include "dispatch.h"
#include "types.h"

namespace mtl {

// Sparse rows: row i is the weighted sum of the inputs index[begin[i]] .. index[begin[i+1]].
struct Lists {
  std::vector<int64_t> begin{0};
  std::vector<int32_t> index;
  std::vector<int32_t> leader;  // first row of the run of rows with the same inputs as this one

  int64_t rows() const { return int64_t(leader.size()); }
  // Closes a row whose inputs have been put on index; `known_equal` spares the comparison with the row before.
  void close_row(bool known_equal) {
    const int64_t i = rows(), from = begin.back(), to = int64_t(index.size());
    const auto same = [&] {
      return std::equal(index.begin() + from, index.end(), index.begin() + begin[i - 1], index.begin() + from);
    };
    leader.push_back(i > 0 && (known_equal || same()) ? leader.back() : int32_t(i));
    begin.push_back(to);
  }
};

// Which expert each output row uses; dense calls, masks, packed routes and native weights all come to this.
struct MixPlan {
  int64_t rows, experts, width;  // T, E, D
  int64_t logit_cols;            // logits a batch row: T * E, or R when packed
  bool softmax;                  // whether there are logits at all
  bool dense;                    // every row uses every expert: route r's logit is the r-th
  bool by_channel;               // static is [T,E,D], and there are no routes
  Lists uses;                    // the experts of each output row; a place on its index is a route
  std::vector<int32_t> column;   // of each route: its place among the logits
  Lists users;                   // the output rows of each expert, for backward
  std::vector<int32_t> route;    // of each place on users.index: its route
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
  void* lse;             // [B,T] in the type of sums, or null
  bool stream;           // the outputs are too large to be found in a cache by whoever reads them next
  // Backward only.
  const void* grad;  // [B,T,D]
  const void* grad_lse;
  void* dexperts;  // [B,E,D], or null
  bool into;       // dexperts is experts, contiguous, and takes the gradient through the activation that made them
  Activation through;
  void* dlogits;  // like logits, or null
  void* dfixed;   // [R] or [T,E,D] sums of these batch rows in the type of sums, or null
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
