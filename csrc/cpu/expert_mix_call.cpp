// What a call of expert_mix comes to: checks, who uses whom, and the experts in sets.
#include "expert_mix.h"

namespace mtl {

namespace {

// Batch rows whose softmax a task prepares.
constexpr int64_t kRows = 64;
// Outputs of a set of experts beyond which only the sums over many tasks gain.
constexpr int64_t kEnoughColumns = 2048;

int64_t rows_of_call(const OptionalTensor& logits, const OptionalTensor& fixed, const OptionalTensor& mask,
                     const OptionalTensor& columns) {
  if (columns) return columns->size(0);
  if (logits) return logits->size(1);
  if (mask) return mask->size(0);
  STD_TORCH_CHECK(fixed, "give logits, static, or both");
  return fixed->size(0);
}

// The table [T,E] of places among the weights, -1 where a row may not use an expert.
std::vector<int32_t> table_of(const ExpertMixCall& call, const OptionalTensor& mask, const OptionalTensor& columns) {
  for (const OptionalTensor* given : {&mask, &columns})
    STD_TORCH_CHECK(
        !*given || ((*given)->dim() == 2 && (*given)->size(0) == call.tasks && (*given)->size(1) == call.experts),
        "mask and columns must be [T,E]");
  STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(!columns || columns->scalar_type() == ScalarType::Int, "columns must be int32");
  const Tensor mask_dense = mask ? dense(*mask) : Tensor(), columns_dense = columns ? dense(*columns) : Tensor();
  std::vector<int32_t> table(call.tasks * call.experts);
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = columns ? data<int32_t>(columns_dense)[i] : int32_t(i);
    STD_TORCH_CHECK(table[i] < call.columns, "columns must lie in [-1, R)");
    if (mask && !data<bool>(mask_dense)[i]) table[i] = -1;
  }
  return table;
}

// The routes of every row to the given experts.
Routing routing_of(const ExpertMixCall& call, const std::vector<int32_t>& table, const std::vector<int32_t>& experts,
                   bool dense) {
  Routing found;
  std::vector<std::vector<int32_t>> routes_of(experts.size());
  std::vector<int32_t> row_of;
  for (int64_t t = 0; t < call.tasks; ++t) {
    for (size_t i = 0; i < experts.size(); ++i) {
      const int32_t column = table[t * call.experts + experts[i]];
      if (column < 0) continue;
      routes_of[i].push_back(int32_t(row_of.size()));
      row_of.push_back(int32_t(t));
      found.uses.index.push_back(int32_t(i));
      found.column.push_back(column);
    }
    found.uses.close_row(dense);
    char adjacent = 1;
    for (int64_t r = found.uses.begin[t] + 1; r < found.uses.begin[t + 1]; ++r)
      adjacent &= found.column[r] == found.column[r - 1] + 1;
    found.adjacent.push_back(adjacent);
  }
  for (const std::vector<int32_t>& routes : routes_of) {
    for (int32_t r : routes) {
      found.users.index.push_back(row_of[r]);
      found.route.push_back(r);
    }
    found.users.close_row(dense);
  }
  return found;
}

void cut_into_sets(ExpertMixCall& call, const std::vector<int32_t>& table, const std::vector<int64_t>& counts,
                   bool dense, int64_t set_columns) {
  std::vector<int32_t> members, every;
  const int64_t most = std::max<int64_t>(1, set_columns / std::max<int64_t>(1, call.width));
  const auto close = [&] {
    if (members.empty()) return;
    call.sets.back().routing = routing_of(call, table, members, dense);
    call.largest_set = std::max(call.largest_set, int64_t(members.size()));
    call.most_routes = std::max(call.most_routes, call.sets.back().routing.routes());
    members.clear();
  };
  call.used.assign(call.experts, 0);
  int64_t e = 0;
  for (int64_t u = 0; u < call.inputs; ++u) {
    for (const int64_t end = e + counts[u]; e < end; ++e) {
      every.push_back(int32_t(e));
      for (int64_t t = 0; t < call.tasks; ++t) call.used[e] |= table[t * call.experts + e] >= 0;
      if (!call.used[e]) continue;
      if (members.empty()) call.sets.emplace_back();
      std::vector<ExpertRun>& runs = call.sets.back().runs;
      if (!runs.empty() && runs.back().input == u && runs.back().first + runs.back().count == e)
        ++runs.back().count;
      else
        runs.push_back({u, e, 1, int64_t(members.size())});
      members.push_back(int32_t(e));
      if (int64_t(members.size()) == most) close();
    }
  }
  close();
  call.all = routing_of(call, table, every, dense);
}

std::vector<int64_t> counts_of(const ExpertMixCall& call, const std::optional<std::vector<int64_t>>& experts_per_unit) {
  const bool shared = call.x.dim() == 2;
  STD_TORCH_CHECK(!shared || !experts_per_unit, "experts_per_unit goes with x [B,U,K]");
  std::vector<int64_t> counts =
      shared ? std::vector<int64_t>{call.experts} : experts_per_unit.value_or(std::vector<int64_t>(call.inputs, 1));
  STD_TORCH_CHECK(int64_t(counts.size()) == call.inputs, "experts_per_unit must have one count for each of x's units");
  int64_t total = 0;
  for (int64_t n : counts) {
    STD_TORCH_CHECK(n >= 0, "experts_per_unit must not be negative");
    total += n;
  }
  STD_TORCH_CHECK(total == call.experts, "experts_per_unit must sum to weight's experts");
  return counts;
}

// Static weights in the type of sums.
Tensor widened(const Tensor& given, ScalarType sum) {
  const Tensor from = dense(given);
  Tensor to = allocate({from.numel()}, sum);
  with_type(from.scalar_type(), "static", [&](auto s) {
    for (int64_t i = 0; i < from.numel(); ++i) {
      const auto v = data<decltype(s)>(from)[i];
      if (sum == ScalarType::Double)
        mutable_data<double>(to)[i] = static_cast<double>(v);
      else
        mutable_data<float>(to)[i] = static_cast<float>(v);
    }
  });
  return to;
}

}  // namespace

