// mix for one instruction set: one batch row at a time, its experts read from memory once for all tasks.
//
// A row's experts (E * D numbers, 8 KiB at E=16, D=128) stay in L1 while up to four tasks at a time pass over them.
#include "../mix_kernels.h"

#include <algorithm>

#include "math.h"
#include "reduce.h"

namespace mtl::MTL_ISA {

namespace {

constexpr int kTasks = 4;  // tasks that share one load of an expert: 4 x 2 sums and 2 loads fit any register file

template <class C>
void widen_any(Storage type, const void* base, int64_t at, C* dst, int64_t n) {
  switch (type) {
    case Storage::kDouble:
      return widen(static_cast<const double*>(base) + at, dst, n);
    case Storage::kFloat:
      return widen(static_cast<const float*>(base) + at, dst, n);
    case Storage::kBFloat16:
      return widen(static_cast<const BFloat16*>(base) + at, dst, n);
    case Storage::kHalf:
      return widen(static_cast<const Half*>(base) + at, dst, n);
  }
}

template <class C>
void narrow_any(Storage type, const C* src, void* base, int64_t at, int64_t n) {
  switch (type) {
    case Storage::kDouble:
      return narrow(src, static_cast<double*>(base) + at, n);
    case Storage::kFloat:
      return narrow(src, static_cast<float*>(base) + at, n);
    case Storage::kBFloat16:
      return narrow(src, static_cast<BFloat16*>(base) + at, n);
    case Storage::kHalf:
      return narrow(src, static_cast<Half*>(base) + at, n);
  }
}

// One thread's scratch: a batch row's weights and, where storage is 16 bit, its widened tensors.
template <class C>
struct Memory {
  C *logits, *p, *a, *da, *experts, *out, *grad, *dexperts;

  static int64_t numbers(const MixPlan& plan) {
    const int64_t routes = plan.expert.size();
    return plan.logit_cols + 3 * routes + 2 * plan.experts * plan.width + plan.rows * (2 * plan.width + 1);
  }
  Memory(const MixPlan& plan, void* memory) {
    const int64_t routes = plan.expert.size();
    C* next = static_cast<C*>(memory);
    const auto take = [&](int64_t n) {
      C* taken = next;
      next += n;
      return taken;
    };
    experts = take(plan.experts * plan.width), out = take(plan.rows * (plan.width + 1));
    grad = take(plan.rows * plan.width), dexperts = take(plan.experts * plan.width);
    logits = take(plan.logit_cols), p = take(routes), a = take(routes), da = take(routes);
  }
};

// The next batch row's experts, asked for a few lines at a time while this row is worked on: without it, reading and
// computing took turns, at half the machine's bandwidth.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  int64_t lines = 0;

  // `points`: how often ask() will be called.
  Ahead(const void* base, size_t bytes, int64_t points) {
    next = static_cast<const char*>(base), end = next + bytes;
    lines = int64_t(bytes) / 64 / (points > 0 ? points : 1) + 1;
  }
  void ask() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 3);
  }
};

template <class S>
Ahead next_row(const MixArgs& args, int64_t b, int64_t end, int64_t points) {
  const MixPlan& plan = *args.plan;
  const bool whole = b + 1 < end && args.expert_stride == plan.width;
  const S* base = static_cast<const S*>(args.experts) + (b + 1) * args.batch_stride;
  return Ahead(base, whole ? plan.experts * plan.width * sizeof(S) : 0, points);
}

// Rows of one batch element: in place where storage is the type of sums, else widened.
template <class S, class C>
const C* rows_of(const S* base, int64_t count, int64_t width, int64_t& stride, C* buffer) {
  if constexpr (std::is_same_v<S, C>) {
    return base;
  } else {
    for (int64_t i = 0; i < count; ++i) widen(base + i * stride, buffer + i * width, width);
    stride = width;
    return buffer;
  }
}

