// What the glue of both losses shares.
#pragma once

#include <algorithm>
#include <vector>

#include "losses_kernels.h"
#include "tensor.h"

namespace mtl {

// What one of the threads' tasks takes. Fixed, so that sums do not depend on the number of threads.
constexpr int64_t kLossNumbers = 8192;
constexpr int64_t kLossPeriod = 256;  // numbers that few tasks are treated as one row of
constexpr double kLossWork = 20;      // operations a number, as run_tasks counts them

inline const LossKernels& loss_kernels_of(const Tensor& logits, const char* name) {
  static const LossTable& best = MTL_BEST_ISA(loss_kernels);
  return best.by_storage[int(storage_of(logits.scalar_type(), name))];
}

inline ScalarType loss_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Labels labels_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return {t.const_data_ptr(), LabelType::kByte};
    case ScalarType::Int:
      return {t.const_data_ptr(), LabelType::kInt};
    case ScalarType::Long:
      return {t.const_data_ptr(), LabelType::kLong};
    default:
      return {t.const_data_ptr(), static_cast<LabelType>(storage_of(t.scalar_type(), name))};
  }
}

// One number, for an error's text.
inline double label_at(const Tensor& t, int64_t i) {
  double value = 0;
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return data<uint8_t>(t)[i];
    case ScalarType::Int:
      return data<int32_t>(t)[i];
    case ScalarType::Long:
      return double(data<int64_t>(t)[i]);
    default:
      with_type(t.scalar_type(), "labels", [&](auto s) { value = static_cast<double>(data<decltype(s)>(t)[i]); });
      return value;
  }
}

// The smallest index that a block reported, or -1: the same with any number of threads.
inline int64_t first_bad(const std::vector<int64_t>& bad) {
  for (int64_t at : bad)
    if (at >= 0) return at;
  return -1;
}

// to = grad * from for all n numbers, grad [period] repeating.
inline void scale_numbers(const void* grad, int64_t period, const Tensor& from, const Tensor& to) {
  static const LossTable& best = MTL_BEST_ISA(loss_kernels);
  const ScaleKernels& kernel = best.by_sum[from.scalar_type() == ScalarType::Double ? 0 : 1];
  const int64_t n = from.numel(), rows = std::max<int64_t>(1, 65536 / std::max<int64_t>(period, 1)),
                size = rows * period;
  if (n == 0) return;
  const void* source = from.const_data_ptr();
  void* target = to.mutable_data_ptr();
  run_tasks((n + size - 1) / size, double(n),
            [&](int64_t i) { kernel.scale(grad, period, source, target, i * size, std::min(n, (i + 1) * size)); });
}

}  // namespace mtl
