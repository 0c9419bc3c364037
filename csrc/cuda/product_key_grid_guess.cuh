// Product-key retrieval, forward, grid stage: the best pairs without a look at most of the others.
//
// A cut is guessed that some more pairs than wanted are at or above. A rank is about the product of
// two levels: how far a row's and a column's factors reach along the filter t that the columns were
// kept by. (In additive mode it is the sum of two: the scores.) Histograms of the levels of either
// side tell how many of their products or sums lie above a number.
//
// A key without a pair at or above the cut is known by a bound on what it reaches: with w and b the
// factors of a row and a column, w . b <= (w . t)(b . t) + |w across t| |b across t| for a unit t.
// The others' pairs are looked at, so what is listed is exact; a wrong guess costs time alone.
#pragma once

#include "common.cuh"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

// Not where more than half of the pairs are wanted.
inline bool list_guessed_applies(const ProductKeyTopkParams& p) {
  return 2 * p.topk <= p.axis_topk * p.axis_topk;
}

// How many pairs to guess for: so many more than topk that seldom too few are found, and seldom
// more than are sorted.
inline float pairs_to_guess(int topk, int max_sorted) {
  constexpr float kFound = 0.87f;  // what is found of what is guessed for
  const float most = fmaxf(topk + 0.35f * (max_sorted - topk), 1.15f * topk);
  return fminf(topk + fmaxf(0.35f * topk, 24.0f), most) / kFound;
}

// What a warp keeps in shared memory meanwhile.
struct alignas(16) GuessScratch {
  static constexpr int kBuckets = kWarpSize;

  // The last bucket is of keys that are not counted.
  uint32_t row_counts[kBuckets + 4];
  uint32_t col_counts[2 * kBuckets + 4];  // zeros, and how many are in a bucket or above it
  int32_t rows[kMaxAxisTopk];             // that can be of a pair at or above the cut, ascending
  int32_t cols[kMaxAxisTopk];
};

// Cuts for a token whose factors are finite.
template <int kPlanes>
class CutGuess {
 public:
  static constexpr int kLaneKeys = kMaxAxisTopk / kWarpSize;  // keys lane, lane + 32, ...

  __device__ __forceinline__ CutGuess(const Token<kPlanes, kMaxAxisTopk>& token, int m, int lane,
                                      GuessScratch& scratch)
      : additive_(token.additive()) {
    float row_depths[kLaneKeys], col_depths[kLaneKeys];
    if (additive_) {
      measure_sums(token, m, lane, row_depths, col_depths);
    } else {
      measure_products(token, m, lane, row_depths, col_depths);
    }
    count(row_depths, col_depths, lane, scratch);
  }

  // A number that about `wanted` pairs are at or above; not finite where none can be told.
  __device__ __forceinline__ float cut(float wanted) const {
    const uint32_t reached = __ballot_sync(kFullMask, count_ >= wanted);
    const int bucket = reached != 0 ? __ffs(static_cast<int>(reached)) - 1 : kBuckets - 1;
    const float above = __shfl_sync(kFullMask, count_, max(bucket - 1, 0));
    const float below = log2_fast(fmaxf(__shfl_sync(kFullMask, count_, bucket), 1.0f));
    const float first = bucket == 0 ? -1.0f : log2_fast(fmaxf(above, 0.5f));
    const float share = __fdividef(log2_fast(wanted) - first, fmaxf(below - first, 1e-6f));
    const float depth = width_ * (bucket + fminf(fmaxf(share, 0.0f), 1.0f));
    return additive_ ? top_ - depth : top_ * exp2_fast(-depth);
  }

  // No rank is higher.
  __device__ __forceinline__ float most() const { return most_; }

  // Writes the rows, or the columns, that can be of a pair at or above the cut, ascending. Returns
  // how many.
  __device__ __forceinline__ int keep_rows(float cut, int m, int lane, int32_t* kept) const {
    return keep(row_reach_, cut, m, lane, kept);
  }
  __device__ __forceinline__ int keep_cols(float cut, int m, int lane, int32_t* kept) const {
    return keep(col_reach_, cut, m, lane, kept);
  }

