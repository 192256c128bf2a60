// What the star_linear kernels are told, and how a call is cut into tiles. Plain C++.
#pragma once

#include "domain_groups.cuh"
#include "expert_linear_args.cuh"

namespace mtl {

// Of LinearTensors: one expert, so that columns is N; weight is [N,K] and bias [N]; out is y [B,N], dx [B,K] or
// dweight's partial sums, of which every slot of domain_groups.cuh has its own [N,K]; slice_rows is the rows of a
// chunk.
struct StarArgs : LinearTensors {
  DomainGroups groups;
  const void* own_weight;  // [P,N,K], of weight's type
  const void* own_bias;    // [P,N] or null, of bias's type
};

// The second stage of the parameters' gradients: from S_p, the sums of the slots, to S_p * W and sum_p S_p * W_p.
struct StarSums {
  DomainGroups groups;
  const float* partial;             // [slots, size]
  int64_t size, rows;               // numbers of one gradient; rows of a chunk
  const void *weight, *own_weight;  // [size], [P, size]; both null for biases, whose factors are 1
  Scalar type;                      // of weights and gradients
  void *shared, *own;               // [size], [P, size]; null if not wanted
};

// As plan_linear's. Every domain may end in a tile that is partly empty, so that many domains want small tiles.
// slice_rows: rows of a chunk, whose number the ids decide and not `slices`. 16 bit: the numbers, the weights.
inline LinearPlan plan_star(LinearProduct product, int64_t batch, int64_t domains, int64_t outputs, int64_t features,
                            bool short_numbers, bool short_weights) {
  if (product == LinearProduct::kWeight) {
    return plan_linear(product, batch, outputs, features, {1}, short_numbers);
  }
  constexpr int64_t kFill = 132;
  const int64_t width = product == LinearProduct::kForward ? outputs : features, parts = std::min(domains, batch);
  const auto tiles = [&](int64_t side) { return (batch / side + parts) * divide_up(width, side); };
  const bool large = short_numbers && short_weights && tiles(128) >= kFill && tiles(128) * 4 * 4 <= tiles(64) * 5;
  return {large, 1, large ? 128 : 64};
}

}  // namespace mtl
