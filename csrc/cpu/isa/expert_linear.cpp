// The packing and multiplying kernels of expert_linear, for one instruction set.
#include "../linear_kernels.h"
#include "gemm.h"
#include "pairs.h"

namespace mtl::MTL_ISA {

namespace {

template <class S>
Source<S> source(const Operand& o) {
  return {static_cast<const S*>(o.data), static_cast<const S*>(o.saved), o.activation, o.stride};
}

template <class S>
void rows_of(const Operand& o, int64_t rows, int64_t depth, void* to) {
  copy_rows(source<S>(o), rows, depth, static_cast<SumOf<S>*>(to));
}

template <class S>
void rows_to_panels(const Operand& o, int64_t rows, int64_t depth, void* panels) {
  pack_rows<kTileCols<SumOf<S>>>(source<S>(o), rows, depth, static_cast<SumOf<S>*>(panels));
}

template <class S>
void columns_to_panels(const Operand& o, int64_t depth, int64_t cols, void* panels) {
  pack_columns<kTileCols<SumOf<S>>>(source<S>(o), depth, cols, static_cast<SumOf<S>*>(panels));
}

template <class S>
void widen_row(const void* from, void* to, int64_t n) {
  widen(static_cast<const S*>(from), static_cast<SumOf<S>*>(to), n);
}

template <class S>
void narrow_row(const void* from, void* to, int64_t n) {
  narrow(static_cast<const SumOf<S>*>(from), static_cast<S*>(to), n);
}

template <class S>
void gradient_into_row(Activation activation, const void* sums, void* row, int64_t n) {
  gradient_into(activation, static_cast<const SumOf<S>*>(sums), static_cast<S*>(row), n);
}

// The tile's sums to memory: bias, activation and rounding while the tile is in L1.
template <class S, class C = SumOf<S>>
inline void finish_tile(C* tile, int64_t r, int64_t c, int64_t rows, int64_t cols, const Output& out) {
  constexpr int width = kTileCols<C>, lanes = kLanes<C>;
  S* y = static_cast<S*>(out.y) + r * out.stride + c;
  S* z = out.z ? static_cast<S*>(out.z) + r * out.stride + c : nullptr;
  const C* bias = out.bias ? static_cast<const C*>(out.bias) + c : nullptr;
  const bool relu = out.activation == Activation::kRelu, plain = relu || out.activation == Activation::kNone;
  if (std::is_same_v<S, C> && cols == width && plain && !z) {
    // The usual case in registers: 11 % of a 4096 x 512 x 256 product went into the general one below.
    using V = Vector<C>;
    const bool past = out.stream && whole_line(y, out.stride);
    const V b0 = bias ? load(bias) : V{}, b1 = bias ? load(bias + lanes) : V{};
    for (int64_t i = 0; i < rows; ++i, tile += width, y += out.stride) {
      V v0 = load(tile) + b0, v1 = load(tile + lanes) + b1;
      if (relu) v0 = v0 <= C{0} ? V{} : v0, v1 = v1 <= C{0} ? V{} : v1;
      store(reinterpret_cast<C*>(y), v0, past), store(reinterpret_cast<C*>(y) + lanes, v1, past);
    }
    return;
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (cols == width && plain && !z) {
      const bool past = out.stream && whole_line(y, out.stride);
      const Vector<C> b0 = bias ? load(bias) : Vector<C>{}, b1 = bias ? load(bias + lanes) : Vector<C>{};
      for (int64_t i = 0; i < rows; ++i, tile += width, y += out.stride) {
        Vector<C> v0 = load(tile) + b0, v1 = load(tile + lanes) + b1;
        if (relu) v0 = v0 <= C{0} ? Vector<C>{} : v0, v1 = v1 <= C{0} ? Vector<C>{} : v1;
        const auto rounded = (Vector<C>)_mm512_cvtne2ps_pbh((__m512)v1, (__m512)v0);
        store(reinterpret_cast<C*>(y), rounded, past);
      }
      return;
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i, tile += width, y += out.stride) {
    if (bias)
      for (int j = 0; j < width; ++j) tile[j] += bias[j];
    if (z) {
      narrow(tile, z, cols);
      z += out.stride;
    }
    activate(out.activation, tile, width);
    if (cols == width)
      narrow(tile, y, width);
    else
      narrow(tile, y, cols);
  }
}

// Fetching ahead wants an L2 that holds two blocks and the panels: 1 MiB, as processors with AVX-512 have. With 512 KiB
// (EPYC, Zen 3) it drove out what was in use, and cost 5 to 9 %.
constexpr bool kFetches = kVectorBytes == 64;

// Spreads what is to be fetched over the tiles of a product; null where nothing is.
template <class C>
Ahead* spread_over(Ahead* ahead, int64_t rows, int64_t cols) {
  constexpr int width = kTileCols<C>;
  if (!kFetches || !ahead) return nullptr;
  spread(*ahead, (cols + width - 1) / width * ((rows + kTileRows - 1) / kTileRows));
  return ahead;
}

template <class S, class P = SumOf<S>>
void multiply(const void* a, int64_t a_stride, const void* b, int64_t rows, int64_t cols, int64_t depth,
              const Output& out) {
  using C = typename Packed<P>::Sum;
  constexpr int width = kTileCols<C>;
  alignas(kVectorBytes) C tile[kTileRows * width];
  Ahead* const ahead = spread_over<C>(out.ahead, rows, cols);
  // One panel of B stays in L1 while the rows of A stream past it from L2.
  for (int64_t c = 0; c < cols; c += width) {
    const P* bp = static_cast<const P*>(b) + c * depth;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const P* ap = static_cast<const P*>(a) + r * a_stride;
      if (ahead) ask<2>(*ahead);
      multiply_columns(cols - c, depth, ap, a_stride, bp, tile);
      finish_tile<S>(tile, r, c, std::min<int64_t>(kTileRows, rows - r), std::min<int64_t>(width, cols - c), out);
    }
  }
  if (out.stream) streamed();
}

template <class S, class P = SumOf<S>>
void multiply_turned(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Output& out) {
  using C = typename Packed<P>::Sum;
  constexpr int width = kTileCols<C>;
  alignas(kVectorBytes) C tile[kTileRows * width], turned[width * kTurnedTiles * kTileRows];
  const C *bias = static_cast<const C*>(out.bias), *lines[kTileRows];
  for (int i = 0; i < kTileRows; ++i) lines[i] = tile + i * width;
  for (int64_t c = 0; c < cols; c += width) {
    const int64_t n = std::min<int64_t>(width, cols - c);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const P *ap = static_cast<const P*>(a) + r * depth, *bp = static_cast<const P*>(b) + c * depth;
      multiply_columns<P, true>(n, depth, ap, depth, bp, tile);
      turn(lines, n, turned + r, kTurnedTiles * kTileRows);
    }
    for (int64_t j = 0; j < n; ++j) {
      C* sums = turned + j * kTurnedTiles * kTileRows;
      for (int64_t i = 0; bias && i < rows; ++i) sums[i] += bias[i];
      if (out.z) narrow(sums, static_cast<S*>(out.z) + (c + j) * out.stride, rows);
      activate(out.activation, sums, rows);
      narrow(sums, static_cast<S*>(out.y) + (c + j) * out.stride, rows);
    }
  }
}

template <Layout layout, class P>
void accumulate(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Sums& sums) {
  using C = typename Packed<P>::Sum;
  constexpr int width = kTileCols<C>;
  const int64_t stride = sums.stride;
  const bool past = sums.stream && !sums.add && whole_line(static_cast<C*>(sums.at), stride);
  alignas(kVectorBytes) C tile[kTileRows * width];
  Ahead* const ahead = spread_over<C>(sums.ahead, rows, cols);
  for (int64_t c = 0; c < cols; c += width) {
    const P* bp = static_cast<const P*>(b) + c * depth;
    const int64_t m = std::min<int64_t>(width, cols - c);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      C* to = static_cast<C*>(sums.at) + r * stride + c;
      const P* ap = static_cast<const P*>(a) + r * depth;  // rows and panels alike
      const int64_t n = std::min<int64_t>(kTileRows, rows - r);
      if (ahead) ask<2>(*ahead);
      for (int64_t i = n; !past && i < std::min<int64_t>(n + kTileRows, rows - r); ++i)
        __builtin_prefetch(to + i * stride, 1);
      if (n == kTileRows && m == width) {
        multiply_tile<layout>(depth, ap, depth, bp, to, stride, sums.add, past);
        continue;
      }
      for (int64_t i = 0; sums.add && i < n; ++i) std::copy_n(to + i * stride, m, tile + i * width);
      multiply_tile<layout>(depth, ap, depth, bp, tile, width, sums.add);
      for (int64_t i = 0; i < n; ++i) std::copy_n(tile + i * width, m, to + i * stride);
    }
  }
  if (past) streamed();
}

