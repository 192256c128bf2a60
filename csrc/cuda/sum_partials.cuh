// The second stage of every sum over the batch: a kernel leaves one row of partial sums a block, this adds the rows.
// In a fixed order, so that two runs agree bit for bit; atomics would not. Needs MTL_LAUNCH, as in launch.h.
#pragma once

#include <cstdint>

#include "scalar.cuh"

namespace mtl {

constexpr int kSumColumns = 32, kSumSlices = 32;

// out[i] = sum over n of partials[n][i], in float64, for the terms of a batch largely cancel. 32 x 32 threads: a warp
// reads 32 neighbouring sums, and every sum is cut into 32 slices, so that few loads of a thread wait on each other.
static __global__ void __launch_bounds__(kSumColumns* kSumSlices)
    sum_partials_kernel(const float* partials, int64_t n, int64_t size, void* out, Scalar type) {
  extern __shared__ float4 shared_memory[];
  double* sums = reinterpret_cast<double*>(shared_memory);
  const int column = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumColumns + column;
  double sum = 0.0;
  if (i < size) {
#pragma unroll 8
    for (int64_t row = slice; row < n; row += kSumSlices) sum += partials[row * size + i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();  // every slice is complete
  if (slice == 0 && i < size) {
    for (int s = 1; s < kSumSlices; ++s) sum += sums[s * kSumColumns + column];
    store_float(out, type, i, static_cast<float>(sum));
  }
}

// out [size] of the given type: the sums of n rows of partials [n, size].
template <class Stream>
void launch_sum_partials(const float* partials, int64_t n, int64_t size, void* out, Scalar type, Stream stream) {
  const int64_t blocks = (size + kSumColumns - 1) / kSumColumns;
  constexpr int kThreads = kSumColumns * kSumSlices;
  if (blocks)
    MTL_LAUNCH(sum_partials_kernel, blocks, kThreads, kThreads * sizeof(double), stream, partials, n, size, out, type);
}

}  // namespace mtl
