// The keys that a token keeps of one side: lists in shared memory, each of which one thread alone
// adds to and prunes, or two threads fill from both ends and nobody prunes.
//
// A thread sees scores in ascending order of key ids and adds what beats the token's threshold;
// when a list is nearly full, the threshold rises to the m-th best so far (or a little below) and
// what lies under it is dropped. Lists stay in ascending order of ids throughout, and a later score
// that only equals the threshold has lost the tie already. In one that is filled from both ends
// each thread's entries are in ascending order of ids from its end on.
//
// Slot s of all lists lies side by side, so that threads that add to the same slot meet in no bank,
// and a list's place further on from slot to slot, so that neither do those that read one list.
#pragma once

#include "block_topk.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "shared_memory.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

// A token has two lists, which threads sixteen lanes apart keep.
inline constexpr int kListsOfToken = 2;

// A block has kLists of them. Between two checks a list gets at most kCheckKeys more.
template <int kPlanes_, int kSlots_, int kLists_, int kCheckKeys_, bool kBothEnds_ = false>
struct KeyListTraits {
  static constexpr int kPlanes = kPlanes_;  // scores of a key
  static constexpr int kSlots = kSlots_;
  static constexpr int kCheckKeys = kCheckKeys_;
  static constexpr int kLists = kLists_;
  static constexpr bool kBothEnds = kBothEnds_;
  static constexpr int kTokensOfWarp = kWarpSize / kListsOfToken;
  // With more entries a list must be pruned first.
  static constexpr int kFullSlots = kSlots - kCheckKeys;
  static constexpr int kMostEntries = kListsOfToken * kFullSlots;  // of a token after that

  // Lists that are filled from one end have their ids behind all scores. Those that are filled from
  // both have them behind the scores of the same slot, and as far apart as scores, the ids of four
  // lists in the place of the scores of one: for eight tokens of a warp side by side an id is
  // equally far from its scores in all lists and slots, so that who adds a key needs one address.
  static constexpr int kScoreBytes = 4 * kPlanes;
  static constexpr int kIdBytes = kBothEnds ? kScoreBytes : 2;  // from one token's id to the next's
  static constexpr int kScoreStride = (kLists + 1) * kScoreBytes + (kBothEnds ? kLists * 2 : 0);
  static constexpr int kIdStride = kBothEnds ? kScoreStride : (kLists + 1) * 2;
  static constexpr int kScoresPerId = kScoreStride / kIdStride;
  static constexpr int kIdsOffset = kBothEnds ? kLists * kScoreBytes : kSlots * kScoreStride;
  static constexpr int kBytes = kSlots * (kScoreStride + (kBothEnds ? 0 : kIdStride));
  // From a token's first list to its other, in tokens, and to that of the token eight further on.
  static constexpr int kListDistance = kBothEnds ? 8 : kTokensOfWarp;
  static constexpr int kEightScores = (kBothEnds ? 16 : 8) * kScoreBytes;
  static constexpr int kEightIds = kBothEnds ? 2 : 8 * kIdBytes;
  static_assert(!kBothEnds || kPlanes == 2, "ids of four lists take the place of scores of one");
  static_assert(kSlots % 4 == 0, "entries move four at a time");
  static_assert(!kBothEnds || kSlots < 64, "a bit for each");

  // Where a list has its scores and its ids in slot 0, and the part of it that depends on which of
  // the warp's tokens it is.
  static __device__ __forceinline__ uint32_t scores_offset(uint32_t list) {
    return list / kWarpSize * (kWarpSize * kScoreBytes) + token_scores(list % kTokensOfWarp) +
           list / kTokensOfWarp % kListsOfToken * (kListDistance * kScoreBytes);
  }
  static __device__ __forceinline__ uint32_t token_scores(uint32_t token) {
    return token / 8 * kEightScores + token % 8 * kScoreBytes;
  }
  static __device__ __forceinline__ uint32_t ids_offset(uint32_t list) {
    constexpr uint32_t kWarpIds = kTokensOfWarp * kIdBytes * (kBothEnds ? 1 : kListsOfToken);
    // Of warps half a block apart they are side by side.
    constexpr uint32_t kHalfWarps = kBothEnds ? kLists / kWarpSize / 2 : kLists / kWarpSize;
    const uint32_t warp = list / kWarpSize;
    return kIdsOffset + warp % kHalfWarps * kWarpIds + warp / kHalfWarps * 4 +
           token_ids(list % kTokensOfWarp) +
           list / kTokensOfWarp % kListsOfToken * (kListDistance * kIdBytes);
  }
  static __device__ __forceinline__ uint32_t token_ids(uint32_t token) {
    return token / 8 * kEightIds + token % 8 * kIdBytes;
  }
};

