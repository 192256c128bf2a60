// star_linear and star_linear_backward on CUDA tensors: checks, grouping, allocation, launch.
#include <algorithm>
#include <string>
#include <tuple>

#include "../common/boxing.h"
#include "domain_groups_glue.h"
// After glue.h, for it needs MTL_LAUNCH.
#include "star_linear_launch.cuh"

namespace mtl {
namespace star_linear_glue {
namespace {

// The inputs of one call as the kernels take them.
struct Call {
  Tensor x, domain, weight, own_weight;
  Scalar type, parameter_type;
  std::vector<Tensor> keep;
  StarArgs args{};

  Call(const Tensor& x_in, const Tensor& domain_in, const Tensor& weight_in, const Tensor& own_weight_in,
       const std::string& activation)
      : x(x_in),
        domain(domain_in),
        weight(torch::stable::contiguous(weight_in)),
        own_weight(torch::stable::contiguous(own_weight_in)),
        type(scalar_of(x_in, "x")),
        parameter_type(scalar_of(weight_in, "weight")) {
    STD_TORCH_CHECK(x.dim() == 2, "x: [B,K] was expected, got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(type != Scalar::f64, "x: float32, bfloat16 or float16 was expected, got float64");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1) && same_device(weight, x),
                    "weight: [N,K] with K = ", x.size(1), " on the device of x was expected");
    STD_TORCH_CHECK(type == parameter_type || parameter_type == Scalar::f32,
                    "weight: x's dtype was expected, or float32 where x is 16 bit");
    STD_TORCH_CHECK(own_weight.dim() == 3 && own_weight.size(0) > 0 && own_weight.size(1) == weight.size(0) &&
                        own_weight.size(2) == weight.size(1) && same_device(own_weight, x),
                    "domain_weight: [P,N,K] = [P,", weight.size(0), ",", weight.size(1),
                    "] with P > 0 on the device of x was expected");
    STD_TORCH_CHECK(own_weight.scalar_type() == weight.scalar_type(), "domain_weight: weight's dtype was expected");
    STD_TORCH_CHECK(domain.dim() == 1 && domain.size(0) == x.size(0) && same_device(domain, x), "domain: [B] = [",
                    x.size(0), "] on the device of x was expected");
    const ScalarType ids = domain.scalar_type();
    const bool narrow = ids == ScalarType::Short || ids == ScalarType::Char || ids == ScalarType::Byte;
    STD_TORCH_CHECK(ids == ScalarType::Long || ids == ScalarType::Int || narrow,
                    "domain: an integer type was expected, got scalar type ", static_cast<int>(ids));
    args.batch = x.size(0);
    args.outputs = args.columns = weight.size(0);
    args.features = args.out_row = weight.size(1);
    args.activation = activation_from(activation);
    args.groups.batch = args.batch;
    args.groups.domains = own_weight.size(0);
    // Offsets are 64 bit; sizes, and the number of tiles that any of the products has, are not.
    const int64_t slots = args.batch / 32 + args.groups.domains + 2;
    const int64_t across = args.outputs / 64 + 1, down = args.features / 64 + 1;
    STD_TORCH_CHECK(std::max({args.batch, args.outputs, args.features}) < INT32_MAX - 1024 &&
                        slots < INT32_MAX / std::max(across, down) &&
                        args.batch / 512 + args.groups.domains + 300 < INT32_MAX / across / down,
                    "x, domain_weight: B, N, K, P and the number of 64x64 tiles below 2^31 were expected");
    x = rows_contiguous(x);
    args.x = x.const_data_ptr();
    args.x_row = x.stride(0);
    args.weight = weight.const_data_ptr();
    args.own_weight = own_weight.const_data_ptr();
    if (narrow) domain = torch::stable::to(domain, ScalarType::Int);
    domain = torch::stable::contiguous(domain);
    args.groups.ids = domain.const_data_ptr();
    args.groups.wide_ids = ids == ScalarType::Long;
  }

  LinearPlan plan(LinearProduct product) const {
    return plan_star(product, args.batch, args.groups.domains, args.outputs, args.features, type != Scalar::f32,
                     parameter_type != Scalar::f32);
  }

  void group(cudaStream_t stream) { group_by_domain(args.groups, domain, keep, stream); }

