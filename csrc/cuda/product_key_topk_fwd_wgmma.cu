// Product-key retrieval, forward, axis stage on the tensor cores of sm_90.
//
// A block takes 64 or 128 tokens of one head and side. One thread streams tiles of queries and keys
// through shared memory (TMA), one or two warpgroups multiply them into R score planes in
// registers, 64 tokens each. The planes never leave the registers as a whole: a score whose rank
// beats its token's threshold is written, with its key id and its R scores, to the token's
// candidates in shared memory; when those are full, the threshold rises to the m-th best so far (or
// a little below) and what lies under it is dropped.
//
// The four lanes that hold a token's scores ("a quad") keep its candidates, eight tokens of a warp
// side by side. Keys come in ascending order, so a later score that only equals the threshold has
// lost the tie already.
#include <algorithm>
#include <cmath>

#include "block_topk.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_topk_fwd.h"
#include "sm90a.h"
#include "threshold_search.cuh"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kDepth = 64;        // elements of Kd in a stage: one 128-byte row
constexpr int kGroupTokens = 64;  // of a warpgroup
constexpr int kRowBytes = 2 * kDepth;
constexpr int kQuad = 4;
[[maybe_unused]] constexpr int kWarpTokens = 16;
constexpr int kMaskWords = kTensorCore90MaxKeys / 32;
// Tokens of a warpgroup may keep up to this many keys where two warpgroups share the memory.
constexpr int kMaxSharedTopk = 40;

// kPlanes: score planes in registers, at least R. Slots are chosen so that the same slot of eight
// rows lies in different banks.
template <int kPlanes, int kGroups>
struct Traits {
  static_assert(kPlanes == 1 || kPlanes == 2 || kPlanes == 4, "");
  static constexpr int kKeys = kPlanes <= 2 ? 128 : 64;  // of a tile
  static constexpr int kTokens = kGroupTokens * kGroups;
  static constexpr int kStages = 3;
  static constexpr int kSlots = kGroups == 2 ? 84 : kPlanes <= 2 ? 236 : 148;
  static constexpr int kSlotsPerLane = kSlots / kQuad;
  // Of a tile, between which candidates may be pruned.
  static constexpr int kPartKeys = 16;
  static constexpr int kParts = kKeys / kPartKeys;
  static constexpr int kFullSlots =
      kSlots - kPartKeys;  // with more there may be no room for a part
  // Rows that are pruned together: as many as registers allow hide each other's latency.
  static constexpr int kPruneSets = kSlotsPerLane <= 24 ? 2 : 1;
  // The last warpgroup only copies, one thread of it: registers are given to warpgroups.
  static constexpr int kThreads = 128 * (kGroups + 1);

  static constexpr int kQueryBytes = kTokens * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = kQueryBytes + kKeyBytes;
  // Offsets into shared memory; stages first, because swizzled tiles are aligned to 1024 bytes.
  static constexpr int kPlanesOffset = kStages * kStageBytes;
  static constexpr int kIdsOffset = kPlanesOffset + kTokens * kSlots * kPlanes * 4;
  static constexpr int kMasksOffset = kIdsOffset + kTokens * kSlots * 2;
  // A warp's scratch: a bit for every key and how many bits lie before each word, or a list of
  // slots for each of the rows that are pruned together.
  static constexpr int kMaskBytes = kMaskWords * 4 + kMaskWords * 2;
  static constexpr int kSlotListBytes = (kSlots / 2 + 3) / 4 * 4;
  static_assert(8 * kPruneSets * kSlotListBytes <= kMaskBytes && kSlots <= 256, "");
  static constexpr int kBarriersOffset = kMasksOffset + 4 * kGroups * kMaskBytes;
  static constexpr int kSharedBytes = kBarriersOffset + 2 * kStages * 8;
  static constexpr int kAlignment = 1024;
  static_assert(kSharedBytes + kAlignment <= 232448, "more than a block of sm_90 has");
};

__device__ __forceinline__ uint32_t quad_sum(uint32_t x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}
__device__ __forceinline__ uint32_t quad_min(uint32_t x) {
  x = min(x, __shfl_xor_sync(kFullMask, x, 1));
  return min(x, __shfl_xor_sync(kFullMask, x, 2));
}
__device__ __forceinline__ uint32_t quad_max(uint32_t x) {
  x = max(x, __shfl_xor_sync(kFullMask, x, 1));
  return max(x, __shfl_xor_sync(kFullMask, x, 2));
}
// Of floats, without NaN as long as one is a number.
__device__ __forceinline__ float quad_min(float x) {
  x = fminf(x, __shfl_xor_sync(kFullMask, x, 1));
  return fminf(x, __shfl_xor_sync(kFullMask, x, 2));
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
}

// The rank of a key, sum_r filter_r S_r, by the same instructions wherever it is computed.
template <int kPlanes>
__device__ __forceinline__ float rank_value(const float (&filter)[kPlanes],
                                            const float (&scores)[kPlanes]) {
  float sum = __fmul_rn(filter[0], scores[0]);
#pragma unroll
  for (int r = 1; r < kPlanes; ++r) sum = __fmaf_rn(filter[r], scores[r], sum);
  return sum;
}