// The greater; NaN if one is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float greater;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(x), "f"(y));
  return greater;
}

// 1 where x > y, which are not NaN, y neither -0 nor infinite: a sign that is added up shifted, by
// one instruction, is faster than a predicate.
__device__ __forceinline__ uint32_t is_greater(float x, float y) {
  return __float_as_uint(y - x) >> 31;
}

// How many of a token's keys are kept by a pruning.
struct KeptCounts {
  uint32_t least;  // m
  uint32_t most;   // if that can be had without ties

  // Where there is a choice, a long search is not worth it.
  __device__ __forceinline__ uint32_t most_after(int steps, uint32_t limit) const {
    return most == least ? most : min(most + 2 * steps, limit);
  }
};

// One thread's list.
template <typename T>
class KeyList {
  static constexpr int kPlanes = T::kPlanes;
  static constexpr int kSlots = T::kSlots;
  static constexpr int kBatch = 4;  // entries that move at a time

 public:
  // `shared` is where the lists of the block begin. No key passes an infinite threshold, but NaN.
  __device__ KeyList(uint32_t shared, int list, const float (&filter)[kPlanes], bool has_token)
      : scores_(shared + T::scores_offset(list)), ids_(shared + T::ids_offset(list)) {
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) filter_[r] = filter[r];
    threshold_ = __uint_as_float(has_token ? kNanBits : kInfinityBits);
  }

  // Takes over what others have put into the list, `front` keys from slot 0 on and `back` from the
  // last down, all of which beat `threshold`.
  __device__ __forceinline__ void take_over(int front, int back, float threshold) {
    static_assert(T::kBothEnds, "");
    set_count(front);
    first_back_ = kSlots - back;
    const uint64_t filled = (uint64_t{1} << front) - 1 | ((uint64_t{1} << back) - 1) << first_back_;
    filled_[0] = static_cast<uint32_t>(filled);
    filled_[1] = static_cast<uint32_t>(filled >> 32);
    threshold_ = threshold;
  }

  __device__ __forceinline__ int count() const { return front() + kSlots - first_back(); }
  // How many more keys every list of the warp has room for.
  __device__ __forceinline__ int room_of_warp() const {
    return T::kSlots - static_cast<int>(__reduce_max_sync(kFullMask, end_)) / T::kIdStride;
  }

  // Adds those of the keys first_id + id_offsets that beat the threshold, which a NaN does. Unless
  // kAll of them exist, none does from id num_keys on.
  template <bool kAll, int kCount>
  __device__ __forceinline__ void push(const float (&scores)[kCount][kPlanes], uint32_t first_id,
                                       const int (&id_offsets)[kCount], uint32_t num_keys) {
#pragma unroll
    for (int first = 0; first < kCount; first += kBatch) {
      bool passes[kBatch];
      uint32_t ids[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        ids[i] = first_id + id_offsets[first + i];
        passes[i] = !(rank_value<kPlanes>(filter_, scores[first + i]) <= threshold_);
        if constexpr (!kAll) passes[i] &= ids[i] < num_keys;
      }
      append(passes, &scores[first], ids);
    }
  }

  // Every lane of the warp calls it.
  __device__ __forceinline__ void prune(KeptCounts kept);

  // What the best m of the token's keys pass, or all if there are no more. Every lane of the warp
  // calls it.
  __device__ __forceinline__ IdCut find_cut(uint32_t m);

  // Of the warp's num_tokens tokens the keys that pass the cuts, m of each, and their scores go to
  // memory in ascending order of ids, from row `axis_row` on. Every lane of the warp calls it, the
  // first with the warp's first list.
  __device__ __forceinline__ void write(const ProductKeyTopkParams& p, int64_t axis_row,
                                        int num_tokens, const IdCut& cut, int lane) const;

 private:
  __device__ __forceinline__ int front() const { return end_ / T::kIdStride; }
  __device__ __forceinline__ int first_back() const { return T::kBothEnds ? first_back_ : kSlots; }
  __device__ __forceinline__ bool has(int slot) const {
    return T::kBothEnds ? (filled_[slot / 32] >> slot % 32 & 1) != 0 : slot < front();
  }
  __device__ __forceinline__ void set_count(int count) { end_ = count * T::kIdStride; }
  // Where each goes is worked out before any is stored: a store that has not read its address yet
  // would hold up what changes it.
  __device__ __forceinline__ void append(const bool (&passes)[kBatch],
                                         const float (*scores)[kPlanes],
                                         const uint32_t (&ids)[kBatch]) {
    uint32_t to[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      to[i] = end_;
      end_ += passes[i] ? T::kIdStride : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (passes[i]) {
        store_shared_floats<kPlanes>(scores_ + to[i] * T::kScoresPerId, scores[i]);
        store_shared_u16(ids_ + to[i], ids[i]);
      }
    }
  }
  __device__ __forceinline__ uint32_t id_at(int slot) const {
    return load_shared_u16(ids_ + slot * T::kIdStride);
  }

  // Over the lists of a token.
  static __device__ __forceinline__ uint32_t token_sum(uint32_t x) {
    return x + __shfl_xor_sync(kFullMask, x, T::kTokensOfWarp);
  }
  static __device__ __forceinline__ uint32_t token_min(uint32_t x) {
    return min(x, __shfl_xor_sync(kFullMask, x, T::kTokensOfWarp));
  }
  static __device__ __forceinline__ uint32_t token_max(uint32_t x) {
    return max(x, __shfl_xor_sync(kFullMask, x, T::kTokensOfWarp));
  }

  // The slots of a list that have an entry: those before `front` and those from `first_back` on.
  struct Filled {
    int front, first_back;
  };
  static __device__ __forceinline__ int pack(const Filled& filled) {
    return T::kBothEnds ? filled.front | filled.first_back << 16 : filled.front;
  }
  static __device__ __forceinline__ Filled unpack(int packed) {
    if constexpr (!T::kBothEnds) return {packed, kSlots};
    return {packed & 0xffff, packed >> 16};
  }

  __device__ __forceinline__ float load_values(float (&values)[kSlots]) const;
  __device__ __forceinline__ bool search_values(const float (&values)[kSlots], float highest,
                                                uint32_t total, KeptCounts kept, bool too_many,
                                                float* cut) const;
  __device__ __forceinline__ IdCut mark_exactly(float (&values)[kSlots], uint32_t total,
                                                KeptCounts kept, bool wanted);
  __device__ __forceinline__ uint32_t last_kept_tie(const uint32_t (&ranks)[kSlots], uint32_t low,
                                                    uint32_t wanted, bool ties) const;
  __device__ __forceinline__ void drop_below(const float (&values)[kSlots], float cut);
  __device__ __forceinline__ void balance(int total);
  template <int kHalf, int kTokens>
  __device__ __forceinline__ void write_tokens(const ProductKeyTopkParams& p, int64_t axis_row,
                                               int first_token,
                                               const Filled (&filled)[kTokens][kListsOfToken],
                                               const IdCut (&cuts)[kTokens], int lane) const;

  uint32_t scores_, ids_;    // shared addresses of slot 0
  uint32_t end_ = 0;         // how far beyond that of its id the first free slot has its own
  int first_back_ = kSlots;  // from this slot on are those from the last slot down
  uint32_t filled_[2] = {};  // a bit for each slot, of a list that is filled from both ends
  float filter_[kPlanes];
  float threshold_;  // keys that compare less or equal are out; NaN, which nothing does: none yet
};

