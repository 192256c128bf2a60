// From a filled SnrArgs to kernels on a stream. Kept apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH and MTL_ALLOW_SHARED, as in launch.h.
#pragma once

#include "expert_linear_launch.cuh"
#include "snr_linear.cuh"
#include "sum_partials.cuh"

namespace mtl {

template <class S, class TILE, LinearProduct PRODUCT, class Stream>
void launch_snr_tiles(const SnrArgs& a, const LinearPlan& plan, Stream stream) {
  constexpr int kBytes = SnrPipeline<S, TILE, PRODUCT>::kBytes;
  const int64_t blocks = snr_tiles(PRODUCT, a, TILE::kM, TILE::kN).total() * plan.slices;
  if (blocks == 0) return;
  if constexpr (PRODUCT == LinearProduct::kWeight) {
    MTL_ALLOW_SHARED((snr_weight_kernel<S, TILE>), kBytes);
    MTL_LAUNCH((snr_weight_kernel<S, TILE>), blocks, TILE::kThreads, kBytes, stream, a);
  } else {
    MTL_ALLOW_SHARED((snr_sum_kernel<S, TILE, PRODUCT>), kBytes);
    MTL_LAUNCH((snr_sum_kernel<S, TILE, PRODUCT>), blocks, TILE::kThreads, kBytes, stream, a);
  }
}

// One of the three products over all pairs of sub-networks.
template <class S, LinearProduct PRODUCT, class Stream>
void launch_snr(const SnrArgs& a, const LinearPlan& plan, Stream stream) {
  if constexpr (sizeof(S) == 2) {
    using Large = std::conditional_t<PRODUCT == LinearProduct::kWeight, LargeTile, TallTile>;
    if (plan.large) return launch_snr_tiles<S, Large, PRODUCT>(a, plan, stream);
  }
  launch_snr_tiles<S, SmallTile, PRODUCT>(a, plan, stream);
}

// How many rows of products kWeight leaves, one for every slice and tile of a block.
inline int64_t snr_product_rows(const SnrArgs& a, const LinearPlan& plan) {
  const int64_t side = plan.large ? LargeTile::kM : SmallTile::kM;
  const SnrTiles tiles = snr_tiles(LinearProduct::kWeight, a, side, side);
  return tiles.rows * tiles.columns * plan.slices;
}

}  // namespace mtl
