// TORCH_BOX for operators that take strings. Include this in place of torch's header.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

namespace mtl {

// Torch 2.10 to 2.13 unbox a std::string into one on the heap, hand on a copy and never free it: 48 bytes a call
// (pytorch/pytorch issue 191340). An operator's string is unboxed as one of these instead.
struct Text : std::string {
  explicit Text(std::string text) : std::string(std::move(text)) {}
};

}  // namespace mtl

namespace torch::stable::detail {

template <>
struct UnboxType<std::string> {
  using type = mtl::Text;
};

template <>
struct ToImpl<mtl::Text> {
  static mtl::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    mtl::Text text(std::string(data, length));
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
