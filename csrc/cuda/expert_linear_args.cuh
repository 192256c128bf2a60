// What the expert_linear kernels are told, and how a call is cut into tiles. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/activation.h"
#include "scalar.cuh"

namespace mtl {

constexpr int kLinearUnits = 256;  // units a launch may hold; more units take more launches

enum class LinearProduct : int { kForward, kInput, kWeight };

// The tensors of a product of linear layers.
struct LinearTensors {
  int64_t outputs, features, columns;  // N, K, E * N
  int64_t batch;
  const void* x;
  int64_t x_row, x_unit;
  const void* weight;  // [E,N,K]
  const void* bias;    // [E,N] or null
  Scalar bias_type;
  const void *grad, *saved;  // [B,E,N]; saved is null where the activation does nothing
  Activation activation;
  void* out;    // y [B,E,N], dx [B,U,K] or dweight, of which every slice has its own [E,N,K]
  void* z;      // [B,E,N] or null
  void* dbias;  // as dweight, [E,N]; null if not wanted
  bool exact;   // dweight and dbias are float32: sums of a slice, or gradients of float32 weights
  int slice_rows;
  int64_t out_row;  // dx: U * K
};

struct LinearArgs : LinearTensors {
  int first_unit, units;         // which of x's units this launch's first one is, and how many it has
  int expert[kLinearUnits + 1];  // first expert of each unit of this launch
  int tile[kLinearUnits + 1];    // first tile
};

struct LinearPlan {
  bool large;          // tiles of 128x128 instead of 64x64
  int64_t slices;      // parts of the batch that are summed apart; more than one for dweight alone
  int64_t slice_rows;  // batch rows in each
};

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The tiles of one unit's product: rows x columns of it.
struct LinearTiles {
  int64_t rows, columns;
};

inline LinearTiles linear_tiles(LinearProduct product, const LinearPlan& plan, int64_t batch, int64_t features,
                                int64_t unit_columns) {
  const int64_t side = plan.large ? 128 : 64;
  switch (product) {
    case LinearProduct::kForward:
      return {divide_up(batch, side), divide_up(unit_columns, side)};
    case LinearProduct::kInput:
      return {divide_up(batch, side), divide_up(features, side)};
    default:  // without features dbias alone is left to do
      return {divide_up(unit_columns, side) * plan.slices, std::max<int64_t>(1, divide_up(features, side))};
  }
}

// Depends on the shapes alone, so that the same call gives the same bits on every GPU. Large tiles load half as much a
// product; they are taken where they fill a GPU of 132 multiprocessors and compute little past the edges. `experts`:
// how many each unit has. tensor_cores: false for float32, whose products are small tiles.
inline LinearPlan plan_linear(LinearProduct product, int64_t batch, int64_t outputs, int64_t features,
                              const std::vector<int64_t>& experts, bool tensor_cores) {
  constexpr int64_t kFill = 132, kMinRows = 512;
  const int64_t most_slices = product == LinearProduct::kWeight ? std::max<int64_t>(1, batch / kMinRows) : 1;
  const auto count = [&](bool large) {
    int64_t tiles = 0;
    for (const int64_t unit : experts) {
      const LinearTiles t = linear_tiles(product, {large, 1, batch}, batch, features, unit * outputs);
      tiles += t.rows * t.columns;
    }
    return tiles;
  };
  const int64_t small = count(false), large = count(true);
  LinearPlan plan;
  plan.large = tensor_cores && large * most_slices >= kFill && large * 4 * 4 <= small * 5;
  const int64_t tiles = std::max<int64_t>(1, plan.large ? large : small);
  // Two blocks a multiprocessor. More slices would only add partial sums.
  const int64_t slices = std::clamp<int64_t>(2 * kFill / tiles, 1, most_slices);
  plan.slice_rows = std::max<int64_t>(1, divide_up(divide_up(batch, slices), 32)) * 32;
  plan.slices = product == LinearProduct::kWeight ? std::max<int64_t>(1, divide_up(batch, plan.slice_rows)) : 1;
  return plan;
}

}  // namespace mtl
