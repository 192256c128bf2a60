// Channel-wise static mixes on a GPU: O[b,i,d] = sum_j C[i,j,d] X[b,j,d].
//
// Here a weight belongs to one channel, so it is read as often as the experts unless batch rows share it: a thread owns
// one channel and a 4 x 4 tile of sums, and every value it loads serves four multiplications.
#pragma once

#include <cstdint>

#include "scalar.cuh"

namespace mtl {

constexpr int kChannelThreads = 128;
constexpr int kChannelTile = 4;

struct ChannelMixArgs {
  int64_t batch, width;
  int outputs, inputs;                      // forward: T and E; gradient of the experts: E and T
  const void *x, *y;                        // y: the other factor of the weights' gradient
  int64_t x_row, x_input, y_row, y_output;  // strides in elements; D is contiguous
  const float* weight;                      // C, read at i * weight_output + j * weight_input + d
  int64_t weight_output, weight_input;
  void* out;        // [B, outputs, D]
  float* partials;  // [splits, outputs, inputs, D]
  int64_t splits;
};

inline int64_t channel_blocks(int64_t width) { return (width + kChannelThreads - 1) / kChannelThreads; }
inline int64_t channel_tiles(int64_t n) { return (n + kChannelTile - 1) / kChannelTile; }

// Into how many parts the batch is cut for the gradient of the weights: enough to fill a GPU, within 64 MiB of
// partials.
inline int64_t channel_splits(int64_t batch, int64_t outputs, int64_t inputs, int64_t width) {
  const int64_t tiles = channel_blocks(width) * channel_tiles(outputs) * channel_tiles(inputs);
  const int64_t size = outputs * inputs * width;
  int64_t splits = tiles ? 2048 / tiles : 1;
  if (size && splits > (16 << 20) / size) splits = (16 << 20) / size;
  if (splits > (batch + 15) / 16) splits = (batch + 15) / 16;
  return splits < 1 ? 1 : splits;
}

// Grid: channel blocks x groups of four batch rows, folded into one axis, for the others end at 65535.
template <class S>
__global__ void __launch_bounds__(kChannelThreads) channel_mix_kernel(const __grid_constant__ ChannelMixArgs a) {
  const int64_t blocks = (a.width + kChannelThreads - 1) / kChannelThreads;
  const int64_t d = blockIdx.x % blocks * kChannelThreads + threadIdx.x;
  const int64_t row0 = blockIdx.x / blocks * kChannelTile;
  if (d >= a.width) return;
  const int rows = static_cast<int>(a.batch - row0 < kChannelTile ? a.batch - row0 : kChannelTile);
  for (int i0 = 0; i0 < a.outputs; i0 += kChannelTile) {
    float sum[kChannelTile][kChannelTile] = {};
    for (int j = 0; j < a.inputs; ++j) {
      float x[kChannelTile] = {}, c[kChannelTile] = {};
#pragma unroll
      for (int r = 0; r < kChannelTile; ++r) {
        if (r < rows) x[r] = to_float(static_cast<const S*>(a.x)[(row0 + r) * a.x_row + j * a.x_input + d]);
      }
#pragma unroll
      for (int i = 0; i < kChannelTile; ++i) {
        if (i0 + i < a.outputs) c[i] = a.weight[(i0 + i) * a.weight_output + j * a.weight_input + d];
      }
#pragma unroll
      for (int r = 0; r < kChannelTile; ++r) {
#pragma unroll
        for (int i = 0; i < kChannelTile; ++i) sum[r][i] += c[i] * x[r];
      }
    }
#pragma unroll
    for (int r = 0; r < kChannelTile; ++r) {
#pragma unroll
      for (int i = 0; i < kChannelTile; ++i) {
        if (r >= rows || i0 + i >= a.outputs) continue;
        static_cast<S*>(a.out)[((row0 + r) * a.outputs + i0 + i) * a.width + d] = from_float<S>(sum[r][i]);
      }
    }
  }
}

// dC[i,j,d] = sum_b y[b,i,d] x[b,j,d]. Grid: channel blocks x tiles of (i, j) x parts of the batch, folded into one
// axis.
template <class S>
__global__ void __launch_bounds__(kChannelThreads)
    channel_mix_dweight_kernel(const __grid_constant__ ChannelMixArgs a) {
  const int64_t blocks = (a.width + kChannelThreads - 1) / kChannelThreads;
  const int64_t tiles_j = (a.inputs + kChannelTile - 1) / kChannelTile;
  const int64_t tiles = (a.outputs + kChannelTile - 1) / kChannelTile * tiles_j;
  const int64_t d = blockIdx.x % blocks * kChannelThreads + threadIdx.x, tile = blockIdx.x / blocks % tiles;
  const int64_t split = blockIdx.x / blocks / tiles;
  const int i0 = static_cast<int>(tile / tiles_j) * kChannelTile, j0 = static_cast<int>(tile % tiles_j) * kChannelTile;
  if (d >= a.width) return;
  float sum[kChannelTile][kChannelTile] = {};
  for (int64_t row = a.batch * split / a.splits; row < a.batch * (split + 1) / a.splits; ++row) {
    float y[kChannelTile] = {}, x[kChannelTile] = {};
#pragma unroll
    for (int k = 0; k < kChannelTile; ++k) {
      if (i0 + k < a.outputs) y[k] = to_float(static_cast<const S*>(a.y)[row * a.y_row + (i0 + k) * a.y_output + d]);
      if (j0 + k < a.inputs) x[k] = to_float(static_cast<const S*>(a.x)[row * a.x_row + (j0 + k) * a.x_input + d]);
    }
#pragma unroll
    for (int i = 0; i < kChannelTile; ++i) {
#pragma unroll
      for (int j = 0; j < kChannelTile; ++j) sum[i][j] += y[i] * x[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kChannelTile; ++i) {
#pragma unroll
    for (int j = 0; j < kChannelTile; ++j) {
      if (i0 + i >= a.outputs || j0 + j >= a.inputs) continue;
      a.partials[((split * a.outputs + i0 + i) * a.inputs + j0 + j) * a.width + d] = sum[i][j];
    }
  }
}

}  // namespace mtl