// Where one row (token) stands; the same in the four lanes of its quad.
struct RowState {
  float threshold;  // keys that compare less or equal are out; NaN, which nothing does: none yet
  int count;        // of its candidates
};

// The candidates of one row, in shared memory, in any order. Slot s is looked after by lane s % 4.
template <typename T, int kPlanes>
class Candidates {
 public:
  static constexpr int kSlotBytes = 4 * kPlanes;

  __device__ Candidates(uint32_t shared, int row)
      : planes_(shared + T::kPlanesOffset + row * T::kSlots * kSlotBytes),
        ids_(shared + T::kIdsOffset + row * T::kSlots * 2) {}

  __device__ __forceinline__ void load(int slot, float (&scores)[kPlanes]) const {
    const uint32_t from = planes_ + slot * kSlotBytes;
    if constexpr (kPlanes == 1) {
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scores[0]) : "r"(from) : "memory");
    } else if constexpr (kPlanes == 2) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(scores[0]), "=f"(scores[1])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(scores[0]), "=f"(scores[1]), "=f"(scores[2]), "=f"(scores[3])
                   : "r"(from)
                   : "memory");
    }
  }

  __device__ __forceinline__ uint32_t load_id(int slot) const {
    uint16_t id;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(id) : "r"(ids_ + slot * 2) : "memory");
    return id;
  }

  // Of the row kRowsBelow further down.
  template <int kRowsBelow = 0>
  __device__ __forceinline__ void store(int slot, const float (&scores)[kPlanes],
                                        uint32_t id) const {
    constexpr int kPlanesBelow = kRowsBelow * T::kSlots * kSlotBytes;
    constexpr int kIdsBelow = kRowsBelow * T::kSlots * 2;
    const uint32_t to = planes_ + slot * kSlotBytes;
    if constexpr (kPlanes == 1) {
      asm volatile("st.shared.f32 [%0+%2], %1;" ::"r"(to), "f"(scores[0]), "n"(kPlanesBelow)
                   : "memory");
    } else if constexpr (kPlanes == 2) {
      asm volatile("st.shared.v2.f32 [%0+%3], {%1, %2};" ::"r"(to), "f"(scores[0]), "f"(scores[1]),
                   "n"(kPlanesBelow)
                   : "memory");
    } else {
      asm volatile("st.shared.v4.f32 [%0+%5], {%1, %2, %3, %4};" ::"r"(to), "f"(scores[0]),
                   "f"(scores[1]), "f"(scores[2]), "f"(scores[3]), "n"(kPlanesBelow)
                   : "memory");
    }
    asm volatile("st.shared.u16 [%0+%2], %1;" ::"r"(ids_ + slot * 2),
                 "h"(static_cast<uint16_t>(id)), "n"(kIdsBelow)
                 : "memory");
  }

  __device__ __forceinline__ void move(int from, int to) const {
    float scores[kPlanes];
    load(from, scores);
    store(to, scores, load_id(from));
  }

 private:
  uint32_t planes_;  // shared addresses
  uint32_t ids_;
};

// Prunes eight rows where prune() can not: many equal scores, or NaN. Every lane calls it with the
// row of its quad.
template <typename T, int kPlanes>
__device__ __forceinline__ void prune_exactly(const Candidates<T, kPlanes>& candidates,
                                              const float (&filter)[kPlanes], int lane,
                                              uint32_t min_count, uint32_t max_count,
                                              RowState& row) {
  constexpr int kEntries = T::kSlotsPerLane;
  const int quad_lane = lane % kQuad;

  uint32_t ranks[kEntries];  // 0 where there is none, like a NaN
  uint32_t lowest = 0xffffffffu, highest = 0, own_count = 0;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int slot = e * kQuad + quad_lane;
    ranks[e] = 0;
    if (slot < row.count) {
      float scores[kPlanes];
      candidates.load(slot, scores);
      ranks[e] = sortable(rank_value<kPlanes>(filter, scores));
      lowest = min(lowest, ranks[e]);
      highest = max(highest, ranks[e]);
      ++own_count;
    }
  }
  // At least min_count ranks are >= low, fewer are >= high. No rank is 2^32 - 1.
  const uint32_t total = quad_sum(own_count);
  uint32_t low = quad_min(lowest);
  uint32_t high = quad_max(highest) + 1;
  uint32_t count_low = total, count_high = 0;
  while (true) {
    const bool searching = count_low > max_count && high - low > 1;
    if (!__any_sync(kFullMask, searching)) break;
    const uint32_t middle = low + (high - low) / 2;
    uint32_t count = 0;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) count += ranks[e] >= middle;
    count = quad_sum(count);
    if (searching && count >= min_count) {
      low = middle;
      count_low = count;
    } else if (searching) {
      high = middle;
      count_high = count;
    }
  }
  const bool all_kept = total <= max_count;
  if (all_kept) low = 0;
  // Where too many are equal to `low`, those with the lowest ids are kept.
  uint32_t last_tie = 0xffffu;
  const bool split_ties = count_low > max_count;
  if (__any_sync(kFullMask, split_ties)) {
    uint32_t below = 0;
    while (true) {
      const bool searching = split_ties && below < last_tie;
      if (!__any_sync(kFullMask, searching)) break;
      const uint32_t middle = (below + last_tie) / 2;
      uint32_t count = 0;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int slot = e * kQuad + quad_lane;
        count += slot < row.count && ranks[e] == low && candidates.load_id(slot) <= middle;
      }
      count = quad_sum(count) + count_high;
      if (searching && count >= min_count) {
        last_tie = middle;
      } else if (searching) {
        below = middle + 1;
      }
    }
  }

  // Ranks are computed again: holding them until here as well would cost too many registers.
  uint32_t num_kept = 0;
