// snr_linear on a GPU: every pair of sub-networks is an expert_linear of its own, and a tile sums over the pairs of its
// row or column that are open. Each block of threads reads their gates itself: a closed pair is neither loaded nor
// multiplied, and the host never waits to know which.
//
//   forward   Y_i  [B, N] = sum_j gate_ij X_j  W_ij^T    bias and activation on the sums, in registers
//   dX        dX_j [B, K] = sum_i gate_ij dZ_i W_ij
//   dW        S_ij [N, K] = dZ_i^T X_j, dW_ij = gate_ij S_ij, dgate_ij = <W_ij, S_ij>, before the tile leaves registers
//
// Gates multiply float32 products, so that nothing is rounded twice and no gated weight is stored. The order of every
// sum depends on the shapes and on which gates are closed.
#pragma once

#include "expert_linear.cuh"
#include "gemm_pipeline.cuh"
#include "snr_linear_args.cuh"

namespace mtl {

__device__ inline float snr_gate(const SnrArgs& a, int i, int j) {
  return load_as_float(a.gate, a.gate_type, static_cast<int64_t>(i) * a.lower + j);
}

// A NaN is no 0.
__device__ inline bool snr_open(const SnrArgs& a, float gate) { return !(a.skip && gate == 0.0f); }

// A block's part of the work, as its tile of expert_linear, and its sub-networks: forward has the upper one alone, dX
// the lower one.
struct SnrPart {
  LinearPart tile;
  int upper, lower;
};

template <class TILE, LinearProduct PRODUCT>
__device__ inline SnrPart snr_part(const SnrArgs& a) {
  constexpr bool kForward = PRODUCT == LinearProduct::kForward;
  const int outputs = static_cast<int>(a.outputs), width = kForward ? outputs : static_cast<int>(a.features);
  const int across = width > TILE::kN ? (width - 1) / TILE::kN + 1 : 1;
  const int block = static_cast<int>(blockIdx.x);
  SnrPart part{};
  part.tile.columns = outputs;
  // Neighbouring blocks share their rows: x, or the gradient, comes from memory once and from the cache afterwards.
  part.tile.column0 = block % across * TILE::kN;
  int line = block / across;
  if constexpr (PRODUCT == LinearProduct::kWeight) {
    const int down = (outputs - 1) / TILE::kM + 1, lower = a.lower > 0 ? a.lower : 1;
    part.tile.row0 = line % down * TILE::kM;
    line /= down;
    part.lower = line % lower;
    line /= lower;
    part.upper = line % a.upper;
    part.tile.slice = line / a.upper;
  } else {
    const int members = kForward ? a.upper : a.lower;
    (kForward ? part.upper : part.lower) = line % members;
    part.tile.row0 = line / members * TILE::kM;
  }
  part.tile.unit = part.lower;
  part.tile.columns0 = part.upper * outputs;
  return part;
}

// Where expert_linear would find the operands of the pair.
template <class S, LinearProduct PRODUCT>
__device__ inline Operand<S> snr_left(const SnrArgs& a, LinearPart tile, int upper, int lower) {
  tile.unit = lower;
  tile.columns0 = upper * static_cast<int>(a.outputs);
  return linear_left<S, PRODUCT>(a, tile);
}
template <class S, LinearProduct PRODUCT>
__device__ inline Operand<S> snr_right(const SnrArgs& a, LinearPart tile, int upper, int lower, int depth) {
  tile.unit = lower;
  tile.columns0 = (upper * a.lower + lower) * static_cast<int>(a.outputs);
  return linear_right<S, PRODUCT>(a, tile, depth);
}

template <class S, class TILE, LinearProduct PRODUCT>
using SnrPipeline = GemmPipeline<S, TILE, PRODUCT == LinearProduct::kWeight, PRODUCT != LinearProduct::kForward>;

// Forward and dX. Exact float32 keeps more numbers on their way; it gets the registers of one block fewer.
template <class S, class TILE, LinearProduct PRODUCT>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks - (sizeof(S) == 4))
    snr_sum_kernel(const __grid_constant__ SnrArgs a) {
  extern __shared__ float4 shared_memory[];
  using Pipeline = SnrPipeline<S, TILE, PRODUCT>;
  constexpr bool kForward = PRODUCT == LinearProduct::kForward;
  const SnrPart part = snr_part<TILE, PRODUCT>(a);
  const int pairs = kForward ? a.lower : a.upper, depth = static_cast<int>(kForward ? a.features : a.outputs);
  const auto upper = [&](int q) { return kForward ? part.upper : q; };
  const auto lower = [&](int q) { return kForward ? q : part.lower; };
  const auto gate_of = [&](int q) { return snr_gate(a, upper(q), lower(q)); };
  const auto next = [&](int q) {
    do ++q;
    while (q < pairs && !snr_open(a, gate_of(q)));
    return q;
  };
  float sum[TILE::kTilesM][TILE::kTilesN][4] = {}, product[TILE::kTilesM][TILE::kTilesN][4] = {};
  Pipeline::run(
      reinterpret_cast<unsigned char*>(shared_memory), next(-1), pairs,
      (depth + Pipeline::kDepth - 1) / Pipeline::kDepth, a.activation, next,
      [&](int q) { return snr_left<S, PRODUCT>(a, part.tile, upper(q), lower(q)); },
      [&](int q) { return snr_right<S, PRODUCT>(a, part.tile, upper(q), lower(q), depth); },
      [](const unsigned char*) {},
      [&](int q) {
        const float gate = gate_of(q);
#pragma unroll
        for (int i = 0; i < TILE::kTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sum[i][j][k] += gate * product[i][j][k];
              product[i][j][k] = 0.0f;
            }
          }
        }
      },
      product);
  linear_finish<S, TILE, PRODUCT>(a, part.tile, sum);
}

