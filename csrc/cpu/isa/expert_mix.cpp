// expert_mix for one instruction set: weights, mix and gradients of a few experts whose outputs lie in the cache.
#include "../expert_mix_kernels.h"

#include <algorithm>

#include "activate.h"
#include "reduce.h"

namespace mtl::MTL_ISA {

namespace {

constexpr int kTasks = 4;  // tasks that share one load of an expert: 4 x 2 sums and 2 loads fit any register file

// A loop's last few numbers, short of a vector, may round otherwise than the rest, and then a row's result would depend
// on its place among the others. So loops over several rows run on to a whole vector; the buffers have room.
constexpr int64_t whole(int64_t n) { return (n + 15) / 16 * 16; }

template <class F>
void with_storage(Storage type, const F& f) {
  switch (type) {
    case Storage::kDouble:
      return f(double{});
    case Storage::kFloat:
      return f(float{});
    case Storage::kBFloat16:
      return f(BFloat16{});
    case Storage::kHalf:
      return f(Half{});
  }
}

// Calls f<n>() with n as a constant, 1 to kTasks.
template <class F>
void with_tasks(int n, const F& f) {
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, kTasks>{});
  }
}

// p = the exponentials of batch row b's logits less the largest of their output row. `row` holds the logits.
template <class C>
void exponentials(const Gates& g, const Routing& all, int64_t b, C* row, C* p, C* top) {
  with_storage(g.logits_type,
               [&](auto s) { widen(static_cast<const decltype(s)*>(g.logits) + b * g.columns, row, g.columns); });
  for (int64_t t = 0; t < all.uses.rows(); ++t) {
    const int64_t begin = all.uses.begin[t], end = all.uses.begin[t + 1];
    for (int64_t r = begin; r < end; ++r) p[r] = row[all.column[r]];
    top[t] = largest(p + begin, end - begin);
    for (int64_t r = begin; r < end; ++r) p[r] -= top[t];
  }
  for (int64_t r = 0; r < all.routes(); ++r) p[r] = exponential(p[r]);
}

template <class C>
void normalise(const Gates& g, const Routing& all, int64_t begin, int64_t end, void* memory) {
  C *row = static_cast<C*>(memory), *p = row + g.columns;
  const int64_t tasks = all.uses.rows();
  for (int64_t b = begin; b < end; ++b) {
    C *top = static_cast<C*>(g.top) + b * tasks, *inverse = static_cast<C*>(g.inverse) + b * tasks;
    exponentials(g, all, b, row, p, top);
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t first = all.uses.begin[t], count = all.uses.begin[t + 1] - first;
      const C sum = dot<C>(p + first, nullptr, count);
      inverse[t] = C{1} / sum;
      if (g.lse) static_cast<C*>(g.lse)[b * tasks + t] = count > 0 ? top[t] + std::log(sum) : top[t];
    }
  }
}

// to[r] = the logit of route r less its output row's largest.
template <class S, class C>
inline void less_top(const Routing& set, const S* row, const C* top, C* to) {
  for (int64_t t = 0; t < set.uses.rows(); ++t) {
    const int64_t begin = set.uses.begin[t], end = set.uses.begin[t + 1];
    if (set.adjacent[t])
      for (int64_t r = begin; r < end; ++r) to[r] = static_cast<C>(row[set.column[begin] + r - begin]) - top[t];
    else
      for (int64_t r = begin; r < end; ++r) to[r] = static_cast<C>(row[set.column[r]]) - top[t];
  }
}

