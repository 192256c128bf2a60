// partitioned_norm on a CPU: rows grouped by domain, chunks of rows of one domain shared out among the threads.
//
// Grouping costs a counting sort of the ids, some microseconds, and makes everything else independent of P: partial
// results take memory for the domains present alone, coefficients are worked out once a chunk, and a domain that fits a
// chunk is read once. Accumulators for every domain would take P * D numbers a block of rows.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "partitioned_norm_kernels.h"
#include "tensor.h"

namespace mtl {

namespace {

const NormKernels& kernels(const Tensor& x) {
  static const NormTable& best = MTL_BEST_ISA(norm_kernels);
  return best.by_storage[int(storage_of(x.scalar_type(), "x"))];
}

ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the type of sums.
template <class F>
void with_sum_type(const Tensor& x, const F& f) {
  if (sum_type(x) == ScalarType::Double)
    f(double{});
  else
    f(float{});
}

// A contiguous copy in the given type; the tensor itself, unless `fresh`, where it is that already.
Tensor converted(const Tensor& from, ScalarType type, const char* name, bool fresh = false) {
  const Tensor source = dense(from);
  if (source.scalar_type() == type && !fresh) return source;
  Tensor to = from.dim() == 1 ? allocate({from.size(0)}, type) : allocate({from.size(0), from.size(1)}, type);
  with_type(source.scalar_type(), name, [&](auto s) {
    with_type(type, name, [&](auto t) {
      std::transform(data<decltype(s)>(source), data<decltype(s)>(source) + source.numel(),
                     mutable_data<decltype(t)>(to), [](auto value) { return static_cast<decltype(t)>(value); });
    });
  });
  return to;
}

// Groups the rows by domain: a counting sort, so that a domain's rows keep their order.
template <class Id>
NormPlan group(const Id* domain, int64_t batch, int64_t domains) {
  NormPlan plan;
  std::vector<int64_t> begin(domains + 1, 0);
  for (int64_t b = 0; b < batch; ++b) {
    if (domain[b] < 0 || domain[b] >= domains)
      throw std::invalid_argument("domain must lie in [0, " + std::to_string(domains) + "); row " + std::to_string(b) +
                                  " has " + std::to_string(domain[b]));
    ++begin[domain[b] + 1];
  }
  for (int64_t p = 0; p < domains; ++p) begin[p + 1] += begin[p];
  for (int64_t p = 0; p < domains; ++p) {
    const int64_t rows = begin[p + 1] - begin[p], first = int64_t(plan.chunks.size());
    if (rows == 0) continue;
    for (int64_t at = begin[p]; at < begin[p + 1]; at += kNormRows)
      plan.chunks.push_back({int64_t(plan.domains.size()), at, std::min(at + kNormRows, begin[p + 1])});
    plan.domains.push_back({p, rows, first, int64_t(plan.chunks.size()) - first, false});
  }
  plan.rows.resize(batch);
  for (int64_t b = 0; b < batch; ++b) plan.rows[begin[domain[b]]++] = b;
  return plan;
}

// What forward and backward share: their plan, and the tensors in the type of sums.
struct Call {
  NormPlan plan;
  Tensor x, weight, domain_weight, partial;
  NormArgs args{};

  Call(const Tensor& x_in, const Tensor& domain, const Tensor& weight_in, const Tensor& domain_weight_in, double eps)
      : x(dense_rows(x_in)) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be [B,D]");
    const int64_t batch = x.size(0), width = x.size(1);
    STD_TORCH_CHECK(domain.dim() == 1 && domain.size(0) == batch, "domain must be [B]");
    STD_TORCH_CHECK(domain_weight_in.dim() == 2 && domain_weight_in.size(1) == width, "domain_weight must be [P,D]");
    const int64_t domains = domain_weight_in.size(0);
    STD_TORCH_CHECK(weight_in.dim() == 1 && weight_in.size(0) == width, "weight must be [D]");
    const Tensor ids = dense(domain);
    if (domain.scalar_type() == ScalarType::Long)
      plan = group(data<int64_t>(ids), batch, domains);
    else if (domain.scalar_type() == ScalarType::Int)
      plan = group(data<int32_t>(ids), batch, domains);
    else
      STD_TORCH_CHECK(false, "domain must be int64 or int32");
    weight = converted(weight_in, sum_type(x), "weight");
    domain_weight = converted(domain_weight_in, sum_type(x), "domain_weight");
    partial = allocate({int64_t(plan.chunks.size()), 2, width}, sum_type(x));
    args.width = width, args.eps = eps;
    args.x = x.const_data_ptr(), args.x_row = x.stride(0);
    args.weight = weight.const_data_ptr(), args.domain_weight = domain_weight.const_data_ptr();
    args.partial = partial.mutable_data_ptr();
  }