template <class C>
void turned_panels(const void* rows, int64_t depth, int64_t cols, void* panels) {
  turn_rows(static_cast<const C*>(rows), depth, cols, static_cast<C*>(panels));
}

template <class C>
void add_rows(const void* rows, int64_t n, int64_t cols, void* sums) {
  const C* from = static_cast<const C*>(rows);
  C* to = static_cast<C*>(sums);
  for (int64_t r = 0; r < n; ++r, from += cols)
    for (int64_t c = 0; c < cols; ++c) to[c] += from[c];
}

template <class S>
constexpr PackKernels pack_kernels() {
  return {rows_of<S>,    rows_to_panels<S>,    columns_to_panels<S>, widen_row<S>,
          narrow_row<S>, gradient_into_row<S>, multiply<S>,          multiply_turned<S>};
}

template <class C>
constexpr SumKernels sum_kernels() {
  return {kTileCols<C>, accumulate<Layout::kRows, C>, accumulate<Layout::kPanel, C>, turned_panels<C>, add_rows<C>,
          add_rows<C>};
}

#if defined(__AVX512BF16__)
constexpr PairKernels pair_kernels = {
    {pair_rows, pair_rows_wide, pair_columns_wide, widen_row<BFloat16>, narrow_row<BFloat16>,
     gradient_into_row<BFloat16>, multiply<BFloat16, Pair>, multiply_turned<BFloat16, Pair>},
    {kTileCols<float>, accumulate<Layout::kRows, Pair>, accumulate<Layout::kPanel, Pair>, turn_pairs, add_rows<float>,
     add_pairs}};
constexpr const PairKernels* pairs = &pair_kernels;
#else
constexpr const PairKernels* pairs = nullptr;
#endif

}  // namespace

extern const LinearKernels linear_kernels = {
    kTileRows,
    {pack_kernels<double>(), pack_kernels<float>(), pack_kernels<BFloat16>(), pack_kernels<Half>()},
    sum_kernels<float>(),
    sum_kernels<double>(),
    pairs,
};

}  // namespace mtl::MTL_ISA
