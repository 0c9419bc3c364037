// The axis stage of few tokens, second half: a group of warps looks after a token's side, holds the
// ranks of its keys in registers and cuts them to the best m (key_selection.cuh).
#pragma once

#include "common.cuh"
#include "key_selection.cuh"
#include "product_key_common.cuh"
#include "warp_group.cuh"

namespace ultramem::cuda {

// All scores of the keys, as the first half leaves them.
struct KeyScores {
  const float* scores;  // [T, H, 2, R, stride]
  int stride;           // floats
};

inline int score_stride(int64_t num_keys) {
  return static_cast<int>(ceil_div(num_keys, kSetKeys)) * kSetKeys;
}

inline KeyScores key_scores(const ProductKeyTopkParams& p) {
  return {static_cast<const float*>(p.workspace), score_stride(p.num_keys)};
}

// What a group has in shared memory.
struct SelectScratch {
  alignas(16) unsigned char selection[kSelectionBytes];
  uint32_t slots[WarpGroup::kSlots];
};

// The best m keys of `row` of [T, H, 2], to axis_indices and axis_scores. A group has at least
// num_keys / (kSets * kWarpSetKeys) warps; `barrier` is a named barrier of its own.
template <int kSets>
__device__ __forceinline__ void select_keys(const ProductKeyTopkParams& p, const KeyScores& all,
                                            int64_t row, SelectScratch& scratch, int barrier,
                                            int warp, int num_warps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const auto num_keys = static_cast<int>(p.num_keys);
  const int m = p.axis_topk;
  WarpGroup group(scratch.slots, barrier, warp, num_warps);
  const Selection selection(scratch.selection);
  float filter[kMaxTuckerRank] = {};
#pragma unroll
  for (int r = 0; r < kMaxTuckerRank; ++r) {
    if (p.mode == ScoreMode::kAdditive) {
      filter[r] = 1.0f;
    } else if (r < p.tucker_rank) {
      const auto* vector = static_cast<const float*>(row % 2 == 0 ? p.u : p.t);
      filter[r] = vector[row / 2 % p.num_heads * p.tucker_rank + r];
    }
  }
  const float* scores = all.scores + row * p.tucker_rank * all.stride;
  OwnKeys<kSets> own;
  own.first = warp * kWarpSetKeys + lane * kSetKeys;
  own.stride = num_warps * kWarpSetKeys;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int key = own.first + set * own.stride;
    float sums[kSetKeys] = {};
    if (key < num_keys) {
#pragma unroll
      for (int r = 0; r < kMaxTuckerRank; ++r) {
        if (r >= p.tucker_rank) break;
        float of_rank[kSetKeys];
        load_floats<kSetKeys>(scores + r * all.stride + key, of_rank);
#pragma unroll
        for (int e = 0; e < kSetKeys; ++e) {
          sums[e] =
              r == 0 ? __fmul_rn(filter[0], of_rank[e]) : __fmaf_rn(filter[r], of_rank[e], sums[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kSetKeys; ++e) {
      own.ranks[set * kSetKeys + e] = key + e < num_keys ? sortable(sums[e]) : 0;
    }
  }
  const uint32_t best = find_best(own, static_cast<uint32_t>(m), num_keys, selection, warp, lane,
                                  num_warps * kWarpSize, group);
  const Places<kSets> places(best, warp, lane, group);
  int32_t* ids = p.axis_indices + row * m;
  float* kept_scores = static_cast<float*>(p.axis_scores) + row * p.tucker_rank * m;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    uint32_t place = places.first[set];
#pragma unroll 1
    for (uint32_t bits = best >> 4 * set & 0xfu; bits != 0; bits &= bits - 1) {
      const int key = own.key(set * kSetKeys) + __ffs(static_cast<int>(bits)) - 1;
      ids[place] = key;
      for (int r = 0; r < p.tucker_rank; ++r) {
        kept_scores[r * m + place] = scores[r * all.stride + key];
      }
      ++place;
    }
  }
}

}  // namespace ultramem::cuda
