// Exact top-k in a total order, as pieces that a warp or a block puts together.
//
// A candidate is one 64-bit key: the sortable rank above, the inverted position below. Unsigned
// descending order of such keys is the order of product_key_topk.h, and since no two candidates of
// a row share a position, no two keys are equal: whatever order candidates are found in, the sorted
// list is the same. Selection is a threshold search (bisection of the bits of a rank),
// a collection and a bitonic sort of the k survivors only; no input is a bad case for any of them.
#pragma once

#include "common.cuh"

namespace ultramem::cuda {

__host__ __device__ __forceinline__ uint64_t make_candidate(uint32_t rank, uint32_t position) {
  return static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(~position);
}
__host__ __device__ __forceinline__ uint32_t candidate_rank(uint64_t candidate) {
  return static_cast<uint32_t>(candidate >> 32);
}
__host__ __device__ __forceinline__ uint32_t candidate_position(uint64_t candidate) {
  return ~static_cast<uint32_t>(candidate);
}

__host__ __device__ constexpr int next_power_of_two(int x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

struct Threshold {
  uint32_t value;
  bool exact;  // exactly k values are >= value; otherwise more are, and value is the k-th largest
};

// Where to cut a set of unsigned values below 2^num_bits, of which there are at least k, to keep
// the k largest. count_at_least(x) is how many are >= x, for x > 0, and the same in all
// participating threads; it may contain barriers.
template <typename CountAtLeast>
__device__ __forceinline__ Threshold find_threshold(int k, int num_bits,
                                                    CountAtLeast count_at_least) {
  uint32_t value = 0;
  for (int bit = num_bits - 1; bit >= 0; --bit) {
    const uint32_t raised = value | 1u << bit;
    const int count = count_at_least(raised);
    if (count == k) return {raised, true};
    if (count > k) value = raised;
  }
  return {value, false};
}

// Sorts `size` (a power of two) candidates in shared memory, largest first. sync() is the barrier
// of the `num_threads` threads that take part; one must lie between the writes of `data` and this.
template <typename Sync>
__device__ __forceinline__ void bitonic_sort_descending(uint64_t* data, int size, int thread,
                                                        int num_threads, Sync sync) {
  for (int width = 2; width <= size; width *= 2) {
    for (int stride = width / 2; stride > 0; stride /= 2) {
      for (int pair = thread; pair < size / 2; pair += num_threads) {
        const int low = 2 * pair - (pair & (stride - 1));
        const int high = low + stride;
        const bool descending = (low & width) == 0;
        const uint64_t first = data[low];
        const uint64_t second = data[high];
        if ((first < second) == descending) {
          data[low] = second;
          data[high] = first;
        }
      }
      sync();
    }
  }
}

// One step of a sort of 32 * kItems keys in a warp's registers: compares each key with that at
// `flip` of its place, and puts the larger one where the place lacks the bit `stride`. Key
// kItems * lane + i is keys[i] of that lane.
template <int kItems, typename Key>
__device__ __forceinline__ void order_register_pairs(Key (&keys)[kItems], int lane, int stride,
                                                     int flip) {
  if (stride >= kItems) {
    const bool keep_smaller = (lane & (stride / kItems)) != 0;
    Key others[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      others[i] = __shfl_xor_sync(kFullMask, keys[i ^ (flip % kItems)], flip / kItems);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((keys[i] < others[i]) != keep_smaller) keys[i] = others[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((i & stride) != 0) continue;
      const Key first = keys[i], second = keys[i ^ flip];
      keys[i] = max(first, second);
      keys[i ^ flip] = min(first, second);
    }
  }
}

// Sorts keys that rise up to some place and fall from there on, or the other way round.
template <int kItems, typename Key>
__device__ __forceinline__ void bitonic_merge_registers_descending(Key (&keys)[kItems], int lane) {
#pragma unroll
  for (int stride = kWarpSize * kItems / 2; stride > 0; stride /= 2) {
    order_register_pairs(keys, lane, stride, stride);
  }
}

// Halves of what is merged are first compared from the outside in, so that all comparisons put the
// larger key first.
template <int kItems, typename Key>
__device__ __forceinline__ void bitonic_sort_registers_descending(Key (&keys)[kItems], int lane) {
#pragma unroll
  for (int width = 2; width <= kWarpSize * kItems; width *= 2) {
    order_register_pairs(keys, lane, width / 2, width - 1);
#pragma unroll
    for (int stride = width / 4; stride > 0; stride /= 2) {
      order_register_pairs(keys, lane, stride, stride);
    }
  }
}

// Of two such lists of keys, both in descending order and the second half as long: the best, as
// many as the first has places.
template <int kItems, typename Key>
__device__ __forceinline__ void merge_registers_descending(Key (&keys)[kItems],
                                                           const Key (&others)[kItems / 2],
                                                           int lane) {
  // From the last place on, against the first of the others: lanes of the upper half.
  const int opposite = 2 * (kWarpSize - 1 - lane);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = kItems - 1 - i;
    const Key other =
        __shfl_sync(kFullMask, others[place % (kItems / 2)], opposite + place / (kItems / 2));
    if (lane >= kWarpSize / 2) keys[i] = max(keys[i], other);
  }
  bitonic_merge_registers_descending(keys, lane);
}

// Sorts runs of kRun * 32 numbers, each of which first rises and then falls or the other way about,
// number `i * 32 + lane` being keys[i] of a lane: ascending, every second descending. Tokens go
// side by side to hide latency.
template <int kRun, int kTokens, int kKeys>
__device__ __forceinline__ void merge_runs(uint32_t (&keys)[kTokens][kKeys], int lane) {
#pragma unroll
  for (int stride = kRun / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if ((i & stride) != 0) continue;
        const bool descends = i / kRun % 2 != 0;
        const uint32_t lower = min(keys[k][i], keys[k][i + stride]);
        const uint32_t greater = max(keys[k][i], keys[k][i + stride]);
        keys[k][i] = descends ? greater : lower;
        keys[k][i + stride] = descends ? lower : greater;
      }
    }
  }
#pragma unroll
  for (int stride = kWarpSize / 2; stride > 0; stride /= 2) {
    const bool is_second = (lane & stride) != 0;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const bool takes_greater = i / kRun % 2 == 0 ? is_second : !is_second;
        const uint32_t other = __shfl_xor_sync(kFullMask, keys[k][i], stride);
        if ((other > keys[k][i]) == takes_greater) keys[k][i] = other;
      }
    }
  }
}

