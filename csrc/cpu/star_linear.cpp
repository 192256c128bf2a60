// star_linear on a CPU: rows sorted by domain, then for each domain the plain products of expert_linear with W * W_p,
// which is formed in float32 as it is packed.
//
//   forward   Y_p [n_p, N] = X_p  [n_p, K]  (W * W_p)^T      rows gathered before, scattered after each block
//   dX        dX_p [n_p, K] = dZ_p [n_p, N]  (W * W_p)
//   S_p       S_p [N, K]    = dZ_p^T         X_p              dW_p = S_p * W, dW = sum_p S_p * W_p
//
// dZ = dY * act' is formed while packing. Neither threads nor their timing change a bit: rows are independent, and the
// sums over rows are cut by fixed rules ("lanes") and added up in order.
#include <algorithm>
#include <cstring>

#include "domains.h"
#include "gather.h"
#include "star_kernels.h"

namespace mtl {

namespace {

// Of packed rows: they, the rows they came from and the product's rows share the L2 with the panels of the weight.
constexpr int64_t kBlockBytes = 96 << 10;
constexpr int64_t kPanelBytes = 8 << 20;  // of the packed weight of a task
// Panels of W * W_p that are formed, then packed, at a time: forward's product lies in whole rows of the weight and
// should stay in the L1; dX's in columns, which are read in runs long enough for the prefetcher.
constexpr int64_t kForwardPanels = 2, kInputPanels = 16;
constexpr int64_t kDepth = 256;   // rows that S takes at a time
constexpr int64_t kOutputs = 96;  // rows of S at a time: they stay in the L2 until dW_p and dW have them

struct Problem {
  int64_t batch, domains, outputs, features;  // B, P, N, K
  size_t element, w_element, packed;          // bytes of a number of x, of a weight, of a sum
  int64_t tile_rows, tile_cols;
  const char *weight, *domain_weight;
  const PackKernels &pack, &pack_w, &pack_sums;  // by storage type: x's, the weights', the sums'
  const StarKernels& star;
  Domains rows;

