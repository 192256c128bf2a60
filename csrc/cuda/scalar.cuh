// Storage types of the CUDA kernels: every value is kept in 16 or 32 bits in memory and computed in float32.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mtl {

// Runtime tag of tensors that are small beside the experts (logits, static weights): branching on it at the load costs
// nothing there, while a template parameter would multiply the number of kernels by four.
enum class Scalar : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S>
__device__ inline S from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline float load_as_float(const void* data, Scalar type, int64_t i) {
  switch (type) {
    case Scalar::f16:
      return to_float(static_cast<const __half*>(data)[i]);
    case Scalar::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case Scalar::f64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_float(void* data, Scalar type, int64_t i, float x) {
  switch (type) {
    case Scalar::f16:
      static_cast<__half*>(data)[i] = from_float<__half>(x);
      break;
    case Scalar::bf16:
      static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(x);
      break;
    case Scalar::f64:
      static_cast<double*>(data)[i] = x;
      break;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

// N values as one memory access: with N * sizeof(S) == 16 a warp moves 512 bytes an instruction.
template <class S, int N>
struct alignas(sizeof(S) * N) Pack {
  S value[N];
};

template <int N, class S>
__device__ inline void load(const S* from, float (&to)[N]) {
  const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = to_float(pack.value[k]);
}

template <int N, class S>
__device__ inline void store(S* to, const float (&from)[N]) {
  Pack<S, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.value[k] = from_float<S>(from[k]);
  // The intrinsic is an ordinary store that the compiler may not split: of plain ones it made four-byte pieces.
  if constexpr (sizeof(pack) == sizeof(float4)) {
    __stwb(reinterpret_cast<float4*>(to), *reinterpret_cast<const float4*>(&pack));
  } else {
    *reinterpret_cast<Pack<S, N>*>(to) = pack;
  }
}

}  // namespace mtl
