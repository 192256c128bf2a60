// The kernels of expert_mix, with their launch code, on the emulated device.
#include "cuda.h"
#include "expert_linear_launch.cuh"
#include "mix_launch.cuh"

namespace {
constexpr int kOthersBarriers = __COUNTER__ - emulation::kFirstBarrier;
}

#include "expert_mix_launch.cuh"
// After the kernels.
#include "calls.h"

namespace {

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, batch, tasks, experts, width, features, units, counts;
  int64_t x, x_row, x_unit, weight, bias, bias_type, activation;
  int64_t logits, logits_type, logits_row, stat, stat_type, mask, columns, out, lse;
};

mtl::ExpertMixArgs arguments(const Problem& p) {
  mtl::ExpertMixArgs a{};
  a.linear.batch = a.mix.batch = p.batch;
  a.linear.outputs = a.mix.width = p.width;
  a.linear.features = p.features;
  a.linear.x = pointer<void>(p.x);
  a.linear.x_row = p.x_row;
  a.linear.x_unit = p.x_unit;
  a.linear.weight = pointer<void>(p.weight);
  a.linear.bias = pointer<void>(p.bias);
  a.linear.bias_type = static_cast<mtl::Scalar>(p.bias_type);
  a.linear.activation = static_cast<mtl::Activation>(p.activation);
  a.mix.tasks = static_cast<int>(p.tasks);
  a.mix.experts = static_cast<int>(p.experts);
  a.mix.logits = pointer<void>(p.logits);
  a.mix.logits_type = static_cast<mtl::Scalar>(p.logits_type);
  a.mix.logits_row = p.logits_row;
  a.mix.stat = pointer<void>(p.stat);
  a.mix.stat_type = static_cast<mtl::Scalar>(p.stat_type);
  a.mix.mask = pointer<unsigned char>(p.mask);
  a.mix.columns = pointer<int>(p.columns);
  a.mix.out = pointer<void>(p.out);
  a.mix.lse = pointer<float>(p.lse);
  return a;
}

}  // namespace

extern "C" {

int others_barriers() { return kOthersBarriers + 1; }  // to count takes a number

void expert_mix_forward(const Problem* p) {
  emulation::error.clear();
  mtl::ExpertMixArgs a = arguments(*p);
  const std::vector<int64_t> counts(pointer<int64_t>(p->counts), pointer<int64_t>(p->counts) + p->units);
  dispatch(p->type, [&](auto s) { mtl::launch_expert_mix<decltype(s)>(a, counts, 0); });
}

// out [E,K] = x [E,K] of the experts that are used.
void used_experts(const Problem* p) {
  emulation::error.clear();
  mtl::launch_used_experts(arguments(*p).mix, pointer<void>(p->x), p->features, p->type == 0 ? 4 : 2,
                           pointer<void>(p->out), 0);
}

// Whether one kernel serves so many tasks over units of so many experts, and the rows of a slab otherwise.
int fuses(int64_t tasks, const int64_t* counts, int64_t units) {
  return mtl::fuses_expert_mix(tasks, std::vector<int64_t>(counts, counts + units));
}
int64_t slab_rows(int64_t row_bytes) { return mtl::slab_rows(row_bytes); }

}  // extern "C"