  int64_t slice() const { return outputs * features; }
  const char* domain_slice(int64_t p) const { return domain_weight + p * slice() * int64_t(w_element); }
  double work() const { return double(batch + kDomainCost * domains) * slice(); }
};

Problem problem(const Tensor& x, const Tensor& domain, const Tensor& weight, const Tensor& domain_weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be [B,K] and weight [N,K]");
  STD_TORCH_CHECK(x.size(1) == weight.size(1), "x and weight must agree in K");
  STD_TORCH_CHECK(
      domain_weight.dim() == 3 && domain_weight.size(1) == weight.size(0) && domain_weight.size(2) == weight.size(1),
      "domain_weight must be [P,N,K] with weight's N and K");
  STD_TORCH_CHECK(domain.dim() == 1 && domain.size(0) == x.size(0), "domain must be [B]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() ||
                      (weight.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
                  "weight must have x's dtype, or float32 where x is 16 bit");
  STD_TORCH_CHECK(domain_weight.scalar_type() == weight.scalar_type(), "domain_weight must have weight's dtype");
  const int x_type = int(storage_of(x.scalar_type(), "x")), w_type = int(storage_of(weight.scalar_type(), "weight"));
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const auto& star = MTL_BEST_ISA(star_kernels);
  const auto& linear = linear_kernels();
  const size_t packed = is_double ? sizeof(double) : sizeof(float);
  return {x.size(0),
          domain_weight.size(0),
          weight.size(0),
          weight.size(1),
          x.element_size(),
          weight.element_size(),
          packed,
          linear.tile_rows,
          linear.of_size(packed).tile_cols,
          static_cast<const char*>(weight.const_data_ptr()),
          static_cast<const char*>(domain_weight.const_data_ptr()),
          linear.by_storage[x_type],
          linear.by_storage[w_type],
          linear.by_storage[int(is_double ? Storage::kDouble : Storage::kFloat)],
          star[w_type],
          sort_by_domain(domain, domain_weight.size(0))};
}

// Every row of `a` (depth numbers) times its domain's packed W * W_p, `cols` of them, to `out`, whose stride is cols.
// pack_weight(p, col, cols, room, panels) packs some columns of domain p; bias_of(p, col, cols, room) is their bias.
template <class PackWeight, class BiasOf>
void multiply_rows(const Problem& q, const Operand& a, int64_t depth, int64_t cols, const Output& out,
                   const PackWeight& pack_weight, const BiasOf& bias_of) {
  const int64_t row_bytes = std::max<int64_t>(1, depth * int64_t(q.packed));
  const int64_t block = std::clamp<int64_t>(kBlockBytes / row_bytes / q.tile_rows, 4, 40) * q.tile_rows;
  const int64_t threads = torch::stable::get_num_threads();
  // Every task forms and packs the weight again, so that there are few: a domain's rows are cut only to feed threads.
  const int64_t rows_of_task =
      threads == 1 ? q.batch : std::max(2 * block, round_up((q.batch + 4 * threads - 1) / (4 * threads), q.tile_rows));
  int64_t row_tasks = 0;
  for (int64_t p = 0; p < q.domains; ++p) row_tasks += (q.rows.count(p) + rows_of_task - 1) / rows_of_task;
  const int64_t splits =
      threads == 1 || row_tasks >= 2 * threads || row_tasks == 0 ? 1 : (2 * threads + row_tasks - 1) / row_tasks;
  const int64_t widest = std::max<int64_t>(1, kPanelBytes / row_bytes / q.tile_cols) * q.tile_cols;
  const int64_t width = std::clamp(round_up((cols + splits - 1) / splits, q.tile_cols), q.tile_cols, widest);
  struct Task {
    int64_t domain, first, rows, col, cols;
  };
  std::vector<Task> tasks;
  for (int64_t p = 0; p < q.domains; ++p)
    for (int64_t r = q.rows.first[p]; r < q.rows.first[p + 1]; r += rows_of_task)
      for (int64_t c = 0; c < cols; c += width)
        tasks.push_back({p, r, std::min(rows_of_task, q.rows.first[p + 1] - r), c, std::min(width, cols - c)});

  run_tasks(int64_t(tasks.size()), q.work(), [&](int64_t i) {
    const Task& t = tasks[i];
    const int64_t most = std::min(block, t.rows), row_out = t.cols * int64_t(q.element);
    const size_t a_room = most * depth * q.element;
    char* packed_rows = static_cast<char*>(scratch(1, round_up(most, q.tile_rows) * depth * q.packed + 64));
    char* panels = static_cast<char*>(scratch(2, round_up(t.cols, q.tile_cols) * depth * q.packed + 64));
    const size_t bias_room = round_up(t.cols, q.tile_cols) * 2 * q.packed;
    const size_t product_room = std::min(kInputPanels * q.tile_cols, t.cols) * depth * q.packed;
    Room room{static_cast<char*>(scratch(3, Room::padded(2 * a_room) + 2 * Room::padded(most * row_out) +
                                                Room::padded(bias_room) + Room::padded(product_room)))};
    char *gathered = room.take(2 * a_room), *y = room.take(most * row_out), *z = room.take(most * row_out);
    char *bias = room.take(bias_room), *product = room.take(product_room);
    pack_weight(t.domain, t.col, t.cols, product, panels);
    const void* biases = bias_of(t.domain, t.col, t.cols, bias);
    for (int64_t r = 0; r < t.rows; r += block) {
      const int64_t n = std::min(block, t.rows - r);
      const int64_t* rows = q.rows.rows.data() + t.first + r;
      q.pack.rows(gather(a, rows, n, depth, q.element, gathered), n, depth, packed_rows);
      const int64_t corner = t.col * int64_t(q.element), stride = out.stride * int64_t(q.element);
      const bool direct = consecutive(rows, n);
      const auto at = [&](void* to, char* block_of_it) -> void* {
        return !to ? nullptr : direct ? static_cast<char*>(to) + rows[0] * stride + corner : block_of_it;
      };
      q.pack.multiply(packed_rows, depth, panels, n, t.cols, depth,
                      {at(out.y, y), at(out.z, z), biases, out.activation, direct ? out.stride : t.cols});
      if (direct) continue;
      scatter(y, static_cast<char*>(out.y) + corner, rows, n, row_out, stride);
      if (out.z) scatter(z, static_cast<char*>(out.z) + corner, rows, n, row_out, stride);
    }
  });
}

std::tuple<Tensor, Tensor> star_linear(const Tensor& x_in, const Tensor& domain, const Tensor& weight_in,
                                       const Tensor& domain_weight_in, const OptionalTensor& bias_in,
                                       const OptionalTensor& domain_bias_in, std::string activation_name, bool save) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in), domain_weight = dense(domain_weight_in);
  const Problem q = problem(x, domain, weight, domain_weight);
  const auto check = [&](const OptionalTensor& b, int64_t numel, const char* message) -> OptionalTensor {
    if (!b) return b;
    STD_TORCH_CHECK(b->numel() == numel && b->scalar_type() == weight.scalar_type(), message);
    return dense(*b);
  };
  const OptionalTensor bias = check(bias_in, q.outputs, "bias must be [N] in weight's dtype");
  const OptionalTensor domain_bias =
      check(domain_bias_in, q.domains * q.outputs, "domain_bias must be [P,N] in weight's dtype");
  const bool with_z = save && needs_input(activation);
  Tensor y = allocate({q.batch, q.outputs}, x.scalar_type());
  Tensor z = with_z ? allocate_like(y) : allocate({0}, x.scalar_type());
  if (y.numel() == 0) return {y, z};

