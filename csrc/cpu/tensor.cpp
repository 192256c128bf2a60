#include "tensor.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>

namespace mtl {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Scratch up to this size stays with its thread; more goes back at the next call that needs less than half of it.
constexpr size_t kScratchKept = size_t{64} << 20;

// Under the address sanitizer every block is as large as what was asked for, so that a byte beyond it is noticed.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExact = true;
constexpr size_t kGrain = 64;
#else
constexpr bool kExact = false;
constexpr size_t kGrain = kHugePage;
#endif

size_t rounded(size_t bytes, size_t grain) { return (bytes + grain - 1) / grain * grain; }

void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  // Whole huge pages inside the block only; a refusal costs speed, nothing else.
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Freed blocks of large tensors, kept for the next of the same size: a training step asks for the same sizes again and
// again, and the kernel zeroes every page it hands out (a quarter of a fused step went there). A block that the last
// kPatience large allocations passed over is given back, so what is kept is about what the loop needs.
class Pool {
 public:
  void* take(size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);  // after fork the lock may be held for ever
    if (lock) {
      ++clock_;
      void* found = nullptr;
      for (size_t i = 0; i < free_.size();) {
        const bool fits = !found && free_[i].bytes == bytes;
        if (fits) found = free_[i].data;
        if (!fits && clock_ - free_[i].freed < kPatience) {
          ++i;
          continue;
        }
        if (!fits) std::free(free_[i].data);
        free_[i] = free_.back();
        free_.pop_back();
      }
      if (found) return found;
    }
    void* fresh = std::aligned_alloc(kHugePage, bytes);
    STD_TORCH_CHECK(fresh != nullptr, "out of memory: ", bytes, " bytes");
    ask_for_huge_pages(fresh, bytes);
    return fresh;
  }

  int64_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = 0;
    for (const Block& block : free_) {
      bytes += int64_t(block.bytes);
      std::free(block.data);
    }
    free_.clear();
    return bytes;
  }

  void give(void* data, size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock)
      free_.push_back({data, bytes, clock_});
    else
      std::free(data);
  }

 private:
  static constexpr uint64_t kPatience = 64;
  struct Block {
    void* data;
    size_t bytes;
    uint64_t freed;
  };
  std::mutex mutex_;
  std::vector<Block> free_;
  uint64_t clock_ = 0;
};

Pool& pool() {
  static Pool* leaked = new Pool;  // tensors may outlive every static object
  return *leaked;
}

size_t element_size(ScalarType dtype) {
  size_t size = 0;
  with_type(dtype, "dtype", [&](auto s) { size = sizeof(s); });
  return size;
}

Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int64_t strides[4];
  STD_TORCH_CHECK(dims <= 4, "a tensor of more than four dimensions");
  int64_t numel = 1, elements = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = numel;
    numel *= std::max<int64_t>(sizes[d], 1);
    elements *= sizes[d];
  }
  const size_t bytes = size_t(elements) * element_size(dtype);
  if (bytes >= kHugePage && !kExact) {
    const size_t whole = rounded(bytes, kHugePage);
    return torch::stable::from_blob(pool().take(whole), {sizes, size_t(dims)}, {strides, size_t(dims)},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                    [whole](void* data) { pool().give(data, whole); });
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
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

Tensor allocate_like(const Tensor& t) { return empty(t.sizes().data(), t.dim(), t.scalar_type()); }

Storage storage_of(ScalarType dtype, const char* argument) {
  Storage found{};
  with_type(dtype, argument, [&](auto s) {
    using S = decltype(s);
    found = std::is_same_v<S, double>     ? Storage::kDouble
            : std::is_same_v<S, float>    ? Storage::kFloat
            : std::is_same_v<S, BFloat16> ? Storage::kBFloat16
                                          : Storage::kHalf;
  });
  return found;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor dense_rows(const Tensor& t) {
  return t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

void* scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[6];
  Buffer& buffer = buffers[slot];
  const bool oversized = kExact ? bytes != buffer.bytes : buffer.bytes > kScratchKept && bytes < buffer.bytes / 2;
  if (bytes > buffer.bytes || oversized) {
    std::free(buffer.data);
    buffer.bytes = 0;  // stays so if there is no memory
    const size_t whole = rounded(bytes, kGrain);
    buffer.data = std::aligned_alloc(kGrain, whole);
    STD_TORCH_CHECK(buffer.data != nullptr, "out of memory: ", whole, " bytes of scratch");
    buffer.bytes = whole;
    ask_for_huge_pages(buffer.data, whole);
  }
  return buffer.data;
}

static int64_t empty_cache() { return pool().clear(); }

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CompositeExplicitAutograd, m) { m.impl("empty_cache", TORCH_BOX(&empty_cache)); }

}  // namespace mtl
