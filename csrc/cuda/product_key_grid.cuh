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

// The sortable ranks of a warp's extremes; NaN stands for no number.
__device__ __forceinline__ uint32_t warp_highest(float x) {
  return __reduce_max_sync(kFullMask, sortable(x));
}
__device__ __forceinline__ uint32_t warp_lowest(float x) {
  return __reduce_min_sync(kFullMask, x == x ? sortable(x) : 0xffffffffu);
}

// Adds zeros to `zero`, and NaN where a factor is not finite: of finite factors no rank is NaN.
template <int kPlanes>
__device__ __forceinline__ void add_zeros(const float (&factors)[kPlanes], float* zero) {
#pragma unroll
  for (int s = 0; s < kPlanes; ++s) *zero = fmaf(factors[s], 0.0f, *zero);
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

// The place of the highest of some bits.
__device__ __forceinline__ int highest_bit(uint32_t bits) {
  return 31 - __clz(static_cast<int>(bits));
}

// Whether x is above a threshold, as 0 or 1, without a predicate. NaN is not: what comes of it has
// no sign.
__device__ __forceinline__ uint32_t is_above(float x, float threshold) {
  return __float_as_uint(threshold - x) >> 31;
}

template <int kPlanes, int kMaxKeys>
class Token {
 public:
  static constexpr int kCoreElements = kMaxNumCores * kPlanes * kPlanes;

  // Where the factors of column j are. Of many keys, lanes read at multiples of 16 columns: four
  // floats of gap after as many, and they meet in no bank.
  static constexpr __host__ __device__ int col_place(int j) {
    return j * kPlanes + (kMaxKeys > kSmallRows ? (j & ~15) >> 2 : 0);
  }

  // Offsets into a warp's shared memory.
  struct Layout {
    int core;  // [kMaxNumCores, kPlanes, kPlanes], zeros beyond the cores and the rank
    int rows;  // [kMaxKeys, kPlanes] Cbar^T S_row
    int cols;  // [kMaxKeys, kPlanes] S_col, with gaps; NaN beyond the last, so that no rank there
               // is a number

    __host__ __device__ explicit Layout(SharedLayout& layout)
        : core(layout.take(4 * kCoreElements)),
          rows(layout.take(4 * kPlanes * kMaxKeys)),
          cols(layout.take(4 * col_place(kMaxKeys))) {}
  };

  __device__ Token(const ProductKeyTopkParams& p, uint32_t token_head, unsigned char* shared,
                   const Layout& layout, int lane)
      : rows(reinterpret_cast<float*>(shared + layout.rows)),
        cols(reinterpret_cast<float*>(shared + layout.cols)),
        p_(p),
        core_(reinterpret_cast<float*>(shared + layout.core)),
        token_head_(token_head) {
    if (additive()) return;
    const uint32_t R = p.tucker_rank;
    const uint32_t head = p.num_heads == 1 ? 0 : token_head_ % p.num_heads;
    const auto* core = static_cast<const float*>(p.core);
    const auto* filter = static_cast<const float*>(p.t) + uint64_t{head} * R;
#pragma unroll
    for (uint32_t s = 0; s < kPlanes; ++s) {
      if (s < R) filter_[s] = __ldg(filter + s);
    }
#pragma unroll
    for (int i = 0; i < kOwnElements; ++i) {
      const uint32_t e = i * kWarpSize + lane;
      const uint32_t c = e / (kPlanes * kPlanes), r = e / kPlanes % kPlanes, s = e % kPlanes;
      if (c < p.num_cores && max(r, s) < R) {
        own_core_[i] = __ldg(core + (uint64_t{c * p.num_heads + head} * (R * R) + (r * R + s)));
      }
    }
  }

  // Scores of row or column 32 i + lane, not folded; zeros beyond the last key.
  __device__ __forceinline__ void load_row_scores(int i, int lane, float (&row)[kPlanes]) const {
    load_scores(0, i, lane, row);
    if (additive()) row[1] = 1.0f;
  }
  __device__ __forceinline__ void load_col_scores(int i, int lane, float (&col)[kPlanes]) const {
    load_scores(p_.tucker_rank, i, lane, col);
    if (additive()) {
      col[1] = col[0];
      col[0] = 1.0f;
    }
  }

  __device__ __forceinline__ void load_row(int i, float (&row)[kPlanes]) const {
    load_floats<kPlanes>(rows + i * kPlanes, row);
  }
  __device__ __forceinline__ void load_col(int j, float (&col)[kPlanes]) const {
    load_floats<kPlanes>(cols + col_place(j), col);
  }
  __device__ __forceinline__ void store_row(int i, const float (&row)[kPlanes]) const {
    store_rounded<kPlanes>(row, rows + i * kPlanes);
  }
  __device__ __forceinline__ void store_col(int j, const float (&col)[kPlanes]) const {
    store_rounded<kPlanes>(col, cols + col_place(j));
  }
  // The same for column 32 i + lane.
  __device__ __forceinline__ void load_col(int i, int lane, float (&col)[kPlanes]) const {
    load_floats<kPlanes>(cols + col_place(lane) + i * col_place(kWarpSize), col);
  }
  __device__ __forceinline__ void store_col(int i, int lane, const float (&col)[kPlanes]) const {
    store_rounded<kPlanes>(col, cols + col_place(lane) + i * col_place(kWarpSize));
  }
  // Columns j to j + kPacket; j is a multiple of that.
  __device__ __forceinline__ void load_cols(int j, float (&packet)[kPacket][kPlanes]) const {
    load_packet(cols + col_place(j), packet);
  }
  __device__ __forceinline__ static void load_packet(const float* from,
                                                     float (&packet)[kPacket][kPlanes]) {
#pragma unroll
    for (int e = 0; e < kPacket * kPlanes; e += kPacket) {
      float floats[kPacket];
      load_floats<kPacket>(from + e, floats);
#pragma unroll
      for (int i = 0; i < kPacket; ++i) packet[(e + i) / kPlanes][(e + i) % kPlanes] = floats[i];
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
    for (int c = 0; c < kMaxNumCores; ++c) {
      if (c >= p_.num_cores) break;
      float core[kPlanes][kPlanes];
      load_core(c, core);
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
        for (int s = 0; s < kPlanes; ++s) cbar[r][s] += core[r][s];
      }
    }
  }

  // Scores of a row to its factors, Cbar^T S_row, not in additive mode. Ranks beyond the last stay
  // out: an infinite score times their zeros is NaN.
  __device__ __forceinline__ void fold(const float (&cbar)[kPlanes][kPlanes],
                                       float (&row)[kPlanes]) const {
    float factors[kPlanes];
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      factors[s] = 0.0f;
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) factors[s] = fmaf(row[r], cbar[r][s], factors[s]);
    }
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      row[s] = s == 0 || s < p_.tucker_rank ? factors[s] : 0.0f;
    }
  }

  // The filter of the columns, not in additive mode; zeros beyond the rank.
  __device__ __forceinline__ void filter(float (&t)[kPlanes]) const {
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) t[s] = filter_[s];
  }

  __device__ __forceinline__ bool additive() const { return p_.mode == ScoreMode::kAdditive; }

  __device__ __forceinline__ float rank_of(int code) const {
    float row[kPlanes], col[kPlanes];
    load_row(code_row(code), row);
    load_col(code_col(code), col);
    return rank_value<kPlanes>(row, col);
  }

  // The ids of row and column 32 i + lane; zero beyond the last key.
  __device__ __forceinline__ void load_ids(int i, int lane, int32_t (&key_ids)[2]) const {
    const uint32_t m = p_.axis_topk;
    const int32_t* own = opaque(p_.axis_indices + uint64_t{token_head_} * (2 * m) + lane);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      key_ids[side] = 0;
      if (i * kWarpSize + lane < p_.axis_topk) key_ids[side] = (own + side * m)[i * kWarpSize];
    }
  }

  // Writes the topk pairs of these codes in this order; num_threads do it together. row_scores:
  // [kMaxKeys, kPlanes], not folded. ids: [2, kMaxKeys].
  __device__ __forceinline__ void write(const uint16_t* codes, const float* row_scores,
                                        const int32_t* ids, int thread,
                                        int num_threads = kWarpSize) const {
    for (int k = thread; k < p_.topk; k += num_threads) write_pair(k, codes[k], row_scores, ids);
  }

  // Writes pair k of the topk.
  __device__ __forceinline__ void write_pair(int k, int code, const float* row_scores,
                                             const int32_t* ids) const {
    const int m = p_.axis_topk;
    const int R = p_.tucker_rank;
    const int C = p_.num_cores;
    const uint64_t first = uint64_t{token_head_} * static_cast<uint32_t>(p_.topk);
    int64_t* indices = p_.indices + first;
    int16_t* positions = p_.grid_positions + first;
    float* scores = static_cast<float*>(p_.scores) + first * static_cast<uint32_t>(C);
    const bool two_scores = C == 2 && reinterpret_cast<uintptr_t>(p_.scores) % 8 == 0;
    const int row = code_row(code), col = code_col(code);
    const auto row_id = static_cast<uint32_t>(ids[row]);
    const auto col_id = static_cast<uint32_t>(ids[kMaxKeys + col]);
    indices[k] =
        static_cast<int64_t>(uint64_t{row_id} * static_cast<uint32_t>(p_.num_keys) + col_id);
    positions[k] = static_cast<int16_t>(row * m + col);
    float left[kPlanes], right[kPlanes];
    load_floats<kPlanes>(row_scores + row * kPlanes, left);
    load_col(col, right);
    float* out = scores + k * C;
    if (additive()) {
      *out = left[0] + right[1];
      return;
    }
    float sums[kMaxNumCores];
#pragma unroll
    for (int c = 0; c < kMaxNumCores; ++c) {
      if (c >= C) break;
      float core[kPlanes][kPlanes];
      load_core(c, core);
      sums[c] = 0.0f;
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        float row_sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kPlanes; ++r) {
          if (r == 0 || r < R) row_sum = fmaf(left[r], core[r][s], row_sum);
        }
        if (s == 0 || s < R) sums[c] = fmaf(row_sum, right[s], sums[c]);
      }
      if (!two_scores) out[c] = sums[c];
    }
    if (two_scores) *reinterpret_cast<float2*>(out) = make_float2(sums[0], sums[1]);
  }

  float* rows;
  float* cols;

 private:
  static constexpr int kOwnElements = (kCoreElements + kWarpSize - 1) / kWarpSize;

  // Of the kept keys' scores, [2, R, m], those of key 32 i + lane from that plane on; zeros beyond
  // R.
  __device__ __forceinline__ void load_scores(int first_plane, int i, int lane,
                                              float (&scores)[kPlanes]) const {
    const uint32_t m = p_.axis_topk;
    const int R = p_.tucker_rank;
    const float* own = opaque(static_cast<const float*>(p_.axis_scores) +
                              uint64_t{token_head_} * (2 * R * m) + lane);
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      scores[s] = 0.0f;
      if ((s == 0 || s < R) && i * kWarpSize + lane < p_.axis_topk) {
        scores[s] = (own + (first_plane + s) * m)[i * kWarpSize];
      }
    }
  }

  // A pointer to global memory that the compiler adds offsets to, and not to what it was computed
  // from.
  template <typename T>
  __device__ __forceinline__ static const T* opaque(const T* pointer) {
    size_t address = __cvta_generic_to_global(pointer);
    asm("" : "+l"(address));
    return static_cast<const T*>(__cvta_global_to_generic(address));
  }

  __device__ __forceinline__ void load_core(int c, float (&core)[kPlanes][kPlanes]) const {
#pragma unroll
    for (int e = 0; e < kPlanes * kPlanes; e += kPacket) {
      float floats[kPacket];
      load_floats<kPacket>(core_ + c * kPlanes * kPlanes + e, floats);
#pragma unroll
      for (int i = 0; i < kPacket; ++i) core[(e + i) / kPlanes][(e + i) % kPlanes] = floats[i];
    }
  }

  const ProductKeyTopkParams& p_;
  float* core_;
  uint32_t token_head_;
  float own_core_[kOwnElements] = {};
  float filter_[kPlanes] = {};
};

