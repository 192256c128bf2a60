// Rows of a matrix brought together for a product, and the product's rows put back.
#pragma once

#include <cstring>

#include "domains.h"
#include "linear_kernels.h"

namespace mtl {

// n rows of `cols` numbers side by side: where they lie, or copied into `room`.
inline Operand gather(const Operand& o, const int64_t* rows, int64_t n, int64_t cols, size_t element, char* room) {
  if (consecutive(rows, n)) return moved(o, rows[0], 0, element);
  const size_t bytes = cols * element;
  const auto copy = [&](const void* from, char* to) {
    for (int64_t i = 0; i < n && bytes > 0; ++i)
      std::memcpy(to + i * bytes, static_cast<const char*>(from) + rows[i] * o.stride * int64_t(element), bytes);
    return to;
  };
  Operand found{copy(o.data, room), nullptr, o.activation, cols};
  if (o.saved) found.saved = copy(o.saved, room + n * bytes);
  return found;
}

inline void scatter(const char* from, void* to, const int64_t* rows, int64_t n, size_t bytes, int64_t stride_bytes) {
  for (int64_t i = 0; i < n && bytes > 0; ++i)
    std::memcpy(static_cast<char*>(to) + rows[i] * stride_bytes, from + i * bytes, bytes);
}

// Buffers of one task, one after the other in a thread's scratch.
struct Room {
  char* next;
  static size_t padded(size_t bytes) { return (bytes + 127) / 64 * 64; }
  char* take(size_t bytes) {
    char* found = next;
    next += padded(bytes);
    return found;
  }
};

}  // namespace mtl
