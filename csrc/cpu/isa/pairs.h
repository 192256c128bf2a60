// bfloat16 packed in pairs along the depth, for processors that multiply those (Packed<Pair> in gemm.h): rows of A
// [rows][pairs], or panels of it [pairs][kTileRows], and panels of B [pairs][kTileCols].
#pragma once

#include "gemm.h"

#if defined(__AVX512BF16__)

namespace mtl::MTL_ISA {

namespace {

inline int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

// n numbers of row r from column c on, from the matrix or written to `buffer`. Gradients are rounded once, after the
// activation's derivative.
inline const uint16_t* bits(const Operand& o, int64_t r, int64_t c, int64_t n, uint16_t* buffer) {
  const uint16_t* from = static_cast<const uint16_t*>(o.data) + r * o.stride + c;
  if (!o.saved) return from;
  const uint16_t* saved = static_cast<const uint16_t*>(o.saved) + r * o.stride + c;
  if (o.activation == Activation::kRelu) {
    // y <= 0 cuts, and -0 with it; a NaN of either sign, the numbers beyond -inf, lets the gradient through.
    for (int64_t i = 0; i < n; ++i) buffer[i] = int16_t(saved[i]) <= 0 && saved[i] <= 0xff80 ? 0 : from[i];
    return buffer;
  }
  constexpr int64_t chunk = 128;
  float exact[chunk];
  for (int64_t i = 0; i < n; i += chunk) {
    const int64_t m = std::min(chunk, n - i);
    activation_gradient(o.activation, reinterpret_cast<const BFloat16*>(from) + i,
                        reinterpret_cast<const BFloat16*>(saved) + i, exact, m);
    narrow(exact, reinterpret_cast<BFloat16*>(buffer) + i, m);
  }
  return buffer;
}

inline void interleave(const uint16_t* first, const uint16_t* second, int64_t n, Pair* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = {first[i], second ? second[i] : uint16_t{0}};
}

// A's rows: dst[r][k], zero up to a whole pair and a whole tile.
void pair_rows(const Operand& o, int64_t rows, int64_t depth, void* to) {
  const int64_t width = 2 * pairs_of(depth);
  uint16_t* dst = static_cast<uint16_t*>(to);
  for (int64_t r = 0; r < rows; ++r, dst += width) {
    const uint16_t* from = bits(o, r, 0, depth, dst);
    if (from != dst) std::copy_n(from, depth, dst);
    if (width > depth) dst[depth] = 0;
  }
  std::fill_n(dst, (kTileRows - rows % kTileRows) % kTileRows * width, uint16_t{0});
}

// B from rows that become the columns of panels: dst[p][k][i] = pair k of row p * width + i; as pack_rows.
void pair_rows_wide(const Operand& o, int64_t rows, int64_t depth, void* panels) {
  constexpr int width = kTileCols<float>;
  constexpr int64_t chunk = 64;
  Pair buffer[width][chunk];
  static const Pair zeros[chunk] = {};
  Pair* dst = static_cast<Pair*>(panels);
  for (int64_t r = 0; r < rows; r += width, dst += width * pairs_of(depth)) {
    for (int64_t k = 0; k < depth; k += 2 * chunk) {
      const int64_t n = std::min(2 * chunk, depth - k);
      const Pair* from[width];
      for (int i = 0; i < width; ++i) {
        const uint16_t* row = static_cast<const uint16_t*>(o.data) + (r + i) * o.stride + k;
        from[i] = r + i < rows ? reinterpret_cast<const Pair*>(row) : zeros;
        if (n % 2 == 0 || r + i >= rows) continue;
        std::memcpy(buffer[i], row, n * sizeof(uint16_t));
        buffer[i][n / 2].second = 0;
        from[i] = buffer[i];
      }
      turn(from, pairs_of(n), dst + k / 2 * width);
    }
  }
}

// B whose columns stay columns: dst[p][k][i] = rows 2k and 2k + 1 of column p * width + i; eight pairs of rows at a
// time, as in pack_columns.
void pair_columns_wide(const Operand& o, int64_t depth, int64_t cols, void* panels) {
  constexpr int width = kTileCols<float>;
  constexpr int64_t block = 8;
  const int64_t pairs = pairs_of(depth);
  uint16_t buffers[2][width];
  for (int64_t k = 0; k < pairs; k += block) {
    for (int64_t c = 0; c < cols; c += width) {
      const int64_t n = std::min<int64_t>(width, cols - c);
      Pair* to = static_cast<Pair*>(panels) + c * pairs + k * width;
      for (int64_t j = k; j < std::min(pairs, k + block); ++j, to += width) {
        const uint16_t* first = bits(o, 2 * j, c, n, buffers[0]);
        const uint16_t* second = 2 * j + 1 < depth ? bits(o, 2 * j + 1, c, n, buffers[1]) : nullptr;
        if (n == width && second)
          interleave(first, second, width, to);
        else
          interleave(first, second, n, to), std::fill_n(to + n, width - n, Pair{});
      }
    }
  }
}

// Panels of A from rows of pairs: dst[p][k][i] = rows 2k and 2k + 1 of column p * kTileRows + i.
void turn_pairs(const void* rows, int64_t depth, int64_t cols, void* to) {
  // A vector at a time, of which the next row overwrites what is too much, as in turn_rows.
  constexpr int64_t block = 8, chunk = 16 * kTileRows, bytes = kTileRows * sizeof(Pair);
  const int64_t width = 2 * pairs_of(cols), pairs = pairs_of(depth);
  const uint16_t* from = static_cast<const uint16_t*>(rows);
  Pair both[block][chunk + kTileRows] = {};
  for (int64_t k = 0; k < pairs; k += block) {
    const int64_t rows_here = std::min(block, pairs - k);
    for (int64_t c = 0; c < cols; c += chunk) {
      const int64_t n = std::min(chunk, cols - c);
      for (int64_t j = 0; j < rows_here; ++j) {
        const uint16_t* first = from + 2 * (k + j) * width + c;
        interleave(first, 2 * (k + j) + 1 < depth ? first + width : nullptr, n, both[j]);
      }
      for (int64_t i = 0; i < n; i += kTileRows) {
        Pair* panel = static_cast<Pair*>(to) + (c + i) * pairs + k * kTileRows;
        for (int64_t j = 0; j + 1 < rows_here; ++j) std::memcpy(panel + j * kTileRows, both[j] + i, kVectorBytes);
        std::memcpy(panel + (rows_here - 1) * kTileRows, both[rows_here - 1] + i, bytes);
      }
    }
  }
}

void add_pairs(const void* rows, int64_t n, int64_t cols, void* sums) {
  const uint16_t* from = static_cast<const uint16_t*>(rows);
  float* to = static_cast<float*>(sums);
  for (int64_t r = 0; r < n; ++r, from += 2 * pairs_of(cols))
    for (int64_t c = 0; c < cols; ++c) to[c] += __builtin_bit_cast(float, uint32_t(from[c]) << 16);
}

}  // namespace

}  // namespace mtl::MTL_ISA

#endif
