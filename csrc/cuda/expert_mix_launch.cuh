// From filled ExpertMixArgs to kernels on a stream. Kept apart from the torch glue, so that tests run it on a CPU.
// Needs MTL_LAUNCH, as in launch.h.
#pragma once

#include "expert_mix.cuh"

namespace mtl {

// More tasks than two chunks of four compute the experts once too often.
constexpr int kFusedTasks = 8;

// Whether one kernel serves. `experts`: how many each unit of x has.
inline bool fuses_expert_mix(int64_t tasks, const std::vector<int64_t>& experts) {
  const bool ones = std::all_of(experts.begin(), experts.end(), [](int64_t n) { return n == 1; });
  return tasks <= kFusedTasks && (ones || experts.size() <= kLinearUnits);
}

#ifndef MTL_SLAB_BYTES  // tests take less
#define MTL_SLAB_BYTES (int64_t{32} << 20)
#endif

// Batch rows whose experts' outputs, of so many bytes each, stay in the second-level cache.
inline int64_t slab_rows(int64_t row_bytes) {
  constexpr int64_t kStep = 128;
  return std::max<int64_t>(1, MTL_SLAB_BYTES / std::max<int64_t>(1, row_bytes) / kStep) * kStep;
}

template <class S, int TASKS, class Stream>
void launch_expert_mix_tasks(const ExpertMixArgs& a, Stream stream) {
  const int64_t across = std::max<int64_t>(1, divide_up(a.mix.width, MixTile::kN));
  const int64_t blocks = divide_up(a.mix.batch, MixTile::kM) * divide_up(a.mix.tasks, TASKS) * across;
  constexpr int kBytes = ExpertMixShared<S, TASKS>::kBytes;
  if (blocks) MTL_LAUNCH((expert_mix_kernel<S, TASKS>), blocks, MixTile::kThreads, kBytes, stream, a);
}

template <class S, class Stream>
void launch_expert_mix(ExpertMixArgs& a, const std::vector<int64_t>& experts, Stream stream) {
  a.linear.units = 0;
  if (a.linear.x_unit != 0 && std::any_of(experts.begin(), experts.end(), [](int64_t n) { return n != 1; })) {
    for (const int64_t held : experts) {
      a.linear.expert[a.linear.units + 1] = a.linear.expert[a.linear.units] + static_cast<int>(held);
      ++a.linear.units;
    }
  }
  if (a.mix.tasks == 1) return launch_expert_mix_tasks<S, 1>(a, stream);
  if (a.mix.tasks == 2) return launch_expert_mix_tasks<S, 2>(a, stream);
  launch_expert_mix_tasks<S, 4>(a, stream);
}

// to [E,size] = from, with zeros for the experts that nobody uses; `bytes`: of a number.
template <class Stream>
void launch_used_experts(const MixArgs& a, const void* from, int64_t size, int64_t bytes, void* to, Stream stream) {
  const int64_t blocks = a.experts * divide_up(size, int64_t{kUsedThreads} * kUsedEach);
  if (blocks == 0) return;
  if (bytes == 2) {
    MTL_LAUNCH((used_experts_kernel<uint16_t>), blocks, kUsedThreads, 0, stream, a, static_cast<const uint16_t*>(from),
               size, static_cast<uint16_t*>(to));
  } else {
    MTL_LAUNCH((used_experts_kernel<uint32_t>), blocks, kUsedThreads, 0, stream, a, static_cast<const uint32_t*>(from),
               size, static_cast<uint32_t*>(to));
  }
}

}  // namespace mtl
