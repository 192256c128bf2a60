// snr_linear on a CPU: for every output sub-network one product over the inputs it is connected to, side by side.
//
//   forward   Y_i  [B, N]   = X_open [B, open K]   (gate W)_i^T     gates go into the weights while they are packed
//   dX        dX_j [B, K]   = dZ_open [B, open N]  (gate W)_j       the same with inputs and outputs exchanged
//   dW        S_ij [N, K]   = dZ_i^T X_j, dW_ij = gate S_ij, dgate = <W_ij, S_ij>: no second product for the gates
//
// Which blocks take part is known before any product: closed ones are neither packed nor multiplied. dZ = dY * act' is
// formed while its rows are taken up and never stored.
#include <algorithm>

#include "snr_kernels.h"
#include "tensor.h"

namespace mtl {

namespace {

// Rows of all sub-networks that a task multiplies: they should leave half of a 512 KiB L2 to the weights' panels.
constexpr int64_t kBlockBytes = 256 << 10;
// Batch rows that dW multiplies at a time, and rows of the weights' gradient that a task sums up.
constexpr int64_t kDepth = 256;
constexpr int64_t kGradientRows = 256;

// A type as the kernels of both tables serve it.
struct Type {
  ScalarType dtype;
  size_t size;
  const PackKernels* pack;
  const SnrKernels* snr;
};

Type type_of(ScalarType dtype, const char* argument) {
  const int storage = int(storage_of(dtype, argument));
  constexpr size_t sizes[] = {sizeof(double), sizeof(float), sizeof(BFloat16), sizeof(Half)};
  return {dtype, sizes[storage], &linear_kernels().by_storage[storage], &MTL_BEST_ISA(snr_kernels).by_storage[storage]};
}

struct Problem {
  int64_t batch, inputs, outputs, width, features;  // B, J, I, N, K
  Type x, weight, sums;
  int64_t tile_rows, tile_cols;
  std::vector<double> gates;  // [I,J]
  std::vector<bool> uses;     // [I,J]: whether the connection takes part
  double work;

  const char* element(const Tensor& weights, int64_t at) const {
    return static_cast<const char*>(weights.const_data_ptr()) + at * int64_t(weight.size);
  }
};

Problem problem(const Tensor& x, const Tensor& weight, const Tensor& gate, bool skip_closed) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must be [I,J,N,K]");
  Problem p;
  p.batch = x.size(0), p.inputs = weight.size(1), p.outputs = weight.size(0);
  p.width = weight.size(2), p.features = weight.size(3);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == p.inputs && x.size(2) == p.features, "x must be [B,J,K] as weight is");
  STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == p.outputs && gate.size(1) == p.inputs, "gate must be [I,J]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() ||
                      (weight.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
                  "weight must have x's dtype, or float32 where x is 16 bit");
  p.x = type_of(x.scalar_type(), "x"), p.weight = type_of(weight.scalar_type(), "weight");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  p.sums = type_of(is_double ? ScalarType::Double : ScalarType::Float, "x");
  p.tile_rows = linear_kernels().tile_rows;
  p.tile_cols = linear_kernels().of_size(p.sums.size).tile_cols;
  const Tensor flat = dense(gate);
  p.gates.resize(gate.numel());
  with_type(gate.scalar_type(), "gate", [&](auto s) {
    for (size_t i = 0; i < p.gates.size(); ++i) p.gates[i] = double(data<decltype(s)>(flat)[i]);
  });
  for (double g : p.gates) p.uses.push_back(!skip_closed || g != 0);
  p.work = double(p.batch) * p.width * p.features * double(std::count(p.uses.begin(), p.uses.end(), true));
  return p;
}

// One side of the network as a product reads it: rows [parts, width], rows and parts any distance apart. With `saved`
// (same layout) gradients to be taken through `activation`.
struct Rows {
  const void *data, *saved;
  Activation activation;
  int64_t row, part, width;

  // From a row, a part and a column of it on.
  Operand from(int64_t r, int64_t p, int64_t c, size_t size) const {
    const int64_t at = (r * row + p * part + c) * int64_t(size);
    return {static_cast<const char*>(data) + at, saved ? static_cast<const char*>(saved) + at : nullptr, activation,
            row};
  }
};

// One output of the network's side that is written: the parts it reads, and where its panels begin.
struct Member {
  std::vector<int64_t> parts, offsets;
  int64_t panels;
};

