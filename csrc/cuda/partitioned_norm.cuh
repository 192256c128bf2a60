// partitioned_norm on a GPU. Rows are grouped by domain, so that a block works on rows of one domain.
//
// Partial results take memory a slot of domain_groups.cuh, not a block and domain. No atomics: the order of every sum
// is fixed by the ids and the shape.
#pragma once

#include <cmath>
#include <cstdint>

#include "domain_groups.cuh"
#include "scalar.cuh"

namespace mtl {

constexpr int kNormThreads = 256;  // at most; of a chunk's block: lanes * ways
// Rows whose loads a thread has under way at a time: 64 bytes, and of two tensors 64 together where registers are
// short.
constexpr int kNormFlight = 4;
template <int VEC>
constexpr int kNormFlightOfTwo = VEC == 8 ? 2 : 4;
constexpr int kMergeColumns = 32, kMergeSlices = 8;

struct GroupedNormArgs : DomainGroups {
  int64_t width;
  const void *x, *grad;  // columns contiguous, row strides in elements
  int64_t x_row, grad_row;
  const void *weight, *bias, *own_weight, *own_bias, *running_mean, *running_var;
  Scalar affine_type, running_type;
  float *mean, *var;
  int64_t* count;
  float* partial;  // [slots,2,D]
  void* out;       // y or dx
  // Backward: sums of grad and of grad * xhat over each domain, the latter times its weight [P,D]; null where unused.
  float *total, *product, *weighted;
  void *down_weight, *down_bias;  // gradients of own_weight and own_bias
  float eps;
  bool training;
  // Launch: see plan_norm. A block has `lanes` threads side by side and `ways` rows at a time.
  int lanes, ways;
  int64_t rows, slots, tiles;
};

// The work of a block: rows order[start, stop) of a bucket, and this thread's columns from d on.
struct NormChunk {
  int64_t slot, bucket, start, stop, d;
  int lane, way;
};

template <int VEC>
__device__ inline NormChunk norm_chunk(const GroupedNormArgs& a) {
  NormChunk c;
  c.lane = threadIdx.x % a.lanes;
  c.way = threadIdx.x / a.lanes;
  c.slot = blockIdx.x / a.tiles;
  c.d = (blockIdx.x % a.tiles * a.lanes + c.lane) * VEC;
  const DomainChunk chunk = domain_chunk(a, a.rows, c.slot);
  c.bucket = chunk.bucket;
  c.start = chunk.start;
  c.stop = chunk.stop;
  return c;
}

// f(rows, n) for this thread's rows of a chunk, up to N at a time.
template <int N, class F>
__device__ inline void norm_rows(const GroupedNormArgs& a, const NormChunk& c, const F& f) {
  for (int64_t i = c.start + c.way; i < c.stop; i += a.ways * N) {
    int64_t rows[N];
    int n = 0;
#pragma unroll
    for (int r = 0; r < N; ++r) {
      const int64_t at = i + r * a.ways;
      rows[r] = at < c.stop ? a.order[at] : 0;
      n += at < c.stop;
    }
    f(rows, n);
  }
}

template <class S, int VEC, int N>
__device__ inline void norm_load(const void* base, int64_t stride, const int64_t (&rows)[N], int n, int64_t d,
                                 float (&to)[N][VEC]) {
#pragma unroll
  for (int r = 0; r < N; ++r) {
    if (r < n) load<VEC>(static_cast<const S*>(base) + rows[r] * stride + d, to[r]);
  }
}

// Of each chunk: the mean of x minus the domain's first row, and the sum of squares about that mean. Beside a large
// common offset, differences keep the digits that sums of the numbers themselves would lose.
template <class S, int VEC>
__global__ void __launch_bounds__(kNormThreads, 2) norm_statistics_kernel(const __grid_constant__ GroupedNormArgs a) {
  extern __shared__ float4 shared_memory[];
  const NormChunk c = norm_chunk<VEC>(a);
  const int64_t begin = a.bound[c.bucket];
  // The same for the whole block.
  if (c.start >= c.stop || !known_domain(a, c.bucket - 1) || a.bound[c.bucket + 1] - begin < 2) return;
  float* means = reinterpret_cast<float*>(shared_memory);  // [ways][lanes][VEC]
  float* squares = means + a.ways * a.lanes * VEC;
  const int mine = (c.way * a.lanes + c.lane) * VEC;
  const bool inside = c.d < a.width;
  float mean[VEC] = {}, square[VEC] = {};
  if (inside) {
    float shift[VEC];
    load<VEC>(static_cast<const S*>(a.x) + a.order[begin] * a.x_row + c.d, shift);
    float count = 0.0f;
    norm_rows<kNormFlight>(a, c, [&](const int64_t (&rows)[kNormFlight], int n) {
      float x[kNormFlight][VEC];
      norm_load<S, VEC>(a.x, a.x_row, rows, n, c.d, x);
#pragma unroll
      for (int r = 0; r < kNormFlight; ++r) {
        if (r >= n) break;
        count += 1.0f;
        const float share = 1.0f / count;
#pragma unroll
        for (int k = 0; k < VEC; ++k) {  // Welford (1962)
          const float value = x[r][k] - shift[k], delta = value - mean[k];
          mean[k] += delta * share;
          square[k] += delta * (value - mean[k]);
        }
      }
    });
  }
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    means[mine + k] = mean[k];
    squares[mine + k] = square[k];
  }
  __syncthreads();  // every way's statistics are there
  if (c.way > 0 || !inside) return;
  const int64_t n = c.stop - c.start;
  float before = static_cast<float>((n + a.ways - 1) / a.ways);
  for (int w = 1; w < a.ways && w < n; ++w) {  // the merge of Chan, Golub and LeVeque (1979)
    const float count = static_cast<float>((n - w + a.ways - 1) / a.ways), share = count / (before + count);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      const int at = (w * a.lanes + c.lane) * VEC + k;
      const float delta = means[at] - mean[k];
      mean[k] += delta * share;
      square[k] += squares[at] + delta * delta * (before * share);
    }
    before += count;
  }
  float* to = a.partial + c.slot * 2 * a.width + c.d;
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    to[k] = mean[k];
    to[a.width + k] = square[k];
  }
}

