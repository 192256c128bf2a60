// expert_mix on a CPU, backward: the experts' outputs are computed once more, or read where forward saved them, a block
// of rows and a set of experts at a time, and from them, while they are in the cache, everything else:
//
//   dA = <dO, h>      dZ = (sum_t A dO) act'      dX += dZ W      dW += dZ^T X      db += sum_b dZ
//
// A task takes a part of the batch and a share of the sets. Parts and shares depend on the sizes alone; each writes
// sums of its own, which are added up in order, so that the number of threads changes no bit.
#include "expert_mix.h"

namespace mtl {

namespace {

constexpr int64_t kSetColumns = 512;
// Gradients of a block of rows; more than in forward, for dW takes the rows as its depth.
constexpr int64_t kBlockNumbers = int64_t{1} << 17;
// A part has this many rows at least, and there are so many parts at most: each holds a dW of its own.
constexpr int64_t kPartRows = 1024, kParts = 8;
// Shares of the sets: each holds a dX of its own for the units it has in common with others.
constexpr int64_t kShares = 4;
constexpr int64_t kFinishRows = 256;  // of a task that finishes dlogits and dstatic

struct Needs {
  bool x, weight, bias, logits, fixed;
};

// A run's packed weights and bias: once for h, once, the depth in the outputs, for dX.
struct Panels {
  const ExpertRun* run;
  int64_t forward, bias, gradient;
};

// dX of one unit as one share of the sets sees it.
struct InputSum {
  int64_t input;
  size_t share;
  char* sums;  // [B,K] in the type of sums; null: this share is the unit's only one, and writes dX itself
};

class Backward {
 public:
  // saved: what forward saved for it, or null, and then it is computed once more.
  Backward(const ExpertMixCall& call, const Tensor& grad, const Tensor* saved, const Needs& needs)
      : call_(call), grad_(grad), saved_(saved), needs_(needs) {
    const int64_t parts = std::clamp<int64_t>(call.batch / kPartRows, 1, kParts);
    part_rows_ = std::max<int64_t>(1, (call.batch + parts - 1) / parts);
    parts_ = (call.batch + part_rows_ - 1) / part_rows_;
    shares_ = std::min<size_t>(call.sets.size(), kShares);
    rows_ = std::min(part_rows_, call.block_rows(kBlockNumbers));
  }

  // Fills da [B, columns] where there is a route, and the gradients that are needed.
  void run(Tensor& dx, Tensor& dweight, Tensor& dbias, Tensor& da) {
    da_ = static_cast<char*>(da.mutable_data_ptr());
    pack();
    if (needs_.x) share_inputs(dx);
    const int64_t outputs = call_.experts * call_.width;
    if (needs_.weight) dweight_ = part_sums(dweight, weight_sums_, outputs * call_.features);
    if (needs_.bias) dbias_ = part_sums(dbias, bias_sums_, outputs);
    run_tasks(parts_ * int64_t(shares_), 3 * call_.work(),
              [&](int64_t i) { task(i / int64_t(shares_), size_t(i) % shares_); });
    if (needs_.x) add_inputs();
    if (needs_.weight) add_parts(dweight, dweight_, call_.width * call_.features);
    if (needs_.bias) add_parts(dbias, dbias_, call_.width);
  }

 private:
  size_t first_set(size_t share) const { return call_.sets.size() * share / shares_; }
  char* at(void* base, int64_t number) const { return static_cast<char*>(base) + number * call_.size; }

  // Where the parts' sums go: a single part of the right type writes them where they belong.
  char* part_sums(Tensor& result, Tensor& own, int64_t numbers) const {
    if (parts_ == 1 && result.scalar_type() == call_.sum) return static_cast<char*>(result.mutable_data_ptr());
    own = allocate({parts_, numbers}, call_.sum);
    return static_cast<char*>(own.mutable_data_ptr());
  }