  const Operand a{x.const_data_ptr(), nullptr, Activation::kNone, x.stride(0)};
  const Output out{y.mutable_data_ptr(), with_z ? z.mutable_data_ptr() : nullptr, nullptr, activation, q.outputs};
  const auto pack_weight = [&](int64_t p, int64_t col, int64_t cols, char* product, char* panels) {
    const int64_t step = kForwardPanels * q.tile_cols, depth = q.features;
    for (int64_t c = 0; c < cols; c += step) {
      const int64_t n = std::min(step, cols - c), at = (col + c) * depth * int64_t(q.w_element);
      q.star.product(q.weight + at, q.domain_slice(p) + at, product, n * depth);
      q.pack_sums.rows_wide({product, nullptr, Activation::kNone, depth}, n, depth, panels + c * depth * q.packed);
    }
  };
  const auto bias_of = [&](int64_t p, int64_t col, int64_t cols, char* room) -> const void* {
    if (!bias && !domain_bias) return nullptr;
    const int64_t padded = round_up(cols, q.tile_cols);
    std::memset(room, 0, 2 * padded * q.packed);
    const auto widen = [&](const OptionalTensor& from, int64_t at, char* to) {
      if (from) q.pack_w.widen(static_cast<const char*>(from->const_data_ptr()) + at * int64_t(q.w_element), to, cols);
    };
    widen(bias, col, room), widen(domain_bias, p * q.outputs + col, room + padded * q.packed);
    with_type(q.packed == sizeof(double) ? ScalarType::Double : ScalarType::Float, "bias", [&](auto c) {
      auto* sum = reinterpret_cast<decltype(c)*>(room);
      for (int64_t i = 0; i < cols; ++i) sum[i] += sum[padded + i];
    });
    return room;
  };
  multiply_rows(q, a, q.features, q.outputs, out, pack_weight, bias_of);
  return {y, z};
}

Tensor input_gradient(const Problem& q, const Tensor& x, const Operand& dz) {
  Tensor dx = allocate({q.batch, q.features}, x.scalar_type());
  if (dx.numel() == 0) return dx;
  const auto pack_weight = [&](int64_t p, int64_t col, int64_t cols, char* product, char* panels) {
    const int64_t step = kInputPanels * q.tile_cols, depth = q.outputs;
    for (int64_t c = 0; c < cols; c += step) {
      const int64_t n = std::min(step, cols - c);
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t at = (k * q.features + col + c) * int64_t(q.w_element);
        q.star.product(q.weight + at, q.domain_slice(p) + at, product + k * n * q.packed, n);
      }
      q.pack_sums.columns_wide({product, nullptr, Activation::kNone, n}, depth, n, panels + c * depth * q.packed);
    }
  };
  const auto no_bias = [](int64_t, int64_t, int64_t, char*) -> const void* { return nullptr; };
  const Output out{dx.mutable_data_ptr(), nullptr, nullptr, Activation::kNone, q.features};
  multiply_rows(q, dz, q.outputs, q.features, out, pack_weight, no_bias);
  return dx;
}

