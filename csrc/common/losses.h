// One row of each loss and its gradients, shared by the CPU and CUDA kernels. Without branches, so that a loop over it
// becomes vectors. M says what exp and log1p (of numbers in [0,1]) are.
#pragma once

#if defined(__CUDACC__)
#define MTL_ROW __host__ __device__ inline
#else
#define MTL_ROW inline __attribute__((always_inline))
#endif

namespace mtl {

// sigmoid(x) and sigmoid(-x), both to full relative precision, and log(1 + exp(-|x|)), in which log sigmoid and
// softplus differ from a straight line. No exponent is positive: nothing overflows.
template <class C>
struct Logistic {
  C plus, minus, tail;
};

template <class M, class C>
MTL_ROW Logistic<C> logistic(C x) {
  const C e = M::exp(x < C{0} ? x : -x), large = C{1} / (C{1} + e), small = e * large;
  return {x < C{0} ? small : large, x < C{0} ? large : small, M::log1p(e)};
}

template <class C>
MTL_ROW C positive(C x) {
  return x > C{0} ? x : C{0};
}

template <class C>
MTL_ROW bool is_label(C y) {
  return y >= C{0} && y <= C{1};
}

// Binary cross entropy of logit x and label y, and its derivative.
template <class C>
struct BceRow {
  C loss, slope;
};

template <class M, class C>
MTL_ROW BceRow<C> bce_row(C x, C y) {
  const Logistic<C> p = logistic<M>(x);
  // The straight parts cancel before the tail is added; the slope is sigmoid(x) - y without cancellation.
  return {positive(x) - x * y + p.tail, (C{1} - y) * p.plus - y * p.minus};
}

// ESMM (Ma et al., SIGIR 2018, eq. 3): cross entropy of the click and, times `weight`, of click-and-conversion, whose
// probability is sigmoid(a) sigmoid(c).
template <class C>
struct EsmmRow {
  C loss, da, dc;
};

template <class M, class C>
MTL_ROW EsmmRow<C> esmm_row(C a, C c, C click, C conversion, C weight) {
  const C w = click * conversion;
  const Logistic<C> pa = logistic<M>(a), pc = logistic<M>(c);
  const C minus_log_a = positive(-a) + pa.tail, minus_log_c = positive(-c) + pc.tail;  // -log sigmoid
  const C softplus_a = positive(a) + pa.tail, softplus_c = positive(c) + pc.tail;
  // 1 - sigmoid(a) sigmoid(c) = sigmoid(-a) + sigmoid(a) sigmoid(-c): no click, or a click without conversion. The
  // logarithms of the two differ by d = softplus(c) - a, in which large logits cancel before the tail is added; so q,
  // that of their sum, is the larger one plus a tail, and sigmoid(d) is the share of the first.
  const Logistic<C> share = logistic<M>(positive(c) - a + pc.tail);
  const C no_click = -softplus_a, no_conversion = -(minus_log_a + softplus_c);
  const C q = -positive(-((no_click > no_conversion ? no_click : no_conversion) + share.tail));  // never above 0
  EsmmRow<C> row;
  row.loss = positive(a) - a * click + pa.tail + weight * (w * (minus_log_a + minus_log_c) - (C{1} - w) * q);
  row.da = (C{1} - click) * pa.plus - click * pa.minus +
           weight * ((C{1} - w) * (pa.plus * pc.plus * share.plus) - w * pa.minus);
  row.dc = weight * ((C{1} - w) * (pc.plus * share.minus) - w * pc.minus);
  return row;
}

}  // namespace mtl
