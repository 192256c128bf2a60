// mix and mix_backward on CUDA tensors: checks, allocation, launch.
#include "mix_glue.h"

namespace mtl {
namespace {

enum Needs : int64_t { kExperts = 1, kLogits = 2, kStatic = 4 };

}  // namespace

std::tuple<Tensor, Tensor> mix(const Tensor& experts, Optional logits, Optional stat, Optional mask, Optional columns,
                               Units native) {
  MixCall call(experts, logits, stat, mask, columns, native);
  MixArgs& args = call.args;
  const DeviceGuard guard(experts.get_device_index());
  Tensor out = empty(experts, {args.batch, args.tasks, args.width}, experts.scalar_type());
  Tensor lse =
      logits ? empty(experts, {args.batch, args.tasks}, ScalarType::Float) : empty(experts, {0}, ScalarType::Float);
  if (args.batch == 0 || args.tasks == 0 || (args.width == 0 && !logits)) return {out, lse};

  const cudaStream_t stream = current_stream(experts);
  if (call.channel) {
    Tensor weight = *call.stat;
    ChannelMixArgs a = call.channel_args(weight);
    a.outputs = args.tasks;
    a.inputs = args.experts;
    a.x = args.h;
    a.x_row = args.h_row;
    a.x_input = args.h_expert;
    a.weight_output = args.experts * args.width;
    a.weight_input = args.width;
    a.out = out.mutable_data_ptr();
    dispatch(call.type, "experts", [&](auto s) { launch_channel_mix<decltype(s)>(a, stream); });
    return {out, lse};
  }
  std::vector<Tensor> keep;
  args.out = out.mutable_data_ptr();
  args.lse = logits ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  const MixPlan plan = prepare_mix(args, call.type, false);
  args.scratch = allocate_floats(experts, plan.blocks * plan.scratch_floats, keep);
  dispatch(call.type, "experts", [&](auto s) { launch_mix_forward<decltype(s)>(args, plan, call.type, stream); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(const Tensor& grad, Optional grad_lse, const Tensor& experts,
                                                Optional logits, Optional stat, Optional mask, Optional columns,
                                                Units native, const Tensor& lse, int64_t needs) {
  MixCall call(experts, logits, stat, mask, columns, native);
  MixArgs& args = call.args;
  const Tensor g = with_contiguous_last(grad, "grad");
  STD_TORCH_CHECK(g.size(0) == args.batch && grad.size(1) == args.tasks && grad.size(2) == args.width &&
                      grad.scalar_type() == experts.scalar_type(),
                  "grad: [B,T,D] = [", args.batch, ",", args.tasks, ",", args.width,
                  "] of experts' dtype was expected");
  STD_TORCH_CHECK(!logits || lse.scalar_type() == ScalarType::Float, "lse: float32 was expected");
  const DeviceGuard guard(experts.get_device_index());
  const auto gradient = [&](const Optional& like, int64_t bit, ScalarType otherwise) {
    if (!like || !(needs & bit)) return empty(experts, {0}, like ? like->scalar_type() : otherwise);
    const auto shape = like->sizes();
    return empty(experts, std::vector<int64_t>(shape.begin(), shape.end()), like->scalar_type());
  };
  Tensor dexperts = gradient(experts, kExperts, experts.scalar_type());
  Tensor dlogits = gradient(logits, kLogits, ScalarType::Float), dstatic = gradient(stat, kStatic, ScalarType::Float);
  const bool need_experts = needs & kExperts, need_static = stat && needs & kStatic,
             need_logits = logits && needs & kLogits;
  if (!need_experts && !need_static && !need_logits) return {dexperts, dlogits, dstatic};

  const cudaStream_t stream = current_stream(experts);
  std::vector<Tensor> keep;
  if (call.channel) {
    Tensor weight = *call.stat;
    ChannelMixArgs a = call.channel_args(weight);
    if (need_experts) {  // the transposed mix
      a.outputs = args.experts;
      a.inputs = args.tasks;
      a.x = g.const_data_ptr();
      a.x_row = g.stride(0);
      a.x_input = g.stride(1);
      a.weight_output = args.width;
      a.weight_input = args.experts * args.width;
      a.out = dexperts.mutable_data_ptr();
      dispatch(call.type, "experts", [&](auto s) { launch_channel_mix<decltype(s)>(a, stream); });
    }
    if (need_static) {
      a.outputs = args.tasks;
      a.inputs = args.experts;
      a.x = args.h;
      a.x_row = args.h_row;
      a.x_input = args.h_expert;
      a.y = g.const_data_ptr();
      a.y_row = g.stride(0);
      a.y_output = g.stride(1);
      a.splits = channel_splits(a.batch, a.outputs, a.inputs, a.width);
      const int64_t size = call.stat->numel();
      a.partials = allocate_floats(experts, a.splits * size, keep);
      dispatch(call.type, "experts", [&](auto s) { launch_channel_mix_dweight<decltype(s)>(a, stream); });
      launch_sum_partials(a.partials, a.splits, size, dstatic.mutable_data_ptr(), args.stat_type, stream);
    }
    return {dexperts, dlogits, dstatic};
  }

  const Tensor lse_in = torch::stable::contiguous(lse);
  args.grad = g.const_data_ptr();
  args.g_row = g.stride(0);
  args.g_task = g.stride(1);
  args.lse = logits ? static_cast<float*>(const_cast<void*>(lse_in.const_data_ptr())) : nullptr;
  if (grad_lse) {
    const Tensor wide =
        grad_lse->scalar_type() == ScalarType::Float ? *grad_lse : torch::stable::to(*grad_lse, ScalarType::Float);
    keep.push_back(torch::stable::contiguous(wide));
    args.grad_lse = static_cast<const float*>(keep.back().const_data_ptr());
  }
  if (need_experts) args.dexperts = dexperts.mutable_data_ptr();
  if (need_logits) args.dlogits = dlogits.mutable_data_ptr();
  args.num_static = need_static ? call.stat->numel() : 0;
  const MixPlan plan = prepare_mix(args, call.type, true);
  args.scratch = allocate_floats(experts, plan.blocks * plan.scratch_floats, keep);
  args.partials = allocate_floats(experts, plan.blocks * args.num_static, keep);
  if (plan.blocks > 0) {
    dispatch(call.type, "experts", [&](auto s) { launch_mix_backward<decltype(s)>(args, plan, call.type, stream); });
  }
  if (need_static) {
    launch_sum_partials(args.partials, plan.blocks, args.num_static, dstatic.mutable_data_ptr(), args.stat_type,
                        stream);
  }
  return {dexperts, dlogits, dstatic};
}

}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("mix", TORCH_BOX(&mtl::mix));
  m.impl("mix_eager", TORCH_BOX(&mtl::mix));
  m.impl("mix_backward", TORCH_BOX(&mtl::mix_backward));
}
