// mix on a GPU: O[b,t,:] = sum_e A[b,t,e] H[b,e,:],  A = softmax(logits) + static.
//
// The operator moves few bytes a multiplication, so memory decides. Forward and backward read H once for all T rows:
// a block first computes the weights A of its batch rows into shared memory, then every thread owns 16 bytes of D,
// streams over the experts and keeps the sums of several task rows in registers. No atomics: the order of every sum is
// fixed by the shapes, and the same for every batch row.
//
// Weights and their gradients lie as [row][t][E rounded up to 4]: the four weights of a block of experts are one
// 16-byte broadcast. Where T * E floats do not fit in shared memory the same code runs over a scratch buffer in global
// memory (LARGE), one batch row at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "mix_args.cuh"

namespace mtl {

// A = softmax + static of rows [row0, row0 + rows): softmax_lanes lanes of a warp an output row. Each lane touches only
// its own experts' weights, so the three sweeps over them need no barrier.
__device__ inline void mix_softmax(const MixArgs& a, const MixWorkspace& ws, int64_t row0, int rows) {
  const int width = a.softmax_lanes, lane = threadIdx.x % width, pairs = rows * a.tasks;
  for (int base = 0; base < pairs; base += kMixThreads / width) {
    // Every lane of a warp takes part in the shuffles, those past the end with nothing to add.
    const int pair = base + static_cast<int>(threadIdx.x) / width;
    const bool active = pair < pairs;
    const int r = active ? pair / a.tasks : 0, t = active ? pair % a.tasks : 0, count = active ? a.experts : 0;
    const int64_t row = row0 + r;
    float* w = ws.weights + r * a.row_floats + static_cast<int64_t>(t) * a.blocks4 * kMixBlock;
    float scale = 0.0f;
    if (a.lse) {
      float highest = -INFINITY, sum = 0.0f;
      for (int e = lane; e < count; e += width) {
        const int cell = mix_cell(a, t, e);
        if (cell < 0) continue;
        w[e] = load_as_float(a.logits, a.logits_type, row * a.logits_row + cell);
        highest = fmaxf(highest, w[e]);
      }
      for (int off = width / 2; off; off /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, off));
      for (int e = lane; e < count; e += width) {
        if (mix_cell(a, t, e) < 0) continue;
        w[e] = expf(w[e] - highest);
        sum += w[e];
      }
      for (int off = width / 2; off; off /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, off);
      scale = 1.0f / sum;  // 1 exactly where a single expert is allowed; unused where none is
      if (active && lane == 0) a.lse[row * a.tasks + t] = isinf(highest) ? highest : highest + logf(sum);
    }
    for (int e = lane; e < count; e += width) {
      const int cell = mix_cell(a, t, e);
      if (cell >= 0) w[e] = (a.lse ? w[e] * scale : 0.0f) + mix_static(a, t, e, cell);
    }
  }
}

// CHUNK task rows a sweep over the experts. More rows sweep again, out of the first-level cache.
template <class S, int VEC, int CHUNK, bool LARGE>
__global__ void __launch_bounds__(kMixThreads, 4) mix_forward_kernel(const __grid_constant__ MixArgs a) {
  extern __shared__ float4 shared_memory[];
  const MixWorkspace ws = mix_workspace<LARGE>(a, shared_memory, false);
  const int vectors = static_cast<int>((a.width + VEC - 1) / VEC);
  const unsigned char* any = ws.allow + a.tasks * a.blocks4;
  mix_fill_allow(a, ws.allow);
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * a.rows; row0 < a.batch;
       row0 += static_cast<int64_t>(gridDim.x) * a.rows) {
    const int rows = static_cast<int>(a.batch - row0 < a.rows ? a.batch - row0 : a.rows);
    mix_softmax(a, ws, row0, rows);
    __syncthreads();  // the weights are complete
    for (int item = threadIdx.x; item < rows * vectors; item += kMixThreads) {
      const int r = item / vectors;
      const int64_t d = static_cast<int64_t>(item % vectors) * VEC;
      const S* h = static_cast<const S*>(a.h) + (row0 + r) * a.h_row + d;
      S* out = static_cast<S*>(a.out) + (row0 + r) * a.tasks * a.width + d;
      const float4* weights = reinterpret_cast<const float4*>(ws.weights + r * a.row_floats);
      for (int t0 = 0; t0 < a.tasks; t0 += CHUNK) {
        float sum[CHUNK][VEC] = {};
        for (int block = 0; block < a.blocks4; ++block) {
          float x[kMixBlock][VEC] = {};
#pragma unroll
          for (int j = 0; j < kMixBlock; ++j) {
            if (any[block] >> j & 1) load<VEC>(h + (block * kMixBlock + j) * a.h_expert, x[j]);
          }
#pragma unroll
          for (int i = 0; i < CHUNK; ++i) {
            if (t0 + i >= a.tasks) break;
            const int at = (t0 + i) * a.blocks4 + block;
            const unsigned bits = ws.allow[at];
            const float4 w = weights[at];
            const float weight[kMixBlock] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int j = 0; j < kMixBlock; ++j) {
              if (bits >> j & 1) {
#pragma unroll
                for (int k = 0; k < VEC; ++k) sum[i][k] += weight[j] * x[j][k];
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
          if (t0 + i < a.tasks) store<VEC>(out + (t0 + i) * a.width, sum[i]);
        }
      }
    }
    __syncthreads();  // the next rows' weights overwrite these
  }
}

// Sums of four values over groups of `lanes` lanes (4 to 32, a power of two); lane i of the group holds value i % 4.
// Halving the number of values while the first distances are crossed takes 6 shuffles for 32 lanes instead of 20.
__device__ inline float mix_reduce4(const float (&value)[4], int lanes) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  float low = odd ? value[1] : value[0], top = odd ? value[3] : value[2];
  low += __shfl_xor_sync(0xffffffffu, odd ? value[0] : value[1], 1);
  top += __shfl_xor_sync(0xffffffffu, odd ? value[2] : value[3], 1);
  float sum = high ? top : low;
  sum += __shfl_xor_sync(0xffffffffu, high ? low : top, 2);
  for (int off = 4; off < lanes; off *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, off);
  return sum;
}

