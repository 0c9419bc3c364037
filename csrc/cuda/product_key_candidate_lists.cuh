// How a warp finds candidates (product_key_candidates.cuh) among the scores of 16 tokens and a tile
// of keys, which are in registers as matrix products leave them.
//
// A thread has two rows, tokens lane / 4 of the 16 and the one eight below, and of each eight
// columns, which are keys, two neighbours: the four lanes of a quad share their rows. A warpgroup's
// product (wgmma_k16) and a warp's (mma_m16n8k16) are alike in this.
#pragma once

#include "common.cuh"
#include "product_key_candidates.cuh"
#include "shared_memory.cuh"

namespace ultramem::cuda::candidate_lists {

inline constexpr int kRows = 2;
// Of a thread and rank, in a tile of so many keys; and of one of its rows.
__host__ __device__ constexpr int num_scores(int keys) { return keys / 2; }
__host__ __device__ constexpr int num_row_scores(int keys) { return num_scores(keys) / kRows; }

template <int kPlanes, int kKeys>
using Scores = float[kPlanes][num_scores(kKeys)];

// Candidates on their way from registers to memory: those of a row of a warp, with room for so
// many, up to a lane's.
inline constexpr int kMaxStaged = 31;
static_assert(kMaxStaged <= kWarpSize, "a lane takes one from there");
// Of one: scores, then its id.
__host__ __device__ constexpr int staged_id_offset(int planes) {
  return planes > 2 ? 4 * planes : 8;
}
__host__ __device__ constexpr int staged_bytes(int planes) { return staged_id_offset(planes) + 4; }
// Rows begin in different banks.
__host__ __device__ constexpr int staged_row_bytes(int planes, int staged) {
  return staged_bytes(planes) * (staged + 1);
}
inline constexpr int kWarpTokens = 16;

// What is known of a token where a list of it is made, in shared memory.
struct RowState {
  float bound;  // its share of the m best maxima, or more, are above
  // After a list was cut: keys from id after_tie on are out unless their rank is not below `later`.
  int32_t after_tie;
  float later;
};

// Score i of a row of a thread is this one of its scores, and of this column.
__device__ __forceinline__ constexpr int score_of(int row, int i) {
  return i / 2 * 4 + 2 * row + i % 2;
}
__device__ __forceinline__ int column_of(int i, int lane) {
  return i / 2 * 8 + lane % 4 * 2 + i % 2;
}

template <int kPlanes, int kKeys>
__device__ __forceinline__ float rank_of(const Scores<kPlanes, kKeys>& scores,
                                         const float (&filter)[kPlanes], int row, int i) {
  float of_key[kPlanes];
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) of_key[r] = scores[r][score_of(row, i)];
  return rank_value<kPlanes>(filter, of_key);
}

// The compiler would keep ranks, for which there are no registers, instead of working them out
// again.
template <int kPlanes>
__device__ __forceinline__ void forget_ranks(float (&filter)[kPlanes]) {
  asm volatile("" : "+f"(filter[0]));
}

// Scores and id of a key side by side in shared memory, where `stored` is not 0. Predicates, for a
// branch around sums of products makes the compiler wait for these one by one.
template <int kPlanes>
__device__ __forceinline__ void stage_key_if(uint32_t stored, uint32_t to,
                                             const float (&scores)[kPlanes], uint32_t id) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %0, 0;\n"
      "@p st.shared.f32 [%1], %2;\n"
      "@p st.shared.u32 [%1 + %4], %3;\n"
      "}\n" ::"r"(stored),
      "r"(to), "f"(scores[0]), "r"(id), "n"(staged_id_offset(kPlanes))
      : "memory");
#pragma unroll
  for (int r = 1; r < kPlanes; ++r) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %0, 0;\n"
        "@p st.shared.f32 [%1], %2;\n"
        "}\n" ::"r"(stored),
        "r"(to + 4 * r), "f"(scores[r])
        : "memory");
  }
}
__device__ __forceinline__ float minus_infinity() {
  return __uint_as_float(kInfinityBits | 0x80000000u);
}

// The maxima of a thread's columns, two to a word, rounded to bfloat16.
template <int kColumns>
using Maxima = __nv_bfloat162[kRows][num_row_scores(kColumns) / 2];

