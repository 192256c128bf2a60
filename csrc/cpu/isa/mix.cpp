// mix for one instruction set: one batch row at a time, its experts read from memory once for all tasks.
//
// A row's experts (E * D numbers, 8 KiB at E=16, D=128) stay in L1 while up to four tasks at a time pass over them.
#include "../mix_kernels.h"

#include <algorithm>

#include "../ahead.h"
#include "activate.h"
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
    const int64_t routes = plan.uses.index.size();
    return std::max<int64_t>(plan.logit_cols, routes) + 3 * routes + 2 * plan.experts * plan.width +
           plan.rows * (2 * plan.width + 1);
  }
  Memory(const MixPlan& plan, void* memory) {
    const int64_t routes = plan.uses.index.size();
    C* next = static_cast<C*>(memory);
    const auto take = [&](int64_t n) {
      C* taken = next;
      next += n;
      return taken;
    };
    experts = take(plan.experts * plan.width), out = take(plan.rows * (plan.width + 1));
    grad = take(plan.rows * plan.width), dexperts = take(plan.experts * plan.width);
    logits = take(std::max<int64_t>(plan.logit_cols, routes)), p = take(routes), a = take(routes), da = take(routes);
  }
};

// What the next batch row reads is fetched while this row is worked on: without it, reading and computing took turns,
// at half the machine's bandwidth.
template <class S>
void add_experts(Ahead& ahead, const MixArgs& args, int64_t b) {
  const MixPlan& plan = *args.plan;
  if (args.expert_stride == plan.width && plan.experts * plan.width > 0)
    add(ahead, static_cast<const S*>(args.experts) + b * args.batch_stride, 0, 1,
        plan.experts * plan.width * int64_t(sizeof(S)));
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
  const int64_t routes = plan.uses.index.size();
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
    const int64_t begin = plan.uses.begin[t], end = plan.uses.begin[t + 1];
    const C top = largest(from + begin, end - begin);
    if (lse) lse[t] = top;
    for (int64_t r = begin; r < end; ++r) m.p[r] = from[r] - top;
  }
  for (int64_t r = 0; r < routes; ++r) m.p[r] = exponential(m.p[r]);
  for (int64_t t = 0; t < plan.rows; ++t) {
    const int64_t begin = plan.uses.begin[t], end = plan.uses.begin[t + 1];
    const C sum = dot<C>(m.p + begin, nullptr, end - begin), scale = C{1} / sum;
    for (int64_t r = begin; r < end; ++r) m.p[r] *= scale;
    if (lse && begin < end) lse[t] += std::log(sum);
  }
  if (fixed)
    for (int64_t r = 0; r < routes; ++r) m.a[r] = m.p[r] + fixed[r];
  else
    std::copy_n(m.p, routes, m.a);
}

// n rows with the same inputs: out[i] = sum of a * h. Row i's weights begin at first[i].
template <int n, class C>
void mix_rows(int64_t width, const int32_t* index, int64_t count, const int64_t* first, const C* a, const C* h,
              int64_t stride, C* const* out, Ahead& ahead) {
  constexpr int lanes = kLanes<C>;
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    Vector<C> sum[n][2] = {};
    ask<3>(ahead);
    for (int64_t j = 0; j < count; ++j) {
      const C* row = h + index[j] * stride + d;
      const Vector<C> h0 = load(row), h1 = load(row + lanes);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        sum[i][0] += a[first[i] + j] * h0;
        sum[i][1] += a[first[i] + j] * h1;
      }
    }
    for (int i = 0; i < n; ++i) store(out[i] + d, sum[i][0]), store(out[i] + d + lanes, sum[i][1]);
  }
  for (; d < width; ++d) {
    for (int i = 0; i < n; ++i) {
      C sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += a[first[i] + j] * h[index[j] * stride + d];
      out[i][d] = sum;
    }
  }
}

// All rows of `lists`: the outputs from the experts, or, with rows and inputs changing places, the experts' gradients
// from the outputs'. Rows without inputs are 0.
template <class C>
void mix_lists(const Lists& lists, int64_t width, const C* a, const C* h, int64_t stride, C* out, Ahead& ahead) {
  for (int64_t t = 0; t < lists.rows();) {
    int n = 1;
    while (n < kTasks && t + n < lists.rows() && lists.leader[t + n] == lists.leader[t]) ++n;
    int64_t first[kTasks];
    C* to[kTasks];
    for (int i = 0; i < n; ++i) first[i] = lists.begin[t + i], to[i] = out + (t + i) * width;
    const int64_t count = lists.begin[t + 1] - lists.begin[t];
    const int32_t* index = lists.index.data() + first[0];
    switch (n) {
      case 1:
        mix_rows<1>(width, index, count, first, a, h, stride, to, ahead);
        break;
      case 2:
        mix_rows<2>(width, index, count, first, a, h, stride, to, ahead);
        break;
      case 3:
        mix_rows<3>(width, index, count, first, a, h, stride, to, ahead);
        break;
      default:
        mix_rows<4>(width, index, count, first, a, h, stride, to, ahead);
    }
    t += n;
  }
}

