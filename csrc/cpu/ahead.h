// Memory that is read next, fetched to a cache a few lines at a time while a kernel works on something else: without
// it reading and computing take turns. Rows a page apart defeat the processor's own prefetching.
#pragma once

#include <cstdint>

namespace mtl {

struct Ahead {
  struct Rows {
    const char* next;
    int64_t stride, count, bytes, line;  // bytes of a row; of the first row left, those asked for
  };
  Rows rows[3];
  int64_t kinds = 0, lines = 0, share = 0;
};

// Internal linkage, for this is compiled once for each instruction set.
static inline void add(Ahead& ahead, const void* from, int64_t stride, int64_t count, int64_t bytes) {
  if (count <= 0 || bytes <= 0) return;
  ahead.rows[ahead.kinds++] = {static_cast<const char*>(from), stride, count, bytes, 0};
  ahead.lines += count * ((bytes + 63) / 64);
}

// `points`: how often ask will be called.
static inline void spread(Ahead& ahead, int64_t points) { ahead.share = ahead.lines / (points > 0 ? points : 1) + 1; }

// To L1 (`locality` 3) what is read at once, to L2 (2) what would drive out there what is in use.
template <int locality>
static inline void ask(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.share && ahead.kinds > 0; ++i) {
    Ahead::Rows& rows = ahead.rows[ahead.kinds - 1];
    __builtin_prefetch(rows.next + rows.line, 0, locality);
    rows.line += 64;
    if (rows.line < rows.bytes) continue;
    rows.next += rows.stride, rows.line = 0;
    if (--rows.count == 0) --ahead.kinds;
  }
}

}  // namespace mtl
