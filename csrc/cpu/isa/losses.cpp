// The losses for one instruction set: loss and gradient of every number in one pass.
#include "../losses_kernels.h"

#include <cfloat>

#include "../../common/losses.h"
#include "math.h"
#include "reduce.h"

namespace mtl::MTL_ISA {

namespace {

// A type of this namespace: no other instruction set's rows have the same name to the linker.
struct Math {
  template <class C>
  static inline __attribute__((always_inline)) C exp(C x) {
    return exponential(x);
  }
  template <class C>
  static inline __attribute__((always_inline)) C log1p(C x) {
    return log_one_plus(x);
  }
};

// n numbers from `at` on in the type C: where they lie, or else converted into `buffer`.
template <class C, class S>
const C* read(const S* from, C* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, C>) return from;
  widen(from, buffer, n);
  return buffer;
}

template <class C>
const C* read(Labels labels, int64_t at, C* buffer, int64_t n) {
  switch (labels.type) {
    case LabelType::kDouble:
      return read<C>(static_cast<const double*>(labels.data) + at, buffer, n);
    case LabelType::kFloat:
      return read<C>(static_cast<const float*>(labels.data) + at, buffer, n);
    case LabelType::kBFloat16:
      return read<C>(static_cast<const BFloat16*>(labels.data) + at, buffer, n);
    case LabelType::kHalf:
      return read<C>(static_cast<const Half*>(labels.data) + at, buffer, n);
    case LabelType::kByte:
      return read<C>(static_cast<const uint8_t*>(labels.data) + at, buffer, n);
    case LabelType::kInt:
      return read<C>(static_cast<const int32_t*>(labels.data) + at, buffer, n);
    case LabelType::kLong:
      return read<C>(static_cast<const int64_t*>(labels.data) + at, buffer, n);
  }
  return buffer;
}

template <class C>
inline __attribute__((always_inline)) bool esmm_bad(C click, C conversion) {
  return (!is_label(click)) | (!is_label(conversion)) | ((conversion > C{0}) & (click == C{0}));
}

template <class S>
double esmm(const EsmmArgs& args, int64_t begin, int64_t end, int64_t* bad) {
  using C = SumOf<S>;
  constexpr int64_t kChunk = 256;
  C buffers[4][kChunk], loss[kChunk];
  const C weight = C(args.weight), scale = C(args.scale);
  double sum = 0;
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = end - at < kChunk ? end - at : kChunk;
    const C* a = read<C>(static_cast<const S*>(args.ctr) + at, buffers[0], n);
    const C* c = read<C>(static_cast<const S*>(args.cvr) + at, buffers[1], n);
    const C* y = read<C>(args.click, at, buffers[2], n);
    const C* z = read<C>(args.conversion, at, buffers[3], n);
    C *da = static_cast<C*>(args.dctr) + at, *dc = static_cast<C*>(args.dcvr) + at;
    int wrong = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const EsmmRow<C> row = esmm_row<Math>(a[i], c[i], y[i], z[i], weight);
      loss[i] = row.loss;
      da[i] = row.da * scale;
      dc[i] = row.dc * scale;
      wrong |= esmm_bad(y[i], z[i]);
    }
    for (int64_t i = 0; wrong && i < n; ++i) {
      if (!esmm_bad(y[i], z[i])) continue;
      *bad = at + i;
      return 0;
    }
    sum += dot<C>(loss, nullptr, n);
  }
  return sum;
}

// Rows of `period` numbers, so that tasks keep their places and few tasks fill a vector too.
template <class C>
struct Memory {
  C *x, *y, *mask, *sums, *totals;

  Memory(int64_t period, void* memory) {
    C* next = static_cast<C*>(memory);
    for (C** part : {&x, &y, &mask, &sums, &totals}) {
      *part = next;
      next += period;
    }
  }
};

template <class C>
void fold(const C* wide, int64_t period, int64_t tasks, double* sums) {
  for (int64_t t = 0; t < tasks; ++t) {
    sums[t] = 0;
    for (int64_t j = t; j < period; j += tasks) sums[t] += wide[j];
  }
}

template <class S>
void bce(const BceArgs& args, int64_t begin, int64_t end, double* sums, int64_t* bad, void* memory) {
  using C = SumOf<S>;
  const int64_t period = args.period;
  const Memory<C> m(period, memory);
  for (int64_t j = 0; j < period; ++j) m.sums[j] = C{0}, m.mask[j] = C{1};
  for (int64_t j = 0; j < period; ++j) m.totals[j] = C(args.totals[j % args.tasks]);
  for (int64_t at = begin; at < end; at += period) {
    const int64_t n = end - at < period ? end - at : period;
    const C* x = read<C>(static_cast<const S*>(args.logits) + at, m.x, n);
    const C* y = read<C>(args.labels, at, m.y, n);
    const C* w = args.mask.data ? read<C>(args.mask, at, m.mask, n) : m.mask;
    C *dx = static_cast<C*>(args.dlogits) + at, *total = m.sums;
    const C* all = m.totals;
    int wrong = 0;
    // Whatever lies under a mask of 0 is computed too, in the same vector, and then not selected.
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const BceRow<C> row = bce_row<Math>(x[i], y[i]);
      const bool used = w[i] != C{0};
      const C share = w[i] / all[i];
      total[i] += used ? share * row.loss : C{0};
      dx[i] = used ? share * row.slope : C{0};
      wrong |= used & !is_label(y[i]);
    }
    for (int64_t i = 0; wrong && i < n; ++i) {
      if (w[i] == C{0} || is_label(y[i])) continue;
      *bad = at + i;
      return;
    }
  }
  fold(m.sums, period, args.tasks, sums);
}

template <class S>
void count(const BceArgs& args, int64_t begin, int64_t end, double* sums, int64_t* bad, void* memory) {
  using C = SumOf<S>;
  const int64_t period = args.period;
  const Memory<C> m(period, memory);
  const C largest = std::is_same_v<C, float> ? C(FLT_MAX) : C(DBL_MAX);
  for (int64_t j = 0; j < period; ++j) m.sums[j] = C{0};
  for (int64_t at = begin; at < end; at += period) {
    const int64_t n = end - at < period ? end - at : period;
    const C* w = read<C>(args.mask, at, m.mask, n);
    C* total = m.sums;
    int wrong = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      total[i] += w[i];
      wrong |= !((w[i] >= C{0}) & (w[i] <= largest));
    }
    for (int64_t i = 0; wrong && i < n; ++i) {
      if (w[i] >= C{0} && w[i] <= largest) continue;
      *bad = at + i;
      return;
    }
  }
  fold(m.sums, period, args.tasks, sums);
}

template <class S>
int64_t bce_bytes(int64_t period) {
  return 5 * period * int64_t(sizeof(SumOf<S>));
}

template <class C>
void scale(const void* grad, int64_t period, const void* from, void* to, int64_t begin, int64_t end) {
  const C *g = static_cast<const C*>(grad), *d = static_cast<const C*>(from);
  C* out = static_cast<C*>(to);
  for (int64_t at = begin; at < end; at += period) {
    const int64_t n = end - at < period ? end - at : period;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[at + i] = d[at + i] == C{0} ? C{0} : g[i] * d[at + i];
  }
}

template <class S>
constexpr LossKernels kernels_of() {
  return {esmm<S>, bce<S>, count<S>, bce_bytes<S>};
}

}  // namespace

extern const LossTable loss_kernels = {
    {kernels_of<double>(), kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()},
    {{scale<double>}, {scale<float>}}};

}  // namespace mtl::MTL_ISA
