// One block's tile of a matrix product: its operands on their way to shared memory, and the product of two panels.
//
// A panel is what one step of the product takes of an operand: SIZE rows (or columns) of the result times 64 bytes of
// depth. It lies in shared memory as in global memory, in rows of 16-byte chunks: with the depth along a row, or, of an
// operand whose depth is its slow axis (TRANS), with the depth down the rows. The chunks of a row are permuted so that
// the eight rows that ldmatrix reads at a time lie in different banks.
#pragma once

#include "activation.cuh"
#include "primitives.cuh"

namespace mtl {

constexpr int kGemmStages = 4;  // panels of an operand in shared memory: one in use, three on their way
constexpr int kGemmDepthBytes = 64, kChunkBytes = 16;
constexpr int kGemmParts = 2;  // a step's product is made in two parts of the depth

// MxN numbers of the result by WARPS_M x WARPS_N warps.
template <int M, int N, int WARPS_M, int WARPS_N>
struct GemmTile {
  static constexpr int kM = M, kN = N, kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kWarpM = M / WARPS_M, kWarpN = N / WARPS_N, kWarpsN = WARPS_N;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // of mma
  static constexpr int kBlocks = 512 / kThreads;  // on a multiprocessor at least: 128 registers a thread
};
using LargeTile = GemmTile<128, 128, 2, 4>;
using SmallTile = GemmTile<64, 64, 2, 2>;
// As large as registers allow where a thread keeps two sums for every number.
using TallTile = GemmTile<128, 64, 4, 2>;

template <class S, int SIZE, bool TRANS>
struct Panel {
  static constexpr bool kTrans = TRANS;
  static constexpr int kVec = kChunkBytes / sizeof(S), kDepth = kGemmDepthBytes / sizeof(S);
  static constexpr int kPart = kDepth / kGemmParts;
  static constexpr int kRows = TRANS ? kDepth : SIZE, kChunks = (TRANS ? SIZE : kDepth) / kVec;
  static constexpr int kBytes = kRows * kChunks * kChunkBytes;

  template <class Byte>
  __device__ static Byte* chunk(Byte* panel, int row, int chunk) {
    const int place = kChunks >= 8 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return panel + (row * kChunks + place) * kChunkBytes;
  }

  // A number by its place along the result and along the depth.
  __device__ static S number(const unsigned char* panel, int i, int depth) {
    const int row = TRANS ? depth : i, column = TRANS ? i : depth;
    return reinterpret_cast<const S*>(chunk(panel, row, column / kVec))[column % kVec];
  }
};

// An operand in global memory, from the corner of the block's tile on.
template <class S>
struct Operand {
  const S* data;
  const S* saved;  // if not null, data is a gradient still to go through the activation that left these values
  int64_t stride;  // from row to row of memory
  int depth;
  int size;  // rows or columns of the result that are left
};

// Which row of an operand in memory is row r of it, of a thread's chunk i: the same one.
struct RowsAsTheyCome {
  __device__ int operator()(int r) const { return r; }
  __device__ int operator()(int, int r) const { return r; }
};

// Takes one operand's panels to shared memory. A thread moves the same kEach chunks of every panel. What does not go by
// the hardware's copies passes through a thread's registers, at most a chunk a part of the step, so that few are held.
template <class S, class PANEL, int THREADS, class ROWS = RowsAsTheyCome, bool WORDS = false>
struct PanelLoader {
  static constexpr int kVec = PANEL::kVec, kEach = PANEL::kRows * PANEL::kChunks / THREADS;
  using Chunk = Pack<S, kVec>;
  // WORDS: a chunk lies in registers of four bytes. Numbers of 16 bits, held one by one, take a register each, and the
  // thread waits for them as soon as they are loaded, to take them apart.
  struct alignas(sizeof(Chunk)) Words {
    uint32_t word[sizeof(Chunk) / 4];
  };
  using Held = std::conditional_t<WORDS, Words, Chunk>;
  struct Fetched {
    Held data, saved;
  };
  __device__ static const Chunk& numbers(const Held& held) { return reinterpret_cast<const Chunk&>(held); }
  static_assert(kEach >= 1 && kEach <= kGemmParts);

  Operand<S> from;
  ROWS row_of;
  bool aligned;  // every row starts at a multiple of a chunk's bytes

  __device__ explicit PanelLoader(const Operand<S>& operand, const ROWS& rows = {}) : from(operand), row_of(rows) {
    const uint64_t bits = reinterpret_cast<uint64_t>(from.data) | reinterpret_cast<uint64_t>(from.saved) |
                          static_cast<uint64_t>(from.stride) * sizeof(S);
    aligned = bits % sizeof(Chunk) == 0;
  }

  // Unsigned, so that the compiler sees which chunks of a thread share their row's place or their column.
  __device__ static int row(int i) { return static_cast<int>((threadIdx.x + i * THREADS) / PANEL::kChunks); }
  __device__ static int column(int i) { return static_cast<int>((threadIdx.x + i * THREADS) % PANEL::kChunks); }

  // How many numbers of chunk i lie inside the operand, and where the first of them is.
  __device__ int locate(int step, int i, int64_t& offset) const {
    const int depth0 = step * PANEL::kDepth;
    const int r = PANEL::kTrans ? depth0 + row(i) : row(i), rows = PANEL::kTrans ? from.depth : from.size;
    const int c = PANEL::kTrans ? column(i) * kVec : depth0 + column(i) * kVec;
    const int columns = PANEL::kTrans ? from.size : from.depth;
    if (r >= rows || c >= columns) return 0;
    offset = row_of(i, r) * from.stride + c;
    return columns - c < kVec ? columns - c : kVec;
  }