// Of a token's entries of rank `low`, the `wanted` ones of lowest ids: the id of the last of them.
template <typename T>
__device__ __forceinline__ uint32_t KeyList<T>::last_kept_tie(const uint32_t (&ranks)[kSlots],
                                                              uint32_t low, uint32_t wanted,
                                                              bool ties) const {
  uint32_t highest = front() > 0 ? id_at(front() - 1) : 0;
  if (first_back() < kSlots) highest = max(highest, id_at(first_back()));
  uint32_t first = 0, last = token_max(highest);
  while (true) {
    const bool searching = ties && first < last;
    if (!__any_sync(kFullMask, searching)) return last;
    const uint32_t middle = (first + last) / 2;
    uint32_t found = 0;
#pragma unroll
    for (int e = 0; e < kSlots; ++e) {
      if (ranks[e] == low) found += has(e) && id_at(e) <= middle;
    }
    found = token_sum(found);
    if (searching && found >= wanted) {
      last = middle;
    } else if (searching) {
      first = middle + 1;
    }
  }
}

// Moves the entries together whose value is above `cut`.
template <typename T>
__device__ __forceinline__ void KeyList<T>::drop_below(const float (&values)[kSlots], float cut) {
  set_count(0);
#pragma unroll
  for (int first = 0; first < kSlots; first += kBatch) {
    float scores[kBatch][kPlanes];
    uint32_t ids[kBatch];
    bool passes[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      load_shared_floats<kPlanes>(scores_ + (first + i) * T::kScoreStride, scores[i]);
      ids[i] = id_at(first + i);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) passes[i] = values[first + i] > cut;
    append(passes, scores, ids);
  }
}

