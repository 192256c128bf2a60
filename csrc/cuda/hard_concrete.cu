// hard_concrete and its L0 penalty on CUDA tensors. A number a connection of the network: what counts is that each is a
// single launch, so types are told apart at run time, and one thread has one number.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../common/boxing.h"
#include "launch.h"
#include "sum_partials.cuh"

namespace mtl::concrete {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;

struct Constants {
  float beta, gamma, span;  // span: zeta - gamma
};

struct Vector {
  void* data;
  Scalar type;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// noise.data null: the estimator for serving.
static __global__ void sample_kernel(Vector phi, Vector noise, Vector z, float* s, int64_t n, Constants c) {
  const int64_t i = thread_index();
  if (i >= n) return;
  float x = load_as_float(phi.data, phi.type, i);
  if (noise.data) {
    constexpr float low = 1e-6f, high = 1.0f - 1e-6f;
    float e = load_as_float(noise.data, noise.type, i);
    e = e < low ? low : e > high ? high : e;  // a NaN stays one
    x = (logf(e) - log1pf(-e) + x) / c.beta;
  }
  s[i] = sigmoid(x);
  const float stretched = s[i] * c.span + c.gamma;
  store_float(z.data, z.type, i, stretched < 0.0f ? 0.0f : stretched > 1.0f ? 1.0f : stretched);
}

static __global__ void backward_kernel(Vector grad, const float* s, Vector out, int64_t n, Constants c, float scale) {
  const int64_t i = thread_index();
  if (i >= n) return;
  const float stretched = s[i] * c.span + c.gamma, slope = scale * s[i] * (1.0f - s[i]);
  const bool clamped = stretched <= 0.0f || stretched >= 1.0f;
  store_float(out.data, out.type, i, clamped ? 0.0f : load_as_float(grad.data, grad.type, i) * slope);
}

static __global__ void l0_kernel(Vector phi, float* is_open, float* slope, int64_t n, float shift) {
  const int64_t i = thread_index();
  if (i >= n) return;
  const float x = load_as_float(phi.data, phi.type, i) - shift;
  is_open[i] = sigmoid(x);
  slope[i] = is_open[i] * sigmoid(-x);
}

static __global__ void scale_kernel(Vector grad, const float* slope, float* out, int64_t n) {
  const int64_t i = thread_index();
  if (i < n) out[i] = load_as_float(grad.data, grad.type, 0) * slope[i];
}

Scalar type_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                      type == ScalarType::Double,
                  name, ": a floating-point tensor was expected, got scalar type ", static_cast<int>(type));
  return type == ScalarType::Float      ? Scalar::f32
         : type == ScalarType::Half     ? Scalar::f16
         : type == ScalarType::BFloat16 ? Scalar::bf16
                                        : Scalar::f64;
}

// A contiguous tensor of one of the three types that the kernels compute in float32.
Vector vector(const Tensor& tensor, const char* name) {
  const Scalar type = type_of(tensor, name);
  STD_TORCH_CHECK(type != Scalar::f64, name, ": float32, bfloat16 or float16 was expected, got float64");
  return {const_cast<void*>(tensor.const_data_ptr()), type};
}

Tensor fresh(const Tensor& like, ScalarType type) { return torch::stable::new_empty(like, like.sizes(), type); }
float* floats(const Tensor& tensor) { return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())); }
int64_t blocks(int64_t n) { return (n + kThreads - 1) / kThreads; }

