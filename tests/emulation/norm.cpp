// The kernels of partitioned_norm, with their launch code, on the emulated device.
#include <optional>

#include "cuda.h"
#include "partitioned_norm_launch.cuh"

namespace {

constexpr int kBarriers = __COUNTER__ - emulation::kFirstBarrier;

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, batch, width, domains, training, eps_inverse;
  int64_t x, x_row, grad, grad_row, ids, sorted, wide_ids, order;
  int64_t weight, bias, own_weight, own_bias, affine_type, running_mean, running_var, running_type;
  int64_t mean, var, count, out;
  int64_t dx, dweight, dbias, down_weight, down_bias;
  int64_t rows;  // of a chunk; 0: as planned
};

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Body>
void dispatch(int64_t type, Body body) {
  if (type == static_cast<int64_t>(mtl::Scalar::f32)) body(float{});
  if (type == static_cast<int64_t>(mtl::Scalar::f16)) body(__half{});
  if (type == static_cast<int64_t>(mtl::Scalar::bf16)) body(__nv_bfloat16{});
}

mtl::GroupedNormArgs arguments(const Problem& p) {
  mtl::GroupedNormArgs a{};
  a.batch = p.batch;
  a.width = p.width;
  a.domains = p.domains;
  a.training = p.training != 0;
  a.eps = 1.0f / static_cast<float>(p.eps_inverse);
  a.x = pointer<void>(p.x);
  a.x_row = p.x_row;
  a.ids = pointer<void>(p.ids);
  a.wide_ids = p.wide_ids != 0;
  a.order = pointer<int64_t>(p.order);
  a.weight = pointer<void>(p.weight);
  a.bias = pointer<void>(p.bias);
  a.own_weight = pointer<void>(p.own_weight);
  a.own_bias = pointer<void>(p.own_bias);
  a.affine_type = static_cast<mtl::Scalar>(p.affine_type);
  a.running_mean = pointer<void>(p.running_mean);
  a.running_var = pointer<void>(p.running_var);
  a.running_type = static_cast<mtl::Scalar>(p.running_type);
  a.mean = pointer<float>(p.mean);
  a.var = pointer<float>(p.var);
  a.count = pointer<int64_t>(p.count);
  return a;
}

// Scratch that is read before it is written shows as NaN.
std::vector<float> scratch(int64_t n) { return std::vector<float>(n, NAN); }

struct Groups {
  std::vector<int64_t> bound;
  std::vector<float> partial;

  Groups(const Problem& p, mtl::GroupedNormArgs& a) : bound(p.domains + 3, -1) {
    a.bound = bound.data();
    mtl::DomainGroups sorted = a;
    sorted.ids = pointer<void>(p.sorted);
    mtl::launch_domain_bounds(sorted, 0);
    mtl::plan_norm(a, mtl::norm_vec(a, p.type == static_cast<int64_t>(mtl::Scalar::f32) ? 4 : 2));
    if (p.rows) {
      a.rows = p.rows;
      a.slots = a.batch / a.rows + a.domains + 2;
    }
    partial = scratch(a.slots * 2 * a.width);
    a.partial = partial.data();
  }
};

}  // namespace

extern "C" {

int barriers() { return kBarriers; }
const char* last_error() { return emulation::error.c_str(); }

void schedule(int order, unsigned seed, int skipped_barrier) {
  emulation::order = static_cast<emulation::Order>(order);
  emulation::seed = seed;
  emulation::skipped_barrier = skipped_barrier;
}

void norm_forward(const Problem* p) {
  emulation::error.clear();
  mtl::GroupedNormArgs a = arguments(*p);
  a.out = pointer<void>(p->out);
  std::optional<Groups> groups;
  if (a.training) groups.emplace(*p, a);
  dispatch(p->type, [&](auto s) { mtl::launch_norm_forward<decltype(s)>(a, 0); });
}

void norm_backward(const Problem* p) {
  emulation::error.clear();
  mtl::GroupedNormArgs a = arguments(*p);
  a.grad = pointer<void>(p->grad);
  a.grad_row = p->grad_row;
  a.out = pointer<void>(p->dx);
  const Groups groups(*p, a);
  std::vector<float> total = scratch(a.domains * a.width), product = total, weighted = total;
  a.total = total.data();
  a.product = product.data();
  a.weighted = weighted.data();
  a.down_weight = pointer<void>(p->down_weight);
  a.down_bias = pointer<void>(p->down_bias);
  dispatch(p->type, [&](auto s) { mtl::launch_norm_backward<decltype(s)>(a, 0); });
  mtl::launch_sum_partials(weighted.data(), a.domains, a.width, pointer<void>(p->dweight), a.affine_type, 0);
  mtl::launch_sum_partials(total.data(), a.domains, a.width, pointer<void>(p->dbias), a.affine_type, 0);
}

}  // extern "C"
