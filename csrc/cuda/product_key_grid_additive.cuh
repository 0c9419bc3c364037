// Product-key retrieval, forward, grid stage in additive mode: the best pairs without a look at
// most of the others.
//
// A sum does not rise when one of its two numbers falls, rounded or not. So a row's pairs at or
// above a cut are with the first of the columns in descending order, and a binary search counts
// them: exactly, pairs that equal the cut included.
#pragma once

#include "block_topk.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

// Not where more than half of the pairs are wanted.
inline bool list_additive_applies(const ProductKeyTopkParams& p) {
  return p.mode == ScoreMode::kAdditive && 2 * p.topk <= p.axis_topk * p.axis_topk;
}

// How many of kCount values (a power of two) in shared memory `holds` is true of: of none behind
// one that it is false of.
template <int kCount, typename T, typename Holds>
__device__ __forceinline__ int count_first(const T (&values)[kCount], Holds holds) {
  const T* next = values;
#pragma unroll
  for (int step = kCount / 2; step > 0; step /= 2) {
    if (holds(next[step - 1])) next += step;
  }
  if (holds(*next)) ++next;
  return (shared_address(next) - shared_address(values)) / sizeof(T);
}

// What a warp keeps in shared memory meanwhile.
template <int kMaxKeys>
struct alignas(16) AdditiveScratch {
  float scores[kMaxKeys];     // of the columns, descending; NaN beyond the last
  int32_t columns[kMaxKeys];  // which they are; equal ones ascending
  int32_t starts[kMaxKeys];   // how many pairs are listed ahead of a row's
};

// Sorts the scores of columns, kMaxKeys of which m are numbers.
template <int kMaxKeys>
__device__ __forceinline__ void sort_columns(const float* cols, int m, int lane,
                                             AdditiveScratch<kMaxKeys>& scratch) {
  constexpr int kLaneKeys = kMaxKeys / kWarpSize;
  uint32_t ranks[kLaneKeys];  // of columns lane, lane + 32, ...
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    const int col = i * kWarpSize + lane;
    ranks[i] = sortable(cols[col_place(col)]);
    if (col < m) lowest = min(lowest, ranks[i]);
    highest = max(highest, ranks[i]);
  }
  lowest = __reduce_min_sync(kFullMask, lowest);
  highest = __reduce_max_sync(kFullMask, highest);

  int sorted[kLaneKeys];
  if (highest - lowest <= 0xffffffffu / kMaxKeys) {
    // Scores of one sign, most often: 32 bits hold the distance to the least and the column. What
    // lies beyond the last column comes behind the least.
    uint32_t keys[kLaneKeys];
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int col = i * kWarpSize + lane;
      keys[i] = (max(ranks[i], lowest) - lowest) * kMaxKeys + (kMaxKeys - 1 - col);
    }
    bitonic_sort_registers_descending(keys, lane);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) sorted[i] = kMaxKeys - 1 - (keys[i] & (kMaxKeys - 1));
  } else {
    uint64_t keys[kLaneKeys];
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) keys[i] = make_candidate(ranks[i], i * kWarpSize + lane);
    bitonic_sort_registers_descending(keys, lane);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) sorted[i] = candidate_position(keys[i]);
  }
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    scratch.scores[lane * kLaneKeys + i] = cols[col_place(sorted[i])];
    scratch.columns[lane * kLaneKeys + i] = sorted[i];
  }
}

// Lists the codes of all pairs at or above a number *lowest, min_found to max_found of them; equal
// pairs in the order of positions. *highest is the best pair's, both sortable ranks. Returns how
// many, or 0 and lists none of use where more pairs equal the number than fit, where rounding makes
// pairs of a row equal against the order of positions, or where no number is found soon. Every
// score must be finite.
template <int kMaxKeys>
__device__ __forceinline__ uint32_t list_additive(const Token<2, kMaxKeys>& token, int m,
                                                  uint32_t min_found, uint32_t max_found, int lane,
                                                  AdditiveScratch<kMaxKeys>& scratch,
                                                  uint16_t* codes, uint32_t* lowest,
                                                  uint32_t* highest) {
  constexpr int kLaneKeys = kMaxKeys / kWarpSize;
  constexpr int kMaxSteps = 12;  // as long as they take less time than the other ways to list
  const float* rows = token.rows;
  sort_columns(token.cols + Token<2, kMaxKeys>::kColStride, m, lane, scratch);
  __syncwarp();

  // Neighbouring rows to a lane; those beyond the last, NaN, have no pair.
  float own_rows[kLaneKeys];
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) own_rows[i] = rows[lane * kLaneKeys + i];
  // The best pairs of each row that are enough if all rows have as many.
  const uint32_t row_pairs = (min_found + m - 1) / m;
  float best = __uint_as_float(kNanBits), worst = best;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    best = fmaxf(best, own_rows[i] + scratch.scores[0]);
    worst = fminf(worst, own_rows[i] + scratch.scores[row_pairs - 1]);
  }
  *highest = warp_highest(best);

  // Where scores fall off exponentially, the pairs that are no worse than that one are those whose
  // places among the rows and among the columns have no greater product than its own.
  const float product = m * row_pairs;
  const float count_low = product * (1.0f + 0.69f * log2_fast(m * m / product));
  CutSearch search(warp_lowest(worst), *highest,
                   fmaxf(count_low, static_cast<float>(max_found + 1)));
  const float wanted = 0.75f * min_found + 0.25f * max_found;
  int lengths[kLaneKeys];  // how many pairs of a row are at or above search.low, once counted
  for (int step = 0; search.open(max_found); ++step) {
    if (step == kMaxSteps) return 0;
    // The first search.low may be the only one there is.
    const uint32_t guess = step == CutSearch::kGuesses ? search.low : search.guess(wanted, step);
    const float cut = value_of(guess);
    int own_lengths[kLaneKeys];
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      own_lengths[i] =
          count_first(scratch.scores, [&](float score) { return own_rows[i] + score >= cut; });
      count += own_lengths[i];
    }
    count = __reduce_add_sync(kFullMask, count);
    if (count >= min_found) {
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) lengths[i] = own_lengths[i];
    }
    search.take(guess, count, min_found);
  }
  if (search.ties(max_found)) return 0;
  *lowest = search.low;

  int own_count = 0, num_found;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) own_count += lengths[i];
  int start = warp_scan_exclusive(own_count, lane, &num_found);
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    scratch.starts[lane * kLaneKeys + i] = start;
    start += lengths[i];
  }
  __syncwarp();
  bool in_order = true;
  for (int found = lane; found < num_found; found += kWarpSize) {
    // Its row is the last that starts no later.
    const int row = count_first(scratch.starts, [&](int start) { return start <= found; }) - 1;
    const int place = found - scratch.starts[row];
    const int before = max(place - 1, 0);
    const int col = scratch.columns[place];
    in_order &= col >= scratch.columns[before] ||
                rows[row] + scratch.scores[place] != rows[row] + scratch.scores[before];
    codes[found] = static_cast<uint16_t>(pair_code(row, col));
  }
  const bool listed = __all_sync(kFullMask, in_order);
  __syncwarp();
  return listed ? num_found : 0;
}

}  // namespace ultramem::cuda