// Keys that sort codes, of places first + kItems * lane on: the rank's distance to `lowest`, of
// which 32 bits hold enough here, with the place below, so that no two are equal. Pairs of equal
// rank are in the order of their codes already. No rank is NaN.
template <int kItems, int kPlaces, typename RankOf>
__device__ __forceinline__ void load_sort_keys(const uint16_t* codes, int first, int count,
                                               uint32_t lowest, int lane, RankOf rank_of,
                                               uint32_t (&keys)[kItems]) {
  first += lane * kItems;
  const auto found = *reinterpret_cast<const Packet<uint16_t, kItems>*>(codes + first);
  const int taken = count - first;
  const uint32_t base = kPlaces - 1 - first - lowest * kPlaces;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t rank = sortable_number(rank_of(i < taken ? found.elements[i] : 0));
    // Others lie below all keys: the last place, if it is taken, is an entry and not padding.
    keys[i] = i < taken ? rank * kPlaces + (base - i) : 0;
  }
}

// Sorts `count` codes in place, at most 32 * (kItems + kMore) of them, which the room of `codes` is
// at least. With kMore the first 32 * kItems of them alone are left.
template <int kItems, int kMore, typename RankOf>
__device__ __forceinline__ void sort_codes_in_registers(uint16_t* codes, int count, uint32_t lowest,
                                                        int lane, RankOf rank_of) {
  static_assert(kMore == 0 || 2 * kMore == kItems);
  constexpr int kPlaces = next_power_of_two(kWarpSize * (kItems + kMore));
  uint32_t keys[kItems];
  load_sort_keys<kItems, kPlaces>(codes, 0, count, lowest, lane, rank_of, keys);
  bitonic_sort_registers_descending(keys, lane);
  if constexpr (kMore != 0) {
    uint32_t more[kMore];
    load_sort_keys<kMore, kPlaces>(codes, kWarpSize * kItems, count, lowest, lane, rank_of, more);
    bitonic_sort_registers_descending(more, lane);
    merge_registers_descending(keys, more, lane);
  }
  Packet<uint16_t, kItems> sorted;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sorted.elements[i] = codes[~keys[i] & (kPlaces - 1)];
  __syncwarp();
  reinterpret_cast<Packet<uint16_t, kItems>*>(codes)[lane] = sorted;
}

