// The best m of a token's keys, whose ranks a group of warps holds in registers: a histogram says
// in which bin the m-th best lies, and the keys of that bin are compared with each other.
#pragma once

#include "block_topk.cuh"
#include "common.cuh"
#include "fast_math.cuh"
#include "threshold_search.cuh"
#include "warp_group.cuh"

namespace ultramem::cuda {

// Keys of a token that its warps hold in registers: sets of four neighbours.
inline constexpr int kMaxSets = 4;
inline constexpr int kSetKeys = 4;
inline constexpr int kWarpSetKeys = kWarpSize * kSetKeys;
inline constexpr int kBins = 256;
inline constexpr int kLaneBins = kBins / kWarpSize;
// Keys of one bin that are compared with each other; where there are more, a search cuts.
inline constexpr int kMaxCompared = 64;
// Of a group of warps: the histogram with a bin of those that are no numbers, the keys to compare
// and how many.
inline constexpr int kBinBytes = kBins * 4 + 16;
inline constexpr int kSelectionBytes = kBinBytes + kMaxCompared * 8 + 16;

// The token's ranks of this thread's keys, NaN and what lies past the end as 0. Set i of warp w is
// keys (i * W + w) * 128 and on, where there are W warps.
template <int kSets>
struct OwnKeys {
  __device__ __forceinline__ int key(int i) const {
    if (kSets == 1) return first + i;
    return first + i / kSetKeys * stride + i % kSetKeys;
  }

  // Rank i, which stays in registers.
  __device__ __forceinline__ uint32_t rank(int i) const {
    uint32_t chosen = ranks[0];
#pragma unroll
    for (int j = 1; j < kCount; ++j) chosen = i == j ? ranks[j] : chosen;
    return chosen;
  }

  static constexpr int kCount = kSets * kSetKeys;
  uint32_t ranks[kCount];
  int first;   // of set 0
  int stride;  // from set to set
};

// What a slow search is narrowed with (CutSearch::kGuesses).
template <int kCount>
__device__ __forceinline__ void next_ranks(const CutSearch& search, const uint32_t (&ranks)[kCount],
                                           uint32_t* least, uint32_t* most) {
  *least = 0xffffffffu;
  *most = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (ranks[i] >= search.low) *least = min(*least, ranks[i]);
    if (ranks[i] < search.high) *most = max(*most, ranks[i]);
  }
}

// What is taken: all ranks above `cut`, and the first num_ties of those that equal it.
struct Cut {
  static constexpr uint32_t kAllTies = 0xffffffffu;

  uint32_t rank;
  uint32_t num_ties;
};

// Which `wanted` of the ranks are taken, by search.
template <int kCount>
__device__ __forceinline__ Cut find_cut(CutSearch search, const uint32_t (&ranks)[kCount],
                                        uint32_t wanted, WarpGroup& group) {
  for (int step = 0; search.open(wanted); ++step) {
    if (step >= CutSearch::kGuesses) {
      uint32_t least, most;
      next_ranks(search, ranks, &least, &most);
      search.low = group.lowest(least);
      search.high = group.highest(most) + 1;
      if (!search.open(wanted)) break;
    }
    const uint32_t guess = search.guess(static_cast<float>(wanted), step);
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) count += ranks[i] >= guess;
    search.take(guess, group.sum(count), wanted);
  }
  return {search.low, search.ties(wanted) ? wanted - search.count_high : Cut::kAllTies};
}