  // Both packings of all weights in use, and where they lie.
  void pack() {
    int64_t total = 0;
    for (const ExpertSet& set : call_.sets) {
      first_panel_.push_back(panels_.size());
      for (const ExpertRun& run : set.runs) {
        const int64_t cols = run.count * call_.width, padded = call_.to_cols(cols);
        Panels p{&run, total, total + (saved_ ? 0 : padded * call_.features), 0};
        p.gradient = p.bias + (call_.with_bias && !saved_ ? padded : 0);
        total = p.gradient + (needs_.x ? cols * call_.to_cols(call_.features) : 0);
        panels_.push_back(p);
      }
    }
    packed_ = scratch(0, total * call_.size + 64);
    run_tasks(int64_t(panels_.size()), double(call_.weight.numel()), [&](int64_t i) {
      const Panels& p = panels_[i];
      const Operand weight = call_.weight_rows(*p.run);
      const int64_t cols = p.run->count * call_.width;
      if (!saved_) call_.pack_w->rows_wide(weight, cols, call_.features, at(packed_, p.forward));
      if (!saved_) call_.take_bias(*p.run, at(packed_, p.bias));
      if (needs_.x) call_.pack_w->columns_wide(weight, cols, call_.features, at(packed_, p.gradient));
    });
  }

  // Which shares meet which units of x.
  void share_inputs(Tensor& dx) {
    dx_ = static_cast<char*>(dx.mutable_data_ptr());
    met_.assign(call_.inputs, 0);
    for (size_t share = 0; share < shares_; ++share) {
      for (size_t s = first_set(share); s < first_set(share + 1); ++s) {
        for (const ExpertRun& run : call_.sets[s].runs) {
          if (!inputs_.empty() && inputs_.back().input == run.input && inputs_.back().share == share) continue;
          inputs_.push_back({run.input, share, nullptr});
          ++met_[run.input];
        }
      }
    }
    int64_t several = 0;
    for (const InputSum& i : inputs_) several += met_[i.input] > 1;
    const int64_t each = call_.batch * call_.features;
    if (several == 0) return;
    input_sums_ = allocate({several, each}, call_.sum);
    several = 0;
    for (InputSum& i : inputs_)
      if (met_[i.input] > 1) i.sums = at(input_sums_.mutable_data_ptr(), several++ * each);
  }

  struct Buffers {
    void *x_rows, *x_columns, *h, *z, *dz, *weights, *grad, *dz_rows, *dz_columns, *dx;
  };

  // A task's buffers in memory; with null memory only the bytes they take.
  size_t lay_out(void* memory, Buffers& m) const {
    const int64_t outputs = call_.largest_set * call_.width, k = call_.features;
    const struct {
      void** to;
      int64_t numbers;
    } wanted[] = {{&m.x_rows, call_.to_rows(rows_) * k},
                  {&m.x_columns, rows_ * call_.to_cols(k)},
                  {&m.h, rows_ * outputs},
                  {&m.z, needs_input(call_.activation) ? rows_ * outputs : 0},
                  {&m.dz, rows_ * outputs},
                  {&m.weights, rows_ * call_.most_routes},
                  {&m.grad, call_.element != call_.size ? rows_ * call_.tasks * call_.width : 0},
                  {&m.dz_rows, call_.to_rows(rows_) * outputs},
                  {&m.dz_columns, call_.to_rows(outputs) * rows_},
                  {&m.dx, rows_ * k}};
    Pieces pieces(memory, call_.size);
    size_t bytes = 0;
    for (const auto& w : wanted) {
      bytes += Pieces::bytes(w.numbers, call_.size);
      if (memory) *w.to = pieces.take(w.numbers);
    }
    return bytes;
  }

  void task(int64_t part, size_t share) {
    Buffers m{};
    lay_out(scratch(1, lay_out(nullptr, m)), m);
    const int64_t begin = part * part_rows_, end = std::min(call_.batch, begin + part_rows_);
    for (int64_t b = begin; b < end; b += rows_) block(m, part, share, b, std::min(rows_, end - b), b == begin);
  }

