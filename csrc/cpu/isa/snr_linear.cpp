// The kernels of snr_linear, for one instruction set.
#include "../snr_kernels.h"
#include "activate.h"
#include "reduce.h"

namespace mtl::MTL_ISA {

namespace {

constexpr int64_t kChunk = 256;

template <class S>
void row(Activation activation, const void* from, const void* saved, void* to, int64_t n) {
  using C = SumOf<S>;
  if (n == 0) return;
  const S* in = static_cast<const S*>(from);
  if (saved)
    activation_gradient(activation, in, static_cast<const S*>(saved), static_cast<C*>(to), n);
  else if constexpr (std::is_same_v<S, C>)
    std::memcpy(to, from, n * sizeof(C));
  else
    widen(in, static_cast<C*>(to), n);
}

template <class S>
void panels(const Block& block, double gate, void* to, int64_t panel) {
  using C = SumOf<S>;
  constexpr int64_t width = kTileCols<C>;
  const C g = static_cast<C>(gate);
  C* out = static_cast<C*>(to);
  for (int64_t c = 0; c < block.cols; c += width, out += panel) {
    const int64_t n = block.cols - c < width ? block.cols - c : width;
    const S* from = static_cast<const S*>(block.data) + c * block.col_step;
    for (int64_t d = 0; d < block.depth; ++d, from += block.depth_step) {
      C* place = out + d * width;
      for (int64_t i = 0; i < n; ++i) place[i] = g * static_cast<C>(from[i * block.col_step]);
      for (int64_t i = n; i < width; ++i) place[i] = C{0};
    }
  }
}

// tile [kTileRows][kTileCols] = the parts of kTileRows rows against one panel.
template <class C>
inline void multiply_tile(const C* rows, const Parts& a, const C* b, C* tile) {
  using V = Vector<C>;
  constexpr int lanes = kLanes<C>, cols = kTileCols<C>;
  V sum[kTileRows][2] = {};
  for (int64_t n = 0; n < a.count; ++n) {
    const C* part = rows + a.offsets[n];
    for (int64_t k = 0; k < a.width; ++k, ++part, b += cols) {
      const V b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const C x = part[i * a.stride];
        sum[i][0] += x * b0;
        sum[i][1] += x * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    store(tile + i * cols, sum[i][0]);
    store(tile + i * cols + lanes, sum[i][1]);
  }
}

template <class S>
void multiply(const Parts& a, const void* panels, int64_t rows, int64_t cols, const Output& out) {
  using C = SumOf<S>;
  constexpr int width = kTileCols<C>;
  alignas(kVectorBytes) C tile[kTileRows * width];
  const int64_t depth = a.count * a.width;
  // One panel stays in L1 while the rows stream past it from L2.
  for (int64_t c = 0; c < cols; c += width) {
    const C* b = static_cast<const C*>(panels) + c * depth;
    const C* bias = out.bias ? static_cast<const C*>(out.bias) + c : nullptr;
    const int64_t n = cols - c < width ? cols - c : width;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      multiply_tile(static_cast<const C*>(a.rows) + r * a.stride, a, b, tile);
      const int64_t m = rows - r < kTileRows ? rows - r : kTileRows;
      for (int64_t i = 0; i < m; ++i) {
        C* from = tile + i * width;
        const int64_t at = (r + i) * out.stride + c;
        for (int j = 0; bias && j < width; ++j) from[j] += bias[j];
        if (out.z) narrow(from, static_cast<S*>(out.z) + at, n);
        activate(out.activation, from, width);
        if (n == width)
          narrow(from, static_cast<S*>(out.y) + at, width);
        else
          narrow(from, static_cast<S*>(out.y) + at, n);
      }
    }
  }
}

template <class S>
double finish(const void* weight, const void* sums, double gate, void* dweight, int64_t n) {
  using C = SumOf<S>;
  C widened[kChunk], scaled[kChunk];
  const C g = static_cast<C>(gate);
  double product = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    const C* s = static_cast<const C*>(sums) + i;
    row<S>(Activation::kNone, static_cast<const S*>(weight) + i, nullptr, widened, m);
    product += dot(widened, s, m);
    if (!dweight) continue;
    for (int64_t j = 0; j < m; ++j) scaled[j] = g * s[j];
    narrow(scaled, static_cast<S*>(dweight) + i, m);
  }
  return product;
}

template <class S>
constexpr SnrKernels kernels() {
  return {row<S>, panels<S>, multiply<S>, finish<S>};
}

}  // namespace

extern const SnrTable snr_kernels = {{kernels<double>(), kernels<float>(), kernels<BFloat16>(), kernels<Half>()}};

}  // namespace mtl::MTL_ISA
