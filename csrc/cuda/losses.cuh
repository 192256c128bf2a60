// The losses on a GPU: loss and gradient of every number in one pass over [B,T]; esmm_loss is [B,1] with two logits.
//
// Memory decides. Neighbouring threads take neighbouring numbers, and a thread stays with one task, so that it keeps
// that task's sum in a register; a block adds its threads' sums up as a tree, and sum_partials.cuh the blocks'. The
// order of every sum is fixed by the shape.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/losses.h"
#include "scalar.cuh"

namespace mtl {

constexpr int kLossThreads = 256;
constexpr int kLossUnroll = 4;       // rows a thread has in flight
constexpr int64_t kLossRows = 64;    // rows a thread adds up in float32; with more, the blocks' sums would round less
constexpr int64_t kLossWave = 1056;  // blocks that are resident at a time, 8 for each of 132 multiprocessors

struct LossMath {
  static MTL_ROW float exp(float x) { return expf(x); }
  static MTL_ROW float log1p(float x) { return log1pf(x); }
};

// Labels and masks: the types of Scalar, by the same numbers, and integers. bool is read as u8.
enum class LabelType : int { f32, f16, bf16, f64, u8, i32, i64 };

struct Labels {
  const void* data;
  LabelType type;
};

__device__ inline float load_label(const Labels& labels, int64_t i) {
  switch (labels.type) {
    case LabelType::u8:
      return static_cast<const unsigned char*>(labels.data)[i];
    case LabelType::i32:
      return static_cast<float>(static_cast<const int*>(labels.data)[i]);
    case LabelType::i64:
      return static_cast<float>(static_cast<const int64_t*>(labels.data)[i]);
    default:
      return load_as_float(labels.data, static_cast<Scalar>(labels.type), i);
  }
}

// How a block lies on [B,T]: `rows` (a power of two) by `cols` threads.
struct LossPlan {
  int64_t batch, tasks;
  int cols, rows;
  int64_t tiles, row_blocks;
  int64_t blocks() const { return tiles * row_blocks; }
};

inline LossPlan plan_loss(int64_t batch, int64_t tasks) {
  LossPlan plan{batch, tasks, 1, 1, 0, 0};
  if (batch == 0 || tasks == 0) return plan;
  plan.tiles = (tasks + kLossThreads - 1) / kLossThreads;
  plan.cols = static_cast<int>((tasks + plan.tiles - 1) / plan.tiles);
  while (2 * plan.rows * plan.cols <= kLossThreads) plan.rows *= 2;
  const auto blocks_of = [&](int64_t rows) { return (batch + plan.rows * rows - 1) / (plan.rows * rows); };
  const int64_t wave = plan.tiles < kLossWave ? kLossWave / plan.tiles : 1;
  const int64_t fewest = blocks_of(kLossRows), most = blocks_of(kLossUnroll);
  plan.row_blocks = most < wave ? most : fewest > wave ? fewest : wave;
  return plan;
}

// One thread's numbers: `task` of rows row, row + step, ...; none where row is the batch size.
struct LossPlace {
  int64_t row, step, task;
};

__device__ inline LossPlace loss_place(const LossPlan& p) {
  const int64_t task = blockIdx.x % p.tiles * p.cols + threadIdx.x % p.cols, r = threadIdx.x / p.cols;
  const bool active = r < p.rows && task < p.tasks;
  return {active ? blockIdx.x / p.tiles * p.rows + r : p.batch, p.row_blocks * p.rows, task};
}

// partials [row_blocks, T]: this block's sum of `value` for each of its tasks.
__device__ inline void loss_block_sum(const LossPlan& p, float value, float* partials) {
  extern __shared__ float4 shared_memory[];
  float* sums = reinterpret_cast<float*>(shared_memory);
  const int i = threadIdx.x, r = i / p.cols;
  sums[i] = value;
  __syncthreads();  // every thread's sum is there
  for (int half = p.rows / 2; half > 0; half /= 2) {
    if (r < half) sums[i] += sums[i + half * p.cols];
    __syncthreads();  // this level of the tree is complete
  }
  const int64_t task = blockIdx.x % p.tiles * p.cols + i % p.cols;
  if (r == 0 && task < p.tasks) partials[blockIdx.x / p.tiles * p.tasks + task] = sums[i];
}

struct EsmmArgs {
  LossPlan plan;  // of [B,1]
  const void *ctr, *cvr;
  Labels click, conversion;
  float weight, scale;  // scale: 1 / B
  float *dctr, *dcvr, *partials;
};

template <class S>
__global__ void __launch_bounds__(kLossThreads) esmm_loss_kernel(const __grid_constant__ EsmmArgs args) {
  const LossPlace place = loss_place(args.plan);
  float sum = 0.0f;
  for (int64_t row0 = place.row; row0 < args.plan.batch; row0 += kLossUnroll * place.step) {
    float a[kLossUnroll], c[kLossUnroll], y[kLossUnroll], z[kLossUnroll];
#pragma unroll
    for (int k = 0; k < kLossUnroll; ++k) {
      const int64_t i = row0 + k * place.step;
      if (i >= args.plan.batch) continue;
      a[k] = to_float(static_cast<const S*>(args.ctr)[i]);
      c[k] = to_float(static_cast<const S*>(args.cvr)[i]);
      y[k] = load_label(args.click, i);
      z[k] = load_label(args.conversion, i);
    }
#pragma unroll
    for (int k = 0; k < kLossUnroll; ++k) {
      const int64_t i = row0 + k * place.step;
      if (i >= args.plan.batch) continue;
      const bool fits = is_label(y[k]) && is_label(z[k]) && !(z[k] > 0.0f && y[k] == 0.0f);
      const EsmmRow<float> row = esmm_row<LossMath>(a[k], c[k], fits ? y[k] : NAN, z[k], args.weight);
      sum += row.loss;
      args.dctr[i] = row.da * args.scale;
      args.dcvr[i] = row.dc * args.scale;
    }
  }
  loss_block_sum(args.plan, sum * args.scale, args.partials);
}

struct BceArgs {
  LossPlan plan;
  const void* logits;
  Labels labels, mask;  // mask.data may be null: all 1
  const float* totals;  // [T], each task's sum of the mask; null without one
  float *dlogits, *partials;
};

// The mask's sums. A weight that is negative or NaN makes its task's sum, and so all that comes of it, NaN.
static __global__ void __launch_bounds__(kLossThreads) mask_sum_kernel(const __grid_constant__ BceArgs args) {
  const LossPlace place = loss_place(args.plan);
  float sum = 0.0f;
  for (int64_t row = place.row; row < args.plan.batch; row += place.step) {
    const float w = load_label(args.mask, row * args.plan.tasks + place.task);
    sum += w >= 0.0f ? w : NAN;
  }
  loss_block_sum(args.plan, sum, args.partials);
}

template <class S>
__global__ void __launch_bounds__(kLossThreads) masked_bce_kernel(const __grid_constant__ BceArgs args) {
  const LossPlace place = loss_place(args.plan);
  const int64_t batch = args.plan.batch, tasks = args.plan.tasks;
  float total = args.totals && place.row < batch ? args.totals[place.task] : static_cast<float>(batch);
  if (isinf(total)) total = NAN;  // a share of it would be a wrong 0
  float sum = 0.0f;
  for (int64_t row0 = place.row; row0 < batch; row0 += kLossUnroll * place.step) {
    float x[kLossUnroll] = {}, y[kLossUnroll] = {}, w[kLossUnroll] = {};
#pragma unroll
    for (int k = 0; k < kLossUnroll; ++k) {
      const int64_t row = row0 + k * place.step, i = row * tasks + place.task;
      if (row >= batch) continue;
      w[k] = args.mask.data ? load_label(args.mask, i) : 1.0f;
      if (w[k] == 0.0f) continue;
      x[k] = to_float(static_cast<const S*>(args.logits)[i]);
      y[k] = load_label(args.labels, i);
    }
#pragma unroll
    for (int k = 0; k < kLossUnroll; ++k) {
      const int64_t row = row0 + k * place.step, i = row * tasks + place.task;
      if (row >= batch) continue;
      const float share = w[k] == 0.0f ? 0.0f : w[k] / total;
      const BceRow<float> one = bce_row<LossMath>(x[k], is_label(y[k]) ? y[k] : NAN);
      sum += share * one.loss;
      args.dlogits[i] = share * one.slope;
    }
  }
  loss_block_sum(args.plan, sum, args.partials);
}

// to = grad * from, grad [T]; once or twice. Where from is 0 so is to: above a masked number grad may be infinite.
struct ScaleArgs {
  LossPlan plan;
  const float *grad, *from[2];
  float* to[2];
};

static __global__ void __launch_bounds__(kLossThreads) loss_scale_kernel(const __grid_constant__ ScaleArgs args) {
  const LossPlace place = loss_place(args.plan);
  if (place.row >= args.plan.batch) return;
  const float grad = args.grad[place.task];
  for (int64_t row = place.row; row < args.plan.batch; row += place.step) {
    const int64_t i = row * args.plan.tasks + place.task;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!args.from[k]) continue;
      const float d = args.from[k][i];
      args.to[k][i] = d == 0.0f ? 0.0f : grad * d;
    }
  }
}

}  // namespace mtl