template <class C>
int64_t points_of(const Lists& lists, int64_t width) {
  return (lists.rows() + kTasks - 1) / kTasks * (width / (2 * kLanes<C>));
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
      weights_of_row(args, b, m, args.lse ? static_cast<C*>(args.lse) + b * plan.rows : nullptr);
      Ahead ahead;
      if (b + 1 < end) add_experts<S>(ahead, args, b + 1);
      spread(ahead, points_of<C>(plan.uses, plan.width));
      mix_lists(plan.uses, plan.width, m.a, h, stride, out, ahead);
    }
    if constexpr (!std::is_same_v<S, C>)
      narrow(out, to, out_size);
    else if (args.stream)
      stream(out, to, out_size);
  }
  streamed();
}

// da[i] = <grad[i], h> for n users of one expert.
template <int n, class C>
void dots(int64_t width, const C* h, const C* const* grad, C* da) {
  constexpr int lanes = kLanes<C>;
  Vector<C> sum[n][2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    const Vector<C> h0 = load(h + d), h1 = load(h + d + lanes);
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      sum[i][0] += load(grad[i] + d) * h0;
      sum[i][1] += load(grad[i] + d + lanes) * h1;
    }
  }
  totals<n>(sum, da);
  for (; d < width; ++d)
    for (int i = 0; i < n; ++i) da[i] += grad[i][d] * h[d];
}

// m.da = <grad, h> of every route.
template <class C>
void dots_of_row(const MixPlan& plan, const Memory<C>& m, const C* h, int64_t stride, const C* grad,
                 int64_t grad_stride) {
  for (int64_t e = 0; e < plan.experts; ++e) {
    const int64_t end = plan.users.begin[e + 1];
    for (int64_t u = plan.users.begin[e]; u < end; u += kTasks) {
      const int n = int(std::min<int64_t>(kTasks, end - u));
      const C* g[kTasks];
      C da[kTasks];
      for (int i = 0; i < n; ++i) g[i] = grad + plan.users.index[u + i] * grad_stride;
      switch (n) {
        case 1:
          dots<1>(plan.width, h + e * stride, g, da);
          break;
        case 2:
          dots<2>(plan.width, h + e * stride, g, da);
          break;
        case 3:
          dots<3>(plan.width, h + e * stride, g, da);
          break;
        default:
          dots<4>(plan.width, h + e * stride, g, da);
      }
      for (int i = 0; i < n; ++i) m.da[plan.route[u + i]] = da[i];
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
    const int64_t begin = plan.uses.begin[t], end = plan.uses.begin[t + 1];
    C sum = dot<C>(m.p + begin, m.da + begin, end - begin);
    if (grad_lse) sum -= grad_lse[b * plan.rows + t];
    for (int64_t r = begin; r < end; ++r) to[r] = m.p[r] * (m.da[r] - sum);
  }
  if (!plan.dense) {
    std::fill_n(m.logits, plan.logit_cols, C{0});
    for (size_t r = 0; r < plan.uses.index.size(); ++r) m.logits[plan.column[r]] = to[r];
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
  const int64_t routes = plan.uses.index.size(), size = plan.experts * plan.width;
  C* dfixed = static_cast<C*>(args.dfixed);
  for (int64_t b = begin; b < end; ++b) {
    int64_t stride = args.expert_stride, grad_stride = plan.width;
    const C* h = rows_of(static_cast<const S*>(args.experts) + b * args.batch_stride, plan.experts, plan.width, stride,
                         m.experts);
    const C* grad = rows_of(static_cast<const S*>(args.grad) + b * plan.rows * plan.width, plan.rows, plan.width,
                            grad_stride, m.grad);
    S* to = args.dexperts ? static_cast<S*>(args.dexperts) + b * size : nullptr;
    C* dh = m.dexperts;
    if constexpr (std::is_same_v<S, C>) dh = to && !args.stream && !args.into ? to : dh;
    if (plan.by_channel) {
      gradient_by_channel(args, h, stride, grad, grad_stride, dh);
    } else {
      weights_of_row<C>(args, b, m, nullptr);
      Ahead ahead;
      if (b + 1 < end) {
        const int64_t grads = plan.rows * plan.width;
        add_experts<S>(ahead, args, b + 1);
        add(ahead, static_cast<const S*>(args.grad) + (b + 1) * grads, 0, 1, grads * int64_t(sizeof(S)));
      }
      spread(ahead, points_of<C>(plan.users, plan.width));
      if (args.dexperts) {
        for (int64_t u = 0; u < routes; ++u) m.logits[u] = m.a[plan.route[u]];
        mix_lists(plan.users, plan.width, m.logits, grad, grad_stride, dh, ahead);
      }
      dots_of_row(plan, m, h, stride, grad, grad_stride);
      if (args.dlogits) gradient_of_logits(args, b, m);
      if (dfixed)
        for (int64_t r = 0; r < routes; ++r) dfixed[r] += m.da[r];
    }
    if (args.into) {
      gradient_into(args.through, dh, to, size);
    } else if constexpr (!std::is_same_v<S, C>) {
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
