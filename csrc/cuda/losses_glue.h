// What the torch glue of both losses shares. Include after launch.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "../common/boxing.h"
#include "losses_launch.cuh"

namespace mtl::loss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, ScalarType::Float);
}

inline float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline Labels labels_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return {t.const_data_ptr(), LabelType::f32};
    case ScalarType::Half:
      return {t.const_data_ptr(), LabelType::f16};
    case ScalarType::BFloat16:
      return {t.const_data_ptr(), LabelType::bf16};
    case ScalarType::Double:
      return {t.const_data_ptr(), LabelType::f64};
    case ScalarType::Bool:
    case ScalarType::Byte:
      return {t.const_data_ptr(), LabelType::u8};
    case ScalarType::Int:
      return {t.const_data_ptr(), LabelType::i32};
    case ScalarType::Long:
      return {t.const_data_ptr(), LabelType::i64};
    default:
      STD_TORCH_CHECK(false, name, ": bool, uint8, int32, int64 or a floating-point tensor was expected");
  }
  return {};
}

// Runs `body` with a value of the storage type of the logits.
template <class Body>
void with_logits(const Tensor& logits, const char* name, Body body) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, name, ": float32, bfloat16 or float16 was expected");
  }
}

}  // namespace mtl::loss