// out[b,m,:] = act(sum of the parts q that member m uses: from[b,q,:] block(m,q) + bias_m). `forward`: members are
// outputs and parts inputs, else the other way round. biases: `padded` apart.
void multiply_blocks(const Problem& p, const Tensor& weight, bool forward, const Rows& from, const Output& to,
                     int64_t cols) {
  const int64_t parts = forward ? p.inputs : p.outputs, padded = round_up(cols, p.tile_cols);
  const int64_t stride = round_up(parts * from.width, 16) + 16;  // rows 4 KiB apart would share their places in L1
  std::vector<Member> members(forward ? p.outputs : p.inputs);
  const auto cell = [&](int64_t m, int64_t q) { return forward ? m * p.inputs + q : q * p.inputs + m; };
  int64_t numbers = 0;
  for (int64_t m = 0; m < int64_t(members.size()); ++m) {
    members[m].panels = numbers;
    for (int64_t q = 0; q < parts; ++q) {
      if (!p.uses[cell(m, q)]) continue;
      members[m].parts.push_back(q);
      members[m].offsets.push_back(q * from.width);
      numbers += from.width * padded;
    }
  }
  const size_t size = p.sums.size;
  char* panels = static_cast<char*>(scratch(0, numbers * size + 64));
  run_tasks(int64_t(members.size()), double(numbers), [&](int64_t m) {
    const std::vector<int64_t>& used = members[m].parts;
    const int64_t panel = int64_t(used.size()) * from.width * p.tile_cols;
    for (size_t n = 0; n < used.size(); ++n) {
      const int64_t at = cell(m, used[n]), k = p.features;
      const void* block = p.element(weight, at * p.width * k);
      p.weight.snr->panels(forward ? Block{block, k, p.width, 1, k} : Block{block, p.width, k, k, 1}, p.gates[at],
                           panels + (members[m].panels + int64_t(n) * from.width * p.tile_cols) * size, panel);
    }
  });

  struct Task {
    int64_t row, rows, first, last;  // of the batch and of the members
  };
  std::vector<Task> tasks;
  const int64_t fit = kBlockBytes / (stride * int64_t(size)) / p.tile_rows * p.tile_rows;
  const int64_t block = std::clamp<int64_t>(fit, 2 * p.tile_rows, 40 * p.tile_rows);
  // With few rows the threads share the members instead; each takes up the rows again, which is little.
  const bool few = (p.batch + block - 1) / block < 2 * torch::stable::get_num_threads();
  const int64_t count = int64_t(members.size()), step = few ? 1 : count;
  for (int64_t r = 0; r < p.batch; r += block)
    for (int64_t m = 0; m < count; m += step)
      tasks.push_back({r, std::min(block, p.batch - r), m, std::min(m + step, count)});
  run_tasks(int64_t(tasks.size()), p.work, [&](int64_t i) {
    const Task& t = tasks[i];
    std::vector<bool> wanted(parts);
    for (int64_t m = t.first; m < t.last; ++m)
      for (int64_t q : members[m].parts) wanted[q] = true;
    char* rows = static_cast<char*>(scratch(1, round_up(t.rows, p.tile_rows) * stride * size));
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t q = 0; q < parts; ++q) {
        if (!wanted[q]) continue;
        const Operand o = from.from(t.row + r, q, 0, p.x.size);
        p.x.snr->row(o.activation, o.data, o.saved, rows + (r * stride + q * from.width) * size, from.width);
      }
    }
    for (int64_t m = t.first; m < t.last; ++m) {
      const int64_t at = (t.row * count + m) * cols * int64_t(p.x.size);
      const Output out{static_cast<char*>(to.y) + at, to.z ? static_cast<char*>(to.z) + at : nullptr,
                       to.bias ? static_cast<const char*>(to.bias) + m * padded * size : nullptr, to.activation,
                       count * cols};
      const Parts a{rows, stride, members[m].offsets.data(), int64_t(members[m].parts.size()), from.width};
      p.x.snr->multiply(a, panels + members[m].panels * size, t.rows, cols, out);
    }
  });
}

Rows rows_of(const Tensor& x) {
  return {x.const_data_ptr(), nullptr, Activation::kNone, x.stride(0), x.stride(1), x.size(2)};
}

