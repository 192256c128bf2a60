// masked_bce on a CPU: the masks' sums, then loss and gradient in one pass over [B,T].
#include <cfloat>

#include "losses.h"

namespace mtl {

namespace {

// [B,T] cut into periods (whole rows, so many that few tasks fill vectors) and blocks of periods.
struct Cut {
  int64_t numbers, tasks, period, size, blocks;

  Cut(int64_t batch, int64_t tasks_in) : numbers(batch * tasks_in), tasks(tasks_in) {
    period = tasks * std::max<int64_t>(1, kLossPeriod / std::max<int64_t>(tasks, 1));
    // At least 16 periods a block: with many tasks its sums would else be as large as the logits.
    size = period * std::max<int64_t>(16, kLossNumbers / std::max<int64_t>(period, 1));
    blocks = numbers ? (numbers + size - 1) / size : 0;
  }

  // Runs kernel(begin, end, sums, bad) on every block; `totals` [T] gets the sums of all. Returns the first bad index.
  template <class F>
  int64_t sum(double work, std::vector<double>& totals, const F& kernel) const {
    std::vector<double> sums(blocks * tasks);
    std::vector<int64_t> bad(blocks, -1);
    run_tasks(blocks, work * double(numbers), [&](int64_t i) {
      kernel(i * size, std::min(numbers, (i + 1) * size), sums.data() + i * tasks, &bad[i]);
    });
    totals.assign(tasks, 0);
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t t = 0; t < tasks; ++t) totals[t] += sums[i * tasks + t];
    return first_bad(bad);
  }
};

std::tuple<Tensor, Tensor> masked_bce(const Tensor& logits, const Tensor& labels, const OptionalTensor& mask) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [B,T]");
  const int64_t batch = logits.size(0), tasks = logits.size(1);
  STD_TORCH_CHECK(labels.dim() == 2 && labels.size(0) == batch && labels.size(1) == tasks,
                  "labels must be [B,T] as logits");
  STD_TORCH_CHECK(!mask || (mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == tasks),
                  "mask must be [B,T] as logits");
  const LossKernels& kernel = loss_kernels_of(logits, "logits");
  const Tensor x = dense(logits), y = dense(labels), w = mask ? dense(*mask) : Tensor();
  const ScalarType type = loss_type(logits);
  Tensor loss = allocate({tasks}, type), dlogits = allocate({batch, tasks}, type);
  const Cut cut(batch, tasks);
  BceArgs args{};
  args.tasks = tasks, args.period = cut.period;
  args.logits = x.const_data_ptr(), args.labels = labels_of(y, "labels"), args.dlogits = dlogits.mutable_data_ptr();
  const size_t bytes = size_t(kernel.bce_bytes(cut.period));
  std::vector<double> totals(tasks, double(batch)), sums;
  if (mask) {
    args.mask = labels_of(w, "mask");
    const int64_t bad = cut.sum(2, totals, [&](int64_t begin, int64_t end, double* to, int64_t* wrong) {
      kernel.count(args, begin, end, to, wrong, scratch(1, bytes));
    });
    STD_TORCH_CHECK(bad < 0, "mask must hold finite weights of at least 0; got ",
                    label_at(w, std::max<int64_t>(bad, 0)), " at [", bad / std::max<int64_t>(tasks, 1), ", ",
                    bad % std::max<int64_t>(tasks, 1), "]");
  }
  const double largest = type == ScalarType::Double ? DBL_MAX : double(FLT_MAX);
  for (double total : totals)
    STD_TORCH_CHECK(total <= largest, "mask must hold weights whose sum is finite; got ", total);
  args.totals = totals.data();
  const int64_t bad = cut.sum(kLossWork, sums, [&](int64_t begin, int64_t end, double* to, int64_t* wrong) {
    kernel.bce(args, begin, end, to, wrong, scratch(1, bytes));
  });
  STD_TORCH_CHECK(bad < 0, "labels must lie in [0, 1]; got ", label_at(y, std::max<int64_t>(bad, 0)), " at [",
                  bad / std::max<int64_t>(tasks, 1), ", ", bad % std::max<int64_t>(tasks, 1), "]");
  with_type(type, "logits", [&](auto s) {
    using C = decltype(s);
    for (int64_t t = 0; t < tasks; ++t) mutable_data<C>(loss)[t] = C(sums[t]);
  });
  return {loss, dlogits};
}

Tensor masked_bce_backward(const Tensor& grad, const Tensor& dlogits) {
  const ScalarType type = dlogits.scalar_type();
  STD_TORCH_CHECK(dlogits.dim() == 2 && (type == ScalarType::Float || type == ScalarType::Double),
                  "dlogits must be [B,T] in float32 or float64");
  const int64_t tasks = dlogits.size(1);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == tasks && grad.scalar_type() == type,
                  "grad must be [T] in dlogits' dtype");
  const Tensor g = dense(grad), d = dense(dlogits);
  Tensor out = allocate_like(d);
  const int64_t period = Cut(0, tasks).period;
  const Tensor pattern = allocate({period}, type);
  with_type(type, "grad", [&](auto s) {
    using C = decltype(s);
    for (int64_t j = 0; j < period; j += tasks) std::copy_n(data<C>(g), tasks, mutable_data<C>(pattern) + j);
  });
  scale_numbers(pattern.const_data_ptr(), period, d, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("masked_bce", TORCH_BOX(&masked_bce));
  m.impl("masked_bce_eager", TORCH_BOX(&masked_bce));
  m.impl("masked_bce_backward", TORCH_BOX(&masked_bce_backward));
}

}  // namespace mtl
