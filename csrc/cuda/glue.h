// What the torch glue of several CUDA operators shares: names, allocation, dtypes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "launch.h"
#include "scalar.cuh"

namespace mtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Units = std::optional<std::vector<int64_t>>;

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// A copy where the numbers of a row do not lie side by side.
inline Tensor rows_contiguous(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline Scalar scalar_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Scalar::f32;
    case ScalarType::Half:
      return Scalar::f16;
    case ScalarType::BFloat16:
      return Scalar::bf16;
    case ScalarType::Double:
      return Scalar::f64;
    default:
      STD_TORCH_CHECK(false, name, ": a floating-point tensor was expected, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
  return Scalar::f32;
}

// Runs `body` with a value of the storage type; `name` is the tensor's for the error.
template <class Body>
void dispatch(Scalar type, const char* name, Body body) {
  switch (type) {
    case Scalar::f32:
      return body(float{});
    case Scalar::f16:
      return body(__half{});
    case Scalar::bf16:
      return body(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, name, ": float32, bfloat16 or float16 was expected, got float64");
  }
}

// n floats of scratch, which live as long as `keep`.
inline float* allocate_floats(const Tensor& like, int64_t n, std::vector<Tensor>& keep) {
  if (n == 0) return nullptr;
  keep.push_back(empty(like, {n}, ScalarType::Float));
  return static_cast<float*>(keep.back().mutable_data_ptr());
}

inline void check_companion(const Optional& tensor, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(!tensor || same_device(*tensor, first), name, ": expected on the device of the other tensors");
}

}  // namespace mtl
