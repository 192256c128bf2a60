// From a filled MixArgs to kernels on a stream. Kept apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH(kernel, blocks, threads, shared_bytes, stream, arguments...) to be defined before.
#pragma once

#include "mix.cuh"
#include "mix_channel.cuh"
#include "sum_partials.cuh"

namespace mtl {

inline int scalar_bytes(Scalar type) { return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2; }

// Elements of D a thread may move at once: 16 bytes if every row of every tensor starts at a multiple of 16, else one.
inline int mix_vec(const MixArgs& a, Scalar type) {
  const int64_t vec = 16 / scalar_bytes(type);
  const uint64_t pointers = reinterpret_cast<uint64_t>(a.h) | reinterpret_cast<uint64_t>(a.grad) |
                            reinterpret_cast<uint64_t>(a.out) | reinterpret_cast<uint64_t>(a.dexperts);
  const int64_t strides[] = {a.width, a.h_row, a.h_expert, a.g_row, a.g_task};
  bool aligned = pointers % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride % vec == 0;
  return aligned ? static_cast<int>(vec) : 1;
}

// Chooses the launch for `a`. The caller then allocates plan.blocks * plan.scratch_floats floats of scratch and, in
// backward, plan.blocks * a.num_static floats of partials.
inline MixPlan prepare_mix(MixArgs& a, Scalar type, bool backward) {
  a.blocks4 = (a.experts + kMixBlock - 1) / kMixBlock;
  const MixPlan plan = plan_mix(a.batch, a.tasks, a.experts, a.width, mix_vec(a, type), backward, a.num_static);
  a.rows = plan.rows;
  a.lanes = plan.lanes;
  a.row_warps = plan.row_warps;
  a.softmax_lanes = plan.softmax_lanes;
  a.row_floats = plan.row_floats;
  a.scratch_floats = plan.scratch_floats;
  return plan;
}

template <class S, class Stream>
void launch_mix_forward(const MixArgs& a, const MixPlan& plan, Scalar type, Stream stream) {
  constexpr int kVec = 16 / sizeof(S);
  const bool wide = mix_vec(a, type) > 1;
#define MTL_MIX_FORWARD(VEC, CHUNK, LARGE) \
  MTL_LAUNCH((mix_forward_kernel<S, VEC, CHUNK, LARGE>), plan.blocks, kMixThreads, plan.shared_bytes, stream, a)
  // Eight sums of eight values are 64 registers, which three or four task rows should not pay for.
  if (plan.large) {
    if (wide) {
      MTL_MIX_FORWARD(kVec, 8, true);
    } else {
      MTL_MIX_FORWARD(1, 8, true);
    }
  } else if (!wide) {
    MTL_MIX_FORWARD(1, 8, false);
  } else if (a.tasks > 4) {
    MTL_MIX_FORWARD(kVec, 8, false);
  } else {
    MTL_MIX_FORWARD(kVec, 4, false);
  }
#undef MTL_MIX_FORWARD
}

template <class S, class Stream>
void launch_mix_backward(const MixArgs& a, const MixPlan& plan, Scalar type, Stream stream) {
  constexpr int kVec = 16 / sizeof(S);
  const bool wide = mix_vec(a, type) > 1;
#define MTL_MIX_BACKWARD(VEC, LARGE) \
  MTL_LAUNCH((mix_backward_kernel<S, VEC, LARGE>), plan.blocks, kMixThreads, plan.shared_bytes, stream, a)
  if (plan.large) {
    if (wide) {
      MTL_MIX_BACKWARD(kVec, true);
    } else {
      MTL_MIX_BACKWARD(1, true);
    }
  } else if (wide) {
    MTL_MIX_BACKWARD(kVec, false);
  } else {
    MTL_MIX_BACKWARD(1, false);
  }
#undef MTL_MIX_BACKWARD
}

template <class S, class Stream>
void launch_channel_mix(const ChannelMixArgs& a, Stream stream) {
  const int64_t blocks = channel_blocks(a.width) * channel_tiles(a.batch);
  if (blocks && a.outputs) MTL_LAUNCH((channel_mix_kernel<S>), blocks, kChannelThreads, 0, stream, a);
}

template <class S, class Stream>
void launch_channel_mix_dweight(const ChannelMixArgs& a, Stream stream) {
  const int64_t blocks = channel_blocks(a.width) * channel_tiles(a.outputs) * channel_tiles(a.inputs) * a.splits;
  if (blocks) MTL_LAUNCH((channel_mix_dweight_kernel<S>), blocks, kChannelThreads, 0, stream, a);
}

}  // namespace mtl