  // The hardware copies what needs no change and is aligned; the rest passes through registers.
  __device__ bool by_hardware() const { return aligned && from.saved == nullptr; }

  __device__ void copy(int step, unsigned char* panel) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      int64_t offset = 0;
      const int inside = locate(step, i, offset);
      cp_async(PANEL::chunk(panel, row(i), column(i)), from.data + offset, inside * static_cast<int>(sizeof(S)));
    }
  }

  __device__ Held read(const S* at, int inside) const {
    if (aligned && inside == kVec) return *reinterpret_cast<const Held*>(at);
    using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>;
    Held held{};
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if constexpr (WORDS) {
        const int byte = e * static_cast<int>(sizeof(S));
        if (e < inside) held.word[byte / 4] |= uint32_t{reinterpret_cast<const Bits*>(at)[e]} << 8 * (byte % 4);
      } else {
        held.value[e] = e < inside ? at[e] : from_float<S>(0.0f);
      }
    }
    return held;
  }

  __device__ void fetch(int step, int i, Fetched& to) const {
    int64_t offset = 0;
    const int inside = locate(step, i, offset);
    to.data = read(from.data + offset, inside);
    if (from.saved) to.saved = read(from.saved + offset, inside);
  }

  __device__ void put(const Fetched& fetched, Activation activation, int i, unsigned char* panel) const {
    Chunk chunk = numbers(fetched.data);
    if (from.saved) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float grad = to_float(chunk.value[e]), saved = to_float(numbers(fetched.saved).value[e]);
        chunk.value[e] = from_float<S>(activation_gradient(activation, grad, saved));
      }
    }
    *reinterpret_cast<float4*>(PANEL::chunk(panel, row(i), column(i))) = reinterpret_cast<const float4&>(chunk);
  }

  // A whole panel of an operand that goes through no activation, by whichever way.
  __device__ void load(int step, unsigned char* panel) const {
    if (by_hardware()) return copy(step, panel);
    Fetched fetched[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) fetch(step, i, fetched[i]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) put(fetched[i], Activation::kNone, i, panel);
  }
};

// Where this thread's sums lie in the tile: c[i][j][k] at row(i, k), column(j, k), as mma leaves them.
template <class TILE>
struct Place {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row0 = warp / TILE::kWarpsN * TILE::kWarpM, column0 = warp % TILE::kWarpsN * TILE::kWarpN;

  __device__ int row(int i, int k) const { return row0 + 16 * i + lane / 4 + k / 2 * 8; }
  __device__ int column(int j, int k) const { return column0 + 8 * j + lane % 4 * 2 + k % 2; }
};

// c += a b over one part of the depth of two panels, on tensor cores.
template <class S, class TILE, class A, class B>
__device__ inline void multiply(const unsigned char* a, const unsigned char* b, int part,
                                float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
  const Place<TILE> at;
  const int lane = at.lane, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int depth = part * A::kPart; depth < (part + 1) * A::kPart; depth += 16) {
    uint32_t right[TILE::kTilesN][2];
#pragma unroll
    for (int j = 0; j < TILE::kTilesN; j += 2) {
      const int column = at.column0 + 8 * j;
      uint32_t pair[4];
      if constexpr (B::kTrans) {
        ldmatrix_trans(pair, B::chunk(b, depth + matrix % 2 * 8 + line, column / 8 + matrix / 2));
      } else {
        ldmatrix(pair, B::chunk(b, column + matrix / 2 * 8 + line, depth / 8 + matrix % 2));
      }
      right[j][0] = pair[0], right[j][1] = pair[1];
      right[j + 1][0] = pair[2], right[j + 1][1] = pair[3];
    }
#pragma unroll
    for (int i = 0; i < TILE::kTilesM; ++i) {
      const int row = at.row0 + 16 * i;
      uint32_t left[4];
      if constexpr (A::kTrans) {
        ldmatrix_trans(left, A::chunk(a, depth + matrix / 2 * 8 + line, row / 8 + matrix % 2));
      } else {
        ldmatrix(left, A::chunk(a, row + matrix % 2 * 8 + line, depth / 8 + matrix / 2));
      }
#pragma unroll
      for (int j = 0; j < TILE::kTilesN; ++j) mma<S>(c[i][j], left, right[j]);
    }
  }
}

// The same in exact float32, by multiply-add units; the sums lie where mma would leave them.
template <class TILE, class A, class B>
__device__ inline void multiply_exactly(const unsigned char* a, const unsigned char* b, int part,
                                        float (&c)[TILE::kTilesM][TILE::kTilesN][4]) {
  const Place<TILE> at;
#pragma unroll 4
  for (int depth = part * A::kPart; depth < (part + 1) * A::kPart; ++depth) {
    float left[TILE::kTilesM][2], right[TILE::kTilesN][2];
#pragma unroll
    for (int i = 0; i < TILE::kTilesM; ++i) {
      left[i][0] = A::number(a, at.row(i, 0), depth);
      left[i][1] = A::number(a, at.row(i, 2), depth);
    }
#pragma unroll
    for (int j = 0; j < TILE::kTilesN; ++j) {
      right[j][0] = B::number(b, at.column(j, 0), depth);
      right[j][1] = B::number(b, at.column(j, 1), depth);
    }
#pragma unroll
    for (int i = 0; i < TILE::kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < TILE::kTilesN; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) c[i][j][k] += left[i][k / 2] * right[j][k % 2];
      }
    }
  }
}

}  // namespace mtl