// Where a list that shares a token has become so long that it would soon be full again, the other
// takes over its last entries, half of what it has fewer.
template <typename T>
__device__ __forceinline__ void KeyList<T>::balance(int total) {
  const int own = count();
  const int other = total - own;
  const bool crowded = max(own, other) > (T::kFullSlots + total / 2) / 2;
  if (!__any_sync(kFullMask, crowded)) return;
  __syncwarp();
  const int moved = crowded ? abs(own - other) / 2 : 0;
  if (own < other) {
    // From the end, so that nothing is overwritten before it has moved.
    const uint32_t to_other = (threadIdx.x % kWarpSize < T::kTokensOfWarp ? 1 : -1) *
                              static_cast<uint32_t>(T::kTokensOfWarp);
    const uint32_t other_scores = scores_ + to_other * T::kScoreBytes;
    const uint32_t other_ids = ids_ + to_other * 2;
    int from_own = own - 1, from_other = other - 1;
    for (int to = own + moved - 1; to > from_own; --to) {
      const uint32_t other_id = load_shared_u16(other_ids + from_other * T::kIdStride);
      const bool take_own = from_own >= 0 && id_at(from_own) > other_id;
      float scores[kPlanes];
      load_shared_floats<kPlanes>((take_own ? scores_ + from_own * T::kScoreStride
                                            : other_scores + from_other * T::kScoreStride),
                                  scores);
      store_shared_floats<kPlanes>(scores_ + to * T::kScoreStride, scores);
      store_shared_u16(ids_ + to * T::kIdStride, take_own ? id_at(from_own) : other_id);
      from_own -= take_own;
      from_other -= !take_own;
    }
    set_count(own + moved);
  } else {
    set_count(own - moved);
  }
  __syncwarp();
}

