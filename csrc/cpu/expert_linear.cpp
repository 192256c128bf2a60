// expert_linear on a CPU: per unit of experts one plain GEMM, since a unit's weights are one contiguous slice.
//
//   forward   Y_u  [B, m N] = X_u  [B, K]   W_u^T          bias and activation while the tile is in L1
//   dX        dX_u [B, K]   = dZ_u [B, m N] W_u            summed over the unit's m experts inside the product
//   dW        dW_u [m N, K] = dZ_u^T        X_u            batch in blocks, summed in order: deterministic
//
// dZ = dY * act' is formed while packing and never stored.
#include <algorithm>

#include "linear_kernels.h"
#include "tensor.h"

namespace mtl {

namespace {

// Sizes in numbers of the packed type. A block of A panels should leave half of a 512 KiB L2 to B's panels.
constexpr int64_t kBlockBytes = 192 << 10;
// Batch rows that dW multiplies at a time.
constexpr int64_t kDepth = 256;
constexpr int64_t kGradientRows = 256;

const LinearKernels& kernels() {
  static const LinearKernels& best = MTL_BEST_ISA(linear_kernels);
  return best;
}

const PackKernels& pack_kernels(ScalarType dtype, const char* argument) {
  return kernels().by_storage[int(storage_of(dtype, argument))];
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The experts that read one input, and where their numbers lie.
struct Unit {
  int64_t input;   // which of x's units
  int64_t first;   // first column among all E * N
  int64_t cols;    // columns: its experts times N
  int64_t panels;  // offset of its packed weights
};

struct Problem {
  int64_t batch, inputs, experts, outputs, features;  // B, U (1 for [B,K]), E, N, K
  size_t packed_size;                                 // of one packed number
  int64_t tile_rows, tile_cols;
  std::vector<Unit> units;
  int64_t columns() const { return experts * outputs; }
  double work() const { return double(batch) * columns() * features; }
  int64_t block_rows(int64_t depth) const {
    const int64_t rows = kBlockBytes / std::max<int64_t>(1, depth * int64_t(packed_size)) / tile_rows * tile_rows;
    return std::clamp<int64_t>(rows, 4 * tile_rows, 40 * tile_rows);
  }
};

Problem problem(const Tensor& x, const Tensor& weight, const std::optional<std::vector<int64_t>>& experts_per_unit) {
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
  p.tile_rows = kernels().tile_rows;
  p.tile_cols = is_double ? kernels().tile_cols_double : kernels().tile_cols_float;
  std::vector<int64_t> counts;
  STD_TORCH_CHECK(x.dim() == 3 || !experts_per_unit, "experts_per_unit goes with x [B,U,K]");
  if (x.dim() == 2)
    counts = {p.experts};
  else if (experts_per_unit)
    counts = *experts_per_unit;
  else
    counts.assign(p.inputs, 1);
  STD_TORCH_CHECK(int64_t(counts.size()) == p.inputs, "experts_per_unit must have one count for each of x's units");
  int64_t first = 0;
  for (int64_t u = 0; u < p.inputs; ++u) {
    STD_TORCH_CHECK(counts[u] >= 0 && counts[u] <= p.experts, "experts_per_unit must be counts of experts");
    p.units.push_back({u, first, counts[u] * p.outputs, 0});
    first += counts[u] * p.outputs;
  }
  STD_TORCH_CHECK(first == p.columns(), "experts_per_unit must sum to weight's experts");
  return p;
}

// Row r of unit u of x begins at u.input * unit_stride + r * row_stride.
Operand input_of(const Tensor& x, const Unit& u, size_t element) {
  const int64_t offset = x.dim() == 3 ? u.input * x.stride(1) : 0;
  return {static_cast<const char*>(x.const_data_ptr()) + offset * element, nullptr, Activation::kNone, x.stride(0)};
}

Operand rows_from(Operand o, int64_t r, int64_t c, size_t element) {
  const int64_t offset = (r * o.stride + c) * element;
  o.data = static_cast<const char*>(o.data) + offset;
  if (o.saved) o.saved = static_cast<const char*>(o.saved) + offset;
  return o;
}

// rows x cols of every unit, A's rows from `a_of`, against each unit's packed B: y_of's rows are the products.
template <class OperandOf, class OutputOf>
void multiply_units(const Problem& p, const PackKernels& pack, const char* panels,
                    int64_t (*depth_of)(const Problem&, const Unit&), int64_t (*cols_of)(const Problem&, const Unit&),
                    const OperandOf& a_of, const OutputOf& y_of, size_t element) {
  struct Task {
    const Unit* unit;
    int64_t row, rows, col, cols;
  };
  std::vector<Task> tasks;
  const int64_t threads = torch::stable::get_num_threads();
  for (const Unit& u : p.units) {
    const int64_t block = p.block_rows(depth_of(p, u)), cols = cols_of(p, u);
    const int64_t row_tasks = (p.batch + block - 1) / block * int64_t(p.units.size());
    // With few rows the threads share the columns instead; each packs the rows again, which is little.
    const int64_t splits =
        row_tasks >= 2 * threads ? 1 : (2 * threads + row_tasks - 1) / std::max<int64_t>(1, row_tasks);
    const int64_t width = std::max(p.tile_cols, round_up((cols + splits - 1) / splits, p.tile_cols));
    for (int64_t r = 0; r < p.batch; r += block)
      for (int64_t c = 0; c < cols; c += width)
        tasks.push_back({&u, r, std::min(block, p.batch - r), c, std::min(width, cols - c)});
  }
  run_tasks(int64_t(tasks.size()), p.work(), [&](int64_t i) {
    const Task& t = tasks[i];
    const int64_t depth = depth_of(p, *t.unit);
    void* a = scratch(1, round_up(t.rows, p.tile_rows) * depth * p.packed_size + 64);
    pack.rows(rows_from(a_of(*t.unit), t.row, 0, element), t.rows, depth, a);
    Output y = y_of(*t.unit);
    y.y = static_cast<char*>(y.y) + (t.row * y.stride + t.col) * element;
    if (y.z) y.z = static_cast<char*>(y.z) + (t.row * y.stride + t.col) * element;
    if (y.bias) y.bias = static_cast<const char*>(y.bias) + t.col * p.packed_size;
    pack.multiply(a, panels + (t.unit->panels + t.col * depth) * p.packed_size, t.rows, t.cols, depth, y);
  });
}

// Gives every unit room for `numbers_of` packed numbers; returns their total.
template <class NumbersOf>
int64_t lay_out(Problem& p, const NumbersOf& numbers_of) {
  int64_t total = 0;
  for (Unit& u : p.units) {
    u.panels = total;
    total += numbers_of(u);
  }
  return total;
}

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                                         std::optional<std::vector<int64_t>> experts_per_unit,
                                         std::string activation_name, bool save) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in);
  Problem p = problem(x, weight, experts_per_unit);
  STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 2 && bias_in->size(0) == p.experts && bias_in->size(1) == p.outputs &&
                               bias_in->scalar_type() == weight.scalar_type()),
                  "bias must be [E,N] in weight's dtype");
  const PackKernels &pack = pack_kernels(x.scalar_type(), "x"), &pack_w = pack_kernels(weight.scalar_type(), "weight");
  const bool with_z = save && needs_input(activation);
  Tensor y = allocate({p.batch, p.experts, p.outputs}, x.scalar_type());
  Tensor z = with_z ? allocate_like(y) : allocate({0}, x.scalar_type());
  if (y.numel() == 0) return {y, z};

  const int64_t numbers = lay_out(p, [&](const Unit& u) { return round_up(u.cols, p.tile_cols) * p.features; });
  const int64_t bias_numbers = p.columns() + int64_t(p.units.size()) * p.tile_cols;
  char* panels = static_cast<char*>(scratch(0, (numbers + bias_numbers) * p.packed_size));
  char* biases = panels + numbers * p.packed_size;
  const size_t w_element = weight.element_size(), element = x.element_size();
  run_tasks(int64_t(p.units.size()), double(weight.numel()), [&](int64_t i) {
    const Unit& u = p.units[i];
    const Operand w{static_cast<const char*>(weight.const_data_ptr()) + u.first * p.features * w_element, nullptr,
                    Activation::kNone, p.features};
    pack_w.rows_wide(w, u.cols, p.features, panels + u.panels * p.packed_size);
  });
  const auto bias_at = [&](const Unit& u) { return biases + (u.first + u.input * p.tile_cols) * p.packed_size; };
  if (bias_in) {
    const Tensor bias = dense(*bias_in);
    for (const Unit& u : p.units) {
      pack_w.widen(static_cast<const char*>(bias.const_data_ptr()) + u.first * w_element, bias_at(u), u.cols);
      std::fill_n(bias_at(u) + u.cols * p.packed_size, p.tile_cols * p.packed_size, char{0});
    }
  }
  multiply_units(
      p, pack, panels, [](const Problem& q, const Unit&) { return q.features; },
      [](const Problem&, const Unit& u) { return u.cols; }, [&](const Unit& u) { return input_of(x, u, element); },
      [&](const Unit& u) {
        return Output{static_cast<char*>(y.mutable_data_ptr()) + u.first * element,
                      with_z ? static_cast<char*>(z.mutable_data_ptr()) + u.first * element : nullptr,
                      bias_in ? bias_at(u) : nullptr, activation, p.columns()};
      },
      element);
  return {y, z};
}

