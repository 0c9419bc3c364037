// Product-key retrieval, forward, grid stage: the best pairs without a look at most of the others.
//
// A cut is guessed that some more pairs than wanted are at or above. A rank is about the product of
// two levels: how far a row's and a column's factors reach along the filter t that the columns were
// kept by. (In additive mode it is the sum of two: the scores.) Histograms of the levels of either
// side tell how many of their products or sums lie above a number.
//
// A key without a pair at or above the cut is known by a bound on what it reaches: with w and b the
// factors of a row and a column, w . b <= (w . t)(b . t) + |w across t| |b across t| for a unit t,
// and more closely where two ranks leave one direction across (Reach). The others' pairs are looked
// at, so what is listed is exact; a wrong guess costs time alone.
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
  const float most = fmaxf(topk + 0.25f * (max_sorted - topk), 1.15f * topk);
  return fminf(topk + fmaxf(0.35f * topk, 24.0f), most) / kFound;
}

// What a warp keeps in shared memory meanwhile.
struct alignas(16) GuessScratch {
  static constexpr int kBuckets = kWarpSize;

  // The last bucket is of keys that are not counted.
  uint32_t row_counts[kBuckets + 4];
  uint32_t col_counts[kBuckets + 4];
  uint32_t rows_in[kBuckets / 4];      // a byte per bucket
  uint32_t cols_to[2 * kBuckets / 4];  // a byte per bucket, the last one first, of how many are
                                       // in it or above it; then zeros
  int32_t rows[kMaxAxisTopk];          // that can be of a pair at or above the cut, ascending
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
      measure_products(token, lane, row_depths, col_depths);
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

