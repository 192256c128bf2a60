// The mix kernels, with their launch code, on the emulated device.
#include "cuda.h"
#include "mix_launch.cuh"
// After the kernels.
#include "calls.h"

namespace {

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, batch, tasks, experts, width;
  int64_t h, h_row, h_expert, grad, g_row, g_task;
  int64_t logits, logits_type, logits_row, stat, stat_type, num_static, mask, columns, grad_lse, native;
  int64_t out, lse, dexperts, dlogits, dstatic;
  int64_t max_blocks;  // 0: as planned; else a bound, which makes a block loop over many groups of rows
};

mtl::MixArgs arguments(const Problem& p) {
  mtl::MixArgs a{};
  a.batch = p.batch;
  a.width = p.width;
  a.tasks = static_cast<int>(p.tasks);
  a.experts = static_cast<int>(p.experts);
  a.h = pointer<void>(p.h);
  a.h_row = p.h_row;
  a.h_expert = p.h_expert;
  a.grad = pointer<void>(p.grad);
  a.g_row = p.g_row;
  a.g_task = p.g_task;
  a.logits = pointer<void>(p.logits);
  a.logits_type = static_cast<mtl::Scalar>(p.logits_type);
  a.logits_row = p.logits_row;
  a.stat = pointer<void>(p.stat);
  a.stat_type = static_cast<mtl::Scalar>(p.stat_type);
  a.mask = pointer<unsigned char>(p.mask);
  a.columns = pointer<int>(p.columns);
  a.grad_lse = pointer<float>(p.grad_lse);
  a.native = p.native != 0;
  for (int64_t t = 0; a.native && t < p.tasks; ++t) {
    a.unit_begin[t + 1] = a.unit_begin[t] + static_cast<int>(pointer<int64_t>(p.native)[t]);
  }
  a.out = pointer<void>(p.out);
  a.lse = pointer<float>(p.lse);
  a.dexperts = pointer<void>(p.dexperts);
  a.dlogits = pointer<void>(p.dlogits);
  a.num_static = p.dstatic ? p.num_static : 0;
  return a;
}

mtl::MixPlan prepare(const Problem& p, mtl::MixArgs& a, bool backward) {
  mtl::MixPlan plan = mtl::prepare_mix(a, static_cast<mtl::Scalar>(p.type), backward);
  if (p.max_blocks) plan.blocks = std::min(plan.blocks, p.max_blocks);
  return plan;
}

}  // namespace

extern "C" {

void mix_forward(const Problem* p) {
  emulation::error.clear();
  mtl::MixArgs a = arguments(*p);
  const mtl::MixPlan plan = prepare(*p, a, false);
  std::vector<float> space = scratch(plan.blocks * plan.scratch_floats);
  a.scratch = space.data();
  dispatch(p->type,
           [&](auto s) { mtl::launch_mix_forward<decltype(s)>(a, plan, static_cast<mtl::Scalar>(p->type), 0); });
}

void mix_backward(const Problem* p) {
  emulation::error.clear();
  mtl::MixArgs a = arguments(*p);
  const mtl::MixPlan plan = prepare(*p, a, true);
  std::vector<float> space = scratch(plan.blocks * plan.scratch_floats), sums = scratch(plan.blocks * a.num_static);
  a.scratch = space.data();
  a.partials = p->dstatic ? sums.data() : nullptr;
  dispatch(p->type,
           [&](auto s) { mtl::launch_mix_backward<decltype(s)>(a, plan, static_cast<mtl::Scalar>(p->type), 0); });
  if (p->dstatic) {
    mtl::launch_sum_partials(sums.data(), plan.blocks, a.num_static, pointer<void>(p->dstatic), a.stat_type, 0);
  }
}

// What the torch glue does for an empty batch: no rows of partials, summed.
void sum_nothing(const Problem* p) {
  emulation::error.clear();
  mtl::launch_sum_partials(nullptr, 0, p->num_static, pointer<void>(p->dstatic), mtl::Scalar::f32, 0);
}

void channel_forward(const Problem* p) {
  emulation::error.clear();
  mtl::ChannelMixArgs a{};
  a.batch = p->batch;
  a.width = p->width;
  a.outputs = static_cast<int>(p->tasks);
  a.inputs = static_cast<int>(p->experts);
  a.x = pointer<void>(p->h);
  a.x_row = p->h_row;
  a.x_input = p->h_expert;
  a.weight = pointer<float>(p->stat);
  a.weight_output = p->experts * p->width;
  a.weight_input = p->width;
  a.out = pointer<void>(p->out);
  dispatch(p->type, [&](auto s) { mtl::launch_channel_mix<decltype(s)>(a, 0); });
}

void channel_backward(const Problem* p) {
  emulation::error.clear();
  mtl::ChannelMixArgs a{};
  a.batch = p->batch;
  a.width = p->width;
  a.outputs = static_cast<int>(p->experts);
  a.inputs = static_cast<int>(p->tasks);
  a.x = pointer<void>(p->grad);
  a.x_row = p->g_row;
  a.x_input = p->g_task;
  a.weight = pointer<float>(p->stat);
  a.weight_output = p->width;
  a.weight_input = p->experts * p->width;
  a.out = pointer<void>(p->dexperts);
  dispatch(p->type, [&](auto s) { mtl::launch_channel_mix<decltype(s)>(a, 0); });
  a.outputs = static_cast<int>(p->tasks);
  a.inputs = static_cast<int>(p->experts);
  a.y = a.x;
  a.y_row = a.x_row;
  a.y_output = a.x_input;
  a.x = pointer<void>(p->h);
  a.x_row = p->h_row;
  a.x_input = p->h_expert;
  a.splits = mtl::channel_splits(a.batch, a.outputs, a.inputs, a.width);
  std::vector<float> sums = scratch(a.splits * p->num_static);
  a.partials = sums.data();
  dispatch(p->type, [&](auto s) { mtl::launch_channel_mix_dweight<decltype(s)>(a, 0); });
  mtl::launch_sum_partials(sums.data(), a.splits, p->num_static, pointer<void>(p->dstatic), mtl::Scalar::f32, 0);
}

}  // extern "C"
