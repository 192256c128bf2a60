// Run-time choice among the instruction sets that isa/ was compiled for.
#pragma once

namespace mtl {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };  // each has all that the ones before it have

// The instruction set in use: the best one that this processor has, unless the op cpu_isa set another.
Isa isa();

}  // namespace mtl

#if defined(__x86_64__)
#define MTL_FOR_EACH_ISA(declare) declare(generic) declare(avx2) declare(avx512) declare(avx512bf16)
#define MTL_BEST_ISA(table)                                    \
  (::mtl::isa() == ::mtl::Isa::kAvx512Bf16 ? avx512bf16::table \
   : ::mtl::isa() == ::mtl::Isa::kAvx512   ? avx512::table     \
   : ::mtl::isa() == ::mtl::Isa::kAvx2     ? avx2::table       \
                                           : generic::table)
#else
#define MTL_FOR_EACH_ISA(declare) declare(generic)
#define MTL_BEST_ISA(table) (generic::table)
#endif
