// Rows sorted by domain.
#pragma once

#include "tensor.h"

namespace mtl {

// Domain p's rows are rows[first[p]] to rows[first[p + 1] - 1], ascending.
struct Domains {
  std::vector<int64_t> rows;   // [B]
  std::vector<int64_t> first;  // [P + 1]
  int64_t count(int64_t p) const { return first[p + 1] - first[p]; }
};

// A stable counting sort of domain [B], of any integer type. An id that is not in 0 .. domains-1 raises.
inline Domains sort_by_domain(const Tensor& domain_in, int64_t domains) {
  const Tensor domain = dense(domain_in);
  Domains sorted;
  sorted.first.assign(domains + 1, 0);
  sorted.rows.resize(domain.numel());
  const auto sort = [&](auto id) {
    const auto* ids = data<decltype(id)>(domain);
    const int64_t batch = domain.numel();
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t p = ids[b];
      STD_TORCH_CHECK(p >= 0 && p < domains, "domain must hold ids from 0 to P-1 = ", domains - 1, "; got ", p,
                      " in row ", b);
      ++sorted.first[p + 1];
    }
    for (int64_t p = 0; p < domains; ++p) sorted.first[p + 1] += sorted.first[p];
    std::vector<int64_t> next(sorted.first.begin(), sorted.first.end() - 1);
    for (int64_t b = 0; b < batch; ++b) sorted.rows[next[ids[b]]++] = b;
  };
  switch (domain.scalar_type()) {
    case ScalarType::Long:
      sort(int64_t{});
      break;
    case ScalarType::Int:
      sort(int32_t{});
      break;
    case ScalarType::Short:
      sort(int16_t{});
      break;
    case ScalarType::Char:
      sort(int8_t{});
      break;
    case ScalarType::Byte:
      sort(uint8_t{});
      break;
    default:
      STD_TORCH_CHECK(false, "domain must be of an integer type");
  }
  return sorted;
}

}  // namespace mtl