// Of the first kKeys columns. Unless kAll keys of the tile exist, none does from id num_keys on.
template <bool kAll, int kPlanes, int kKeys, int kColumns>
__device__ __forceinline__ void take_maxima(const Scores<kPlanes, kKeys>& scores,
                                            const float (&filter)[kPlanes],
                                            Maxima<kColumns>& maxima, int first_key, int num_keys,
                                            int lane) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < num_row_scores(kKeys); i += 2) {
      float ranks[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        ranks[j] = rank_of<kPlanes, kKeys>(scores, filter, row, i + j);
        if (!kAll && first_key + column_of(i + j, lane) >= num_keys) ranks[j] = minus_infinity();
      }
      // Of a NaN and a number, the number.
      maxima[row][i / 2] = __hmax2(maxima[row][i / 2], __floats2bfloat162_rn(ranks[0], ranks[1]));
    }
  }
}

// Makes columns the first whose turn is next, of a list with more of them than a tile has keys.
template <int kKeys, int kColumns>
__device__ __forceinline__ void next_columns(Maxima<kColumns>& maxima) {
  static_assert(2 * kKeys == kColumns, "");
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < num_row_scores(kKeys) / 2; ++i) {
      const __nv_bfloat162 first = maxima[row][i];
      maxima[row][i] = maxima[row][i + num_row_scores(kKeys) / 2];
      maxima[row][i + num_row_scores(kKeys) / 2] = first;
    }
  }
}

// How many of the maxima that a quad holds of a row are above a number; it is in both halves.
template <int kWords>
__device__ __forceinline__ uint32_t count_above(const __nv_bfloat162 (&maxima)[kWords],
                                                __nv_bfloat162 number) {
  __nv_bfloat162 counts[4];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const __nv_bfloat162 above = __hgt2(maxima[i], number);
    counts[i % 4] = i < 4 ? above : __hadd2(counts[i % 4], above);
  }
  const __nv_bfloat162 sums = __hadd2(__hadd2(counts[0], counts[1]), __hadd2(counts[2], counts[3]));
  return quad_sum(static_cast<uint32_t>(__low2float(sums) + __high2float(sums)));
}