#pragma unroll 4
  for (int e = 0; e < kEntries; ++e) {
    const int slot = e * kQuad + quad_lane;
    float scores[kPlanes] = {};
    uint32_t id = 0;
    bool keep = slot < row.count;
    if (keep) {
      candidates.load(slot, scores);
      id = candidates.load_id(slot);
      const uint32_t rank = sortable(rank_value<kPlanes>(filter, scores));
      keep = rank > low || (rank == low && id <= last_tie);
    }
    const uint32_t kept_quads = __ballot_sync(kFullMask, keep);
    const uint32_t kept_lanes = kept_quads >> (lane - quad_lane) & 0xfu;
    const int to = num_kept + __popc(kept_lanes & ((1u << quad_lane) - 1));
    num_kept += __popc(kept_lanes);
    // A candidate moves down: to a slot that has been read in this or an earlier round.
    __syncwarp();
    if (keep && to != slot) candidates.store(to, scores, id);
  }
  __syncwarp();
  row.count = static_cast<int>(num_kept);
  if (!all_kept) row.threshold = threshold_at(low);
}

__device__ __forceinline__ int count_bits(uint32_t x) { return __popc(x); }
__device__ __forceinline__ int count_bits(uint64_t x) { return __popcll(x); }
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
__device__ __forceinline__ int lowest_bit(uint64_t x) {
  return __ffsll(static_cast<long long>(x)) - 1;
}

// Fills the gaps below the first `count` slots of a row with what is kept beyond them. `keep` has a
// bit for each of this lane's slots; `list` is the row's, in shared memory. The warp must be
// synchronised afterwards.
template <typename Mask, typename T, int kPlanes>
__device__ __forceinline__ void close_gaps(const Candidates<T, kPlanes>& candidates, Mask keep,
                                           int count, uint32_t list, int quad_lane) {
  const int own_below = (count + kQuad - 1 - quad_lane) / kQuad;
  const Mask below = (Mask{1} << own_below) - 1;
  Mask gaps = ~keep & below, movers = keep & ~below;
  // Each lane's place among the quad's gaps and movers, which are equally many.
  const uint32_t own = static_cast<uint32_t>(count_bits(movers)) << 16 | count_bits(gaps);
  uint32_t place = own;
#pragma unroll
  for (int delta = 1; delta < kQuad; delta *= 2) {
    const uint32_t other = __shfl_up_sync(kFullMask, place, delta);
    if (quad_lane >= delta) place += other;
  }
  place -= own;
  for (uint32_t to = list + (place >> 16); movers != 0; movers &= movers - 1, ++to) {
    const int slot = lowest_bit(movers) * kQuad + quad_lane;
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(slot) : "memory");
  }
  __syncwarp();
  for (uint32_t from = list + (place & 0xffffu); gaps != 0; gaps &= gaps - 1, ++from) {
    uint32_t slot;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(slot) : "r"(from) : "memory");
    candidates.move(static_cast<int>(slot), lowest_bit(gaps) * kQuad + quad_lane);
  }
}

