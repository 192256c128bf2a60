// The products of one tile with several pairs of operands, one after the other through the same stages of shared
// memory: the first panels of a pair are on their way while the last of the pair before it are multiplied.
#pragma once

#include "gemm_tile.cuh"

namespace mtl {

template <class S, class TILE, bool LEFT_TRANS, bool RIGHT_TRANS>
struct GemmPipeline {
  using Left = Panel<S, TILE::kM, LEFT_TRANS>;
  using Right = Panel<S, TILE::kN, RIGHT_TRANS>;
  using LeftLoader = PanelLoader<S, Left, TILE::kThreads>;
  using RightLoader = PanelLoader<S, Right, TILE::kThreads>;
  static constexpr int kDepth = Left::kDepth, kStage = Left::kBytes + Right::kBytes, kBytes = kGemmStages * kStage;

  // c += left_of(q) right_of(q) over `steps` panels of depth, for every pair q that takes part, of `pairs`.
  //   first, next(q)   the first pair that takes part, and the one after q; `pairs` when there is none
  //   on_panel(panel)  for every left panel, before it is multiplied
  //   on_end(q)        when the pair's product is complete; it may take c and clear it
  // All threads of the block get the same answers. Afterwards other warps may still read the last panels.
  template <class Next, class LeftOf, class RightOf, class OnPanel, class OnEnd>
  __device__ static void run(unsigned char* stages, int first, int pairs, int steps, Activation activation, Next next,
                             LeftOf left_of, RightOf right_of, OnPanel on_panel, OnEnd on_end,
                             float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
    int q = first;
    if (steps == 0 || q == pairs) return;
    int ahead = q, ahead_step = 0;  // the pair and the step whose panels are loaded next
    LeftLoader left(left_of(q));
    RightLoader right(right_of(q));
    const auto stage_of = [&](int step) { return stages + step % kGemmStages * kStage; };
    // All of a step's panels but a left one that passes through registers.
    const auto load = [&](unsigned char* stage) {
      if (left.by_hardware()) left.copy(ahead_step, stage);
      if (right.by_hardware()) return right.copy(ahead_step, stage + Left::kBytes);
      typename RightLoader::Fetched fetched[RightLoader::kEach];
#pragma unroll
      for (int i = 0; i < RightLoader::kEach; ++i) right.fetch(ahead_step, i, fetched[i]);
#pragma unroll
      for (int i = 0; i < RightLoader::kEach; ++i) right.put(fetched[i], Activation::kNone, i, stage + Left::kBytes);
    };
    const auto advance = [&] {
      if (++ahead_step < steps) return;
      ahead_step = 0;
      ahead = next(ahead);
      if (ahead == pairs) return;
      left = LeftLoader(left_of(ahead));
      right = RightLoader(right_of(ahead));
    };

    for (int step = 0; step < kGemmStages - 1; ++step) {
      if (ahead < pairs) {
        load(stage_of(step));
        typename LeftLoader::Fetched fetched;
        for (int i = 0; !left.by_hardware() && i < LeftLoader::kEach; ++i) {
          left.fetch(ahead_step, i, fetched);
          left.put(fetched, activation, i, stage_of(step));
        }
        advance();
      }
      cp_async_commit();
    }
    for (int step = 0, of_pair = 0; q < pairs; ++step) {
      const bool more = ahead < pairs, fetch_left = more && !left.by_hardware();
      unsigned char* coming = stage_of(step + kGemmStages - 1);
      cp_async_wait<kGemmStages - 2>();
      __syncthreads();  // this step's panels are complete, and the last one's are read
      if (more) load(coming);
      cp_async_commit();
      const unsigned char* stage = stage_of(step);
      on_panel(stage);
#pragma unroll
      for (int i = 0; i < kGemmParts; ++i) {
        typename LeftLoader::Fetched fetched;
        const bool fetch = fetch_left && i < LeftLoader::kEach;
        if (fetch) left.fetch(ahead_step, i, fetched);
        if constexpr (sizeof(S) == 4) {
          multiply_exactly<TILE, Left, Right>(stage, stage + Left::kBytes, i, c);
        } else {
          multiply<S, TILE, Left, Right>(stage, stage + Left::kBytes, i, c);
        }
        if (fetch) left.put(fetched, activation, i, coming);  // it had the product's time to arrive
      }
      if (more) advance();
      if (++of_pair < steps) continue;
      of_pair = 0;
      on_end(q);
      q = next(q);
    }
  }
};

}  // namespace mtl
