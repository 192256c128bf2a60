// mix on a CPU: a plan of who uses whom, then one pass over the experts, batch rows shared out among the threads.
#include <algorithm>

#include "mix_kernels.h"
#include "tensor.h"

namespace mtl {

namespace {

// Batch rows a task takes. Fixed, so that sums over the batch do not depend on the number of threads.
constexpr int64_t kRows = 64;
using Native = std::optional<std::vector<int64_t>>;

const MixKernels& kernels(const Tensor& experts) {
  return MTL_BEST_ISA(mix_kernels).by_storage[int(storage_of(experts.scalar_type(), "experts"))];
}

ScalarType sum_type(const Tensor& experts) {
  return experts.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// One call: its plan, where each route's static weight comes from, and its tensors in the layout the kernels want.
struct Call {
  MixPlan plan;
  std::vector<int64_t> fixed_at;  // index into static of each route's weight; -1: none, -2: the constant 1
  bool has_fixed = false;
  Tensor experts;
  OptionalTensor logits, channels;  // an empty Tensor costs three allocations, an empty optional none
  std::vector<char> fixed;
  MixArgs args{};
  int64_t batch;
  explicit Call(const Tensor& given) : experts(dense_rows(given)), batch(given.size(0)) {}
  double work() const { return double(batch) * plan.rows * plan.experts * plan.width; }
};

// Raises what does not fit, so that whoever calls the op need check nothing before; returns the output rows T.
int64_t rows_of_call(const Tensor& experts, const OptionalTensor& logits, const OptionalTensor& fixed,
                     const OptionalTensor& mask, const OptionalTensor& columns, const Native& native) {
  STD_TORCH_CHECK(experts.dim() == 3, "experts must be [B,E,D]");
  const int64_t batch = experts.size(0), num_experts = experts.size(1);
  for (const OptionalTensor* table : {&mask, &columns})
    STD_TORCH_CHECK(!*table || ((*table)->dim() == 2 && (*table)->size(1) == num_experts),
                    "mask and columns must be [T,E]");
  STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(!columns || columns->scalar_type() == ScalarType::Int, "columns must be int32");
  if (logits) {
    const bool fits = columns ? logits->dim() == 2 : logits->dim() == 3 && logits->size(2) == num_experts;
    STD_TORCH_CHECK(fits && logits->size(0) == batch, "logits must be [B,T,E], or [B,R] with columns");
  }
  const bool by_channel = fixed && fixed->dim() == 3;
  if (by_channel) {
    const bool alone = !logits && !mask && !columns && !native;
    STD_TORCH_CHECK(alone && fixed->size(1) == num_experts && fixed->size(2) == experts.size(2),
                    "static [T,E,D] must fit experts, and goes with nothing else");
  } else if (fixed) {
    const bool fits = columns || native ? fixed->dim() == 1 : fixed->dim() == 2 && fixed->size(1) == num_experts;
    STD_TORCH_CHECK(fits, "static must be [T,E], packed [R] with columns, or a weight a native expert");
  }
  if (fixed) storage_of(fixed->scalar_type(), "static");
  const int64_t rows = columns ? columns->size(0) : logits ? logits->size(1) : mask ? mask->size(0) : 0;
  if (columns || logits || mask) {
    STD_TORCH_CHECK(!mask || mask->size(0) == rows, "mask must be [T,E]");
    STD_TORCH_CHECK(!fixed || fixed->dim() != 2 || fixed->size(0) == rows, "static must be [T,E]");
    return rows;
  }
  STD_TORCH_CHECK(fixed && !native, "give logits, static, or both; native goes with logits");
  return fixed->size(0);
}

void plan_routes(Call& call, const OptionalTensor& fixed, const OptionalTensor& mask, const OptionalTensor& columns,
                 const Native& native) {
  const bool with_static = fixed.has_value();
  MixPlan& plan = call.plan;
  OptionalTensor mask_dense, columns_dense;
  if (mask) mask_dense = dense(*mask);
  if (columns) columns_dense = dense(*columns);
  const bool* may = mask ? data<bool>(*mask_dense) : nullptr;
  const int32_t* column = columns ? data<int32_t>(*columns_dense) : nullptr;
  plan.dense = !may && !column;
  std::vector<int64_t> first_native;  // of each row: its unit's first expert
  if (native) {
    first_native.push_back(0);
    for (int64_t n : *native) {
      STD_TORCH_CHECK(n >= 0 && n <= plan.experts, "native must count experts");
      first_native.push_back(first_native.back() + n);
    }
    STD_TORCH_CHECK(int64_t(native->size()) >= plan.rows && first_native.back() == plan.experts,
                    "native must count the experts of at least T units and sum to E");
  }
  plan.uses.index.reserve(plan.rows * plan.experts);
  plan.column.reserve(plan.rows * plan.experts);
  call.fixed_at.reserve(plan.rows * plan.experts);
  for (int64_t t = 0; t < plan.rows; ++t) {
    for (int64_t e = 0; e < plan.experts; ++e) {
      const int64_t at = t * plan.experts + e;
      if ((may && !may[at]) || (column && column[at] < 0)) continue;
      STD_TORCH_CHECK(!column || column[at] < plan.logit_cols || !plan.softmax, "columns must lie in [-1, R)");
      plan.uses.index.push_back(int32_t(e));
      plan.column.push_back(column ? column[at] : int32_t(at));
      int64_t from = -1;
      if (native)
        from = e >= first_native[t] && e < first_native[t + 1] ? (with_static ? e : -2) : -1;
      else if (with_static)
        from = column ? column[at] : at;
      call.fixed_at.push_back(from);
    }
    plan.uses.close_row(plan.dense);
  }
  if (columns && !mask) {
    const int64_t routes = int64_t(plan.uses.index.size());
    STD_TORCH_CHECK(!plan.softmax || plan.logit_cols == routes, "logits must be [B,R], R the routes of columns");
    STD_TORCH_CHECK(!with_static || fixed->numel() == routes, "static must be [R], R the routes of columns");
  }
  if (native && with_static)
    STD_TORCH_CHECK(fixed->numel() == first_native[plan.rows], "static must have a weight for each native expert");
}

// The routes ordered by expert, and by row among one expert's.
void plan_users(MixPlan& plan) {
  const int64_t routes = int64_t(plan.uses.index.size());
  std::vector<int64_t> next(plan.experts + 1, 0);  // where the next route of each expert goes
  for (int32_t e : plan.uses.index) ++next[e + 1];
  for (int64_t e = 0; e < plan.experts; ++e) next[e + 1] += next[e];
  std::vector<int32_t> row_of(routes);
  plan.route.resize(routes);
  for (int64_t t = 0; t < plan.uses.rows(); ++t) {
    for (int64_t r = plan.uses.begin[t]; r < plan.uses.begin[t + 1]; ++r) {
      const int64_t at = next[plan.uses.index[r]]++;
      plan.route[at] = int32_t(r), row_of[at] = int32_t(t);
    }
  }
  plan.users.index.reserve(routes);
  int64_t at = 0;
  for (int64_t e = 0; e < plan.experts; ++e) {
    for (; at < next[e]; ++at) plan.users.index.push_back(row_of[at]);  // next[e] is where e's routes end by now
    plan.users.close_row(plan.dense);
  }
}

// Copies static weights to the type of sums: a weight a route, or the channel weights as they lie.
template <class C>
void take_static(Call& call, const OptionalTensor& fixed) {
  OptionalTensor from;
  if (fixed) from = dense(*fixed);
  const auto value = [&](int64_t i) {
    C v{};
    with_type(from->scalar_type(), "static", [&](auto s) { v = static_cast<C>(data<decltype(s)>(*from)[i]); });
    return v;
  };
  if (call.plan.by_channel) {
    call.channels = allocate({fixed->numel()}, sum_type(call.experts));
    for (int64_t i = 0; i < fixed->numel(); ++i) mutable_data<C>(*call.channels)[i] = value(i);
    call.args.channels = call.channels->const_data_ptr();
    return;
  }
  if (!call.has_fixed) return;
  const int64_t routes = int64_t(call.fixed_at.size());
  call.fixed.resize(routes * sizeof(C));
  C* to = reinterpret_cast<C*>(call.fixed.data());
  for (int64_t r = 0; r < routes; ++r) {
    const int64_t at = call.fixed_at[r];
    to[r] = at == -1 ? C{0} : at == -2 ? C{1} : value(at);
  }
  call.args.fixed = to;
}

Call prepare(const Tensor& experts, const OptionalTensor& logits, const OptionalTensor& fixed,
             const OptionalTensor& mask, const OptionalTensor& columns, const Native& native) {
  const int64_t rows = rows_of_call(experts, logits, fixed, mask, columns, native);
  Call call(experts);
  MixPlan& plan = call.plan;
  plan.experts = experts.size(1), plan.width = experts.size(2);
  plan.rows = rows;
  plan.softmax = logits.has_value();
  call.plan.by_channel = fixed && fixed->dim() == 3;
  call.has_fixed = (fixed && !call.plan.by_channel) || native;
  if (logits) {
    call.logits = dense(*logits);
    plan.logit_cols = columns ? logits->size(1) : plan.rows * plan.experts;
    call.args.logits = call.logits->const_data_ptr();
    call.args.logits_type = storage_of(logits->scalar_type(), "logits");
  } else {
    plan.logit_cols = 0;
  }
  if (call.plan.by_channel)
    plan.dense = false;
  else
    plan_routes(call, fixed, mask, columns, native);
  if (fixed) {
    int64_t largest = -1;
    for (int64_t at : call.fixed_at) largest = std::max(largest, at);
    STD_TORCH_CHECK(largest < fixed->numel(), "static has too few entries");
  }
  if (sum_type(experts) == ScalarType::Double)
    take_static<double>(call, fixed);
  else
    take_static<float>(call, fixed);
  call.args.plan = &plan;
  call.args.experts = call.experts.const_data_ptr();
  call.args.batch_stride = call.experts.stride(0), call.args.expert_stride = call.experts.stride(1);
  return call;
}

Tensor run_forward(Call& call, void* lse) {
  call.args.plan = &call.plan;
  const MixKernels& kernel = kernels(call.experts);
  Tensor out = allocate({call.batch, call.plan.rows, call.plan.width}, call.experts.scalar_type());
  call.args.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  call.args.out = out.mutable_data_ptr(), call.args.lse = lse;
  const size_t bytes = kernel.scratch_bytes(call.plan);
  run_tasks((call.batch + kRows - 1) / kRows, call.work(), [&](int64_t i) {
    kernel.forward(call.args, i * kRows, std::min(call.batch, (i + 1) * kRows), scratch(1, bytes));
  });
  return out;
}

std::tuple<Tensor, Tensor> mix(const Tensor& experts, const OptionalTensor& logits, const OptionalTensor& fixed,
                               const OptionalTensor& mask, const OptionalTensor& columns, Native native) {
  Call call = prepare(experts, logits, fixed, mask, columns, native);
  Tensor lse = logits ? allocate({call.batch, call.plan.rows}, sum_type(experts)) : allocate({0}, sum_type(experts));
  Tensor out = run_forward(call, logits ? lse.mutable_data_ptr() : nullptr);
  return {out, lse};
}

Tensor mix_only(const Tensor& experts, const OptionalTensor& logits, const OptionalTensor& fixed,
                const OptionalTensor& mask, const OptionalTensor& columns, Native native) {
  Call call = prepare(experts, logits, fixed, mask, columns, native);
  return run_forward(call, nullptr);
}

// static's gradient from the blocks' partial sums, added up in order and in double.
template <class C>
Tensor gather_static(const Call& call, const Tensor& fixed, const std::vector<C>& partial, int64_t blocks) {
  Tensor dstatic = allocate_like(fixed);
  const int64_t width = call.plan.by_channel ? fixed.numel() : int64_t(call.fixed_at.size());
  with_type(fixed.scalar_type(), "static", [&](auto s) {
    using S = decltype(s);
    S* to = mutable_data<S>(dstatic);
    std::fill_n(to, fixed.numel(), S(0));
    for (int64_t r = 0; r < width; ++r) {
      const int64_t at = call.plan.by_channel ? r : call.fixed_at[r];
      if (at < 0) continue;
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[block * width + r];
      to[at] = static_cast<S>(static_cast<C>(sum));
    }
  });
  return dstatic;
}

template <class C>
Tensor run_backward(Call& call, const OptionalTensor& fixed, bool with_static, const Tensor& like) {
  const MixKernels& kernel = kernels(call.experts);
  // Channel gradients are T * E * D a block: few blocks, so that their partial sums stay small beside the experts.
  const int64_t rows = call.plan.by_channel ? std::max(kRows, (call.batch + 15) / 16) : kRows;
  const int64_t blocks = (call.batch + rows - 1) / rows;
  const int64_t width = !with_static ? 0 : call.plan.by_channel ? fixed->numel() : int64_t(call.fixed_at.size());
  std::vector<C> partial(blocks * width, C{0});
  const size_t bytes = kernel.scratch_bytes(call.plan);
  run_tasks(blocks, call.work(), [&](int64_t i) {
    MixArgs args = call.args;
    args.dfixed = with_static ? partial.data() + i * width : nullptr;
    kernel.backward(args, i * rows, std::min(call.batch, (i + 1) * rows), scratch(1, bytes));
  });
  return with_static ? gather_static<C>(call, *fixed, partial, blocks) : allocate({0}, like.scalar_type());
}

// dlogits and dstatic, and dexperts where it goes; with `through`, it is experts.
std::tuple<Tensor, Tensor> gradients(Call& call, const Tensor& grad_in, const OptionalTensor& grad_lse,
                                     const OptionalTensor& logits, const OptionalTensor& fixed, const Tensor* dexperts,
                                     const Activation* through, int64_t needs) {
  call.args.plan = &call.plan;
  plan_users(call.plan);
  const Tensor& experts = call.experts;
  const Tensor grad = dense(grad_in);
  STD_TORCH_CHECK(
      grad.numel() == call.batch * call.plan.rows * call.plan.width && grad.scalar_type() == experts.scalar_type(),
      "grad must be [B,T,D] in experts' dtype");
  const bool with_lse = grad_lse && logits;  // without logits lse is empty, and so is its gradient
  STD_TORCH_CHECK(
      !with_lse || (grad_lse->numel() == call.batch * call.plan.rows && grad_lse->scalar_type() == sum_type(experts)),
      "grad_lse must be [B,T] in the type of sums");
  OptionalTensor dlse;
  if (with_lse) dlse = dense(*grad_lse);
  const bool with_logits = (needs & 2) && logits, with_static = (needs & 4) && fixed;
  Tensor dlogits = with_logits ? allocate_like(*logits) : allocate({0}, experts.scalar_type());
  call.args.grad = grad.const_data_ptr();
  call.args.grad_lse = with_lse ? dlse->const_data_ptr() : nullptr;
  call.args.dexperts = dexperts ? const_cast<void*>(dexperts->const_data_ptr()) : nullptr;
  call.args.into = through != nullptr;
  if (through) call.args.through = *through;
  call.args.stream = dexperts && !through && dexperts->numel() * int64_t(dexperts->element_size()) >= kStreamBytes;
  call.args.dlogits = with_logits ? dlogits.mutable_data_ptr() : nullptr;
  Tensor dstatic = sum_type(experts) == ScalarType::Double ? run_backward<double>(call, fixed, with_static, experts)
                                                           : run_backward<float>(call, fixed, with_static, experts);
  return {dlogits, dstatic};
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(const Tensor& grad, const OptionalTensor& grad_lse,
                                                const Tensor& experts, const OptionalTensor& logits,
                                                const OptionalTensor& fixed, const OptionalTensor& mask,
                                                const OptionalTensor& columns, Native native, const Tensor& lse,
                                                int64_t needs) {
  (void)lse;  // the softmax is cheaper to repeat from the row's logits than to rebuild from their logsumexp
  Call call = prepare(experts, logits, fixed, mask, columns, native);
  const bool wanted = needs & 1;
  Tensor dexperts = wanted ? allocate({call.batch, call.plan.experts, call.plan.width}, experts.scalar_type())
                           : allocate({0}, experts.scalar_type());
  const auto [dlogits, dstatic] =
      gradients(call, grad, grad_lse, logits, fixed, wanted ? &dexperts : nullptr, nullptr, needs);
  return {dexperts, dlogits, dstatic};
}

std::tuple<Tensor, Tensor> mix_backward_into(const Tensor& grad, Tensor experts, const OptionalTensor& logits,
                                             const OptionalTensor& fixed, const OptionalTensor& columns, Native native,
                                             std::string through_name, int64_t needs) {
  const Activation through = activation_from(through_name);
  STD_TORCH_CHECK(!needs_input(through), "through must be an activation whose derivative follows from its output");
  STD_TORCH_CHECK(experts.is_contiguous(), "experts must be contiguous");
  Call call = prepare(experts, logits, fixed, {}, columns, native);
  return gradients(call, grad, {}, logits, fixed, &experts, &through, needs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("mix_eager", TORCH_BOX(&mix));
  m.impl("mix_only", TORCH_BOX(&mix_only));
  m.impl("mix_backward", TORCH_BOX(&mix_backward));
  m.impl("mix_backward_into", TORCH_BOX(&mix_backward_into));
}

}  // namespace mtl