// Of both rows: a number that at least `least` of the maxima that a quad holds are above, and not
// many more if one is soon found; minus infinity if none is. The ranks that were rounded to these
// maxima are above it as well: rounding keeps order, and the number is one of bfloat16. With it the
// logarithm of how many are above, or of how many there are if none was found.
template <int kColumns>
__device__ __forceinline__ void find_bounds(const Maxima<kColumns>& maxima, uint32_t least,
                                            float (&bounds)[kRows], float (&log_above)[kRows]) {
  // Three or four for normal maxima, more where some lie far from the others. Each counts for two
  // numbers: a step takes longer to wait for than to count.
  constexpr int kMaxSteps = 8;
  // Of normal maxima, where between extremes an eighth to a half of them are above.
  constexpr float kFirstShare = 0.65f;
  constexpr float kFirstSpread = 0.12f, kSpread = 0.1f, kLeastShare = 0.14f;
  const float log_wanted = log2_fast(static_cast<float>(least) * 1.06f);
  // Between these the counts pass `least`; with logarithms of counts.
  float low[kRows], high[kRows], log_low[kRows], log_high[kRows], share[kRows];
  uint32_t found[kRows];  // above the lower one
  bool searching[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    bounds[row] = minus_infinity();
    __nv_bfloat162 lowest = maxima[row][0], highest = lowest;
#pragma unroll
    for (int i = 1; i < num_row_scores(kColumns) / 2; ++i) {
      lowest = __hmin2(lowest, maxima[row][i]);
      highest = __hmax2(highest, maxima[row][i]);
    }
    low[row] = fminf(__low2float(lowest), __high2float(lowest));
    high[row] = fmaxf(__low2float(highest), __high2float(highest));
#pragma unroll
    for (int delta = 1; delta < 4; delta *= 2) {
      low[row] = fminf(low[row], __shfl_xor_sync(kFullMask, low[row], delta));
      high[row] = fmaxf(high[row], __shfl_xor_sync(kFullMask, high[row], delta));
    }
    log_low[row] = log2_fast(kColumns);
    log_high[row] = -1.0f;
    share[row] = kFirstShare;
    found[row] = kColumns;
    searching[row] = true;
  }
#pragma unroll 1
  for (int step = 0; step < kMaxSteps; ++step) {
    // A little more than wanted will do, and in the end some more.
    const uint32_t most = least + (step < 2 ? least >> 5 : least >> 2);
    const float spread = step == 0 ? kFirstSpread : kSpread;
    bool any = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float range = high[row] - low[row], from = low[row];
      bool moved = false;
#pragma unroll
      for (int sign = -1; sign <= 1; sign += 2) {
        const float guess = fmaf(range, fmaf(static_cast<float>(sign), spread, share[row]), from);
        const __nv_bfloat162 both = __floats2bfloat162_rn(guess, guess);
        const float value = __low2float(both);
        const uint32_t above = count_above(maxima[row], both);
        const bool inside = searching[row] && value > low[row] && value < high[row];
        const bool enough = above >= least;
        const float log_count = log2_fast(fmaxf(static_cast<float>(above), 0.5f));
        if (inside && enough) {
          bounds[row] = low[row] = value;
          log_low[row] = log_count;
          found[row] = above;
        }
        if (inside && !enough) {
          high[row] = value;
          log_high[row] = log_count;
        }
        moved |= inside;
      }
      searching[row] &= moved && found[row] > most;
      share[row] = (log_low[row] - log_wanted) * reciprocal_fast(log_low[row] - log_high[row]);
      share[row] = fminf(fmaxf(share[row], kLeastShare), 1 - kLeastShare);
      any |= searching[row];
    }
    if (!__any_sync(kFullMask, any)) break;
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) log_above[row] = log_low[row];
}
template <int kColumns>
__device__ __forceinline__ void find_bounds(const Maxima<kColumns>& maxima, uint32_t least,
                                            float (&bounds)[kRows]) {
  float log_above[kRows];
  find_bounds<kColumns>(maxima, least, bounds, log_above);
}

// Of bits of a thread's scores of its rows: how many the lanes of the quad before this one have,
// and all of it, in halves of a word for either row.
struct QuadCounts {
  uint32_t before, all;

  __device__ __forceinline__ QuadCounts(uint32_t first_row, uint32_t second_row, int lane) {
    const uint32_t own = __popc(first_row) | __popc(second_row) << 16;
    const uint32_t others[3] = {__shfl_xor_sync(kFullMask, own, 1),
                                __shfl_xor_sync(kFullMask, own, 2),
                                __shfl_xor_sync(kFullMask, own, 3)};
    before = (lane % 2 != 0 ? others[0] : 0) + (lane % 4 >= 2 ? others[1] + others[2] : 0);
    all = own + others[0] + others[1] + others[2];
  }
};

// A warp's lists of 16 tokens: of each, the one of that number.
template <int kPlanes, int kKeys, int kLists>
class Lists {
 public:
  // `states` are of the tokens.
  __device__ Lists(const ProductKeyTopkParams& p, const Candidates<kLists>& candidates,
                   RowState* states, uint32_t staged, int room, int number, int first_chunk_token,
                   float (&filter)[kPlanes], int lane)
      : p_(p),
        candidates_(candidates),
        states_(states),
        staged_(staged),
        room_(room),
        filter_(filter),
        number_(number),
        lane_(lane),
        first_row_(
            static_cast<int>(candidates.row(static_cast<int>(blockIdx.y), first_chunk_token))) {}

