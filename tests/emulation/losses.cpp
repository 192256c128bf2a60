// The kernels of the losses, with their launch code, on the emulated device.
#include "cuda.h"
#include "losses_launch.cuh"
// After the kernels.
#include "calls.h"

namespace {

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, batch, tasks;
  int64_t x, x2;                 // logits, the second of esmm_loss; in `scale` the saved derivatives
  int64_t y, y_type, z, z_type;  // labels or click; mask or conversion
  int64_t factor;                // one float32, ctcvr_weight; in `scale` the gradient [T]
  int64_t loss, dx, dx2;
};

mtl::Labels labels(int64_t address, int64_t type) {
  return {pointer<void>(address), static_cast<mtl::LabelType>(type)};
}

}  // namespace

extern "C" {

void esmm(const Problem* p) {
  emulation::error.clear();
  mtl::EsmmArgs args{};
  args.plan = mtl::plan_loss(p->batch, 1);
  args.ctr = pointer<void>(p->x);
  args.cvr = pointer<void>(p->x2);
  args.click = labels(p->y, p->y_type);
  args.conversion = labels(p->z, p->z_type);
  args.weight = *pointer<float>(p->factor);
  args.scale = p->batch ? 1.0f / static_cast<float>(p->batch) : 0.0f;
  args.dctr = pointer<float>(p->dx);
  args.dcvr = pointer<float>(p->dx2);
  std::vector<float> partials = scratch(args.plan.blocks());
  args.partials = partials.data();
  dispatch(p->type, [&](auto s) { mtl::launch_esmm_loss<decltype(s)>(args, pointer<float>(p->loss), 0); });
}

void bce(const Problem* p) {
  emulation::error.clear();
  mtl::BceArgs args{};
  args.plan = mtl::plan_loss(p->batch, p->tasks);
  args.logits = pointer<void>(p->x);
  args.labels = labels(p->y, p->y_type);
  if (p->z) args.mask = labels(p->z, p->z_type);
  args.dlogits = pointer<float>(p->dx);
  std::vector<float> partials = scratch(args.plan.row_blocks * p->tasks), totals = scratch(p->tasks);
  args.partials = partials.data();
  dispatch(p->type,
           [&](auto s) { mtl::launch_masked_bce<decltype(s)>(args, pointer<float>(p->loss), totals.data(), 0); });
}

void scale(const Problem* p) {
  emulation::error.clear();
  mtl::launch_loss_scale(mtl::ScaleArgs{mtl::plan_loss(p->batch, p->tasks),
                                        pointer<float>(p->factor),
                                        {pointer<float>(p->x), pointer<float>(p->x2)},
                                        {pointer<float>(p->dx), pointer<float>(p->dx2)}},
                         0);
}

}  // extern "C"
