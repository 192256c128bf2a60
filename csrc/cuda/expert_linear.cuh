// expert_linear on a GPU. The experts of a unit are one contiguous slice of the weight, and one contiguous range of
// columns of y, so each unit is a plain product:
//
//   forward   Y_u  [B, m N] = X_u  [B, K]   W_u^T          bias and activation on the sums, in registers
//   dX        dX_u [B, K]   = dZ_u [B, m N] W_u            summed over the unit's m experts inside the product
//   dW        dW_u [m N, K] = dZ_u^T        X_u            the batch in a fixed number of slices, summed in order
//
// dZ = dY * act' is formed on its way to shared memory and never stored. 16-bit operands are multiplied by tensor cores
// with float32 sums; float32 exactly. The order of every sum depends on the shapes alone.
#pragma once

#include "expert_linear_args.cuh"
#include "gemm_tile.cuh"

namespace mtl {

// A block's part of the work. Sizes fit in 31 bits, offsets do not.
struct LinearPart {
  int unit, columns0, columns;  // the unit, its first column among all E * N, its columns
  int row0, column0;            // of the tile in the unit's product
  int slice;
};

template <class TILE, LinearProduct PRODUCT>
__device__ inline LinearPart linear_part(const LinearArgs& a) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = a.units;  // the last unit that does not begin after this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.tile[middle] <= block ? low : high) = middle;
  }
  LinearPart part;
  part.unit = a.first_unit + low;
  part.columns0 = a.expert[low] * static_cast<int>(a.outputs);
  part.columns = (a.expert[low + 1] - a.expert[low]) * static_cast<int>(a.outputs);
  const int width = PRODUCT == LinearProduct::kForward ? part.columns : static_cast<int>(a.features);
  const int across = width > TILE::kN ? (width - 1) / TILE::kN + 1 : 1, local = block - a.tile[low];
  // Neighbouring blocks share their rows: x, or the gradient, comes from memory once and from the cache afterwards.
  part.column0 = local % across * TILE::kN;
  int line = local / across;
  part.slice = 0;
  if constexpr (PRODUCT == LinearProduct::kWeight) {
    const int down = (part.columns - 1) / TILE::kM + 1;
    part.slice = line / down;
    line %= down;
  }
  part.row0 = line * TILE::kM;
  return part;
}

template <class S, LinearProduct PRODUCT>
__device__ inline Operand<S> linear_left(const LinearTensors& a, const LinearPart& p) {
  const int batch = static_cast<int>(a.batch), features = static_cast<int>(a.features);
  if constexpr (PRODUCT == LinearProduct::kForward) {
    const S* x = static_cast<const S*>(a.x) + p.unit * a.x_unit + p.row0 * a.x_row;
    return {x, nullptr, a.x_row, features, batch - p.row0};
  }
  const bool down = PRODUCT == LinearProduct::kWeight;
  const int batch0 = down ? p.slice * a.slice_rows : p.row0, rows = batch - batch0;
  const int64_t offset = batch0 * a.columns + p.columns0 + (down ? p.row0 : 0);
  const S* saved = a.saved ? static_cast<const S*>(a.saved) + offset : nullptr;
  const int depth = !down ? p.columns : rows < a.slice_rows ? rows : a.slice_rows;
  return {static_cast<const S*>(a.grad) + offset, saved, a.columns, depth, down ? p.columns - p.row0 : rows};
}

template <class S, LinearProduct PRODUCT>
__device__ inline Operand<S> linear_right(const LinearTensors& a, const LinearPart& p, int depth) {
  const int left = static_cast<int>(a.features) - p.column0;
  if constexpr (PRODUCT == LinearProduct::kWeight) {
    const int64_t row = p.slice * a.slice_rows;
    return {static_cast<const S*>(a.x) + p.unit * a.x_unit + row * a.x_row + p.column0, nullptr, a.x_row, depth, left};
  }
  const S* weight = static_cast<const S*>(a.weight) + p.columns0 * a.features;
  if constexpr (PRODUCT == LinearProduct::kForward) {
    return {weight + p.column0 * a.features, nullptr, a.features, depth, p.columns - p.column0};
  }
  return {weight + p.column0, nullptr, a.features, depth, left};
}

