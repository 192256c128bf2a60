// partitioned_norm and its backward on CUDA tensors: checks, grouping, allocation, launch.
#include <tuple>

#include "../common/boxing.h"
#include "domain_groups_glue.h"
#include "partitioned_norm_launch.cuh"

namespace mtl {
namespace partitioned_norm_glue {
namespace {

int bytes_of(Scalar type) { return type == Scalar::f32 ? 4 : 2; }

Tensor with_contiguous_last(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The inputs that forward and backward share, and what the kernels are told about them.
struct Call {
  Tensor x, domain, weight, own_weight;
  Scalar type;
  std::vector<Tensor> keep;
  GroupedNormArgs args{};

  Call(const Tensor& x_in, const Tensor& domain_in, const Tensor& weight_in, const Tensor& own_weight_in, bool training,
       double eps)
      : x(with_contiguous_last(two_dimensional(x_in))),
        domain(torch::stable::contiguous(domain_in)),
        weight(torch::stable::contiguous(weight_in)),
        own_weight(torch::stable::contiguous(own_weight_in)),
        type(scalar_of(x, "x")) {
    STD_TORCH_CHECK(type != Scalar::f64, "x: float32, bfloat16 or float16 was expected, got float64");
    args.batch = x.size(0);
    args.width = x.size(1);
    STD_TORCH_CHECK(domain.dim() == 1 && domain.size(0) == args.batch && same_device(domain, x), "domain: [B] = [",
                    args.batch, "] on the device of x was expected");
    const ScalarType ids = domain.scalar_type();
    STD_TORCH_CHECK(ids == ScalarType::Long || ids == ScalarType::Int, "domain: int64 or int32 was expected");
    STD_TORCH_CHECK(own_weight.dim() == 2, "domain_weight: [P,D] was expected");
    args.domains = own_weight.size(0);
    table(own_weight, "domain_weight");
    row(weight, "weight");
    args.x = x.const_data_ptr();
    args.x_row = x.stride(0);
    args.ids = domain.const_data_ptr();
    args.wide_ids = ids == ScalarType::Long;
    args.weight = weight.const_data_ptr();
    args.own_weight = own_weight.const_data_ptr();
    args.affine_type = scalar_of(weight, "weight");
    STD_TORCH_CHECK(own_weight.scalar_type() == weight.scalar_type(), "domain_weight: weight's dtype was expected");
    args.training = training;
    args.eps = static_cast<float>(eps);
  }

  static const Tensor& two_dimensional(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2, "x: [B,D] was expected");
    return tensor;
  }
  void table(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == args.domains && tensor.size(1) == args.width && same_device(tensor, x),
        name, ": [P,D] = [", args.domains, ",", args.width, "] on the device of x was expected");
  }
  void row(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == args.width && same_device(tensor, x), name, ": [D] = [",
                    args.width, "] on the device of x was expected");
  }
  const void* kept(const Tensor& tensor) {
    keep.push_back(torch::stable::contiguous(tensor));
    return keep.back().const_data_ptr();
  }
  template <class T>
  T* room(std::vector<int64_t> shape, ScalarType scalar) {
    keep.push_back(empty(x, std::move(shape), scalar));
    return static_cast<T*>(keep.back().mutable_data_ptr());
  }

