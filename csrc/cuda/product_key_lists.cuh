// The keys that a token keeps of one side: lists in shared memory, each of which one thread alone
// adds to and prunes.
//
// A thread sees scores in ascending order of key ids and adds what beats the token's threshold;
// when a list is nearly full, the threshold rises to the m-th best so far (or a little below) and
// what lies under it is dropped. Lists stay in ascending order of ids throughout, and a later score
// that only equals the threshold has lost the tie already.
//
// Slot s of all lists lies side by side: threads that add to different slots meet in no bank.
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
template <int kPlanes_, int kSlots_, int kLists_, int kCheckKeys_>
struct KeyListTraits {
  static constexpr int kPlanes = kPlanes_;  // scores of a key
  static constexpr int kSlots = kSlots_;
  static constexpr int kCheckKeys = kCheckKeys_;
  static constexpr int kLists = kLists_;
  static constexpr int kTokensOfWarp = kWarpSize / kListsOfToken;
  // With more entries a list must be pruned first.
  static constexpr int kFullSlots = kSlots - kCheckKeys;
  static constexpr int kMostEntries = kListsOfToken * kFullSlots;  // of a token after that
  static constexpr int kScoreBytes = 4 * kPlanes;
  static constexpr int kScoreStride = kLists * kScoreBytes;
  static constexpr int kIdStride = kLists * 2;
  static constexpr int kScoresPerId = kScoreStride / kIdStride;
  static constexpr int kIdsOffset = kSlots * kScoreStride;
  static constexpr int kBytes = kIdsOffset + kSlots * kIdStride;
  static_assert(kSlots % 4 == 0, "entries move four at a time");
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
      : scores_(shared + list * T::kScoreBytes), ids_(shared + T::kIdsOffset + list * 2) {
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) filter_[r] = filter[r];
    threshold_ = __uint_as_float(has_token ? kNanBits : kInfinityBits);
  }

  // Takes over what others have put into the list: `count` keys, all of which beat `threshold`.
  __device__ __forceinline__ void take_over(int count, float threshold) {
    set_count(count);
    threshold_ = threshold;
  }

  __device__ __forceinline__ int count() const { return end_ / T::kIdStride; }
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

  // The keys and scores of the warp's num_tokens tokens, m of each, go to memory in ascending order
  // of ids, from row `axis_row` on. `staging` has [kTokensOfWarp, m | 1] words in shared memory for
  // the warp, `places` a byte for each slot of the list, kLists apart. Every lane of the warp calls
  // it, after a last prune().
  __device__ __forceinline__ void write(const ProductKeyTopkParams& p, int64_t axis_row,
                                        int num_tokens, uint32_t staging, uint32_t places,
                                        int lane) const;

 private:
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

  __device__ __forceinline__ bool search_values(const float (&values)[kSlots], float highest,
                                                uint32_t total, KeptCounts kept, bool too_many,
                                                float* cut) const;
  __device__ __forceinline__ void mark_exactly(float (&values)[kSlots], uint32_t total,
                                               KeptCounts kept, bool wanted);
  __device__ __forceinline__ uint32_t last_kept_tie(const uint32_t (&ranks)[kSlots], uint32_t low,
                                                    uint32_t wanted, bool ties) const;
  __device__ __forceinline__ void drop_below(const float (&values)[kSlots], float cut);
  __device__ __forceinline__ void balance(int total);
  __device__ __forceinline__ void find_places(int first, int other, uint32_t other_ids,
                                              int (&places)[kBatch]) const;

  uint32_t scores_, ids_;  // shared addresses of slot 0
  uint32_t end_ = 0;       // how far beyond that of its id the first free slot has its own
  float filter_[kPlanes];
  float threshold_;  // keys that compare less or equal are out; NaN, which nothing does: none yet
};

