// How a warp picks the best m of a token's candidates on one side, and puts them in the order of
// their ids.
//
// A histogram of ranks says in which bin the last one to keep lies; those of that bin alone are
// compared. Ids are marked as bits of a set, of which those before an id are counted: its place.
#pragma once

#include "block_topk.cuh"
#include "common.cuh"
#include "product_key_candidates.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

// A warp's shared memory, of 8-byte aligned words and bins.
struct PickLayout {
  static constexpr int kBins = 4 * kWarpSize;  // four neighbours for each lane
  // Entries of one bin that are compared with each other; where there are more, a search cuts.
  static constexpr int kMaxCompared = kWarpSize;
  static constexpr int kScratchBytes = 4 * kBins + 8 * kMaxCompared;

  static constexpr int kPairIds = 2 * kWarpSize;  // of two words

  int lane_pairs;  // of words, of a lane; one id of them at least has no key
  int scratch;     // offset of kScratchBytes

  __host__ __device__ explicit PickLayout(int64_t num_keys)
      : lane_pairs(static_cast<int>(num_keys / (kWarpSize * kPairIds)) + 1),
        scratch(lane_pairs * kWarpSize * static_cast<int>(sizeof(uint4))) {}
};

// The set of ids that a warp keeps.
class PickedIds {
 public:
  __device__ PickedIds(unsigned char* shared, const PickLayout& layout)
      : pairs_(reinterpret_cast<uint4*>(shared)), lane_pairs_(layout.lane_pairs) {}

  // An id that is never kept.
  __device__ __forceinline__ uint32_t no_id() const {
    return static_cast<uint32_t>(lane_pairs_) * (kWarpSize * PickLayout::kPairIds) - 1;
  }
  __device__ __forceinline__ void clear(int lane) const {
    uint4* pair = pairs_ + lane;
#pragma unroll 1
    for (int i = lane_pairs_; i > 0; --i, pair += kWarpSize) *pair = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void add(uint32_t id) const {
    atomicOr(&words()[id / kWarpSize].x, 1u << id % kWarpSize);
  }
  // After the last of them, with barriers of the warp around it.
  __device__ __forceinline__ void count(int lane) const {
    uint4* const first = pairs_ + lane * lane_pairs_;
    int in_lane = 0;
#pragma unroll 1
    for (int i = 0; i < lane_pairs_; ++i) in_lane += __popc(first[i].x) + __popc(first[i].z);
    auto before = static_cast<uint32_t>(warp_scan_inclusive(in_lane) - in_lane);
#pragma unroll 1
    for (int i = 0; i < lane_pairs_; ++i) {
      const uint4 pair = first[i];
      const uint32_t middle = before + __popc(pair.x);
      first[i] = make_uint4(pair.x, before, pair.z, middle);
      before = middle + __popc(pair.z);
    }
  }
  // Whether an id is kept, and how many lower ones are.
  __device__ __forceinline__ bool find(uint32_t id, uint32_t* place) const {
    const uint2 word = words()[id / kWarpSize];
    const uint32_t bit = 1u << id % kWarpSize;
    *place = word.y + __popc(word.x & (bit - 1));
    return (word.x & bit) != 0;
  }

 private:
  __device__ __forceinline__ uint2* words() const { return reinterpret_cast<uint2*>(pairs_); }

  uint4* pairs_;  // of words: bits, how many are in words before
  int lane_pairs_;
};

// The bin of a warp's histogram that the `wanted`-th best entry is in; the best come first.
struct PickBin {
  uint32_t index;
  uint32_t above;  // entries in the bins before
  uint32_t count;  // entries in it

  __device__ __forceinline__ PickBin(const uint32_t* bins, uint32_t wanted, int lane) {
    const uint4 four = reinterpret_cast<const uint4*>(bins)[lane];
    const uint32_t in_lane = four.x + four.y + four.z + four.w;
    auto before = static_cast<uint32_t>(warp_scan_inclusive(static_cast<int>(in_lane)));
    const uint32_t reached = __ballot_sync(kFullMask, before >= wanted);
    before -= in_lane;
    const uint32_t counts[4] = {four.x, four.y, four.z, four.w};
    // All three are below 2^10.
    uint32_t found = 4 * lane | before << 10 | four.x << 20;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      before += counts[i - 1];
      if (before < wanted) found = (4 * lane + i) | before << 10 | counts[i] << 20;
    }
    // Of the lane that reaches it.
    found = __shfl_sync(kFullMask, found, __ffs(static_cast<int>(reached)) - 1);
    index = found & 0x3ffu;
    above = found >> 10 & 0x3ffu;
    count = found >> 20;
  }
};

