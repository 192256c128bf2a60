// expert_linear and expert_linear_backward on CUDA tensors: checks, allocation, launch.
#include "expert_linear_glue.h"

namespace mtl {

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x, const Tensor& weight, Optional bias, Units experts_per_unit,
                                         std::string activation, bool save) {
  LinearCall call(x, weight, experts_per_unit, activation);
  LinearArgs& args = call.args;
  call.need_bias(bias);
  const DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {args.batch, call.num_experts, args.outputs};
  const bool with_z = save && needs_input(args.activation);
  Tensor y = empty(x, shape, x.scalar_type());
  Tensor z = empty(x, with_z ? shape : std::vector<int64_t>{0}, x.scalar_type());
  if (y.numel() == 0) return {y, z};

  call.need_weight(x.scalar_type());
  args.out = y.mutable_data_ptr();
  if (with_z) args.z = z.mutable_data_ptr();
  call.launch<LinearProduct::kForward>(call.plan(LinearProduct::kForward), current_stream(x));
  return {y, z};
}

namespace {

// dweight and dbias, whose sums over the batch are cut into slices where that fills the GPU.
void parameter_gradients(LinearCall& call, Tensor& dweight, Tensor& dbias, bool with_weight, bool with_bias,
                         cudaStream_t stream) {
  LinearArgs& args = call.args;
  if (!with_weight) args.features = 0;
  const int64_t size = args.columns * args.features;
  if (args.columns == 0 || (size == 0 && !with_bias)) return;
  const LinearPlan plan = call.plan(LinearProduct::kWeight);
  args.slice_rows = static_cast<int>(plan.slice_rows);
  args.exact = plan.slices > 1 || call.parameter_type == Scalar::f32;
  std::vector<Tensor> keep;
  args.out = args.dbias = nullptr;
  if (plan.slices > 1) {
    args.out = allocate_floats(call.x, plan.slices * size, keep);
    if (with_bias) args.dbias = allocate_floats(call.x, plan.slices * args.columns, keep);
  } else {
    if (with_weight) args.out = dweight.mutable_data_ptr();
    if (with_bias) args.dbias = dbias.mutable_data_ptr();
  }
  call.launch<LinearProduct::kWeight>(plan, stream);
  if (plan.slices == 1) return;
  const auto add = [&](const void* sums, int64_t n, Tensor& to) {
    launch_sum_slices(static_cast<const float*>(sums), plan.slices, n, to.mutable_data_ptr(), call.parameter_type,
                      stream);
  };
  if (with_weight) add(args.out, size, dweight);
  if (with_bias) add(args.dbias, args.columns, dbias);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& grad_in, const Tensor& x, const Tensor& weight,
                                                          const Tensor& saved_in, Units experts_per_unit,
                                                          std::string activation, int64_t needs) {
  LinearCall call(x, weight, experts_per_unit, activation);
  LinearArgs& args = call.args;
  check_companion(grad_in, x, "grad");
  check_companion(saved_in, x, "saved");
  const int64_t size = args.batch * args.columns;
  STD_TORCH_CHECK(grad_in.numel() == size && grad_in.scalar_type() == x.scalar_type(),
                  "grad: [B,E,N] in x's dtype was expected");
  const bool through = args.activation != Activation::kNone;
  STD_TORCH_CHECK(!through || (saved_in.numel() == size && saved_in.scalar_type() == x.scalar_type()),
                  "saved: [B,E,N] in x's dtype was expected");
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor saved = through ? torch::stable::contiguous(saved_in) : grad;
  args.grad = grad.const_data_ptr();
  args.saved = through ? saved.const_data_ptr() : nullptr;
  const auto gradient = [&](const Tensor& like, int64_t dims, int64_t bit) {
    const auto shape = like.sizes();
    const std::vector<int64_t> wanted(shape.begin(), shape.begin() + dims);
    return empty(x, needs & bit ? wanted : std::vector<int64_t>{0}, like.scalar_type());
  };
  Tensor dx = gradient(x, x.dim(), 1), dweight = gradient(weight, 3, 2), dbias = gradient(weight, 2, 4);

  const cudaStream_t stream = current_stream(x);
  if (dx.numel() > 0) {
    call.need_weight(x.scalar_type());
    args.out = dx.mutable_data_ptr();
    call.launch<LinearProduct::kInput>(call.plan(LinearProduct::kInput), stream);
  }
  if (needs & 6) parameter_gradients(call, dweight, dbias, needs & 2, needs & 4, stream);
  return {dx, dweight, dbias};
}

}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("expert_linear", TORCH_BOX(&mtl::expert_linear));
  m.impl("expert_linear_eager", TORCH_BOX(&mtl::expert_linear));
  m.impl("expert_linear_backward", TORCH_BOX(&mtl::expert_linear_backward));
}
