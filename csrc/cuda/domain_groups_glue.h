// From a tensor of ids to rows grouped by domain.
#pragma once

#include <array>
#include <tuple>

#include "glue.h"
// After glue.h, for it needs MTL_LAUNCH.
#include "domain_groups.cuh"

namespace mtl {

// Sorted ids, and the rows in their order; equal ids keep theirs.
inline std::tuple<Tensor, Tensor> sort_stably(const Tensor& ids) {
  namespace convert = torch::stable::detail;
  std::array<StableIValue, 4> stack{convert::from(ids), convert::from(std::optional<bool>(true)),
                                    convert::from(int64_t{0}), convert::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {convert::to<Tensor>(stack[0]), convert::to<Tensor>(stack[1])};
}

// Fills order and bound, which live as long as `keep`. `domain`: what groups.ids points to.
inline void group_by_domain(DomainGroups& groups, const Tensor& domain, std::vector<Tensor>& keep,
                            cudaStream_t stream) {
  const auto [ids, order] = sort_stably(domain);
  const Tensor bound = empty(domain, {groups.domains + 3}, ScalarType::Long);
  keep.insert(keep.end(), {ids, order, bound});
  groups.order = static_cast<const int64_t*>(order.const_data_ptr());
  groups.bound = static_cast<int64_t*>(bound.mutable_data_ptr());
  DomainGroups sorted = groups;
  sorted.ids = ids.const_data_ptr();
  launch_domain_bounds(sorted, stream);
}

}  // namespace mtl