std::tuple<Tensor, Tensor> snr_linear(const Tensor& x_in, const Tensor& weight_in, const Tensor& gate,
                                      const OptionalTensor& bias_in, std::string activation_name, bool skip_closed,
                                      bool save) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in);
  const Problem p = problem(x, weight, gate, skip_closed);
  const bool with_z = save && needs_input(activation);
  Tensor y = allocate({p.batch, p.outputs, p.width}, p.x.dtype);
  Tensor z = with_z ? allocate_like(y) : allocate({0}, p.x.dtype);
  if (y.numel() == 0) return {y, z};

  const int64_t padded = round_up(p.width, p.tile_cols);
  std::vector<char> biases;
  if (bias_in) {
    const Tensor bias = dense(*bias_in);
    STD_TORCH_CHECK(bias.numel() == p.outputs * p.width && bias.scalar_type() == weight.scalar_type(),
                    "bias must be [I,N] in weight's dtype");
    biases.resize(p.outputs * padded * p.sums.size);
    for (int64_t i = 0; i < p.outputs; ++i)
      p.weight.pack->widen(static_cast<const char*>(bias.const_data_ptr()) + i * p.width * p.weight.size,
                           biases.data() + i * padded * p.sums.size, p.width);
  }
  multiply_blocks(
      p, weight, true, rows_of(x),
      {y.mutable_data_ptr(), with_z ? z.mutable_data_ptr() : nullptr, bias_in ? biases.data() : nullptr, activation, 0},
      p.width);
  return {y, z};
}

// What dW, dgate and db are summed up in.
struct ParameterGradients {
  void *weight, *bias;        // null: not wanted
  std::vector<double> gates;  // [chunks of N][I,J]; empty: not wanted
};