Tensor input_gradient(Problem& p, const Tensor& x, const Tensor& weight, const Operand& dz, size_t element) {
  Tensor dx = allocate_like(x);
  if (dx.numel() == 0) return dx;
  const PackKernels &pack = pack_kernels(x.scalar_type(), "x"), &pack_w = pack_kernels(weight.scalar_type(), "weight");
  const int64_t padded = round_up(p.features, p.tile_cols);
  const int64_t numbers = lay_out(p, [&](const Unit& u) { return u.cols * padded; });
  char* panels = static_cast<char*>(scratch(0, numbers * p.packed_size));
  run_tasks(int64_t(p.units.size()), double(weight.numel()), [&](int64_t i) {
    const Unit& u = p.units[i];
    const Operand w{static_cast<const char*>(weight.const_data_ptr()) + u.first * p.features * weight.element_size(),
                    nullptr, Activation::kNone, p.features};
    pack_w.columns_wide(w, u.cols, p.features, panels + u.panels * p.packed_size, nullptr);
  });
  multiply_units(
      p, pack, panels, [](const Problem&, const Unit& u) { return u.cols; },
      [](const Problem& q, const Unit&) { return q.features; },
      [&](const Unit& u) { return rows_from(dz, 0, u.first, element); },
      [&](const Unit& u) {
        return Output{static_cast<char*>(dx.mutable_data_ptr()) + u.input * p.features * element, nullptr, nullptr,
                      Activation::kNone, p.inputs * p.features};
      },
      element);
  return dx;
}