  // Calls visit(i, place) for row, or column, 32 i + lane if it can be of a pair above the cut and
  // is the place-th that can. Returns how many can.
  template <typename Visit>
  __device__ __forceinline__ int keep_rows(float cut, int m, int lane, Visit visit) const {
    return keep(row_reach_, cut, m, lane, visit);
  }
  template <typename Visit>
  __device__ __forceinline__ int keep_cols(float cut, int m, int lane, Visit visit) const {
    return keep(col_reach_, cut, m, lane, visit);
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
      float row[kPlanes], col[kPlanes];
      token.load_row(key, row);
      token.load_col(i, lane, col);
      rows[i] = row[0];
      cols[i] = key < m ? col[1] : __uint_as_float(kNanBits);
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

  __device__ __forceinline__ void measure_products(const TokenView& token, int lane,
                                                   float (&row_depths)[kLaneKeys],
                                                   float (&col_depths)[kLaneKeys]) {
    // No rank overflows, nor any sum of its terms, below this, and no bound on what a key reaches
    // where it matters below that.
    constexpr float kMaxScale = 1e38f, kMaxFactor = 1e32f;
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
      token.load_row(key, factors);
      split(factors, unit, &rows[i], &rows_across[i]);
      token.load_col(i, lane, factors);
      split(factors, unit, &cols[i], &cols_across[i]);
      // Beyond the last key there are no numbers.
      row = fmaxf(row, fabsf(rows[i]));
      col = fmaxf(col, fabsf(cols[i]));
      row_across = fmaxf(row_across, fabsf(rows_across[i]));
      col_across = fmaxf(col_across, fabsf(cols_across[i]));
    }
    row = warp_max(row);
    col = warp_max(col);
    row_across = warp_max(row_across);
    col_across = warp_max(col_across);
    const float row_size = row + row_across, col_size = col + col_across;
    const float greatest = (row_size + kUnderflow) * (col_size + kUnderflow);
    const bool fits = greatest < kMaxScale && fmaxf(row_size, col_size) < kMaxFactor;
    top_ = fits && row * col > 0.0f ? row * col : __uint_as_float(kNanBits);
    const float slack = kSlack * greatest;
    most_ = fmaf(row, col, fmaf(row_across, col_across, slack));
    const float row_scale = reciprocal_fast(row), col_scale = reciprocal_fast(col);
    const Reach of_rows(cols, cols_across, col, col_across, row_across * row_scale);
    const Reach of_cols(rows, rows_across, row, row_across, col_across * col_scale);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      row_depths[i] = rows[i] > 0.0f ? -log2_fast(rows[i] * row_scale) : kUncounted;
      col_depths[i] = cols[i] > 0.0f ? -log2_fast(cols[i] * col_scale) : kUncounted;
      row_reach_[i] = of_rows(rows[i], rows_across[i]) + slack;
      col_reach_[i] = of_cols(cols[i], cols_across[i]) + slack;
    }
  }

  // What no product of a key of one side with any of the other side's is above.
  //
  // Of two ranks, a (b + s y) with a key's a > 0 along and its slope s across: the greatest b + s y
  // is a convex function of s, and between two slopes below the line through its values there. It
  // is worked out for a slope of either sign and 0, and beyond rises by no more than the greatest
  // |y|.
  class Reach {
   public:
    __device__ __forceinline__ Reach(const float (&along)[kLaneKeys],
                                     const float (&across)[kLaneKeys], float greatest_along,
                                     float greatest_across, float slope)
        : along_(greatest_along), across_(greatest_across) {
      if constexpr (kPlanes == 2) {
        float rising = 0.0f, falling = 0.0f;
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) {
          rising = fmaxf(rising, fmaf(slope, across[i], along[i]));
          falling = fmaxf(falling, fmaf(-slope, across[i], along[i]));
        }
        // Keys that are across almost alone: infinity is a bound, too.
        const bool is_steep = !(slope < 0x1p60f);
        const float at_rising = is_steep ? __uint_as_float(kInfinityBits) : warp_max(rising);
        const float at_falling = is_steep ? __uint_as_float(kInfinityBits) : warp_max(falling);
        const float scale = reciprocal_fast(slope);
        before_rising_ = (at_rising - along_) * scale;
        before_falling_ = (at_falling - along_) * scale;
        beyond_rising_ = fmaf(-slope, across_, at_rising);
        beyond_falling_ = fmaf(-slope, across_, at_falling);
      }
    }

    __device__ __forceinline__ float operator()(float along, float across) const {
      const float of_lengths = fmaf(fabsf(along), along_, fabsf(across) * across_);
      if constexpr (kPlanes == 2) {
        const bool falls = across < 0.0f;
        const float before = falls ? before_falling_ : before_rising_;
        const float beyond = falls ? beyond_falling_ : beyond_rising_;
        const float reach = fmaxf(fmaf(along, along_, fabsf(across) * before),
                                  fmaf(along, beyond, fabsf(across) * across_));
        return along > 0.0f ? reach : of_lengths;
      } else {
        return of_lengths;
      }
    }

   private:
    float along_, across_;
    float before_rising_, before_falling_, beyond_rising_, beyond_falling_;
  };

  // x as its share along a unit vector and what is left: of two ranks with a sign, of more no less
  // than its length.
  __device__ __forceinline__ static void split(const float (&x)[kPlanes],
                                               const float (&unit)[kPlanes], float* along,
                                               float* across) {
    *along = rank_value<kPlanes>(x, unit);
    if constexpr (kPlanes == 2) {
      *across = fmaf(x[0], unit[1], -(x[1] * unit[0]));
    } else {
      float squares = 0.0f;
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        const float left = fmaf(-*along, unit[s], x[s]);
        squares = fmaf(left, left, squares);
      }
      *across = sqrt_fast(squares) + kUnderflow;
    }
  }

  // Sets count_ to how many pairs are in this lane's bucket of depth or above it.
  __device__ __forceinline__ void count(const float (&row_depths)[kLaneKeys],
                                        const float (&col_depths)[kLaneKeys], int lane,
                                        GuessScratch& scratch) {
    // Of products, pairs of keys that lie further off count for little and would cost resolution.
    const float max_depth = additive_ ? 0x1p126f : 4.0f;
    const float least_width = additive_ ? 0x1p-126f : 1e-3f;
    auto* rows_in = reinterpret_cast<uint8_t*>(scratch.rows_in);
    auto* cols_to = reinterpret_cast<uint8_t*>(scratch.cols_to);
    scratch.row_counts[lane] = 0;
    scratch.col_counts[lane] = 0;
    cols_to[kBuckets + lane] = 0;
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
    // Rounding makes depths negative, and minus infinite below normal numbers.
    const auto bucket_of = [&](float depth) {
      return static_cast<int>(fminf(fmaxf(depth * scale, 0.0f), static_cast<float>(kBuckets)));
    };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      atomicAdd(&scratch.row_counts[bucket_of(row_depths[i])], 1u);
      atomicAdd(&scratch.col_counts[bucket_of(col_depths[i])], 1u);
    }
    __syncwarp();
    const int cols = static_cast<int>(scratch.col_counts[lane]);
    int all_cols;
    const int cols_above = warp_scan_exclusive(cols, &all_cols);
    static_assert(kMaxAxisTopk < 256, "counts of keys are bytes");
    rows_in[lane] = static_cast<uint8_t>(scratch.row_counts[lane]);
    cols_to[kBuckets - 1 - lane] = static_cast<uint8_t>(cols_above + cols);
    __syncwarp();
    // Rows of a bucket with the columns of buckets up to the lane's less that: the bytes of the
    // latter begin at kBuckets - 1 - lane.
    const uint32_t* cols_here = scratch.cols_to + (kBuckets - 1 - lane) / 4;
    const int shift = (kBuckets - 1 - lane) % 4 * 8;
    uint32_t pairs = 0;
    uint32_t next = cols_here[0];
