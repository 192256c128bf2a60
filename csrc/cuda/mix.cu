// mix and mix_backward on CUDA tensors: checks, allocation, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "glue.h"
#include "mix_launch.cuh"

namespace mtl {
namespace {

enum Needs : int64_t { kExperts = 1, kLogits = 2, kStatic = 4 };

// D must be contiguous, the outer strides are free. A dimension of size one or zero may carry any stride.
Tensor with_contiguous_last(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, ": three dimensions were expected, got ", tensor.dim());
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

void check_dim(const Optional& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(!tensor || tensor->dim() == dim, name, ": ", dim, " dimensions were expected, got ", tensor->dim());
}

// The contiguous inputs of one call, and what the kernels are told about them.
struct Call {
  Tensor h;
  Optional logits, stat, mask, columns;
  Scalar type;
  bool channel;
  MixArgs args{};

  Call(const Tensor& experts, const Optional& logits_in, const Optional& static_in, const Optional& mask_in,
       const Optional& columns_in, const Units& native)
      : h(with_contiguous_last(experts, "experts")), type(scalar_of(experts, "experts")) {
    check_companion(logits_in, experts, "logits");
    check_companion(static_in, experts, "static");
    check_companion(mask_in, experts, "mask");
    check_companion(columns_in, experts, "columns");
    if (logits_in) logits = torch::stable::contiguous(*logits_in);
    if (static_in) stat = torch::stable::contiguous(*static_in);
    if (mask_in) mask = torch::stable::contiguous(*mask_in);
    if (columns_in) columns = torch::stable::contiguous(*columns_in);
    channel = stat && stat->dim() == 3;
    const bool dense = logits && !columns;
    check_dim(logits, dense ? 3 : 2, "logits");
    check_dim(mask, 2, "mask");
    check_dim(columns, 2, "columns");
    STD_TORCH_CHECK(dense || columns || mask || stat, "mix: one of logits, static, mask and columns is needed");
    STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask: bool was expected");
    STD_TORCH_CHECK(!columns || columns->scalar_type() == ScalarType::Int, "columns: int32 was expected");
    const int64_t tasks = dense ? logits->size(1) : columns ? columns->size(0) : mask ? mask->size(0) : stat->size(0);
    const int64_t num_experts = h.size(1), cells = tasks * num_experts;
    for (const Optional* cell : {&mask, &columns}) {
      STD_TORCH_CHECK(!*cell || ((*cell)->size(0) == tasks && (*cell)->size(1) == num_experts),
                      "mask, columns: [T,E] = [", tasks, ",", num_experts, "] was expected");
    }
    STD_TORCH_CHECK(cells < INT32_MAX, "mix: T * E below 2^31 was expected, got ", cells);

    args.batch = h.size(0);
    args.width = h.size(2);
    args.tasks = static_cast<int>(tasks);
    args.experts = static_cast<int>(num_experts);
    args.h = h.const_data_ptr();
    args.h_row = h.stride(0);
    args.h_expert = h.stride(1);
    if (logits) {
      args.logits = logits->const_data_ptr();
      args.logits_type = scalar_of(*logits, "logits");
      args.logits_row = dense ? cells : logits->size(1);
      STD_TORCH_CHECK(logits->size(0) == args.batch && (!dense || logits->size(2) == num_experts),
                      "logits: [B,T,E] = [", args.batch, ",", tasks, ",", num_experts,
                      "] or packed [B,R] was expected");
    }
    if (stat) {
      args.stat = stat->const_data_ptr();
      args.stat_type = scalar_of(*stat, "static");
    }
    if (mask) args.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
    if (columns) args.columns = static_cast<const int*>(columns->const_data_ptr());
    if (native) {
      STD_TORCH_CHECK(tasks <= kMixMaxUnits && tasks <= static_cast<int64_t>(native->size()),
                      "native: at least T = ", tasks, " and at most ", kMixMaxUnits, " rows were expected, got ",
                      native->size());
      args.native = true;
      for (int64_t t = 0; t < tasks; ++t) args.unit_begin[t + 1] = args.unit_begin[t] + static_cast<int>((*native)[t]);
      STD_TORCH_CHECK(args.unit_begin[tasks] <= num_experts && (!stat || stat->numel() >= args.unit_begin[tasks]),
                      "native: the first T units hold more experts than experts or static do");
    } else {
      STD_TORCH_CHECK(!stat || channel || columns || stat->numel() == cells, "static: [T,E] = [", tasks, ",",
                      num_experts, "] was expected");
    }
  }

  // The same mix as the channel-wise kernels see it; C in float32, for it is read more often than anything else.
  ChannelMixArgs channel_args(Tensor& weight) const {
    STD_TORCH_CHECK(!logits && !mask && !columns && !args.native,
                    "static: [T,E,D] goes without logits, mask and routes");
    STD_TORCH_CHECK(stat->size(1) == args.experts && stat->size(2) == args.width, "static: [T,E,D] = [", args.tasks,
                    ",", args.experts, ",", args.width, "] was expected");
    weight = args.stat_type == Scalar::f32 ? *stat : torch::stable::to(*stat, ScalarType::Float);
    ChannelMixArgs a{};
    a.batch = args.batch;
    a.width = args.width;
    a.weight = static_cast<const float*>(weight.const_data_ptr());
    return a;
  }
};

std::tuple<Tensor, Tensor> mix(const Tensor& experts, Optional logits, Optional stat, Optional mask, Optional columns,
                               Units native) {
  Call call(experts, logits, stat, mask, columns, native);
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
  Call call(experts, logits, stat, mask, columns, native);
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

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("mix", TORCH_BOX(&mtl::mix));
  m.impl("mix_eager", TORCH_BOX(&mtl::mix));
  m.impl("mix_backward", TORCH_BOX(&mtl::mix_backward));
}
