#include "dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <string>

#include "../common/boxing.h"

namespace mtl {

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> chosen{detect()};
  return chosen;
}

// What runs, after a change to `name` unless that is empty; tests go through all that the processor has.
std::string cpu_isa(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name != kNames[i]) continue;
    STD_TORCH_CHECK(Isa(i) <= detect(), "this processor has no ", name);
    in_use() = Isa(i);
    return name;
  }
  STD_TORCH_CHECK(name.empty(), "cpu_isa must be generic, avx2, avx512 or avx512bf16; got ", name);
  return kNames[int(isa())];
}

}  // namespace

Isa isa() { return in_use().load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace mtl
