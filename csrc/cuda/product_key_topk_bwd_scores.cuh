// What a token's pairs add to the gradients of its kept keys' scores, for the kernels that begin
// the backward of product_key_topk.
//
// A warp takes a token and head, and its lanes 32 kept pairs at a time, each of which adds a vector
// of R to its row of dS and one to its column. Lanes whose pairs share a row (or a column) add up
// in a tree that only depends on which lanes these are, and one of them adds the sum to shared
// memory: hot rows cost no more than others, and every sum has a fixed order.
#pragma once

#include "common.cuh"
#include "product_key_topk_bwd.h"

namespace ultramem::cuda {

__device__ __forceinline__ bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

// Whether 16-bit elements are finite: whether the exponent of none is all ones.
class FiniteElements {
 public:
  __device__ explicit FiniteElements(DType dtype)
      : low_(dtype == DType::kBFloat16 ? 0x7f80u : 0x7c00u), high_(low_ << 16) {}
  __device__ __forceinline__ bool are(const uint4& chunk) const {
    const uint32_t words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
    bool finite = true;
#pragma unroll
    for (const uint32_t word : words) {
      finite = finite && (word & low_) != low_ && (word & high_) != high_;
    }
    return finite;
  }

 private:
  uint32_t low_, high_;
};

// Finds the key rows that are not finite, a warp each, `num_blocks` blocks together.
__device__ __forceinline__ void check_keys(const ProductKeyTopkBwdParams& p, uint8_t* key_finite,
                                           int64_t block, int64_t num_blocks) {
  const FiniteElements elements(p.dtype);
  const int lane = threadIdx.x % kWarpSize;
  const auto block_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t num_rows = int64_t{2} * p.num_heads * p.tucker_rank * p.num_keys;
  const int chunks = static_cast<int>(p.key_dim / 8);
  const int64_t step = num_blocks * block_warps;
  int64_t row = block * block_warps + threadIdx.x / kWarpSize;
  const uint4* from = static_cast<const uint4*>(p.keys) + row * chunks + lane;
#pragma unroll 1
  for (; row < num_rows; row += step, from += step * chunks) {
    bool finite = true;
#pragma unroll 2
    for (int i = 0; i < chunks; i += kWarpSize) {
      finite = finite && (i + lane >= chunks || elements.are(from[i]));
    }
    finite = __all_sync(kFullMask, finite);
    if (lane == 0) key_finite[row] = finite ? 1 : 0;
  }
}

// How the lanes of a line (a row or column) add up: each knows the next of its line, takes in that
// one's part and then knows its next, so that in every round a part is of twice as many lanes.
class LineLanes {
 public:
  // A lane that is in no line has 0.
  __device__ __forceinline__ LineLanes(uint32_t lanes, int lane) {
    next_ = __clz(static_cast<int>(__brev(lanes & (0xfffffffeu << lane))));
  }

  // Whether this lane's part is not that of all that follow in its line.
  __device__ __forceinline__ bool goes_on() const { return next_ < kWarpSize; }

  template <int kRank>
  __device__ __forceinline__ void add_round(float (&parts)[kRank]) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const float part = __shfl_sync(kFullMask, parts[r], next_);
      if (goes_on()) parts[r] += part;
    }
    const int next = __shfl_sync(kFullMask, next_, next_);
    if (goes_on()) next_ = next;
  }

 private:
  int next_;  // 32 if there is none
};

// Whether a lane is the first of some.
__device__ __forceinline__ bool is_first_lane(uint32_t lanes, int lane) {
  return (lanes & ((2u << lane) - 1)) == 1u << lane;
}

// The pair of a lane.
template <int kCores>
struct KeptPair {
  int position = 0;  // row * m + col
  float grads[kCores] = {};
};

// The pair of this index in [T, H, M].
template <int kCores>
__device__ __forceinline__ KeptPair<kCores> load_pair(const ProductKeyTopkBwdParams& p,
                                                      int64_t index, bool exists, int C) {
  KeptPair<kCores> pair;
  if (!exists) return pair;
  pair.position = p.grid_positions[index];
#pragma unroll
  for (int c = 0; c < kCores; ++c) {
    if (c < C) pair.grads[c] = static_cast<const float*>(p.grad_scores)[index * C + c];
  }
  return pair;
}

