// expert_mix on a CPU, forward: experts' outputs live in a thread's scratch only, between their product and the mix.
//
// Memory does not grow with E beyond what the arguments bring: weights are packed a phase at a time into scratch of
// fixed size, once a call for all row blocks, and the sums over experts wait in the output itself (16 bit: in a buffer
// of a range of rows).
#include "expert_mix.h"

namespace mtl {

namespace {

// Most outputs of a set of experts, in numbers: several experts, so that sums over tasks are loaded and stored seldom.
constexpr int64_t kSetColumns = 4096;
// Sums of a block of rows, which stay in L2 from one set to the next.
constexpr int64_t kBlockNumbers = int64_t{1} << 16;
// Packed weights of a phase. One huge page; a share of the last-level cache, which every row block reads them from.
constexpr int64_t kPhaseBytes = int64_t{2} << 20;
// Sums of 16 bit outputs over several phases.
constexpr int64_t kSumBytes = int64_t{16} << 20;

// Sets of experts whose weights are packed at the same time.
struct Phase {
  size_t begin, end;
};

int64_t panel_numbers(const ExpertMixCall& call, const ExpertRun& run) {
  return call.to_cols(run.count * call.width) * (call.features + (call.with_bias ? 1 : 0));
}

std::vector<Phase> phases_of(const ExpertMixCall& call, int64_t* numbers) {
  std::vector<Phase> phases;
  int64_t total = 0;
  for (size_t s = 0; s < call.sets.size(); ++s) {
    int64_t own = 0;
    for (const ExpertRun& run : call.sets[s].runs) own += panel_numbers(call, run);
    if (phases.empty() || (total + own) * int64_t(call.size) > kPhaseBytes) phases.push_back({s, s}), total = 0;
    phases.back().end = s + 1;
    *numbers = std::max(*numbers, total += own);
  }
  return phases;
}

struct Forward {
  const ExpertMixCall& call;
  char* out;
  char* sums;  // [rows of a range, T, D] in the type of sums, from row `range` on; null: a task's own
  int64_t range;
  bool in_place;  // out is in the type of sums
  char* saved;  // [B,E,D] like x, what backward reads again: h, or z where the activation's gradient needs it; or null

  size_t scratch_bytes(int64_t rows) const {
    const auto bytes = [&](int64_t numbers) { return Pieces::bytes(numbers, call.size); };
    const int64_t outputs = rows * call.largest_set * call.width;
    return bytes(call.to_rows(rows) * call.features) + bytes(outputs) + bytes(saves_input() ? outputs : 0) +
           bytes(rows * call.most_routes) + bytes(in_place || sums ? 0 : rows * call.tasks * call.width);
  }

  bool saves_input() const { return saved && needs_input(call.activation); }

