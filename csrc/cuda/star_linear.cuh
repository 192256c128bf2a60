// star_linear on a GPU: rows grouped by domain, and for each domain the plain products of expert_linear with W * W_p.
//
//   forward   Y_p  [n_p, N] = X_p  [n_p, K] (W * W_p)^T     bias and activation on the sums, in registers
//   dX        dX_p [n_p, K] = dZ_p [n_p, N] (W * W_p)
//   dW        S_p  [N, K]   = dZ_p^T        X_p             in chunks of rows; dW_p = S_p * W, dW = sum_p S_p * W_p
//
// A tile's rows are gathered by their order on the way in and scattered on the way out. W * W_p is formed in float32
// and rounded once on its way to shared memory; dW's second stage sums the chunks in their order. Rows of no domain
// have no depth: nothing of them is read but their place.
#pragma once

#include <cmath>

#include "expert_linear.cuh"
#include "star_linear_args.cuh"

namespace mtl {

// A block's part of the work, as its tile of expert_linear, and its rows order[start, start + rows).
struct StarPart {
  LinearPart tile;
  int domain, start, rows;
};

template <class TILE, LinearProduct PRODUCT>
__device__ inline StarPart star_part(const StarArgs& a) {
  const int outputs = static_cast<int>(a.outputs), block = static_cast<int>(blockIdx.x);
  const int width = PRODUCT == LinearProduct::kForward ? outputs : static_cast<int>(a.features);
  const int across = width > TILE::kN ? (width - 1) / TILE::kN + 1 : 1;
  const int down = PRODUCT == LinearProduct::kWeight ? (outputs - 1) / TILE::kM + 1 : 1;
  StarPart part{};
  // Neighbouring blocks share their rows: x, or the gradient, comes from memory once and from the cache afterwards.
  part.tile.column0 = block % across * TILE::kN;
  part.tile.row0 = block / across % down * TILE::kM;
  part.tile.slice = block / across / down;
  part.tile.columns = outputs;
  const DomainChunk chunk = domain_chunk(a.groups, a.slice_rows, part.tile.slice);
  part.domain = static_cast<int>(chunk.bucket) - 1;
  part.start = static_cast<int>(chunk.start);
  part.rows = static_cast<int>(chunk.stop - chunk.start);
  return part;
}

template <class S, LinearProduct PRODUCT>
__device__ inline Operand<S> star_left(const StarArgs& a, const StarPart& p, int depth) {
  if constexpr (PRODUCT == LinearProduct::kForward) {
    return {static_cast<const S*>(a.x), nullptr, a.x_row, depth, p.rows};
  }
  const int row0 = p.tile.row0;  // 0 for dX
  const S* saved = a.saved ? static_cast<const S*>(a.saved) + row0 : nullptr;
  const int size = PRODUCT == LinearProduct::kWeight ? p.tile.columns - row0 : p.rows;
  return {static_cast<const S*>(a.grad) + row0, saved, a.columns, depth, size};
}

template <class S, LinearProduct PRODUCT>
__device__ inline Operand<S> star_right(const StarArgs& a, const StarPart& p, int depth) {
  const int column0 = p.tile.column0, left = static_cast<int>(a.features) - column0;
  if constexpr (PRODUCT == LinearProduct::kWeight) {
    return {static_cast<const S*>(a.x) + column0, nullptr, a.x_row, depth, left};
  }
  const bool forward = PRODUCT == LinearProduct::kForward;
  const int64_t corner = forward ? column0 * a.features : column0;
  const S* own = static_cast<const S*>(a.own_weight) + p.domain * (a.outputs * a.features);
  const int size = forward ? p.tile.columns - column0 : left;
  return {static_cast<const S*>(a.weight) + corner, own + corner, a.features, depth, size};
}

// The rows in memory of a thread's chunks.
struct GatheredRows {
  int row[kGemmParts];
  __device__ int operator()(int i, int) const { return row[i]; }
};

struct ScatteredRows {
  const int64_t* order;
  __device__ int64_t operator()(int row) const { return order[row]; }
};

// Takes W * W_p to shared memory. Of PanelLoader's operand, data is W and saved W_p, of type P; the panel is of S.
template <class S, class P, class PANEL, int THREADS>
struct ProductLoader : PanelLoader<P, PANEL, THREADS, RowsAsTheyCome, true> {
  using Base = PanelLoader<P, PANEL, THREADS, RowsAsTheyCome, true>;
  using Base::Base;

  __device__ static constexpr bool by_hardware() { return false; }

