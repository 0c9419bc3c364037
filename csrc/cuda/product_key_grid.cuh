// What the kernels of the grid stage share: a view of a token and head, and the order and the
// output of the pairs that were found.
#pragma once

#include "block_topk.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

// Kernels for up to so many kept keys a side, and for more.
inline constexpr int kSmallRows = 32;

// Pair (i, j) as one number whose order is that of positions.
inline constexpr int kCodeBits = 7;
static_assert(kMaxAxisTopk <= 1 << kCodeBits);

__host__ __device__ constexpr int pair_code(int row, int col) { return row << kCodeBits | col; }
__host__ __device__ constexpr int code_row(int code) { return code >> kCodeBits; }
__host__ __device__ constexpr int code_col(int code) { return code & ((1 << kCodeBits) - 1); }

// Where column j is kept. Four floats of gap after every 16: lanes that read at multiples of 16
// columns meet in no bank.
__host__ __device__ constexpr int col_place(int j) { return j + j / 16 * kPacket; }

// The sortable ranks of a warp's extremes; NaN stands for no number.
__device__ __forceinline__ uint32_t warp_highest(float x) {
  return __reduce_max_sync(kFullMask, sortable(x));
}
__device__ __forceinline__ uint32_t warp_lowest(float x) {
  return __reduce_min_sync(kFullMask, x == x ? sortable(x) : 0xffffffffu);
}

inline constexpr uint32_t kLowestNumber = 0x007fffffu;  // the sortable rank of -inf

// Whether every factor of the warp is finite: then no rank is NaN.
template <int kPlanes>
__device__ __forceinline__ bool is_finite(const float (&factors)[kPlanes]) {
  bool finite = true;
#pragma unroll
  for (int s = 0; s < kPlanes; ++s) finite &= fabsf(factors[s]) < __uint_as_float(0x7f800000u);
  return finite;
}

// What a slow search is narrowed with (CutSearch::kGuesses), from a visit to every number.
class NextNumbers {
 public:
  __device__ __forceinline__ explicit NextNumbers(const CutSearch& search)
      : low_(value_of(search.low)), high_(value_of(search.high)) {
    least_ = most_ = __uint_as_float(kNanBits);
  }

  __device__ __forceinline__ void visit(float x) {
    if (x >= low_) least_ = fminf(least_, x);
    if (!(x >= high_)) most_ = fmaxf(most_, x);
  }
  // NaN where there is none.
  __device__ __forceinline__ float least() const { return least_; }
  __device__ __forceinline__ float most() const { return most_; }
  __device__ __forceinline__ void narrow(CutSearch& search) const {
    search.low = warp_lowest(least_);
    search.high = warp_highest(most_) + 1;
  }

 private:
  float low_, high_;
  float least_, most_;
};

// Whether x is above a threshold, as 0 or 1, without a predicate. NaN is not: what comes of it has
// no sign.
__device__ __forceinline__ uint32_t is_above(float x, float threshold) {
  return __float_as_uint(threshold - x) >> 31;
}

template <int kPlanes, int kMaxKeys>
class Token {
 public:
  static constexpr int kRowStride = kMaxKeys;
  static constexpr int kColStride = col_place(kMaxKeys);
  static constexpr int kCoreElements = kMaxNumCores * kPlanes * kPlanes;

  // Offsets into a warp's shared memory.
  struct Layout {
    int core;  // [kMaxNumCores, kPlanes, kPlanes], zeros beyond the cores and the rank
    int rows;  // [kPlanes, kRowStride] Cbar^T S_row
    int cols;  // [kPlanes, kColStride] S_col; NaN beyond the last, so that no rank there is a
               // number

    __host__ __device__ explicit Layout(SharedLayout& layout)
        : core(layout.take(4 * kCoreElements)),
          rows(layout.take(4 * kPlanes * kRowStride)),
          cols(layout.take(4 * kPlanes * kColStride)) {}
  };

