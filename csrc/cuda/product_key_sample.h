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

// A sample of the keys in so many tiles, of a piece of 64 keys for each of two blocks. A tile has a
// part of the ids for itself, so that of sorted scores not all have their best at the same places;
// of this part a piece has every stride-th key, one block's between the other's. At either end of a
// part up to 32 keys are left that are in none.
struct Sample {
  static constexpr int kBlocks = 2, kPieceKeys = 64;

  int part;    // keys of it
  int stride;  // from one to the next
  int left;    // keys of a part before its first one

  Sample() = default;
  Sample(int64_t num_keys, int tiles)
      : part(static_cast<int>(num_keys / std::max(tiles, 1))),
        stride(std::max(part / kPieceKeys, 1)),
        left(std::max(part - kPieceKeys * stride, 0) / 2) {}

  // With no key in two pieces.
  static int most_tiles(int64_t num_keys) {
    return static_cast<int>(num_keys / (kPieceKeys * kBlocks));
  }

  // The first block's; the second's is block_keys() further on.
  __host__ __device__ int first_key(int tile) const { return tile * part + left; }
  __host__ __device__ int block_keys() const { return stride / kBlocks; }
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

  // How many keys are above, on average.
  double found() const { return share * keys_; }

  // Of a list that has this part of the keys: room for as many above as there seldom are.
  double room(double part) const {
    constexpr double kDeviations = 4.5;
    const double mean = part * found();
    return mean * std::exp(kDeviations * std::sqrt(variance + (1 - part) / mean));
  }

 private:
  double keys_;
};

}  // namespace ultramem::cuda
