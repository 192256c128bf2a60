// expert_mix on a GPU, forward: O[b,t,:] = sum_e A[b,t,e] act(W_e x[b,unit(e),:] + c_e), the experts' outputs in
// registers alone.
//
// A block owns a tile of O, 64 batch rows by 64 columns of D, for up to four tasks, and walks over the experts that
// these tasks use: expert_linear's product, then bias, activation and one multiply-add a task. The panels of the next
// expert are on their way while one is finished, so that the walk is one product of E * K steps. More tasks take
// further blocks, which compute the experts again. The order of every sum depends on the shapes alone.
#pragma once

#include "expert_linear.cuh"
#include "mix.cuh"

namespace mtl {

using MixTile = SmallTile;  // a task takes as many registers as the product, so a large one would not fit

struct ExpertMixArgs {
  LinearArgs linear;  // units: 0 where expert e reads unit e, or all read the same
  MixArgs mix;        // its h does not exist; lse is null without logits
};
static_assert(sizeof(ExpertMixArgs) <= 4096, "a kernel's arguments");

// A block's part of the output.
struct ExpertMixPart {
  int row0, column0, task0, tasks;
};

template <int TASKS>
__device__ inline ExpertMixPart expert_mix_part(const ExpertMixArgs& a) {
  const int across = a.mix.width > MixTile::kN ? (static_cast<int>(a.mix.width) - 1) / MixTile::kN + 1 : 1;
  const int chunks = (a.mix.tasks - 1) / TASKS + 1, block = static_cast<int>(blockIdx.x), line = block / across;
  // Neighbouring blocks share their rows of x.
  ExpertMixPart part;
  part.column0 = block % across * MixTile::kN;
  part.task0 = line % chunks * TASKS;
  part.row0 = line / chunks * MixTile::kM;
  part.tasks = a.mix.tasks - part.task0 < TASKS ? a.mix.tasks - part.task0 : TASKS;
  return part;
}

// The experts that some task of the block uses, one after the other, each in steps through K.
struct ExpertWalk {
  const ExpertMixArgs& a;
  int task0, tasks, steps;
  int expert = -1, unit = 0, step = 0;
  unsigned allowed = 0;  // bit t: task0 + t uses the expert

  __device__ ExpertWalk(const ExpertMixArgs& args, const ExpertMixPart& part, int steps_each)
      : a(args), task0(part.task0), tasks(part.tasks), steps(steps_each) {
    next_expert();
  }
  __device__ bool more() const { return expert < a.mix.experts; }

  __device__ void next_expert() {
    step = 0;
    allowed = 0;
    while (allowed == 0 && ++expert < a.mix.experts) {
      for (int t = 0; t < tasks; ++t) allowed |= (mix_cell(a.mix, task0 + t, expert) >= 0 ? 1u : 0u) << t;
    }
    if (a.linear.units == 0) unit = expert;
    while (unit + 1 < a.linear.units && a.linear.expert[unit + 1] <= expert) ++unit;
  }

  __device__ void advance() {
    if (++step == steps) next_expert();
  }
};

// The weights A of the block's rows and tasks. A thread prepares the softmax of the same few pairs (row, task) for
// every expert, and keeps what it needs for that.
template <int TASKS>
struct ExpertGates {
  static constexpr int kPairs = MixTile::kM * TASKS;
  static constexpr int kEach = (kPairs + MixTile::kThreads - 1) / MixTile::kThreads;
  static constexpr int kBytes = 2 * kPairs * static_cast<int>(sizeof(float));  // of this expert and of the next

  const MixArgs& a;
  int row0, task0;
  float highest[kEach], scale[kEach];

  __device__ static int pair(int i) { return static_cast<int>(threadIdx.x) + i * MixTile::kThreads; }
  __device__ int64_t row(int i) const { return row0 + pair(i) / TASKS; }
  __device__ int task(int i) const { return task0 + pair(i) % TASKS; }
  __device__ bool inside(int i) const { return pair(i) < kPairs && row(i) < a.batch && task(i) < a.tasks; }
  __device__ float logit(int i, int cell) const {
    return load_as_float(a.logits, a.logits_type, row(i) * a.logits_row + cell);
  }

