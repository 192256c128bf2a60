// Rows sorted by domain, and shared out in pieces that do not depend on the number of threads.
#pragma once

#include "tensor.h"

namespace mtl {

// Domain p's rows are rows[first[p]] to rows[first[p + 1] - 1], ascending.
struct Domains {
  std::vector<int64_t> rows;   // [B]
  std::vector<int64_t> first;  // [P + 1]
  int64_t domains() const { return int64_t(first.size()) - 1; }
  int64_t count(int64_t p) const { return first[p + 1] - first[p]; }
};

// A stable counting sort of domain [B], of any integer type. An id that is not in 0 .. domains-1 raises.
Domains sort_by_domain(const Tensor& domain, int64_t domains);

// Whether these rows follow one another, as those of a single domain, or of a sorted batch, do.
inline bool consecutive(const int64_t* rows, int64_t n) { return rows[n - 1] - rows[0] == n - 1; }

// Some rows of one domain, in one lane. partial: -1 where they are all of its rows, else which of the partial sums.
struct Segment {
  int64_t domain, first, rows, partial;
};

// What a domain costs beyond its rows, in rows.
constexpr int64_t kDomainCost = 24;

// Cuts the sorted rows into at most about eight lanes of equal work, from their counts alone; a domain is cut only
// where it is larger than what a lane has room for. `partials`: how many segments are such pieces.
std::vector<std::vector<Segment>> cut_into_lanes(const Domains& rows, int64_t* partials);

}  // namespace mtl