__device__ inline unsigned pair_bits(float low, float high, __half) {
  const __half pair[2] = {from_float<__half>(low), from_float<__half>(high)};
  return reinterpret_cast<const unsigned&>(pair);
}
__device__ inline unsigned pair_bits(float low, float high, __nv_bfloat16) {
  const __nv_bfloat16 pair[2] = {from_float<__nv_bfloat16>(low), from_float<__nv_bfloat16>(high)};
  return reinterpret_cast<const unsigned&>(pair);
}

// Stores strip i of a tile, 16 rows of every warp, at to[row_of(row) * stride + column] as S, below the limits.
template <class S, class TILE, class RowOf = RowsAsTheyCome>
__device__ inline void store_strip(const float (&c)[TILE::kTilesN][4], int i, S* to, int64_t stride, int rows,
                                   int columns, const RowOf& row_of = {}) {
  const Place<TILE> at;
  const uint64_t bits = reinterpret_cast<uint64_t>(to) | static_cast<uint64_t>(stride) * sizeof(S);
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const int row = at.row(i, k);
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int j = 0; j < TILE::kTilesN; ++j) {
        const int column = at.column(j, 0);
        if (row >= rows || column >= columns) continue;
        S* place = to + row_of(row) * stride + column;
        if (bits % 8 == 0 && column + 2 <= columns) {
          *reinterpret_cast<float2*>(place) = float2{c[j][k], c[j][k + 1]};
        } else {
          place[0] = c[j][k];
          if (column + 1 < columns) place[1] = c[j][k + 1];
        }
      }
    } else {
      // The four lanes of a row hold two columns each of four mma tiles. Exchanged, each holds eight neighbours: one
      // store of 16 bytes, and whole sectors of 32 bytes a row.
      static_assert(TILE::kTilesN == 4);
      unsigned word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = pair_bits(c[j][k], c[j][k + 1], S{});
      const int quad = at.lane % 4;
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const unsigned got = __shfl_xor_sync(0xffffffffu, quad & 1 ? word[j] : word[j + 1], 1);
        (quad & 1 ? word[j] : word[j + 1]) = got;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const unsigned got = __shfl_xor_sync(0xffffffffu, quad & 2 ? word[j] : word[j + 2], 2);
        (quad & 2 ? word[j] : word[j + 2]) = got;
      }
      const int column = at.column0 + 8 * quad;
      if (row >= rows) continue;
      S* place = to + row_of(row) * stride + column;
      if (bits % 16 == 0 && column + 8 <= columns) {
        *reinterpret_cast<uint4*>(place) = uint4{word[0], word[1], word[2], word[3]};
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (column + e < columns) place[e] = reinterpret_cast<const S(&)[2]>(word[e / 2])[e % 2];
        }
      }
    }
  }
}

// Calls body(i, strip i) for every strip of sums. The loop is not unrolled, for the compiler would work on all strips
// at a time and run out of registers; the sums move up instead, because registers have no index.
template <class TILE, class Body>
__device__ inline void each_strip(float (&c)[TILE::kTilesM][TILE::kTilesN][4], Body body) {
#pragma unroll 1
  for (int i = 0; i < TILE::kTilesM; ++i) {
    body(i, c[0]);
#pragma unroll
    for (int next = 1; next < TILE::kTilesM; ++next) {
#pragma unroll
      for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) c[next - 1][j][k] = c[next][j][k];
      }
    }
  }
}

