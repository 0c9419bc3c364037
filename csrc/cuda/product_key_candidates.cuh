// Candidates: keys of one side that may be among a token's best m. A kernel finds them and writes
// them down, a few times m of a token's n keys, never all scores (product_key_topk_fwd_split,
// _candidates and _mma); another picks the best of them (product_key_topk_fwd_pick).
//
// A candidate is a key's scores and its id. A token, head and side has as many lists of them, in no
// order, as warps look for candidates at the same time.
#pragma once

#include <algorithm>
#include <cmath>

#include "async_copy.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

// Of a lane of the warp that cuts a list, with its entries in registers.
inline constexpr int kMaxListEntries = 6;
static_assert(kTensorCore90MaxKeys <= 0x10000 && kTensorCore80MaxKeys <= 0x10000,
              "ids have 16 bits");

// Records of a line of memory, 128 bytes.
inline constexpr int kLineRecords = 8;

// The kernel with a rank a block (product_key_topk_fwd_split.cu) takes up works, tiles of
// kWorkTokens tokens of a head and side, in the order of their numbers. Of the first of them it
// says when their lists are complete, so that they are picked from while others are still being
// filled. Of other kernels' works none are early.
inline constexpr int kWorkTokens = 128;
struct EarlyWorks {
  static constexpr int kGroupTokens = 16;
  static constexpr int kGroups = kWorkTokens / kGroupTokens;
  // Not yet; yes; no, and they will only be when that kernel has ended.
  enum State : int32_t { kUnknown, kComplete, kLate };

  // [works, kGroups, lists], zeros at first. Only where all of a work's are kComplete is it so for
  // good: one list that is late has all of them filled again.
  int32_t* states;
  int count;

  __host__ __device__ int32_t* of_work(int work, int lists) const {
    return states + work * kGroups * lists;
  }
};

// Of the rows (head and side, token of the chunk), in workspace, kLists of a row. As records,
// scores of up to two ranks and the id are 16 bytes side by side, the last four unused, for kernels
// that write one at a time; the L2 cache keeps these until they are read.
template <int kLists, bool kRecords = false>
struct Candidates {
  float* scores;    // [rows, capacity(), R], one list behind the other, or the records
  uint16_t* ids;    // [rows, capacity()], unless they are in records
  int32_t* counts;  // [rows, kLists]
  int32_t capacities[kLists];
  int32_t chunk_tokens;  // the last chunk may have fewer
  EarlyWorks early;      // of a chunk

  __host__ __device__ int capacity() const { return before(kLists - 1) + capacities[kLists - 1]; }
  __host__ __device__ int capacity_of(int list) const {
    int of_list = capacities[kLists - 1];
#pragma unroll
    for (int i = kLists - 2; i >= 0; --i) of_list = list == i ? capacities[i] : of_list;
    return of_list;
  }
  // Of the lists before this one.
  __host__ __device__ int before(int list) const {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kLists - 1; ++i) sum += list > i ? capacities[i] : 0;
    return sum;
  }
  __host__ __device__ int64_t row(int head_side, int chunk_token) const {
    return int64_t{head_side} * chunk_tokens + chunk_token;
  }
  // Of the chunk that begins at this one.
  int64_t tokens_from(int64_t first_token, int64_t all) const {
    return all - first_token < chunk_tokens ? all - first_token : chunk_tokens;
  }
};

// Keys in each of a row's lists that are expected above its bound, which m / lists of its maxima
// are above: a list's keys are dealt out in random order to so many columns, of which these are
// maxima.
inline double keys_above_maxima(double m, double columns, int lists) {
  return -columns * std::log1p(-m / (lists * columns + 1));
}

// Places for so many keys, if a list can have so many: whole lines of memory of records.
inline int list_capacity(double keys) {
  constexpr int kMost = kMaxListEntries * kWarpSize;
  static_assert(kMaxAxisTopk + 32 <= kMost && kMost % kLineRecords == 0);
  return std::min(static_cast<int>(std::ceil(keys / kLineRecords)) * kLineRecords, kMost);
}

// Room of each list for its share of what is above the bound, of scores in random order, with many
// standard deviations; and for 32 more than the m that are left when it is cut. A list has the keys
// of every kLists-th tile, and of each of its `columns` a maximum.
template <int kLists>
void set_capacities(const ProductKeyTopkParams& p, int columns, int tile_keys,
                    Candidates<kLists>* candidates) {
  const double m = p.axis_topk;
  const double found = keys_above_maxima(m, columns, kLists);
  const double room = std::max(found + 8 * std::sqrt(found) + 8, m + 32);
  const double all = ceil_div(p.num_keys, tile_keys * kLists) * tile_keys;
  for (int32_t& capacity : candidates->capacities) capacity = list_capacity(std::min(room, all));
}

