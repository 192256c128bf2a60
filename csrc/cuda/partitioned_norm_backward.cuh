// The gradient of partitioned_norm: sums over each domain's rows, then dx.
#pragma once

#include "partitioned_norm.cuh"

namespace mtl {

// Of each chunk: the sums of grad and of grad * (x - mean).
template <class S, int VEC>
__global__ void __launch_bounds__(kNormThreads, 2) norm_sums_kernel(const __grid_constant__ GroupedNormArgs a) {
  extern __shared__ float4 shared_memory[];
  constexpr int kFlight = kNormFlightOfTwo<VEC>;
  const NormChunk c = norm_chunk<VEC>(a);
  if (c.start >= c.stop || !known_domain(a, c.bucket - 1)) return;  // the same for the whole block
  float* totals = reinterpret_cast<float*>(shared_memory);          // [ways][lanes][VEC]
  float* products = totals + a.ways * a.lanes * VEC;
  const int mine = (c.way * a.lanes + c.lane) * VEC;
  const bool inside = c.d < a.width;
  float total[VEC] = {}, product[VEC] = {};
  if (inside) {
    float mean[VEC];
#pragma unroll
    for (int k = 0; k < VEC; ++k) mean[k] = a.mean[(c.bucket - 1) * a.width + c.d + k];
    norm_rows<kFlight>(a, c, [&](const int64_t (&rows)[kFlight], int n) {
      float g[kFlight][VEC], x[kFlight][VEC];
      norm_load<S, VEC>(a.grad, a.grad_row, rows, n, c.d, g);
      norm_load<S, VEC>(a.x, a.x_row, rows, n, c.d, x);
#pragma unroll
      for (int r = 0; r < kFlight; ++r) {
        if (r >= n) break;
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
          total[k] += g[r][k];
          product[k] += g[r][k] * (x[r][k] - mean[k]);
        }
      }
    });
  }
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    totals[mine + k] = total[k];
    products[mine + k] = product[k];
  }
  __syncthreads();  // every way's sums are there
  if (c.way > 0 || !inside) return;
  for (int w = 1; w < a.ways; ++w) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      total[k] += totals[(w * a.lanes + c.lane) * VEC + k];
      product[k] += products[(w * a.lanes + c.lane) * VEC + k];
    }
  }
  float* to = a.partial + c.slot * 2 * a.width + c.d;
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    to[k] = total[k];
    to[a.width + k] = product[k];
  }
}

// Of each domain: the sums of grad and of grad * xhat, in double, for their terms largely cancel; and with them the
// gradients of its own parameters.
static __global__ void __launch_bounds__(kMergeColumns* kMergeSlices)
    norm_merge_sums_kernel(const __grid_constant__ GroupedNormArgs a) {
  extern __shared__ float4 shared_memory[];
  double* totals = reinterpret_cast<double*>(shared_memory);
  double* products = totals + kMergeSlices * kMergeColumns;
  const NormMerge m = norm_merge(a, true);
  double total = 0.0, product = 0.0;
  for (int64_t c = m.slice; c < m.chunks && m.d < a.width; c += kMergeSlices) {
    const float* from = a.partial + (m.first + c) * 2 * a.width + m.d;
    total += from[0];
    product += from[a.width];
  }
  totals[threadIdx.x] = total;
  products[threadIdx.x] = product;
  __syncthreads();  // every slice's sums are there
  if (m.slice > 0 || m.d >= a.width) return;
  const int64_t at = m.p * a.width + m.d;
  const float sum = static_cast<float>(norm_slices(totals, m.column));
  // An empty domain's statistics stay out of it.
  const float scaled = m.count ? static_cast<float>(norm_slices(products, m.column) / sqrtf(a.var[at] + a.eps)) : 0.0f;
  a.total[at] = sum;
  a.product[at] = scaled;
  if (a.weighted) a.weighted[at] = load_as_float(a.own_weight, a.affine_type, at) * scaled;
  if (a.down_weight)
    store_float(a.down_weight, a.affine_type, at, load_as_float(a.weight, a.affine_type, m.d) * scaled);
  if (a.down_bias) store_float(a.down_bias, a.affine_type, at, sum);
}

// dx = scale (grad - mean(grad) - xhat mean(grad xhat)); with constant statistics scale grad alone.
template <class S, int VEC>
__global__ void __launch_bounds__(kNormThreads, 2) norm_backward_kernel(const __grid_constant__ GroupedNormArgs a) {
  constexpr int kFlight = kNormFlightOfTwo<VEC>;
  const NormChunk c = norm_chunk<VEC>(a);
  if (c.start >= c.stop || c.d >= a.width) return;
  const int64_t p = c.bucket - 1;
  const bool known = known_domain(a, p), batch = known && a.training && a.count[p] >= 2;
  float mean[VEC] = {}, scale[VEC] = {}, slope[VEC] = {}, middle[VEC] = {};
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    if (!known) continue;
    const NormColumn column = norm_column(a, p, c.d + k);
    mean[k] = column.mean;
    scale[k] = column.scale;
    if (!batch) continue;
    const int64_t at = p * a.width + c.d + k;
    const float n = static_cast<float>(a.count[p]);
    slope[k] = column.rstd * a.product[at] / n;
    middle[k] = a.total[at] / n;
  }
  norm_rows<kFlight>(a, c, [&](const int64_t (&rows)[kFlight], int n) {
    float g[kFlight][VEC], x[kFlight][VEC];
    norm_load<S, VEC>(a.grad, a.grad_row, rows, n, c.d, g);
    if (batch) norm_load<S, VEC>(a.x, a.x_row, rows, n, c.d, x);
#pragma unroll
    for (int r = 0; r < kFlight; ++r) {
      if (r >= n) break;
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        if (batch) g[r][k] -= middle[k] + (x[r][k] - mean[k]) * slope[k];
        g[r][k] = known ? g[r][k] * scale[k] : 0.0f;
      }
      store<VEC>(static_cast<S*>(a.out) + rows[r] * a.width + c.d, g[r]);
    }
  });
}

}  // namespace mtl