// z and y of a tile: bias_of(column) is added to its sums, and the activation taken.
template <class S, class TILE, class BiasOf, class RowOf>
__device__ inline void linear_store_output(const LinearTensors& a, int64_t offset, int rows, int columns,
                                           const BiasOf& bias_of, const RowOf& row_of,
                                           float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
  const Place<TILE> at;
  float bias[TILE::kTilesN][2] = {};
#pragma unroll
  for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int column = at.column(j, k);
      if (column < columns) bias[j][k] = bias_of(column);
    }
  }
  each_strip<TILE>(c, [&](int i, float (&strip)[TILE::kTilesN][4]) {
#pragma unroll
    for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) strip[j][k] += bias[j][k % 2];
    }
    if (a.z) store_strip<S, TILE>(strip, i, static_cast<S*>(a.z) + offset, a.columns, rows, columns, row_of);
#pragma unroll
    for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) strip[j][k] = activate(a.activation, strip[j][k]);
    }
    store_strip<S, TILE>(strip, i, static_cast<S*>(a.out) + offset, a.columns, rows, columns, row_of);
  });
}

template <class S, class TILE, LinearProduct PRODUCT>
__device__ inline void linear_finish(const LinearTensors& a, const LinearPart& p,
                                     float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
  using Strip = float (&)[TILE::kTilesN][4];
  if constexpr (PRODUCT == LinearProduct::kForward) {
    const int rows = static_cast<int>(a.batch) - p.row0, columns = p.columns - p.column0;
    const int first = p.columns0 + p.column0;
    const auto bias_of = [&](int column) { return a.bias ? load_as_float(a.bias, a.bias_type, first + column) : 0.0f; };
    linear_store_output<S, TILE>(a, p.row0 * a.columns + first, rows, columns, bias_of, RowsAsTheyCome{}, c);
  } else if constexpr (PRODUCT == LinearProduct::kInput) {
    S* to = static_cast<S*>(a.out) + p.row0 * a.out_row + p.unit * a.features + p.column0;
    const int rows = static_cast<int>(a.batch) - p.row0, columns = static_cast<int>(a.features) - p.column0;
    each_strip<TILE>(c, [&](int i, Strip strip) { store_strip<S, TILE>(strip, i, to, a.out_row, rows, columns); });
  } else {
    const int64_t offset = (p.slice * a.columns + p.columns0 + p.row0) * a.features + p.column0;
    const int rows = p.columns - p.row0, columns = static_cast<int>(a.features) - p.column0;
    each_strip<TILE>(c, [&](int i, Strip strip) {
      if (a.exact) {
        store_strip<float, TILE>(strip, i, static_cast<float*>(a.out) + offset, a.features, rows, columns);
      } else {
        store_strip<S, TILE>(strip, i, static_cast<S*>(a.out) + offset, a.features, rows, columns);
      }
    });
  }
}

// The sums over the batch of the gradients in dW's left panels: each thread adds some rows of one column.
template <class S, class PANEL, int COLUMNS, int THREADS>
struct ColumnSums {
  static constexpr int kShare = THREADS / COLUMNS, kRows = PANEL::kDepth / kShare;
  float sum = 0.0f;

  __device__ void add(const unsigned char* panel) {
    const int column = threadIdx.x % COLUMNS, row0 = threadIdx.x / COLUMNS * kRows;
#pragma unroll
    for (int row = 0; row < kRows; ++row) sum += to_float(PANEL::number(panel, column, row0 + row));
  }

  // Adds the threads' sums in order; uses shared memory that every thread is done with.
  __device__ void store(const LinearTensors& a, const LinearPart& p, float* shared) const {
    const int column = threadIdx.x;
    shared[column] = sum;
    __syncthreads();  // every thread's sum is there
    if (column >= COLUMNS || p.row0 + column >= p.columns) return;
    float total = sum;
    for (int i = 1; i < kShare; ++i) total += shared[i * COLUMNS + column];
    const int64_t at = p.slice * a.columns + p.columns0 + p.row0 + column;
    if (a.exact) {
      static_cast<float*>(a.dbias)[at] = total;
    } else {
      static_cast<S*>(a.dbias)[at] = from_float<S>(total);
    }
  }
};