Constants constants(double beta, double gamma, double zeta) {
  return {static_cast<float>(beta), static_cast<float>(gamma), static_cast<float>(zeta - gamma)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& log_alpha, std::optional<Tensor> noise, double beta, double gamma,
                                   double zeta) {
  const Tensor phi = torch::stable::contiguous(log_alpha);
  STD_TORCH_CHECK(!noise || (noise->numel() == phi.numel() && same_device(*noise, phi)),
                  "noise: log_alpha's shape and device were expected");
  const Vector from = vector(phi, "log_alpha");
  const DeviceGuard guard(phi.get_device_index());
  Tensor z = fresh(phi, phi.scalar_type()), s = fresh(phi, ScalarType::Float);
  Vector drawn{nullptr, Scalar::f32};
  if (noise) {
    noise = torch::stable::contiguous(*noise);
    drawn = {const_cast<void*>(noise->const_data_ptr()), type_of(*noise, "noise")};
  }
  const int64_t n = phi.numel();
  if (n)
    MTL_LAUNCH(sample_kernel, blocks(n), kThreads, 0, current_stream(phi), from, drawn, vector(z, "z"), floats(s), n,
               constants(beta, gamma, zeta));
  return {z, s};
}

Tensor backward(const Tensor& grad_in, const Tensor& s_in, double beta, double gamma, double zeta, bool sampled) {
  const Tensor grad = torch::stable::contiguous(grad_in), s = torch::stable::contiguous(s_in);
  STD_TORCH_CHECK(grad.numel() == s.numel() && s.scalar_type() == ScalarType::Float && same_device(grad, s),
                  "s: float32 of grad's shape and device was expected");
  const Vector from = vector(grad, "grad");
  const DeviceGuard guard(grad.get_device_index());
  Tensor out = fresh(s, grad.scalar_type());
  const int64_t n = s.numel();
  const float scale = static_cast<float>(sampled ? (zeta - gamma) / beta : zeta - gamma);
  if (n)
    MTL_LAUNCH(backward_kernel, blocks(n), kThreads, 0, current_stream(s), from, floats(s), vector(out, "out"), n,
               constants(beta, gamma, zeta), scale);
  return out;
}

std::tuple<Tensor, Tensor> l0(const Tensor& log_alpha, double beta, double gamma, double zeta) {
  const Tensor phi = torch::stable::contiguous(log_alpha);
  const Vector from = vector(phi, "log_alpha");
  const DeviceGuard guard(phi.get_device_index());
  Tensor is_open = fresh(phi, ScalarType::Float), slope = fresh(phi, ScalarType::Float);
  Tensor total = torch::stable::new_empty(phi, {}, ScalarType::Float);
  const int64_t n = phi.numel();
  const cudaStream_t stream = current_stream(phi);
  if (n)
    MTL_LAUNCH(l0_kernel, blocks(n), kThreads, 0, stream, from, floats(is_open), floats(slope), n,
               static_cast<float>(beta * std::log(-gamma / zeta)));
  launch_sum_partials(floats(is_open), n, 1, total.mutable_data_ptr(), Scalar::f32, stream);
  return {total, slope};
}

Tensor l0_backward(const Tensor& grad, const Tensor& slope_in) {
  const Tensor slope = torch::stable::contiguous(slope_in);
  STD_TORCH_CHECK(grad.numel() == 1 && slope.scalar_type() == ScalarType::Float && same_device(grad, slope),
                  "grad: a scalar on the device of slope was expected, slope: float32");
  const DeviceGuard guard(slope.get_device_index());
  Tensor out = fresh(slope, ScalarType::Float);
  const int64_t n = slope.numel();
  if (n)
    MTL_LAUNCH(scale_kernel, blocks(n), kThreads, 0, current_stream(slope), vector(grad, "grad"), floats(slope),
               floats(out), n);
  return out;
}

}  // namespace mtl::concrete

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("hard_concrete", TORCH_BOX(&mtl::concrete::forward));
  m.impl("hard_concrete_eager", TORCH_BOX(&mtl::concrete::forward));
  m.impl("hard_concrete_backward", TORCH_BOX(&mtl::concrete::backward));
  m.impl("hard_concrete_l0", TORCH_BOX(&mtl::concrete::l0));
  m.impl("hard_concrete_l0_eager", TORCH_BOX(&mtl::concrete::l0));
  m.impl("hard_concrete_l0_backward", TORCH_BOX(&mtl::concrete::l0_backward));
}