// A cut that leaves as many of a token's values above it as are wanted, where there are too many;
// whether it was found. It is not where too many are equal, or one is no number.
template <typename T>
__device__ __forceinline__ bool KeyList<T>::search_values(const float (&values)[kSlots],
                                                          float highest, uint32_t total,
                                                          KeptCounts kept, bool too_many,
                                                          float* cut) const {
  constexpr int kMaxSteps = 16;
  float low = threshold_;  // all are above
  const bool is_first = !(low == low);
  if (__any_sync(kFullMask, is_first)) {
    float lowest = __uint_as_float(kInfinityBits);
#pragma unroll
    for (int e = 0; e < kSlots; ++e) lowest = has(e) ? fminf(lowest, values[e]) : lowest;
    lowest = fminf(lowest, __shfl_xor_sync(kFullMask, lowest, T::kTokensOfWarp));
    if (is_first) low = lowest;
  }
  ThresholdSearch search(low, highest, total);
  const float log_wanted = log2_fast(0.5f * (kept.least + kept.most));
  bool searching = too_many && highest == highest;
  bool found = false;
  for (int step = 0; step < kMaxSteps && __any_sync(kFullMask, searching); ++step) {
    const float value = search.guess(log_wanted, step);
    uint32_t counts[4] = {};
#pragma unroll
    for (int e = 0; e < kSlots; ++e) counts[e % 4] += is_greater(values[e], value);
    const uint32_t above = token_sum(counts[0] + counts[1] + counts[2] + counts[3]);
    if (!searching) continue;
    searching = value == value;
    if (searching &&
        !search.found(value, above, kept.least, kept.most_after(step, T::kMostEntries))) {
      searching = false;
      found = true;
    }
  }
  *cut = search.low;
  return found;
}

// Where `wanted`: raises the threshold, and makes the values that are kept, exactly kept.least of a
// token, infinite and all others minus infinity. Returns what those pass.
template <typename T>
__device__ __forceinline__ IdCut KeyList<T>::mark_exactly(float (&values)[kSlots], uint32_t total,
                                                          KeptCounts kept, bool wanted) {
  uint32_t ranks[kSlots];  // 0 where there is none, like a NaN
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll
  for (int e = 0; e < kSlots; ++e) {
    ranks[e] = has(e) ? sortable(values[e]) : 0;
    highest = max(highest, ranks[e]);
    if (has(e)) lowest = min(lowest, ranks[e]);
  }
  CutSearch search(token_min(lowest), token_max(highest), static_cast<float>(total));
  for (int step = 0;; ++step) {
    const bool open = wanted && search.open(kept.least);
    if (!__any_sync(kFullMask, open)) break;
    const uint32_t middle = search.guess(static_cast<float>(kept.least), step);
    uint32_t count = 0, least = 0xffffffffu, greatest = 0;
#pragma unroll
    for (int e = 0; e < kSlots; ++e) {
      const bool above = ranks[e] >= middle;
      count += above;
      if (above) least = min(least, ranks[e]);
      if (!above) greatest = max(greatest, ranks[e]);
    }
    count = token_sum(count);
    least = token_min(least);
    greatest = token_max(greatest);
    if (open) search.take(middle, count, kept.least);
    // Between these two is no number: few different ones take few steps.
    if (open && count >= kept.least) search.low = least;
    if (open && count < kept.least) search.high = greatest + 1;
  }
  const uint32_t last_tie = last_kept_tie(ranks, search.low, kept.least - search.count_high,
                                          wanted && search.ties(kept.least));
  if (wanted) threshold_ = threshold_at(search.low);
#pragma unroll
  for (int e = 0; e < kSlots; ++e) {
    const bool tie = has(e) && ranks[e] == search.low && id_at(e) <= last_tie;
    const float marked =
        __uint_as_float(ranks[e] > search.low || tie ? kInfinityBits : kInfinityBits | 0x80000000u);
    // Others get back what their ranks were made of: there are not registers for both.
    values[e] = wanted ? marked : value_of(ranks[e]);
  }
  return {search.low, last_tie};
}