// Drops the worst candidates of the rows, so that each keeps at least min_count and about max_count
// at most (all, where it has no more than that), and raises the thresholds to match. `slack` is by
// how many more are accepted for each step that the search has taken: sixteen rows search together,
// and the slowest decides. kSets rows a lane, eight below one another; `scratch` is the warp's.
template <int kSets, typename T, int kPlanes>
__device__ __forceinline__ void prune(uint32_t shared, uint32_t scratch, int first_row,
                                      const float (&filter)[kPlanes], int lane, uint32_t min_count,
                                      uint32_t max_count, uint32_t slack, RowState (&rows)[kSets]) {
  constexpr int kEntries = T::kSlotsPerLane;
  using Mask = typename std::conditional<(kEntries > 31), uint64_t, uint32_t>::type;
  const int quad_lane = lane % kQuad;
  const float nan = __uint_as_float(kNanBits);
  const float wanted = 0.5f * (min_count + max_count);
  constexpr auto most = static_cast<uint32_t>(T::kFullSlots);
  __syncwarp();  // the other lanes' candidates have been written

  float values[kSets][kEntries];  // NaN where there is none
  ThresholdSearch search[kSets];
  uint32_t searching = 0, exactly = 0;  // bits of the sets
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const Candidates<T, kPlanes> candidates(shared, first_row + 8 * set);
    uint32_t numbers = 0;
    float lowest = nan, highest = nan;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      values[set][e] = nan;
      if (e * kQuad + quad_lane < rows[set].count) {
        float scores[kPlanes];
        candidates.load(e * kQuad + quad_lane, scores);
        values[set][e] = rank_value<kPlanes>(filter, scores);
      }
      lowest = fminf(lowest, values[set][e]);
      highest = fmaxf(highest, values[set][e]);
      numbers += values[set][e] == values[set][e];
    }
    numbers = quad_sum(numbers);
    const bool too_many = rows[set].count > static_cast<int>(max_count);
    search[set].low = quad_min(lowest);
    search[set].high = quad_max(highest);
    search[set].count_low = numbers;
    search[set].count_high = 0.0f;
    if (too_many && numbers > max_count) searching |= 1u << set;
    if (too_many && numbers <= max_count) exactly |= 1u << set;  // some are NaN
  }
  for (int step = 0;; ++step) {
    if (!__any_sync(kFullMask, searching != 0)) break;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const float value = search[set].guess(wanted, step);
      uint32_t counts[2] = {0, 0};
#pragma unroll
      for (int e = 0; e < kEntries; ++e) counts[e % 2] += values[set][e] > value;
      const uint32_t count = quad_sum(counts[0] + counts[1]);
      if ((searching >> set & 1) == 0) continue;
      bool go_on = false;
      if (!(value == value)) {
        exactly |= 1u << set;  // the rest is ties
      } else {
        const uint32_t acceptable = min(max_count + slack * (step + 1), most);
        go_on = search[set].found(value, count, min_count, acceptable);
      }
      if (!go_on) searching &= ~(1u << set);
    }
  }

  uint32_t unsettled = 0;  // bits of the sets that need more
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const bool settled = rows[set].count > static_cast<int>(max_count) && (exactly >> set & 1) == 0;
    Mask keep = ~Mask{0};
    if (settled) {
      keep = 0;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        if (values[set][e] > search[set].low) keep |= Mask{1} << e;
      }
      rows[set].threshold = search[set].low;
      rows[set].count = static_cast<int>(search[set].count_low);
    } else {
      // Nothing is beyond all of the lane's slots.
      keep = (Mask{1} << kEntries) - 1;
    }
    const int count = settled ? rows[set].count : T::kSlots;
    const uint32_t list = scratch + (set * 8 + lane / kQuad) * T::kSlotListBytes;
    close_gaps(Candidates<T, kPlanes>(shared, first_row + 8 * set), keep, count, list, quad_lane);
    if (__any_sync(kFullMask, (exactly >> set & 1) != 0)) unsettled |= 1u << set;
  }
  __syncwarp();
#pragma unroll 1
  for (int set = 0; unsettled != 0; ++set, unsettled >>= 1) {
    if ((unsettled & 1) == 0) continue;
    RowState row = rows[0];
    if (set != 0) row = rows[kSets - 1];
    prune_exactly<T, kPlanes>(Candidates<T, kPlanes>(shared, first_row + 8 * set), filter, lane,
                              min_count, max_count, row);
    if (set == 0) {
      rows[0] = row;
    } else {
      rows[kSets - 1] = row;
    }
  }
}

// What a thread holds of the products of its warpgroup's tile: see wgmma_k16.
template <typename T, int kPlanes>
using Accumulators = float[kPlanes][T::kKeys / 2];

template <int kPlanes, int kCount>
__device__ __forceinline__ float value_at(const float (&acc)[kPlanes][kCount],
                                          const float (&filter)[kPlanes], int i) {
  float scores[kPlanes];
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) scores[r] = acc[r][i];
  return rank_value<kPlanes>(filter, scores);
}

// Thresholds from a whole tile of keys, before any is a candidate: at least min_count of its keys
// are above, and not many more. `deviations` is where that share of a normal distribution lies.
template <typename T, int kPlanes>
__device__ __forceinline__ void first_thresholds(const Accumulators<T, kPlanes>& acc,
                                                 const float (&filter)[kPlanes], uint32_t min_count,
                                                 uint32_t max_count, float deviations,
                                                 RowState (&rows)[2]) {
  const float wanted = 0.5f * (min_count + max_count);
  ThresholdSearch search[2];
  float guess[2];
  bool searching[2];
#pragma unroll
  for (int set = 0; set < 2; ++set) {
    float lowest = __uint_as_float(kNanBits), highest = lowest;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 2 * set; i < T::kKeys / 2; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = value_at(acc, filter, i + j);
        lowest = fminf(lowest, value);
        highest = fmaxf(highest, value);
        sum += value;
        squares = fmaf(value, value, squares);
      }
    }
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    squares += __shfl_xor_sync(kFullMask, squares, 1);
    squares += __shfl_xor_sync(kFullMask, squares, 2);
    constexpr float kShare = 1.0f / T::kKeys;
    const float mean = sum * kShare;
    search[set].low = quad_min(lowest);
    search[set].high = quad_max(highest);
    search[set].count_low = T::kKeys;
    search[set].count_high = 0.0f;
    guess[set] = mean + deviations * sqrtf(fmaxf(squares * kShare - mean * mean, 0.0f));
    // Where one score is not a number everything may pass: candidates are pruned later.
    searching[set] = sum == sum;
  }
  for (int step = 0; __any_sync(kFullMask, searching[0] || searching[1]); ++step) {
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      const bool inside = guess[set] > search[set].low && guess[set] < search[set].high;
      if (!inside) guess[set] = search[set].guess(wanted, step);
    }
    uint32_t counts = 0;  // of both rows, in halves