// Whether any score of each (side, rank), one to a lane, is finite. Nearly always the first is.
__device__ __forceinline__ bool any_score_finite(const float* scores, int m, int planes, int lane) {
  bool finite = lane >= planes || is_finite(scores[lane * m]);
  if (!__all_sync(kFullMask, finite)) {
#pragma unroll 1
    for (int i = 1; i < m && !finite; ++i) finite = is_finite(scores[lane * m + i]);
  }
  return finite;
}

// What all tokens of a head have in common. R and C are kRank and kCores if kExact, and at most
// these if not.
template <int kRank, int kCores, bool kExact>
struct PairTerms {
  int m, M, R, C;
  bool additive;
  SmallDivisor by_m;
  const float* core;  // [C, R, R], in shared memory

  __device__ __forceinline__ PairTerms(const ProductKeyTopkBwdParams& p, const float* core)
      : m(p.axis_topk),
        M(p.topk),
        R(kExact ? kRank : p.tucker_rank),
        C(kExact ? kCores : p.num_cores),
        // Which has a rank and a core of one.
        additive((!kExact || (kRank == 1 && kCores == 1)) && p.mode == ScoreMode::kAdditive),
        by_m(p.axis_topk),
        core(core) {}
};

// The scores of a pair's keys.
template <int kRank>
struct PairScores {
  float row[kRank] = {};
  float col[kRank] = {};

  PairScores() = default;
  template <int kCores, bool kExact>
  __device__ __forceinline__ PairScores(const PairTerms<kRank, kCores, kExact>& terms,
                                        const float* scores, int row_index, int col_index) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      if (r >= terms.R) break;
      row[r] = scores[r * terms.m + row_index];
      col[r] = scores[(terms.R + r) * terms.m + col_index];
    }
  }
};

// What a pair adds to its row and to its column, and to the lane's `grad_core`. Additive scores are
// Tucker scores whose other factor is one.
template <int kRank>
struct PairParts {
  float to_row[kRank] = {};
  float to_col[kRank] = {};

  PairParts() = default;
  template <int kCores, bool kExact>
  __device__ __forceinline__ PairParts(const PairTerms<kRank, kCores, kExact>& terms,
                                       const KeptPair<kCores>& pair,
                                       const PairScores<kRank>& scores,
                                       float (&grad_core)[kCores][kRank][kRank]) {
    const int R = terms.R;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
#pragma unroll
      for (int s = 0; s < kRank; ++s) {
        if (r >= R || s >= R) continue;
        const float row_score = terms.additive ? 1.0f : scores.row[r];
        const float col_score = terms.additive ? 1.0f : scores.col[s];
        const float product = row_score * col_score;
        float weight = 0.0f;
#pragma unroll
        for (int c = 0; c < kCores; ++c) {
          if (c >= terms.C) break;
          weight = fmaf(pair.grads[c], terms.core[(c * R + r) * R + s], weight);
          grad_core[c][r][s] = fmaf(pair.grads[c], product, grad_core[c][r][s]);
        }
        to_row[r] = fmaf(weight, col_score, to_row[r]);
        to_col[s] = fmaf(weight, row_score, to_col[s]);
      }
    }
  }

  // The first lane of each line gets its sum.
  __device__ __forceinline__ void sum_lines(LineLanes rows, LineLanes cols) {
    while (__any_sync(kFullMask, rows.goes_on() || cols.goes_on())) {
      rows.add_round(to_row);
      cols.add_round(to_col);
    }
  }
};

// A head's core into shared memory. Additive scores are Tucker scores whose other factor and core
// are one.
template <int kRank, int kCores, bool kExact>
__device__ __forceinline__ void load_core(const ProductKeyTopkBwdParams& p,
                                          const PairTerms<kRank, kCores, kExact>& terms, int head,
                                          float* core, int thread, int num_threads) {
  const int matrix = terms.R * terms.R;
#pragma unroll 1
  for (int i = thread; i < terms.C * matrix; i += num_threads) {
    const int c = i / matrix;
    core[i] = terms.additive
                  ? 1.0f
                  : static_cast<const float*>(
                        p.core)[(int64_t{c} * p.num_heads + head) * matrix + i - c * matrix];
  }
}

}  // namespace ultramem::cuda
