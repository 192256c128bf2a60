// What the torch glue of every CUDA kernel needs, over the stable ABI only.
//
// One shared object serves CPU and CUDA builds of torch: the stream function is weak, because a CPU build does not have
// it, and launches are checked by the CUDA runtime itself, because torch's checks live in its CUDA library.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define MTL_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                                         \
  do {                                                                                                         \
    kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream>>>(__VA_ARGS__);               \
    const cudaError_t launch_error = cudaGetLastError();                                                       \
    STD_TORCH_CHECK(launch_error == cudaSuccess, "launch of " #kernel ": ", cudaGetErrorString(launch_error)); \
  } while (0)

// Dynamic shared memory beyond 48 KiB has to be asked for.
#define MTL_ALLOW_SHARED(kernel, bytes)                                                                               \
  do {                                                                                                                \
    const cudaError_t allow_error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); \
    STD_TORCH_CHECK(allow_error == cudaSuccess, "shared memory of " #kernel ": ", cudaGetErrorString(allow_error));   \
  } while (0)

namespace mtl {

using torch::stable::accelerator::DeviceGuard;

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "a CUDA tensor came to a torch built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mtl