struct Gradients {
  Tensor dweight, ddomain_weight, dbias, ddomain_bias;
};

struct Wanted {
  bool weight, domain_weight, bias, domain_bias;
};

// One lane's segments, rows [row, row + n) of S: to `own`, the lane's sums of dW and db, and to partial sums or at once
// to the domain's gradients.
void sum_lane(const Problem& q, const std::vector<Segment>& lane, const Operand& dz, const Operand& x,
              const Wanted& wanted, const Gradients& out, char* own, char* partials, int64_t row, int64_t n) {
  const bool is_double = q.packed == sizeof(double), with_s = wanted.weight || wanted.domain_weight;
  const SumKernels& kernels = linear_kernels().of_size(q.packed);
  const int64_t k = q.features, numbers = q.slice() + q.outputs;
  const auto gradient = [&](const Tensor& t, int64_t at) {
    return static_cast<char*>(t.mutable_data_ptr()) + at * int64_t(q.w_element);
  };
  const int64_t block_bytes =
      round_up(kOutputs, q.tile_rows) * round_up(kDepth, q.tile_rows) * int64_t(q.packed) + kPastEnd;
  char* dz_block = static_cast<char*>(scratch(1, 2 * block_bytes));
  char* a = dz_block + block_bytes;
  char* b = static_cast<char*>(scratch(2, round_up(k, q.tile_cols) * kDepth * q.packed + 64));
  const size_t z_room = 2 * kDepth * n * q.element, x_room = kDepth * k * q.element;
  const size_t s_room = n * k * q.packed, sum_room = n * q.packed;
  Room room{static_cast<char*>(
      scratch(3, Room::padded(z_room) + Room::padded(x_room) + Room::padded(s_room) + Room::padded(sum_room)))};
  char *gathered_z = room.take(z_room), *gathered_x = room.take(x_room);
  char *own_s = room.take(s_room), *own_sums = room.take(sum_room);
  for (const Segment& g : lane) {
    const bool whole = g.partial < 0;
    char* part = whole ? nullptr : partials + g.partial * numbers * int64_t(q.packed);
    char* s = whole ? own_s : part + row * k * q.packed;
    char* sums = whole ? own_sums : part + (q.slice() + row) * q.packed;
    std::memset(sums, 0, n * q.packed);
    for (int64_t r = 0; r < g.rows; r += kDepth) {
      const int64_t depth = std::min(kDepth, g.rows - r);
      const bool last = r + depth == g.rows;
      const int64_t* rows = q.rows.rows.data() + g.first + r;
      const Operand dz_rows = gather(moved(dz, 0, row, q.element), rows, depth, n, q.element, gathered_z);
      if (with_s) {
        const Operand x_rows = gather(x, rows, depth, k, q.element, gathered_x);
        q.pack.columns_wide(x_rows, depth, k, b);
      }
      for (int64_t c = 0; c < n; c += kOutputs) {
        const int64_t m = std::min(kOutputs, n - c);
        q.pack.rows(moved(dz_rows, 0, c, q.element), depth, m, dz_block);
        kernels.add_rows(dz_block, depth, m, sums + c * q.packed);
        if (!with_s) continue;
        kernels.turn(dz_block, depth, m, a);
        char* s_rows = s + c * k * q.packed;
        kernels.accumulate_turned(a, b, m, k, depth, {s_rows, k, r > 0});
        if (!last) continue;
        const int64_t at = (row + c) * k;
        q.star.gradients(
            s_rows, q.weight + at * q.w_element, q.domain_slice(g.domain) + at * q.w_element,
            whole && wanted.domain_weight ? gradient(out.ddomain_weight, g.domain * q.slice() + at) : nullptr,
            wanted.weight ? own + at * q.packed : nullptr, m * k);
      }
    }
    if (whole && wanted.domain_bias) q.pack_w.narrow(sums, gradient(out.ddomain_bias, g.domain * q.outputs + row), n);
    if (wanted.bias)
      with_type(is_double ? ScalarType::Double : ScalarType::Float, "bias", [&](auto c) {
        auto* to = reinterpret_cast<decltype(c)*>(own + (q.slice() + row) * q.packed);
        for (int64_t i = 0; i < n; ++i) to[i] += reinterpret_cast<decltype(c)*>(sums)[i];
      });
  }
}