__device__ inline float mix_dweight(const MixArgs& a, const MixWorkspace& ws, int r, int t, int e) {
  const float* at = ws.dweights + r * a.row_floats + static_cast<int64_t>(t) * a.blocks4 * kMixBlock + e;
  float sum = 0.0f;
  for (int w = 0; w < a.row_warps; ++w) sum += at[w * a.rows * a.row_floats];
  return sum;
}

// dlogits = P * (dA - sum_e P dA + dlse): P, not A, for the static part has no logit.
__device__ inline void mix_dlogits(const MixArgs& a, const MixWorkspace& ws, int64_t row0, int rows) {
  const int width = a.softmax_lanes, lane = threadIdx.x % width, pairs = rows * a.tasks;
  for (int base = 0; base < pairs; base += kMixThreads / width) {
    const int pair = base + static_cast<int>(threadIdx.x) / width;
    const bool active = pair < pairs;
    const int r = active ? pair / a.tasks : 0, t = active ? pair % a.tasks : 0, count = active ? a.experts : 0;
    const int64_t row = row0 + r, at = row * a.tasks + t;
    const float lse = active ? a.lse[at] : 0.0f;
    float mean = 0.0f;
    for (int e = lane; e < count; e += width) {
      const int cell = mix_cell(a, t, e);
      if (cell < 0) continue;
      const float p = expf(load_as_float(a.logits, a.logits_type, row * a.logits_row + cell) - lse);
      mean += p * mix_dweight(a, ws, r, t, e);
    }
    for (int off = width / 2; off; off /= 2) mean += __shfl_xor_sync(0xffffffffu, mean, off);
    const float dlse = active && a.grad_lse ? a.grad_lse[at] : 0.0f;
    for (int e = lane; e < count; e += width) {
      const int cell = mix_cell(a, t, e);
      if (cell < 0) {
        if (!a.columns) store_float(a.dlogits, a.logits_type, row * a.logits_row + t * a.experts + e, 0.0f);
        continue;
      }
      const int64_t i = row * a.logits_row + cell;
      const float p = expf(load_as_float(a.logits, a.logits_type, i) - lse);
      store_float(a.dlogits, a.logits_type, i, p * (mix_dweight(a, ws, r, t, e) - mean + dlse));
    }
  }
}