// Adds the ids of a warp's best `wanted` entries, of which there are more, to the set; where all
// are equal, all ids, of which the first `wanted` count. Where there is no entry, the id is no_id
// and the rank minus infinity. Returns whether it did: not where ranks are not finite or too many
// about equal.
template <int kEntries>
__device__ __forceinline__ bool pick_by_bins(const float (&ranks)[kEntries],
                                             const uint32_t (&ids)[kEntries], uint32_t wanted,
                                             const PickedIds& picked, unsigned char* scratch,
                                             int lane) {
  const float infinity = __uint_as_float(kInfinityBits);
  auto* bins = reinterpret_cast<uint32_t*>(scratch);
  auto* compared = reinterpret_cast<uint64_t*>(scratch + 4 * PickLayout::kBins);
  const uint32_t no_id = picked.no_id();
  reinterpret_cast<uint4*>(bins)[lane] = make_uint4(0, 0, 0, 0);
  float high = -infinity, low = infinity;
  bool finite = true;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const bool exists = ids[e] != no_id;
    high = fmaxf(high, ranks[e]);
    low = exists ? fminf(low, ranks[e]) : low;
    finite &= !exists || fabsf(ranks[e]) < infinity;
  }
  __syncwarp();
  if (!__all_sync(kFullMask, finite)) return false;
  high = value_of(__reduce_max_sync(kFullMask, sortable(high)));
  low = value_of(__reduce_min_sync(kFullMask, sortable(low)));
  if (high == low) {  // lower ids come first
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (ids[e] != no_id) picked.add(ids[e]);
    }
    return true;
  }
  // Keys above a bound become few fast: the better half of the range is the first bin. A bin never
  // lies behind that of a lower rank, also where there is no range at all or too much.
  const float first = fmaf(0.5f, high - low, low);
  const float scale = __fdividef(static_cast<float>(PickLayout::kBins), fmaxf(first - low, 1e-30f));
  // The bin, and below it the place among those of the bin.
  constexpr uint32_t kPlaces = 1 << 16;
  uint32_t places[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const uint32_t bin = min(__float2uint_rz((first - ranks[e]) * scale), PickLayout::kBins - 1u);
    places[e] = PickLayout::kBins * kPlaces;
    if (ids[e] != no_id) places[e] = bin * kPlaces + atomicAdd(bins + bin, 1u);
  }
  __syncwarp();
  const PickBin bin(bins, wanted, lane);
  const bool all_of_bin = bin.above + bin.count == wanted;
  if (bin.count > PickLayout::kMaxCompared && !all_of_bin) return false;
  const uint32_t end = (bin.index + (all_of_bin ? 1 : 0)) * kPlaces;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (places[e] < end) picked.add(ids[e]);
  }
  if (all_of_bin) return true;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const uint32_t place = places[e] - end;
    if (place < kPlaces) compared[place] = make_candidate(sortable(ranks[e]), ids[e]);
  }
  __syncwarp();
  if (lane < bin.count) {
    const uint64_t own = compared[lane];
    uint32_t place = bin.above;
#pragma unroll 1
    for (uint32_t i = 0; i < bin.count; ++i) place += compared[i] > own;
    if (place < wanted) picked.add(candidate_position(own));
  }
  return true;
}

// Adds the ids of the best `wanted` of a warp's `total` entries, or of all if there are no more.
template <int kEntries>
__device__ __forceinline__ void pick_best(const float (&ranks)[kEntries],
                                          const uint32_t (&ids)[kEntries], uint32_t total,
                                          uint32_t wanted, const PickedIds& picked,
                                          unsigned char* scratch, int lane) {
  const uint32_t no_id = picked.no_id();
  if (total <= wanted) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (ids[e] != no_id) picked.add(ids[e]);
    }
  } else if (!pick_by_bins(ranks, ids, wanted, picked, scratch, lane)) {
    uint32_t sortable_ranks[kEntries], cut_ids[kEntries];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const bool exists = ids[e] != no_id;
      sortable_ranks[e] = exists ? sortable(ranks[e]) : 0;
      cut_ids[e] = exists ? ids[e] : kNoId;
    }
    const IdCut cut =
        find_cut(sortable_ranks, cut_ids, static_cast<int>(total), wanted, picked.no_id());
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (ids[e] != no_id && cut.keeps(sortable_ranks[e], ids[e])) picked.add(ids[e]);
    }
  }
}

}  // namespace ultramem::cuda