// What lanes and partial sums hold, added up in order: dW, db, and the gradients of domains that lie in several lanes.
void add_up(const Problem& q, const std::vector<std::vector<Segment>>& lanes, const Wanted& wanted,
            const Gradients& out, const char* own, char* partials) {
  const int64_t numbers = q.slice() + q.outputs, bytes = numbers * int64_t(q.packed), w_bytes = int64_t(q.w_element);
  std::vector<const Segment*> cut;  // first segment of each cut domain; its partial sums follow one another
  std::vector<int64_t> pieces;
  for (const auto& lane : lanes)
    for (const Segment& g : lane) {
      if (g.partial < 0) continue;
      if (cut.empty() || cut.back()->domain != g.domain) cut.push_back(&g), pieces.push_back(0);
      ++pieces.back();
    }
  constexpr int64_t kChunk = 4096;
  const auto sum = [&](char* to, const char* from, int64_t count, int64_t n) {
    with_type(q.packed == sizeof(double) ? ScalarType::Double : ScalarType::Float, "sums", [&](auto c) {
      using C = decltype(c);
      std::memcpy(to, from, n * sizeof(C));
      for (int64_t j = 1; j < count; ++j) {
        const C* more = reinterpret_cast<const C*>(from + j * bytes);
        for (int64_t i = 0; i < n; ++i) reinterpret_cast<C*>(to)[i] += more[i];
      }
    });
  };
  // The numbers of S first, then the column sums.
  const int64_t matrix_tasks = (q.slice() + kChunk - 1) / kChunk, row_tasks = (q.outputs + kChunk - 1) / kChunk;
  run_tasks(matrix_tasks + row_tasks, double(numbers) * (lanes.size() + cut.size()), [&](int64_t i) {
    const bool matrix = i < matrix_tasks;
    const int64_t at = (matrix ? i : i - matrix_tasks) * kChunk, base = matrix ? 0 : q.slice();
    const int64_t n = std::min(kChunk, (matrix ? q.slice() : q.outputs) - at);
    const int64_t offset = (base + at) * int64_t(q.packed);
    char* room = static_cast<char*>(scratch(1, kChunk * q.packed));
    if (matrix ? wanted.weight : wanted.bias) {
      sum(room, own + offset, int64_t(lanes.size()), n);
      const Tensor& t = matrix ? out.dweight : out.dbias;
      q.pack_w.narrow(room, static_cast<char*>(t.mutable_data_ptr()) + at * w_bytes, n);
    }
    if (!(matrix ? wanted.domain_weight : wanted.domain_bias)) return;
    const Tensor& t = matrix ? out.ddomain_weight : out.ddomain_bias;
    for (size_t j = 0; j < cut.size(); ++j) {
      sum(room, partials + cut[j]->partial * bytes + offset, pieces[j], n);
      char* to =
          static_cast<char*>(t.mutable_data_ptr()) + (cut[j]->domain * (matrix ? q.slice() : q.outputs) + at) * w_bytes;
      if (matrix)
        q.star.gradients(room, q.weight + at * w_bytes, nullptr, to, nullptr, n);
      else
        q.pack_w.narrow(room, to, n);
    }
  });
}

