// The gradients of expert_linear on a CPU: one walk over the batch in blocks of rows, unit by unit.
//
//   dZ_u [R, C] = dY_u * act'        a block's rows, made once for both products, and kept no longer than the block
//   dX_u [R, K] = dZ_u W_u           summed over the unit's experts inside the product
//   dW_u [C, K] += dZ_u^T X_u        block after block
//   db_u [C]   += sum over R of dZ_u
//
// A task is a unit and a slice of the batch. The slices' dW and db are added up in order; how many slices there are
// follows from the sizes alone, so that neither the number of threads nor their timing changes a bit.
#include "linear_problem.h"

namespace mtl {

namespace {

// Columns of dZ at a time, rows at most, and numbers in a block of dZ and X together.
constexpr int64_t kColumns = 512, kRows = 252, kNumbers = 192 << 10;
// Slices are for a few threads to share few units: each costs the memory of the weights once more.
constexpr int64_t kTasks = 16, kSlices = 4, kSliceRows = 128;
constexpr int64_t kSumAtOnce = 16 << 10;

// A buffer of the thread for each purpose; they live at the same time.
enum Slot { kPanels, kDz, kTurned, kInput, kInputGradient, kPartials };

struct Call {
  Problem p;
  const Tensor &x, &weight;
  Operand dz;
  char *dx, *dweight, *dbias;  // null: not wanted
  bool into;                   // dx is x's own memory, and takes the gradient through the activation that made x
  Activation through;
  int64_t slices, rows, padded;
  const char* panels;  // of the weights, kColumns of a unit's columns at a time
  // Sums of the slices in the packed type: [slices][columns][features], then [slices][columns].
  char *weight_sums, *bias_sums;