// One sweep over H: a group of lanes takes a batch row (or every row_warps-th slice of it), four experts at a time,
// and streams over the task rows, whose gradients come out of the first-level cache from the second block on.
template <class S, int VEC, bool LARGE>
__global__ void __launch_bounds__(kMixThreads, 4) mix_backward_kernel(const __grid_constant__ MixArgs a) {
  extern __shared__ float4 shared_memory[];
  const MixWorkspace ws = mix_workspace<LARGE>(a, shared_memory, true);
  const unsigned char* any = ws.allow + a.tasks * a.blocks4;
  const bool need_dweights = a.dlogits || a.partials;
  const int lane = threadIdx.x % a.lanes, group = threadIdx.x / a.lanes, groups = kMixThreads / a.lanes;
  const int64_t vectors = (a.width + VEC - 1) / VEC;
  float* partial = a.partials + blockIdx.x * a.num_static;
  mix_fill_allow(a, ws.allow);
  if (a.partials) {
    for (int64_t i = threadIdx.x; i < a.num_static; i += kMixThreads) partial[i] = 0.0f;
  }
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * a.rows; row0 < a.batch;
       row0 += static_cast<int64_t>(gridDim.x) * a.rows) {
    const int rows = static_cast<int>(a.batch - row0 < a.rows ? a.batch - row0 : a.rows);
    if (a.dlogits && a.columns) {  // a packed column that no (t, e) names has gradient 0
      for (int64_t i = threadIdx.x; i < rows * a.logits_row; i += kMixThreads) {
        store_float(a.dlogits, a.logits_type, row0 * a.logits_row + i, 0.0f);
      }
    }
    const int cells = a.tasks * a.experts;
    for (int i = threadIdx.x; a.dexperts && i < rows * cells; i += kMixThreads) {
      const int r = i / cells, t = i % cells / a.experts, e = i % a.experts, cell = mix_cell(a, t, e);
      if (cell < 0) continue;
      float weight = mix_static(a, t, e, cell);
      if (a.lse) {
        const float logit = load_as_float(a.logits, a.logits_type, (row0 + r) * a.logits_row + cell);
        weight += expf(logit - a.lse[(row0 + r) * a.tasks + t]);
      }
      ws.weights[r * a.row_floats + static_cast<int64_t>(t) * a.blocks4 * kMixBlock + e] = weight;
    }
    __syncthreads();  // the weights are complete

    for (int base = 0; base < rows * a.row_warps; base += groups) {
      // The lanes of a warp stay together for the shuffles, those without a row as well.
      const int item = base + group;
      const bool active = item < rows * a.row_warps;
      const int r = active ? item / a.row_warps : 0, slice0 = item % a.row_warps;
      const S* h = static_cast<const S*>(a.h) + (row0 + r) * a.h_row;
      const S* grad = static_cast<const S*>(a.grad) + (row0 + r) * a.g_row;
      S* dh = static_cast<S*>(a.dexperts) + (row0 + r) * a.experts * a.width;
      const float4* weights = reinterpret_cast<const float4*>(ws.weights + r * a.row_floats);
      float* dweights = ws.dweights + (static_cast<int64_t>(slice0) * a.rows + r) * a.row_floats;
      for (int block = 0; block < a.blocks4; ++block) {
        // At least one slice, so that D = 0 leaves dA = 0 rather than nothing.
        for (int64_t slice = slice0; slice == slice0 || slice * a.lanes < vectors; slice += a.row_warps) {
          const int64_t d = (slice * a.lanes + lane) * VEC;
          const bool inside = active && d < a.width;
          float x[kMixBlock][VEC] = {}, sum[kMixBlock][VEC] = {};
#pragma unroll
          for (int j = 0; j < kMixBlock; ++j) {
            if (inside && need_dweights && any[block] >> j & 1)
              load<VEC>(h + (block * kMixBlock + j) * a.h_expert + d, x[j]);
          }
          for (int t = 0; t < a.tasks; ++t) {
            const unsigned bits = ws.allow[t * a.blocks4 + block];
            if (!bits) continue;  // the same for the whole block of threads
            float g[VEC] = {};
            if (inside) load<VEC>(grad + t * a.g_task + d, g);
            if (a.dexperts) {
              const float4 w = weights[t * a.blocks4 + block];
              const float weight[kMixBlock] = {w.x, w.y, w.z, w.w};
#pragma unroll
              for (int j = 0; j < kMixBlock; ++j) {
                if (bits >> j & 1) {
#pragma unroll
                  for (int k = 0; k < VEC; ++k) sum[j][k] += weight[j] * g[k];
                }
              }
            }
            if (need_dweights) {
              float dot[kMixBlock] = {};
#pragma unroll
              for (int j = 0; j < kMixBlock; ++j) {
#pragma unroll
                for (int k = 0; k < VEC; ++k) dot[j] += g[k] * x[j][k];
              }
              const float total = mix_reduce4(dot, a.lanes);
              if (active && lane < kMixBlock) {
                float* at = dweights + (static_cast<int64_t>(t) * a.blocks4 + block) * kMixBlock + lane;
                *at = slice == slice0 ? total : *at + total;
              }
            }
          }
          if (inside && a.dexperts) {
#pragma unroll
            for (int j = 0; j < kMixBlock; ++j) {
              const int e = block * kMixBlock + j;
              if (e < a.experts) store<VEC>(dh + e * a.width + d, sum[j]);
            }
          }
        }
      }
    }
    __syncthreads();  // dA is complete
    if (a.dlogits) mix_dlogits(a, ws, row0, rows);
    for (int i = threadIdx.x; a.partials && i < cells; i += kMixThreads) {
      const int t = i / a.experts, e = i % a.experts, cell = mix_cell(a, t, e);
      const int at = cell < 0 ? -1 : mix_static_index(a, t, e, cell);
      if (at < 0) continue;
      float sum = partial[at];
      for (int r = 0; r < rows; ++r) sum += mix_dweight(a, ws, r, t, e);
      partial[at] = sum;
    }
    // No barrier: up to the next one only weights are written, and those have had their last reader.
  }
}

}  // namespace mtl
