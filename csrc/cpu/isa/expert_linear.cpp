// The packing and multiplying kernels of expert_linear, for one instruction set.
#include "../linear_kernels.h"
#include "gemm.h"

namespace mtl::MTL_ISA {

namespace {

template <class S>
Source<S> source(const Operand& o) {
  return {static_cast<const S*>(o.data), static_cast<const S*>(o.saved), o.activation, o.stride};
}

template <class S, bool wide>
constexpr int kWidth = wide ? kTileCols<SumOf<S>> : kTileRows;

template <class S, bool wide>
void rows_to_panels(const Operand& o, int64_t rows, int64_t depth, void* panels) {
  pack_rows<kWidth<S, wide>>(source<S>(o), rows, depth, static_cast<SumOf<S>*>(panels));
}

template <class S, bool wide>
void columns_to_panels(const Operand& o, int64_t depth, int64_t cols, void* panels, void* sums) {
  using C = SumOf<S>;
  pack_columns<kWidth<S, wide>>(source<S>(o), depth, cols, static_cast<C*>(panels), static_cast<C*>(sums));
}

template <class S>
void widen_row(const void* from, void* to, int64_t n) {
  widen(static_cast<const S*>(from), static_cast<SumOf<S>*>(to), n);
}

template <class S>
void narrow_row(const void* from, void* to, int64_t n) {
  narrow(static_cast<const SumOf<S>*>(from), static_cast<S*>(to), n);
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
    const V b0 = bias ? load(bias) : V{}, b1 = bias ? load(bias + lanes) : V{};
    for (int64_t i = 0; i < rows; ++i, tile += width, y += out.stride) {
      V v0 = load(tile) + b0, v1 = load(tile + lanes) + b1;
      if (relu) v0 = v0 <= C{0} ? V{} : v0, v1 = v1 <= C{0} ? V{} : v1;
      store(reinterpret_cast<C*>(y), v0), store(reinterpret_cast<C*>(y) + lanes, v1);
    }
    return;
  }
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

inline int64_t lines_a_tile(int64_t rows, int64_t cols, int64_t width, const Upcoming& upcoming) {
  const int64_t tiles = ((rows + kTileRows - 1) / kTileRows) * ((cols + width - 1) / width);
  return upcoming.lines ? upcoming.lines / tiles + 1 : 0;
}

template <class S>
void multiply(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, const Output& out,
              Upcoming& upcoming) {
  using C = SumOf<S>;
  constexpr int width = kTileCols<C>;
  alignas(kVectorBytes) C tile[kTileRows * width];
  const int64_t share = lines_a_tile(rows, cols, width, upcoming);
  // One panel of B stays in L1 while the panels of A stream past it from L2.
  for (int64_t c = 0; c < cols; c += width) {
    const C* bp = static_cast<const C*>(b) + c * depth;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      upcoming.ask(share);
      multiply_tile(depth, static_cast<const C*>(a) + r * depth, bp, tile, false);
      finish_tile<S>(tile, r, c, std::min<int64_t>(kTileRows, rows - r), std::min<int64_t>(width, cols - c), out);
    }
  }
}

// A tile of `sums` to or from `tile`; whole tiles, the usual ones, with bounds the compiler knows.
template <class C>
inline void copy_tile(C* to, int64_t to_stride, const C* from, int64_t from_stride, int64_t rows, int64_t cols) {
  constexpr int width = kTileCols<C>;
  if (rows == kTileRows && cols == width) {
    for (int i = 0; i < kTileRows; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, width * sizeof(C));
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) to[i * to_stride + j] = from[i * from_stride + j];
  }
}

template <class C>
void accumulate(const void* a, const void* b, int64_t rows, int64_t cols, int64_t depth, void* sums, int64_t stride,
                bool add, Upcoming& upcoming) {
  constexpr int width = kTileCols<C>;
  const int64_t share = lines_a_tile(rows, cols, width, upcoming);
  alignas(kVectorBytes) C tile[kTileRows * width];
  for (int64_t c = 0; c < cols; c += width) {
    const C* bp = static_cast<const C*>(b) + c * depth;
    const int64_t m = std::min<int64_t>(width, cols - c);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      C* to = static_cast<C*>(sums) + r * stride + c;
      const int64_t n = std::min<int64_t>(kTileRows, rows - r);
      upcoming.ask(share);
      if (add) copy_tile(tile, width, to, stride, n, m);
      multiply_tile(depth, static_cast<const C*>(a) + r * depth, bp, tile, add);
      copy_tile(to, stride, tile, width, n, m);
    }
  }
}

template <class S>
constexpr PackKernels pack_kernels() {
  return {rows_to_panels<S, false>,
          rows_to_panels<S, true>,
          columns_to_panels<S, false>,
          columns_to_panels<S, true>,
          widen_row<S>,
          narrow_row<S>,
          multiply<S>};
}

}  // namespace

extern const LinearKernels linear_kernels = {
    kTileRows,
    kTileCols<float>,
    kTileCols<double>,
    pack_kernels<double>(),
    pack_kernels<float>(),
    pack_kernels<BFloat16>(),
    pack_kernels<Half>(),
    accumulate<float>,
    accumulate<double>,
};

}  // namespace mtl::MTL_ISA