#pragma unroll
    for (int word = 0; word < kBuckets / 4; word += 4) {
      const uint4 packed = *reinterpret_cast<const uint4*>(scratch.rows_in + word);
      const uint32_t rows[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = next;
        next = cols_here[word + i + 1];
        pairs = __dp4a(rows[i], __funnelshift_r(low, next, shift), pairs);
      }
    }
    count_ = static_cast<float>(pairs);
  }

  template <typename Visit>
  __device__ __forceinline__ static int keep(const float (&reach)[kLaneKeys], float cut, int m,
                                             int lane, Visit visit) {
    int num_kept = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      // A bound that overflows may be NaN.
      const bool keeps = i * kWarpSize + lane < m && !(reach[i] < cut);
      const uint32_t keepers = __ballot_sync(kFullMask, keeps);
      if (keeps) visit(i, num_kept + __popc(keepers & ((1u << lane) - 1)));
      num_kept += __popc(keepers);
    }
    return num_kept;
  }

  __device__ __forceinline__ static float warp_max(float x) {  // of numbers that are not negative
    return __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(x)));
  }

  static constexpr float kUnderflow = 2e-19f;  // what is smaller has no square, nor a product
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
// guessed for. col_factors: [kMaxAxisTopk, kPlanes], of the columns that are kept. `codes` has room
// for a multiple of 32 kMaxRegisterItems.
template <int kPlanes>
__device__ __forceinline__ uint32_t list_guessed(const Token<kPlanes, kMaxAxisTopk>& token, int m,
                                                 uint32_t min_found, uint32_t max_found,
                                                 float wanted, int lane, GuessScratch& scratch,
                                                 float* col_factors, uint16_t* codes,
                                                 uint32_t* lowest, uint32_t* highest) {
  constexpr int kGuesses = 2;
  constexpr int kVisited = 2 * kPacket;             // columns at once
  constexpr int kWords = kMaxAxisTopk / kWarpSize;  // of a row, a bit per column
  const CutGuess<kPlanes> guess(token, m, lane, scratch);
  float guess_for = wanted;
#pragma unroll 1
  for (int step = 0; step < kGuesses; ++step) {
    const float cut = guess.cut(guess_for) + 0.0f;  // not -0, which is not below a +0
    if (!(fabsf(cut) < __uint_as_float(kInfinityBits))) return 0;
    const int num_rows = guess.keep_rows(
        cut, m, lane, [&](int i, int place) { scratch.rows[place] = i * kWarpSize + lane; });
    const int num_cols = guess.keep_cols(cut, m, lane, [&](int i, int place) {
      scratch.cols[place] = i * kWarpSize + lane;
      float factors[kPlanes];
      token.load_col(i, lane, factors);
      store_rounded<kPlanes>(factors, col_factors + place * kPlanes);
    });
    // Up to a multiple of kVisited there are columns without a number.
    if (lane < (-num_cols & (kVisited - 1))) {
      col_factors[(num_cols + lane) * kPlanes] = __uint_as_float(kNanBits);
    }
    __syncwarp();

    uint32_t num_found = 0;
    int num_visited = 0;
    // A row to a lane.
#pragma unroll 1
    while (num_visited < num_rows) {
      const bool inside = num_visited + lane < num_rows;
      const int row_key = inside ? scratch.rows[num_visited + lane] : 0;
      num_visited = min(num_visited + kWarpSize, num_rows);
      float row[kPlanes];
      token.load_row(row_key, row);
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
        for (; place < last; place += kVisited) {
#pragma unroll
          for (int x = 0; x < kVisited; x += kPacket) {
            float cols[kPacket][kPlanes];
            token.load_packet(col_factors + (place + x) * kPlanes, cols);
#pragma unroll
            for (int i = 0; i < kPacket; ++i) {
              words[w] = words[w] << 1 | is_above(rank_value<kPlanes>(row, cols[i]), cut);
            }
          }
        }
        words[w] <<= first + kWarpSize - place;  // the first column's bit is the highest
        own_found += __popc(words[w]);
      }
      int count;
      uint16_t* next = codes + num_found + warp_scan_exclusive(own_found, &count);
      num_found += count;
      if (num_found > max_found) break;
      // At first with a column's place in the list of those that are kept.
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int last = pair_code(row_key, (w + 1) * kWarpSize - 1);
        for (uint32_t bits = words[w]; bits != 0;) {
          const int bit = highest_bit(bits);
          bits &= ~(1u << bit);
          *next++ = static_cast<uint16_t>(last - bit);
        }
      }
    }
    __syncwarp();
    if (num_found >= min_found && num_found <= max_found) {
      for (uint32_t i = lane * kMaxRegisterItems; i < num_found;
           i += kWarpSize * kMaxRegisterItems) {
        auto& own = *reinterpret_cast<Packet<uint16_t, kMaxRegisterItems>*>(codes + i);
        auto listed = own;
#pragma unroll
        for (uint16_t& code : listed.elements) {
          code = static_cast<uint16_t>(pair_code(code_row(code), scratch.cols[code_col(code)]));
        }
        own = listed;
      }
      __syncwarp();
      *lowest = sortable_number(cut) + 1;
      *highest = sortable(guess.most());
      return num_found;
    }
    // As if the rows that are left had as many.
    guess_for *= __fdividef(wanted * (num_visited + 1), fmaxf(num_found, 0.5f) * (num_rows + 1));
  }
  return 0;
}

}  // namespace ultramem::cuda