#pragma unroll
    for (int i = 0; i < T::kKeys / 2; i += 4) {
      counts += value_at(acc, filter, i) > guess[0];
      counts += value_at(acc, filter, i + 1) > guess[0];
      counts += value_at(acc, filter, i + 2) > guess[1] ? 0x10000u : 0u;
      counts += value_at(acc, filter, i + 3) > guess[1] ? 0x10000u : 0u;
    }
    counts = quad_sum(counts);
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      const uint32_t count = counts >> 16 * set & 0xffffu;
      if (!searching[set]) continue;
      if (!(guess[set] == guess[set])) {
        searching[set] = false;  // ties: what was found so far must do
      } else {
        searching[set] = search[set].found(guess[set], count, min_count, max_count);
        if (count >= min_count) rows[set].threshold = guess[set];
      }
      guess[set] = search[set].guess(wanted, step + 1);
    }
  }
}

// Adds the keys of 16 columns of a tile that beat their row's threshold to its candidates: those of
// the two rows that `candidates` and eight rows below stand for.
template <int kPart, typename T, int kPlanes>
__device__ __forceinline__ void push_part(const Accumulators<T, kPlanes>& acc,
                                          const float (&filter)[kPlanes],
                                          const Candidates<T, kPlanes>& candidates, int first_key,
                                          int num_keys, int lane, RowState (&rows)[2]) {
  const int quad_lane = lane % kQuad;
  const int quad_shift = lane - quad_lane;
  const uint32_t lower_lanes = (1u << quad_lane) - 1;
#pragma unroll
  for (int i = 8 * kPart; i < 8 * kPart + 8; i += 2) {
    const int set = i / 2 % 2;
    const int id = first_key + i / 4 * 8 + 2 * quad_lane;
    float scores[2][kPlanes];
    bool pass[2];
    uint32_t passed = 0;  // bits of the quad's lanes, for the even columns and then for the odd
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) scores[j][r] = acc[r][i + j];
      const float value = rank_value<kPlanes>(filter, scores[j]);
      pass[j] = !(value <= rows[set].threshold) && id + j < num_keys;
      passed |= (__ballot_sync(kFullMask, pass[j]) >> quad_shift & 0xfu) << kQuad * j;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t before = j == 0 ? lower_lanes : lower_lanes << kQuad | 0xfu;
      const int slot = rows[set].count + __popc(passed & before);
      if (pass[j] && set == 0) candidates.template store<0>(slot, scores[j], id + j);
      if (pass[j] && set == 1) candidates.template store<8>(slot, scores[j], id + j);
    }
    rows[set].count += __popc(passed);
  }
}

// Writes the m candidates of eight rows, which are all that they have left, in ascending order of
// key ids: each lane counts how many keys of its row lie before its own. For small m. axis_row is
// negative where there is no token.
template <typename T, int kPlanes>
__device__ __forceinline__ void write_rows(const ProductKeyTopkParams& p,
                                           const Candidates<T, kPlanes>& candidates,
                                           int64_t axis_row, int lane) {
  constexpr int kEntries = kMaxSharedTopk / kQuad;
  const int m = p.axis_topk;
  const int quad_lane = lane % kQuad;
  uint32_t ids[kEntries];
  int places[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int slot = e * kQuad + quad_lane;
    ids[e] = slot < m ? candidates.load_id(slot) : 0;
    places[e] = 0;
  }
#pragma unroll 4
  for (int slot = 0; slot < m; ++slot) {
    const uint32_t id = candidates.load_id(slot);
#pragma unroll
    for (int e = 0; e < kEntries; ++e) places[e] += id < ids[e];
  }
  if (axis_row < 0) return;
  auto* axis_scores = static_cast<float*>(p.axis_scores) + axis_row * p.tucker_rank * m;
  int32_t* axis_indices = p.axis_indices + axis_row * m;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int slot = e * kQuad + quad_lane;
    if (slot >= m) break;
    float scores[kPlanes];
    candidates.load(slot, scores);
    axis_indices[places[e]] = static_cast<int32_t>(ids[e]);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      if (r < p.tucker_rank) axis_scores[r * m + places[e]] = scores[r];
    }
  }
}

// The places of one warp's scratch: a bit for every key, and how many bits lie before each word.
struct KeyMask {
  uint32_t* words;
  uint16_t* before;
};