  void check(const Tensor& table, const char* name) const {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == domain_weight.size(0) && table.size(1) == args.width, name,
                    " must be [P,D]");
  }

  void run(const NormSweep& sweep) {
    args.plan = &plan;
    const size_t bytes = kernels(x).scratch_bytes;
    const int64_t blocks = (args.width + kNormColumns - 1) / kNormColumns;
    const double work = 4.0 * double(plan.rows.size()) * double(args.width);
    const auto over = [&](int64_t count, auto step) {
      run_tasks(count * blocks, work, [&](int64_t i) { step(args, i / blocks, i % blocks, scratch(1, bytes)); });
    };
    over(int64_t(plan.chunks.size()), sweep.first);
    over(int64_t(plan.domains.size()), sweep.merge);
    over(int64_t(plan.chunks.size()), sweep.last);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> partitioned_norm(const Tensor& x, const Tensor& domain, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& domain_weight,
                                                            const Tensor& domain_bias, const Tensor& running_mean,
                                                            const Tensor& running_var, bool training, double eps) {
  Call call(x, domain, weight, domain_weight, eps);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == call.args.width, "bias must be [D]");
  call.check(domain_bias, "domain_bias");
  call.check(running_mean, "running_mean");
  call.check(running_var, "running_var");
  const ScalarType type = sum_type(x);
  const Tensor b = converted(bias, type, "bias"), bp = converted(domain_bias, type, "domain_bias");
  Tensor mean = converted(running_mean, type, "running_mean", true);
  Tensor var = converted(running_var, type, "running_var", true);
  Tensor out = allocate({x.size(0), x.size(1)}, x.scalar_type());
  const int64_t domains[1] = {domain_weight.size(0)};
  Tensor count = torch::stable::new_empty(x, {domains, 1}, ScalarType::Long);
  std::fill_n(mutable_data<int64_t>(count), count.numel(), 0);
  for (NormDomain& d : call.plan.domains) {
    d.batch = training && d.rows >= 2;
    if (training) mutable_data<int64_t>(count)[d.id] = d.rows;
  }
  call.args.bias = b.const_data_ptr(), call.args.domain_bias = bp.const_data_ptr();
  call.args.mean = mean.mutable_data_ptr(), call.args.var = var.mutable_data_ptr();
  call.args.out = out.mutable_data_ptr();
  call.run(kernels(x).forward);
  return {out, mean, var, count};
}

// Gradients of the parameters from the domains' sums: weight, bias, domain_weight, domain_bias.
template <class C>
void parameter_gradients(const Call& call, const Tensor& sum, const Tensor& product, Tensor* const (&to)[4]) {
  const int64_t width = call.args.width, domains = call.domain_weight.size(0);
  const C *s = data<C>(sum), *q = data<C>(product), *w = data<C>(call.weight), *wp = data<C>(call.domain_weight);
  const auto fill = [&](Tensor* tensor, int64_t rows, const auto& value) {
    if (!tensor) return;
    with_type(tensor->scalar_type(), "weight", [&](auto t) {
      using T = decltype(t);
      T* at = mutable_data<T>(*tensor);
      for (int64_t p = 0; p < rows; ++p)
        for (int64_t j = 0; j < width; ++j) *at++ = static_cast<T>(static_cast<C>(value(p, j)));
    });
  };
  std::vector<double> dw(width, 0.0), db(width, 0.0);
  for (int64_t p = 0; p < domains; ++p) {
    for (int64_t j = 0; j < width; ++j) {
      dw[j] += double(wp[p * width + j]) * q[p * width + j];
      db[j] += s[p * width + j];
    }
  }
  fill(to[0], 1, [&](int64_t, int64_t j) { return dw[j]; });
  fill(to[1], 1, [&](int64_t, int64_t j) { return db[j]; });
  fill(to[2], domains, [&](int64_t p, int64_t j) { return w[j] * q[p * width + j]; });
  fill(to[3], domains, [&](int64_t p, int64_t j) { return s[p * width + j]; });
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors partitioned_norm_backward(const Tensor& grad_in, const Tensor& x, const Tensor& domain,
                                      const Tensor& weight, const Tensor& domain_weight, const Tensor& mean_in,
                                      const Tensor& var_in, const Tensor& count_in, bool training, double eps,
                                      int64_t needs) {
  Call call(x, domain, weight, domain_weight, eps);
  const int64_t width = call.args.width, domains = domain_weight.size(0);
  const Tensor grad = dense_rows(grad_in), mean = dense(mean_in), var = dense(var_in), count = dense(count_in);
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == width && grad.scalar_type() == x.scalar_type(),
      "grad must be [B,D] in x's dtype");
  call.check(mean, "mean");
  call.check(var, "var");
  STD_TORCH_CHECK(mean.scalar_type() == sum_type(x) && var.scalar_type() == sum_type(x),
                  "mean and var must have the type of sums");
  STD_TORCH_CHECK(count.dim() == 1 && count.size(0) == domains && count.scalar_type() == ScalarType::Long,
                  "count must be [P] int64");
  bool any_batch = false;
  for (NormDomain& d : call.plan.domains) {
    d.batch = training && data<int64_t>(count)[d.id] >= 2;
    any_batch = any_batch || d.batch;
  }
  const ScalarType type = sum_type(x);
  const bool parameters = needs & 30, sums = parameters || ((needs & 1) && any_batch);
  Tensor sum = allocate({sums ? domains : 0, width}, type), product = allocate({sums ? domains : 0, width}, type);
  const auto gradient = [&](int64_t bit, const Tensor& like) {
    return needs & bit ? (like.dim() == 1 ? allocate({width}, like.scalar_type())
                                          : allocate({like.size(0), width}, like.scalar_type()))
                       : allocate({0}, like.scalar_type());
  };
  Tensor dx = gradient(1, x), dweight = gradient(2, weight), dbias = gradient(4, weight),
         dweight_own = gradient(8, domain_weight), dbias_own = gradient(16, domain_weight);
  call.args.mean = const_cast<void*>(mean.const_data_ptr()), call.args.var = const_cast<void*>(var.const_data_ptr());
  call.args.grad = grad.const_data_ptr(), call.args.grad_row = grad.stride(0);
  call.args.out = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  with_sum_type(x, [&](auto c) {
    using C = decltype(c);
    if (sums) {  // domains without rows keep these zeros
      std::fill_n(mutable_data<C>(sum), sum.numel(), C(0));
      std::fill_n(mutable_data<C>(product), product.numel(), C(0));
      call.args.sum = sum.mutable_data_ptr(), call.args.product = product.mutable_data_ptr();
    }
    call.run(kernels(x).backward);
    if (parameters)
      parameter_gradients<C>(call, sum, product,
                             {needs & 2 ? &dweight : nullptr, needs & 4 ? &dbias : nullptr,
                              needs & 8 ? &dweight_own : nullptr, needs & 16 ? &dbias_own : nullptr});
  });
  return {dx, dweight, dbias, dweight_own, dbias_own};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("partitioned_norm", TORCH_BOX(&partitioned_norm));
  m.impl("partitioned_norm_eager", TORCH_BOX(&partitioned_norm));
  m.impl("partitioned_norm_backward", TORCH_BOX(&partitioned_norm_backward));
}

}  // namespace mtl