  __device__ Token(const ProductKeyTopkParams& p, int64_t token_head, unsigned char* shared,
                   const Layout& layout, int lane)
      : rows(reinterpret_cast<float*>(shared + layout.rows)),
        cols(reinterpret_cast<float*>(shared + layout.cols)),
        p_(p),
        core_(reinterpret_cast<float*>(shared + layout.core)),
        token_head_(static_cast<uint32_t>(token_head)) {
    if (additive()) return;
    const int R = p.tucker_rank;
    const uint32_t head = p.num_heads == 1 ? 0 : token_head_ % p.num_heads;
    const auto* core = static_cast<const float*>(p.core);
    const auto* filter = static_cast<const float*>(p.t);
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      if (s < R) filter_[s] = __ldg(filter + int64_t{head} * R + s);
    }
#pragma unroll
    for (int i = 0; i < kOwnElements; ++i) {
      const int e = i * kWarpSize + lane;
      const int c = e / (kPlanes * kPlanes), r = e / kPlanes % kPlanes, s = e % kPlanes;
      if (c < p.num_cores && r < R && s < R) {
        own_core_[i] = __ldg(core + ((int64_t{c} * p.num_heads + head) * R + r) * R + s);
      }
    }
  }

  // Scores of row and column `index`, not yet folded; NaN beyond the last.
  __device__ __forceinline__ void load_scores(int index, float (&row)[kPlanes],
                                              float (&col)[kPlanes]) const {
    const int m = p_.axis_topk;
    const int R = p_.tucker_rank;
    const float* scores = axis_scores();
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      row[s] = index < m ? 0.0f : __uint_as_float(kNanBits);
      col[s] = row[s];
      if (s < R && index < m) {
        row[s] = scores[s * m + index];
        col[s] = scores[(R + s) * m + index];
      }
    }
    if (additive() && index < m) {
      row[1] = 1.0f;
      col[1] = col[0];
      col[0] = 1.0f;
    }
  }

  // Before the cores are read, with a barrier of the warp in between.
  __device__ __forceinline__ void store_core(int lane) const {
#pragma unroll
    for (int i = 0; i < kOwnElements; ++i) {
      const int e = i * kWarpSize + lane;
      if (e < kCoreElements) core_[e] = own_core_[i];
    }
  }

  // Cbar, for `fold`.
  __device__ __forceinline__ void sum_cores(float (&cbar)[kPlanes][kPlanes]) const {
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) cbar[r][s] = 0.0f;
    }
#pragma unroll
    for (int e = 0; e < kCoreElements; e += kPacket) {
      float core[kPacket];
      load_floats<kPacket>(core_ + e, core);
#pragma unroll
      for (int i = 0; i < kPacket; ++i) {
        cbar[(e + i) / kPlanes % kPlanes][(e + i) % kPlanes] += core[i];
      }
    }
  }

  // Scores of a row to its factors, Cbar^T S_row. Ranks beyond the last stay out: an infinite score
  // times their zeros is NaN.
  __device__ __forceinline__ void fold(const float (&cbar)[kPlanes][kPlanes],
                                       float (&row)[kPlanes]) const {
    if (additive()) return;
    float factors[kPlanes];
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      factors[s] = 0.0f;
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        if (r < p_.tucker_rank && s < p_.tucker_rank) {
          factors[s] = fmaf(row[r], cbar[r][s], factors[s]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) row[s] = factors[s];
  }

  // The filter of the columns, not in additive mode; zeros beyond the rank.
  __device__ __forceinline__ void filter(float (&t)[kPlanes]) const {
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) t[s] = filter_[s];
  }

  __device__ __forceinline__ bool additive() const { return p_.mode == ScoreMode::kAdditive; }

  __device__ __forceinline__ float rank_of(int code) const {
    float row[kPlanes], col[kPlanes];
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      row[s] = rows[s * kRowStride + code_row(code)];
      col[s] = cols[s * kColStride + col_place(code_col(code))];
    }
    return rank_value<kPlanes>(row, col);
  }

  // The id of a kept key, of 2 m: the rows' first.
  __device__ __forceinline__ int32_t key_id(int i) const { return ids()[i]; }
  __device__ __forceinline__ const int32_t* ids() const {
    return p_.axis_indices + int64_t{token_head_} * (2 * p_.axis_topk);
  }

  // Writes the topk pairs of these codes in this order; num_threads do it together. `ids` are those
  // of the kept keys, there or in a copy.
  __device__ __forceinline__ void write(const uint16_t* codes, const int32_t* ids, int thread,
                                        int num_threads = kWarpSize) const {
    const int m = p_.axis_topk;
    const int R = p_.tucker_rank;
    const int C = p_.num_cores;
    const float* axis = axis_scores();
    const int64_t first = int64_t{token_head_} * p_.topk;
    int64_t* indices = p_.indices + first;
    int16_t* positions = p_.grid_positions + first;
    float* scores = static_cast<float*>(p_.scores) + first * C;
    for (int k = thread; k < p_.topk; k += num_threads) {
      const int row = code_row(codes[k]), col = code_col(codes[k]);
      indices[k] = ids[row] * p_.num_keys + ids[m + col];
      positions[k] = static_cast<int16_t>(row * m + col);
      if (additive()) {
        scores[k] = axis[row] + axis[m + col];
        continue;
      }
      float row_scores[kPlanes], col_scores[kPlanes];
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        row_scores[r] = r < R ? axis[r * m + row] : 0.0f;
        col_scores[r] = cols[r * kColStride + col_place(col)];
      }
      for (int c = 0; c < C; ++c) {
        float score = 0.0f;
#pragma unroll
        for (int s = 0; s < kPlanes; ++s) {
          float row_sum = 0.0f;
#pragma unroll
          for (int r = 0; r < kPlanes; ++r) {
            if (r < R)
              row_sum = fmaf(row_scores[r], core_[(c * kPlanes + r) * kPlanes + s], row_sum);
          }
          if (s < R) score = fmaf(row_sum, col_scores[s], score);
        }
        scores[k * C + c] = score;
      }
    }
  }

  float* rows;
  float* cols;

 private:
  static constexpr int kOwnElements = (kCoreElements + kWarpSize - 1) / kWarpSize;

  // The kept keys' scores, [2, R, m].
  __device__ __forceinline__ const float* axis_scores() const {
    return static_cast<const float*>(p_.axis_scores) +
           int64_t{token_head_} * (2 * p_.tucker_rank * p_.axis_topk);
  }

  const ProductKeyTopkParams& p_;
  float* core_;
  uint32_t token_head_;
  float own_core_[kOwnElements] = {};
  float filter_[kPlanes] = {};
};