  // Batch rows [b, b + rows) of a phase. panels: its packed weights.
  void block(const Phase& phase, const char* panels, int64_t b, int64_t rows) const {
    Pieces pieces(scratch(1, scratch_bytes(rows)), call.size);
    void* a = pieces.take(call.to_rows(rows) * call.features);
    const int64_t outputs = rows * call.largest_set * call.width;
    char* h = static_cast<char*>(pieces.take(outputs));
    char* z = static_cast<char*>(pieces.take(saves_input() ? outputs : 0));
    void* weights = pieces.take(rows * call.most_routes);
    const int64_t row_size = call.tasks * call.width;
    void* to = in_place ? out + b * row_size * call.size
               : sums   ? sums + (b - range) * row_size * call.size
                        : pieces.take(rows * row_size);
    int64_t packed = -1;
    for (size_t s = phase.begin; s < phase.end; ++s) {
      const ExpertSet& set = call.sets[s];
      for (const ExpertRun& run : set.runs) {
        if (packed != run.input) call.pack->rows(call.input_rows(run.input, b), rows, call.features, a);
        packed = run.input;
        const int64_t cols = run.count * call.width;
        const char* bias = panels + call.to_cols(cols) * call.features * call.size;
        const int64_t place = run.place * call.width * call.size, stride = set.experts() * call.width;
        const Output y{h + place, saves_input() ? z + place : nullptr, call.with_bias ? bias : nullptr, call.activation,
                       stride};
        call.pack_sum->multiply(a, call.features, panels, rows, cols, call.features, y);
        if (saved) {
          const char* from = static_cast<const char*>(y.z ? y.z : y.y);
          char* keep = saved + (b * call.experts + run.first) * call.width * call.element;
          for (int64_t r = 0; r < rows; ++r)
            call.pack->narrow(from + r * stride * call.size, keep + r * call.experts * call.width * call.element, cols);
        }
        panels += panel_numbers(call, run) * call.size;
      }
      call.kernels->weights(call.gates, set.routing, b, b + rows, weights);
      call.kernels->mix(set.routing, rows, call.width, weights, h, to, s > 0);
    }
    if (!in_place && phase.end == call.sets.size())
      call.pack->narrow(to, out + b * row_size * call.element, rows * row_size);
  }
};

void pack(const ExpertMixCall& call, const Phase& phase, char* panels) {
  std::vector<std::pair<const ExpertRun*, char*>> runs;
  for (size_t s = phase.begin; s < phase.end; ++s) {
    for (const ExpertRun& run : call.sets[s].runs) {
      runs.emplace_back(&run, panels);
      panels += panel_numbers(call, run) * call.size;
    }
  }
  const double work = double(runs.size()) * call.largest_set * call.width * call.features;
  run_tasks(int64_t(runs.size()), work, [&](int64_t i) {
    const auto [run, to] = runs[i];
    const int64_t cols = run->count * call.width;
    call.pack_w->rows_wide(call.weight_rows(*run), cols, call.features, to);
    call.take_bias(*run, to + call.to_cols(cols) * call.features * call.size);
  });
}

// out and lse; saved, where given, is filled for backward.
std::tuple<Tensor, Tensor> run(ExpertMixCall& call, Tensor* saved) {
  const Tensor& x = call.x;
  Tensor out = allocate({call.batch, call.tasks, call.width}, x.scalar_type());
  Tensor lse = call.gates.softmax ? allocate({call.batch, call.tasks}, call.sum) : allocate({0}, call.sum);
  call.normalise(&lse);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  if (out.numel() == 0) return {out, lse};
  if (call.sets.empty()) {
    std::fill_n(to, out.numel() * out.element_size(), char{0});
    return {out, lse};
  }
  int64_t numbers = 0;
  const std::vector<Phase> phases = phases_of(call, &numbers);
  char* panels = static_cast<char*>(scratch(0, numbers * call.size + 64));
  const bool in_place = x.scalar_type() == call.sum, keep = !in_place && phases.size() > 1;
  const int64_t row_bytes = call.tasks * call.width * call.size;
  const int64_t range = keep ? std::max<int64_t>(4096, kSumBytes / row_bytes) : call.batch;
  const Tensor sums = keep ? allocate({std::min(range, call.batch), call.tasks, call.width}, call.sum) : Tensor();
  // A few rows are shared out too; how rows are cut changes no bit of the result.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rows =
      std::min(call.block_rows(kBlockNumbers), call.to_rows((call.batch + 2 * threads - 1) / (2 * threads)));
  for (int64_t first = 0; first < call.batch; first += range) {
    const int64_t end = std::min(call.batch, first + range);
    const Forward forward{call,  to,       keep ? static_cast<char*>(sums.mutable_data_ptr()) : nullptr,
                          first, in_place, saved ? static_cast<char*>(saved->mutable_data_ptr()) : nullptr};
    for (const Phase& phase : phases) {
      pack(call, phase, panels);
      run_tasks((end - first + rows - 1) / rows, call.work() / double(phases.size()), [&](int64_t i) {
        const int64_t b = first + i * rows;
        forward.block(phase, panels, b, std::min(rows, end - b));
      });
    }
  }
  return {out, lse};
}

using Counts = std::optional<std::vector<int64_t>>;

std::tuple<Tensor, Tensor> expert_mix(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& logits, const OptionalTensor& fixed,
                                      const OptionalTensor& mask, const OptionalTensor& columns, Counts counts,
                                      std::string activation) {
  ExpertMixCall call =
      prepare_expert_mix(x, weight, bias, logits, fixed, mask, columns, counts, activation, kSetColumns);
  return run(call, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> expert_mix_saving(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                     const OptionalTensor& logits, const OptionalTensor& fixed,
                                                     const OptionalTensor& mask, const OptionalTensor& columns,
                                                     Counts counts, std::string activation) {
  ExpertMixCall call =
      prepare_expert_mix(x, weight, bias, logits, fixed, mask, columns, counts, activation, kSetColumns);
  Tensor saved = allocate({call.batch, call.experts, call.width}, x.scalar_type());
  auto [out, lse] = run(call, &saved);
  return {out, lse, saved};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("expert_mix", TORCH_BOX(&expert_mix));
  m.impl("expert_mix_eager", TORCH_BOX(&expert_mix));
  m.impl("expert_mix_saving", TORCH_BOX(&expert_mix_saving));
  m.impl("expert_mix_saving_eager", TORCH_BOX(&expert_mix_saving));
}

}  // namespace mtl
