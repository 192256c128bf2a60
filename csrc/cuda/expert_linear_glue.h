// What expert_linear's torch glue shares with the operators that are built on it: a call's checked inputs, the operator
// itself.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>

#include "../common/boxing.h"
#include "glue.h"
// After glue.h, for it needs MTL_LAUNCH.
#include "expert_linear_launch.cuh"

namespace mtl {

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x, const Tensor& weight, Optional bias, Units experts_per_unit,
                                         std::string activation, bool save);
std::tuple<Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& grad_in, const Tensor& x, const Tensor& weight,
                                                          const Tensor& saved_in, Units experts_per_unit,
                                                          std::string activation, int64_t needs);

// The inputs of one call as the kernels take them.
struct LinearCall {
  Tensor x, weight;
  Optional bias;
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

  void need_bias(const Optional& given) {
    check_companion(given, x, "bias");
    STD_TORCH_CHECK(!given || (given->numel() == args.columns && given->scalar_type() == weight.scalar_type()),
                    "bias: [E,N] in weight's dtype was expected");
    if (!given) return;
    bias = torch::stable::contiguous(*given);
    args.bias = bias->const_data_ptr();
    args.bias_type = parameter_type;
  }

  LinearPlan plan(LinearProduct product) const {
    return plan_linear(product, args.batch, args.outputs, args.features, experts, type != Scalar::f32);
  }

  template <LinearProduct PRODUCT>
  void launch(const LinearPlan& plan, cudaStream_t stream) {
    dispatch(type, "x", [&](auto s) { launch_linear<decltype(s), PRODUCT>(args, plan, experts, stream); });
  }
};

}  // namespace mtl