  __device__ void put(const typename Base::Fetched& fetched, Activation, int i, unsigned char* panel) const {
    Pack<S, PANEL::kVec> chunk;
#pragma unroll
    for (int e = 0; e < PANEL::kVec; ++e) {
      chunk.value[e] = from_float<S>(to_float(Base::numbers(fetched.data).value[e]) *
                                     to_float(Base::numbers(fetched.saved).value[e]));
    }
    *reinterpret_cast<float4*>(PANEL::chunk(panel, Base::row(i), Base::column(i))) =
        reinterpret_cast<const float4&>(chunk);
  }
};

template <class S, class TILE, LinearProduct PRODUCT>
__device__ inline void star_finish(const StarArgs& a, const StarPart& p, int columns,
                                   float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
  const ScatteredRows row_of{a.groups.order + p.start};
  // Not p.tile.column0: a register fewer in the product.
  const int column0 = static_cast<int>(PRODUCT == LinearProduct::kForward ? a.outputs : a.features) - columns;
  if constexpr (PRODUCT == LinearProduct::kForward) {
    const auto bias_of = [&](int column) {
      if (!known_domain(a.groups, p.domain)) return NAN;
      const int at = column0 + column;
      float bias = a.bias ? load_as_float(a.bias, a.bias_type, at) : 0.0f;
      if (a.own_bias) bias += load_as_float(a.own_bias, a.bias_type, p.domain * a.outputs + at);
      return bias;
    };
    linear_store_output<S, TILE>(a, column0, p.rows, columns, bias_of, row_of, c);
  } else if constexpr (PRODUCT == LinearProduct::kInput) {
    S* to = static_cast<S*>(a.out) + column0;
    each_strip<TILE>(c, [&](int i, float (&strip)[TILE::kTilesN][4]) {
      store_strip<S, TILE>(strip, i, to, a.out_row, p.rows, columns, row_of);
    });
  } else {
    linear_finish<S, TILE, PRODUCT>(a, p.tile, c);
  }
}

// Numbers of S, weights of P. Exact float32 gets the registers of one block fewer, as in expert_linear.
template <class S, class P, class TILE, LinearProduct PRODUCT>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks - (sizeof(S) == 4))
    star_linear_kernel(const __grid_constant__ StarArgs a) {
  extern __shared__ float4 shared_memory[];
  constexpr bool kSums = PRODUCT == LinearProduct::kWeight;  // the rows are the depth
  using Panels = LinearPanels<S, TILE, PRODUCT>;
  using Left = typename Panels::Left;
  using Right = typename Panels::Right;
  using LeftLoader = PanelLoader<S, Left, TILE::kThreads, GatheredRows, true>;
  using RightLoader = std::conditional_t<kSums, PanelLoader<S, Right, TILE::kThreads, GatheredRows, true>,
                                         ProductLoader<S, P, Right, TILE::kThreads>>;
  static_assert(!kSums || Left::kChunks == Right::kChunks);  // a thread's chunks are of the same rows in both
  auto* stages = reinterpret_cast<unsigned char*>(shared_memory);
  const StarPart part = star_part<TILE, PRODUCT>(a);
  const bool known = known_domain(a.groups, part.domain);
  if (part.rows <= 0 || (kSums && !known)) return;  // the same for the whole block
  const int wide = static_cast<int>(PRODUCT == LinearProduct::kForward ? a.features : a.outputs);
  const int depth = kSums ? part.rows : wide;
  const int steps = known ? (depth + Left::kDepth - 1) / Left::kDepth : 0;
  const auto rows_of = [&](int step) {
    GatheredRows at;
#pragma unroll
    for (int i = 0; i < kGemmParts; ++i) {
      const int r = (kSums ? step * Left::kDepth : 0) + LeftLoader::row(i);
      at.row[i] = r < part.rows ? static_cast<int>(a.groups.order[part.start + r]) : 0;
    }
    return at;
  };
  LeftLoader left(star_left<S, PRODUCT>(a, part, depth), rows_of(0));
  RightLoader right(star_right<std::conditional_t<kSums, S, P>, PRODUCT>(a, part, depth));
  const auto set_rows = [&](const GatheredRows& rows) {
    if constexpr (kSums) left.row_of = right.row_of = rows;
  };
  const bool copy_left = left.by_hardware(), copy_right = right.by_hardware();
  const bool sum_columns = kSums && a.dbias && part.tile.column0 == 0;

  float c[TILE::kTilesM][TILE::kTilesN][4] = {};
  ColumnSums<S, Left, TILE::kM, TILE::kThreads> sums;
  const auto stage_of = [&](int step) { return stages + step % kGemmStages * Panels::kStage; };
  const auto copy = [&](int step) {
    unsigned char* stage = stage_of(step);
    if (copy_left) left.copy(step, stage);
    if constexpr (kSums) {
      if (copy_right) right.copy(step, stage + Left::kBytes);
    }
  };

  for (int step = 0; step < kGemmStages - 1; ++step) {
    if (step < steps) {
      set_rows(rows_of(step));
      copy(step);
      typename LeftLoader::Fetched from_left;
      typename RightLoader::Fetched from_right;
#pragma unroll
      for (int i = 0; i < kGemmParts; ++i) {
        if (!copy_left) left.fetch(step, i, from_left);
        if (!copy_right) right.fetch(step, i, from_right);
        if (!copy_left) left.put(from_left, a.activation, i, stage_of(step));
        if (!copy_right) right.put(from_right, Activation::kNone, i, stage_of(step) + Left::kBytes);
      }
    }
    cp_async_commit();
  }
  GatheredRows coming = rows_of(kGemmStages - 1);
  for (int step = 0; step < steps; ++step) {
    const int next = step + kGemmStages - 1;
    const bool more = next < steps, fetch_left = more && !copy_left, fetch_right = more && !copy_right;
    cp_async_wait<kGemmStages - 2>();
    __syncthreads();  // this step's panels are complete, and the last one's are read
    set_rows(coming);
    if (kSums) coming = rows_of(next + 1);  // a step ahead, for they are waited for before anything else can start
    if (more) copy(next);
    cp_async_commit();
    const unsigned char* stage = stage_of(step);
    unsigned char* filled = stage_of(next);
    if (sum_columns) sums.add(stage);
#pragma unroll
    for (int i = 0; i < kGemmParts; ++i) {
      typename LeftLoader::Fetched from_left;
      typename RightLoader::Fetched from_right;
      if (fetch_left) left.fetch(next, i, from_left);
      if (fetch_right) right.fetch(next, i, from_right);
      if constexpr (sizeof(S) == 4) {
        multiply_exactly<TILE, Left, Right>(stage, stage + Left::kBytes, i, c);
      } else {
        multiply<S, TILE, Left, Right>(stage, stage + Left::kBytes, i, c);
      }
      // They had the product's time to arrive.
      if (fetch_left) left.put(from_left, a.activation, i, filled);
      if (fetch_right) right.put(from_right, Activation::kNone, i, filled + Left::kBytes);
    }
  }
  star_finish<S, TILE, PRODUCT>(a, part, right.from.size, c);
  if (sum_columns) {
    __syncthreads();  // the last panels are read
    sums.store(a, part.tile, reinterpret_cast<float*>(shared_memory));
  }
}