// Stores gate * c, and returns this thread's part of <W, c>. A closed pair leaves zeros, whatever c is.
template <class S, class TILE>
__device__ inline float snr_finish_block(const SnrArgs& a, const SnrPart& p, bool open,
                                         float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
  const Place<TILE> at;
  const int rows = p.tile.columns - p.tile.row0, columns = static_cast<int>(a.features) - p.tile.column0;
  const int64_t block = static_cast<int64_t>(p.upper) * a.lower + p.lower;
  const int64_t corner = (block * a.outputs + p.tile.row0) * a.features + p.tile.column0;
  const int64_t offset = p.tile.slice * (a.lower * a.columns * a.features) + corner;
  const float gate = open ? snr_gate(a, p.upper, p.lower) : 0.0f;  // read again: a register fewer in the product
  const auto weight_at = [&](int64_t n) {
    return a.given_type == Scalar::f32 ? static_cast<const float*>(a.given_weight)[n]
                                       : to_float(static_cast<const S*>(a.given_weight)[n]);
  };
  float product = 0.0f;
  each_strip<TILE>(c, [&](int i, float (&strip)[TILE::kTilesN][4]) {
#pragma unroll
    for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = at.row(i, k), column = at.column(j, k);
        if (open && a.products && row < rows && column < columns) {
          product += weight_at(corner + row * a.features + column) * strip[j][k];
        }
        strip[j][k] = open ? gate * strip[j][k] : 0.0f;
      }
    }
    if (a.out == nullptr) return;
    if (a.exact) {
      store_strip<float, TILE>(strip, i, static_cast<float*>(a.out) + offset, a.features, rows, columns);
    } else {
      store_strip<S, TILE>(strip, i, static_cast<S*>(a.out) + offset, a.features, rows, columns);
    }
  });
  return product;
}

// dW and the tile's <W, S>; one pair of every upper sub-network also sums dZ, which is dbias.
template <class S, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks - (sizeof(S) == 4))
    snr_weight_kernel(const __grid_constant__ SnrArgs a) {
  extern __shared__ float4 shared_memory[];
  constexpr LinearProduct kProduct = LinearProduct::kWeight;
  using Pipeline = SnrPipeline<S, TILE, kProduct>;
  const SnrPart part = snr_part<TILE, kProduct>(a);
  const bool open = a.lower > 0 && snr_open(a, snr_gate(a, part.upper, part.lower));
  bool sum_columns = a.dbias != nullptr && part.tile.column0 == 0;
  if (sum_columns) {  // the first open pair does, for it has dZ at hand; if none is open, the first
    int first = 0;
    while (first < a.lower && !snr_open(a, snr_gate(a, part.upper, first))) ++first;
    sum_columns = part.lower == (first < a.lower ? first : 0);
  }

  const int rows_left = static_cast<int>(a.batch) - part.tile.slice * a.slice_rows;
  const int depth = rows_left < a.slice_rows ? rows_left : a.slice_rows;
  const int steps = open || sum_columns ? (depth + Pipeline::kDepth - 1) / Pipeline::kDepth : 0;
  float c[TILE::kTilesM][TILE::kTilesN][4] = {};
  ColumnSums<S, typename Pipeline::Left, TILE::kM, TILE::kThreads> sums;
  Pipeline::run(
      reinterpret_cast<unsigned char*>(shared_memory), 0, 1, steps, a.activation, [](int) { return 1; },
      [&](int) { return snr_left<S, kProduct>(a, part.tile, part.upper, part.lower); },
      [&](int) {
        Operand<S> right = snr_right<S, kProduct>(a, part.tile, part.upper, part.lower, depth);
        if (!open) right.size = 0;  // nothing of a closed pair is read
        return right;
      },
      [&](const unsigned char* panel) {
        if (sum_columns) sums.add(panel);
      },
      [](int) {}, c);
  float product = snr_finish_block<S, TILE>(a, part, open, c);
  if (!sum_columns && a.products == nullptr) return;

  auto* shared = reinterpret_cast<float*>(shared_memory);
  float* warps = shared + TILE::kThreads;  // behind what the column sums take
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(0xffffffffu, product, distance);
  __syncthreads();  // the last panels are read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = product;
  if (sum_columns) sums.store(a, part.tile, shared);
  if (a.products == nullptr) return;
  __syncthreads();  // every warp's product is there
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < TILE::kThreads / 32; ++warp) product += warps[warp];
  const int across = static_cast<int>((a.features - 1) / TILE::kN + 1);
  const int down = (part.tile.columns - 1) / TILE::kM + 1;
  const int tile = part.tile.row0 / TILE::kM * across + part.tile.column0 / TILE::kN;
  const int64_t row = static_cast<int64_t>(part.tile.slice) * (across * down) + tile;
  a.products[(row * a.upper + part.upper) * a.lower + part.lower] = product;
}

}  // namespace mtl