// dW and db. The batch goes by in blocks whose products are added up in order, so that neither the number of threads
// nor their timing changes a bit.
void weight_gradients(const Problem& p, const Tensor& x, const Operand& dz, Tensor& dweight, Tensor& dbias,
                      bool with_weight, bool with_bias) {
  const PackKernels& pack = pack_kernels(x.scalar_type(), "x");
  const ScalarType stored = with_weight ? dweight.scalar_type() : dbias.scalar_type();
  const PackKernels& pack_w = pack_kernels(stored, "weight");
  const size_t element = x.element_size(), w_element = with_weight ? dweight.element_size() : dbias.element_size();
  const bool is_double = p.packed_size == sizeof(double), direct = w_element == p.packed_size;
  const auto accumulate = is_double ? kernels().accumulate_double : kernels().accumulate_float;
  struct Task {
    const Unit* unit;
    int64_t col, cols;
  };
  std::vector<Task> tasks;
  for (const Unit& u : p.units)
    for (int64_t c = 0; c < u.cols; c += kGradientRows) tasks.push_back({&u, c, std::min(kGradientRows, u.cols - c)});
  const int64_t padded = round_up(p.features, p.tile_cols);
  run_tasks(int64_t(tasks.size()), p.work(), [&](int64_t i) {
    const Task& t = tasks[i];
    const int64_t first = t.unit->first + t.col;
    void* a = scratch(1, round_up(t.cols, p.tile_rows) * kDepth * p.packed_size + 64);
    void* b = scratch(2, padded * kDepth * p.packed_size);
    const int64_t total = t.cols * p.features;
    char* own = static_cast<char*>(scratch(3, (total + t.cols) * p.packed_size));
    char* sums =
        direct && with_weight ? static_cast<char*>(dweight.mutable_data_ptr()) + first * p.features * w_element : own;
    char* column_sums = own + total * p.packed_size;
    std::fill_n(column_sums, t.cols * p.packed_size, char{0});
    if (p.batch == 0 && with_weight) std::fill_n(sums, total * p.packed_size, char{0});
    const Operand from_z = rows_from(dz, 0, first, element), from_x = input_of(x, *t.unit, element);
    for (int64_t r = 0; r < p.batch; r += kDepth) {
      const int64_t depth = std::min(kDepth, p.batch - r);
      pack.columns(rows_from(from_z, r, 0, element), depth, t.cols, a, with_bias ? column_sums : nullptr);
      if (!with_weight) continue;
      pack.columns_wide(rows_from(from_x, r, 0, element), depth, p.features, b, nullptr);
      accumulate(a, b, t.cols, p.features, depth, sums, p.features, r > 0);
    }
    if (with_weight && !direct)
      pack_w.narrow(sums, static_cast<char*>(dweight.mutable_data_ptr()) + first * p.features * w_element, total);
    if (with_bias) pack_w.narrow(column_sums, static_cast<char*>(dbias.mutable_data_ptr()) + first * w_element, t.cols);
  });
}

