// esmm_loss and esmm_loss_backward on CUDA tensors: checks, allocation, launch.
#include <tuple>

#include "launch.h"
#include "losses_glue.h"

namespace mtl::loss {
namespace {

std::tuple<Tensor, Tensor, Tensor> esmm_loss(const Tensor& ctr_logit, const Tensor& cvr_logit, const Tensor& click,
                                             const Tensor& conversion, double ctcvr_weight) {
  STD_TORCH_CHECK(ctr_logit.dim() == 1, "ctr_logit: [B] was expected");
  const int64_t batch = ctr_logit.size(0);
  for (const Tensor* t : {&cvr_logit, &click, &conversion}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == batch && same_device(*t, ctr_logit),
                    "cvr_logit, click, conversion: [B] = [", batch, "] on ctr_logit's device was expected");
  }
  STD_TORCH_CHECK(cvr_logit.scalar_type() == ctr_logit.scalar_type(), "cvr_logit: ctr_logit's dtype was expected");
  const Tensor a = torch::stable::contiguous(ctr_logit), c = torch::stable::contiguous(cvr_logit);
  const Tensor y = torch::stable::contiguous(click), z = torch::stable::contiguous(conversion);
  const DeviceGuard guard(ctr_logit.get_device_index());
  Tensor loss = floats(a, {}), dctr = floats(a, {batch}), dcvr = floats(a, {batch});
  EsmmArgs args{};
  args.plan = plan_loss(batch, 1);
  const Tensor partials = floats(a, {args.plan.blocks()});
  args.ctr = a.const_data_ptr();
  args.cvr = c.const_data_ptr();
  args.click = labels_of(y, "click");
  args.conversion = labels_of(z, "conversion");
  args.weight = static_cast<float>(ctcvr_weight);
  args.scale = batch ? static_cast<float>(1.0 / static_cast<double>(batch)) : 0.0f;
  args.dctr = data(dctr);
  args.dcvr = data(dcvr);
  args.partials = data(partials);
  const cudaStream_t stream = current_stream(ctr_logit);
  with_logits(a, "ctr_logit", [&](auto s) { launch_esmm_loss<decltype(s)>(args, data(loss), stream); });
  return {loss, dctr, dcvr};
}

std::tuple<Tensor, Tensor> esmm_loss_backward(const Tensor& grad, const Tensor& dctr, const Tensor& dcvr) {
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == ScalarType::Float, "grad: one float32 was expected");
  STD_TORCH_CHECK(dctr.dim() == 1 && dcvr.dim() == 1 && dctr.size(0) == dcvr.size(0) &&
                      dctr.scalar_type() == ScalarType::Float && dcvr.scalar_type() == ScalarType::Float,
                  "dctr, dcvr: float32 [B] was expected");
  const int64_t batch = dctr.size(0);
  const Tensor a = torch::stable::contiguous(dctr), c = torch::stable::contiguous(dcvr);
  const DeviceGuard guard(dctr.get_device_index());
  Tensor ga = floats(a, {batch}), gc = floats(a, {batch});
  const ScaleArgs args{plan_loss(batch, 1),
                       static_cast<const float*>(grad.const_data_ptr()),
                       {static_cast<const float*>(a.const_data_ptr()), static_cast<const float*>(c.const_data_ptr())},
                       {data(ga), data(gc)}};
  launch_loss_scale(args, current_stream(dctr));
  return {ga, gc};
}

}  // namespace
}  // namespace mtl::loss

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("esmm_loss", TORCH_BOX(&mtl::loss::esmm_loss));
  m.impl("esmm_loss_eager", TORCH_BOX(&mtl::loss::esmm_loss));
  m.impl("esmm_loss_backward", TORCH_BOX(&mtl::loss::esmm_loss_backward));
}