// The places, in the order of keys, of those of the group's keys that have a bit: 4 bits a set.
template <int kSets>
class Places {
 public:
  __device__ __forceinline__ Places(uint32_t bits, int warp, int lane, WarpGroup& group) {
    // Counts of the sets of a warp are bytes of one number: at most 128 each.
    uint32_t counts = 0;
#pragma unroll
    for (int set = 0; set < kSets; ++set) counts |= __popc(bits >> 4 * set & 0xfu) << 8 * set;
    const auto sum = static_cast<uint32_t>(warp_scan_inclusive(static_cast<int>(counts)));
    const uint32_t of_warp = group.exchange_last(sum, 0);
    const uint32_t before_lane = sum - counts;
    // Two sets each, in halves: 2048 at most.
    const uint32_t warps[2] = {of_warp & 0xff00ffu, of_warp >> 8 & 0xff00ffu};
    uint32_t all[2], before_warp[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= kSets) break;
      all[i] = __reduce_add_sync(kFullMask, warps[i]);
      before_warp[i] = __reduce_add_sync(kFullMask, lane < warp ? warps[i] : 0);
    }
    uint32_t before_set = 0;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int half = set / 2 * 16;
      first[set] =
          before_set + (before_warp[set % 2] >> half & 0xffffu) + (before_lane >> 8 * set & 0xffu);
      before_set += all[set % 2] >> half & 0xffffu;
    }
  }

  uint32_t first[kSets];  // the place of the thread's first of a set
};

// What the warps of a group share of a token's selection. Its address is the same in all lanes, and
// a register of its own: as the compiler has it it would be computed wherever it is used.
struct Selection {
  __device__ __forceinline__ explicit Selection(unsigned char* shared) {
    const uint32_t address = __shfl_sync(kFullMask, shared_address(shared), 0);
    auto* own = static_cast<unsigned char*>(__cvta_shared_to_generic(address));
    bins = reinterpret_cast<uint32_t*>(own);
    compared = reinterpret_cast<uint64_t*>(own + kBinBytes);
    num_compared = reinterpret_cast<uint32_t*>(own + kBinBytes + kMaxCompared * 8);
  }

  // What find_best begins with; `thread` of the group's.
  __device__ __forceinline__ void clear(int thread, int group_threads) const {
#pragma unroll 1
    for (int i = thread; i < kSelectionBytes / 16; i += group_threads) {
      reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
    }
  }

  uint32_t* bins;  // how many keys; the best come first
  uint64_t* compared;
  uint32_t* num_compared;
};

// The bin that the m-th best key is in.
struct Bin {
  uint32_t index;  // kBins where there are fewer keys
  uint32_t above;  // keys in the bins before
  uint32_t count;  // keys in it

  // One warp. The result is the same in all lanes.
  __device__ __forceinline__ Bin(const uint32_t* bins, uint32_t m, int lane) {
    uint32_t until[kLaneBins];  // counts, then keys as far as this bin
#pragma unroll
    for (int i = 0; i < kLaneBins; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(bins + lane * kLaneBins + i);
      until[i] = four.x;
      until[i + 1] = four.y;
      until[i + 2] = four.z;
      until[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 1; i < kLaneBins; ++i) until[i] += until[i - 1];
    const auto sum =
        static_cast<uint32_t>(warp_scan_inclusive(static_cast<int>(until[kLaneBins - 1])));
    const uint32_t reached = __ballot_sync(kFullMask, sum >= m);
    const uint32_t before = sum - until[kLaneBins - 1];
    uint32_t last = before, in_lane = 0, end = sum;
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) {
      const bool below = before + until[i] < m;
      in_lane += below;
      if (below) last = before + until[i];
    }
#pragma unroll
    for (int i = kLaneBins - 1; i >= 0; --i) {
      if (before + until[i] >= m) end = before + until[i];
    }
    // Of the lane that reaches m, where all three are below 2^8, m <= 2^7 and 2^14.
    const uint32_t packed = (lane * kLaneBins + in_lane) | last << 8 | (end - last) << 16;
    const uint32_t found = __shfl_sync(kFullMask, packed, __ffs(static_cast<int>(reached)) - 1);
    index = reached == 0 ? kBins : found & 0xffu;
    above = found >> 8 & 0xffu;
    count = found >> 16;
  }
};

