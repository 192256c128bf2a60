// The instructions of the device that matrix kernels are made of, one function each, with the meaning of the PTX
// manual.
//
// Kernels reach the hardware through these alone, so that tests put an emulation of this header in its place and run
// the kernels' sources on a CPU. All of them exist from sm_80 on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "scalar.cuh"

namespace mtl {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes into shared memory: the first `bytes` from global memory, the others zero. Both addresses
// are multiples of 16. What arrives may be read after cp_async_wait by this thread, after a barrier by the others.
__device__ inline void cp_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Closes this thread's group of copies; a group may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes on a multiple of
// 16, and gets of matrix i, in to[i], the numbers 2 * (l % 4) and the next of row l / 4.
__device__ inline void ldmatrix(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// The same of the transposed matrices: the lane gets number l / 4 of row 2 * (l % 4) and of the next.
__device__ inline void ldmatrix_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// c [16,8] += a [16,16] b [16,8], by a warp, summed in float32. With g = lane / 4, t = 2 * (lane % 4), pairs in a word:
//   a   rows g, g + 8, g, g + 8; columns t, t, t + 8, t + 8
//   b   rows t, t + 8; column g
//   c   rows g, g, g + 8, g + 8; columns t, t + 1, t, t + 1
// Volatile, for the compiler must not move it to where its sums are stored, past a branch that lanes take apart.
template <class S>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<S, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<S, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace mtl
