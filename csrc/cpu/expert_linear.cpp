// expert_linear on a CPU: per unit of experts one plain GEMM, since a unit's weights are one contiguous slice.
//
//   Y_u [B, m N] = X_u [B, K] W_u^T      bias and activation while the tile is in L1
#include "linear_problem.h"

namespace mtl {

Problem linear_problem(const Tensor& x, const Tensor& weight,
                       const std::optional<std::vector<int64_t>>& experts_per_unit) {
  STD_TORCH_CHECK(weight.dim() == 3, "weight must be [E,N,K]");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x must be [B,K] or [B,U,K]");
  Problem p;
  p.batch = x.size(0), p.inputs = x.dim() == 3 ? x.size(1) : 1;
  p.experts = weight.size(0), p.outputs = weight.size(1), p.features = weight.size(2);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == p.features, "x and weight must agree in K");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() ||
                      (weight.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
                  "weight must have x's dtype, or float32 where x is 16 bit");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  p.packed_size = is_double ? sizeof(double) : sizeof(float);
  p.pairs =
      linear_kernels().pairs && x.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == x.scalar_type();
  p.tile_rows = linear_kernels().tile_rows;
  p.tile_cols = p.sums().tile_cols;
  std::vector<int64_t> counts;
  STD_TORCH_CHECK(x.dim() == 3 || !experts_per_unit, "experts_per_unit goes with x [B,U,K]");
  if (x.dim() == 2)
    counts = {p.experts};
  else if (experts_per_unit)
    counts = *experts_per_unit;
  else
    counts.assign(p.inputs, 1);
  STD_TORCH_CHECK(int64_t(counts.size()) == p.inputs, "experts_per_unit must have one count for each of x's units");
  int64_t experts = 0;
  for (int64_t u = 0; u < p.inputs; ++u) {
    STD_TORCH_CHECK(counts[u] >= 0 && counts[u] <= p.experts, "experts_per_unit must be counts of experts");
    p.units.push_back({u, experts * p.outputs, counts[u] * p.outputs, 0});
    experts += counts[u];
  }
  STD_TORCH_CHECK(experts == p.experts, "experts_per_unit must sum to weight's experts");
  return p;
}

