// What the snr_linear kernels are told, and how a call is cut into tiles. Plain C++.
#pragma once

#include "expert_linear_args.cuh"

namespace mtl {

// Of LinearTensors: columns is I * N, x_unit leads from one input sub-network to the next, weight is [I,J,N,K], out is
// y [B,I,N], dx [B,J,K] or dweight, of which every slice has its own [I,J,N,K].
struct SnrArgs : LinearTensors {
  int upper, lower;  // I sub-networks are fed by J
  const void* gate;  // [I,J]
  Scalar gate_type;
  bool skip;                 // a gate at 0 closes its connection: nothing of it is read
  const void* given_weight;  // not rounded to x's type: what dgate is made of
  Scalar given_type;
  float* products;  // <W, S> of every slice and tile [slices, tiles, I, J], or null
};

// Forward and dx keep two sums for every number, so that their large tiles are 128x64. `upper`, `lower`: I, J.
inline LinearPlan plan_snr(LinearProduct product, int64_t batch, int64_t outputs, int64_t features, int64_t upper,
                           int64_t lower, bool tensor_cores) {
  if (product == LinearProduct::kWeight) {
    const std::vector<int64_t> blocks(upper * std::max<int64_t>(1, lower), 1);
    return plan_linear(product, batch, outputs, features, blocks, tensor_cores);
  }
  constexpr int64_t kFill = 132;
  const bool forward = product == LinearProduct::kForward;
  const int64_t columns = forward ? upper * divide_up(outputs, 64) : lower * divide_up(features, 64);
  const int64_t small = divide_up(batch, 64) * columns, large = divide_up(batch, 128) * columns;
  return {tensor_cores && large >= kFill && large * 4 * 2 <= small * 5, 1, batch};
}

// Tiles of one product of the blocks; their width where dbias alone is wanted is that of one tile.
struct SnrTiles {
  int64_t rows, columns, blocks;

  int64_t total() const { return rows * columns * blocks; }
};

inline SnrTiles snr_tiles(LinearProduct product, const SnrArgs& a, int64_t tile_rows, int64_t tile_columns) {
  switch (product) {
    case LinearProduct::kForward:
      return {divide_up(a.batch, tile_rows), divide_up(a.outputs, tile_columns), a.upper};
    case LinearProduct::kInput:
      return {divide_up(a.batch, tile_rows), divide_up(a.features, tile_columns), a.lower};
    default:
      return {divide_up(a.outputs, tile_rows), std::max<int64_t>(1, divide_up(a.features, tile_columns)),
              int64_t{a.upper} * std::max(1, a.lower)};
  }
}

}  // namespace mtl
