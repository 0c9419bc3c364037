// The best `keep` of a row of scores, in order: descending; equal scores (-0 equals +0) by the
// lower position; NaN below -inf.
#pragma once

#include <algorithm>

#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

__extension__ typedef unsigned __int128 Uint128;

// Score and position packed into one unsigned integer whose order is the one above.
template <typename Acc>
struct Candidate;
template <>
struct Candidate<float> {
  uint64_t key;
};
template <>
struct Candidate<double> {
  Uint128 key;
};

ULTRAMEM_ALWAYS_INLINE Candidate<float> make_candidate(float score, uint32_t position) {
  uint32_t bits = bits_of(score + 0.0f);  // -0 becomes +0
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0;
  return {static_cast<uint64_t>(bits) << 32 | ~position};
}
ULTRAMEM_ALWAYS_INLINE Candidate<double> make_candidate(double score, uint32_t position) {
  const double positive_zero = score + 0.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &positive_zero, sizeof bits);
  bits = bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
  if (score != score) bits = 0;
  return {static_cast<Uint128>(bits) << 64 | ~position};
}

template <typename Acc>
ULTRAMEM_ALWAYS_INLINE uint32_t position_of(Candidate<Acc> candidate) {
  return ~static_cast<uint32_t>(candidate.key);
}

template <typename Acc>
struct Best {
  bool operator()(const Candidate<Acc>& a, const Candidate<Acc>& b) const { return a.key > b.key; }
};

template <typename Acc>
constexpr Acc kMinusInfinity = -static_cast<Acc>(__builtin_inff());

// Above this many survivors of the bound, sorting beats counting.
constexpr int64_t kMaxCounted = 192;

// How many of the vectors' lanes are at least `bound`.
template <typename Acc>
ULTRAMEM_ALWAYS_INLINE int64_t count_greater_equal(const Acc* values, int64_t num_vecs, Acc bound) {
  const Vec<Acc> bounds = broadcast(bound);
  int64_t count = 0;
  for (int64_t v = 0; v < num_vecs; ++v) {
    count += __builtin_popcount(mask_greater_equal(load(values + v * kLanes<Acc>), bounds));
  }
  return count;
}

// A bound that at least `keep` scores reach, and not many more: the scores are dealt to 2 * keep or
// more groups (a lane of every num_groups-th vector), and a value close below the keep-th largest
// of the groups' maxima is found by bisection. Of scores in random order about 1.4 * keep reach it.
// -inf where NaNs leave too few.
template <typename Acc>
Acc lower_bound_of_topk(const Acc* scores, int64_t num_vecs, int64_t keep) {
  constexpr int kW = kLanes<Acc>;
  constexpr int kBisections = 10;
  const int64_t num_groups = div_up(2 * keep, kW);
  Acc maxima[2 * kMaxTopk + kW];
  const Vec<Acc> least = broadcast(kMinusInfinity<Acc>);
  Vec<Acc> lowest = -least, highest = least;
  for (int64_t g = 0; g < num_groups; ++g) {
    Vec<Acc> best = least;
    for (int64_t v = g; v < num_vecs; v += num_groups) {
      const Vec<Acc> score = load(scores + v * kW);
      best = score > best ? score : best;
    }
    store(maxima + g * kW, best);
    highest = best > highest ? best : highest;
    const Vec<Acc> low = best > least ? best : -least;
    lowest = low < lowest ? low : lowest;
  }
  Acc low = lowest[0], high = highest[0];
  for (int i = 1; i < kW; ++i) {
    low = smaller<Acc>(low, lowest[i]);
    high = larger<Acc>(high, highest[i]);
  }
  if (count_greater_equal(maxima, num_groups, low) < keep) return kMinusInfinity<Acc>;
  for (int i = 0; i < kBisections; ++i) {
    const Acc middle = Acc{0.5} * low + Acc{0.5} * high;
    if (count_greater_equal(maxima, num_groups, middle) >= keep) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Puts the position of each of the best `keep` where it belongs: at the number of better
// candidates. No branch to mispredict, and for float it vectorises. There is room for a vector
// beyond `found`.
inline void place_by_counting(Candidate<float>* candidates, int64_t found, int64_t keep,
                              int32_t* positions) {
  constexpr int kW = kVecBytes / static_cast<int>(sizeof(uint64_t));
  for (int i = 0; i < kW; ++i) candidates[found + i].key = 0;
  for (int64_t i = 0; i < found; i += kW) {
    VecU64 keys, places = {};
    __builtin_memcpy(&keys, candidates + i, sizeof keys);
    for (int64_t j = 0; j < found; ++j) {
      places -= (VecU64)((VecU64{} + candidates[j].key) > keys);
    }
    for (int lane = 0; lane < kW; ++lane) {
      if (places[lane] < static_cast<uint64_t>(keep) && i + lane < found) {
        positions[places[lane]] = static_cast<int32_t>(position_of<float>(candidates[i + lane]));
      }
    }
  }
}
inline void place_by_counting(Candidate<double>* candidates, int64_t found, int64_t keep,
                              int32_t* positions) {
  for (int64_t i = 0; i < found; ++i) {
    int64_t place = 0;
    for (int64_t j = 0; j < found; ++j) place += candidates[j].key > candidates[i].key;
    if (place < keep) positions[place] = static_cast<int32_t>(position_of<double>(candidates[i]));
  }
}

// positions[k] is where the k-th best of scores[0, count) stands. `scores` is padded with -inf to a
// whole number of vectors; `candidates` has room for a vector more than that; keep <= count.
template <typename Acc>
void select_topk(const Acc* scores, int64_t count, int64_t keep, Candidate<Acc>* candidates,
                 int32_t* positions) {
  constexpr int kW = kLanes<Acc>;
  const int64_t num_vecs = div_up(count, kW);
  const Acc bound =
      count > 3 * keep ? lower_bound_of_topk(scores, num_vecs, keep) : kMinusInfinity<Acc>;
  int64_t found = 0;
  if (bound > kMinusInfinity<Acc>) {
    const Vec<Acc> bounds = broadcast(bound);
    for (int64_t v = 0; v < num_vecs; ++v) {
      uint32_t mask = mask_greater_equal(load(scores + v * kW), bounds);
      for (; mask != 0; mask &= mask - 1) {
        const int64_t i = v * kW + __builtin_ctz(mask);
        candidates[found++] = make_candidate(scores[i], static_cast<uint32_t>(i));
      }
    }
  } else {
    for (; found < count; ++found) {
      candidates[found] = make_candidate(scores[found], static_cast<uint32_t>(found));
    }
  }

  if (found > kMaxCounted && found > keep) {
    std::nth_element(candidates, candidates + keep, candidates + found, Best<Acc>());
    found = keep;
  }
  if (found > kMaxCounted) {
    std::sort(candidates, candidates + found, Best<Acc>());
    for (int64_t k = 0; k < keep; ++k)
      positions[k] = static_cast<int32_t>(position_of(candidates[k]));
    return;
  }
  place_by_counting(candidates, found, keep, positions);
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
