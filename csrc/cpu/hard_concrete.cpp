// hard_concrete and its L0 penalty on a CPU. A number a connection of the network: plain loops on the calling thread.
#include <cmath>

#include "tensor.h"

namespace mtl {

namespace {

constexpr double kNoiseMin = 1e-6, kNoiseMax = 1 - 1e-6;

ScalarType sum_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor fresh(const Tensor& like, ScalarType type) { return torch::stable::new_empty(like, like.sizes(), type); }

template <class C>
std::vector<C> numbers(const Tensor& t, const char* argument) {
  const Tensor flat = dense(t);
  std::vector<C> found(t.numel());
  with_type(t.scalar_type(), argument, [&](auto s) {
    const auto* from = data<decltype(s)>(flat);
    for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<C>(from[i]);
  });
  return found;
}

template <class C>
C sigmoid(C x) {
  return C{1} / (C{1} + std::exp(-x));
}

std::tuple<Tensor, Tensor> hard_concrete(const Tensor& log_alpha, const OptionalTensor& noise, double beta,
                                         double gamma, double zeta) {
  STD_TORCH_CHECK(!noise || noise->numel() == log_alpha.numel(), "noise must have log_alpha's shape");
  Tensor z = fresh(log_alpha, log_alpha.scalar_type()), s = fresh(log_alpha, sum_type(log_alpha));
  with_type(log_alpha.scalar_type(), "log_alpha", [&](auto storage) {
    using S = decltype(storage);
    using C = SumOf<S>;
    std::vector<C> phi = numbers<C>(log_alpha, "log_alpha");
    if (noise) {
      const std::vector<C> drawn = numbers<C>(*noise, "noise");
      const C low = C(kNoiseMin), high = C(kNoiseMax);
      for (size_t i = 0; i < phi.size(); ++i) {
        const C e = drawn[i] < low ? low : drawn[i] > high ? high : drawn[i];  // a NaN stays one
        phi[i] = (std::log(e) - std::log1p(-e) + phi[i]) / C(beta);
      }
    }
    S* to = mutable_data<S>(z);
    C* kept = mutable_data<C>(s);
    for (size_t i = 0; i < phi.size(); ++i) {
      kept[i] = sigmoid(phi[i]);
      const C stretched = kept[i] * C(zeta - gamma) + C(gamma);
      to[i] = static_cast<S>(stretched < 0 ? C{0} : stretched > 1 ? C{1} : stretched);
    }
  });
  return {z, s};
}

Tensor hard_concrete_backward(const Tensor& grad, const Tensor& s, double beta, double gamma, double zeta,
                              bool sampled) {
  STD_TORCH_CHECK(grad.numel() == s.numel(), "grad must have s's shape");
  STD_TORCH_CHECK(s.scalar_type() == sum_type(grad), "s must be float32, or float64 where grad is");
  Tensor out = torch::stable::new_empty(grad, s.sizes());
  with_type(grad.scalar_type(), "grad", [&](auto storage) {
    using S = decltype(storage);
    using C = SumOf<S>;
    const std::vector<C> dz = numbers<C>(grad, "grad"), kept = numbers<C>(s, "s");
    const C scale = C(sampled ? (zeta - gamma) / beta : zeta - gamma);
    S* to = mutable_data<S>(out);
    for (size_t i = 0; i < kept.size(); ++i) {
      const C stretched = kept[i] * C(zeta - gamma) + C(gamma);
      const bool clamped = stretched <= 0 || stretched >= 1;
      to[i] = static_cast<S>(clamped ? C{0} : dz[i] * scale * kept[i] * (C{1} - kept[i]));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> hard_concrete_l0(const Tensor& log_alpha, double beta, double gamma, double zeta) {
  const ScalarType type = sum_type(log_alpha);
  Tensor total = torch::stable::new_empty(log_alpha, {}, type), slope = fresh(log_alpha, type);
  with_type(type, "log_alpha", [&](auto storage) {
    using C = SumOf<decltype(storage)>;
    const std::vector<C> phi = numbers<C>(log_alpha, "log_alpha");
    const C shift = C(beta * std::log(-gamma / zeta));
    C* to = mutable_data<C>(slope);
    double sum = 0;
    for (size_t i = 0; i < phi.size(); ++i) {
      const C open = sigmoid(phi[i] - shift);
      sum += open;
      to[i] = open * sigmoid(shift - phi[i]);
    }
    *mutable_data<C>(total) = C(sum);
  });
  return {total, slope};
}

Tensor hard_concrete_l0_backward(const Tensor& grad, const Tensor& slope) {
  STD_TORCH_CHECK(grad.numel() == 1, "grad must be a scalar");
  Tensor out = torch::stable::new_empty(slope, slope.sizes());
  with_type(slope.scalar_type(), "slope", [&](auto storage) {
    using S = decltype(storage);
    using C = SumOf<S>;
    const C g = numbers<C>(grad, "grad")[0];
    const std::vector<C> from = numbers<C>(slope, "slope");
    for (size_t i = 0; i < from.size(); ++i) mutable_data<S>(out)[i] = static_cast<S>(g * from[i]);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("hard_concrete", TORCH_BOX(&hard_concrete));
  m.impl("hard_concrete_eager", TORCH_BOX(&hard_concrete));
  m.impl("hard_concrete_backward", TORCH_BOX(&hard_concrete_backward));
  m.impl("hard_concrete_l0", TORCH_BOX(&hard_concrete_l0));
  m.impl("hard_concrete_l0_eager", TORCH_BOX(&hard_concrete_l0));
  m.impl("hard_concrete_l0_backward", TORCH_BOX(&hard_concrete_l0_backward));
}

}  // namespace mtl