// m.a = softmax of the row's logits plus the fixed weights, m.p the softmax alone; lse [T], if wanted.
template <class C>
void weights_of_row(const MixArgs& args, int64_t b, const Memory<C>& m, C* lse) {
  const MixPlan& plan = *args.plan;
  const C* fixed = static_cast<const C*>(args.fixed);
  const int64_t routes = plan.expert.size();
  if (!plan.softmax) {
    std::copy_n(fixed, routes, m.a);
    return;
  }
  widen_any(args.logits_type, args.logits, b * plan.logit_cols, m.logits, plan.logit_cols);
  if (!plan.dense)
    for (int64_t r = 0; r < routes; ++r) m.p[r] = m.logits[plan.column[r]];
  const C* from = plan.dense ? m.logits : m.p;
  // One exponential loop over all rows: a row alone may be shorter than a vector.
  for (int64_t t = 0; t < plan.rows; ++t) {
    const int64_t begin = plan.begin[t], end = plan.begin[t + 1];
    const C top = largest(from + begin, end - begin);
    if (lse) lse[t] = top;
    for (int64_t r = begin; r < end; ++r) m.p[r] = from[r] - top;
  }
  for (int64_t r = 0; r < routes; ++r) m.p[r] = exponential(m.p[r]);
  for (int64_t t = 0; t < plan.rows; ++t) {
    const int64_t begin = plan.begin[t], end = plan.begin[t + 1];
    const C sum = dot<C>(m.p + begin, nullptr, end - begin), scale = C{1} / sum;
    for (int64_t r = begin; r < end; ++r) m.p[r] *= scale;
    if (lse && begin < end) lse[t] += std::log(sum);
  }
  if (fixed)
    for (int64_t r = 0; r < routes; ++r) m.a[r] = m.p[r] + fixed[r];
  else
    std::copy_n(m.p, routes, m.a);
}

// n tasks with the same experts: out[i] = sum over routes of a * h. Task i's routes begin at first[i].
template <int n, class C>
void mix_tasks(const MixPlan& plan, const int64_t* first, int64_t count, const C* a, const C* h, int64_t stride,
               C* const* out, Ahead& ahead) {
  constexpr int lanes = kLanes<C>;
  const int32_t* expert = plan.expert.data() + first[0];
  int64_t d = 0;
  for (; d + 2 * lanes <= plan.width; d += 2 * lanes) {
    Vector<C> sum[n][2] = {};
    ahead.ask();
    for (int64_t j = 0; j < count; ++j) {
      const C* row = h + expert[j] * stride + d;
      const Vector<C> h0 = load(row), h1 = load(row + lanes);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        sum[i][0] += a[first[i] + j] * h0;
        sum[i][1] += a[first[i] + j] * h1;
      }
    }
    for (int i = 0; i < n; ++i) store(out[i] + d, sum[i][0]), store(out[i] + d + lanes, sum[i][1]);
  }
  for (; d < plan.width; ++d) {
    for (int i = 0; i < n; ++i) {
      C sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += a[first[i] + j] * h[expert[j] * stride + d];
      out[i][d] = sum;
    }
  }
}

template <class C>
void mix_row(const MixPlan& plan, const C* a, const C* h, int64_t stride, C* out, Ahead ahead) {
  for (int64_t t = 0; t < plan.rows;) {
    int n = 1;
    while (n < kTasks && t + n < plan.rows && plan.leader[t + n] == plan.leader[t]) ++n;
    int64_t first[kTasks];
    C* to[kTasks];
    for (int i = 0; i < n; ++i) first[i] = plan.begin[t + i], to[i] = out + (t + i) * plan.width;
    const int64_t count = plan.begin[t + 1] - plan.begin[t];
    switch (n) {
      case 1:
        mix_tasks<1>(plan, first, count, a, h, stride, to, ahead);
        break;
      case 2:
        mix_tasks<2>(plan, first, count, a, h, stride, to, ahead);
        break;
      case 3:
        mix_tasks<3>(plan, first, count, a, h, stride, to, ahead);
        break;
      default:
        mix_tasks<4>(plan, first, count, a, h, stride, to, ahead);
    }
    t += n;
  }
}