// The ranks of the list's entries, minus infinity where there is none. Returns the token's highest;
// NaN if one is.
template <typename T>
__device__ __forceinline__ float KeyList<T>::load_values(float (&values)[kSlots]) const {
  KeyList own = *this;
  // Or the outcome would be kept for each slot until it is asked for again.
  if constexpr (T::kBothEnds) asm volatile("" : "+r"(own.filled_[0]), "+r"(own.filled_[1]));
  float highest[4];  // of every fourth
#pragma unroll
  for (int i = 0; i < 4; ++i) highest[i] = __uint_as_float(kInfinityBits | 0x80000000u);
#pragma unroll
  for (int e = 0; e < kSlots; ++e) {
    float scores[kPlanes];
    load_shared_floats<kPlanes>(scores_ + e * T::kScoreStride, scores);
    const float rank = rank_value<kPlanes>(filter_, scores);
    values[e] = own.has(e) ? rank : __uint_as_float(kInfinityBits | 0x80000000u);
    highest[e % 4] = max_or_nan(highest[e % 4], values[e]);
  }
  const float of_list =
      max_or_nan(max_or_nan(highest[0], highest[1]), max_or_nan(highest[2], highest[3]));
  return max_or_nan(of_list, __shfl_xor_sync(kFullMask, of_list, T::kTokensOfWarp));
}

template <typename T>
__device__ __forceinline__ void KeyList<T>::prune(KeptCounts kept) {
  float values[kSlots];
  const float highest = load_values(values);
  const uint32_t total = token_sum(count());
  const bool too_many = total > kept.most;
  float cut;
  const bool found = search_values(values, highest, total, kept, too_many, &cut);
  if (found) threshold_ = cut;
  const bool exactly = too_many && !found;
  if (__any_sync(kFullMask, exactly)) {
    mark_exactly(values, total, kept, exactly);
    if (exactly) cut = 0.0f;
  }
  if (too_many) drop_below(values, cut);
  balance(token_sum(count()));
}

template <typename T>
__device__ __forceinline__ IdCut KeyList<T>::find_cut(uint32_t m) {
  float values[kSlots];
  const float highest = load_values(values);
  const uint32_t total = token_sum(count());
  const KeptCounts kept{m, m};
  const bool too_many = total > m;
  IdCut cut{0, 0xffffffffu};
  float value;
  const bool found = search_values(values, highest, total, kept, too_many, &value);
  if (found) cut.rank = sortable(value) + 1;
  const bool exactly = too_many && !found;
  if (__any_sync(kFullMask, exactly)) {
    const IdCut exact = mark_exactly(values, total, kept, exactly);
    if (exactly) cut = exact;
  }
  return cut;
}

// Some of the warp's tokens, side by side to hide latency, whose lists have up to 32 * kHalf
// entries each.
template <typename T>
template <int kHalf, int kTokens>
__device__ __forceinline__ void KeyList<T>::write_tokens(
    const ProductKeyTopkParams& p, int64_t axis_row, int first_token,
    const Filled (&filled)[kTokens][kListsOfToken], const IdCut (&cuts)[kTokens], int lane) const {
  constexpr uint32_t kSlotBits = 7, kSlotMask = (1u << kSlotBits) - 1;
  static_assert(kSlots <= 1 << kSlotBits);
  constexpr uint32_t kNone = ~kSlotMask;  // an id that there is not, and a slot that there is
  const uint32_t scores = scores_ + T::token_scores(first_token) - T::scores_offset(lane);
  const uint32_t ids = ids_ + T::token_ids(first_token) - (T::ids_offset(lane) - T::ids_offset(0));
  // Ids, with where they are below: those of the first list ascending, those of the other
  // descending, are merged. Where entries go down from the last slot on, they come last here too,
  // after what there is not: each list rises and then falls, or the other way about.
  uint32_t keys[kTokens][2 * kHalf];
  int slots[kTokens][2 * kHalf];
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
#pragma unroll
    for (int i = 0; i < 2 * kHalf; ++i) {
      const int list = i / kHalf;
      const int place = list == 0 ? i * kWarpSize + lane : (2 * kHalf - i) * kWarpSize - 1 - lane;
      const int from_back = place + kSlots - kHalf * kWarpSize;
      const bool is_front = place < filled[k][list].front;
      const bool is_back = T::kBothEnds && from_back >= filled[k][list].first_back;
      const int slot = is_front ? place : max(from_back, 0);
      // Loaded whether there is one or not: no load waits for another.
      keys[k][i] =
          load_shared_u16(ids + (list * T::kListDistance + k) * T::kIdBytes + slot * T::kIdStride);
      slots[k][i] = is_front || is_back ? slot : -1;
    }
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
#pragma unroll
    for (int i = 0; i < 2 * kHalf; ++i) {
      const int list = i / kHalf;
      const uint32_t key = (keys[k][i] << 1 | list) << kSlotBits | slots[k][i];
      keys[k][i] = slots[k][i] >= 0 ? key : kNone;
    }
  }
  if constexpr (T::kBothEnds) merge_runs<kHalf>(keys, lane);
  merge_runs<2 * kHalf>(keys, lane);
  const uint32_t m = p.axis_topk;
  const uint32_t R = kPlanes < 4 ? kPlanes : p.tucker_rank;  // three take the place of four
  const uint32_t token_rows = 2 * p.num_heads;
  int32_t* axis_indices = p.axis_indices + axis_row * m;
  float* axis_scores = static_cast<float*>(p.axis_scores) + axis_row * (R * m);
  uint32_t num_kept[kTokens] = {};