template <class S, class TILE, LinearProduct PRODUCT>
struct LinearPanels {
  using Left = Panel<S, TILE::kM, PRODUCT == LinearProduct::kWeight>;
  using Right = Panel<S, TILE::kN, PRODUCT != LinearProduct::kForward>;
  static constexpr int kStage = Left::kBytes + Right::kBytes, kBytes = kGemmStages * kStage;
};

// Exact float32 keeps more numbers on their way; it gets the registers of one block fewer.
template <class S, class TILE, LinearProduct PRODUCT>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks - (sizeof(S) == 4))
    expert_linear_kernel(const __grid_constant__ LinearArgs a) {
  extern __shared__ float4 shared_memory[];
  using Panels = LinearPanels<S, TILE, PRODUCT>;
  using Left = typename Panels::Left;
  using Right = typename Panels::Right;
  using LeftLoader = PanelLoader<S, Left, TILE::kThreads, RowsAsTheyCome, true>;
  using RightLoader = PanelLoader<S, Right, TILE::kThreads, RowsAsTheyCome, true>;
  auto* stages = reinterpret_cast<unsigned char*>(shared_memory);
  const LinearPart part = linear_part<TILE, PRODUCT>(a);
  const LeftLoader left(linear_left<S, PRODUCT>(a, part));
  const RightLoader right(linear_right<S, PRODUCT>(a, part, left.from.depth));
  const int steps = (left.from.depth + Left::kDepth - 1) / Left::kDepth;
  const bool copy_left = left.by_hardware();
  const bool sum_columns = PRODUCT == LinearProduct::kWeight && a.dbias && part.column0 == 0;

  float c[TILE::kTilesM][TILE::kTilesN][4] = {};
  ColumnSums<S, Left, TILE::kM, TILE::kThreads> sums;
  const auto stage_of = [&](int step) { return stages + step % kGemmStages * Panels::kStage; };
  // All of a step's panels but a left one that passes through registers.
  const auto load = [&](int step) {
    unsigned char* stage = stage_of(step);
    if (copy_left) left.copy(step, stage);
    right.load(step, stage + Left::kBytes);
  };

  for (int step = 0; step < kGemmStages - 1; ++step) {
    if (step < steps) {
      load(step);
      typename LeftLoader::Fetched fetched;
      for (int i = 0; !copy_left && i < kGemmParts; ++i) {
        left.fetch(step, i, fetched);
        left.put(fetched, a.activation, i, stage_of(step));
      }
    }
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    const int next = step + kGemmStages - 1;
    const bool more = next < steps, fetch_left = more && !copy_left;
    cp_async_wait<kGemmStages - 2>();
    __syncthreads();  // this step's panels are complete, and the last one's are read
    if (more) load(next);
    cp_async_commit();
    const unsigned char* stage = stage_of(step);
    if (sum_columns) sums.add(stage);
#pragma unroll
    for (int i = 0; i < kGemmParts; ++i) {
      typename LeftLoader::Fetched fetched;
      if (fetch_left) left.fetch(next, i, fetched);
      if constexpr (sizeof(S) == 4) {
        multiply_exactly<TILE, Left, Right>(stage, stage + Left::kBytes, i, c);
      } else {
        multiply<S, TILE, Left, Right>(stage, stage + Left::kBytes, i, c);
      }
      if (fetch_left) left.put(fetched, a.activation, i, stage_of(next));  // it had the product's time to arrive
    }
  }
  linear_finish<S, TILE, PRODUCT>(a, part, c);
  if (sum_columns) {
    __syncthreads();  // the last panels are read
    sums.store(a, part, reinterpret_cast<float*>(shared_memory));
  }
}

constexpr int kSliceThreads = 256;

// out[i] = partials[0][i] + partials[1][i] + ..., for few slices of many sums.
static __global__ void __launch_bounds__(kSliceThreads)
    sum_slices_kernel(const float* partials, int64_t slices, int64_t size, void* out, Scalar type) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSliceThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t s = 0; s < slices; ++s) sum += partials[s * size + i];
  store_float(out, type, i, sum);
}

}  // namespace mtl