 private:
  using TokenView = Token<kPlanes, kMaxAxisTopk>;
  static constexpr int kBuckets = GuessScratch::kBuckets;

  // Levels as depths below the best of their side: differences here, of logarithms there. A key of
  // a greater depth than count() asks for is not counted.
  __device__ __forceinline__ void measure_sums(const TokenView& token, int m, int lane,
                                               float (&row_depths)[kLaneKeys],
                                               float (&col_depths)[kLaneKeys]) {
    float rows[kLaneKeys], cols[kLaneKeys];
    float best_row = __uint_as_float(kNanBits), best_col = best_row;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = i * kWarpSize + lane;
      rows[i] = token.rows[key];
      cols[i] = token.cols[TokenView::kColStride + col_place(key)];
      best_row = fmaxf(best_row, rows[i]);
      best_col = fmaxf(best_col, cols[i]);
    }
    best_row = value_of(warp_highest(best_row));
    best_col = value_of(warp_highest(best_col));
    top_ = most_ = best_row + best_col;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool inside = i * kWarpSize + lane < m;
      row_depths[i] = inside ? best_row - rows[i] : kUncounted;
      col_depths[i] = inside ? best_col - cols[i] : kUncounted;
      row_reach_[i] = rows[i] + best_col;  // a sum does not fall when a number rises
      col_reach_[i] = best_row + cols[i];
    }
  }

  __device__ __forceinline__ void measure_products(const TokenView& token, int m, int lane,
                                                   float (&row_depths)[kLaneKeys],
                                                   float (&col_depths)[kLaneKeys]) {
    // No rank overflows, nor any sum of its terms, below this.
    constexpr float kMaxScale = 1e38f;
    // Of the greatest product of lengths: more than ranks, levels and bounds lose to rounding.
    constexpr float kSlack = 1e-5f;
    float unit[kPlanes];
    token.filter(unit);
    const float scale = reciprocal_fast(sqrt_fast(rank_value<kPlanes>(unit, unit)));
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) unit[s] *= scale;

    float rows[kLaneKeys], cols[kLaneKeys], rows_across[kLaneKeys], cols_across[kLaneKeys];
    float row = 0.0f, col = 0.0f, row_across = 0.0f, col_across = 0.0f;  // the greatest
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = i * kWarpSize + lane;
      float factors[kPlanes];
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) factors[s] = token.rows[s * TokenView::kRowStride + key];
      split(factors, unit, &rows[i], &rows_across[i]);
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        factors[s] = token.cols[s * TokenView::kColStride + col_place(key)];
      }
      split(factors, unit, &cols[i], &cols_across[i]);
      if (key < m) {
        row = fmaxf(row, fabsf(rows[i]));
        col = fmaxf(col, fabsf(cols[i]));
        row_across = fmaxf(row_across, rows_across[i]);
        col_across = fmaxf(col_across, cols_across[i]);
      }
    }
    row = warp_max(row);
    col = warp_max(col);
    row_across = warp_max(row_across);
    col_across = warp_max(col_across);
    const float greatest = (row + row_across) * (col + col_across);
    top_ = greatest < kMaxScale && row * col > 0.0f ? row * col : __uint_as_float(kNanBits);
    const float slack = kSlack * greatest;
    most_ = fmaf(row, col, fmaf(row_across, col_across, slack));
    const float row_scale = reciprocal_fast(row), col_scale = reciprocal_fast(col);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool inside = i * kWarpSize + lane < m;
      row_depths[i] = inside && rows[i] > 0.0f ? -log2_fast(rows[i] * row_scale) : kUncounted;
      col_depths[i] = inside && cols[i] > 0.0f ? -log2_fast(cols[i] * col_scale) : kUncounted;
      row_reach_[i] = fmaf(fabsf(rows[i]), col, fmaf(rows_across[i], col_across, slack));
      col_reach_[i] = fmaf(fabsf(cols[i]), row, fmaf(cols_across[i], row_across, slack));
    }
  }

  // x as its share along a unit vector and, no less than, the length of what is left.
  __device__ __forceinline__ static void split(const float (&x)[kPlanes],
                                               const float (&unit)[kPlanes], float* along,
                                               float* across) {
    constexpr float kUnderflow = 2e-19f;  // what is smaller has no square
    *along = rank_value<kPlanes>(x, unit);
    float squares = 0.0f;
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      const float left = fmaf(-*along, unit[s], x[s]);
      squares = fmaf(left, left, squares);
    }
    *across = sqrt_fast(squares) + kUnderflow;
  }

  // Sets count_ to how many pairs are in this lane's bucket of depth or above it.
  __device__ __forceinline__ void count(const float (&row_depths)[kLaneKeys],
                                        const float (&col_depths)[kLaneKeys], int lane,
                                        GuessScratch& scratch) {
    // Of products, pairs of keys that lie further off count for little and would cost resolution.
    const float max_depth = additive_ ? 0x1p126f : 4.0f;
    const float least_width = additive_ ? 0x1p-126f : 1e-3f;
    scratch.row_counts[lane] = 0;
    scratch.col_counts[lane] = 0;
    scratch.col_counts[kBuckets + lane] = 0;
    float deepest_row = 0.0f, deepest_col = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      if (row_depths[i] <= max_depth) deepest_row = fmaxf(deepest_row, row_depths[i]);
      if (col_depths[i] <= max_depth) deepest_col = fmaxf(deepest_col, col_depths[i]);
    }
    width_ = (warp_max(deepest_row) + warp_max(deepest_col)) * (1.0f / kBuckets);
    // All alike: no guess would part them.
    if (!(width_ > least_width)) top_ = __uint_as_float(kNanBits);
    const float scale = reciprocal_fast(fmaxf(width_, least_width));
    const auto bucket_of = [&](float depth) {
      // NaN is not counted, either.
      return depth <= max_depth ? static_cast<int>(fminf(fmaxf(depth, 0.0f) * scale, kBuckets))
                                : kBuckets;
    };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int row = bucket_of(row_depths[i]), col = bucket_of(col_depths[i]);
      atomicAdd(&scratch.row_counts[row], 1u);
      atomicAdd(&scratch.col_counts[kBuckets + col], 1u);
    }
    __syncwarp();
    const int cols = static_cast<int>(scratch.col_counts[kBuckets + lane]);
    int all_cols;
    const int cols_above = warp_scan_exclusive(cols, lane, &all_cols);
    scratch.col_counts[kBuckets + lane] = cols_above + cols;
    __syncwarp();
    uint32_t pairs = 0;
    const uint32_t* cols_here = scratch.col_counts + kBuckets + lane;