  __device__ ExpertGates(const MixArgs& args, const ExpertMixPart& part) : a(args), row0(part.row0), task0(part.task0) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      highest[i] = -INFINITY;
      scale[i] = 0.0f;
      if (!a.lse || !inside(i)) continue;
      float sum = 0.0f;
#pragma unroll 4
      for (int e = 0; e < a.experts; ++e) {
        const int cell = mix_cell(a, task(i), e);
        if (cell >= 0) highest[i] = fmaxf(highest[i], logit(i, cell));
      }
#pragma unroll 4
      for (int e = 0; e < a.experts; ++e) {
        const int cell = mix_cell(a, task(i), e);
        if (cell >= 0) sum += expf(logit(i, cell) - highest[i]);
      }
      scale[i] = 1.0f / sum;  // 1 exactly where a single expert is allowed; unused where none is
      if (part.column0 > 0) continue;
      a.lse[row(i) * a.tasks + task(i)] = isinf(highest[i]) ? highest[i] : highest[i] + logf(sum);
    }
  }

  // The expert's weights, to[row * TASKS + task]; zeros past the ends and where a task does not use it.
  __device__ void put(int expert, float* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (pair(i) >= kPairs) continue;
      float weight = 0.0f;
      const int cell = inside(i) ? mix_cell(a, task(i), expert) : -1;
      if (cell >= 0) {
        if (a.lse) weight = expf(logit(i, cell) - highest[i]) * scale[i];
        weight += mix_static(a, task(i), expert, cell);
      }
      to[pair(i)] = weight;
    }
  }
};

// From an expert's sums z to sum[t] += A[t] act(z + bias). c comes back as zeros.
template <int TASKS>
__device__ inline void expert_mix_add(const ExpertMixArgs& a, const ExpertWalk& walk, int column0, const float* weights,
                                      float (&c)[MixTile::kTilesM][MixTile::kTilesN][4],
                                      float (&sum)[TASKS][MixTile::kTilesM][MixTile::kTilesN][4]) {
  const Place<MixTile> at;
  const int columns = static_cast<int>(a.mix.width) - column0;
  const int64_t first = walk.expert * a.mix.width + column0;
  float bias[MixTile::kTilesN][2] = {};
#pragma unroll
  for (int j = 0; j < MixTile::kTilesN; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int column = at.column(j, k);
      if (a.linear.bias && column < columns) {
        bias[j][k] = load_as_float(a.linear.bias, a.linear.bias_type, first + column);
      }
    }
  }
  // Strip by strip, as in each_strip, but in a circle: after all of them each is back in its place.
#pragma unroll 1
  for (int i = 0; i < MixTile::kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < MixTile::kTilesN; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float h = activate(a.linear.activation, c[0][j][k] + bias[j][k % 2]);
#pragma unroll
        for (int next = 1; next < MixTile::kTilesM; ++next) c[next - 1][j][k] = c[next][j][k];
        c[MixTile::kTilesM - 1][j][k] = h;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TASKS; ++t) {
    if (!(walk.allowed >> t & 1)) continue;  // not even 0 * NaN
#pragma unroll
    for (int i = 0; i < MixTile::kTilesM; ++i) {
      const float weight[2] = {weights[at.row(i, 0) * TASKS + t], weights[at.row(i, 2) * TASKS + t]};
#pragma unroll
      for (int j = 0; j < MixTile::kTilesN; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[t][i][j][k] += weight[k / 2] * c[i][j][k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < MixTile::kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < MixTile::kTilesN; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) c[i][j][k] = 0.0f;
    }
  }
}

template <class S, int TASKS>
struct ExpertMixShared {
  using Panels = LinearPanels<S, MixTile, LinearProduct::kForward>;
  static constexpr int kBytes = Panels::kBytes + ExpertGates<TASKS>::kBytes;
};

// Warps on a multiprocessor: a task in registers is a tile of sums beside the product's own.
template <class S, int TASKS>
constexpr int kMixWarps = TASKS == 4 || (TASKS == 2 && sizeof(S) == 4) ? 8 : 12;