// Of a chunk's candidates, whose capacities and tokens are known. Places them in the workspace if
// there is one.
template <int kLists, bool kRecords>
size_t place_candidates(const ProductKeyTopkParams& p, Candidates<kLists, kRecords>* candidates) {
  const auto rows = static_cast<size_t>(candidates->row(2 * p.num_heads, 0));
  const size_t places = rows * candidates->capacity();
  const size_t counts = align_up(rows * kLists * sizeof(int32_t));
  const size_t scores =
      align_up(places * (kRecords ? sizeof(float4) : p.tucker_rank * sizeof(float)));
  const size_t ids = kRecords ? 0 : align_up(places * sizeof(uint16_t));
  const size_t states =
      align_up(candidates->early.count * EarlyWorks::kGroups * kLists * sizeof(int32_t));
  if (auto* base = static_cast<char*>(p.workspace); base != nullptr) {
    candidates->counts = reinterpret_cast<int32_t*>(base);
    candidates->scores = reinterpret_cast<float*>(base + counts);
    if (!kRecords) candidates->ids = reinterpret_cast<uint16_t*>(base + counts + scores);
    candidates->early.states = reinterpret_cast<int32_t*>(base + counts + scores + ids);
  }
  return counts + scores + ids + states;
}

inline constexpr uint32_t kNoId = 0xffffffffu;

// The cut that exactly `wanted` of a warp's entries pass, of which there are `total`, more than
// that. What is no entry has rank 0 and kNoId; ids are below num_ids.
template <int kEntries>
__device__ __forceinline__ IdCut find_cut(const uint32_t (&ranks)[kEntries],
                                          const uint32_t (&ids)[kEntries], int total,
                                          uint32_t wanted, uint32_t num_ids) {
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    highest = max(highest, ranks[e]);
    if (ids[e] != kNoId) lowest = min(lowest, ranks[e]);
  }
  CutSearch search(__reduce_min_sync(kFullMask, lowest), __reduce_max_sync(kFullMask, highest),
                   static_cast<float>(total));
  for (int step = 0; search.open(wanted); ++step) {
    if (step >= CutSearch::kGuesses) {
      uint32_t least = 0xffffffffu, most = 0;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        if (ranks[e] >= search.low) least = min(least, ranks[e]);
        if (ranks[e] < search.high) most = max(most, ranks[e]);
      }
      search.low = __reduce_min_sync(kFullMask, least);
      search.high = __reduce_max_sync(kFullMask, most) + 1;
      if (!search.open(wanted)) break;
    }
    const uint32_t middle = search.guess(static_cast<float>(wanted), step);
    uint32_t count = 0;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) count += ranks[e] >= middle;
    search.take(middle, __reduce_add_sync(kFullMask, count), wanted);
  }
  IdCut cut{search.low, num_ids};
  if (search.ties(wanted)) {
    const uint32_t left = wanted - search.count_high;
    uint32_t first = 0, last = num_ids - 1;
    while (first < last) {
      const uint32_t middle = (first + last) / 2;
      uint32_t count = 0;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) count += ranks[e] == cut.rank && ids[e] <= middle;
      if (__reduce_add_sync(kFullMask, count) >= left) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    cut.last_tie = last;
  }
  return cut;
}

// The scores and the id of the candidate at `place`, counted over all rows; `once` if they are not
// read again.
template <int kPlanes, int kLists, bool kRecords>
__device__ __forceinline__ uint32_t load_candidate(const Candidates<kLists, kRecords>& candidates,
                                                   int64_t place, float (&scores)[kPlanes],
                                                   bool once = false) {
  if constexpr (kRecords) {
    static_assert(kPlanes <= 2, "");
    const float4* from = reinterpret_cast<const float4*>(candidates.scores) + place;
    const float4 record = once ? load_with_policy(from, drop_policy()) : *from;
    scores[0] = record.x;
    if constexpr (kPlanes == 2) scores[1] = record.y;
    return __float_as_uint(record.z);
  } else {
    const float* from = candidates.scores + place * kPlanes;
    if constexpr (kPlanes == 2) {
      const float2 both = *reinterpret_cast<const float2*>(from);
      scores[0] = both.x;
      scores[1] = both.y;
    } else if constexpr (kPlanes == 4) {
      const float4 all = *reinterpret_cast<const float4*>(from);
      scores[0] = all.x;
      scores[1] = all.y;
      scores[2] = all.z;
      scores[3] = all.w;
    } else {
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) scores[r] = from[r];
    }
    return candidates.ids[place];
  }
}

