// What this build holds, for mtlkernels.build_info(). The build passes the facts that the compiler itself cannot know
// as macros. No date and no path: the same sources and compilers give the same bytes.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace {

// "a,b,c" -> ("a", "b", "c"); "" -> ().
py::tuple split(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(parts);
}

const char* compiler() {
#if defined(__clang__)
  return __VERSION__;  // names itself: "Clang 17.0.6"
#else
  return "GCC " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What was compiled into the operator library, and by what.";
  m.attr("cpu_isas") = split(MTL_CPU_ISAS);
  m.attr("cuda_archs") = split(MTL_CUDA_ARCHS);
  m.attr("cxx") = compiler();
  m.attr("nvcc") = MTL_NVCC;
  m.attr("torch_target") = MTL_TORCH_TARGET;
  m.attr("torch_headers") = MTL_TORCH_HEADERS;
}
