// Tensors as the CPU kernels see them: checks, allocation, dtype dispatch, threads.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/boxing.h"
#include "types.h"

namespace mtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A contiguous CPU tensor, uninitialised. Large ones come from a pool of huge pages: the first touch of a fresh 32 MiB
// tensor costs 16 ms in 4 KiB page faults, 3 ms in 2 MiB ones, more than a mix itself, and of a used one nothing.
Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor allocate_like(const Tensor& t);

// Outputs of this size and more go past the caches: half of a common last-level cache.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// The tensor itself if it is contiguous, else a copy that is; without asking the dispatcher, which costs a microsecond.
Tensor dense(const Tensor& t);
// The same where only the last dimension need be dense.
Tensor dense_rows(const Tensor& t);

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
S* mutable_data(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// Calls f with a value of the storage type that `dtype` names.
template <class F>
void with_type(ScalarType dtype, const char* argument, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, argument, " must be float64, float32, bfloat16 or float16");
  }
}

// The tensor's storage type; an error naming `argument` for any other dtype.
Storage storage_of(ScalarType dtype, const char* argument);

// Runs task(i) for i in [0, tasks) on torch's threads, each taking the next one free: a slow core does not hold up the
// rest. Which thread runs a task never changes its result. `work`: about how many operations they are together; waking
// the threads costs some ten thousand.
template <class F>
void run_tasks(int64_t tasks, double work, const F& task) {
  const int64_t threads = work < 1e5 ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> free_task{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = free_task++; i < tasks; i = free_task++) task(i);
  });
}

// Scratch memory of the calling thread, aligned for vectors and kept between calls. `slot` tells apart the buffers that
// one thread holds at a time.
void* scratch(int slot, size_t bytes);

}  // namespace mtl
