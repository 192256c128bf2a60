// The star_linear kernels, with their launch code, on the emulated device.
#include "cuda.h"
#include "star_linear_launch.cuh"
// After the kernels, whose barriers it counts.
#include "calls.h"

namespace {

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, parameter_type, batch, domains, outputs, features;
  int64_t x, x_row, sorted, wide_ids, order, weight, own_weight, bias, own_bias, grad, saved, activation;
  int64_t out, z, dweight, down_weight, dbias, down_bias;
  int64_t large, chunk_rows;  // -1, 0: as planned
};

mtl::StarArgs arguments(const Problem& p, std::vector<int64_t>& bound) {
  mtl::StarArgs a{};
  a.batch = a.groups.batch = p.batch;
  a.groups.domains = p.domains;
  a.outputs = a.columns = p.outputs;
  a.features = a.out_row = p.features;
  a.x = pointer<void>(p.x);
  a.x_row = p.x_row;
  a.weight = pointer<void>(p.weight);
  a.own_weight = pointer<void>(p.own_weight);
  a.bias = pointer<void>(p.bias);
  a.own_bias = pointer<void>(p.own_bias);
  a.bias_type = static_cast<mtl::Scalar>(p.parameter_type);
  a.grad = pointer<void>(p.grad);
  a.saved = pointer<void>(p.saved);
  a.activation = static_cast<mtl::Activation>(p.activation);
  a.out = pointer<void>(p.out);
  a.z = pointer<void>(p.z);
  a.groups.order = pointer<int64_t>(p.order);
  bound.assign(p.domains + 3, -1);
  a.groups.bound = bound.data();
  a.groups.ids = pointer<void>(p.sorted);
  a.groups.wide_ids = p.wide_ids != 0;
  mtl::launch_domain_bounds(a.groups, 0);
  a.groups.ids = nullptr;  // the kernels read their order alone
  return a;
}

template <class S, class P, mtl::LinearProduct PRODUCT>
void run(const Problem& p) {
  std::vector<int64_t> bound;
  mtl::StarArgs a = arguments(p, bound);
  mtl::LinearPlan plan =
      mtl::plan_star(PRODUCT, p.batch, p.domains, p.outputs, p.features, sizeof(S) == 2, sizeof(P) == 2);
  constexpr bool kWeight = PRODUCT == mtl::LinearProduct::kWeight;
  if (p.large >= 0 && (sizeof(P) == 2 || kWeight)) plan.large = p.large && sizeof(S) == 2;
  if (!kWeight) plan.slice_rows = plan.large ? 128 : 64;
  if constexpr (!kWeight) {
    mtl::launch_star<S, P, PRODUCT>(a, plan, 0);
  } else {
    if (p.chunk_rows) plan.slice_rows = p.chunk_rows;
    const int64_t slots = mtl::domain_slots(a.groups, plan.slice_rows), size = p.outputs * p.features;
    std::vector<float> sums = scratch(slots * size), bias_sums = scratch(slots * p.outputs);
    a.out = sums.data();
    a.dbias = bias_sums.data();
    a.exact = true;
    mtl::launch_star<S, S, PRODUCT>(a, plan, 0);
    const auto type = static_cast<mtl::Scalar>(p.parameter_type);
    mtl::launch_star_combine({a.groups, sums.data(), size, plan.slice_rows, a.weight, a.own_weight, type,
                              pointer<void>(p.dweight), pointer<void>(p.down_weight)},
                             0);
    mtl::launch_star_combine({a.groups, bias_sums.data(), p.outputs, plan.slice_rows, nullptr, nullptr, type,
                              pointer<void>(p.dbias), pointer<void>(p.down_bias)},
                             0);
  }
}

template <mtl::LinearProduct PRODUCT>
void run_any(const Problem* p) {
  emulation::error.clear();
  const bool f16 = p->type == static_cast<int64_t>(mtl::Scalar::f16), own = p->parameter_type == p->type;
  if (f16 && own) run<__half, __half, PRODUCT>(*p);
#ifndef FLOAT16_ONLY
  const bool bf16 = p->type == static_cast<int64_t>(mtl::Scalar::bf16);
  if (f16 && !own) run<__half, float, PRODUCT>(*p);
  if (bf16 && own) run<__nv_bfloat16, __nv_bfloat16, PRODUCT>(*p);
  if (bf16 && !own) run<__nv_bfloat16, float, PRODUCT>(*p);
  if (!f16 && !bf16) run<float, float, PRODUCT>(*p);
#endif
}

}  // namespace

extern "C" {

void forward(const Problem* p) { run_any<mtl::LinearProduct::kForward>(p); }
void input_gradient(const Problem* p) { run_any<mtl::LinearProduct::kInput>(p); }
void parameter_gradients(const Problem* p) { run_any<mtl::LinearProduct::kWeight>(p); }

// The plan of one product: large, rows of a chunk.
void plan(int product, int64_t batch, int64_t domains, int64_t outputs, int64_t features, int short_numbers,
          int short_weights, int64_t* to) {
  const mtl::LinearPlan p = mtl::plan_star(static_cast<mtl::LinearProduct>(product), batch, domains, outputs, features,
                                           short_numbers != 0, short_weights != 0);
  to[0] = p.large, to[1] = p.slice_rows;
}

}  // extern "C"