template <class C>
void weights(const Gates& g, const Routing& set, int64_t begin, int64_t end, void* out) {
  C* a = static_cast<C*>(out);
  const C* fixed = static_cast<const C*>(g.fixed);
  const int64_t tasks = set.uses.rows(), routes = set.routes(), count = (end - begin) * routes;
  if (!g.softmax) {
    for (int64_t i = 0; i < count; i += routes)
      for (int64_t r = 0; r < routes; ++r) a[i + r] = fixed[set.column[r]];
    return;
  }
  with_storage(g.logits_type, [&](auto s) {
    const auto* row = static_cast<const decltype(s)*>(g.logits) + begin * g.columns;
    const C* top = static_cast<const C*>(g.top) + begin * tasks;
    for (C* to = a; to < a + count; to += routes, row += g.columns, top += tasks) less_top(set, row, top, to);
  });
  // One exponential loop over all rows: a row alone may be shorter than a vector.
  for (int64_t i = 0, all = whole(count); i < all; ++i) a[i] = exponential(a[i]);
  const C* inverse = static_cast<const C*>(g.inverse) + begin * tasks;
  for (C* to = a; to < a + count; to += routes, inverse += tasks) {
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t r = set.uses.begin[t]; r < set.uses.begin[t + 1]; ++r) to[r] *= inverse[t];
    if (fixed)
      for (int64_t r = 0; r < routes; ++r) to[r] += fixed[set.column[r]];
  }
}

// n output rows with the same `count` experts: out[i] (+)= sum of a * h. Row i's weights begin at a + i * count.
template <int n, class C>
void mix_rows(int64_t width, const int32_t* index, int64_t count, const C* a, const C* h, C* out, bool add) {
  constexpr int lanes = kLanes<C>;
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    Vector<C> sum[n][2] = {};
    if (add)
      for (int i = 0; i < n; ++i) {
        sum[i][0] = load(out + i * width + d);
        sum[i][1] = load(out + i * width + d + lanes);
      }
    for (int64_t j = 0; j < count; ++j) {
      const C* row = h + index[j] * width + d;
      const Vector<C> h0 = load(row), h1 = load(row + lanes);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        const C weight = a[i * count + j];
        sum[i][0] += weight * h0, sum[i][1] += weight * h1;
      }
    }
    for (int i = 0; i < n; ++i) store(out + i * width + d, sum[i][0]), store(out + i * width + d + lanes, sum[i][1]);
  }
  for (; d < width; ++d) {
    for (int i = 0; i < n; ++i) {
      C sum = add ? out[i * width + d] : C{0};
      for (int64_t j = 0; j < count; ++j) sum += a[i * count + j] * h[index[j] * width + d];
      out[i * width + d] = sum;
    }
  }
}

template <class C>
void mix(const Routing& set, int64_t rows, int64_t width, const void* a_in, const void* h_in, void* out_in, bool add) {
  const Lists& uses = set.uses;
  const C *a = static_cast<const C*>(a_in), *h = static_cast<const C*>(h_in);
  C* out = static_cast<C*>(out_in);
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t t = 0; t < uses.rows();) {
      int n = 1;
      while (n < kTasks && t + n < uses.rows() && uses.leader[t + n] == uses.leader[t]) ++n;
      const int64_t first = uses.begin[t], count = uses.begin[t + 1] - first;
      if (count > 0 || !add) {
        with_tasks(n, [&](auto tasks) {
          mix_rows<tasks.value>(width, uses.index.data() + first, count, a + first, h, out + t * width, add);
        });
      }
      t += n;
    }
    a += set.routes(), h += set.users.rows() * width, out += uses.rows() * width;
  }
}

// n users of one expert, one pass over their gradients for both: dh (+)= sum of a * grad, da[i] = <grad[i], h>.
template <int n, class C>
void gradients_of_users(int64_t width, const C* a, const C* h, const C* const* grad, C* dh, bool add, C* da) {
  constexpr int lanes = kLanes<C>;
  Vector<C> sum[n][2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    const Vector<C> h0 = load(h + d), h1 = load(h + d + lanes);
    Vector<C> d0 = add ? load(dh + d) : Vector<C>{}, d1 = add ? load(dh + d + lanes) : Vector<C>{};
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      const Vector<C> g0 = load(grad[i] + d), g1 = load(grad[i] + d + lanes);
      sum[i][0] += g0 * h0, sum[i][1] += g1 * h1;
      d0 += a[i] * g0, d1 += a[i] * g1;
    }
    store(dh + d, d0), store(dh + d + lanes, d1);
  }
  totals<n>(sum, da);
  for (; d < width; ++d) {
    C sum_d = add ? dh[d] : C{0};
    for (int i = 0; i < n; ++i) da[i] += grad[i][d] * h[d], sum_d += a[i] * grad[i][d];
    dh[d] = sum_d;
  }
}

