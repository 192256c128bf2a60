// Rows grouped by domain, so that a block works on rows of one domain.
//
// A stable sort of the ids groups the rows; nothing goes back to the host. Bucket 0 holds rows with a negative id,
// bucket p + 1 those of domain p, the last one those with an id of P or more. A bucket's rows are cut into chunks of R,
// and chunk k of bucket q gets slot begin[q] / R + q + k: no two chunks share one, there are at most B / R + P + 2, and
// so the grid needs no counts. Needs MTL_LAUNCH, as in launch.h.
#pragma once

#include <cstdint>

namespace mtl {

struct DomainGroups {
  int64_t batch, domains;
  const void* ids;  // as they come, or, for the bounds, sorted
  bool wide_ids;    // int64, else int32
  const int64_t* order;
  int64_t* bound;  // [P + 3], where each bucket begins in order; the last is B
};

constexpr int kBoundsThreads = 256;

__device__ inline int64_t domain_id(const DomainGroups& a, int64_t i) {
  return a.wide_ids ? static_cast<const int64_t*>(a.ids)[i] : static_cast<const int*>(a.ids)[i];
}

__device__ inline bool known_domain(const DomainGroups& a, int64_t p) { return p >= 0 && p < a.domains; }

static __global__ void __launch_bounds__(kBoundsThreads) domain_bounds_kernel(const __grid_constant__ DomainGroups a) {
  const int64_t q = static_cast<int64_t>(blockIdx.x) * kBoundsThreads + threadIdx.x;
  if (q >= a.domains + 3) return;
  int64_t low = q == a.domains + 2 ? a.batch : 0, high = q == 0 ? 0 : a.batch;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (domain_id(a, middle) < q - 1) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  a.bound[q] = low;
}

inline int64_t domain_slots(const DomainGroups& a, int64_t rows) { return a.batch / rows + a.domains + 2; }

// Rows order[start, stop) of a bucket; of a slot without rows stop is not beyond start.
struct DomainChunk {
  int64_t bucket, start, stop;
};

__device__ inline DomainChunk domain_chunk(const DomainGroups& a, int64_t rows, int64_t slot) {
  int64_t low = 0, high = a.domains + 1;  // the last bucket whose first slot is not beyond this one
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.bound[middle] / rows + middle <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  DomainChunk c;
  c.bucket = low;
  c.start = a.bound[low] + (slot - a.bound[low] / rows - low) * rows;
  const int64_t end = a.bound[low + 1];
  c.stop = c.start + rows < end ? c.start + rows : end;
  return c;
}

// From sorted ids to bound.
template <class Stream>
void launch_domain_bounds(const DomainGroups& a, Stream stream) {
  MTL_LAUNCH(domain_bounds_kernel, (a.domains + 3 + kBoundsThreads - 1) / kBoundsThreads, kBoundsThreads, 0, stream, a);
}

}  // namespace mtl