// What the merging kernels work on: domain p, column d, every kMergeSlices-th chunk.
struct NormMerge {
  int64_t p, d, begin, count, chunks, first;
  int column, slice;
};

__device__ inline NormMerge norm_merge(const GroupedNormArgs& a, bool counted) {
  const int64_t tiles = gridDim.x / a.domains;
  NormMerge m{};
  m.column = threadIdx.x % kMergeColumns;
  m.slice = threadIdx.x / kMergeColumns;
  m.p = blockIdx.x / tiles;
  m.d = blockIdx.x % tiles * kMergeColumns + m.column;
  if (counted) {
    m.begin = a.bound[m.p + 1];
    m.count = a.bound[m.p + 2] - m.begin;
    m.chunks = (m.count + a.rows - 1) / a.rows;
    m.first = m.begin / a.rows + m.p + 1;
  }
  return m;
}

// The sum of the slices' numbers of one column, in their order.
__device__ inline double norm_slices(const double* sums, int column) {
  double sum = 0.0;
  for (int s = 0; s < kMergeSlices; ++s) sum += sums[s * kMergeColumns + column];
  return sum;
}

// The statistics that serve each domain: of its chunks, or the running ones.
template <class S>
__global__ void __launch_bounds__(kMergeColumns* kMergeSlices)
    norm_merge_kernel(const __grid_constant__ GroupedNormArgs a) {
  extern __shared__ float4 shared_memory[];
  const NormMerge m = norm_merge(a, a.training);
  const int64_t at = m.p * a.width + m.d;
  if (m.slice == 0 && m.d == 0) a.count[m.p] = m.count;
  if (m.count < 2) {  // the same for the whole block
    if (m.slice == 0 && m.d < a.width) {
      a.mean[at] = load_as_float(a.running_mean, a.running_type, at);
      a.var[at] = load_as_float(a.running_var, a.running_type, at);
    }
    return;
  }
  double* sums = reinterpret_cast<double*>(shared_memory);
  double* squares = sums + kMergeSlices * kMergeColumns;
  const double n = static_cast<double>(m.count);
  const auto rows = [&](int64_t c) { return c + 1 < m.chunks ? a.rows : m.count - c * a.rows; };
  const auto partial = [&](int64_t c) { return a.partial + (m.first + c) * 2 * a.width + m.d; };
  double sum = 0.0;
  for (int64_t c = m.slice; c < m.chunks && m.d < a.width; c += kMergeSlices) sum += *partial(c) * (rows(c) / n);
  sums[threadIdx.x] = sum;
  __syncthreads();  // every slice's share of the mean is there
  const double mean = norm_slices(sums, m.column);
  sum = 0.0;
  for (int64_t c = m.slice; c < m.chunks && m.d < a.width; c += kMergeSlices) {
    const double delta = *partial(c) - mean;
    sum += partial(c)[a.width] + delta * delta * rows(c);
  }
  squares[threadIdx.x] = sum;
  __syncthreads();  // and of the squares
  if (m.slice > 0 || m.d >= a.width) return;
  const float shift = to_float(static_cast<const S*>(a.x)[a.order[m.begin] * a.x_row + m.d]);
  a.mean[at] = static_cast<float>(shift + mean);
  a.var[at] = static_cast<float>(norm_slices(squares, m.column) / n);
}