  // Batch rows [b, b + rows): all of a share's sets. first: the part's sums begin here.
  void block(const Buffers& m, int64_t part, size_t share, int64_t b, int64_t rows, bool first) {
    const int64_t row_size = call_.tasks * call_.width;
    const void* grad = static_cast<const char*>(grad_.const_data_ptr()) + b * row_size * call_.element;
    if (call_.element != call_.size) {
      call_.pack->widen(grad, m.grad, rows * row_size);
      grad = m.grad;
    }
    int64_t by_rows = -1, by_columns = -1, dx_of = -1;  // the units whose rows are packed, and whose dx is summed
    for (size_t s = first_set(share); s < first_set(share + 1); ++s) {
      const ExpertSet& set = call_.sets[s];
      const int64_t stride = set.experts() * call_.width;
      const Panels *panels = panels_.data() + first_panel_[s], *end = panels + set.runs.size();
      outputs(m, panels, end, stride, b, rows, by_rows);
      call_.kernels->weights(call_.gates, set.routing, b, b + rows, m.weights);
      call_.kernels->gradients(set.routing, rows, call_.width, m.weights, m.h, grad, m.dz, at(da_, b * call_.columns),
                               call_.columns);
      if (!needs_.x && !needs_.weight && !needs_.bias) continue;
      if (call_.activation != Activation::kNone)
        call_.kernels->through(call_.activation, needs_input(call_.activation) ? m.z : m.h, m.dz, rows * stride);
      for (const Panels* p = panels; p != end; ++p) {
        const int64_t input = p->run->input;
        if (needs_.weight && by_columns != input)
          call_.pack->columns_wide(call_.input_rows(input, b), rows, call_.features, m.x_columns);
        by_columns = input;
        const int64_t cols = p->run->count * call_.width;
        call_.pack_sum->rows(call_.sums(at(m.dz, p->run->place * call_.width), stride), rows, cols, m.dz_rows);
        if (needs_.weight || needs_.bias) parameters(m, *p->run, part, rows, first);
        if (!needs_.x) continue;
        if (dx_of >= 0 && dx_of != input) put_dx(m, dx_of, share, b, rows);
        call_.sum_kernels().accumulate(m.dz_rows, at(packed_, p->gradient), rows, call_.features, cols,
                                       {m.dx, call_.features, dx_of == input});
        dx_of = input;
      }
    }
    if (dx_of >= 0) put_dx(m, dx_of, share, b, rows);
  }

  // m.h, and m.z where the activation's gradient needs it, of a set. by_rows: the unit whose rows m.x_rows holds.
  void outputs(const Buffers& m, const Panels* panels, const Panels* end, int64_t stride, int64_t b, int64_t rows,
               int64_t& by_rows) {
    const bool with_z = needs_input(call_.activation);
    for (const Panels* p = panels; p != end; ++p) {
      const int64_t input = p->run->input, place = p->run->place * call_.width, cols = p->run->count * call_.width;
      if (saved_) {
        const int64_t row = call_.experts * call_.width * call_.element;
        const char* from =
            static_cast<const char*>(saved_->const_data_ptr()) + b * row + p->run->first * call_.width * call_.element;
        for (int64_t r = 0; r < rows; ++r)
          call_.pack->widen(from + r * row, at(with_z ? m.z : m.h, r * stride + place), cols);
        continue;
      }
      if (by_rows != input) call_.pack->rows(call_.input_rows(input, b), rows, call_.features, m.x_rows);
      by_rows = input;
      const Output y{at(m.h, place), with_z ? at(m.z, place) : nullptr,
                     call_.with_bias ? at(packed_, p->bias) : nullptr, call_.activation, stride};
      call_.pack_sum->multiply(m.x_rows, call_.features, at(packed_, p->forward), rows, cols, call_.features, y);
    }
    if (saved_ && with_z) call_.kernels->activate(call_.activation, m.z, m.h, rows * stride);
  }

  // dW and db of a run.
  void parameters(const Buffers& m, const ExpertRun& run, int64_t part, int64_t rows, bool first) {
    const int64_t cols = run.count * call_.width, outputs = call_.experts * call_.width, k = call_.features;
    char* db = nullptr;
    if (needs_.bias) {
      db = at(dbias_, part * outputs + run.first * call_.width);
      if (first) std::fill_n(db, cols * call_.size, char{0});
      call_.sum_kernels().add_rows(m.dz_rows, rows, cols, db);
    }
    if (!needs_.weight) return;
    call_.sum_kernels().turn(m.dz_rows, rows, cols, m.dz_columns);
    char* dw = at(dweight_, (part * outputs + run.first * call_.width) * k);
    call_.sum_kernels().accumulate_turned(m.dz_columns, m.x_columns, cols, k, rows, {dw, k, !first});
  }

