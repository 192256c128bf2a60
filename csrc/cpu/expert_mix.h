// One call of expert_mix on a CPU, as forward and backward share it: its tensors, its experts cut into sets.
#pragma once

#include <algorithm>

#include "expert_mix_kernels.h"
#include "linear_kernels.h"
#include "tensor.h"

namespace mtl {

// Consecutive experts that read the same input and that some row uses: one matrix product.
struct ExpertRun {
  int64_t input, first, count;  // which of x's units; experts first .. first + count
  int64_t place;                // of its first expert within the set
};

// Experts whose outputs lie in a thread's scratch together, [rows, experts, D].
struct ExpertSet {
  std::vector<ExpertRun> runs;
  Routing routing;
  int64_t experts() const { return routing.users.rows(); }
};

struct ExpertMixCall {
  Tensor x, weight, bias, logits, fixed, moments;
  bool with_bias;
  Activation activation;
  int64_t batch, inputs, experts, width, features, tasks;  // B, U (1 for [B,K]), E, D, K, T
  int64_t columns;                                         // logits a batch row, and static weights: T * E, or R
  ScalarType sum;                                          // the type of sums
  size_t size, element, w_element;                         // bytes of a sum, of x's elements, of weight's
  int64_t tile_rows, tile_cols, largest_set, most_routes;
  const LinearKernels* linear;
  const ExpertMixKernels* kernels;
  const PackKernels *pack, *pack_w, *pack_sum;  // of x's storage, weight's, and of sums
  Routing all;
  std::vector<ExpertSet> sets;
  std::vector<char> used;  // of each expert: whether any row uses it
  Gates gates;

  const SumKernels& sum_kernels() const { return linear->of_size(size); }
  double work() const { return double(batch) * experts * width * features; }
  int64_t to_rows(int64_t n) const { return (n + tile_rows - 1) / tile_rows * tile_rows; }
  int64_t to_cols(int64_t n) const { return (n + tile_cols - 1) / tile_cols * tile_cols; }
  // Batch rows to take at a time: each set of experts passes over their [T,D] sums or gradients, so many numbers.
  int64_t block_rows(int64_t numbers) const {
    return std::clamp<int64_t>(numbers / std::max<int64_t>(1, tasks * width), 24, 96) / tile_rows * tile_rows;
  }
  // Rows of unit `input` of x, from batch row b.
  Operand input_rows(int64_t input, int64_t b) const;
  // The weights of a run, [count * D, K].
  Operand weight_rows(const ExpertRun& run) const;
  // A run's bias, padded to whole panels; returns the numbers it takes.
  int64_t take_bias(const ExpertRun& run, void* to) const;
  Operand sums(const void* data, int64_t stride) const { return {data, nullptr, Activation::kNone, stride}; }
  // Fills the softmax's moments, and lse where there is one.
  void normalise(Tensor* lse);
};

// set_columns: how many outputs of experts (their number times D) a set holds at most.
ExpertMixCall prepare_expert_mix(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& logits, const OptionalTensor& fixed, const OptionalTensor& mask,
                                 const OptionalTensor& columns,
                                 const std::optional<std::vector<int64_t>>& experts_per_unit,
                                 const std::string& activation, int64_t set_columns);

// A thread's scratch of a task, cut into pieces.
class Pieces {
 public:
  Pieces(void* memory, size_t size) : next_(static_cast<char*>(memory)), size_(size) {}
  void* take(int64_t numbers) {
    void* taken = next_;
    next_ += bytes(numbers, size_);
    return taken;
  }
  static size_t bytes(int64_t numbers, size_t size) { return (size_t(numbers) * size + 127) / 64 * 64; }

 private:
  char* next_;
  size_t size_;
};

}  // namespace mtl