std::tuple<Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                          const Tensor& weight_in, const Tensor& saved_in,
                                                          std::optional<std::vector<int64_t>> experts_per_unit,
                                                          std::string activation_name, int64_t needs) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in);
  const Tensor grad = dense(grad_in), saved = dense(saved_in);
  Problem p = problem(x, weight, experts_per_unit);
  STD_TORCH_CHECK(grad.numel() == p.batch * p.columns() && grad.scalar_type() == x.scalar_type(),
                  "grad must be [B,E,N] in x's dtype");
  const bool through = activation != Activation::kNone;
  STD_TORCH_CHECK(!through || (saved.numel() == grad.numel() && saved.scalar_type() == x.scalar_type()),
                  "saved must be [B,E,N] in x's dtype");
  const size_t element = x.element_size();
  const Operand dz{grad.const_data_ptr(), through ? saved.const_data_ptr() : nullptr, activation, p.columns()};
  Tensor dx = needs & 1 ? input_gradient(p, x, weight, dz, element) : allocate({0}, x.scalar_type());
  Tensor dweight = needs & 2 ? allocate_like(weight) : allocate({0}, weight.scalar_type());
  Tensor dbias =
      needs & 4 ? allocate({p.experts, p.outputs}, weight.scalar_type()) : allocate({0}, weight.scalar_type());
  if (needs & 6) weight_gradients(p, x, dz, dweight, dbias, needs & 2, needs & 4);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("expert_linear", TORCH_BOX(&expert_linear));
  m.impl("expert_linear_eager", TORCH_BOX(&expert_linear));
  m.impl("expert_linear_backward", TORCH_BOX(&expert_linear_backward));
}

}  // namespace mtl
