// Where to cut a set of floats so that about as many lie above as are wanted.
#pragma once

#include "common.cuh"
#include "fast_math.cuh"

namespace ultramem::cuda {

inline constexpr uint32_t kNanBits = 0x7fffffffu;
inline constexpr uint32_t kLowestNumber = 0x007fffffu;  // the sortable rank of -inf

// A float of that sortable rank. Between -0 and +0, which are equal, lies a rank that no float has;
// it stands for +0, and so does the float.
__device__ __forceinline__ float value_of(uint32_t rank) {
  return __uint_as_float((rank & 0x80000000u) ? rank & 0x7fffffffu : ~rank);
}

// The largest float that everything of a higher sortable rank compares greater than: no value lies
// between -0 and +0.
__device__ __forceinline__ float threshold_at(uint32_t rank) {
  return value_of(rank - (rank == 0x7fffffffu));
}

// Whether an entry is among the best: of a higher sortable rank, or of this one and no higher id.
struct IdCut {
  uint32_t rank;
  uint32_t last_tie;

  __device__ __forceinline__ bool keeps(uint32_t entry_rank, uint32_t id) const {
    // Without branches.
    return static_cast<int>(entry_rank > rank) |
           (static_cast<int>(entry_rank == rank) & static_cast<int>(id <= last_tie));
  }
};

// Narrows down a value that between min and max of a set's numbers are above, for a caller who
// counts. How many scores lie above a value falls about exponentially with it, so a guess is a
// straight line through the logarithms of two counts; where that does not settle it soon, bisection
// does.
struct ThresholdSearch {
  float low;       // enough are > low
  float high;      // too few are > high
  float log_low;   // log2 of how many
  float log_high;  // log2 of how many; none count as half of one

  __device__ __forceinline__ ThresholdSearch(float lowest, float highest, uint32_t count)
      : low(lowest),
        high(highest),
        log_low(log2_fast(static_cast<float>(count))),
        log_high(-1.0f) {}

  // A value strictly between the two; NaN where there is none: what is > low but not > high all
  // equals high then. `step` counts the guesses of this search.
  __device__ __forceinline__ float guess(float log_wanted, int step) const {
    constexpr int kGuesses = 10;
    const float share = (log_low - log_wanted) * reciprocal_fast(log_low - log_high);
    // Not -0, which is not below a +0.
    float value = fmaf(high - low, fminf(fmaxf(share, 0.02f), 0.98f), low) + 0.0f;
    if (!(step < kGuesses && value > low && value < high)) {
      const uint32_t below = sortable(low);
      value = threshold_at(below + (sortable(high) - below) / 2);
    }
    return value > low && value < high ? value : __uint_as_float(kNanBits);
  }

  // Takes over how many are > value; whether the search goes on.
  __device__ __forceinline__ bool found(float value, uint32_t count, uint32_t min_count,
                                        uint32_t max_count) {
    if (count >= min_count) {
      low = value;
      log_low = log2_fast(static_cast<float>(count));
      return count > max_count;
    }
    high = value;
    log_high = log2_fast(fmaxf(static_cast<float>(count), 0.5f));
    return true;
  }
};

// Narrows down, in sortable ranks, where to cut a set of numbers so that between min and max of
// them are at or above the cut, for a caller who counts. Infinities are numbers like others here.
// Where equal numbers make it impossible, `low` is the number that only some of can be taken.
struct CutSearch {
  uint32_t low;         // enough are >= low
  uint32_t high;        // too few are >= high
  float count_low;      // how many are >= low, or about how many
  uint32_t count_high;  // how many are >= high

  // Steps that guess. In later ones the caller first narrows `low` to the least number that is >=
  // low and `high` to just above the greatest that is not >= high, which changes no count: a set
  // with few distinct numbers takes few more steps then.
  static constexpr int kGuesses = 4;

  __device__ __forceinline__ CutSearch(uint32_t lowest, uint32_t highest, float count)
      : low(lowest), high(highest + 1), count_low(count), count_high(0) {}