void parameter_gradients(const Problem& q, const Operand& x, const Operand& dz, const Wanted& wanted,
                         const Gradients& out) {
  int64_t num_partials = 0;
  const auto lanes = cut_into_lanes(q.rows, &num_partials);
  const int64_t num_lanes = int64_t(lanes.size()), bytes = (q.slice() + q.outputs) * int64_t(q.packed);
  char* own = static_cast<char*>(scratch(0, (num_lanes + num_partials) * bytes + 64));
  char* partials = own + num_lanes * bytes;
  // Where there are fewer lanes than threads could take, each is cut by rows of S, which changes no sum; between the
  // blocks that are packed at a time, since a vector's end in another place would round the activation's gradient anew.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t splits = threads == 1 || num_lanes >= 2 * threads ? 1 : (2 * threads + num_lanes - 1) / num_lanes;
  const int64_t width = std::max(kOutputs, round_up((q.outputs + splits - 1) / splits, kOutputs));
  const int64_t parts = (q.outputs + width - 1) / width;
  run_tasks(num_lanes * parts + q.domains, q.work(), [&](int64_t i) {
    if (i >= num_lanes * parts) {
      const int64_t p = i - num_lanes * parts;  // a domain without rows: its gradients are zero
      if (q.rows.count(p) > 0) return;
      const auto clear = [&](const Tensor& t, int64_t n) {
        if (n > 0)
          std::memset(static_cast<char*>(t.mutable_data_ptr()) + p * n * int64_t(q.w_element), 0, n * q.w_element);
      };
      if (wanted.domain_weight) clear(out.ddomain_weight, q.slice());
      if (wanted.domain_bias) clear(out.ddomain_bias, q.outputs);
      return;
    }
    const int64_t row = i % parts * width, n = std::min(width, q.outputs - row);
    char* lane = own + i / parts * bytes;
    std::memset(lane + row * q.features * q.packed, 0, n * q.features * q.packed);
    std::memset(lane + (q.slice() + row) * q.packed, 0, n * q.packed);
    sum_lane(q, lanes[i / parts], dz, x, wanted, out, lane, partials, row, n);
  });
  add_up(q, lanes, wanted, out, own, partials);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> star_linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                        const Tensor& domain, const Tensor& weight_in,
                                                                        const Tensor& domain_weight_in,
                                                                        const Tensor& saved_in,
                                                                        std::string activation_name, int64_t needs) {
  const Activation activation = activation_from(activation_name);
  const Tensor x = dense_rows(x_in), weight = dense(weight_in), domain_weight = dense(domain_weight_in);
  const Tensor grad = dense(grad_in), saved = dense(saved_in);
  const Problem q = problem(x, domain, weight, domain_weight);
  STD_TORCH_CHECK(grad.numel() == q.batch * q.outputs && grad.scalar_type() == x.scalar_type(),
                  "grad must be [B,N] in x's dtype");
  const bool through = activation != Activation::kNone;
  STD_TORCH_CHECK(!through || (saved.numel() == grad.numel() && saved.scalar_type() == x.scalar_type()),
                  "saved must be [B,N] in x's dtype");
  const Operand dz{grad.const_data_ptr(), through ? saved.const_data_ptr() : nullptr, activation, q.outputs};
  const ScalarType type = weight.scalar_type();
  const Wanted wanted{bool(needs & 2), bool(needs & 4), bool(needs & 8), bool(needs & 16)};
  Tensor dx = needs & 1 ? input_gradient(q, x, dz) : allocate({0}, x.scalar_type());
  const Gradients out{wanted.weight ? allocate_like(weight) : allocate({0}, type),
                      wanted.domain_weight ? allocate_like(domain_weight) : allocate({0}, type),
                      wanted.bias ? allocate({q.outputs}, type) : allocate({0}, type),
                      wanted.domain_bias ? allocate({q.domains, q.outputs}, type) : allocate({0}, type)};
  if (needs & 30)
    parameter_gradients(q, {x.const_data_ptr(), nullptr, Activation::kNone, x.stride(0)}, dz, wanted, out);
  return {dx, out.dweight, out.ddomain_weight, out.dbias, out.ddomain_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("star_linear", TORCH_BOX(&star_linear));
  m.impl("star_linear_eager", TORCH_BOX(&star_linear));
  m.impl("star_linear_backward", TORCH_BOX(&star_linear_backward));
}

}  // namespace mtl