template <int kPlanes, int kLists, bool kRecords>
__device__ __forceinline__ void store_candidate(const Candidates<kLists, kRecords>& candidates,
                                                int64_t place, const float (&scores)[kPlanes],
                                                uint32_t id) {
  if constexpr (kRecords) {
    static_assert(kPlanes <= 2, "");
    store_with_policy(reinterpret_cast<float4*>(candidates.scores) + place,
                      make_float4(scores[0], scores[kPlanes - 1], __uint_as_float(id), 0.0f),
                      keep_policy());
  } else {
    float* to = candidates.scores + place * kPlanes;
    if constexpr (kPlanes == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(scores[0], scores[1]);
    } else if constexpr (kPlanes == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(scores[0], scores[1], scores[2], scores[3]);
    } else {
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) to[r] = scores[r];
    }
    candidates.ids[place] = static_cast<uint16_t>(id);
  }
}

// Where `stored` is not 0, writes a record and adds one to its place: a predicate, for kernels that
// would rather not branch. The fourth word of a record means nothing.
template <int kLists>
__device__ __forceinline__ void store_record_if(uint32_t stored,
                                                const Candidates<kLists, true>& candidates,
                                                uint32_t& place, float first, float second,
                                                uint32_t id) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b32 unused;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "@p st.global.L2::cache_hint.v4.b32 [%1], {%3, %4, %5, unused}, %6;\n"
      "@p add.u32 %0, %0, 1;\n"
      "}\n"
      : "+r"(place)
      : "l"(reinterpret_cast<float4*>(candidates.scores) + place), "r"(stored),
        "r"(__float_as_uint(first)), "r"(__float_as_uint(second)), "r"(id), "l"(keep_policy())
      : "memory");
}

// Cuts the list of so many that begins at `place` down to its best m, by a warp; what it was cut
// at.
template <int kPlanes, int kLists, bool kRecords>
__device__ __forceinline__ IdCut cut_list(const ProductKeyTopkParams& p,
                                          const Candidates<kLists, kRecords>& candidates,
                                          int64_t place, int count_before,
                                          const float (&filter)[kPlanes], int lane) {
  uint32_t ranks[kMaxListEntries], ids[kMaxListEntries];
  // Kept in registers where there are few.
  constexpr bool kHolds = kRecords;
  float held[kHolds ? kMaxListEntries : 1][kPlanes];
#pragma unroll
  for (int e = 0; e < kMaxListEntries; ++e) {
    const int i = e * kWarpSize + lane;
    ranks[e] = 0;
    ids[e] = kNoId;
    if (i < count_before) {
      float (&of_key)[kPlanes] = held[kHolds ? e : 0];
      ids[e] = load_candidate(candidates, place + i, of_key);
      if constexpr (!kHolds) ranks[e] = sortable(rank_value<kPlanes>(filter, of_key));
    }
  }
  if constexpr (kHolds) {
    // After all have been asked for: behind a branch each, one would be waited for after the other.
#pragma unroll
    for (int e = 0; e < kMaxListEntries; ++e) {
      if (ids[e] != kNoId) ranks[e] = sortable(rank_value<kPlanes>(filter, held[e]));
    }
  }
  const IdCut cut = find_cut(ranks, ids, count_before, static_cast<uint32_t>(p.axis_topk),
                             static_cast<uint32_t>(p.num_keys));
  int count = 0;
#pragma unroll
  for (int e = 0; e < kMaxListEntries; ++e) {
    if (e * kWarpSize >= count_before) break;
    float of_key[kPlanes];
    if constexpr (kHolds) {
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) of_key[r] = held[e][r];
    } else {
      load_candidate(candidates, place + min(e * kWarpSize + lane, count_before - 1), of_key);
    }
    const uint32_t kept = __ballot_sync(kFullMask, cut.keeps(ranks[e], ids[e]));
    // All have read what is overwritten now.
    __syncwarp();
    if ((kept >> lane & 1) != 0) {
      store_candidate(candidates, place + count + __popc(kept & ((1u << lane) - 1)), of_key,
                      ids[e]);
    }
    count += __popc(kept);
  }
  __syncwarp();
  return cut;
}

// Ranks that are not below this number are not below the sortable one. Not +0, below which a -0
// would be.
__device__ __forceinline__ float least_rank(uint32_t rank) {
  const float value = value_of(rank);
  return rank == 0 ? -__uint_as_float(kInfinityBits) : value == 0.0f ? -0.0f : value;
}

}  // namespace ultramem::cuda
