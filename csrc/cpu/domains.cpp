#include "domains.h"

#include <algorithm>

namespace mtl {

namespace {

template <class Id>
Domains sort(const Id* ids, int64_t batch, int64_t domains) {
  Domains sorted;
  sorted.first.assign(domains + 1, 0);
  sorted.rows.resize(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t p = ids[b];
    STD_TORCH_CHECK(p >= 0 && p < domains, "domain must hold ids from 0 to P-1 = ", domains - 1, "; got ", p,
                    " in row ", b);
    ++sorted.first[p + 1];
  }
  for (int64_t p = 0; p < domains; ++p) sorted.first[p + 1] += sorted.first[p];
  std::vector<int64_t> next(sorted.first.begin(), sorted.first.end() - 1);
  for (int64_t b = 0; b < batch; ++b) sorted.rows[next[ids[b]]++] = b;
  return sorted;
}

}  // namespace

Domains sort_by_domain(const Tensor& domain_in, int64_t domains) {
  const Tensor domain = dense(domain_in);
  const int64_t batch = domain.numel();
  switch (domain.scalar_type()) {
    case ScalarType::Long:
      return sort(data<int64_t>(domain), batch, domains);
    case ScalarType::Int:
      return sort(data<int32_t>(domain), batch, domains);
    case ScalarType::Short:
      return sort(data<int16_t>(domain), batch, domains);
    case ScalarType::Char:
      return sort(data<int8_t>(domain), batch, domains);
    case ScalarType::Byte:
      return sort(data<uint8_t>(domain), batch, domains);
    default:
      STD_TORCH_CHECK(false, "domain must be of an integer type");
  }
}

std::vector<std::vector<Segment>> cut_into_lanes(const Domains& rows, int64_t* partials) {
  constexpr int64_t kLanes = 8, kLaneRows = 512, kLeast = 64;
  int64_t cost = 0;
  for (int64_t p = 0; p < rows.domains(); ++p) cost += rows.count(p) ? rows.count(p) + kDomainCost : 0;
  const int64_t target = std::max(kLaneRows, (cost + kLanes - 1) / kLanes);
  std::vector<std::vector<Segment>> lanes(1);
  int64_t used = 0;
  *partials = 0;
  for (int64_t p = 0; p < rows.domains(); ++p)
    for (int64_t first = rows.first[p], left = rows.count(p); left > 0;) {
      if (used >= target) lanes.emplace_back(), used = 0;
      const int64_t space = std::max(target - used - kDomainCost, kLeast);
      const int64_t taken = left <= space + kLeast ? left : space;
      lanes.back().push_back({p, first, taken, taken == rows.count(p) ? -1 : (*partials)++});
      used += taken + kDomainCost, first += taken, left -= taken;
    }
  return lanes;
}

}  // namespace mtl