  // Adds a tile's keys, of those that exist, whose rank is not below `least`, which may rise. A
  // row's bits of what exists are as many as its scores.
  __device__ __forceinline__ void add(const Scores<kPlanes, kKeys>& scores, int first_key,
                                      const uint32_t (&exist)[kRows], float (&least)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const RowState& state = states_[lane_ / 4 + 8 * row];
      if (first_key >= state.after_tie) least[row] = fmaxf(least[row], state.later);
    }
    uint32_t passes[kRows] = {exist[0], exist[1]};
    pass(scores, least, passes);
    while (true) {
      QuadCounts counts(passes[0], passes[1], lane_);
      if (__any_sync(kFullMask, (counts.all & 0xffffu) > room(0) || counts.all >> 16 > room(1))) {
        flush();
        const bool full[kRows] = {passes[0] != 0 && count(0) == capacity(),
                                  passes[1] != 0 && count(1) == capacity()};
        if (__any_sync(kFullMask, full[0] || full[1])) {
          cut_lists(full, least);
          pass(scores, least, passes);
          counts = QuadCounts(passes[0], passes[1], lane_);
        }
      }
      stage(scores, first_key, counts, passes);
      if (!__any_sync(kFullMask, (passes[0] | passes[1]) != 0)) break;
    }
  }

  // After the last tile.
  __device__ __forceinline__ void finish() {
    flush();
    write_counts();
  }

 private:
  __device__ __forceinline__ void write_counts() const {
    if (lane_ % 4 == 0) {
      int32_t* counts = candidates_.counts + int64_t{kLists} * (first_row_ + lane_ / 4) + number_;
      counts[0] = counts_of_rows_ & 0xffffu;
      counts[8 * kLists] = counts_of_rows_ >> 16;
    }
  }

  // Clears the bits of keys whose rank is below `least`.
  __device__ __forceinline__ void pass(const Scores<kPlanes, kKeys>& scores,
                                       const float (&least)[kRows],
                                       uint32_t (&passes)[kRows]) const {
    forget_ranks(filter_);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      // The sign of what a rank is above the bound; NaN, which has none, is not below.
      uint32_t below = 0;
#pragma unroll
      for (int i = num_row_scores(kKeys) - 1; i >= 0; --i) {
        const float distance = rank_of<kPlanes, kKeys>(scores, filter_, row, i) - least[row];
        below = __funnelshift_l(__float_as_uint(distance), below, 1);
      }
      passes[row] &= ~below;
    }
  }

  __device__ __forceinline__ uint32_t count(int row) const {
    return counts_of_rows_ >> 16 * row & 0xffffu;
  }
  // From the arguments whenever they are needed: registers are short.
  __device__ __forceinline__ uint32_t axis_topk() const { return p_.axis_topk; }
  __device__ __forceinline__ uint32_t capacity() const { return candidates_.capacity_of(number_); }
  // How many more keys of a row can be staged.
  __device__ __forceinline__ uint32_t room(int row) const {
    return min(room_, capacity() - count(row)) - (staged_counts_ >> 16 * row & 0xffffu);
  }
  // Where the list of a token of the warp begins, in candidates.
  __device__ __forceinline__ uint32_t list(uint32_t warp_token) const {
    return (first_row_ + warp_token) * candidates_.capacity() + candidates_.before(number_);
  }

  // Stages as many as there is room for of a tile's keys that `passes` has bits for, and clears
  // those.
  __device__ __forceinline__ void stage(const Scores<kPlanes, kKeys>& scores, int first_key,
                                        const QuadCounts& counts, uint32_t (&passes)[kRows]) {
    const uint32_t before = counts.before, all = counts.all;
    uint32_t taken[kRows] = {passes[0], passes[1]};
    const uint32_t first = staged_counts_ + before;
    const uint32_t rooms[kRows] = {room(0), room(1)};
    if (__any_sync(kFullMask, (all & 0xffffu) > rooms[0] || all >> 16 > rooms[1])) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int own_room =
            static_cast<int>(rooms[row]) - static_cast<int>(before >> 16 * row & 0xffffu);
        for (int over = __popc(taken[row]) - max(own_room, 0); over > 0; --over) {
          taken[row] &= ~(0x80000000u >> __clz(taken[row]));
        }
      }
    }
    staged_counts_ += min(all & 0xffffu, rooms[0]) | min(all >> 16, rooms[1]) << 16;
    passes[0] &= ~taken[0];
    passes[1] &= ~taken[1];

    // A store to memory for every score, where a lane or two have something to store, would take
    // longer than all else.
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      constexpr int kBatch = 4;
      // Or all ids would be kept from one row to the next.
      const uint32_t first_id = __shfl_sync(kFullMask, first_key + lane_ % 4 * 2, lane_);
      uint32_t place = staged_ + (lane_ / 4 + 8 * row) * staged_row_bytes(kPlanes, room_) +
                       (first >> 16 * row & 0xffffu) * staged_bytes(kPlanes);
