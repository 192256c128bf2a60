// How a test calls kernels on the emulated device: what every library of them has. Include after the kernels, whose
// barriers it counts.
#pragma once

#include <vector>

#include "cuda.h"
#include "scalar.cuh"

namespace {

constexpr int kBarriers = __COUNTER__ - emulation::kFirstBarrier;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// FLOAT16_ONLY leaves out what takes long to compile.
template <class Body>
void dispatch(int64_t type, Body body) {
  if (type == static_cast<int64_t>(mtl::Scalar::f16)) body(__half{});
#ifndef FLOAT16_ONLY
  if (type == static_cast<int64_t>(mtl::Scalar::f32)) body(float{});
  if (type == static_cast<int64_t>(mtl::Scalar::bf16)) body(__nv_bfloat16{});
#endif
}

// Scratch that is read before it is written shows as NaN.
inline std::vector<float> scratch(int64_t n) { return std::vector<float>(n, NAN); }

}  // namespace

extern "C" {

int barriers() { return kBarriers; }
int64_t bank_conflicts() { return emulation::bank_conflicts; }
const char* last_error() { return emulation::error.c_str(); }

void schedule(int order, unsigned seed, int skipped_barrier) {
  emulation::order = static_cast<emulation::Order>(order);
  emulation::seed = seed;
  emulation::skipped_barrier = skipped_barrier;
  emulation::bank_conflicts = 0;
}

}  // extern "C"
