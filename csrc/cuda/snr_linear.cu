// snr_linear and snr_linear_backward on CUDA tensors: checks, allocation, launch.
#include <algorithm>
#include <string>
#include <tuple>

#include "../common/boxing.h"
#include "glue.h"
// After glue.h, for it needs MTL_LAUNCH.
#include "snr_linear_launch.cuh"

namespace mtl {
namespace {

// The inputs of one call as the kernels take them.
struct SnrCall {
  Tensor x, weight, gate;
  Tensor rounded;  // the weight in x's type
  Scalar type, parameter_type;
  SnrArgs args{};

  SnrCall(const Tensor& x_in, const Tensor& weight_in, const Tensor& gate_in, const std::string& activation, bool skip)
      : x(x_in),
        weight(weight_in),
        gate(gate_in),
        type(scalar_of(x_in, "x")),
        parameter_type(scalar_of(weight_in, "weight")) {
    STD_TORCH_CHECK(weight.dim() == 4, "weight: [I,J,N,K] was expected, got ", weight.dim(), " dimensions");
    const int64_t upper = weight.size(0), lower = weight.size(1);
    args.outputs = weight.size(2);
    args.features = weight.size(3);
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == lower && x.size(2) == args.features, "x: [B,J,K] = [B, ", lower, ", ",
                    args.features, "] was expected, as weight's");
    STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == upper && gate.size(1) == lower, "gate: [I,J] = [", upper, ", ",
                    lower, "] was expected");
    check_companion(weight_in, x_in, "weight");
    check_companion(gate_in, x_in, "gate");
    STD_TORCH_CHECK(type != Scalar::f64, "x: float32, bfloat16 or float16 was expected, got float64");
    STD_TORCH_CHECK(type == parameter_type || parameter_type == Scalar::f32,
                    "weight: x's dtype was expected, or float32 where x is 16 bit");
    args.batch = x.size(0);
    args.columns = upper * args.outputs;
    args.activation = activation_from(activation);
    args.skip = skip;
    const auto tiles = [&](int64_t rows, int64_t columns) { return (rows / 64 + 1) * (columns / 64 + 1); };
    // Offsets are 64 bit; sizes, and the number of tiles that any of the products has, are not.
    STD_TORCH_CHECK(
        std::max({args.batch, lower * args.columns, upper, lower, args.features,
                  tiles(args.batch, args.outputs) * upper, tiles(args.batch, args.features) * lower,
                  tiles(args.outputs, args.features) * std::max<int64_t>(1, upper * lower)}) < INT32_MAX - 1024,
        "x, weight: B, I * J * N, K and the number of 64x64 tiles below 2^31 were expected");
    args.upper = static_cast<int>(upper);
    args.lower = static_cast<int>(lower);
    x = rows_contiguous(x);
    args.x = x.const_data_ptr();
    args.x_row = x.stride(0);
    args.x_unit = x.stride(1);
    args.out_row = lower * args.features;
    gate = torch::stable::contiguous(gate);
    args.gate = gate.const_data_ptr();
    args.gate_type = scalar_of(gate, "gate");
    weight = torch::stable::contiguous(weight);
    args.given_weight = weight.const_data_ptr();
    args.given_type = parameter_type;
  }

  // float32 weights beside 16-bit x are rounded once here, not by every tile that reads them.
  void need_weight() {
    rounded = type == parameter_type ? weight : torch::stable::to(weight, x.scalar_type());
    args.weight = rounded.const_data_ptr();
  }

  LinearPlan plan(LinearProduct product) const {
    return plan_snr(product, args.batch, args.outputs, args.features, args.upper, args.lower, type != Scalar::f32);
  }

  template <LinearProduct PRODUCT>
  void launch(const LinearPlan& plan, cudaStream_t stream) {
    dispatch(type, "x", [&](auto s) { launch_snr<decltype(s), PRODUCT>(args, plan, stream); });
  }
};