  template <LinearProduct PRODUCT>
  void launch(const LinearPlan& plan, cudaStream_t stream) {
    dispatch(type, "x", [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(S) == 2 && PRODUCT != LinearProduct::kWeight) {  // which does not read the weights
        if (parameter_type == Scalar::f32) return launch_star<S, float, PRODUCT>(args, plan, stream);
      }
      launch_star<S, S, PRODUCT>(args, plan, stream);
    });
  }
};

std::tuple<Tensor, Tensor> star_linear(const Tensor& x, const Tensor& domain, const Tensor& weight,
                                       const Tensor& domain_weight, Optional bias, Optional domain_bias,
                                       std::string activation, bool save) {
  Call call(x, domain, weight, domain_weight, activation);
  StarArgs& args = call.args;
  const auto check = [&](const Optional& tensor, int64_t size, const char* message) {
    STD_TORCH_CHECK(!tensor || (tensor->numel() == size && tensor->scalar_type() == weight.scalar_type()), message);
  };
  check_companion(bias, x, "bias");
  check(bias, args.outputs, "bias: [N] in weight's dtype was expected");
  check_companion(domain_bias, x, "domain_bias");
  check(domain_bias, args.groups.domains * args.outputs, "domain_bias: [P,N] in weight's dtype was expected");
  const DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {args.batch, args.outputs};
  const bool with_z = save && needs_input(args.activation);
  Tensor y = empty(x, shape, x.scalar_type());
  Tensor z = empty(x, with_z ? shape : std::vector<int64_t>{0}, x.scalar_type());
  if (y.numel() == 0) return {y, z};

  const auto kept = [&](const Optional& tensor) -> const void* {
    if (!tensor) return nullptr;
    call.keep.push_back(torch::stable::contiguous(*tensor));
    return call.keep.back().const_data_ptr();
  };
  args.bias = kept(bias);
  args.own_bias = kept(domain_bias);
  args.bias_type = call.parameter_type;
  args.out = y.mutable_data_ptr();
  if (with_z) args.z = z.mutable_data_ptr();
  const cudaStream_t stream = current_stream(x);
  call.group(stream);
  call.launch<LinearProduct::kForward>(call.plan(LinearProduct::kForward), stream);
  return {y, z};
}

// The parameters' gradients; one that is not wanted is null.
struct Gradients {
  Tensor *weight, *own_weight, *bias, *own_bias;
};

void parameter_gradients(Call& call, const Gradients& wanted, cudaStream_t stream) {
  StarArgs& args = call.args;
  const bool with_bias = wanted.bias || wanted.own_bias;
  if (!(wanted.weight || wanted.own_weight)) args.features = 0;
  const int64_t size = args.outputs * args.features;
  if (args.outputs == 0 || (size == 0 && !with_bias)) return;
  const LinearPlan plan = call.plan(LinearProduct::kWeight);
  const int64_t slots = domain_slots(args.groups, plan.slice_rows);
  float* const sums = allocate_floats(call.x, slots * size, call.keep);
  float* const bias_sums = with_bias ? allocate_floats(call.x, slots * args.outputs, call.keep) : nullptr;
  args.out = sums;
  args.dbias = bias_sums;
  args.exact = true;
  if (args.batch > 0) call.launch<LinearProduct::kWeight>(plan, stream);
  const auto combine = [&](const float* partial, int64_t numbers, Tensor* shared, Tensor* own, bool scale) {
    if (numbers == 0 || !(shared || own)) return;
    StarSums a{args.groups, partial, numbers, plan.slice_rows};
    a.type = call.parameter_type;
    if (scale) {
      a.weight = args.weight;
      a.own_weight = args.own_weight;
    }
    if (shared) a.shared = shared->mutable_data_ptr();
    if (own) a.own = own->mutable_data_ptr();
    launch_star_combine(a, stream);
  };
  combine(sums, size, wanted.weight, wanted.own_weight, true);
  combine(bias_sums, args.outputs, wanted.bias, wanted.own_bias, false);
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors star_linear_backward(const Tensor& grad_in, const Tensor& x, const Tensor& domain, const Tensor& weight,
                                 const Tensor& domain_weight, const Tensor& saved_in, std::string activation,
                                 int64_t needs) {
  Call call(x, domain, weight, domain_weight, activation);
  StarArgs& args = call.args;
  check_companion(grad_in, x, "grad");
  check_companion(saved_in, x, "saved");
  const int64_t size = args.batch * args.outputs;
  STD_TORCH_CHECK(grad_in.numel() == size && grad_in.scalar_type() == x.scalar_type(),
                  "grad: [B,N] in x's dtype was expected");
  const bool through = args.activation != Activation::kNone;
  STD_TORCH_CHECK(!through || (saved_in.numel() == size && saved_in.scalar_type() == x.scalar_type()),
                  "saved: [B,N] in x's dtype was expected");
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor saved = through ? torch::stable::contiguous(saved_in) : grad;
  args.grad = grad.const_data_ptr();
  args.saved = through ? saved.const_data_ptr() : nullptr;
  const auto gradient = [&](int64_t bit, std::vector<int64_t> shape, const Tensor& like) {
    return empty(x, needs & bit ? shape : std::vector<int64_t>{0}, like.scalar_type());
  };
  const int64_t n = args.outputs, k = args.features, domains = args.groups.domains;
  Tensor dx = gradient(1, {args.batch, k}, x);
  Tensor dweight = gradient(2, {n, k}, weight), down_weight = gradient(4, {domains, n, k}, weight);
  Tensor dbias = gradient(8, {n}, weight), down_bias = gradient(16, {domains, n}, weight);
  if (!(needs & 31)) return {dx, dweight, down_weight, dbias, down_bias};

  const cudaStream_t stream = current_stream(x);
  call.group(stream);
  if (dx.numel() > 0) {
    args.out = dx.mutable_data_ptr();
    call.launch<LinearProduct::kInput>(call.plan(LinearProduct::kInput), stream);
  }
  const auto if_wanted = [&](int64_t bit, Tensor& tensor) { return needs & bit ? &tensor : nullptr; };
  parameter_gradients(
      call, {if_wanted(2, dweight), if_wanted(4, down_weight), if_wanted(8, dbias), if_wanted(16, down_bias)}, stream);
  return {dx, dweight, down_weight, dbias, down_bias};
}

}  // namespace
}  // namespace star_linear_glue
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("star_linear", TORCH_BOX(&mtl::star_linear_glue::star_linear));
  m.impl("star_linear_eager", TORCH_BOX(&mtl::star_linear_glue::star_linear));
  m.impl("star_linear_backward", TORCH_BOX(&mtl::star_linear_glue::star_linear_backward));
}