// Mean, w w_p / sqrt(var + eps) and 1 / sqrt(var + eps) of column d of domain p.
struct NormColumn {
  float mean, scale, rstd;
};

__device__ inline NormColumn norm_column(const GroupedNormArgs& a, int64_t p, int64_t d) {
  const int64_t at = p * a.width + d;
  const float rstd = 1.0f / sqrtf(a.var[at] + a.eps);
  const float w = load_as_float(a.weight, a.affine_type, d) * load_as_float(a.own_weight, a.affine_type, at);
  return {a.mean[at], w * rstd, rstd};
}

__device__ inline float norm_move(const GroupedNormArgs& a, int64_t p, int64_t d) {
  return load_as_float(a.bias, a.affine_type, d) + load_as_float(a.own_bias, a.affine_type, p * a.width + d);
}

template <class S, int VEC>
__global__ void __launch_bounds__(kNormThreads, 2) norm_forward_kernel(const __grid_constant__ GroupedNormArgs a) {
  const NormChunk c = norm_chunk<VEC>(a);
  if (c.start >= c.stop || c.d >= a.width) return;
  float mean[VEC] = {}, scale[VEC] = {}, move[VEC];
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    move[k] = NAN;  // rows of no domain
    if (!known_domain(a, c.bucket - 1)) continue;
    const NormColumn column = norm_column(a, c.bucket - 1, c.d + k);
    mean[k] = column.mean;
    scale[k] = column.scale;
    move[k] = norm_move(a, c.bucket - 1, c.d + k);
  }
  norm_rows<kNormFlight>(a, c, [&](const int64_t (&rows)[kNormFlight], int n) {
    float x[kNormFlight][VEC];
    norm_load<S, VEC>(a.x, a.x_row, rows, n, c.d, x);
#pragma unroll
    for (int r = 0; r < kNormFlight; ++r) {
      if (r >= n) break;
#pragma unroll
      for (int k = 0; k < VEC; ++k) x[r][k] = (x[r][k] - mean[k]) * scale[k] + move[k];
      store<VEC>(static_cast<S*>(a.out) + rows[r] * a.width + c.d, x[r]);
    }
  });
}

// The same without groups, for statistics that are there already: rows as they come, each with its own coefficients.
template <class S>
__global__ void __launch_bounds__(kNormThreads) norm_rows_kernel(const __grid_constant__ GroupedNormArgs a) {
  const int64_t d = blockIdx.x % a.tiles * a.lanes + threadIdx.x % a.lanes;
  const int64_t begin = blockIdx.x / a.tiles * a.rows, end = begin + a.rows < a.batch ? begin + a.rows : a.batch;
  if (d >= a.width) return;
  for (int64_t row = begin + threadIdx.x / a.lanes; row < end; row += a.ways) {
    const int64_t p = domain_id(a, row);
    float y = NAN;
    if (known_domain(a, p)) {
      const NormColumn column = norm_column(a, p, d);
      const float x = to_float(static_cast<const S*>(a.x)[row * a.x_row + d]);
      y = (x - column.mean) * column.scale + norm_move(a, p, d);
    }
    static_cast<S*>(a.out)[row * a.width + d] = from_float<S>(y);
  }
}

}  // namespace mtl
