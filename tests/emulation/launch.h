// Takes the place of csrc/cuda/launch.h where the torch glue is built for the host: CPU tensors, the emulated device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda.h"

#undef MTL_LAUNCH
#define MTL_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                                            \
  do {                                                                                                            \
    emulation::error.clear();                                                                                     \
    emulation::launch([&] { (kernel)(__VA_ARGS__); }, blocks, threads, shared_bytes, emulation::address(kernel)); \
    STD_TORCH_CHECK(emulation::error.empty(), "launch of " #kernel ": ", emulation::error);                       \
  } while (0)

using cudaStream_t = void*;

namespace mtl {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool same_device(const torch::stable::Tensor&, const torch::stable::Tensor&) { return true; }
inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

}  // namespace mtl
