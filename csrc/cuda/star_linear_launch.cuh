// From filled StarArgs to kernels on a stream. Kept apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH and MTL_ALLOW_SHARED, as in launch.h.
#pragma once

#include "expert_linear_launch.cuh"
#include "star_linear.cuh"

namespace mtl {

template <class S, class P, class TILE, LinearProduct PRODUCT, class Stream>
void launch_star_tiles(const StarArgs& a, Stream stream) {
  constexpr int kBytes = LinearPanels<S, TILE, PRODUCT>::kBytes;
  const int64_t width = PRODUCT == LinearProduct::kForward ? a.outputs : a.features;
  const int64_t down = PRODUCT == LinearProduct::kWeight ? divide_up(a.outputs, TILE::kM) : 1;
  const int64_t tiles = down * std::max<int64_t>(1, divide_up(width, TILE::kN));
  const int64_t blocks = domain_slots(a.groups, a.slice_rows) * tiles;
  MTL_ALLOW_SHARED((star_linear_kernel<S, P, TILE, PRODUCT>), kBytes);
  MTL_LAUNCH((star_linear_kernel<S, P, TILE, PRODUCT>), blocks, TILE::kThreads, kBytes, stream, a);
}

// One of the three products; weights are of P. Of float32 weights beside 16-bit numbers a large tile would hold more on
// their way than there are registers.
template <class S, class P, LinearProduct PRODUCT, class Stream>
void launch_star(StarArgs& a, const LinearPlan& plan, Stream stream) {
  a.slice_rows = static_cast<int>(plan.slice_rows);
  if constexpr (sizeof(S) == 2 && sizeof(P) == 2) {
    if (plan.large) return launch_star_tiles<S, P, LargeTile, PRODUCT>(a, stream);
  }
  launch_star_tiles<S, P, SmallTile, PRODUCT>(a, stream);
}

template <class Stream>
void launch_star_combine(const StarSums& a, Stream stream) {
  constexpr int kThreads = kStarColumns * kStarSlices;
  const int64_t blocks = divide_up(a.size, kStarColumns);
  if (blocks) MTL_LAUNCH(star_combine_kernel, blocks, kThreads, kThreads * sizeof(float), stream, a);
}

}  // namespace mtl