// Writes the m candidates of a row, which are all that it has left, in ascending order of key ids.
template <typename T, int kPlanes>
__device__ __forceinline__ void write_row(const ProductKeyTopkParams& p,
                                          const Candidates<T, kPlanes>& candidates, KeyMask mask,
                                          int64_t axis_row, int lane) {
  const int m = p.axis_topk;
  const int words_per_lane = static_cast<int>(ceil_div(p.num_keys, 32 * kWarpSize));
  for (int i = 0; i < words_per_lane; ++i) mask.words[i * kWarpSize + lane] = 0;
  __syncwarp();
  for (int slot = lane; slot < m; slot += kWarpSize) {
    const uint32_t id = candidates.load_id(slot);
    atomicOr(mask.words + id / 32, 1u << id % 32);
  }
  __syncwarp();
  int own_bits = 0;
  for (int i = 0; i < words_per_lane; ++i) {
    own_bits += __popc(mask.words[lane * words_per_lane + i]);
  }
  int bits_before = own_bits;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int other = __shfl_up_sync(kFullMask, bits_before, delta);
    if (lane >= delta) bits_before += other;
  }
  bits_before -= own_bits;
  for (int i = 0; i < words_per_lane; ++i) {
    const int word = lane * words_per_lane + i;
    mask.before[word] = static_cast<uint16_t>(bits_before);
    bits_before += __popc(mask.words[word]);
  }
  __syncwarp();
  auto* axis_scores = static_cast<float*>(p.axis_scores) + axis_row * p.tucker_rank * m;
  for (int slot = lane; slot < m; slot += kWarpSize) {
    const uint32_t id = candidates.load_id(slot);
    float scores[kPlanes];
    candidates.load(slot, scores);
    const uint32_t lower_bits = mask.words[id / 32] & ((1u << id % 32) - 1);
    const int place = mask.before[id / 32] + __popc(lower_bits);
    p.axis_indices[axis_row * m + place] = static_cast<int32_t>(id);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      if (r < p.tucker_rank) axis_scores[r * m + place] = scores[r];
    }
  }
  __syncwarp();
}

// What the host works out about pruning, so that it costs no registers.
struct PruningPlan {
  int max_kept;      // the most that are kept, where there is a choice
  int room;          // for candidates beyond those, a little less than there is
  float deviations;  // above the mean of a normal distribution, where max_kept of a tile's keys lie
};

// Grid: x the tiles of tokens, y (head, side).
template <typename scalar_t, int kPlanes, int kGroups>
__global__ void __launch_bounds__(Traits<kPlanes, kGroups>::kThreads, 1)
    product_key_topk_fwd_axis_wgmma_kernel(ProductKeyTopkParams p, PruningPlan plan,
                                           const __grid_constant__ CUtensorMap query_map,
                                           const __grid_constant__ CUtensorMap key_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = Traits<kPlanes, kGroups>;
  extern __shared__ unsigned char shared_bytes[];
  const uint32_t shared =
      (shared_address(shared_bytes) + T::kAlignment - 1) / T::kAlignment * T::kAlignment;
  const auto full_barrier = [&](int stage) { return shared + T::kBarriersOffset + 8 * stage; };
  const auto empty_barrier = [&](int stage) {
    return shared + T::kBarriersOffset + 8 * (T::kStages + stage);
  };

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int head_side = blockIdx.y;
  const int head = head_side / 2;
  const int side = head_side % 2;
  const int num_keys = static_cast<int>(p.num_keys);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      mbarrier_init(full_barrier(stage), 1);
      mbarrier_init(empty_barrier(stage), 4 * kGroups);  // a warp each
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == T::kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  if (warp >= 4 * kGroups) {
    if constexpr (kGroups == 2) give_up_registers<24>();
    if (warp == 4 * kGroups && lane == 0) {
      prefetch_tensor_map(&query_map);
      prefetch_tensor_map(&key_map);
      for (int key = 0; key < num_keys; key += T::kKeys) {
        int query_plane = (side * p.num_heads + head) * p.num_queries;
        for (int r = 0; r < p.tucker_rank; ++r) {
          for (int x = 0; x < static_cast<int>(p.key_dim); x += kDepth) {
            mbarrier_wait(empty_barrier(stage), parity ^ 1);
            const uint32_t full = full_barrier(stage);
            const uint32_t to = shared + stage * T::kStageBytes;
            mbarrier_expect_bytes(full, T::kStageBytes);
            copy_box(&query_map, to, full, x, blockIdx.x * T::kTokens, query_plane);
            copy_box(&key_map, to + T::kQueryBytes, full, x, key, head_side * p.tucker_rank + r);
            advance();
          }
          query_plane += p.num_queries > 1;
        }
      }
    }
  } else {
    if constexpr (kGroups == 2) take_registers<240>();
    const int num_tiles = static_cast<int>(ceil_div(num_keys, T::kKeys));
    const int num_steps = static_cast<int>(ceil_div(p.key_dim, kDepth));  // of a plane
    const int group = warp / 4;
    const int group_warp = warp % 4;
    const int first_row = group * kGroupTokens + group_warp * kWarpTokens + lane / kQuad;
    const bool has_tokens = int64_t{blockIdx.x} * T::kTokens + group * kGroupTokens < p.num_tokens;
    const auto release = [&](int used_stage) {
      if (lane == 0) mbarrier_arrive(empty_barrier(used_stage));
    };

    float filter[kPlanes];
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t);
      filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f
                  : r < p.tucker_rank            ? vector[head * p.tucker_rank + r]
                                                 : 0.0f;
    }
    const uint32_t m = p.axis_topk;
    const Candidates<T, kPlanes> candidates(shared, first_row);
    const uint32_t scratch = shared + T::kMasksOffset + warp * T::kMaskBytes;
    const float none = __uint_as_float(kNanBits);
    RowState rows[2] = {{none, 0}, {none, 0}};
    // All warps of a group wait for each other at the next tile: so they prune at the same tiles,
    // those after which another would not fit if keys came in no order. Beyond that they prune when
    // they must.
    int pruned_tiles = 1;
    Accumulators<T, kPlanes> acc;
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
      for (int i = 0; i < T::kKeys / 2; ++i) acc[r][i] = 0.0f;
    }

    for (int tile = 0; tile < num_tiles; ++tile) {
      int previous = -1;
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        if (r >= p.tucker_rank) break;
        for (int step = 0; step < num_steps; ++step) {
          mbarrier_wait(full_barrier(stage), parity);
          const uint32_t from = shared + stage * T::kStageBytes;
          const uint64_t query_tile = tile_descriptor(from + group * kGroupTokens * kRowBytes);
          const uint64_t key_tile = tile_descriptor(from + T::kQueryBytes);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kDepth / 16; ++k) {
            // 32 bytes along the rows, in units of 16.
            wgmma_k16<scalar_t>(acc[r], query_tile + 2 * k, key_tile + 2 * k, step + k > 0);
          }
          wgmma_commit();
          if (previous >= 0) {
            wgmma_wait<1>();
            release(previous);
          }
          previous = stage;
          advance();
        }
      }
      wgmma_wait<0>();
      release(previous);
      if (!has_tokens) continue;

      const int first_key = tile * T::kKeys;
      if (tile == 0 && m <= T::kKeys / 2 && num_keys >= T::kKeys) {
        first_thresholds<T, kPlanes>(acc, filter, m, plan.max_kept, plan.deviations, rows);
      }
      // After the last key, one part more: no keys, but candidates are pruned to m.
      const int num_parts = T::kParts + (tile == num_tiles - 1);
