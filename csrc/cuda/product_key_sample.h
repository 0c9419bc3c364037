// A sample of the keys, and a bound of a token's m best from its scores, for kernels whose keys
// pass twice: at first the sample, then all, of which those above the bound are kept.
//
// Of k scores of a sample being above a number, how many keys are above it is known in
// distribution, hardly depending on what the scores are, unless these follow the order of the keys
// in step with the sample. So a number can be guessed that hardly ever less than m keys are above.
// A kernel counts what it keeps, and does without a guess that was wrong.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ultramem::cuda {

// A sample in pieces of up to 64 keys, evenly spaced, no key in two: of a piece every stride-th
// from a first one of its own on. Up to `stride` pieces; the few keys at either end that are left
// are in none of them.
struct Sample {
  static constexpr int kPieceKeys = 64;

  int stride;
  int first;
  int keys;  // of a piece

  explicit Sample(int64_t num_keys)
      : stride(static_cast<int>(std::max<int64_t>(num_keys / kPieceKeys, 1))),
        first(static_cast<int>(std::max<int64_t>(num_keys - kPieceKeys * stride, 0) / 2)),
        keys(static_cast<int>(std::min<int64_t>(num_keys, kPieceKeys))) {}

  __host__ __device__ int first_key(int piece, int pieces) const {
    return first + piece * stride / pieces;
  }
};

// A number that hardly ever, for a few tokens in a million, less than m of the keys are above, from
// the maxima of columns: tiles of a sample take turns at as many sets of `columns` columns, each of
// their keys at one of its own.
struct GuessedBound {
  double share;     // of the keys, that are above
  double variance;  // of the logarithm of how many there are
  double maxima;    // above

  GuessedBound(int64_t num_keys, int m, int columns, int tiles, int turns) : keys_(num_keys) {
    constexpr int kSteps = 8;
    constexpr double kMostShare = 0.5;
    share = m / keys_;
    for (int step = 0; step < kSteps; ++step) {
      // What the number of maxima leaves open of the share, but for the keys that are these.
      double slope = 0, spread = 0;
      maxima = 0;
      for (int turn = 0; turn < turns; ++turn) {
        const int keys = (tiles + turns - 1 - turn) / turns;
        double others_below = 1;
        for (int i = 1; i < keys; ++i) others_below *= 1 - share;
        const double above = 1 - others_below * (1 - share);
        maxima += columns * above;
        spread += columns * above * (1 - above);
        slope += columns * keys * others_below * share;
      }
      variance = std::max(1 - maxima / (share * keys_), 0.0) * spread / (slope * slope);
      // Five deviations, and more the wider the distribution is: it leans to few.
      const double deviation = std::sqrt(variance);
      const double wanted = m / keys_ * std::exp((5 + 4 * deviation) * deviation);
      share = std::min(std::sqrt(share * wanted), kMostShare);
    }
  }

  // Of a list that has this part of the keys: room for as many above as there seldom are.
  double room(double part) const {
    constexpr double kDeviations = 4.5;
    const double mean = part * share * keys_;
    return mean * std::exp(kDeviations * std::sqrt(variance + (1 - part) / mean));
  }

 private:
  double keys_;
};

}  // namespace ultramem::cuda
