// What forward and backward of expert_linear share: the sizes of a call, cut into one product for each unit.
#pragma once

#include <algorithm>

#include "linear_kernels.h"
#include "tensor.h"

namespace mtl {

inline const PackKernels& pack_kernels(ScalarType dtype, const char* argument) {
  return linear_kernels().by_storage[int(storage_of(dtype, argument))];
}

// The experts that read one input, and where their numbers lie.
struct Unit {
  int64_t input;   // which of x's units
  int64_t first;   // first column among all E * N
  int64_t cols;    // columns: its experts times N
  int64_t panels;  // offset of its packed weights
};

struct Problem {
  int64_t batch, inputs, experts, outputs, features;  // B, U (1 for [B,K]), E, N, K
  size_t packed_size;                                 // of one packed number, or pair
  bool pairs;                                         // see PairKernels
  int64_t tile_rows, tile_cols;
  std::vector<Unit> units;
  int64_t columns() const { return experts * outputs; }
  double work() const { return double(batch) * columns() * features; }
  // Of n numbers along the depth: how many packed ones they are.
  int64_t depth(int64_t n) const { return pairs ? (n + 1) / 2 : n; }
  const SumKernels& sums() const {
    return pairs ? linear_kernels().pairs->sums : linear_kernels().of_size(packed_size);
  }
  const PackKernels& pack(const Tensor& t, const char* argument) const {
    return pairs ? linear_kernels().pairs->pack : pack_kernels(t.scalar_type(), argument);
  }
  // Gives every unit room for `numbers_of` packed numbers; returns their total.
  template <class NumbersOf>
  int64_t lay_out(const NumbersOf& numbers_of) {
    int64_t total = 0;
    for (Unit& u : units) {
      u.panels = total;
      total += numbers_of(u);
    }
    return total;
  }
};

// Checks that the tensors fit each other.
Problem linear_problem(const Tensor& x, const Tensor& weight,
                       const std::optional<std::vector<int64_t>>& experts_per_unit);

// Forward for up to kFewRows rows: the weights, which are most of what is read then, are read as they lie. z may be
// null.
constexpr int64_t kFewRows = 64;
void forward_few(Problem& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                 char* y, char* z);

// Unit u's rows of x [B,K] or [B,U,K].
inline Operand input_of(const Tensor& x, const Unit& u) {
  const int64_t offset = x.dim() == 3 ? u.input * x.stride(1) : 0;
  return moved({x.const_data_ptr(), nullptr, Activation::kNone, x.stride(0)}, 0, offset, x.element_size());
}

// Unit u's slice of a contiguous weight [E,N,K], one row a column of the product.
inline Operand weight_of(const Tensor& weight, const Problem& p, const Unit& u) {
  return moved({weight.const_data_ptr(), nullptr, Activation::kNone, p.features}, u.first, 0, weight.element_size());
}

}  // namespace mtl