template <class S>
void forward(const MixArgs& args, int64_t begin, int64_t end, void* memory) {
  using C = SumOf<S>;
  const MixPlan& plan = *args.plan;
  const Memory<C> m(plan, memory);
  const int64_t out_size = plan.rows * plan.width;
  for (int64_t b = begin; b < end; ++b) {
    int64_t stride = args.expert_stride;
    const C* h = rows_of(static_cast<const S*>(args.experts) + b * args.batch_stride, plan.experts, plan.width, stride,
                         m.experts);
    S* to = static_cast<S*>(args.out) + b * out_size;
    C* out = m.out;
    if constexpr (std::is_same_v<S, C>) out = args.stream ? out : to;
    if (plan.by_channel) {
      const C* c = static_cast<const C*>(args.channels);
      std::fill_n(out, out_size, C{0});
      for (int64_t t = 0; t < plan.rows; ++t)
        for (int64_t e = 0; e < plan.experts; ++e, c += plan.width)
          for (int64_t d = 0; d < plan.width; ++d) out[t * plan.width + d] += c[d] * h[e * stride + d];
    } else {
      weights_of_row(args, b, m, static_cast<C*>(args.lse) + (plan.softmax ? b * plan.rows : 0));
      const int64_t points = (plan.rows + kTasks - 1) / kTasks * (plan.width / (2 * kLanes<C>));
      mix_row(plan, m.a, h, stride, out, next_row<S>(args, b, end, points));
    }
    if constexpr (!std::is_same_v<S, C>)
      narrow(out, to, out_size);
    else if (args.stream)
      stream(out, to, out_size);
  }
  streamed();
}

// n users of one expert in one pass over d: da = <grad, h> of each, and dh (+)= sum of a * grad.
template <int n, class C>
void expert_gradient(int64_t width, const C* h, const C* const* grad, const C* a, C* da, C* dh, bool add) {
  constexpr int lanes = kLanes<C>;
  Vector<C> dot[n][2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    const Vector<C> h0 = load(h + d), h1 = load(h + d + lanes);
    Vector<C> s0 = add ? load(dh + d) : Vector<C>{}, s1 = add ? load(dh + d + lanes) : Vector<C>{};
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      const Vector<C> g0 = load(grad[i] + d), g1 = load(grad[i] + d + lanes);
      dot[i][0] += g0 * h0;
      dot[i][1] += g1 * h1;
      s0 += a[i] * g0;
      s1 += a[i] * g1;
    }
    store(dh + d, s0), store(dh + d + lanes, s1);
  }
  totals<n>(dot, da);
  for (; d < width; ++d) {
    C sum = add ? dh[d] : C{0};
    for (int i = 0; i < n; ++i) da[i] += grad[i][d] * h[d], sum += a[i] * grad[i][d];
    dh[d] = sum;
  }
}

template <class C>
void gradient_of_experts(const MixPlan& plan, const Memory<C>& m, const C* h, int64_t stride, const C* grad,
                         int64_t grad_stride, C* dh, Ahead ahead) {
  for (int64_t e = 0; e < plan.experts; ++e) {
    ahead.ask();
    C* row = dh + e * plan.width;
    const int64_t begin = plan.user_begin[e], end = plan.user_begin[e + 1];
    if (begin == end) std::fill_n(row, plan.width, C{0});
    for (int64_t u = begin; u < end; u += kTasks) {
      const int n = int(std::min<int64_t>(kTasks, end - u));
      const C* g[kTasks];
      C a[kTasks], da[kTasks];
      for (int i = 0; i < n; ++i) g[i] = grad + plan.user_row[u + i] * grad_stride, a[i] = m.a[plan.user_route[u + i]];
      const C* from = h + e * stride;
      switch (n) {
        case 1:
          expert_gradient<1>(plan.width, from, g, a, da, row, u > begin);
          break;
        case 2:
          expert_gradient<2>(plan.width, from, g, a, da, row, u > begin);
          break;
        case 3:
          expert_gradient<3>(plan.width, from, g, a, da, row, u > begin);
          break;
        default:
          expert_gradient<4>(plan.width, from, g, a, da, row, u > begin);
      }
      for (int i = 0; i < n; ++i) m.da[plan.user_route[u + i]] = da[i];
    }
  }
}

