// partitioned_norm for one instruction set: sweeps over chunks of rows of one domain.
#include "../partitioned_norm_kernels.h"

#include <algorithm>

#include "vector.h"

namespace mtl::MTL_ISA {

namespace {

constexpr int64_t kGroup = 4;   // rows that share a load of a column's sums or coefficients
constexpr int64_t kArrays = 4;  // of one number a column

template <class V, class C>
inline V get(const C* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V, class C>
inline void put(C* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// f<V>(j) for n columns: V is a vector of them, and a single number for the last few.
template <class C, class F>
inline void for_columns(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<C> <= n; j += kLanes<C>) f.template operator()<Vector<C>>(j);
  for (; j < n; ++j) f.template operator()<C>(j);
}

// One chunk or domain, one block of columns.
template <class S>
class Task {
 public:
  using C = SumOf<S>;
  static constexpr std::size_t kBytes = (3 * kGroup + kArrays) * kNormColumns * sizeof(C);

  Task(const NormArgs& args, const NormDomain& domain, int64_t block, void* memory)
      : args(args),
        domain(domain),
        columns(std::min(args.width - block * kNormColumns, kNormColumns)),
        column_(block * kNormColumns),
        memory_(static_cast<C*>(memory)) {}

  const NormArgs& args;
  const NormDomain& domain;
  const int64_t columns;

  const NormChunk& chunk(int64_t i) const { return args.plan->chunks[i]; }
  // Numbers of this block: scratch, of a [D] tensor, of a [P,D] tensor, of a chunk's partial results.
  C* array(int64_t i) const { return memory_ + (3 * kGroup + i) * kNormColumns; }
  const C* shared(const void* base) const { return static_cast<const C*>(base) + column_; }
  const C* own(const void* base) const { return static_cast<const C*>(base) + domain.id * args.width + column_; }
  C* own(void* base) const { return static_cast<C*>(base) + domain.id * args.width + column_; }
  C* partial(int64_t chunk, int64_t which) const {
    return static_cast<C*>(args.partial) + (2 * chunk + which) * args.width + column_;
  }

  // f<n>(rows) for the rows of a chunk, kGroup at a time and the last ones singly.
  template <class F>
  void for_rows(int64_t chunk, const F& f) const {
    const int64_t* row = args.plan->rows.data() + args.plan->chunks[chunk].begin;
    const int64_t* end = args.plan->rows.data() + args.plan->chunks[chunk].end;
    for (; row + kGroup <= end; row += kGroup) f.template operator()<kGroup>(row);
    for (; row < end; ++row) f.template operator()<1>(row);
  }

  // Rows in the type of sums: where they lie, or widened. grad goes beside x.
  template <int64_t n>
  void x_rows(const int64_t* row, const C** x) const {
    for (int64_t r = 0; r < n; ++r) x[r] = widened(args.x, row[r] * args.x_row, r);
  }
  template <int64_t n>
  void grad_rows(const int64_t* row, const C** g) const {
    for (int64_t r = 0; r < n; ++r) g[r] = widened(args.grad, row[r] * args.grad_row, kGroup + r);
  }
  // Where to write rows of out, and what is to be done afterwards.
  template <int64_t n>
  void out_rows(const int64_t* row, C** y) const {
    for (int64_t r = 0; r < n; ++r) {
      if constexpr (std::is_same_v<S, C>)
        y[r] = out(row[r]);
      else
        y[r] = memory_ + (2 * kGroup + r) * kNormColumns;
    }
  }
  template <int64_t n>
  void store_rows(const int64_t* row, C** y) const {
    if constexpr (!std::is_same_v<S, C>)
      for (int64_t r = 0; r < n; ++r) narrow(y[r], out(row[r]), columns);
  }

  // The domain's first row, which stands for its mean until that is known: beside a large common offset, differences
  // keep the digits that sums of the numbers themselves would lose.
  const C* shift() const {
    const C* x = widened(args.x, args.plan->rows[chunk(domain.first).begin] * args.x_row, 0);
    if constexpr (!std::is_same_v<S, C>) {  // out of the way of the rows to come
      std::copy_n(x, columns, array(kArrays - 1));
      x = array(kArrays - 1);
    }
    return x;
  }

 private:
  S* out(int64_t row) const { return static_cast<S*>(args.out) + row * args.width + column_; }
  const C* widened(const void* base, int64_t offset, int64_t room) const {
    const S* at = static_cast<const S*>(base) + offset + column_;
    if constexpr (std::is_same_v<S, C>) {
      return at;
    } else {
      widen(at, memory_ + room * kNormColumns, columns);
      return memory_ + room * kNormColumns;
    }
  }

  const int64_t column_;
  C* const memory_;
};

// Mean of x - shift over a chunk, and the sum of squares about that mean; the second look finds the rows in a cache.
template <class S>
void chunk_statistics(const Task<S>& task, int64_t c) {
  using C = SumOf<S>;
  C *mean = task.partial(c, 0), *squares = task.partial(c, 1);
  const C *shift = task.shift(), inverse = C(1) / C(task.chunk(c).end - task.chunk(c).begin);
  std::fill_n(mean, task.columns, C(0));
  std::fill_n(squares, task.columns, C(0));
  task.for_rows(c, [&]<int64_t n>(const int64_t* rows) {
    const C* x[n];
    task.template x_rows<n>(rows, x);
    for_columns<C>(task.columns, [&]<class V>(int64_t j) {
      V sum = get<V>(mean + j);
      const V s = get<V>(shift + j);
      for (int64_t r = 0; r < n; ++r) sum += get<V>(x[r] + j) - s;
      put(mean + j, sum);
    });
  });
  for (int64_t j = 0; j < task.columns; ++j) mean[j] *= inverse;
  task.for_rows(c, [&]<int64_t n>(const int64_t* rows) {
    const C* x[n];
    task.template x_rows<n>(rows, x);
    for_columns<C>(task.columns, [&]<class V>(int64_t j) {
      V sum = get<V>(squares + j);
      const V s = get<V>(shift + j), m = get<V>(mean + j);
      for (int64_t r = 0; r < n; ++r) {
        const V d = get<V>(x[r] + j) - s - m;
        sum += d * d;
      }
      put(squares + j, sum);
    });
  });
}

// The chunks' statistics to the domain's, chunk by chunk and in double: the merge of Chan, Golub and LeVeque (1979).
template <class S>
void merge_statistics(const Task<S>& task) {
  using C = SumOf<S>;
  double mean[kNormColumns] = {}, squares[kNormColumns] = {}, n = 0;
  for (int64_t c = task.domain.first; c < task.domain.first + task.domain.chunks; ++c) {
    const double k = double(task.chunk(c).end - task.chunk(c).begin), share = k / (n + k), cross = n * share;
    const C *m = task.partial(c, 0), *q = task.partial(c, 1);
    for (int64_t j = 0; j < task.columns; ++j) {
      const double delta = m[j] - mean[j];
      mean[j] += share * delta;
      squares[j] += q[j] + cross * delta * delta;
    }
    n += k;
  }
  const C* shift = task.shift();
  C *to_mean = task.own(task.args.mean), *to_var = task.own(task.args.var);
  for (int64_t j = 0; j < task.columns; ++j) {
    to_mean[j] = C(shift[j] + mean[j]);
    to_var[j] = C(squares[j] / n);
  }
}

// 1 / sqrt(var + eps), and that times both weights.
template <class S, class C = SumOf<S>>
void scales(const Task<S>& task, C* rstd, C* scale) {
  const C *var = task.own(task.args.var), *w = task.shared(task.args.weight), *wp = task.own(task.args.domain_weight);
  const C eps = C(task.args.eps);
  for (int64_t j = 0; j < task.columns; ++j) {
    rstd[j] = C(1) / std::sqrt(var[j] + eps);
    scale[j] = w[j] * wp[j] * rstd[j];
  }
}

template <class S>
void normalise(const Task<S>& task, int64_t c) {
  using C = SumOf<S>;
  C *rstd = task.array(0), *scale = task.array(1), *move = task.array(2);
  scales(task, rstd, scale);
  const C *mean = task.own(task.args.mean), *b = task.shared(task.args.bias), *bp = task.own(task.args.domain_bias);
  for (int64_t j = 0; j < task.columns; ++j) move[j] = b[j] + bp[j];
  task.for_rows(c, [&]<int64_t n>(const int64_t* rows) {
    const C* x[n];
    C* y[n];
    task.template x_rows<n>(rows, x);
    task.template out_rows<n>(rows, y);
    for_columns<C>(task.columns, [&]<class V>(int64_t j) {
      const V m = get<V>(mean + j), s = get<V>(scale + j), t = get<V>(move + j);
      for (int64_t r = 0; r < n; ++r) put(y[r] + j, (get<V>(x[r] + j) - m) * s + t);
    });
    task.template store_rows<n>(rows, y);
  });
}

// Sums of grad and of grad * (x - mean) over a chunk.
template <class S>
void chunk_sums(const Task<S>& task, int64_t c) {
  using C = SumOf<S>;
  C *sum = task.partial(c, 0), *product = task.partial(c, 1);
  const C* mean = task.own(task.args.mean);
  std::fill_n(sum, task.columns, C(0));
  std::fill_n(product, task.columns, C(0));
  task.for_rows(c, [&]<int64_t n>(const int64_t* rows) {
    const C *x[n], *g[n];
    task.template x_rows<n>(rows, x);
    task.template grad_rows<n>(rows, g);
    for_columns<C>(task.columns, [&]<class V>(int64_t j) {
      V s = get<V>(sum + j), p = get<V>(product + j);
      const V m = get<V>(mean + j);
      for (int64_t r = 0; r < n; ++r) {
        const V grad = get<V>(g[r] + j);
        s += grad;
        p += grad * (get<V>(x[r] + j) - m);
      }
      put(sum + j, s);
      put(product + j, p);
    });
  });
}

// The chunks' sums to the domain's, in double, for their terms largely cancel; product becomes that of grad and xhat.
template <class S>
void merge_sums(const Task<S>& task) {
  using C = SumOf<S>;
  C *rstd = task.array(0), *scale = task.array(1);
  scales(task, rstd, scale);
  double sum[kNormColumns] = {}, product[kNormColumns] = {};
  for (int64_t c = task.domain.first; c < task.domain.first + task.domain.chunks; ++c) {
    const C *s = task.partial(c, 0), *p = task.partial(c, 1);
    for (int64_t j = 0; j < task.columns; ++j) {
      sum[j] += s[j];
      product[j] += p[j];
    }
  }
  C *to_sum = task.own(task.args.sum), *to_product = task.own(task.args.product);
  for (int64_t j = 0; j < task.columns; ++j) {
    to_sum[j] = C(sum[j]);
    to_product[j] = C(product[j] * rstd[j]);
  }
}

// dx = scale (grad - mean(grad) - xhat mean(grad xhat)); with constant statistics scale grad alone.
template <class S>
void gradient(const Task<S>& task, int64_t c) {
  using C = SumOf<S>;
  C *slope = task.array(0), *scale = task.array(1), *middle = task.array(2);
  scales(task, slope, scale);
  const C* mean = task.own(task.args.mean);
  if (task.domain.batch) {
    const C inverse = C(1) / C(task.domain.rows);
    const C *sum = task.own(task.args.sum), *product = task.own(task.args.product);
    for (int64_t j = 0; j < task.columns; ++j) {
      slope[j] *= product[j] * inverse;
      middle[j] = sum[j] * inverse;
    }
  }
  task.for_rows(c, [&]<int64_t n>(const int64_t* rows) {
    const C *x[n], *g[n];
    C* dx[n];
    task.template grad_rows<n>(rows, g);
    task.template out_rows<n>(rows, dx);
    if (task.domain.batch) {
      task.template x_rows<n>(rows, x);
      for_columns<C>(task.columns, [&]<class V>(int64_t j) {
        const V m = get<V>(mean + j), a = get<V>(scale + j), k = get<V>(slope + j), t = get<V>(middle + j);
        for (int64_t r = 0; r < n; ++r) put(dx[r] + j, a * (get<V>(g[r] + j) - t - (get<V>(x[r] + j) - m) * k));
      });
    } else {
      for_columns<C>(task.columns, [&]<class V>(int64_t j) {
        const V a = get<V>(scale + j);
        for (int64_t r = 0; r < n; ++r) put(dx[r] + j, a * get<V>(g[r] + j));
      });
    }
    task.template store_rows<n>(rows, dx);
  });
}

// The first sweep takes what the last one needs; the only chunk of a domain is finished on the spot.
template <class S, void (*take)(const Task<S>&, int64_t), void (*merge)(const Task<S>&),
          void (*finish)(const Task<S>&, int64_t)>
struct Sweep {
  static bool taken(const NormArgs& args, const NormDomain& domain) {
    return args.grad ? args.sum != nullptr : domain.batch;
  }
  static const NormDomain& domain_of(const NormArgs& args, int64_t chunk) {
    return args.plan->domains[args.plan->chunks[chunk].domain];
  }

  static void first(const NormArgs& args, int64_t chunk, int64_t block, void* memory) {
    const NormDomain& domain = domain_of(args, chunk);
    const Task<S> task(args, domain, block, memory);
    if (!taken(args, domain)) return;
    take(task, chunk);
    if (domain.chunks > 1) return;
    merge(task);
    if (args.out) finish(task, chunk);
  }
  static void between(const NormArgs& args, int64_t domain, int64_t block, void* memory) {
    const Task<S> task(args, args.plan->domains[domain], block, memory);
    if (taken(args, task.domain) && task.domain.chunks > 1) merge(task);
  }
  static void last(const NormArgs& args, int64_t chunk, int64_t block, void* memory) {
    const NormDomain& domain = domain_of(args, chunk);
    if (args.out && (domain.chunks > 1 || !taken(args, domain))) finish(Task<S>(args, domain, block, memory), chunk);
  }

  static constexpr NormSweep kTable = {first, between, last};
};

template <class S>
constexpr NormKernels kernels_of() {
  return {Task<S>::kBytes, Sweep<S, chunk_statistics<S>, merge_statistics<S>, normalise<S>>::kTable,
          Sweep<S, chunk_sums<S>, merge_sums<S>, gradient<S>>::kTable};
}

}  // namespace

extern const NormTable norm_kernels = {
    {kernels_of<double>(), kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()}};

}  // namespace mtl::MTL_ISA
