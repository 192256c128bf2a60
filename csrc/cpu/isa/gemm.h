// The GEMM tile and the packing before it: panels of A [depth][kTileRows] against panels of B [depth][kTileCols].
//
// Everything that differs between products (transposition, storage type, the activation's gradient) happens while
// packing, so that one tile kernel serves them all, and no pass over an activation-sized tensor is made for it.
#pragma once

#include <algorithm>

#include "activate.h"
#include "vector.h"

namespace mtl::MTL_ISA {

// tile [kTileRows][kTileCols], rows `stride` apart, = sum over depth of a (x) b; with `add`, on top of what it holds.
template <class C>
inline void multiply_tile(int64_t depth, const C* a, const C* b, C* tile, int64_t stride, bool add) {
  using V = Vector<C>;
  constexpr int lanes = kLanes<C>, cols = kTileCols<C>;
  V sum[kTileRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    sum[i][0] = add ? load(tile + i * stride) : V{};
    sum[i][1] = add ? load(tile + i * stride + lanes) : V{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const V b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      sum[i][0] += a[i] * b0;
      sum[i][1] += a[i] * b1;
    }
    a += kTileRows;
    b += cols;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    store(tile + i * stride, sum[i][0]);
    store(tile + i * stride + lanes, sum[i][1]);
  }
}

// A matrix as it lies in memory, rows dense. With `saved` (same layout) its elements are gradients of an activation's
// output, and what is packed is the gradient of its input.
template <class S>
struct Source {
  const S* data;
  const S* saved;
  Activation activation;
  int64_t stride;

  // n elements of row r from column c on, as C; either a pointer into the matrix or written to `buffer`.
  template <class C>
  const C* read(int64_t r, int64_t c, int64_t n, C* buffer) const {
    const S* from = data + r * stride + c;
    if constexpr (std::is_same_v<S, C>) {
      if (!saved) return from;
    } else if (!saved) {
      widen(from, buffer, n);
      return buffer;
    }
    activation_gradient(activation, from, saved + r * stride + c, buffer, n);
    return buffer;
  }
};

// Rows become the panel's width: dst[p][k][i] = src[p * width + i][k], k < depth; rows past `rows` are zero.
template <int width, class S, class C>
void pack_rows(const Source<S>& src, int64_t rows, int64_t depth, C* dst) {
  constexpr int64_t chunk = 128;
  C buffer[width][chunk];
  static const C zeros[chunk] = {};
  for (int64_t r = 0; r < rows; r += width, dst += width * depth) {
    for (int64_t k = 0; k < depth; k += chunk) {
      const int64_t n = std::min(chunk, depth - k);
      const C* from[width];
      for (int i = 0; i < width; ++i) from[i] = r + i < rows ? src.read(r + i, k, n, buffer[i]) : zeros;
      C* to = dst + k * width;
      for (int64_t j = 0; j < n; ++j, to += width) {
#pragma GCC unroll 32
        for (int i = 0; i < width; ++i) to[i] = from[i][j];
      }
    }
  }
}

// Columns become the panel's width: dst[p][k][i] = src[k][p * width + i], k < depth; columns past `cols` are zero.
// sums[c], where given, grows by the packed elements of column c, row after row.
//
// Eight rows at a time: panels lie a multiple of 4 KiB apart, so that writing one row across all of them would meet in
// a few L1 sets and throw every line out half written (dW: 249 ms -> 180 ms).
template <int width, class S, class C>
void pack_columns(const Source<S>& src, int64_t depth, int64_t cols, C* dst, C* sums = nullptr) {
  constexpr int64_t chunk = 192, block = 8;
  static_assert(chunk % width == 0);
  C buffer[block][chunk];
  for (int64_t k = 0; k < depth; k += block) {
    const int64_t rows = std::min(block, depth - k);
    for (int64_t c = 0; c < cols; c += chunk) {
      const int64_t n = std::min(chunk, cols - c);
      const C* from[block];
      for (int64_t r = 0; r < rows; ++r) {
        from[r] = src.read(k + r, c, n, buffer[r]);
        if (sums)
          for (int64_t i = 0; i < n; ++i) sums[c + i] += from[r][i];
      }
      C* to = dst + c * depth + k * width;
      int64_t i = 0;
      for (; i + width <= n; i += width, to += width * depth)
        for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * width, from[r] + i, width * sizeof(C));
      if (i < n)
        for (int64_t r = 0; r < rows; ++r)
          for (int j = 0; j < width; ++j) to[r * width + j] = i + j < n ? from[r][i + j] : C{0};
    }
  }
}

}  // namespace mtl::MTL_ISA