#pragma unroll 1
      for (int part = 0; part < num_parts; ++part) {
        const bool last = part == T::kParts;
        const auto push = [&](auto constant) {
          push_part<decltype(constant)::value, T, kPlanes>(acc, filter, candidates, first_key,
                                                           num_keys, lane, rows);
        };
        // The accumulators are registers: which ones must be known when this is compiled.
        switch (part) {
          case 0:
            push(std::integral_constant<int, 0>{});
            break;
          case 1:
            push(std::integral_constant<int, 1>{});
            break;
          case 2:
            push(std::integral_constant<int, 2>{});
            break;
          case 3:
            push(std::integral_constant<int, 3>{});
            break;
          default:
            if constexpr (T::kParts > 4) {
              switch (part) {
                case 4:
                  push(std::integral_constant<int, 4>{});
                  break;
                case 5:
                  push(std::integral_constant<int, 5>{});
                  break;
                case 6:
                  push(std::integral_constant<int, 6>{});
                  break;
                case 7:
                  push(std::integral_constant<int, 7>{});
                  break;
                default:
                  break;
              }
            }
        }
        const bool due = part == T::kParts - 1 && tile > 0 && tile < num_tiles - 1 &&
                         (tile + 2 - pruned_tiles) * plan.max_kept > pruned_tiles * plan.room;
        const bool full = max(rows[0].count, rows[1].count) > T::kFullSlots;
        if (!__any_sync(kFullMask, last || due || full)) continue;
        if (part >= T::kParts / 2) pruned_tiles = tile + 1;
        const uint32_t max_count = last ? m : plan.max_kept;
        const uint32_t slack = last ? 0 : 2;
        if constexpr (T::kPruneSets == 2) {
          prune<2, T, kPlanes>(shared, scratch, first_row, filter, lane, m, max_count, slack, rows);
        } else {
#pragma unroll 1
          for (int set = 0; set < 2; ++set) {
            RowState row[1] = {rows[0]};
            if (set != 0) row[0] = rows[1];
            prune<1, T, kPlanes>(shared, scratch, first_row + 8 * set, filter, lane, m, max_count,
                                 slack, row);
            if (set == 0) {
              rows[0] = row[0];
            } else {
              rows[1] = row[0];
            }
          }
        }
      }
    }

    if (has_tokens) {
      const int64_t first_token = int64_t{blockIdx.x} * T::kTokens;
#pragma unroll 1
      for (int set = 0; set < 2; ++set) {
        const int set_row = group * kGroupTokens + group_warp * kWarpTokens + 8 * set;
        if constexpr (kGroups == 2) {
          const int64_t token = first_token + set_row + lane / kQuad;
          write_rows<T, kPlanes>(
              p, Candidates<T, kPlanes>(shared, set_row + lane / kQuad),
              token < p.num_tokens ? (token * p.num_heads + head) * 2 + side : -1, lane);
        } else {
          unsigned char* bytes = shared_bytes + (scratch - shared_address(shared_bytes));
          const KeyMask mask{reinterpret_cast<uint32_t*>(bytes),
                             reinterpret_cast<uint16_t*>(bytes + 4 * kMaskWords)};
#pragma unroll 1
          for (int i = 0; i < 8; ++i) {
            const int64_t token = first_token + set_row + i;
            if (token >= p.num_tokens) break;
            write_row<T, kPlanes>(p, Candidates<T, kPlanes>(shared, set_row + i), mask,
                                  (token * p.num_heads + head) * 2 + side, lane);
          }
        }
      }
    }
  }