inline constexpr int kMaxRegisterItems = 8;

// Sorts `count` codes in place by their ranks, all of which lie in lowest .. highest as sortable
// ranks; only the first topk need be there afterwards. `codes` has room for the next power of two
// and for 64; `candidates` for that many, too.
template <typename RankOf>
__device__ __forceinline__ void sort_codes(uint16_t* codes, int count, int topk, uint32_t lowest,
                                           uint32_t highest, uint64_t* candidates, int lane,
                                           RankOf rank_of) {
  // With lowest = 0 some are NaN.
  const uint32_t range = lowest == 0 ? 0xffffffffu : highest - lowest;
  __syncwarp();
  if (count <= 2 * kWarpSize && range < 1u << 26) {
    sort_codes_in_registers<2, 0>(codes, count, lowest, lane, rank_of);
  } else if (count <= 4 * kWarpSize && range < 1u << 25) {
    sort_codes_in_registers<4, 0>(codes, count, lowest, lane, rank_of);
  } else if (topk <= 4 * kWarpSize && count <= 6 * kWarpSize && range < 1u << 24) {
    sort_codes_in_registers<4, 2>(codes, count, lowest, lane, rank_of);
  } else if (count <= kMaxRegisterItems * kWarpSize && range < 1u << 24) {
    sort_codes_in_registers<kMaxRegisterItems, 0>(codes, count, lowest, lane, rank_of);
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
