// What mix's torch glue shares with the operators that are built on it: a call's checked inputs, the operator itself.
#pragma once

#include <tuple>

#include "../common/boxing.h"
#include "glue.h"
// After glue.h, for it needs MTL_LAUNCH.
#include "mix_launch.cuh"

namespace mtl {

std::tuple<Tensor, Tensor> mix(const Tensor& experts, Optional logits, Optional stat, Optional mask, Optional columns,
                               Units native);
std::tuple<Tensor, Tensor, Tensor> mix_backward(const Tensor& grad, Optional grad_lse, const Tensor& experts,
                                                Optional logits, Optional stat, Optional mask, Optional columns,
                                                Units native, const Tensor& lse, int64_t needs);

// D must be contiguous, the outer strides are free. A dimension of size one or zero may carry any stride.
inline Tensor with_contiguous_last(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, ": three dimensions were expected, got ", tensor.dim());
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline void check_dim(const Optional& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(!tensor || tensor->dim() == dim, name, ": ", dim, " dimensions were expected, got ", tensor->dim());
}

// The contiguous inputs of one call, and what the kernels are told about them.
struct MixCall {
  Tensor h;
  Optional logits, stat, mask, columns;
  Scalar type;
  bool channel;
  MixArgs args{};

  MixCall(const Tensor& experts, const Optional& logits_in, const Optional& static_in, const Optional& mask_in,
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

}  // namespace mtl