#endif
}

// The value that this share of a standard normal distribution lies above.
double normal_tail(double share) {
  double low = -8, high = 8;
  for (int i = 0; i < 40; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(middle / std::sqrt(2.0)) > share ? low : high) = middle;
  }
  return low;
}

template <typename scalar_t, int kPlanes, int kGroups>
Status launch(const ProductKeyTopkParams& p, Stream stream) {
  using T = Traits<kPlanes, kGroups>;
  CUtensorMap query_map, key_map;
  const int64_t query_planes = int64_t{2} * p.num_heads * p.num_queries;
  ULTRAMEM_RETURN_IF_ERROR(make_tensor_map(&query_map, p.query, p.dtype, p.key_dim, p.num_tokens,
                                           query_planes, query_planes * p.key_dim, p.key_dim,
                                           T::kTokens));
  ULTRAMEM_RETURN_IF_ERROR(make_tensor_map(&key_map, p.keys, p.dtype, p.key_dim, p.num_keys,
                                           int64_t{2} * p.num_heads * p.tucker_rank, p.key_dim,
                                           p.num_keys * p.key_dim, T::kKeys));
  const auto kernel = product_key_topk_fwd_axis_wgmma_kernel<scalar_t, kPlanes, kGroups>;
  constexpr int kBytes = T::kSharedBytes + T::kAlignment;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, kBytes));
  PruningPlan plan;
  plan.max_kept = std::min(p.axis_topk + std::max(p.axis_topk / 8, 8), T::kFullSlots - kQuad);
  plan.room = (T::kSlots - plan.max_kept) * 7 / 8;
  plan.deviations = static_cast<float>(
      normal_tail(std::min(0.9, 0.5 * (p.axis_topk + plan.max_kept) / T::kKeys)));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.num_tokens, T::kTokens)),
                  static_cast<unsigned>(2 * p.num_heads));
  kernel<<<grid, T::kThreads, kBytes, stream>>>(p, plan, query_map, key_map);
  return launch_status();
}

template <typename scalar_t>
Status launch_planes(const ProductKeyTopkParams& p, Stream stream) {
  const bool shared_by_two = p.axis_topk <= kMaxSharedTopk;
  switch (p.tucker_rank) {
    case 1:
      return shared_by_two ? launch<scalar_t, 1, 2>(p, stream) : launch<scalar_t, 1, 1>(p, stream);
    case 2:
      return shared_by_two ? launch<scalar_t, 2, 2>(p, stream) : launch<scalar_t, 2, 1>(p, stream);
    default:
      return launch<scalar_t, 4, 1>(p, stream);
  }
}

#define ULTRAMEM_REGISTER_WGMMA(id, name, scalar_t, planes, groups)         \
  ULTRAMEM_REGISTER_KERNEL(id, "product_key_topk_fwd_axis_wgmma<" name ">", \
                           (Traits<planes, groups>::kThreads),              \
                           product_key_topk_fwd_axis_wgmma_kernel<scalar_t, planes, groups>)
ULTRAMEM_REGISTER_WGMMA(bf16_1_2, "bf16, 1, 128", __nv_bfloat16, 1, 2);
ULTRAMEM_REGISTER_WGMMA(bf16_1_1, "bf16, 1, 64", __nv_bfloat16, 1, 1);
ULTRAMEM_REGISTER_WGMMA(bf16_2_2, "bf16, 2, 128", __nv_bfloat16, 2, 2);
ULTRAMEM_REGISTER_WGMMA(bf16_2_1, "bf16, 2, 64", __nv_bfloat16, 2, 1);
ULTRAMEM_REGISTER_WGMMA(bf16_4_1, "bf16, 4, 64", __nv_bfloat16, 4, 1);
ULTRAMEM_REGISTER_WGMMA(f16_1_2, "fp16, 1, 128", __half, 1, 2);
ULTRAMEM_REGISTER_WGMMA(f16_1_1, "fp16, 1, 64", __half, 1, 1);
ULTRAMEM_REGISTER_WGMMA(f16_2_2, "fp16, 2, 128", __half, 2, 2);
ULTRAMEM_REGISTER_WGMMA(f16_2_1, "fp16, 2, 64", __half, 2, 1);
ULTRAMEM_REGISTER_WGMMA(f16_4_1, "fp16, 4, 64", __half, 4, 1);

}  // namespace

bool axis_wgmma_applies(const ProductKeyTopkParams& p) {
  constexpr int kMaxBlocksAlongY = 0xffff;
  if (!is_aligned(p.query) || !is_aligned(p.keys) || p.num_heads > kMaxBlocksAlongY / 2)
    return false;
  constexpr int kSm90 = 90;
  return sm90a_available() && product_key_topk_fwd_path(p, kSm90) == RetrievalPath::kTensorCore90;
}

Status launch_axis_wgmma(const ProductKeyTopkParams& params, Stream stream) {
  if (params.dtype == DType::kFloat16) return launch_planes<__half>(params, stream);
  return launch_planes<__nv_bfloat16>(params, stream);
}

}  // namespace ultramem::cuda