  void put_dx(const Buffers& m, int64_t input, size_t share, int64_t b, int64_t rows) {
    const int64_t k = call_.features;
    const auto found = std::find_if(inputs_.begin(), inputs_.end(),
                                    [&](const InputSum& i) { return i.input == input && i.share == share; });
    if (found->sums)
      std::copy_n(static_cast<const char*>(m.dx), rows * k * call_.size, at(found->sums, b * k));
    else
      put_rows(m.dx, input, b, rows);
  }
  void put_rows(void* from, int64_t input, int64_t b, int64_t rows) {
    const int64_t k = call_.features;
    for (int64_t r = 0; r < rows; ++r)
      call_.pack->narrow(at(from, r * k), dx_ + ((b + r) * call_.inputs + input) * k * call_.element, k);
  }

  // dx of the units that no share met, or several.
  void add_inputs() {
    const int64_t k = call_.features;
    run_tasks((call_.batch + rows_ - 1) / rows_, double(call_.batch) * k * double(inputs_.size()), [&](int64_t i) {
      const int64_t b = i * rows_, count = std::min(rows_, call_.batch - b) * k;
      void* sum = scratch(1, count * call_.size + 64);
      for (int64_t input = 0; input < call_.inputs; ++input) {
        if (met_[input] == 1) continue;
        std::fill_n(static_cast<char*>(sum), count * call_.size, char{0});
        for (const InputSum& from : inputs_)
          if (from.input == input) call_.sum_kernels().add_rows(at(from.sums, b * k), 1, count, sum);
        put_rows(sum, input, b, count / std::max<int64_t>(1, k));
      }
    });
  }

  // The parts' sums in order; experts that nobody uses have zeros.
  void add_parts(Tensor& result, char* sums, int64_t each) {
    char* to = static_cast<char*>(result.mutable_data_ptr());
    run_tasks(call_.experts, double(result.numel()) * double(parts_), [&](int64_t e) {
      char* own = to + e * each * call_.w_element;
      if (!call_.used[e] || parts_ == 0) {
        std::fill_n(own, each * call_.w_element, char{0});
        return;
      }
      if (sums == to) return;
      char* first = at(sums, e * each);
      for (int64_t p = 1; p < parts_; ++p)
        call_.sum_kernels().add_rows(at(first, p * call_.experts * each), 1, each, first);
      call_.pack_w->narrow(first, own, each);
    });
  }

