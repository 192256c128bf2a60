// expert_mix and expert_mix_backward on CUDA tensors: checks, allocation, launch.
//
// Backward computes the experts' outputs once more with expert_linear and goes through mix's backward and
// expert_linear's: not to keep [B,E,D] until then costs the products of forward a second time. There is no
// expert_mix_saving: by an estimate K would have to be near a thousand for that to be faster.
#include "expert_linear_glue.h"
#include "expert_mix_launch.cuh"
#include "mix_glue.h"

namespace mtl {
namespace {

// The inputs of one call, as expert_linear and mix see them. The outputs between the two are a tensor without numbers.
struct ExpertMixCall {
  LinearCall linear;
  MixCall mix;

  ExpertMixCall(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& logits,
                const Optional& stat, const Optional& mask, const Optional& columns, const Units& experts_per_unit,
                const std::string& activation)
      : linear(x, weight, experts_per_unit, activation),
        mix(empty(x, {x.size(0), weight.size(0), 0}, x.scalar_type()), logits, stat, mask, columns, {}) {
    linear.need_bias(bias);
    STD_TORCH_CHECK(logits || stat, "logits, static: one of the two was expected");
    STD_TORCH_CHECK(!mix.channel, "static: [T,E], or packed [R] with columns, was expected");
    mix.args.width = linear.args.outputs;
  }

  // A contiguous tensor [E,...] with zeros for the experts that no task uses, so that nothing in them matters.
  Tensor used(const Tensor& from, Tensor to) const {
    launch_used_experts(mix.args, from.const_data_ptr(), from.numel() / std::max<int64_t>(1, from.size(0)),
                        from.element_size(), to.mutable_data_ptr(), current_stream(linear.x));
    return to;
  }
  Tensor used(const Tensor& given) const {
    const Tensor from = torch::stable::contiguous(given);
    return used(from, torch::stable::empty_like(from));
  }
};

// What one kernel does not serve, expert_linear and mix do by turns, a slab of rows after the other: their outputs
// between the two come out of the cache, and take no more memory for more rows.
void expert_mix_in_slabs(ExpertMixCall& call, const Units& experts_per_unit, const std::string& activation, Tensor& out,
                         Tensor& lse) {
  LinearCall& linear = call.linear;
  MixCall& gates = call.mix;
  const int64_t batch = gates.args.batch, most = slab_rows(linear.args.columns * out.element_size());
  for (int64_t row = 0; row < batch; row += most) {
    const int64_t rows = std::min(most, batch - row);
    const auto slab = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, row, rows); };
    const auto [h, z] = expert_linear(slab(linear.x), linear.weight, linear.bias, experts_per_unit, activation, false);
    Optional logits;
    if (gates.logits) logits = slab(*gates.logits);
    const auto mixed = mix(h, logits, gates.stat, gates.mask, gates.columns, {});
    Tensor to = slab(out);
    torch::stable::copy_(to, std::get<0>(mixed));
    if (!logits) continue;
    to = slab(lse);
    torch::stable::copy_(to, std::get<1>(mixed));
  }
}

std::tuple<Tensor, Tensor> expert_mix(const Tensor& x, const Tensor& weight, Optional bias, Optional logits,
                                      Optional stat, Optional mask, Optional columns, Units experts_per_unit,
                                      std::string activation) {
  ExpertMixCall call(x, weight, bias, logits, stat, mask, columns, experts_per_unit, activation);
  const DeviceGuard guard(x.get_device_index());
  const int64_t batch = call.mix.args.batch, tasks = call.mix.args.tasks;
  Tensor out = empty(x, {batch, tasks, call.mix.args.width}, x.scalar_type());
  Tensor lse = empty(x, logits ? std::vector<int64_t>{batch, tasks} : std::vector<int64_t>{0}, ScalarType::Float);
  if (out.numel() + lse.numel() == 0) return {out, lse};
  if (!fuses_expert_mix(tasks, call.linear.experts)) {
    expert_mix_in_slabs(call, experts_per_unit, activation, out, lse);
    return {out, lse};
  }

  call.linear.need_weight(x.scalar_type());
  ExpertMixArgs args{call.linear.args, call.mix.args};
  args.mix.out = out.mutable_data_ptr();
  args.mix.lse = logits ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  dispatch(call.linear.type, "x",
           [&](auto s) { launch_expert_mix<decltype(s)>(args, call.linear.experts, current_stream(x)); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mix_backward(const Tensor& grad, Optional grad_lse,
                                                                       const Tensor& x, const Tensor& weight_in,
                                                                       Optional bias, Optional logits, Optional stat,
                                                                       Optional mask, Optional columns,
                                                                       Units experts_per_unit, std::string activation,
                                                                       const Tensor& lse, int64_t needs) {
  const ExpertMixCall call(x, weight_in, bias, logits, stat, mask, columns, experts_per_unit, activation);
  const MixArgs& args = call.mix.args;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == args.batch && grad.size(1) == args.tasks &&
                      grad.size(2) == args.width && grad.scalar_type() == x.scalar_type(),
                  "grad: [B,T,D] = [", args.batch, ",", args.tasks, ",", args.width, "] in x's dtype was expected");
  STD_TORCH_CHECK(!logits || lse.numel() == args.batch * args.tasks, "lse: [B,T] was expected");
  if (!logits) grad_lse.reset();  // there was none
  STD_TORCH_CHECK(!grad_lse || grad_lse->numel() == args.batch * args.tasks, "grad_lse: [B,T] was expected");
  const DeviceGuard guard(x.get_device_index());
  const int64_t products = needs & (bias ? 7 : 3);
  const bool need_logits = logits && needs & 8, need_static = stat && needs & 16;
  const auto nothing = [&](ScalarType type) { return empty(x, {0}, type); };
  Tensor dx = nothing(x.scalar_type()), dlogits = nothing(x.scalar_type()), dstatic = nothing(x.scalar_type());
  Tensor dweight = nothing(weight_in.scalar_type()), dbias = nothing(weight_in.scalar_type());
  if (products == 0 && !need_logits && !need_static) return {dx, dweight, dbias, dlogits, dstatic};

  const bool partial = mask || columns;
  const Tensor weight = partial ? call.used(weight_in) : weight_in;
  if (bias && partial) bias = call.used(*bias);
  const auto [h, z] = expert_linear(x, weight, bias, experts_per_unit, activation, true);
  const int64_t wanted = (products ? 1 : 0) + (need_logits ? 2 : 0) + (need_static ? 4 : 0);
  const auto mixed = mix_backward(grad, grad_lse, h, logits, stat, mask, columns, {}, lse, wanted);
  if (need_logits) dlogits = std::get<1>(mixed);
  if (need_static) dstatic = std::get<2>(mixed);
  if (products == 0) return {dx, dweight, dbias, dlogits, dstatic};
  const Tensor& saved = needs_input(call.linear.args.activation) ? z : h;
  std::tie(dx, dweight, dbias) =
      expert_linear_backward(std::get<0>(mixed), x, weight, saved, experts_per_unit, activation, products);
  // Not even 0 * x where x is not finite.
  if (partial && products & 2) dweight = call.used(dweight, dweight);
  if (partial && products & 4) dbias = call.used(dbias, dbias);
  return {dx, dweight, dbias, dlogits, dstatic};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("expert_mix", TORCH_BOX(&mtl::expert_mix));
  m.impl("expert_mix_eager", TORCH_BOX(&mtl::expert_mix));
  m.impl("expert_mix_backward", TORCH_BOX(&mtl::expert_mix_backward));
}
