// The GEMM tile and the packing before it: rows of A, or panels of it [depth][kTileRows], against panels of B
// [depth][kTileCols].
//
// Everything that differs between products (transposition, storage type, the activation's gradient) happens while
// packing, so that one tile kernel serves them all, and no pass over an activation-sized tensor is made for it.
#pragma once

#include <algorithm>

#include "activate.h"
#include "vector.h"

namespace mtl::MTL_ISA {

// How A lies: rows, `stride` apart, whose elements follow each other along the depth; or a panel, where kTileRows
// elements of one depth do. Rows cost nothing to make, since they are only copied.
enum class Layout { kRows, kPanel };

// What a product's operands are packed in, and one step of the depth: numbers of the type of sums, or pairs.
template <class P>
struct Packed {
  using Sum = P;
  using Wide = Vector<P>;
  static Wide wide(const P* b) { return load(b); }
  static void step(Vector<P>& sum, P a, Wide b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
// Two bfloat16 that follow each other along the depth: the processor multiplies and adds both at once, in float.
struct Pair {
  uint16_t first, second;
};

template <>
struct Packed<Pair> {
  using Sum = float;
  using Wide = __m512bh;
  static Wide wide(const Pair* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static void step(Vector<float>& sum, Pair a, Wide b) {
    const auto both = (__m512bh)_mm512_set1_epi32(__builtin_bit_cast(int32_t, a));
    sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, both, b);
  }
};
#endif

// tile [kTileRows][kTileCols], rows `stride` apart, = sum over depth of a (x) b; with `add`, on top of what it holds;
// with `past`, past the caches: the tile's rows are whole lines.
template <Layout layout, class P, class C = typename Packed<P>::Sum>
inline void multiply_tile(int64_t depth, const P* a, int64_t a_stride, const P* b, C* tile, int64_t stride, bool add,
                          bool past = false) {
  using V = Vector<C>;
  constexpr int lanes = kLanes<C>, cols = kTileCols<C>;
  V sum[kTileRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    sum[i][0] = add ? load(tile + i * stride) : V{};
    sum[i][1] = add ? load(tile + i * stride + lanes) : V{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto b0 = Packed<P>::wide(b), b1 = Packed<P>::wide(b + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const P from_a = layout == Layout::kRows ? a[i * a_stride] : a[i];
      Packed<P>::step(sum[i][0], from_a, b0);
      Packed<P>::step(sum[i][1], from_a, b1);
    }
    a += layout == Layout::kRows ? 1 : kTileRows;
    b += cols;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    store(tile + i * stride, sum[i][0], past);
    store(tile + i * stride + lanes, sum[i][1], past);
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

// Whole rows, side by side: dst[r][k] = src[r][k], k < depth; rows up to the next whole tile are zero.
template <class S, class C>
void copy_rows(const Source<S>& src, int64_t rows, int64_t depth, C* dst) {
  for (int64_t r = 0; r < rows; ++r, dst += depth) {
    const C* from = src.read(r, 0, depth, dst);
    if (from != dst) std::copy_n(from, depth, dst);
  }
  std::fill_n(dst, (kTileRows - rows % kTileRows) % kTileRows * depth, C{0});
}

// Panels of A from rows that lie side by side: dst[p][k][i] = rows[k][p * kTileRows + i]. Reads and writes up to a
// vector past the end of either.
template <class C>
void turn_rows(const C* rows, int64_t depth, int64_t cols, C* dst) {
  // A vector at a time, of which the next row overwrites what is too much; eight rows, as below.
  constexpr int64_t block = 8, bytes = (kTileRows * sizeof(C) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  for (int64_t k = 0; k < depth; k += block) {
    const int64_t n = std::min(block, depth - k), whole = k + n == depth ? n - 1 : n;
    for (int64_t c = 0; c < cols; c += kTileRows) {
      const C* from = rows + k * cols + c;
      C* to = dst + c * depth + k * kTileRows;
      for (int64_t r = 0; r < whole; ++r) std::memcpy(to + r * kTileRows, from + r * cols, bytes);
      if (whole < n) std::memcpy(to + whole * kTileRows, from + whole * cols, kTileRows * sizeof(C));
    }
  }
}

// Columns become the panel's width: dst[p][k][i] = src[k][p * width + i], k < depth; columns past `cols` are zero.
//
// Eight rows at a time: panels lie a multiple of 4 KiB apart, so that writing one row across all of them would meet in
// a few L1 sets and throw every line out half written (dW: 249 ms -> 180 ms).
template <int width, class S, class C>
void pack_columns(const Source<S>& src, int64_t depth, int64_t cols, C* dst) {
  constexpr int64_t chunk = 192, block = 8;
  static_assert(chunk % width == 0);
  C buffer[block][chunk];
  for (int64_t k = 0; k < depth; k += block) {
    const int64_t rows = std::min(block, depth - k);
    for (int64_t c = 0; c < cols; c += chunk) {
      const int64_t n = std::min(chunk, cols - c);
      const C* from[block];
      for (int64_t r = 0; r < rows; ++r) from[r] = src.read(k + r, c, n, buffer[r]);
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
