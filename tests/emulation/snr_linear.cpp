// The snr_linear kernels, with their launch code, on the emulated device.
#include "cuda.h"
#include "expert_linear_launch.cuh"

namespace {
constexpr int kOthersBarriers = __COUNTER__ - emulation::kFirstBarrier;
}  // namespace

#include "snr_linear_launch.cuh"
// After the kernels, whose barriers it counts.
#include "calls.h"

namespace {

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, batch, upper, lower, outputs, features;
  int64_t x, x_row, x_unit, weight, given_weight, parameter_type, gate, gate_type, skip, bias, grad, saved, activation;
  int64_t out, z, dgate, dbias;
  int64_t large, slice_rows;  // -1, 0: as planned
};

template <class S, mtl::LinearProduct PRODUCT>
void run(const Problem& p) {
  mtl::LinearPlan plan = mtl::plan_snr(PRODUCT, p.batch, p.outputs, p.features, p.upper, p.lower, sizeof(S) == 2);
  if (p.large >= 0) plan.large = p.large;
  if (p.slice_rows && PRODUCT == mtl::LinearProduct::kWeight) {
    plan.slice_rows = p.slice_rows;
    plan.slices = mtl::divide_up(p.batch, p.slice_rows);
  }
  const auto type = static_cast<mtl::Scalar>(p.parameter_type);
  mtl::SnrArgs a{};
  a.batch = p.batch;
  a.outputs = p.outputs;
  a.features = p.features;
  a.upper = static_cast<int>(p.upper);
  a.lower = static_cast<int>(p.lower);
  a.columns = p.upper * p.outputs;
  a.x = pointer<void>(p.x);
  a.x_row = p.x_row;
  a.x_unit = p.x_unit;
  a.weight = pointer<void>(p.weight);
  a.given_weight = pointer<void>(p.given_weight);
  a.given_type = a.bias_type = type;
  a.gate = pointer<void>(p.gate);
  a.gate_type = static_cast<mtl::Scalar>(p.gate_type);
  a.skip = p.skip != 0;
  a.bias = pointer<void>(p.bias);
  a.grad = pointer<void>(p.grad);
  a.saved = pointer<void>(p.saved);
  a.activation = static_cast<mtl::Activation>(p.activation);
  a.out = pointer<void>(p.out);
  a.z = pointer<void>(p.z);
  a.dbias = pointer<void>(p.dbias);
  a.out_row = p.lower * p.features;
  a.slice_rows = static_cast<int>(plan.slice_rows);
  a.exact = type == mtl::Scalar::f32 || plan.slices > 1;
  if (PRODUCT != mtl::LinearProduct::kWeight) return mtl::launch_snr<S, PRODUCT>(a, plan, 0);
  // Sums that are read before they are written show as NaN.
  const int64_t pairs = p.upper * p.lower, size = pairs * p.outputs * p.features, rows = mtl::snr_product_rows(a, plan);
  std::vector<float> products(rows * pairs, NAN), sums, bias_sums;
  if (p.dgate) a.products = products.data();
  if (plan.slices > 1) {
    sums.assign(plan.slices * size, NAN);
    bias_sums.assign(plan.slices * a.columns, NAN);
    if (p.out) a.out = sums.data();
    if (p.dbias) a.dbias = bias_sums.data();
  }
  mtl::launch_snr<S, PRODUCT>(a, plan, 0);
  if (p.dgate) mtl::launch_sum_partials(products.data(), rows, pairs, pointer<void>(p.dgate), a.gate_type, 0);
  if (plan.slices == 1) return;
  if (p.out) mtl::launch_sum_slices(sums.data(), plan.slices, size, pointer<void>(p.out), type, 0);
  if (p.dbias) mtl::launch_sum_slices(bias_sums.data(), plan.slices, a.columns, pointer<void>(p.dbias), type, 0);
}

template <mtl::LinearProduct PRODUCT>
void run_any(const Problem* p) {
  emulation::error.clear();
  dispatch(p->type, [&](auto s) { run<decltype(s), PRODUCT>(*p); });
}

}  // namespace

extern "C" {

int first_barrier() { return kOthersBarriers + 1; }
void forward(const Problem* p) { run_any<mtl::LinearProduct::kForward>(p); }
void input_gradient(const Problem* p) { run_any<mtl::LinearProduct::kInput>(p); }
void parameter_gradients(const Problem* p) { run_any<mtl::LinearProduct::kWeight>(p); }

// The plan of one product: large, slices, slice_rows.
void plan(int product, int64_t batch, int64_t outputs, int64_t features, int64_t upper, int64_t lower, int tensor_cores,
          int64_t* to) {
  const mtl::LinearPlan p = mtl::plan_snr(static_cast<mtl::LinearProduct>(product), batch, outputs, features, upper,
                                          lower, tensor_cores != 0);
  to[0] = p.large, to[1] = p.slices, to[2] = p.slice_rows;
}

}  // extern "C"
