// The kernels of partitioned_norm that depend on the instruction set, and the plan they follow.
//
// Rows are grouped by domain and cut into chunks. A domain of one chunk is finished in a single sweep, its rows still
// in a cache; others take two sweeps over memory with a merge of the chunks' partial results in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "types.h"

namespace mtl {

// Rows of a chunk and columns of a block, which is what a task takes: 128 KiB of float32.
constexpr int64_t kNormRows = 128, kNormColumns = 256;

struct NormDomain {
  int64_t id, rows;
  int64_t first, chunks;  // chunks [first, first + chunks) are its rows
  bool batch;             // its statistics come from these rows, and change with them
};

struct NormChunk {
  int64_t domain;      // place in NormPlan::domains
  int64_t begin, end;  // places in NormPlan::rows
};

struct NormPlan {
  std::vector<int64_t> rows;        // row numbers, domain by domain, each domain's in the batch's order
  std::vector<NormDomain> domains;  // those present
  std::vector<NormChunk> chunks;
};

// One call's memory. What has no type here is in the type of sums; columns are dense everywhere.
struct NormArgs {
  const NormPlan* plan;
  int64_t width;
  double eps;
  const void* x;                                            // storage type, as grad and out
  int64_t x_row;                                            // stride in elements
  const void *weight, *bias, *domain_weight, *domain_bias;  // [D], [P,D]
  void *mean, *var;                                         // [P,D]: filled in by forward where a domain is `batch`
  void* partial;                                            // [chunks,2,D]
  void* out;                                                // y or dx [B,D]; null where dx is not needed
  // Backward only.
  const void* grad;
  int64_t grad_row;
  void *sum, *product;  // [P,D]: sums of grad and of grad * xhat over each domain; null where nothing needs them
};

// A chunk or a domain by its place in the plan, and a block of columns; `memory` holds scratch_bytes. The order is
// first for all chunks, merge for all domains, last for all chunks; each skips what is not its work.
struct NormSweep {
  void (*first)(const NormArgs&, int64_t chunk, int64_t block, void* memory);
  void (*merge)(const NormArgs&, int64_t domain, int64_t block, void* memory);
  void (*last)(const NormArgs&, int64_t chunk, int64_t block, void* memory);
};

struct NormKernels {
  std::size_t scratch_bytes;
  NormSweep forward, backward;
};

struct NormTable {
  NormKernels by_storage[4];
};

#define MTL_DECLARE_NORM(ISA)          \
  namespace ISA {                      \
  extern const NormTable norm_kernels; \
  }
MTL_FOR_EACH_ISA(MTL_DECLARE_NORM)
#undef MTL_DECLARE_NORM

}  // namespace mtl