  const ExpertMixCall& call_;
  const Tensor &grad_, *saved_;
  const Needs needs_;
  int64_t parts_, part_rows_, rows_;
  size_t shares_;
  std::vector<Panels> panels_;       // of every run
  std::vector<size_t> first_panel_;  // of every set
  std::vector<InputSum> inputs_;
  std::vector<int64_t> met_;  // of each unit of x: how many shares read it
  Tensor weight_sums_, bias_sums_, input_sums_;
  void* packed_ = nullptr;
  char *da_ = nullptr, *dx_ = nullptr, *dweight_ = nullptr, *dbias_ = nullptr;
};

// dlogits and dstatic from da, which may lie in dlogits' place.
template <class C>
void finish(const ExpertMixCall& call, const Tensor& da, const Tensor& dlse, bool with_lse, Tensor* dlogits,
            Tensor* dstatic) {
  const int64_t blocks = (call.batch + kFinishRows - 1) / kFinishRows;
  std::vector<C> partial(dstatic ? blocks * call.columns : 0, C{0});
  run_tasks(blocks, 16.0 * call.batch * call.columns, [&](int64_t i) {
    const int64_t begin = i * kFinishRows, end = std::min(call.batch, begin + kFinishRows);
    if (dstatic) {
      C* sums = partial.data() + i * call.columns;
      for (int64_t b = begin; b < end; ++b)
        for (int32_t column : call.all.column) sums[column] += data<C>(da)[b * call.columns + column];
    }
    if (dlogits)
      call.kernels->logits_gradient(call.gates, call.all, begin, end, da.const_data_ptr(),
                                    with_lse ? dlse.const_data_ptr() : nullptr, dlogits->mutable_data_ptr(),
                                    scratch(1, 2 * call.columns * call.size + 64));
  });
  if (!dstatic) return;
  with_type(dstatic->scalar_type(), "static", [&](auto s) {
    for (int64_t c = 0; c < call.columns; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < blocks; ++i) sum += partial[i * call.columns + c];
      mutable_data<decltype(s)>(*dstatic)[c] = static_cast<decltype(s)>(static_cast<C>(sum));
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Counts = std::optional<std::vector<int64_t>>;

Gradients run(const Tensor& grad_in, const OptionalTensor& grad_lse, const Tensor& x, const Tensor& weight,
              const OptionalTensor& bias, const OptionalTensor& logits, const OptionalTensor& fixed,
              const OptionalTensor& mask, const OptionalTensor& columns, const Counts& counts,
              const std::string& activation, const Tensor* saved_in, int64_t needed) {
  ExpertMixCall call =
      prepare_expert_mix(x, weight, bias, logits, fixed, mask, columns, counts, activation, kSetColumns);
  const Tensor grad = dense(grad_in);
  STD_TORCH_CHECK(grad.numel() == call.batch * call.tasks * call.width && grad.scalar_type() == x.scalar_type(),
                  "grad must be [B,T,D] in x's dtype");
  STD_TORCH_CHECK(!saved_in || (saved_in->numel() == call.batch * call.experts * call.width &&
                                saved_in->scalar_type() == x.scalar_type()),
                  "saved must be [B,E,D] in x's dtype");
  const Tensor saved = saved_in ? dense(*saved_in) : Tensor();
  const bool with_lse = grad_lse && logits;  // without logits lse is empty, and so is its gradient
  STD_TORCH_CHECK(!with_lse || (grad_lse->numel() == call.batch * call.tasks && grad_lse->scalar_type() == call.sum),
                  "grad_lse must be [B,T] in the type of sums");
  const Tensor dlse = with_lse ? dense(*grad_lse) : Tensor();
  const Needs needs{(needed & 1) != 0, (needed & 2) != 0, (needed & 4) && bias, (needed & 8) && logits,
                    (needed & 16) && fixed};
  const auto room = [](bool need, const Tensor& like, ScalarType otherwise) {
    return need ? allocate_like(like) : allocate({0}, otherwise);
  };
  Tensor dx = room(needs.x, x, x.scalar_type()), dweight = room(needs.weight, weight, weight.scalar_type());
  Tensor dbias =
      needs.bias ? allocate({call.experts, call.width}, weight.scalar_type()) : allocate({0}, weight.scalar_type());
  Tensor dlogits = needs.logits ? allocate_like(*logits) : allocate({0}, x.scalar_type());
  Tensor dstatic = needs.fixed ? allocate_like(*fixed) : allocate({0}, x.scalar_type());
  Tensor da =
      needs.logits && dlogits.scalar_type() == call.sum ? dlogits : allocate({call.batch, call.columns}, call.sum);
  call.normalise(nullptr);
  Backward(call, grad, saved_in ? &saved : nullptr, needs).run(dx, dweight, dbias, da);
  if (needs.logits || needs.fixed) {
    const auto done = call.sum == ScalarType::Double ? finish<double> : finish<float>;
    done(call, da, dlse, with_lse, needs.logits ? &dlogits : nullptr, needs.fixed ? &dstatic : nullptr);
  }
  return {dx, dweight, dbias, dlogits, dstatic};
}

Gradients expert_mix_backward(const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& x, const Tensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& logits, const OptionalTensor& fixed,
                              const OptionalTensor& mask, const OptionalTensor& columns, Counts counts,
                              std::string activation, const Tensor& lse, int64_t needs) {
  (void)lse;  // the softmax is cheaper to repeat than to rebuild from the logsumexp, and exact
  return run(grad, grad_lse, x, weight, bias, logits, fixed, mask, columns, counts, activation, nullptr, needs);
}

Gradients expert_mix_saving_backward(const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& x,
                                     const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& logits,
                                     const OptionalTensor& fixed, const OptionalTensor& mask,
                                     const OptionalTensor& columns, Counts counts, std::string activation,
                                     const Tensor& saved, int64_t needs) {
  return run(grad, grad_lse, x, weight, bias, logits, fixed, mask, columns, counts, activation, &saved, needs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("expert_mix_backward", TORCH_BOX(&expert_mix_backward));
  m.impl("expert_mix_saving_backward", TORCH_BOX(&expert_mix_saving_backward));
}

}  // namespace mtl
