// From filled GroupedNormArgs to kernels on a stream. Kept apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH(kernel, blocks, threads, shared_bytes, stream, arguments...) to be defined before.
#pragma once

#include "partitioned_norm.cuh"
#include "partitioned_norm_backward.cuh"
#include "sum_partials.cuh"

namespace mtl {

// Columns a thread moves at once: 16 bytes if every row of every tensor starts at a multiple of 16, else one.
inline int norm_vec(const GroupedNormArgs& a, int element_bytes) {
  const int64_t vec = 16 / element_bytes;
  const uint64_t pointers =
      reinterpret_cast<uint64_t>(a.x) | reinterpret_cast<uint64_t>(a.grad) | reinterpret_cast<uint64_t>(a.out);
  const bool aligned = pointers % 16 == 0 && a.width % vec == 0 && a.x_row % vec == 0 && a.grad_row % vec == 0;
  return aligned ? static_cast<int>(vec) : 1;
}

// The block's shape, the chunks' size and the grid, of the batch's size and the width alone. The caller then allocates
// a.slots * 2 * a.width floats of partial results.
inline void plan_norm(GroupedNormArgs& a, int vec) {
  constexpr int64_t kLeast = 32, kChunks = 256;  // rows a chunk; chunks of a large batch: two blocks a multiprocessor
  const int64_t vectors = (a.width + vec - 1) / vec;
  a.lanes = 1;
  while (a.lanes < 32 && a.lanes < vectors) a.lanes *= 2;
  a.ways = kNormThreads / a.lanes < 32 ? kNormThreads / a.lanes : 32;
  a.tiles = (vectors + a.lanes - 1) / a.lanes;
  a.rows = (a.batch + kChunks - 1) / kChunks;
  if (a.rows < kLeast) a.rows = kLeast;
  a.slots = domain_slots(a, a.rows);
}

// At least one block a domain: it counts the rows, also where there are no columns.
inline int64_t merge_blocks(const GroupedNormArgs& a) {
  return a.domains * (a.width > 0 ? (a.width + kMergeColumns - 1) / kMergeColumns : 1);
}

#define MTL_NORM_CHUNKS(kernel, floats)                                                                  \
  do {                                                                                                   \
    if (a.tiles == 0) break; /* no columns */                                                            \
    const int threads = a.lanes * a.ways;                                                                \
    if (norm_vec(a, sizeof(S)) > 1) {                                                                    \
      constexpr int kVec = 16 / sizeof(S);                                                               \
      MTL_LAUNCH((kernel<S, kVec>), a.slots * a.tiles, threads, threads * kVec * floats * 4, stream, a); \
    } else {                                                                                             \
      MTL_LAUNCH((kernel<S, 1>), a.slots * a.tiles, threads, threads * floats * 4, stream, a);           \
    }                                                                                                    \
  } while (0)

constexpr int kMergeShared = 2 * kMergeColumns * kMergeSlices * sizeof(double);

// In training order and bound hold the groups, and partial has room; outside neither is read.
template <class S, class Stream>
void launch_norm_forward(GroupedNormArgs a, Stream stream) {
  if (a.training) MTL_NORM_CHUNKS(norm_statistics_kernel, 2);
  MTL_LAUNCH((norm_merge_kernel<S>), merge_blocks(a), kMergeColumns * kMergeSlices, kMergeShared, stream, a);
  if (a.training) {
    MTL_NORM_CHUNKS(norm_forward_kernel, 0);
  } else {
    plan_norm(a, 1);
    a.rows = a.ways * 4;
    const int64_t blocks = (a.batch + a.rows - 1) / a.rows * a.tiles;
    if (blocks) MTL_LAUNCH((norm_rows_kernel<S>), blocks, a.lanes * a.ways, 0, stream, a);
  }
}

template <class S, class Stream>
void launch_norm_backward(const GroupedNormArgs& a, Stream stream) {
  if (a.total) {
    MTL_NORM_CHUNKS(norm_sums_kernel, 2);
    MTL_LAUNCH(norm_merge_sums_kernel, merge_blocks(a), kMergeColumns * kMergeSlices, kMergeShared, stream, a);
  }
  if (a.out) MTL_NORM_CHUNKS(norm_backward_kernel, 0);
}

#undef MTL_NORM_CHUNKS

}  // namespace mtl
