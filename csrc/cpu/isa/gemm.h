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

// What a product's operands are packed in, and one step of the depth with vectors V of sums: numbers of the type of
// sums, or pairs.
template <class P>
struct Packed {
  using Sum = P;
  template <class V>
  static V wide(const P* b) {
    V v;
    std::memcpy(&v, b, sizeof(v));
    return v;
  }
  template <class V>
  static void step(V& sum, P a, V b) {
    sum += a * b;
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 that follow each other along the depth: the processor multiplies and adds both at once, in float.
struct Pair {
  uint16_t first, second;
};

template <>
struct Packed<Pair> {
  using Sum = float;
  template <class V>
  static V wide(const Pair* b) {
    V v;
    std::memcpy(&v, b, sizeof(v));
    return v;
  }
  template <class V>
  static void step(V& sum, Pair a, V b) {
    const int32_t both = __builtin_bit_cast(int32_t, a);
    if constexpr (sizeof(V) == 64)
      sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b);
    else
      sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_epi32(both), (__m256bh)b);
  }
};
#endif

// tile [kTileRows][kTileCols], rows `stride` apart, = sum over depth of a (x) b; with `add`, on top of what it holds;
// with `past`, past the caches: the tile's rows are whole lines. Of its columns the first `cols`, two vectors, one, or
// half of one. With `fetch` the rows after these, which lie behind them, are asked for meanwhile.
template <Layout layout, class P, class C = typename Packed<P>::Sum, int cols = kTileCols<C>, bool fetch = false>
inline void multiply_tile(int64_t depth, const P* a, int64_t a_stride, const P* b, C* tile, int64_t stride, bool add,
                          bool past = false) {
  constexpr int lanes = std::min(cols, kLanes<C>), vectors = cols / lanes;
  using V = typename VectorOf<C, lanes * sizeof(C)>::type;
  V sum[kTileRows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sum[i][v] = V{};
      if (add) std::memcpy(&sum[i][v], tile + i * stride + v * lanes, sizeof(V));
    }
  }
  const P* next = a + kTileRows * depth;
  for (int64_t k = 0; k < depth; ++k) {
    if (fetch) __builtin_prefetch(next + k * kTileRows);
    V from_b[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) from_b[v] = Packed<P>::template wide<V>(b + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const P from_a = layout == Layout::kRows ? a[i * a_stride] : a[i];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) Packed<P>::step(sum[i][v], from_a, from_b[v]);
    }
    a += layout == Layout::kRows ? 1 : kTileRows;
    b += kTileCols<C>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      if constexpr (sizeof(V) == kVectorBytes)
        store(tile + i * stride + v * lanes, sum[i][v], past);
      else
        std::memcpy(tile + i * stride, &sum[i][v], sizeof(V));
    }
  }
}

// The first `n` columns of a tile [kTileRows][kTileCols], at least: narrower vectors do for few. Half of one is worth
// it where the processor takes two of them at a time.
template <class P, bool fetch = false, class C = typename Packed<P>::Sum>
inline void multiply_columns(int64_t n, int64_t depth, const P* a, int64_t a_stride, const P* b, C* tile) {
  constexpr int width = kTileCols<C>, half = kVectorBytes == 64 ? width / 4 : width / 2;
  if (n <= half)
    multiply_tile<Layout::kRows, P, C, half, fetch>(depth, a, a_stride, b, tile, width, false);
  else if (n <= width / 2)
    multiply_tile<Layout::kRows, P, C, width / 2, fetch>(depth, a, a_stride, b, tile, width, false);
  else
    multiply_tile<Layout::kRows, P, C, width, fetch>(depth, a, a_stride, b, tile, width, false);
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

// to[j * stride + i] = from[i][j], j < n. Four by four: one number at a time, or gathered, it costs five times as much.
// A line of four rows, then of the next four: rows often lie a page apart, where a line of each of 32 rows would throw
// out the others before it is used up.
template <int width, class C>
void turn(const C* const (&from)[width], int64_t n, C* to, int64_t stride = width) {
  int64_t j = 0;
  if constexpr (sizeof(C) == 4) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    constexpr int whole = width / 4 * 4;
    const int64_t end = n / 4 * 4;
    for (; j < end; j += 16) {
      const int64_t line = std::min<int64_t>(end, j + 16);
      for (int i = 0; i < whole; i += 4) {
        for (int64_t k = j; k < line; k += 4) {
          Four row[4];
          for (int l = 0; l < 4; ++l) std::memcpy(&row[l], from[i + l] + k, sizeof(Four));
          const Four low = __builtin_shuffle(row[0], row[1], Four{0, 4, 1, 5});
          const Four low2 = __builtin_shuffle(row[2], row[3], Four{0, 4, 1, 5});
          const Four high = __builtin_shuffle(row[0], row[1], Four{2, 6, 3, 7});
          const Four high2 = __builtin_shuffle(row[2], row[3], Four{2, 6, 3, 7});
          const Four column[4] = {
              __builtin_shuffle(low, low2, Four{0, 1, 4, 5}), __builtin_shuffle(low, low2, Four{2, 3, 6, 7}),
              __builtin_shuffle(high, high2, Four{0, 1, 4, 5}), __builtin_shuffle(high, high2, Four{2, 3, 6, 7})};
          for (int l = 0; l < 4; ++l) std::memcpy(to + (k + l) * stride + i, &column[l], sizeof(Four));
        }
      }
      for (int i = whole; i < width; ++i)
        for (int64_t k = j; k < line; ++k) to[k * stride + i] = from[i][k];
    }
    j = end;
  }
  for (; j < n; ++j)
    for (int i = 0; i < width; ++i) to[j * stride + i] = from[i][j];
}

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
      turn<width>(from, n, dst + k * width);
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