// The batch goes by in blocks whose products are added up in order, so that neither the number of threads nor their
// timing changes a bit.
void parameter_gradients(const Problem& p, const Tensor& x, const Tensor& weight, const Rows& dz,
                         ParameterGradients& to) {
  const bool with_sums = to.weight || !to.gates.empty(), direct = to.weight && p.weight.size == p.sums.size;
  const SumKernels& kernels = linear_kernels().of_size(p.sums.size);
  const Rows from = rows_of(x);
  struct Task {
    int64_t first, last, col, cols;  // outputs, and which of their columns
  };
  std::vector<Task> tasks;
  // Narrow outputs share a task, and with it the packing of x: the more the better, as long as each thread has work.
  const int64_t most = torch::stable::get_num_threads() > 1 ? kGradientRows : 2 * kGradientRows;
  const int64_t together = std::max<int64_t>(1, p.width > kGradientRows ? 1 : most / std::max<int64_t>(1, p.width));
  for (int64_t i = 0; i < p.outputs; i += together)
    for (int64_t c = 0; c < p.width; c += kGradientRows)
      tasks.push_back({i, std::min(i + together, p.outputs), c, std::min(kGradientRows, p.width - c)});
  run_tasks(int64_t(tasks.size()), p.work, [&](int64_t n) {
    const Task& t = tasks[n];
    const int64_t block = t.cols * p.features, size = int64_t(p.sums.size);
    const int64_t panel = round_up(t.cols, p.tile_rows) * round_up(kDepth, p.tile_rows) * size;
    char* a = static_cast<char*>(scratch(1, (t.last - t.first + 1) * panel + 2 * kPastEnd));
    char* rows = a + (t.last - t.first) * panel + kPastEnd;
    void* b = scratch(2, round_up(p.features, p.tile_cols) * kDepth * size);
    const int64_t own_blocks = direct || !with_sums ? 0 : (t.last - t.first) * p.inputs;
    char* own = static_cast<char*>(scratch(3, (own_blocks * block + (t.last - t.first) * t.cols) * size));
    char* column_sums = own + own_blocks * block * size;
    std::fill_n(column_sums, (t.last - t.first) * t.cols * size, char{0});
    const auto offset = [&](int64_t i, int64_t j) { return ((i * p.inputs + j) * p.width + t.col) * p.features; };
    const auto sums_of = [&](int64_t i, int64_t j) {
      return direct ? static_cast<char*>(to.weight) + offset(i, j) * size
                    : own + ((i - t.first) * p.inputs + j) * block * size;
    };
    const auto any_uses = [&](int64_t j) {
      for (int64_t i = t.first; i < t.last; ++i)
        if (p.uses[i * p.inputs + j]) return true;
      return false;
    };
    for (int64_t r = 0; r < p.batch; r += kDepth) {
      const int64_t depth = std::min(kDepth, p.batch - r);
      for (int64_t i = t.first; i < t.last; ++i) {
        p.x.pack->rows(dz.from(r, i, t.col, p.x.size), depth, t.cols, rows);
        if (to.bias) kernels.add_rows(rows, depth, t.cols, column_sums + (i - t.first) * t.cols * size);
        kernels.turn(rows, depth, t.cols, a + (i - t.first) * panel);
      }
      for (int64_t j = 0; with_sums && j < p.inputs; ++j) {
        if (!any_uses(j)) continue;
        p.x.pack->columns_wide(from.from(r, j, 0, p.x.size), depth, p.features, b);
        for (int64_t i = t.first; i < t.last; ++i)
          if (p.uses[i * p.inputs + j])
            kernels.accumulate_turned(a + (i - t.first) * panel, b, t.cols, p.features, depth,
                                      {sums_of(i, j), p.features, r > 0});
      }
    }
    for (int64_t i = t.first; i < t.last; ++i) {
      for (int64_t j = 0; with_sums && j < p.inputs; ++j) {
        const int64_t at = i * p.inputs + j;
        char* dweight = to.weight ? static_cast<char*>(to.weight) + offset(i, j) * int64_t(p.weight.size) : nullptr;
        if (!p.uses[at] || p.batch == 0) {
          if (dweight) std::fill_n(dweight, block * p.weight.size, char{0});
          continue;
        }
        const void* w = p.element(weight, offset(i, j));
        const double product = p.weight.snr->finish(w, sums_of(i, j), p.gates[at], dweight, block);
        if (!to.gates.empty()) to.gates[t.col / kGradientRows * p.gates.size() + at] = product;
      }
      if (to.bias)
        p.weight.pack->narrow(column_sums + (i - t.first) * t.cols * size,
                              static_cast<char*>(to.bias) + (i * p.width + t.col) * int64_t(p.weight.size), t.cols);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> snr_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                               const Tensor& weight_in, const Tensor& gate,
                                                               const Tensor& saved_in, std::string activation_name,
                                                               bool skip_closed, int64_t needs) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in), grad = dense(grad_in), saved = dense(saved_in);
  const Problem p = problem(x, weight, gate, skip_closed);
  const int64_t columns = p.outputs * p.width, numbers = p.batch * columns;
  STD_TORCH_CHECK(grad.numel() == numbers && grad.scalar_type() == x.scalar_type(),
                  "grad must be [B,I,N] in x's dtype");
  const bool through = activation != Activation::kNone;
  STD_TORCH_CHECK(!through || (saved.numel() == numbers && saved.scalar_type() == x.scalar_type()),
                  "saved must be [B,I,N] in x's dtype");
  const auto gradient = [&](const Tensor& like, int64_t bit) {
    return needs & bit ? allocate_like(like) : allocate({0}, like.scalar_type());
  };
  Tensor dx = needs & 1 ? allocate({p.batch, p.inputs, p.features}, p.x.dtype) : allocate({0}, p.x.dtype);
  Tensor dweight = gradient(weight, 2), dgate = gradient(gate, 4);
  Tensor dbias = needs & 8 ? allocate({p.outputs, p.width}, p.weight.dtype) : allocate({0}, p.weight.dtype);

  const Rows dz{
      grad.const_data_ptr(), through ? saved.const_data_ptr() : nullptr, activation, columns, p.width, p.width};
  if (dx.numel())
    multiply_blocks(p, weight, false, dz, {dx.mutable_data_ptr(), nullptr, nullptr, Activation::kNone, 0}, p.features);
  if (needs & 14) {
    ParameterGradients to{
        needs & 2 ? dweight.mutable_data_ptr() : nullptr, needs & 8 ? dbias.mutable_data_ptr() : nullptr, {}};
    const int64_t chunks = std::max<int64_t>(1, (p.width + kGradientRows - 1) / kGradientRows);
    if (needs & 4) to.gates.assign(chunks * p.gates.size(), 0.0);
    parameter_gradients(p, x, weight, dz, to);
    with_type(gate.scalar_type(), "gate", [&](auto s) {
      using S = decltype(s);
      for (size_t g = 0; needs & 4 && g < p.gates.size(); ++g) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += to.gates[c * p.gates.size() + g];
        mutable_data<S>(dgate)[g] = static_cast<S>(SumOf<S>(sum));
      }
    });
  }
  return {dx, dweight, dgate, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("snr_linear", TORCH_BOX(&snr_linear));
  m.impl("snr_linear_eager", TORCH_BOX(&snr_linear));
  m.impl("snr_linear_backward", TORCH_BOX(&snr_linear_backward));
}

}  // namespace mtl
