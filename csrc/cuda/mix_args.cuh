// What both kernels of mix share: their arguments, the choice of a launch, and where a weight lies.
#pragma once

#include <cstdint>

#include "scalar.cuh"

namespace mtl {

// Small blocks: many independent ones a multiprocessor hide each other's barriers. At least four of them must fit (the
// second launch bound): 512 threads with four 16-byte loads each cover the latency of memory at full bandwidth.
constexpr int kMixThreads = 128;
constexpr int kMixBlock = 4;       // experts in flight a thread: four 16-byte loads before the first is needed
constexpr int kMixMaxUnits = 256;  // unit boundaries travel as a kernel argument; no copy to the device, no sync

struct MixArgs {
  int64_t batch, width;
  int tasks, experts, blocks4;  // blocks4: blocks of four experts, ceil(E / 4)
  // Inputs. H and grad may be strided, with D contiguous; strides in elements.
  const void *h, *grad;
  int64_t h_row, h_expert, g_row, g_task;
  const void *logits, *stat;
  Scalar logits_type, stat_type;
  int64_t logits_row;  // T * E, or R when packed
  const unsigned char* mask;
  const int* columns;
  const float* grad_lse;
  bool native;
  int unit_begin[kMixMaxUnits + 1];
  // Outputs. lse is an input of backward; it is null without logits, whose own pointer is also null when E is zero.
  void *out, *dexperts, *dlogits;
  float *lse, *partials;
  int64_t num_static;
  // Launch: see plan_mix.
  int rows, lanes, row_warps, softmax_lanes;
  int64_t row_floats, scratch_floats;
  float* scratch;
};

struct MixPlan {
  bool large;
  int rows, lanes, row_warps, softmax_lanes, shared_bytes;
  int64_t blocks, row_floats, scratch_floats;
};

// Launch configuration, a pure function of the shape. vec: elements of D a thread moves at a time.
inline MixPlan plan_mix(int64_t batch, int64_t tasks, int64_t experts, int64_t width, int vec, bool backward,
                        int64_t num_static) {
  constexpr int64_t kShared = 48 * 1024;       // what every device grants without opting in
  constexpr int64_t kComfort = 32 * 1024;      // several blocks a multiprocessor stay resident below this
  constexpr int64_t kSpread = 264;             // two blocks for each of the 132 multiprocessors of an H200
  constexpr int64_t kPartialBlocks = 2048;     // enough for three waves, few enough for the summing kernel
  constexpr int64_t kPartialFloats = 4 << 20;  // 16 MiB of partial sums at most, as long as 128 blocks remain
  MixPlan plan{};
  const int64_t vectors = (width + vec - 1) / vec, blocks4 = (experts + 3) / 4;
  // Four floats of padding: rows that share a warp then start in different banks.
  plan.row_floats = tasks * blocks4 * 4 + 4;
  plan.softmax_lanes = 1;
  while (plan.softmax_lanes < 32 && plan.softmax_lanes < experts) plan.softmax_lanes *= 2;
  // Backward reduces over D inside a warp: 4 to 32 lanes a row, and several warps a row when D is wide.
  plan.lanes = 4;
  while (plan.lanes < 32 && plan.lanes < vectors) plan.lanes *= 2;
  plan.row_warps = 1;
  while (backward && plan.row_warps < kMixThreads / 32 && plan.row_warps * 32 < vectors) plan.row_warps *= 2;
  const int64_t slots = backward ? 1 + plan.row_warps : 1;  // A, then one dA for each warp of the row
  const int64_t allow_bytes = (tasks + 1) * blocks4, bytes = slots * plan.row_floats * 4;

  const int64_t lanes = backward ? plan.lanes * plan.row_warps : vectors;
  int64_t rows = lanes < kMixThreads ? kMixThreads / (lanes ? lanes : 1) : 1;
  if (rows > (batch + kSpread - 1) / kSpread) rows = (batch + kSpread - 1) / kSpread;
  if (rows * bytes + allow_bytes > kComfort) rows = (kComfort - allow_bytes) / bytes;
  plan.rows = static_cast<int>(rows < 1 ? 1 : rows);
  const int64_t shared = plan.rows * bytes + allow_bytes;
  plan.large = shared > kShared;
  plan.shared_bytes = plan.large ? 0 : static_cast<int>((shared + 15) / 16 * 16);
  plan.scratch_floats = plan.large ? (shared + 15) / 16 * 4 : 0;

  plan.blocks = (batch + plan.rows - 1) / plan.rows;
  int64_t most = plan.large ? kSpread : INT32_MAX;
  if (num_static > 0) {
    int64_t fit = kPartialFloats / num_static;
    fit = fit < 128 ? 128 : fit > kPartialBlocks ? kPartialBlocks : fit;
    most = fit < most ? fit : most;
  }
  if (plan.blocks > most) plan.blocks = most;
  return plan;
}

// Where (t, e) lies in a batch row of logits; -1 where row t may not use expert e.
__device__ inline int mix_cell(const MixArgs& a, int t, int e) {
  const int dense = t * a.experts + e;
  if (a.columns) return a.columns[dense];
  return a.mask && !a.mask[dense] ? -1 : dense;
}

// Where the static weight of an allowed (t, e) lies; -1 where it has none.
__device__ inline int mix_static_index(const MixArgs& a, int t, int e, int cell) {
  if (a.native) return e >= a.unit_begin[t] && e < a.unit_begin[t + 1] ? e : -1;
  return a.stat ? cell : -1;
}

__device__ inline float mix_static(const MixArgs& a, int t, int e, int cell) {
  const int i = mix_static_index(a, t, e, cell);
  return i < 0 ? 0.0f : a.stat ? load_as_float(a.stat, a.stat_type, i) : 1.0f;
}

struct MixWorkspace {
  float *weights, *dweights;  // [rows][T][E4], each batch row padded to row_floats; dweights [row_warps][rows][T][E4]
  unsigned char* allow;       // [T + 1][blocks4], one bit an expert; the last row is the union over t
};

template <bool LARGE>
__device__ inline MixWorkspace mix_workspace(const MixArgs& a, float4* shared, bool backward) {
  float* base =
      LARGE ? a.scratch + static_cast<int64_t>(blockIdx.x) * a.scratch_floats : reinterpret_cast<float*>(shared);
  const int64_t floats = a.rows * a.row_floats;
  return {base, base + floats, reinterpret_cast<unsigned char*>(base + floats * (backward ? 1 + a.row_warps : 1))};
}

// A masked expert must not reach a sum even as 0 * NaN, so weights alone do not do: each use is switched by a bit.
__device__ inline void mix_fill_allow(const MixArgs& a, unsigned char* allow) {
  const int n = (a.tasks + 1) * a.blocks4;
  for (int i = threadIdx.x; i < n; i += kMixThreads) {
    const int row = i / a.blocks4, first = row < a.tasks ? row : 0, last = row < a.tasks ? row + 1 : a.tasks;
    unsigned bits = 0;
    for (int t = first; t < last; ++t) {
      for (int j = 0; j < kMixBlock; ++j) {
        const int e = i % a.blocks4 * kMixBlock + j;
        if (e < a.experts && mix_cell(a, t, e) >= 0) bits |= 1u << j;
      }
    }
    allow[i] = static_cast<unsigned char>(bits);
  }
}

}  // namespace mtl