#pragma unroll
    for (int bucket = 0; bucket < kBuckets; bucket += 4) {
      const uint4 rows = *reinterpret_cast<const uint4*>(scratch.row_counts + bucket);
      pairs += rows.x * cols_here[-bucket] + rows.y * cols_here[-bucket - 1] +
               rows.z * cols_here[-bucket - 2] + rows.w * cols_here[-bucket - 3];
    }
    count_ = static_cast<float>(pairs);
  }

  __device__ __forceinline__ static int keep(const float (&reach)[kLaneKeys], float cut, int m,
                                             int lane, int32_t* kept) {
    int num_kept = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = i * kWarpSize + lane;
      const bool keeps = key < m && !(reach[i] < cut);  // a bound that overflows may be NaN
      const uint32_t keepers = __ballot_sync(kFullMask, keeps);
      if (keeps) kept[num_kept + __popc(keepers & ((1u << lane) - 1))] = key;
      num_kept += __popc(keepers);
    }
    return num_kept;
  }

  __device__ __forceinline__ static float warp_max(float x) {  // of numbers that are not negative
    return __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(x)));
  }

  static constexpr float kUncounted = 0x1p127f;

  bool additive_;
  float row_reach_[kLaneKeys], col_reach_[kLaneKeys];  // no pair of the key has a higher rank
  float most_;
  float top_;    // where depth begins
  float width_;  // of a bucket
  float count_;
};