#pragma unroll
      for (int score = 0; score < num_row_scores(kKeys); score += kBatch) {
        // Where each goes is worked out before any is stored: a store that has not read its address
        // yet would hold up what changes it.
        uint32_t places[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          places[i] = place;
          if ((taken[row] >> (score + i) & 1) != 0) place += staged_bytes(kPlanes);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          float of_key[kPlanes];
#pragma unroll
          for (int r = 0; r < kPlanes; ++r) of_key[r] = scores[r][score_of(row, score + i)];
          stage_key_if<kPlanes>(taken[row] & 1u << (score + i), places[i], of_key,
                                first_id + (score + i) / 2 * 8 + i % 2);
        }
      }
    }
  }

  // What is staged goes to the lists.
  __device__ __forceinline__ void flush() {
    uint32_t to[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) to[row] = list(lane_ / 4 + 8 * row) + count(row);
    __syncwarp();
#pragma unroll 4
    for (int token = 0; token < kWarpTokens; ++token) {
      const int row = token / 8;
      const uint32_t num_staged =
          __shfl_sync(kFullMask, staged_counts_, token % 8 * 4) >> 16 * row & 0xffffu;
      const uint32_t first = __shfl_sync(kFullMask, row == 0 ? to[0] : to[1], token % 8 * 4);
      if (lane_ >= num_staged) continue;
      const uint32_t from =
          staged_ + token * staged_row_bytes(kPlanes, room_) + lane_ * staged_bytes(kPlanes);
      float of_key[kPlanes];
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) of_key[r] = __uint_as_float(load_shared_u32(from + 4 * r));
      store_candidate(candidates_, int64_t{first + lane_}, of_key,
                      load_shared_u32(from + staged_id_offset(kPlanes)));
    }
    __syncwarp();
    counts_of_rows_ += staged_counts_;
    staged_counts_ = 0;
  }

  // Cuts the lists of rows where a lane of the quad says so, which are full, down to their best m.
  __device__ __forceinline__ void cut_lists(const bool (&full)[kRows], float (&least)[kRows]) {
    uint32_t quads = (full[0] ? 1u : 0u) | (full[1] ? 2u : 0u);
    quads |= __shfl_xor_sync(kFullMask, quads, 1);
    quads |= __shfl_xor_sync(kFullMask, quads, 2);
    __syncwarp();  // what other lanes have written
#pragma unroll 1
    for (int token = 0; token < kWarpTokens; ++token) {
      const int row = token / 8;
      if ((__shfl_sync(kFullMask, quads, token % 8 * 4) >> row & 1) == 0) continue;
      const IdCut cut = cut_list(p_, candidates_, int64_t{list(token)},
                                 static_cast<int>(capacity()), filter_, lane_);
      if (lane_ / 4 != token % 8) continue;
      const float rank = least_rank(cut.rank);
      if (row == 0) {
        least[0] = fmaxf(least[0], rank);
        counts_of_rows_ = (counts_of_rows_ & 0xffff0000u) | axis_topk();
      } else {
        least[1] = fmaxf(least[1], rank);
        counts_of_rows_ = (counts_of_rows_ & 0xffffu) | axis_topk() << 16;
      }
      if (lane_ % 4 == 0) {
        // Of equal rank, keys of higher ids than those that were kept have lost.
        states_[token].after_tie = static_cast<int32_t>(cut.last_tie) + 1;
        states_[token].later = cut.rank == 0 ? rank : least_rank(cut.rank + 1);
      }
    }
    __syncwarp();
  }

  const ProductKeyTopkParams& p_;
  const Candidates<kLists>& candidates_;
  RowState* states_;
  uint32_t staged_;  // shared address
  uint32_t room_;    // there, for a row
  float (&filter_)[kPlanes];
  int number_, lane_;
  int first_row_;
  // Of both rows, in halves of a word: what is in the lists, and what is staged.
  uint32_t counts_of_rows_ = 0, staged_counts_ = 0;
};

}  // namespace ultramem::cuda::candidate_lists