  size_t element() const { return x.element_size(); }
  bool stream_dx() const { return x.numel() * int64_t(element()) >= kStreamBytes; }
  bool direct() const { return weight.element_size() == p.packed_size; }
  // The first slice's sums go straight to dweight where it has the packed type.
  char* sums_of(int64_t slice) const {
    if (direct() && slice == 0) return dweight;
    return weight_sums + (slice - direct()) * p.columns() * p.features * p.packed_size;
  }
};

char* scratch_of(Slot slot, int64_t numbers, const Problem& p) {
  return static_cast<char*>(scratch(slot, numbers * p.packed_size + kPastEnd));
}

void pack_weight(Call& call) {
  Problem& p = call.p;
  const PackKernels& pack = p.pack(call.weight, "weight");
  char* panels = scratch_of(kPanels, p.lay_out([&](const Unit& u) { return p.depth(u.cols) * call.padded; }), p);
  call.panels = panels;
  run_tasks(int64_t(p.units.size()), double(call.weight.numel()), [&](int64_t i) {
    const Unit& u = p.units[i];
    for (int64_t c = 0; c < u.cols; c += kColumns)
      pack.columns_wide(moved(weight_of(call.weight, p, u), c, 0, call.weight.element_size()),
                        std::min(kColumns, u.cols - c), p.features,
                        panels + (u.panels + p.depth(c) * call.padded) * p.packed_size);
  });
}

// One unit, one slice of the batch.
void walk(const Call& call, const Unit& u, int64_t slice) {
  const Problem& p = call.p;
  const PackKernels& pack = p.pack(call.x, "x");
  const SumKernels& kernels = p.sums();
  const int64_t begin = p.batch * slice / call.slices, end = p.batch * (slice + 1) / call.slices;
  const int64_t columns = std::min(kColumns, u.cols), tiles = round_up(call.rows, p.tile_rows);
  char* dz = scratch_of(kDz, tiles * columns, p);
  char* turned = scratch_of(kTurned, round_up(columns, p.tile_rows) * call.rows, p);
  char* input = scratch_of(kInput, call.rows * call.padded, p);
  char* weight_sums = call.dweight ? call.sums_of(slice) + u.first * p.features * p.packed_size : nullptr;
  char* bias_sums = call.dbias ? call.bias_sums + (slice * p.columns() + u.first) * p.packed_size : nullptr;
  if (bias_sums) std::fill_n(bias_sums, u.cols * p.packed_size, char{0});
  if (weight_sums && begin == end) std::fill_n(weight_sums, u.cols * p.features * p.packed_size, char{0});
  const Operand x = input_of(call.x, u);
  const bool dx_direct = call.element() == p.packed_size;
  const int64_t dx_stride = p.inputs * p.features;
  const auto ahead_of = [&](int64_t r) {
    Ahead ahead;
    const int64_t n = std::min(call.rows, end - r), bytes = int64_t(call.element());
    if (n <= 0) return ahead;
    if (weight_sums) add(ahead, moved(x, r, 0, call.element()).data, x.stride * bytes, n, p.features * bytes);
    const Operand dz = moved(call.dz, r, u.first, call.element());
    if (dz.saved) add(ahead, dz.saved, dz.stride * bytes, n, u.cols * bytes);
    add(ahead, dz.data, dz.stride * bytes, n, u.cols * bytes);
    return ahead;
  };
  for (int64_t r = begin; r < end; r += call.rows) {
    const int64_t n = std::min(call.rows, end - r);
    Ahead ahead = ahead_of(r + call.rows);
    char* dx = call.dx ? call.dx + (r * dx_stride + u.input * p.features) * call.element() : nullptr;
    // One product's dx need not be kept in sums.
    const bool dx_rounded = !dx_direct && !call.into && u.cols <= kColumns;
    const bool in_sums = dx && !dx_rounded && (call.into || !dx_direct);
    char* dx_sums = in_sums ? scratch_of(kInputGradient, n * p.features, p) : dx;
    if (weight_sums) pack.columns_wide(moved(x, r, 0, call.element()), n, p.features, input);
    int64_t c = 0;
    do {  // once for a unit without columns too, whose dx is zero
      const int64_t cols = std::min(kColumns, u.cols - c);
      pack.rows(moved(call.dz, r, u.first + c, call.element()), n, cols, dz);
      const char* panels = call.panels + (u.panels + p.depth(c) * call.padded) * p.packed_size;
      const bool stream = call.stream_dx() && u.cols <= kColumns;
      Ahead* const meanwhile = weight_sums ? nullptr : &ahead;
      if (dx && dx_rounded)
        pack.multiply(dz, p.depth(cols), panels, n, p.features, p.depth(cols),
                      {dx, nullptr, nullptr, Activation::kNone, dx_stride, stream, meanwhile});
      else if (dx)
        kernels.accumulate(dz, panels, n, p.features, p.depth(cols),
                           {dx_sums, in_sums ? p.features : dx_stride, c > 0, !in_sums && stream, meanwhile});
      if (bias_sums) kernels.add_packed(dz, n, cols, bias_sums + c * p.packed_size);
      if (weight_sums) {
        kernels.turn(dz, n, cols, turned);
        kernels.accumulate_turned(turned, input, cols, p.features, p.depth(n),
                                  {weight_sums + c * p.features * p.packed_size, p.features, r > begin, false, &ahead});
      }
      c += kColumns;
    } while (c < u.cols);
    for (int64_t i = 0; in_sums && i < n; ++i) {
      char *sums = dx_sums + i * p.features * p.packed_size, *row = dx + i * dx_stride * call.element();
      if (call.into)
        pack.gradient_into(call.through, sums, row, p.features);
      else
        pack.narrow(sums, row, p.features);
    }
  }
}

// `to` [n] of weight's type = the sum over slices of rows of `n` numbers, sums_of(slice) each.
template <class SumsOf>
void add_slices(const Call& call, int64_t n, char* to, const SumsOf& sums_of) {
  const PackKernels& pack = pack_kernels(call.weight.scalar_type(), "weight");
  const size_t size = call.p.packed_size;
  if (call.slices == 1 && sums_of(0) == to) return;
  run_tasks((n + kSumAtOnce - 1) / kSumAtOnce, double(n * call.slices), [&](int64_t i) {
    const int64_t at = i * kSumAtOnce, m = std::min(kSumAtOnce, n - at);
    char* sums = sums_of(0) + at * size;
    for (int64_t s = 1; s < call.slices; ++s) call.p.sums().add_rows(sums_of(s) + at * size, 1, m, sums);
    char* rounded = to + at * call.weight.element_size();
    if (sums != rounded) pack.narrow(sums, rounded, m);
  });
}

// dx, where it is wanted, and the weights' gradients; with `through`, dx is x itself.
std::tuple<Tensor, Tensor> gradients(const Tensor& x, const Tensor& weight, const Tensor& grad, const Tensor* saved,
                                     const std::optional<std::vector<int64_t>>& experts_per_unit, Activation activation,
                                     const Tensor* dx, const Activation* through, int64_t needs) {
  Problem p = linear_problem(x, weight, experts_per_unit);
  STD_TORCH_CHECK(grad.numel() == p.batch * p.columns() && grad.scalar_type() == x.scalar_type(),
                  "grad must be [B,E,N] in x's dtype");
  STD_TORCH_CHECK(!saved || (saved->numel() == grad.numel() && saved->scalar_type() == x.scalar_type()),
                  "saved must be [B,E,N] in x's dtype");
  const Tensor dweight = needs & 2 ? allocate_like(weight) : allocate({0}, weight.scalar_type());
  const Tensor dbias =
      needs & 4 ? allocate({p.experts, p.outputs}, weight.scalar_type()) : allocate({0}, weight.scalar_type());

  const auto pointer = [](const Tensor& t) {
    return t.numel() ? static_cast<char*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
  };
  const int64_t units = std::max<int64_t>(1, int64_t(p.units.size()));
  const int64_t slices =
      std::clamp<int64_t>((kTasks + units - 1) / units, 1, std::clamp<int64_t>(p.batch / kSliceRows, 1, kSlices));
  const int64_t row = std::max<int64_t>(1, std::min(kColumns, p.columns()) + p.features);
  const int64_t rows = std::clamp<int64_t>(kNumbers / row, 48, kRows) / p.tile_rows * p.tile_rows;
  Call call{std::move(p),
            x,
            weight,
            {grad.const_data_ptr(), saved ? saved->const_data_ptr() : nullptr, activation, 0},
            dx ? pointer(*dx) : nullptr,
            pointer(dweight),
            pointer(dbias),
            through != nullptr,
            through ? *through : Activation::kNone,
            slices,
            rows,
            0,
            nullptr,
            nullptr,
            nullptr};
  call.dz.stride = call.p.columns();
  call.padded = round_up(call.p.features, call.p.tile_cols);
  if (call.dx) pack_weight(call);
  const int64_t columns = call.p.columns(), weights = columns * call.p.features;
  const int64_t own = call.dweight ? (slices - call.direct()) * weights : 0;
  call.weight_sums = scratch_of(kPartials, own + slices * columns, call.p);
  call.bias_sums = call.weight_sums + own * call.p.packed_size;
  run_tasks(units * slices, 2 * call.p.work(), [&](int64_t i) {
    if (!call.p.units.empty()) walk(call, call.p.units[i / slices], i % slices);
  });
  if (call.dweight) add_slices(call, weights, call.dweight, [&](int64_t s) { return call.sums_of(s); });
  if (call.dbias)
    add_slices(call, columns, call.dbias, [&](int64_t s) { return call.bias_sums + s * columns * call.p.packed_size; });
  return {dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& grad, const Tensor& x_in, const Tensor& weight,
                                                          const Tensor& saved_in,
                                                          std::optional<std::vector<int64_t>> experts_per_unit,
                                                          std::string activation_name, int64_t needs) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), saved = dense(saved_in);
  const bool through = activation != Activation::kNone;
  const Tensor dx = needs & 1 ? allocate_like(x) : allocate({0}, x.scalar_type());
  const auto [dweight, dbias] = gradients(x, dense(weight), dense(grad), through ? &saved : nullptr, experts_per_unit,
                                          activation, &dx, nullptr, needs);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor> expert_linear_backward_into(const Tensor& grad, Tensor x, const Tensor& weight,
                                                       std::optional<std::vector<int64_t>> experts_per_unit,
                                                       std::string through_name, int64_t needs) {
  const Activation through = activation_from(through_name);
  STD_TORCH_CHECK(!needs_input(through), "through must be an activation whose derivative follows from its output");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  return gradients(x, dense(weight), dense(grad), nullptr, experts_per_unit, Activation::kNone, &x, &through, needs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("expert_linear_backward", TORCH_BOX(&expert_linear_backward));
  m.impl("expert_linear_backward_into", TORCH_BOX(&expert_linear_backward_into));
}

}  // namespace mtl