  // Sorts the ids, finds the buckets and makes room for the chunks' results.
  void group(cudaStream_t stream) {
    group_by_domain(args, domain, keep, stream);
    plan_norm(args, norm_vec(args, bytes_of(type)));
    args.partial = room<float>({args.slots, 2, args.width}, ScalarType::Float);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> partitioned_norm(const Tensor& x, const Tensor& domain, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& domain_weight,
                                                            const Tensor& domain_bias, const Tensor& running_mean,
                                                            const Tensor& running_var, bool training, double eps) {
  Call call(x, domain, weight, domain_weight, training, eps);
  GroupedNormArgs& args = call.args;
  call.row(bias, "bias");
  call.table(domain_bias, "domain_bias");
  call.table(running_mean, "running_mean");
  call.table(running_var, "running_var");
  STD_TORCH_CHECK(bias.scalar_type() == weight.scalar_type() && domain_bias.scalar_type() == weight.scalar_type(),
                  "bias, domain_bias: weight's dtype was expected");
  STD_TORCH_CHECK(running_var.scalar_type() == running_mean.scalar_type(),
                  "running_var: running_mean's dtype was expected");
  args.bias = call.kept(bias);
  args.own_bias = call.kept(domain_bias);
  args.running_mean = call.kept(running_mean);
  args.running_var = call.kept(running_var);
  args.running_type = scalar_of(running_mean, "running_mean");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  Tensor out = empty(x, {args.batch, args.width}, x.scalar_type());
  Tensor mean = empty(x, {args.domains, args.width}, ScalarType::Float);
  Tensor var = empty(x, {args.domains, args.width}, ScalarType::Float);
  Tensor count = empty(x, {args.domains}, ScalarType::Long);
  args.out = out.mutable_data_ptr();
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.var = static_cast<float*>(var.mutable_data_ptr());
  args.count = static_cast<int64_t*>(count.mutable_data_ptr());
  if (args.domains == 0) return {out, mean, var, count};
  if (training) call.group(stream);
  dispatch(call.type, "x", [&](auto s) { launch_norm_forward<decltype(s)>(args, stream); });
  return {out, mean, var, count};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors partitioned_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& domain, const Tensor& weight,
                                      const Tensor& domain_weight, const Tensor& mean, const Tensor& var,
                                      const Tensor& count, bool training, double eps, int64_t needs) {
  Call call(x, domain, weight, domain_weight, training, eps);
  GroupedNormArgs& args = call.args;
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == args.batch && grad.size(1) == args.width &&
                      grad.scalar_type() == x.scalar_type(),
                  "grad: [B,D] = [", args.batch, ",", args.width, "] of x's dtype was expected");
  call.table(mean, "mean");
  call.table(var, "var");
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && var.scalar_type() == ScalarType::Float,
                  "mean, var: float32 was expected");
  STD_TORCH_CHECK(count.dim() == 1 && count.size(0) == args.domains && count.scalar_type() == ScalarType::Long,
                  "count: [P] = [", args.domains, "] int64 was expected");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const auto gradient = [&](int64_t bit, std::vector<int64_t> shape, const Tensor& like) {
    return empty(x, needs & bit ? shape : std::vector<int64_t>{0}, like.scalar_type());
  };
  Tensor dx = gradient(1, {args.batch, args.width}, x);
  Tensor dweight = gradient(2, {args.width}, weight), dbias = gradient(4, {args.width}, weight);
  Tensor down_weight = gradient(8, {args.domains, args.width}, domain_weight);
  Tensor down_bias = gradient(16, {args.domains, args.width}, domain_weight);
  if (!needs || args.width == 0 || args.domains == 0) return {dx, dweight, dbias, down_weight, down_bias};

  const Tensor g = with_contiguous_last(grad);
  args.grad = g.const_data_ptr();
  args.grad_row = g.stride(0);
  args.mean = static_cast<float*>(const_cast<void*>(call.kept(mean)));
  args.var = static_cast<float*>(const_cast<void*>(call.kept(var)));
  args.count = static_cast<int64_t*>(const_cast<void*>(call.kept(count)));
  args.out = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  call.group(stream);
  if (training || needs & 30) {
    args.total = call.room<float>({args.domains, args.width}, ScalarType::Float);
    args.product = call.room<float>({args.domains, args.width}, ScalarType::Float);
    if (needs & 2) args.weighted = call.room<float>({args.domains, args.width}, ScalarType::Float);
    if (needs & 8) args.down_weight = down_weight.mutable_data_ptr();
    if (needs & 16) args.down_bias = down_bias.mutable_data_ptr();
  }
  dispatch(call.type, "x", [&](auto s) { launch_norm_backward<decltype(s)>(args, stream); });
  if (needs & 2)
    launch_sum_partials(args.weighted, args.domains, args.width, dweight.mutable_data_ptr(), args.affine_type, stream);
  if (needs & 4)
    launch_sum_partials(args.total, args.domains, args.width, dbias.mutable_data_ptr(), args.affine_type, stream);
  return {dx, dweight, dbias, down_weight, down_bias};
}

}  // namespace
}  // namespace partitioned_norm_glue
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("partitioned_norm", TORCH_BOX(&mtl::partitioned_norm_glue::partitioned_norm));
  m.impl("partitioned_norm_eager", TORCH_BOX(&mtl::partitioned_norm_glue::partitioned_norm));
  m.impl("partitioned_norm_backward", TORCH_BOX(&mtl::partitioned_norm_glue::partitioned_norm_backward));
}
