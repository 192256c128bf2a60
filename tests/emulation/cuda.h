// CUDA device code executed by the host: enough of the programming model to run this project's kernels unchanged.
//
// Blocks run one after the other; the threads of a block are fibers that run until they wait (at a barrier or a
// shuffle). Blocks and threads are taken in a selectable order, so that code that is right only by luck of scheduling
// gives wrong numbers under another order. Shared memory starts as NaN in every block and ends at a guard zone. Each
// barrier, and each wait for asynchronous copies, has a number and can be switched off, with which a test shows that it
// matters.
#pragma once

// The fortified longjmp refuses to go to another stack.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() emulation::barrier(__COUNTER__ - emulation::kFirstBarrier)
#define MTL_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  emulation::launch([&] { (kernel)(__VA_ARGS__); }, blocks, threads, shared_bytes, emulation::address(kernel))
#define MTL_ALLOW_SHARED(kernel, bytes) (emulation::allowed_shared[emulation::address(kernel)] = bytes)

using std::isinf;
using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __stwb(float4* to, float4 value) { *to = value; }

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

// What any launch may take, what the smallest of the GPUs gives to one that asked, and the zone behind.
constexpr size_t kSharedBytes = 48 * 1024, kMostSharedBytes = 99 * 1024, kGuardBytes = 4096;

namespace mtl {
// What `extern __shared__ float4 shared_memory[]` in a kernel names: inside a function, extern means the enclosing
// namespace.
float4 shared_memory[(kMostSharedBytes + kGuardBytes) / sizeof(float4)];
}  // namespace mtl

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr int kFirstBarrier = __COUNTER__ + 1;  // barriers are numbered in the order of the source

enum class Order { forward, reverse, shuffled };
inline Order order = Order::forward;
inline unsigned seed = 0;
inline int skipped_barrier = -1;
inline std::string error;                             // the first failure of the last call; empty when all went well
inline std::map<const void*, size_t> allowed_shared;  // by kernel
inline int64_t bank_conflicts = 0;                    // rows that ldmatrix reads at a time from banks of another row

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// An asynchronous copy of 16 bytes: the first `bytes` from memory, the others zero.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;

  void arrive() const {
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, 16 - bytes);
  }
};

// A fiber is entered once through its ucontext; afterwards _longjmp switches, which, unlike swapcontext, makes no
// system call: a shuffle of one warp is 32 switches.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool entered = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  int waits_at = -1;       // barrier number; from kWarpWait on for an instruction of the warp; -1 runnable
  unsigned exchanges = 0;  // parity selects the buffer: a lane is at most one exchange ahead of its warp
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;  // closed ones that have not arrived
};
constexpr int kWarpWait = 1 << 30;
enum WarpInstruction { kShuffle = kWarpWait, kMatrixLoad, kMatrixProduct };

struct alignas(16) Slot {
  unsigned char bytes[64];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Slot> exchange;  // [2][threads]
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  int current = 0;
  std::function<void()> body;
};
inline Block block;

inline void fail(const std::string& message) {
  if (error.empty()) error = message;
}

inline void wait(int at) {
  Fiber& fiber = block.fibers[block.current];
  fiber.waits_at = at;
  if (_setjmp(fiber.place) == 0) _longjmp(block.scheduler, 1);
}

inline void barrier(int number) {
  if (number != skipped_barrier) wait(number);
}

// Waits for the whole warp at the same instruction, and gives what each of its lanes brought.
template <class T>
std::array<const T*, kWarp> exchange(WarpInstruction instruction, const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const int me = block.current, threads = static_cast<int>(block.fibers.size());
  Slot* buffer = block.exchange.data() + (block.fibers[me].exchanges++ % 2) * threads;
  std::memcpy(buffer[me].bytes, &mine, sizeof(T));
  wait(instruction);
  std::array<const T*, kWarp> all;
  for (int lane = 0; lane < kWarp; ++lane) {
    all[lane] = reinterpret_cast<const T*>(buffer[me / kWarp * kWarp + lane].bytes);
  }
  return all;
}