constexpr int kStarColumns = 32, kStarSlices = 8;

// Every kStarSlices-th domain is summed by the same threads, in order; then their shares of the shared gradient are.
// The weight of a domain without rows is not read.
static __global__ void __launch_bounds__(kStarColumns* kStarSlices)
    star_combine_kernel(const __grid_constant__ StarSums a) {
  extern __shared__ float4 shared_memory[];
  float* shares = reinterpret_cast<float*>(shared_memory);
  const int column = threadIdx.x % kStarColumns, slice = threadIdx.x / kStarColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kStarColumns + column;
  const bool inside = i < a.size;
  const float weight = inside && a.own && a.weight ? load_as_float(a.weight, a.type, i) : 1.0f;
  float share = 0.0f;
  for (int64_t p = slice; inside && p < a.groups.domains; p += kStarSlices) {
    const int64_t begin = a.groups.bound[p + 1], end = a.groups.bound[p + 2];
    const float* partial = a.partial + (begin / a.rows + p + 1) * a.size + i;
    float sum = 0.0f;
    for (int64_t row = begin; row < end; row += a.rows, partial += a.size) sum += *partial;
    if (a.own) store_float(a.own, a.type, p * a.size + i, begin < end ? sum * weight : 0.0f);
    if (a.shared && begin < end) share += a.weight ? sum * load_as_float(a.own_weight, a.type, p * a.size + i) : sum;
  }
  if (a.shared == nullptr) return;
  shares[threadIdx.x] = share;
  __syncthreads();  // every slice's share is there
  if (slice > 0 || !inside) return;
  for (int s = 1; s < kStarSlices; ++s) share += shares[s * kStarColumns + column];
  store_float(a.shared, a.type, i, share);
}

}  // namespace mtl