// One warp: makes `kept` the best `limit` of itself and of `num_ranks` new entries, whose
// positions count up from first_position and lie above all positions kept so far. Entries stay in
// the order of their positions, which is what resolves ties: the first of equals are taken.
// Returns how many are kept. The warp must be synchronised (__syncwarp) after the writes of
// `kept` and `ranks`; it is when this returns.
__device__ __forceinline__ int merge_best(uint64_t* kept, int num_kept, const uint32_t* ranks,
                                          int num_ranks, uint32_t first_position, int limit,
                                          int lane) {
  const int num_items = num_kept + num_ranks;
  const int k = min(limit, num_items);
  const auto count_at_least = [&](uint32_t threshold) {
    int count = 0;
    for (int i = lane; i < num_kept; i += kWarpSize) count += candidate_rank(kept[i]) >= threshold;
    for (int i = lane; i < num_ranks; i += kWarpSize) count += ranks[i] >= threshold;
    return __reduce_add_sync(kFullMask, count);
  };
  const Threshold threshold = find_threshold(k, 32, count_at_least);
  // No rank is 2^32 - 1 (+inf is the largest), so the sum does not wrap.
  int ties_left = threshold.exact ? num_items : k - count_at_least(threshold.value + 1);

  const unsigned lower_lanes = (1u << lane) - 1;
  int out = 0;
  for (int base = 0; base < num_items; base += kWarpSize) {
    const int i = base + lane;
    uint64_t item = 0;
    if (i < num_kept) {
      item = kept[i];
    } else if (i < num_items) {
      item = make_candidate(ranks[i - num_kept], first_position + (i - num_kept));
    }
    const uint32_t rank = candidate_rank(item);
    const bool tie = i < num_items && rank == threshold.value;
    const unsigned ties = __ballot_sync(kFullMask, tie);
    const bool take = i < num_items &&
                      (rank > threshold.value || (tie && __popc(ties & lower_lanes) < ties_left));
    const unsigned taken = __ballot_sync(kFullMask, take);
    // out <= base: a write can only hit an entry of this or an earlier round.
    __syncwarp();
    if (take) kept[out + __popc(taken & lower_lanes)] = item;
    out += __popc(taken);
    ties_left -= min(ties_left, __popc(ties));
  }
  __syncwarp();
  return out;
}

}  // namespace ultramem::cuda
