// What the kernels of this folder are written in: vectors as wide as the instruction set they are compiled for.
//
// Every source here is compiled once per instruction set, with MTL_ISA naming it, into a namespace of that name; the
// choice is made at run time (../dispatch.h). Only trivial inline code of the standard library is used, so that no
// function compiled for AVX-512 can be the copy that the linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../types.h"

namespace mtl::MTL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 of B, 1 of A: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 of B, 1 of A: 15 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <class C, int bytes = kVectorBytes>
struct VectorOf {
  typedef C type __attribute__((vector_size(bytes)));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);
template <class C>
constexpr int kTileCols = 2 * kLanes<C>;

template <class C>
inline Vector<C> load(const C* p) {
  Vector<C> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class C>
inline void store(C* p, Vector<C> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Whether a vector at p is a whole line of the caches: written past them it then needs no read before. Halves of lines
// gain nothing (EPYC, Zen 3).
template <class C>
inline bool whole_line(const C* p, int64_t stride) {
  return kVectorBytes == 64 && (reinterpret_cast<uintptr_t>(p) | uintptr_t(stride) * sizeof(C)) % 64 == 0;
}

// With `past`, past the caches: for a whole_line alone.
template <class C>
inline void store(C* p, Vector<C> v, bool past) {
#if defined(__AVX512F__)
  if (past) {
    __m512i line;
    std::memcpy(&line, &v, sizeof(line));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
    return;
  }
#endif
  (void)past;
  store(p, v);
}

// n numbers of storage type S to the type C that sums are kept in, and back.
template <class S, class C>
inline void widen(const S* src, C* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, Half> && std::is_same_v<C, float>) {
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
#endif
  for (; i < n; ++i) dst[i] = static_cast<C>(src[i]);
}

template <class C, class S>
inline void narrow(const C* src, S* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, Half> && std::is_same_v<C, float>) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__AVX512BF16__)
  // Rounds as the loop below does, but that what is too small for a normal number becomes zero.
  if constexpr (std::is_same_v<S, BFloat16> && std::is_same_v<C, float>) {
    for (; i + 32 <= n; i += 32)
      _mm512_storeu_si512(dst + i,
                          (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(src + i + 16), _mm512_loadu_ps(src + i)));
  }
#endif
  for (; i < n; ++i) dst[i] = static_cast<S>(src[i]);
}

// n numbers to memory past the caches, for tensors that will not be read again before they would have left them: an
// ordinary store first reads the line that it overwrites. streamed() before another thread may read them.
template <class C>
inline void stream(const C* src, C* dst, int64_t n) {
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(dst) % 32 == 0 && n * sizeof(C) % 32 == 0) {
    for (int64_t i = 0; i < n; i += 32 / int64_t(sizeof(C)))
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
    return;
  }
#endif
  std::memcpy(dst, src, n * sizeof(C));
}

inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace mtl::MTL_ISA