template <class T>
T shuffle_xor(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffffu) fail("a shuffle names only part of its warp");
  return *exchange(kShuffle, value)[(block.current ^ distance) % kWarp];
}

inline void run_fiber() {
  block.body();
  block.fibers[block.current].done = true;
  _longjmp(block.scheduler, 1);
}

inline void resume(int thread) {
  block.current = thread;
  threadIdx.x = thread;
  Fiber& fiber = block.fibers[thread];
  fiber.waits_at = -1;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

// Lets the fibers [first, last) continue if every one of them waits at the same place. Exited threads do not count.
inline bool release(int first, int last, bool warp) {
  int at = -1;
  for (int i = first; i < last; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.done && !warp) continue;
    if (fiber.done || fiber.waits_at < 0 || (fiber.waits_at >= kWarpWait) != warp) return false;
    if (at >= 0 && fiber.waits_at != at) {
      fail(warp ? "lanes of a warp wait at different instructions" : "threads of a block wait at different barriers");
      return false;
    }
    at = fiber.waits_at;
  }
  for (int i = first; i < last; ++i) block.fibers[i].waits_at = -1;
  return at >= 0;
}

inline std::vector<int> permutation(int n, unsigned salt) {
  std::vector<int> ids(n);
  std::iota(ids.begin(), ids.end(), 0);
  if (order == Order::reverse) std::reverse(ids.begin(), ids.end());
  if (order == Order::shuffled) std::shuffle(ids.begin(), ids.end(), std::mt19937(seed * 7919u + salt));
  return ids;
}

inline void run_block(int threads, size_t shared_bytes) {
  auto* shared = reinterpret_cast<unsigned char*>(mtl::shared_memory);
  std::memset(shared, 0xff, shared_bytes + kGuardBytes);  // float NaN, and all-true masks
  block.shared_bytes = shared_bytes;
  block.exchange.resize(2 * threads);
  block.fibers.resize(threads);
  for (Fiber& fiber : block.fibers) {
    fiber.done = fiber.entered = false;
    fiber.waits_at = -1;
    fiber.exchanges = 0;
    fiber.copies.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  // In order, a warp runs as far ahead of the others as it can; shuffled, all go on together.
  const int warps = (threads + kWarp - 1) / kWarp, groups = order == Order::shuffled ? 1 : warps;
  const std::vector<int> ids = permutation(threads, blockIdx.x);
  bool alive = true;
  while (alive && error.empty()) {
    bool moved = false;
    for (int group = 0; group < groups && error.empty(); ++group) {
      const int from = group * kWarp, to = groups == 1 ? threads : std::min(from + kWarp, threads);
      bool again = true;
      while (again && error.empty()) {
        for (int i = from; i < to; ++i) {
          Fiber& fiber = block.fibers[ids[i]];
          if (fiber.done || fiber.waits_at >= 0) continue;
          resume(ids[i]);
          moved = true;
        }
        again = false;
        for (int w = 0; w < threads; w += kWarp) again |= release(w, std::min(w + kWarp, threads), true);
      }
    }
    alive = std::any_of(block.fibers.begin(), block.fibers.end(), [](const Fiber& f) { return !f.done; });
    if (alive && !moved && !release(0, threads, false))
      fail("threads wait for ever: a barrier or shuffle is not reached by all");
  }
  for (size_t i = shared_bytes; i < shared_bytes + kGuardBytes; ++i) {
    if (shared[i] != 0xff) {
      fail("a write past the end of shared memory");
      break;
    }
  }
}

inline void launch(std::function<void()> body, int64_t blocks, int threads, size_t shared_bytes, const void* kernel) {
  const size_t allowed = std::min(std::max(kSharedBytes, allowed_shared[kernel]), kMostSharedBytes);
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024 || shared_bytes > allowed) {
    return fail("a launch that the device would refuse");
  }
  block.body = std::move(body);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = threads;
  for (const int b : permutation(static_cast<int>(blocks), 17)) {
    blockIdx.x = b;
    run_block(threads, shared_bytes);
    if (!error.empty()) return;
  }
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::shuffle_xor(mask, value, distance);
}