template <class C>
void gradients(const Routing& set, int64_t rows, int64_t width, const void* a_in, const void* h_in, const void* grad_in,
               void* dh_in, void* da_in, int64_t columns) {
  const C *a = static_cast<const C*>(a_in), *h = static_cast<const C*>(h_in), *grad = static_cast<const C*>(grad_in);
  C *dh = static_cast<C*>(dh_in), *da = static_cast<C*>(da_in);
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t e = 0; e < set.users.rows(); ++e, h += width, dh += width) {
      const int64_t begin = set.users.begin[e], end = set.users.begin[e + 1];
      for (int64_t u = begin; u < end; u += kTasks) {
        const int n = int(std::min<int64_t>(kTasks, end - u));
        C weight[kTasks], found[kTasks];
        const C* from[kTasks];
        for (int i = 0; i < n; ++i) {
          weight[i] = a[set.route[u + i]];
          from[i] = grad + set.users.index[u + i] * width;
        }
        with_tasks(n,
                   [&](auto tasks) { gradients_of_users<tasks.value>(width, weight, h, from, dh, u > begin, found); });
        for (int i = 0; i < n; ++i) da[set.column[set.route[u + i]]] = found[i];
      }
    }
    a += set.routes(), grad += set.uses.rows() * width, da += columns;
  }
}

template <class C>
void outputs(Activation activation, const void* z, void* h, int64_t n) {
  std::copy_n(static_cast<const C*>(z), n, static_cast<C*>(h));
  activate(activation, static_cast<C*>(h), whole(n));
}

template <class C>
void through(Activation activation, const void* saved, void* grad, int64_t n) {
  C* g = static_cast<C*>(grad);
  activation_gradient(activation, g, static_cast<const C*>(saved), g, whole(n));
}

// dlogits = P (dA - sum P dA) + P dlse: P, not A, for the fixed weights have no softmax behind them.
template <class C>
void logits_gradient(const Gates& g, const Routing& all, int64_t begin, int64_t end, const void* da_in,
                     const void* grad_lse, void* dlogits, void* memory) {
  C *row = static_cast<C*>(memory), *p = row + g.columns;
  const int64_t tasks = all.uses.rows();
  for (int64_t b = begin; b < end; ++b) {
    const C *da = static_cast<const C*>(da_in) + b * g.columns, *inverse = static_cast<const C*>(g.inverse) + b * tasks;
    exponentials(g, all, b, row, p, static_cast<C*>(g.top) + b * tasks);
    std::fill_n(row, g.columns, C{0});
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t first = all.uses.begin[t], last = all.uses.begin[t + 1];
      C sum = 0;
      for (int64_t r = first; r < last; ++r) p[r] *= inverse[t], sum += p[r] * da[all.column[r]];
      if (grad_lse) sum -= static_cast<const C*>(grad_lse)[b * tasks + t];
      for (int64_t r = first; r < last; ++r) row[all.column[r]] = p[r] * (da[all.column[r]] - sum);
    }
    with_storage(g.logits_type,
                 [&](auto s) { narrow(row, static_cast<decltype(s)*>(dlogits) + b * g.columns, g.columns); });
  }
}

template <class C>
constexpr ExpertMixKernels kernels_of() {
  return {normalise<C>, weights<C>, mix<C>, gradients<C>, outputs<C>, through<C>, logits_gradient<C>};
}

}  // namespace

extern const ExpertMixTable expert_mix_kernels = {kernels_of<float>(), kernels_of<double>()};

}  // namespace mtl::MTL_ISA
