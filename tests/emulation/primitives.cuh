// Takes the place of csrc/cuda/primitives.cuh: the same instructions on the emulated device, with the lane layouts of
// the PTX manual. What the hardware leaves open is taken at its worst: an asynchronous copy arrives at once when
// threads run in order, which shows a panel that is still read, and otherwise not before the wait for its group.
#pragma once

#include "cuda.h"
#include "scalar.cuh"

#define cp_async_wait emulation::CopyWait{__COUNTER__ - emulation::kFirstBarrier}.until

namespace emulation {

inline bool inside_shared(const void* p, size_t bytes) {
  const auto* shared = reinterpret_cast<const unsigned char*>(mtl::shared_memory);
  const auto* at = static_cast<const unsigned char*>(p);
  return at >= shared && at + bytes <= shared + block.shared_bytes && reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

struct CopyWait {
  int number;

  template <int PENDING>
  void until() const {
    Fiber& fiber = block.fibers[block.current];
    while (number != skipped_barrier && fiber.groups.size() > PENDING) {
      for (const Copy& copy : fiber.groups.front()) copy.arrive();
      fiber.groups.pop_front();
    }
  }
};

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  const int lane = block.current % kWarp;
  if (!inside_shared(row, 16)) fail("ldmatrix outside shared memory or not on a multiple of 16 bytes");
  const auto rows = exchange(kMatrixLoad, row);
  if (!error.empty()) return;
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int i = 0; lane == 0 && i < 8; ++i) {
      const unsigned bank = 1u << reinterpret_cast<uintptr_t>(*rows[8 * matrix + i]) / 16 % 8;
      bank_conflicts += (banks & bank) != 0;
      banks |= bank;
    }
    const auto number = [&](int i, int j) { return static_cast<const uint16_t*>(*rows[8 * matrix + i])[j]; };
    const int line = lane / 4, pair = lane % 4 * 2;
    const uint32_t low = transposed ? number(pair, line) : number(line, pair);
    const uint32_t high = transposed ? number(pair + 1, line) : number(line, pair + 1);
    to[matrix] = low | high << 16;
  }
}

}  // namespace emulation

namespace mtl {

inline void cp_async(void* to, const void* from, int bytes) {
  if (!emulation::inside_shared(to, 16)) return emulation::fail("cp.async to an address that the device would refuse");
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes < 0 || bytes > 16) {
    return emulation::fail("cp.async of bytes that the device would refuse");
  }
  const emulation::Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes};
  if (emulation::order == emulation::Order::forward) return copy.arrive();
  std::memset(to, 0xff, 16);
  emulation::block.fibers[emulation::block.current].copies.push_back(copy);
}

inline void cp_async_commit() {
  emulation::Fiber& fiber = emulation::block.fibers[emulation::block.current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

inline void ldmatrix(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, false); }
inline void ldmatrix_trans(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, true); }

template <class S>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float a[8], b[4];
  } mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = to_float(reinterpret_cast<const S*>(a)[i]);
  for (int i = 0; i < 4; ++i) mine.b[i] = to_float(reinterpret_cast<const S*>(b)[i]);
  const auto lanes = emulation::exchange(emulation::kMatrixProduct, mine);
  const int lane = emulation::block.current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, lower = i / 2, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, far = k / 8;
      c[i] += lanes[4 * row + pair]->a[k % 2 + 2 * lower + 4 * far] * lanes[4 * column + pair]->b[k % 2 + 2 * far];
    }
  }
}

}  // namespace mtl
