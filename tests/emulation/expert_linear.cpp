// The expert_linear kernels, with their launch code, on the emulated device.
#include "cuda.h"
#include "expert_linear_launch.cuh"
// After the kernels.
#include "calls.h"

namespace {

// One call, every field eight bytes wide: the test fills it as an array. Pointers are 0 where there is no tensor.
struct Problem {
  int64_t type, batch, units, outputs, features, experts;
  int64_t x, x_row, x_unit, weight, bias, bias_type, grad, saved, activation;
  int64_t out, z, dbias, parameter_type;
  int64_t large, slice_rows;  // -1, 0: as planned
};

template <class S, mtl::LinearProduct PRODUCT>
void run(const Problem& p) {
  const std::vector<int64_t> experts(pointer<int64_t>(p.experts), pointer<int64_t>(p.experts) + p.units);
  mtl::LinearPlan plan = mtl::plan_linear(PRODUCT, p.batch, p.outputs, p.features, experts, sizeof(S) == 2);
  if (p.large >= 0) plan.large = p.large;
  if (p.slice_rows && PRODUCT == mtl::LinearProduct::kWeight) {
    plan.slice_rows = p.slice_rows;
    plan.slices = mtl::divide_up(p.batch, p.slice_rows);
  }
  mtl::LinearArgs a{};
  a.batch = p.batch;
  a.outputs = p.outputs;
  a.features = p.features;
  a.columns = std::accumulate(experts.begin(), experts.end(), int64_t{0}) * p.outputs;
  a.x = pointer<void>(p.x);
  a.x_row = p.x_row;
  a.x_unit = p.x_unit;
  a.weight = pointer<void>(p.weight);
  a.bias = pointer<void>(p.bias);
  a.bias_type = static_cast<mtl::Scalar>(p.bias_type);
  a.grad = pointer<void>(p.grad);
  a.saved = pointer<void>(p.saved);
  a.activation = static_cast<mtl::Activation>(p.activation);
  a.out = pointer<void>(p.out);
  a.z = pointer<void>(p.z);
  a.dbias = pointer<void>(p.dbias);
  a.out_row = p.units * p.features;
  a.slice_rows = static_cast<int>(plan.slice_rows);
  const auto type = static_cast<mtl::Scalar>(p.parameter_type);
  a.exact = type == mtl::Scalar::f32;
  if (plan.slices == 1) return mtl::launch_linear<S, PRODUCT>(a, plan, experts, 0);
  const int64_t size = a.columns * a.features;
  std::vector<float> sums = scratch(plan.slices * size), bias_sums = scratch(plan.slices * a.columns);
  a.out = sums.data();
  a.dbias = bias_sums.data();
  a.exact = true;
  mtl::launch_linear<S, PRODUCT>(a, plan, experts, 0);
  mtl::launch_sum_slices(sums.data(), plan.slices, size, pointer<void>(p.out), type, 0);
  mtl::launch_sum_slices(bias_sums.data(), plan.slices, a.columns, pointer<void>(p.dbias), type, 0);
}

template <mtl::LinearProduct PRODUCT>
void run_any(const Problem* p) {
  emulation::error.clear();
  dispatch(p->type, [&](auto s) { run<decltype(s), PRODUCT>(*p); });
}

// c [16,8] = a [16,16] b [16,8] by one warp, the operands through ldmatrix as stored, or stored transposed.
void one_product(const __half* a, const __half* b, float* c, bool transposed) {
  auto* shared = reinterpret_cast<__half*>(mtl::shared_memory);
  const int lane = static_cast<int>(threadIdx.x);
  // a as four matrices of 8x8, b (and something to fill up with) likewise.
  for (int i = lane; i < 256; i += 32) {
    const int row = i / 16, column = i % 16, matrix = row / 8 + column / 8 * 2, r = row % 8, s = column % 8;
    shared[matrix * 64 + (transposed ? s * 8 + r : r * 8 + s)] = a[i];
  }
  for (int i = lane; i < 128; i += 32) {
    const int k = i / 8, n = i % 8;
    shared[256 + k / 8 * 64 + (transposed ? k % 8 * 8 + n : n * 8 + k % 8)] = b[i];
  }
  for (int i = lane; i < 128; i += 32) shared[384 + i] = 0.0f;
  emulation::wait(0);
  uint32_t left[4], right[4];
  (transposed ? mtl::ldmatrix_trans : mtl::ldmatrix)(left, shared + lane * 8);
  (transposed ? mtl::ldmatrix_trans : mtl::ldmatrix)(right, shared + 256 + lane * 8);
  float sum[4] = {};
  mtl::mma<__half>(sum, left, {right[0], right[1]});
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

}  // namespace

extern "C" {

void forward(const Problem* p) { run_any<mtl::LinearProduct::kForward>(p); }
void input_gradient(const Problem* p) { run_any<mtl::LinearProduct::kInput>(p); }
void weight_gradient(const Problem* p) { run_any<mtl::LinearProduct::kWeight>(p); }

void matrix_product(const void* a, const void* b, float* c, int transposed) {
  emulation::error.clear();
  const auto body = [=] {
    one_product(static_cast<const __half*>(a), static_cast<const __half*>(b), c, transposed != 0);
  };
  emulation::launch(body, 1, 32, 1024, nullptr);
}

// What a launch does that takes more shared memory than any may, without having asked.
void ask_for_shared(int bytes, int allowed) {
  emulation::error.clear();
  static int kernel;
  emulation::allowed_shared[&kernel] = allowed;
  emulation::launch([] {}, 1, 32, bytes, &kernel);
}

// 16 bytes copied through shared memory, read before or after the wait for them.
void copy_through(const void* from, int bytes, void* to, int waits) {
  emulation::error.clear();
  const auto body = [=] {
    mtl::cp_async(mtl::shared_memory, from, bytes);
    mtl::cp_async_commit();
    mtl::cp_async_commit();
    if (waits) emulation::CopyWait{-2}.until<1>();
    std::memcpy(to, mtl::shared_memory, 16);
  };
  emulation::launch(body, 1, 1, 16, nullptr);
}

// The plan of one product: large, slices, slice_rows.
void plan(int product, int64_t batch, int64_t outputs, int64_t features, const int64_t* experts, int64_t units,
          int tensor_cores, int64_t* to) {
  const mtl::LinearPlan p = mtl::plan_linear(static_cast<mtl::LinearProduct>(product), batch, outputs, features,
                                             std::vector<int64_t>(experts, experts + units), tensor_cores != 0);
  to[0] = p.large, to[1] = p.slices, to[2] = p.slice_rows;
}

}  // extern "C"