namespace {

// A block of A's rows should leave half of a 512 KiB L2 to B's panels.
constexpr int64_t kBlockBytes = 192 << 10;

struct Task {
  const Unit* unit;
  int64_t row, rows, col, cols;
};

std::vector<Task> tasks_of(const Problem& p) {
  const int64_t fit = kBlockBytes / std::max<int64_t>(1, p.features * int64_t(p.packed_size)) / p.tile_rows;
  const int64_t block = std::clamp<int64_t>(fit, 4, 40) * p.tile_rows;
  const int64_t row_tasks = (p.batch + block - 1) / block * int64_t(p.units.size());
  const int64_t wanted = 2 * int64_t(torch::stable::get_num_threads());
  // With few rows the threads share the columns instead; each copies the rows again, which is little.
  const int64_t splits = row_tasks >= wanted ? 1 : (wanted + row_tasks - 1) / std::max<int64_t>(1, row_tasks);
  std::vector<Task> tasks;
  for (const Unit& u : p.units) {
    const int64_t width = std::max(p.tile_cols, round_up((u.cols + splits - 1) / splits, p.tile_cols));
    for (int64_t r = 0; r < p.batch; r += block)
      for (int64_t c = 0; c < u.cols; c += width)
        tasks.push_back({&u, r, std::min(block, p.batch - r), c, std::min(width, u.cols - c)});
  }
  return tasks;
}

// Rows that few columns read go to the tile from where they lie; copies pay when many panels read them.
void multiply(const Problem& p, const PackKernels& pack, const Operand& x, const void* panels, int64_t rows,
              int64_t cols, Output out, size_t element) {
  // bfloat16 lies in pairs already, unless the last of a row has none.
  const bool packed = p.pairs ? p.features % 2 == 0 && x.stride % 2 == 0 : element == p.packed_size;
  const int64_t in_place = packed && cols <= p.tile_cols ? rows / p.tile_rows * p.tile_rows : 0;
  const int64_t depth = p.depth(p.features);
  if (in_place) pack.multiply(x.data, p.pairs ? x.stride / 2 : x.stride, panels, in_place, cols, depth, out);
  if (in_place == rows) return;
  void* copy = scratch(1, round_up(rows - in_place, p.tile_rows) * depth * p.packed_size);
  pack.rows(moved(x, in_place, 0, element), rows - in_place, p.features, copy);
  out.y = static_cast<char*>(out.y) + in_place * out.stride * element;
  if (out.z) out.z = static_cast<char*>(out.z) + in_place * out.stride * element;
  pack.multiply(copy, depth, panels, rows - in_place, cols, depth, out);
}

using Counts = std::optional<std::vector<int64_t>>;

// keep, if given, becomes z where the activation's gradient needs it.
Tensor forward(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in,
               const Counts& experts_per_unit, const std::string& activation_name, OptionalTensor* keep) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in);
  Problem p = linear_problem(x, weight, experts_per_unit);
  STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 2 && bias_in->size(0) == p.experts && bias_in->size(1) == p.outputs &&
                               bias_in->scalar_type() == weight.scalar_type()),
                  "bias must be [E,N] in weight's dtype");
  const PackKernels &pack = p.pack(x, "x"), &pack_w = p.pack(weight, "weight");
  const int64_t depth = p.depth(p.features);
  Tensor y = allocate({p.batch, p.experts, p.outputs}, x.scalar_type());
  char* z = nullptr;
  if (keep && needs_input(activation)) {
    *keep = allocate_like(y);
    z = static_cast<char*>((*keep)->mutable_data_ptr());
  }
  if (y.numel() == 0) return y;
  if (p.batch <= kFewRows) {
    forward_few(p, x, weight, bias_in, activation, static_cast<char*>(y.mutable_data_ptr()), z);
    return y;
  }

  const int64_t numbers = p.lay_out([&](const Unit& u) { return round_up(u.cols, p.tile_cols) * depth; });
  const int64_t bias_numbers = p.columns() + int64_t(p.units.size()) * p.tile_cols;
  char* panels = static_cast<char*>(scratch(0, (numbers + bias_numbers) * p.packed_size));
  char* biases = panels + numbers * p.packed_size;
  const size_t w_element = weight.element_size(), element = x.element_size();
  run_tasks(int64_t(p.units.size()), double(weight.numel()), [&](int64_t i) {
    const Unit& u = p.units[i];
    pack_w.rows_wide(weight_of(weight, p, u), u.cols, p.features, panels + u.panels * p.packed_size);
  });
  const auto bias_at = [&](const Unit& u) { return biases + (u.first + u.input * p.tile_cols) * p.packed_size; };
  if (bias_in) {
    const Tensor bias = dense(*bias_in);
    for (const Unit& u : p.units) {
      pack_w.widen(static_cast<const char*>(bias.const_data_ptr()) + u.first * w_element, bias_at(u), u.cols);
      std::fill_n(bias_at(u) + u.cols * p.packed_size, p.tile_cols * p.packed_size, char{0});
    }
  }
  const std::vector<Task> tasks = tasks_of(p);
  const bool stream = y.numel() * int64_t(element) >= kStreamBytes;
  // What this thread is likely to read next.
  const auto ahead_of = [&](int64_t i) {
    Ahead ahead;
    const int64_t next = i + int64_t(torch::stable::get_num_threads());
    if (next < int64_t(tasks.size())) {
      const Operand rows = moved(input_of(x, *tasks[next].unit), tasks[next].row, 0, element);
      add(ahead, rows.data, rows.stride * int64_t(element), tasks[next].rows, p.features * int64_t(element));
    }
    return ahead;
  };
  run_tasks(int64_t(tasks.size()), p.work(), [&](int64_t i) {
    const Task& t = tasks[i];
    const Unit& u = *t.unit;
    const int64_t offset = (t.row * p.columns() + u.first + t.col) * int64_t(element);
    Ahead ahead = ahead_of(i);
    const Output out{static_cast<char*>(y.mutable_data_ptr()) + offset,
                     z ? z + offset : nullptr,
                     bias_in ? bias_at(u) + t.col * p.packed_size : nullptr,
                     activation,
                     p.columns(),
                     stream,
                     &ahead};
    multiply(p, pack, moved(input_of(x, u), t.row, 0, element), panels + (u.panels + t.col * depth) * p.packed_size,
             t.rows, t.cols, out, element);
  });
  return y;
}

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         Counts experts_per_unit, std::string activation, bool save) {
  OptionalTensor z;
  Tensor y = forward(x, weight, bias, experts_per_unit, activation, save ? &z : nullptr);
  return {std::move(y), z ? *z : allocate({0}, x.scalar_type())};
}

Tensor expert_linear_only(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Counts experts_per_unit,
                          std::string activation, bool) {
  return forward(x, weight, bias, experts_per_unit, activation, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("expert_linear", TORCH_BOX(&expert_linear));
  m.impl("expert_linear_eager", TORCH_BOX(&expert_linear));
  m.impl("expert_linear_only", TORCH_BOX(&expert_linear_only));
}

}  // namespace mtl
