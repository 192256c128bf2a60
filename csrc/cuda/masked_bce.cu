// masked_bce and masked_bce_backward on CUDA tensors: checks, allocation, launch.
#include <optional>
#include <tuple>

#include "launch.h"
#include "losses_glue.h"

namespace mtl::loss {
namespace {

std::tuple<Tensor, Tensor> masked_bce(const Tensor& logits, const Tensor& labels, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: [B,T] was expected");
  const int64_t batch = logits.size(0), tasks = logits.size(1);
  const auto check = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == batch && t.size(1) == tasks && same_device(t, logits), name,
                    ": [B,T] = [", batch, ",", tasks, "] on logits' device was expected");
    return torch::stable::contiguous(t);
  };
  const Tensor x = check(logits, "logits"), y = check(labels, "labels"), w = mask ? check(*mask, "mask") : y;
  const DeviceGuard guard(logits.get_device_index());
  Tensor loss = floats(x, {tasks}), dlogits = floats(x, {batch, tasks});
  BceArgs args{};
  args.plan = plan_loss(batch, tasks);
  const Tensor scratch = floats(x, {(args.plan.row_blocks + 1) * tasks});
  args.logits = x.const_data_ptr();
  args.labels = labels_of(y, "labels");
  if (mask) args.mask = labels_of(w, "mask");
  args.dlogits = data(dlogits);
  args.partials = data(scratch) + tasks;
  const cudaStream_t stream = current_stream(logits);
  with_logits(x, "logits", [&](auto s) { launch_masked_bce<decltype(s)>(args, data(loss), data(scratch), stream); });
  return {loss, dlogits};
}

Tensor masked_bce_backward(const Tensor& grad, const Tensor& dlogits) {
  STD_TORCH_CHECK(dlogits.dim() == 2 && dlogits.scalar_type() == ScalarType::Float,
                  "dlogits: float32 [B,T] was expected");
  const int64_t batch = dlogits.size(0), tasks = dlogits.size(1);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == tasks && grad.scalar_type() == ScalarType::Float,
                  "grad: float32 [T] = [", tasks, "] was expected");
  const Tensor g = torch::stable::contiguous(grad), d = torch::stable::contiguous(dlogits);
  const DeviceGuard guard(dlogits.get_device_index());
  Tensor out = floats(d, {batch, tasks});
  const ScaleArgs args{plan_loss(batch, tasks),
                       static_cast<const float*>(g.const_data_ptr()),
                       {static_cast<const float*>(d.const_data_ptr()), nullptr},
                       {data(out), nullptr}};
  launch_loss_scale(args, current_stream(dlogits));
  return out;
}

}  // namespace
}  // namespace mtl::loss

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("masked_bce", TORCH_BOX(&mtl::loss::masked_bce));
  m.impl("masked_bce_eager", TORCH_BOX(&mtl::loss::masked_bce));
  m.impl("masked_bce_backward", TORCH_BOX(&mtl::loss::masked_bce_backward));
}