// Bits of the m keys that a search takes, or where there are too few numbers, of all and the first
// NaN: for keys of which too many lie in one bin.
template <int kSets>
__device__ __forceinline__ uint32_t search_best(const OwnKeys<kSets>& own, uint32_t lowest,
                                                uint32_t highest, uint32_t m, int num_keys,
                                                int warp, int lane, WarpGroup& group) {
  uint32_t own_numbers = 0;
#pragma unroll
  for (int i = 0; i < own.kCount; ++i) own_numbers += own.ranks[i] != 0;
  const uint32_t numbers = group.sum(own_numbers);
  const Cut cut = numbers < m ? Cut{0, m - numbers}
                              : find_cut(CutSearch(lowest, highest, static_cast<float>(numbers)),
                                         own.ranks, m, group);
  uint32_t above = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < own.kCount; ++i) {
    above |= own.ranks[i] > cut.rank ? 1u << i : 0u;
    equal |= own.key(i) < num_keys && own.ranks[i] == cut.rank ? 1u << i : 0u;
  }
  if (cut.num_ties == Cut::kAllTies) return above | equal;
  const Places<kSets> places(equal, warp, lane, group);
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    uint32_t ties = equal & 0xfu << 4 * set;
    for (uint32_t place = places.first[set]; ties != 0 && place < cut.num_ties; ++place) {
      above |= ties & -ties;
      ties &= ties - 1;
    }
  }
  return above;
}

// Bits of those of the thread's keys that are among the best m. `selection` is clear: by the
// threads of the group, without a barrier since.
template <int kSets>
__device__ __forceinline__ uint32_t find_best(const OwnKeys<kSets>& own, uint32_t m, int num_keys,
                                              const Selection& selection, int warp, int lane,
                                              WarpGroup& group) {
  uint32_t highest = 0, lowest = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < own.kCount; ++i) {
    highest = max(highest, own.ranks[i]);
    lowest = min(lowest, own.ranks[i] - 1);  // none where it is 0
  }
  group.extremes(&lowest, &highest);
  ++lowest;

  // A bin never lies behind that of a lower rank, also where there is an infinity or no range at
  // all: what is not a number becomes 0 and the rest saturates.
  const float first = value_of(highest);
  const float scale = static_cast<float>(kBins) * reciprocal_fast(first - value_of(lowest));
  uint32_t bins[own.kCount];
#pragma unroll
  for (int i = 0; i < own.kCount; ++i) {
    bins[i] = min(__float2uint_rz((first - value_of(own.ranks[i])) * scale), kBins - 1u);
    if (own.ranks[i] == 0) bins[i] = kBins;
    atomicAdd(selection.bins + bins[i], 1u);
  }
  group.sync();
  const Bin bin(selection.bins, m, lane);
  if (bin.index == kBins || (bin.count > kMaxCompared && bin.above + bin.count > m)) {
    return search_best(own, lowest, highest, m, num_keys, warp, lane, group);
  }
  uint32_t best = 0, same = 0;
#pragma unroll
  for (int i = 0; i < own.kCount; ++i) {
    best |= bins[i] < bin.index ? 1u << i : 0u;
    same |= bins[i] == bin.index ? 1u << i : 0u;
  }
  const uint32_t num_taken = m - bin.above;
  if (bin.count == num_taken) return best | same;

  if (same != 0) {
    uint32_t place = atomicAdd(selection.num_compared, static_cast<uint32_t>(__popc(same)));
#pragma unroll 1
    for (uint32_t bits = same; bits != 0; bits &= bits - 1) {
      const int i = __ffs(static_cast<int>(bits)) - 1;
      selection.compared[place++] = make_candidate(own.rank(i), static_cast<uint32_t>(own.key(i)));
    }
  }
  group.sync();
#pragma unroll 1
  for (uint32_t bits = same; bits != 0; bits &= bits - 1) {
    const int i = __ffs(static_cast<int>(bits)) - 1;
    const uint64_t candidate = make_candidate(own.rank(i), static_cast<uint32_t>(own.key(i)));
    uint32_t place = 0;
    // Behind the last there are zeros, below all.
    static_assert(kMaxCompared % 4 == 0);
#pragma unroll 1
    for (uint32_t other = 0; other < bin.count; other += 4) {
      const auto* two = reinterpret_cast<const ulonglong2*>(selection.compared + other);
      const ulonglong2 first = two[0], last = two[1];
      place += (first.x > candidate) + (first.y > candidate) + (last.x > candidate) +
               (last.y > candidate);
    }
    if (place < num_taken) best |= bits & -bits;
  }
  return best;
}

}  // namespace ultramem::cuda