#pragma unroll
  for (int i = 0; i < 2 * kHalf; ++i) {
    float of_key[kTokens][kPlanes];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const uint32_t list = keys[k][i] >> kSlotBits & 1;
      load_shared_floats<kPlanes>(scores + k * T::kScoreBytes +
                                      list * (T::kListDistance * T::kScoreBytes) +
                                      (keys[k][i] & kSlotMask) * T::kScoreStride,
                                  of_key[k]);
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const uint32_t id = keys[k][i] >> (kSlotBits + 1);
      const uint32_t rank = sortable(rank_value<kPlanes>(filter_, of_key[k]));
      // Without branches.
      const bool keeps =
          static_cast<int>(keys[k][i] != kNone) & static_cast<int>(cuts[k].keeps(rank, id));
      const uint32_t keepers = __ballot_sync(kFullMask, keeps);
      const uint32_t place = num_kept[k] + __popc(keepers & ((1u << lane) - 1));
      num_kept[k] += __popc(keepers);
      if (keeps) {
        axis_indices[k * token_rows * m + place] = static_cast<int32_t>(id);
#pragma unroll
        for (uint32_t r = 0; r < kPlanes; ++r) {
          if (kPlanes < 4 || r < R)
            axis_scores[(k * token_rows * R + r) * m + place] = of_key[k][r];
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void KeyList<T>::write(const ProductKeyTopkParams& p, int64_t axis_row,
                                                  int num_tokens, const IdCut& cut,
                                                  int lane) const {
  __syncwarp();  // the other lists of the warp's tokens are complete
  constexpr int kTokens = kSlots < 2 * kWarpSize ? 2 : 1;  // more where registers allow it
  static_assert(T::kTokensOfWarp % kTokens == 0);
  const int own = pack({front(), first_back()});
#pragma unroll 1
  for (int token = 0; token < num_tokens; token += kTokens) {
    Filled filled[kTokens][kListsOfToken];
    IdCut cuts[kTokens];
    int most = 0;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int list = 0; list < kListsOfToken; ++list) {
        int of_list = __shfl_sync(kFullMask, own, token + k + list * T::kTokensOfWarp);
        // A list of no token may have NaN.
        if (token + k >= num_tokens) of_list = pack({0, kSlots});
        filled[k][list] = unpack(of_list);
        most = max(most, filled[k][list].front + kSlots - filled[k][list].first_back);
      }
      cuts[k].rank = __shfl_sync(kFullMask, cut.rank, token + k);
      cuts[k].last_tie = __shfl_sync(kFullMask, cut.last_tie, token + k);
    }
    if (most <= kWarpSize) {
      write_tokens<1>(p, axis_row, token, filled, cuts, lane);
    } else if (kSlots <= 2 * kWarpSize || most <= 2 * kWarpSize) {
      write_tokens<2>(p, axis_row, token, filled, cuts, lane);
    } else {
      write_tokens<4>(p, axis_row, token, filled, cuts, lane);
    }
    axis_row += 2 * kTokens * p.num_heads;
  }
}

}  // namespace ultramem::cuda
