// expert_linear and expert_linear_backward on CUDA tensors: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>

#include "glue.h"
// After glue.h, for it needs MTL_LAUNCH.
#include "expert_linear_launch.cuh"

namespace mtl {
namespace {

// The inputs of one call as the kernels take them.
struct LinearCall {
  Tensor x, weight;
  Scalar type, parameter_type;
  std::vector<int64_t> experts;  // of each unit
  int64_t num_experts;
  LinearArgs args{};

  LinearCall(const Tensor& x_in, const Tensor& weight_in, const Units& experts_per_unit, const std::string& activation)
      : x(x_in), weight(weight_in), type(scalar_of(x_in, "x")), parameter_type(scalar_of(weight_in, "weight")) {
    STD_TORCH_CHECK(weight.dim() == 3, "weight: [E,N,K] was expected, got ", weight.dim(), " dimensions");
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x: [B,K] or [B,U,K] was expected, got ", x.dim(), " dimensions");
    check_companion(weight_in, x_in, "weight");
    STD_TORCH_CHECK(type != Scalar::f64, "x: float32, bfloat16 or float16 was expected, got float64");
    STD_TORCH_CHECK(type == parameter_type || parameter_type == Scalar::f32,
                    "weight: x's dtype was expected, or float32 where x is 16 bit");
    STD_TORCH_CHECK(x.size(x.dim() - 1) == weight.size(2), "x: K = ", weight.size(2), " was expected, as weight's");
    STD_TORCH_CHECK(x.dim() == 3 || !experts_per_unit, "experts_per_unit: goes with x [B,U,K]");
    num_experts = weight.size(0);
    const int64_t units = x.dim() == 3 ? x.size(1) : 1;
    if (x.dim() == 2) {
      experts = {num_experts};
    } else {
      experts = experts_per_unit ? *experts_per_unit : std::vector<int64_t>(units, 1);
    }
    STD_TORCH_CHECK(static_cast<int64_t>(experts.size()) == units, "experts_per_unit: ", units,
                    " counts were expected");
    for (const int64_t count : experts) STD_TORCH_CHECK(count >= 0, "experts_per_unit: a count is negative");
    STD_TORCH_CHECK(std::accumulate(experts.begin(), experts.end(), int64_t{0}) == num_experts,
                    "experts_per_unit: counts that sum to E = ", num_experts, " were expected");

    x = rows_contiguous(x);
    args.batch = x.size(0);
    args.outputs = weight.size(1);
    args.features = weight.size(2);
    args.columns = num_experts * args.outputs;
    args.x = x.const_data_ptr();
    args.x_row = x.stride(0);
    args.x_unit = x.dim() == 3 ? x.stride(1) : 0;
    args.out_row = units * args.features;
    args.activation = activation_from(activation);
    // Offsets are 64 bit; sizes, and the number of tiles that any of the products has, are not.
    const int64_t tiles = (args.batch / 64 + 1) * ((args.columns + args.out_row) / 64 + 2 * units);
    STD_TORCH_CHECK(std::max({args.batch, args.columns, args.features, tiles}) < INT32_MAX - 1024 &&
                        (args.columns / 64 + units) * (args.features / 64 + 1) < INT32_MAX / 512,
                    "x, weight: B, E * N, K and the number of 64x64 tiles below 2^31 were expected");
  }

  // float32 weights beside 16-bit x are rounded once here, not by every tile that reads them.
  void need_weight(ScalarType stored) {
    if (type != parameter_type) weight = torch::stable::to(weight, stored);
    weight = torch::stable::contiguous(weight);
    args.weight = weight.const_data_ptr();
  }

  LinearPlan plan(LinearProduct product) const {
    return plan_linear(product, args.batch, args.outputs, args.features, experts, type != Scalar::f32);
  }

  template <LinearProduct PRODUCT>
  void launch(const LinearPlan& plan, cudaStream_t stream) {
    dispatch(type, "x", [&](auto s) { launch_linear<decltype(s), PRODUCT>(args, plan, experts, stream); });
  }
};

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x, const Tensor& weight, Optional bias, Units experts_per_unit,
                                         std::string activation, bool save) {
  LinearCall call(x, weight, experts_per_unit, activation);
  LinearArgs& args = call.args;
  check_companion(bias, x, "bias");
  STD_TORCH_CHECK(!bias || (bias->numel() == args.columns && bias->scalar_type() == weight.scalar_type()),
                  "bias: [E,N] in weight's dtype was expected");
  const DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {args.batch, call.num_experts, args.outputs};
  const bool with_z = save && needs_input(args.activation);
  Tensor y = empty(x, shape, x.scalar_type());
  Tensor z = empty(x, with_z ? shape : std::vector<int64_t>{0}, x.scalar_type());
  if (y.numel() == 0) return {y, z};

  call.need_weight(x.scalar_type());
  if (bias) {
    bias = torch::stable::contiguous(*bias);
    args.bias = bias->const_data_ptr();
    args.bias_type = call.parameter_type;
  }
  args.out = y.mutable_data_ptr();
  if (with_z) args.z = z.mutable_data_ptr();
  call.launch<LinearProduct::kForward>(call.plan(LinearProduct::kForward), current_stream(x));
  return {y, z};
}

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

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("expert_linear", TORCH_BOX(&mtl::expert_linear));
  m.impl("expert_linear_eager", TORCH_BOX(&mtl::expert_linear));
  m.impl("expert_linear_backward", TORCH_BOX(&mtl::expert_linear_backward));
}