// Sorts `count` codes in place, at most 32 * kItems of them, which the room of `codes` is at least.
// Pairs of equal rank are in the order of their codes already. A key is the rank's distance to
// `lowest`, of which 32 bits hold enough here, with the place below, so that no two are equal.
template <int kItems, typename RankOf>
__device__ __forceinline__ void sort_codes_in_registers(uint16_t* codes, int count, uint32_t lowest,
                                                        int lane, RankOf rank_of) {
  constexpr int kPlaces = kWarpSize * kItems;
  uint32_t keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = lane * kItems + i;
    keys[i] = 0;  // below all keys: the last place, if it is taken, is an entry and not padding
    if (place < count) {
      keys[i] = (sortable(rank_of(codes[place])) - lowest) * kPlaces + (kPlaces - 1 - place);
    }
  }
  bitonic_sort_registers_descending<kItems>(keys, lane);
  uint16_t sorted[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) sorted[i] = codes[kPlaces - 1 - (keys[i] & (kPlaces - 1))];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) codes[lane * kItems + i] = sorted[i];
}

inline constexpr int kMaxRegisterItems = 8;

// Sorts `count` codes in place by their ranks, all of which lie in lowest .. highest as sortable
// ranks. `codes` has room for the next power of two and for 64; `candidates` for that many, too.
template <typename RankOf>
__device__ __forceinline__ void sort_codes(uint16_t* codes, int count, uint32_t lowest,
                                           uint32_t highest, uint64_t* candidates, int lane,
                                           RankOf rank_of) {
  const uint32_t range = highest - lowest;
  __syncwarp();
  if (count <= 2 * kWarpSize && range < 1u << 26) {
    sort_codes_in_registers<2>(codes, count, lowest, lane, rank_of);
  } else if (count <= 4 * kWarpSize && range < 1u << 25) {
    sort_codes_in_registers<4>(codes, count, lowest, lane, rank_of);
  } else if (count <= kMaxRegisterItems * kWarpSize && range < 1u << 24) {
    sort_codes_in_registers<kMaxRegisterItems>(codes, count, lowest, lane, rank_of);
  } else {
    const int size = next_power_of_two(count);
    for (int i = lane; i < size; i += kWarpSize) {
      candidates[i] =
          i < count ? make_candidate(sortable(rank_of(codes[i])), static_cast<uint32_t>(codes[i]))
                    : 0;
    }
    __syncwarp();
    bitonic_sort_descending(candidates, size, lane, kWarpSize, [] { __syncwarp(); });
    for (int i = lane; i < count; i += kWarpSize) {
      codes[i] = static_cast<uint16_t>(candidate_position(candidates[i]));
    }
  }
  __syncwarp();
}

}  // namespace ultramem::cuda