std::tuple<Tensor, Tensor> snr_linear(const Tensor& x, const Tensor& weight, const Tensor& gate, Optional bias,
                                      std::string activation, bool skip_closed, bool save) {
  SnrCall call(x, weight, gate, activation, skip_closed);
  SnrArgs& args = call.args;
  check_companion(bias, x, "bias");
  STD_TORCH_CHECK(!bias || (bias->numel() == args.columns && bias->scalar_type() == weight.scalar_type()),
                  "bias: [I,N] in weight's dtype was expected");
  const DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {args.batch, args.upper, args.outputs};
  const bool with_z = save && needs_input(args.activation);
  Tensor y = empty(x, shape, x.scalar_type());
  Tensor z = empty(x, with_z ? shape : std::vector<int64_t>{0}, x.scalar_type());
  if (y.numel() == 0) return {y, z};

  call.need_weight();
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

// Those of dweight, dgate and dbias that are wanted; the sums over the batch are cut into slices where that fills the
// GPU. An unwanted one is null.
void parameter_gradients(SnrCall& call, Tensor* dweight, Tensor* dgate, Tensor* dbias, cudaStream_t stream) {
  SnrArgs& args = call.args;
  if (!dweight && !dgate) args.features = 0;
  const LinearPlan plan = call.plan(LinearProduct::kWeight);
  const int64_t pairs = int64_t{args.upper} * args.lower, size = pairs * args.outputs * args.features;
  const int64_t product_rows = pairs ? snr_product_rows(args, plan) : 0;
  args.slice_rows = static_cast<int>(plan.slice_rows);
  args.exact = plan.slices > 1 || call.parameter_type == Scalar::f32;
  std::vector<Tensor> keep;
  const auto sums_of = [&](Tensor* gradient, int64_t n) -> void* {
    if (!gradient || n == 0) return nullptr;
    return plan.slices > 1 ? allocate_floats(call.x, plan.slices * n, keep) : gradient->mutable_data_ptr();
  };
  args.out = sums_of(dweight, size);
  args.dbias = sums_of(dbias, args.columns);
  if (dgate) args.products = allocate_floats(call.x, product_rows * pairs, keep);
  if (args.out || args.dbias || args.products) call.launch<LinearProduct::kWeight>(plan, stream);
  if (dgate) launch_sum_partials(args.products, product_rows, pairs, dgate->mutable_data_ptr(), args.gate_type, stream);
  if (plan.slices == 1) return;
  const auto add = [&](const void* sums, int64_t n, Tensor* to) {
    if (!sums) return;
    launch_sum_slices(static_cast<const float*>(sums), plan.slices, n, to->mutable_data_ptr(), call.parameter_type,
                      stream);
  };
  add(args.out, size, dweight);
  add(args.dbias, args.columns, dbias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> snr_linear_backward(const Tensor& grad_in, const Tensor& x,
                                                               const Tensor& weight, const Tensor& gate,
                                                               const Tensor& saved_in, std::string activation,
                                                               bool skip_closed, int64_t needs) {
  SnrCall call(x, weight, gate, activation, skip_closed);
  SnrArgs& args = call.args;
  check_companion(grad_in, x, "grad");
  check_companion(saved_in, x, "saved");
  const int64_t size = args.batch * args.columns;
  STD_TORCH_CHECK(grad_in.numel() == size && grad_in.scalar_type() == x.scalar_type(),
                  "grad: [B,I,N] in x's dtype was expected");
  const bool through = args.activation != Activation::kNone;
  STD_TORCH_CHECK(!through || (saved_in.numel() == size && saved_in.scalar_type() == x.scalar_type()),
                  "saved: [B,I,N] in x's dtype was expected");
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor saved = through ? torch::stable::contiguous(saved_in) : grad;
  args.grad = grad.const_data_ptr();
  args.saved = through ? saved.const_data_ptr() : nullptr;
  const auto gradient = [&](int64_t bit, std::vector<int64_t> shape, ScalarType dtype) {
    return empty(x, needs & bit ? shape : std::vector<int64_t>{0}, dtype);
  };
  const int64_t upper = args.upper, lower = args.lower;
  Tensor dx = gradient(1, {args.batch, lower, args.features}, x.scalar_type());
  Tensor dweight = gradient(2, {upper, lower, args.outputs, args.features}, weight.scalar_type());
  Tensor dgate = gradient(4, {upper, lower}, gate.scalar_type());
  Tensor dbias = gradient(8, {upper, args.outputs}, weight.scalar_type());

  const cudaStream_t stream = current_stream(x);
  if (dx.numel() > 0) {
    call.need_weight();
    args.out = dx.mutable_data_ptr();
    call.launch<LinearProduct::kInput>(call.plan(LinearProduct::kInput), stream);
  }
  const auto wanted = [&](Tensor& tensor) { return tensor.numel() > 0 ? &tensor : nullptr; };
  if (needs & 14) parameter_gradients(call, wanted(dweight), wanted(dgate), wanted(dbias), stream);
  return {dx, dweight, dgate, dbias};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("snr_linear", TORCH_BOX(&mtl::snr_linear));
  m.impl("snr_linear_eager", TORCH_BOX(&mtl::snr_linear));
  m.impl("snr_linear_backward", TORCH_BOX(&mtl::snr_linear_backward));
}
