#include "tensor.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>

namespace mtl {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  // Whole huge pages inside the block only; a refusal costs speed, nothing else.
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int64_t strides[4];
  int64_t numel = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = numel;
    numel *= std::max<int64_t>(sizes[d], 1);
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  ask_for_huge_pages(t.mutable_data_ptr(), size_t(numel) * t.element_size());
  return t;
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), int64_t(sizes.size()), dtype);
}

Tensor allocate_like(const Tensor& t) {
  return empty(t.sizes().data(), t.dim(), t.scalar_type());
}

Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor dense_rows(const Tensor& t) {
  return t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

void* scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    buffer.data = std::aligned_alloc(kHugePage, buffer.bytes);
    STD_TORCH_CHECK(buffer.data != nullptr, "out of memory: ", buffer.bytes, " bytes of scratch");
    ask_for_huge_pages(buffer.data, buffer.bytes);
  }
  return buffer.data;
}

}  // namespace mtl