// Of a token's entries of rank `low`, the `wanted` ones of lowest ids: the id of the last of them.
template <typename T>
__device__ __forceinline__ uint32_t KeyList<T>::last_kept_tie(const uint32_t (&ranks)[kSlots],
                                                              uint32_t low, uint32_t wanted,
                                                              bool ties) const {
  const int own = count();
  uint32_t first = 0, last = token_max(own > 0 ? id_at(own - 1) : 0);
  while (true) {
    const bool searching = ties && first < last;
    if (!__any_sync(kFullMask, searching)) return last;
    const uint32_t middle = (first + last) / 2;
    uint32_t found = 0;
#pragma unroll
    for (int e = 0; e < kSlots; ++e) {
      if (ranks[e] == low) found += e < own && id_at(e) <= middle;
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
    const int own = count();
    float lowest = __uint_as_float(kInfinityBits);
#pragma unroll
    for (int e = 0; e < kSlots; ++e) lowest = e < own ? fminf(lowest, values[e]) : lowest;
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
// token, infinite and all others minus infinity.
template <typename T>
__device__ __forceinline__ void KeyList<T>::mark_exactly(float (&values)[kSlots], uint32_t total,
                                                         KeptCounts kept, bool wanted) {
  const int own = count();
  uint32_t ranks[kSlots];  // 0 where there is none, like a NaN
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll
  for (int e = 0; e < kSlots; ++e) {
    ranks[e] = e < own ? sortable(values[e]) : 0;
    highest = max(highest, ranks[e]);
    if (e < own) lowest = min(lowest, ranks[e]);
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
    const bool tie = e < own && ranks[e] == search.low && id_at(e) <= last_tie;
    const float marked =
        __uint_as_float(ranks[e] > search.low || tie ? kInfinityBits : kInfinityBits | 0x80000000u);
    // Others get back what their ranks were made of: there are not registers for both.
    values[e] = wanted ? marked : value_of(ranks[e]);
  }
}

template <typename T>
__device__ __forceinline__ void KeyList<T>::prune(KeptCounts kept) {
  const int own = count();
  float values[kSlots];  // minus infinity where there is none
  float highest[4];      // of every fourth; NaN if one is
#pragma unroll
  for (int i = 0; i < 4; ++i) highest[i] = __uint_as_float(kInfinityBits | 0x80000000u);
#pragma unroll
  for (int e = 0; e < kSlots; ++e) {
    float scores[kPlanes];
    load_shared_floats<kPlanes>(scores_ + e * T::kScoreStride, scores);
    const float rank = rank_value<kPlanes>(filter_, scores);
    values[e] = e < own ? rank : __uint_as_float(kInfinityBits | 0x80000000u);
    highest[e % 4] = max_or_nan(highest[e % 4], values[e]);
  }
  float token_highest =
      max_or_nan(max_or_nan(highest[0], highest[1]), max_or_nan(highest[2], highest[3]));
  token_highest =
      max_or_nan(token_highest, __shfl_xor_sync(kFullMask, token_highest, T::kTokensOfWarp));
  const uint32_t total = token_sum(own);
  const bool too_many = total > kept.most;
  float cut;
  const bool found = search_values(values, token_highest, total, kept, too_many, &cut);
  if (found) threshold_ = cut;
  const bool exactly = too_many && !found;
  if (__any_sync(kFullMask, exactly)) {
    mark_exactly(values, total, kept, exactly);
    if (exactly) cut = 0.0f;
  }
  if (too_many) drop_below(values, cut);
  balance(token_sum(count()));
}

// Where kBatch entries of this list, from slot `first` on, come among all of the token's: how many
// of the other list have lower ids is searched for side by side.
template <typename T>
__device__ __forceinline__ void KeyList<T>::find_places(int first, int other, uint32_t other_ids,
                                                        int (&places)[kBatch]) const {
  uint32_t ids[kBatch];
  int before[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    ids[i] = id_at(min(first + i, kSlots - 1));
    before[i] = 0;
  }
#pragma unroll
  for (int step = next_power_of_two(kSlots + 1) / 2; step > 0; step /= 2) {
    uint32_t probed[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int probe = min(before[i] + step, kSlots);
      probed[i] = load_shared_u16(other_ids + (probe - 1) * T::kIdStride);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (before[i] + step <= other && probed[i] < ids[i]) before[i] += step;
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) places[i] = first + i + before[i];
}

// A word of each token's row in shared memory to that in memory, as many at a time as hide latency.
__device__ __forceinline__ void copy_column(uint32_t from, int row_bytes, int num_tokens,
                                            uint32_t* to, int64_t token_words) {
  constexpr int kAtOnce = 8;
  for (int first = 0; first < num_tokens; first += kAtOnce) {
    uint32_t words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      words[i] = first + i < num_tokens ? load_shared_u32(from + i * row_bytes) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < num_tokens) to[i * token_words] = words[i];
    }
    from += kAtOnce * row_bytes;
    to += kAtOnce * token_words;
  }
}

template <typename T>
__device__ __forceinline__ void KeyList<T>::write(const ProductKeyTopkParams& p, int64_t axis_row,
                                                  int num_tokens, uint32_t staging, uint32_t places,
                                                  int lane) const {
  __syncwarp();  // the other lists of the warp's tokens are complete
  const int m = p.axis_topk;
  const int stride = m | 1;
  const int own = count();
  const uint32_t staging_row = staging + lane % T::kTokensOfWarp * stride * 4;
  const int other = __shfl_xor_sync(kFullMask, own, T::kTokensOfWarp);
  const int neighbour = lane < T::kTokensOfWarp ? T::kTokensOfWarp : -T::kTokensOfWarp;
  for (int first = 0; first < own; first += kBatch) {
    int found[kBatch];
    find_places(first, other, ids_ + neighbour * 2, found);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < own) store_shared_u8(places + (first + i) * T::kLists, found[i]);
    }
  }
  const int64_t token_rows = int64_t{2} * p.num_heads;
  // The ids, then the scores of one rank after the other.
#pragma unroll 1
  for (int array = 0; array <= p.tucker_rank; ++array) {
    const int64_t width = array == 0 ? m : p.tucker_rank * m;
    auto* to =
        static_cast<uint32_t*>(array == 0 ? static_cast<void*>(p.axis_indices) : p.axis_scores) +
        axis_row * width + (array == 0 ? 0 : (array - 1) * m);
    const int64_t token_words = token_rows * width;
    for (int first = 0; first < own; first += kBatch) {
      uint32_t words[kBatch];
      int places_of[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = min(first + i, kSlots - 1);
        places_of[i] = slot;
        places_of[i] = load_shared_u8(places + slot * T::kLists);
        words[i] = array == 0 ? id_at(slot)
                              : load_shared_u32(scores_ + slot * T::kScoreStride + (array - 1) * 4);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < own) store_shared_u32(staging_row + places_of[i] * 4, words[i]);
      }
    }
    __syncwarp();
    for (int i = lane; i < m; i += kWarpSize) {
      copy_column(staging + i * 4, stride * 4, num_tokens, to + i, token_words);
    }
    __syncwarp();
  }
}

}  // namespace ultramem::cuda