// Lists the codes of all pairs at or above a number *lowest, min_found to max_found of them, in the
// order of positions; none is above *highest. Both are sortable ranks. Returns how many, or 0 and
// lists none of use where guesses fail. Every factor must be finite. `wanted` is how many are
// guessed for. col_factors: [kPlanes, kMaxAxisTopk], of the columns that are kept.
template <int kPlanes>
__device__ __forceinline__ uint32_t list_guessed(const Token<kPlanes, kMaxAxisTopk>& token, int m,
                                                 uint32_t min_found, uint32_t max_found,
                                                 float wanted, int lane, GuessScratch& scratch,
                                                 float* col_factors, uint16_t* codes,
                                                 uint32_t* lowest, uint32_t* highest) {
  using TokenView = Token<kPlanes, kMaxAxisTopk>;
  constexpr int kGuesses = 2;
  constexpr int kWords = kMaxAxisTopk / kWarpSize;  // of a row, a bit per column
  const CutGuess<kPlanes> guess(token, m, lane, scratch);
  float guess_for = wanted;
#pragma unroll 1
  for (int step = 0; step < kGuesses; ++step) {
    const float cut = guess.cut(guess_for);
    if (!(fabsf(cut) < __uint_as_float(kInfinityBits))) return 0;
    const int num_rows = guess.keep_rows(cut, m, lane, scratch.rows);
    const int num_cols = guess.keep_cols(cut, m, lane, scratch.cols);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int place = i * kWarpSize + lane;
      // Up to a multiple of a packet there are columns without a number.
      const int col = place < num_cols ? scratch.cols[place] : 0;
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        const float factor = token.cols[s * TokenView::kColStride + col_place(col)];
        col_factors[s * kMaxAxisTopk + place] =
            place < num_cols ? factor : __uint_as_float(kNanBits);
      }
    }
    __syncwarp();

    const float below = threshold_at(sortable(cut) - 1);
    uint32_t num_found = 0;
    int num_visited = 0;
    // A row to a lane.
#pragma unroll 1
    while (num_visited < num_rows) {
      const bool inside = num_visited + lane < num_rows;
      const int row_key = inside ? scratch.rows[num_visited + lane] : 0;
      num_visited = min(num_visited + kWarpSize, num_rows);
      float row[kPlanes];
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) row[s] = token.rows[s * TokenView::kRowStride + row_key];
      if (!inside) row[0] = __uint_as_float(kNanBits);
      uint32_t words[kWords];
      int own_found = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        words[w] = 0;
        const int first = w * kWarpSize;
        if (first >= num_cols) continue;
        const int last = min(num_cols, first + kWarpSize);
        int place = first;
#pragma unroll 1
        for (; place < last; place += kPacket) {
          float cols[kPlanes][kPacket];
#pragma unroll
          for (int s = 0; s < kPlanes; ++s) {
            load_floats<kPacket>(col_factors + s * kMaxAxisTopk + place, cols[s]);
          }
#pragma unroll
          for (int x = 0; x < kPacket; ++x) {
            float col[kPlanes];
#pragma unroll
            for (int s = 0; s < kPlanes; ++s) col[s] = cols[s][x];
            words[w] = words[w] << 1 | is_above(rank_value<kPlanes>(row, col), below);
          }
        }
        words[w] <<= first + kWarpSize - place;  // the first column's bit is the highest
        own_found += __popc(words[w]);
      }
      int count;
      uint16_t* next = codes + num_found + warp_scan_exclusive(own_found, lane, &count);
      num_found += count;
      if (num_found > max_found) break;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        for (uint32_t bits = words[w]; bits != 0;) {
          const int bit = __clz(static_cast<int>(bits));
          bits ^= 0x80000000u >> bit;
          const int col_key = scratch.cols[w * kWarpSize + bit];
          *next++ = static_cast<uint16_t>(pair_code(row_key, col_key));
        }
      }
    }
    __syncwarp();
    if (num_found >= min_found && num_found <= max_found) {
      *lowest = sortable(cut);
      *highest = sortable(guess.most());
      return num_found;
    }
    // As if the rows that are left had as many.
    guess_for *= __fdividef(wanted * (num_visited + 1), fmaxf(num_found, 0.5f) * (num_rows + 1));
  }
  return 0;
}

}  // namespace ultramem::cuda