  __device__ __forceinline__ bool open(uint32_t max_count) const {
    return count_low > static_cast<float>(max_count) && high - low > 1;
  }
  // After the search: more than max_count are >= low, and too few are above.
  __device__ __forceinline__ bool ties(uint32_t max_count) const {
    return count_low > static_cast<float>(max_count);
  }

  struct Cut {
    uint32_t rank;
    float below;  // what compares greater is of this rank or a higher one
  };
  // A rank between the two, while the search is open.
  __device__ __forceinline__ uint32_t guess(float wanted, int step) const {
    return guess_cut(wanted, step).rank;
  }
  // `even` of 1 makes it the middle: between guesses where the slowest search counts.
  __device__ __forceinline__ Cut guess_cut(float wanted, int step, float even = 0.0f) const {
    if (step < kGuesses) {
      const float above = log2_fast(fmaxf(static_cast<float>(count_high), 0.5f));
      const float below = log2_fast(count_low);
      const float share = (below - log2_fast(wanted)) * reciprocal_fast(below - above);
      const float first = value_of(low), last = value_of(high);
      // Not -0, which is not below a +0.
      const float clamped = fminf(fmaxf(share, 0.02f), 0.98f);
      const float value = fmaf(last - first, fmaf(0.5f - clamped, even, clamped), first) + 0.0f;
      const uint32_t rank = sortable_number(value) + 1;  // of NaN it lies outside
      if (rank > low && rank < high) return {rank, value};
    }
    const uint32_t rank = low + (high - low) / 2;
    return {rank, threshold_at(rank - 1)};
  }

  // Cuts that are counted at once, while the search is open: the slowest of many searches takes two
  // steps where it took five. Those of the first step have 3.2, 1.6, 0.8 and 0.4 times as many at
  // or above them as are wanted, by the line through the logarithms, which many sets fall below;
  // where count_low is a guess the first is `low` itself, unless that is -inf, which nothing lies
  // below for numbers to be above. Later ones lie evenly in between.
  static constexpr int kCuts = 4;
  __device__ __forceinline__ void spread_cuts(float wanted, int step, bool count_is_guess,
                                              Cut (&cuts)[kCuts]) const {
    const float first = value_of(low), last = value_of(high);
    const float log_low = log2_fast(count_low);
    const float log_share = log_low - log2_fast(wanted) - 1.678f;
    const float scale = reciprocal_fast(log_low + 1.0f);
    const bool begins_at_low = step == 0 && count_is_guess && low > kLowestNumber;
#pragma unroll
    for (int i = 0; i < kCuts; ++i) {
      const float share =
          step == 0 ? fminf(fmaxf((log_share + static_cast<float>(i)) * scale, 0.02f), 0.98f)
                    : static_cast<float>(i + 1) * (1.0f / (kCuts + 1));
      // Not -0, which is not below a +0.
      float value = fmaf(last - first, share, first) + 0.0f;
      uint32_t rank = sortable_number(value) + 1;  // of NaN it lies outside
      const bool is_low = i == 0 && begins_at_low;
      if (is_low || !(step < kGuesses && rank > low && rank < high)) {
        rank = low + (is_low ? 0u : max((high - low) / (kCuts + 1) * (i + 1), 1u));
        value = threshold_at(rank - 1);
      }
      cuts[i] = {rank, value};
    }
  }

  // Takes over that `count` are >= rank.
  __device__ __forceinline__ void take(uint32_t rank, uint32_t count, uint32_t min_count) {
    if (count >= min_count) {
      low = rank;
      count_low = static_cast<float>(count);
    } else {
      high = rank;
      count_high = count;
    }
  }
  // The same where another cut may have told more already.
  __device__ __forceinline__ void take_too(uint32_t rank, uint32_t count, uint32_t min_count) {
    if (rank >= low && rank < high) take(rank, count, min_count);
  }
};

}  // namespace ultramem::cuda