template <class S, int TASKS>
__global__ void __launch_bounds__(MixTile::kThreads, kMixWarps<S, TASKS> * 32 / MixTile::kThreads)
    expert_mix_kernel(const __grid_constant__ ExpertMixArgs a) {
  extern __shared__ float4 shared_memory[];
  using Panels = LinearPanels<S, MixTile, LinearProduct::kForward>;
  using Left = typename Panels::Left;
  using Right = typename Panels::Right;
  auto* stages = reinterpret_cast<unsigned char*>(shared_memory);
  auto* weights = reinterpret_cast<float*>(stages + Panels::kBytes);
  const ExpertMixPart part = expert_mix_part<TASKS>(a);
  const int features = static_cast<int>(a.linear.features);
  const int steps = features > Left::kDepth ? (features - 1) / Left::kDepth + 1 : 1;  // without features one of zeros
  const S* x = static_cast<const S*>(a.linear.x) + part.row0 * a.linear.x_row;
  const S* weight = static_cast<const S*>(a.linear.weight) + part.column0 * a.linear.features;
  const auto stage_of = [&](int turn) { return stages + turn % kGemmStages * Panels::kStage; };
  const auto load = [&](const ExpertWalk& walk, unsigned char* stage) {
    const Operand<S> rows = {x + walk.unit * a.linear.x_unit, nullptr, a.linear.x_row, features,
                             static_cast<int>(a.linear.batch) - part.row0};
    const Operand<S> columns = {weight + walk.expert * a.mix.width * features, nullptr, features, features,
                                static_cast<int>(a.mix.width) - part.column0};
    PanelLoader<S, Left, MixTile::kThreads>(rows).load(walk.step, stage);
    PanelLoader<S, Right, MixTile::kThreads>(columns).load(walk.step, stage + Left::kBytes);
  };

  float c[MixTile::kTilesM][MixTile::kTilesN][4] = {}, sum[TASKS][MixTile::kTilesM][MixTile::kTilesN][4] = {};
  ExpertWalk walk(a, part, steps), ahead = walk;
  for (int turn = 0; turn < kGemmStages - 1; ++turn) {
    if (ahead.more()) {
      load(ahead, stage_of(turn));
      ahead.advance();
    }
    cp_async_commit();
  }
  const ExpertGates<TASKS> gates(a.mix, part);
  if (walk.more()) gates.put(walk.expert, weights);
  int place = 0;  // of the expert's weights; the next one's go to the other
  for (int turn = 0; walk.more(); turn = (turn + 1) % kGemmStages) {
    cp_async_wait<kGemmStages - 2>();
    __syncthreads();  // this step's panels and weights are complete, and the last one's are read
    if (ahead.more()) {
      load(ahead, stage_of(turn + kGemmStages - 1));
      ahead.advance();
    }
    cp_async_commit();
    if (walk.step == 0) {  // their last readers came before this step's barrier, the next ones come after another
      ExpertWalk next = walk;
      next.next_expert();
      if (next.more()) gates.put(next.expert, weights + (1 - place) * gates.kPairs);
    }
    const unsigned char* stage = stage_of(turn);
#pragma unroll
    for (int i = 0; i < kGemmParts; ++i) {
      if constexpr (sizeof(S) == 4) {
        multiply_exactly<MixTile, Left, Right>(stage, stage + Left::kBytes, i, c);
      } else {
        multiply<S, MixTile, Left, Right>(stage, stage + Left::kBytes, i, c);
      }
    }
    if (walk.step == steps - 1) {
      expert_mix_add<TASKS>(a, walk, part.column0, weights + place * gates.kPairs, c, sum);
      place = 1 - place;
    }
    walk.advance();
  }
  const int rows = static_cast<int>(a.linear.batch) - part.row0, columns = static_cast<int>(a.mix.width) - part.column0;
  const int64_t stride = a.mix.tasks * a.mix.width;
#pragma unroll
  for (int t = 0; t < TASKS; ++t) {
    if (t >= part.tasks) break;
    S* to = static_cast<S*>(a.mix.out) + part.row0 * stride + (part.task0 + t) * a.mix.width + part.column0;
    each_strip<MixTile>(sum[t], [&](int i, float (&strip)[MixTile::kTilesN][4]) {
      store_strip<S, MixTile>(strip, i, to, stride, rows, columns);
    });
  }
}

constexpr int kUsedThreads = 256, kUsedEach = 16;

// to[e,:] = from[e,:] [E,size] of experts that some task uses, zeros for the others, which are not read. Of a tensor
// that is cleared in its place the used ones stay as they are.
template <class Word>
__global__ void __launch_bounds__(kUsedThreads)
    used_experts_kernel(const __grid_constant__ MixArgs a, const Word* from, int64_t size, Word* to) {
  constexpr int kBlock = kUsedThreads * kUsedEach;
  const int64_t across = (size + kBlock - 1) / kBlock;
  const int expert = static_cast<int>(blockIdx.x / across);
  bool used = false;
  for (int t = 0; t < a.tasks && !used; ++t) used = mix_cell(a, t, expert) >= 0;
  if (used && from == to) return;
  for (int i = 0; i < kUsedEach; ++i) {
    const int64_t at = blockIdx.x % across * kBlock + i * kUsedThreads + threadIdx.x;
    if (at < size) to[expert * size + at] = used ? from[expert * size + at] : Word{0};
  }
}

}  // namespace mtl
