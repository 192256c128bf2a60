// expert_linear on a CPU for a few rows, as in serving: turning the weights into panels would take as long as the
// product. They are the product's rows here, and x its columns:
//
//   Y_u^T [m N, B] = W_u [m N, K] X_u^T
//
// A row's sums are those of the other products, bit for bit.
#include "linear_problem.h"

namespace mtl {

namespace {

struct Task {
  const Unit* unit;
  int64_t row, rows;
};

}  // namespace

void forward_few(Problem& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias_in,
                 Activation activation, char* y, char* z) {
  const PackKernels &pack = p.pack(x, "x"), &pack_w = p.pack(weight, "weight");
  const int64_t depth = p.depth(p.features), element = int64_t(x.element_size());
  const int64_t packed = int64_t(p.packed_size);
  const int64_t numbers = p.lay_out([&](const Unit&) { return round_up(p.batch, p.tile_cols) * depth; });
  char* panels = static_cast<char*>(scratch(0, (numbers + p.columns()) * p.packed_size));
  char* biases = panels + numbers * packed;
  run_tasks(int64_t(p.units.size()), double(x.numel()), [&](int64_t i) {
    const Unit& u = p.units[i];
    if (u.cols > 0) pack.rows_wide(input_of(x, u), p.batch, p.features, panels + u.panels * packed);
  });
  if (bias_in) pack_w.widen(dense(*bias_in).const_data_ptr(), biases, p.columns());

  // Weights that lie as the tile reads them are read where they lie, but for the rows of a tile that is not whole.
  const bool in_place = p.pairs ? p.features % 2 == 0 : weight.element_size() == p.packed_size;
  std::vector<Task> tasks;
  const int64_t share = kTurnedTiles * p.tile_rows;
  for (const Unit& u : p.units)
    for (int64_t r = 0; r < u.cols; r += share) tasks.push_back({&u, r, std::min(share, u.cols - r)});
  run_tasks(int64_t(tasks.size()), p.work(), [&](int64_t i) {
    const Task& t = tasks[i];
    const Operand rows = moved(weight_of(weight, p, *t.unit), t.row, 0, weight.element_size());
    const auto product = [&](const void* a, int64_t from, int64_t n) {
      const int64_t first = t.unit->first + t.row + from;
      const Output out{y + first * element, z ? z + first * element : nullptr,
                       bias_in ? biases + first * packed : nullptr, activation, p.columns()};
      pack.multiply_turned(a, panels + t.unit->panels * packed, n, p.batch, depth, out);
    };
    const int64_t whole = in_place ? t.rows / p.tile_rows * p.tile_rows : 0;
    if (whole) product(rows.data, 0, whole);
    if (whole == t.rows) return;
    void* copy = scratch(1, share * depth * p.packed_size);
    pack_w.rows(moved(rows, whole, 0, weight.element_size()), t.rows - whole, p.features, copy);
    product(copy, whole, t.rows - whole);
  });
}

}  // namespace mtl
