// From a filled LinearArgs to kernels on a stream. Kept apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH and MTL_ALLOW_SHARED, as in launch.h.
#pragma once

#include "expert_linear.cuh"

namespace mtl {

template <class S, class TILE, LinearProduct PRODUCT, class Stream>
void launch_linear_tiles(const LinearArgs& a, Stream stream) {
  constexpr int kBytes = LinearPanels<S, TILE, PRODUCT>::kBytes;
  MTL_ALLOW_SHARED((expert_linear_kernel<S, TILE, PRODUCT>), kBytes);
  MTL_LAUNCH((expert_linear_kernel<S, TILE, PRODUCT>), a.tile[a.units], TILE::kThreads, kBytes, stream, a);
}

// One of the three products over all units; `experts`: how many each has.
template <class S, LinearProduct PRODUCT, class Stream>
void launch_linear(LinearArgs& a, const LinearPlan& plan, const std::vector<int64_t>& experts, Stream stream) {
  const int64_t units = static_cast<int64_t>(experts.size());
  int expert = 0;
  for (a.first_unit = 0; a.first_unit < units; a.first_unit += a.units) {
    int64_t tiles = 0;
    a.units = static_cast<int>(std::min<int64_t>(kLinearUnits, units - a.first_unit));
    for (int u = 0; u <= a.units; ++u) {
      a.expert[u] = expert;
      a.tile[u] = static_cast<int>(std::min<int64_t>(tiles, INT32_MAX));
      if (u == a.units) break;
      const int64_t held = experts[a.first_unit + u];
      const LinearTiles t = linear_tiles(PRODUCT, plan, a.batch, a.features, held * a.outputs);
      tiles += t.rows * t.columns;
      expert += static_cast<int>(held);
    }
    if (tiles == 0) continue;
    if constexpr (sizeof(S) == 2) {
      if (plan.large) {
        launch_linear_tiles<S, LargeTile, PRODUCT>(a, stream);
        continue;
      }
    }
    launch_linear_tiles<S, SmallTile, PRODUCT>(a, stream);
  }
}

template <class Stream>
void launch_sum_slices(const float* partials, int64_t slices, int64_t size, void* out, Scalar type, Stream stream) {
  const int64_t blocks = divide_up(size, kSliceThreads);
  if (blocks) MTL_LAUNCH(sum_slices_kernel, blocks, kSliceThreads, 0, stream, partials, slices, size, out, type);
}

}  // namespace mtl