Operand ExpertMixCall::input_rows(int64_t input, int64_t b) const {
  const int64_t at = (x.dim() == 3 ? input * x.stride(1) : 0) + b * x.stride(0);
  return {static_cast<const char*>(x.const_data_ptr()) + at * element, nullptr, Activation::kNone, x.stride(0)};
}

Operand ExpertMixCall::weight_rows(const ExpertRun& run) const {
  return {static_cast<const char*>(weight.const_data_ptr()) + run.first * width * features * w_element, nullptr,
          Activation::kNone, features};
}

int64_t ExpertMixCall::take_bias(const ExpertRun& run, void* to) const {
  const int64_t count = run.count * width, padded = to_cols(count);
  if (!with_bias) return 0;
  pack_w->widen(static_cast<const char*>(bias.const_data_ptr()) + run.first * width * w_element, to, count);
  std::fill_n(static_cast<char*>(to) + count * size, (padded - count) * size, char{0});
  return padded;
}

void ExpertMixCall::normalise(Tensor* lse) {
  if (!gates.softmax) return;
  gates.lse = lse ? lse->mutable_data_ptr() : nullptr;
  run_tasks((batch + kRows - 1) / kRows, 16.0 * batch * columns, [&](int64_t i) {
    kernels->normalise(gates, all, i * kRows, std::min(batch, (i + 1) * kRows), scratch(1, 2 * columns * size + 64));
  });
}

ExpertMixCall prepare_expert_mix(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& logits, const OptionalTensor& fixed, const OptionalTensor& mask,
                                 const OptionalTensor& columns,
                                 const std::optional<std::vector<int64_t>>& experts_per_unit,
                                 const std::string& activation, int64_t set_columns) {
  const LinearKernels& linear = linear_kernels();
  const ExpertMixTable& table = MTL_BEST_ISA(expert_mix_kernels);
  ExpertMixCall call{};
  STD_TORCH_CHECK(weight.dim() == 3, "weight must be [E,D,K]");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x must be [B,K] or [B,U,K]");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() || (weight.scalar_type() == ScalarType::Float && !is_double),
                  "weight must have x's dtype, or float32 where x is 16 bit");
  call.x = dense_rows(x), call.weight = dense(weight), call.activation = activation_from(activation);
  call.batch = x.size(0), call.inputs = x.dim() == 3 ? x.size(1) : 1;
  call.experts = weight.size(0), call.width = weight.size(1), call.features = weight.size(2);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == call.features, "x and weight must agree in K");
  call.tasks = rows_of_call(logits, fixed, mask, columns);
  call.sum = is_double ? ScalarType::Double : ScalarType::Float;
  call.size = is_double ? sizeof(double) : sizeof(float);
  call.element = x.element_size(), call.w_element = weight.element_size();
  call.linear = &linear, call.kernels = is_double ? &table.of_double : &table.of_float;
  call.pack = &linear.by_storage[int(storage_of(x.scalar_type(), "x"))];
  call.pack_w = &linear.by_storage[int(storage_of(weight.scalar_type(), "weight"))];
  call.pack_sum = &linear.by_storage[int(storage_of(call.sum, "x"))];
  call.tile_rows = linear.tile_rows;
  call.tile_cols = linear.of_size(call.size).tile_cols;
  call.with_bias = bias.has_value();
  if (bias) {
    call.bias = dense(*bias);
    STD_TORCH_CHECK(bias->numel() == call.experts * call.width && bias->scalar_type() == weight.scalar_type(),
                    "bias must be [E,D] in weight's dtype");
  }
  call.columns = call.tasks * call.experts;
  if (columns) {
    STD_TORCH_CHECK(logits || fixed, "give logits, static, or both");
    call.columns = logits ? logits->numel() / std::max<int64_t>(1, call.batch) : fixed->numel();
    if (logits && call.batch == 0) call.columns = logits->size(logits->dim() - 1);
  }
  if (logits) {
    call.logits = dense(*logits);
    STD_TORCH_CHECK(logits->size(0) == call.batch && logits->numel() == call.batch * call.columns,
                    "logits must be [B,T,E], or [B,R] with columns");
    call.gates.softmax = true;
    call.gates.logits = call.logits.const_data_ptr();
    call.gates.logits_type = storage_of(logits->scalar_type(), "logits");
    call.moments = allocate({2, call.batch, call.tasks}, call.sum);
    call.gates.top = call.moments.mutable_data_ptr();
    call.gates.inverse = static_cast<char*>(call.moments.mutable_data_ptr()) + call.batch * call.tasks * call.size;
  }
  call.gates.columns = call.columns;
  if (fixed) {
    STD_TORCH_CHECK(fixed->dim() <= 2, "static must be [T,E], or packed [R] with columns");
    STD_TORCH_CHECK(fixed->numel() == call.columns, "static must have a weight for each of a row's logits");
    call.fixed = widened(*fixed, call.sum);
    call.gates.fixed = call.fixed.const_data_ptr();
  }
  STD_TORCH_CHECK(logits || fixed, "give logits, static, or both");
  // Wider sets repay their scratch only where a row's sums over tasks are many.
  const int64_t enough = std::max(kEnoughColumns, 4 * call.tasks * call.width);
  cut_into_sets(call, table_of(call, mask, columns), counts_of(call, experts_per_unit), !mask && !columns,
                std::min(set_columns, enough));
  return call;
}

}  // namespace mtl