// dlogits = P (dA - sum P dA) + P dlse: P, not A, for the fixed weights have no softmax behind them.
template <class C>
void gradient_of_logits(const MixArgs& args, int64_t b, const Memory<C>& m) {
  const MixPlan& plan = *args.plan;
  const C* grad_lse = static_cast<const C*>(args.grad_lse);
  C* to = plan.dense ? m.logits : m.a;  // the row's weights have been used
  for (int64_t t = 0; t < plan.rows; ++t) {
    const int64_t begin = plan.begin[t], end = plan.begin[t + 1];
    C sum = dot<C>(m.p + begin, m.da + begin, end - begin);
    if (grad_lse) sum -= grad_lse[b * plan.rows + t];
    for (int64_t r = begin; r < end; ++r) to[r] = m.p[r] * (m.da[r] - sum);
  }
  if (!plan.dense) {
    std::fill_n(m.logits, plan.logit_cols, C{0});
    for (size_t r = 0; r < plan.expert.size(); ++r) m.logits[plan.column[r]] = to[r];
  }
  narrow_any(args.logits_type, m.logits, args.dlogits, b * plan.logit_cols, plan.logit_cols);
}

template <class C>
void gradient_by_channel(const MixArgs& args, const C* h, int64_t stride, const C* grad, int64_t grad_stride, C* dh) {
  const MixPlan& plan = *args.plan;
  const C* c = static_cast<const C*>(args.channels);
  C* dc = static_cast<C*>(args.dfixed);
  std::fill_n(dh, plan.experts * plan.width, C{0});
  for (int64_t t = 0; t < plan.rows; ++t) {
    const C* g = grad + t * grad_stride;
    for (int64_t e = 0; e < plan.experts; ++e) {
      const int64_t at = (t * plan.experts + e) * plan.width;
      for (int64_t d = 0; d < plan.width; ++d) dh[e * plan.width + d] += c[at + d] * g[d];
      if (dc)
        for (int64_t d = 0; d < plan.width; ++d) dc[at + d] += g[d] * h[e * stride + d];
    }
  }
}

template <class S>
void backward(const MixArgs& args, int64_t begin, int64_t end, void* memory) {
  using C = SumOf<S>;
  const MixPlan& plan = *args.plan;
  const Memory<C> m(plan, memory);
  const int64_t routes = plan.expert.size(), size = plan.experts * plan.width;
  C* dfixed = static_cast<C*>(args.dfixed);
  for (int64_t b = begin; b < end; ++b) {
    int64_t stride = args.expert_stride, grad_stride = plan.width;
    const C* h = rows_of(static_cast<const S*>(args.experts) + b * args.batch_stride, plan.experts, plan.width, stride,
                         m.experts);
    const C* grad = rows_of(static_cast<const S*>(args.grad) + b * plan.rows * plan.width, plan.rows, plan.width,
                            grad_stride, m.grad);
    S* to = args.dexperts ? static_cast<S*>(args.dexperts) + b * size : nullptr;
    C* dh = m.dexperts;
    if constexpr (std::is_same_v<S, C>) dh = to && !args.stream ? to : dh;
    if (plan.by_channel) {
      gradient_by_channel(args, h, stride, grad, grad_stride, dh);
    } else {
      weights_of_row<C>(args, b, m, nullptr);
      gradient_of_experts(plan, m, h, stride, grad, grad_stride, dh, next_row<S>(args, b, end, plan.experts));
      if (args.dlogits) gradient_of_logits(args, b, m);
      if (dfixed)
        for (int64_t r = 0; r < routes; ++r) dfixed[r] += m.da[r];
    }
    if constexpr (!std::is_same_v<S, C>) {
      if (to) narrow(dh, to, size);
    } else if (to && args.stream) {
      stream(dh, to, size);
    }
  }
  streamed();
}

template <class S>
constexpr MixKernels kernels_of() {
  return {[](const MixPlan& plan) { return Memory<SumOf<S>>::numbers(plan) * sizeof(SumOf<S>); }, forward<S>,
          backward<S>};
}

}  // namespace

extern const MixTable mix_kernels = {
    {kernels_of<double>(), kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()}};

}  // namespace mtl::MTL_ISA
