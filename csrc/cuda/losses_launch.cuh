// From filled arguments to kernels on a stream, apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH, as in launch.h, to be defined before.
#pragma once

#include "losses.cuh"
#include "sum_partials.cuh"

namespace mtl {

constexpr int kLossShared = kLossThreads * sizeof(float);

// loss: one number. args.partials: room for plan.blocks() floats.
template <class S, class Stream>
void launch_esmm_loss(const EsmmArgs& args, float* loss, Stream stream) {
  const int64_t blocks = args.plan.blocks();
  if (blocks) MTL_LAUNCH((esmm_loss_kernel<S>), blocks, kLossThreads, kLossShared, stream, args);
  launch_sum_partials(args.partials, blocks, 1, loss, Scalar::f32, stream);
}

// loss, totals: [T]; totals is written, and read, where there is a mask. args.partials: row_blocks * T floats.
template <class S, class Stream>
void launch_masked_bce(BceArgs args, float* loss, float* totals, Stream stream) {
  const LossPlan& plan = args.plan;
  args.totals = args.mask.data ? totals : nullptr;
  if (plan.blocks() && args.mask.data) {
    MTL_LAUNCH(mask_sum_kernel, plan.blocks(), kLossThreads, kLossShared, stream, args);
    launch_sum_partials(args.partials, plan.row_blocks, plan.tasks, totals, Scalar::f32, stream);
  }
  if (plan.blocks()) MTL_LAUNCH((masked_bce_kernel<S>), plan.blocks(), kLossThreads, kLossShared, stream, args);
  launch_sum_partials(args.partials, plan.row_blocks, plan.tasks, loss, Scalar::f32, stream);
}

template <class Stream>
void launch_loss_scale(const ScaleArgs& args, Stream stream) {
  if (args.plan.blocks()) MTL_LAUNCH(loss_scale_kernel, args.plan.blocks(), kLossThreads, 0, stream, args);
}

}  // namespace mtl
