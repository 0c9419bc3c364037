// Product-key retrieval, forward, grid stage with a block for each token and head: what comes when
// the kept keys of both sides are in shared memory.
//
// The threads hold the ranks of all m * m pairs in registers, search a number that M pairs or some
// more are at or above, list those in the order of positions and sort them. Ranks, order and ties
// are those of product_key_grid.cu.
#pragma once

#include "block_topk.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "threshold_search.cuh"
#include "warp_group.cuh"

namespace ultramem::cuda {

// A block holds the pairs of kRows rows and columns; a thread so many columns of a row, a bit each.
inline constexpr int kRowCells = 4;

template <int kRows>
struct BlockTraits {
  static constexpr int kCellCols = kRows / kRowCells;
  static constexpr int kThreads = kRows * kRowCells;
  static constexpr int kWarps = kThreads / kWarpSize;
  // Up to so many pairs are sorted by counting, for each, those before it: two threads a pair.
  static constexpr int kMaxCounted = kThreads / 2;
  static_assert(kCellCols <= 32 && kWarps <= WarpGroup::kMaxWarps);
};

template <int kPlanes, int kRows>
struct BlockLayout {
  using TokenView = Token<kPlanes, kRows>;

  SharedLayout shared;
  typename TokenView::Layout token;
  int row_scores;  // [kRows, kPlanes], not folded
  int ids;         // [2, kRows] int32, of the kept keys
  int found;       // [max_found] uint16, codes of the pairs that were found
  int ranks;       // [max_found] their sortable ranks
  int candidates;  // [max_found] uint64, where they are many
  int codes;       // [max_found] uint16, in the order of ranks
  int slots;       // of the WarpGroup
  int spoilt;      // uint32, not zero: a factor is not finite
  int max_found;   // a power of two
  int64_t bytes;

  __host__ __device__ explicit BlockLayout(const ProductKeyTopkParams& p) : token(shared) {
    // More room than topk lets the search stop early.
    const int roomy = next_power_of_two(p.topk + p.topk / 4);
    max_found = roomy < 64 ? 64 : roomy;
    row_scores = shared.take(4 * kPlanes * kRows);
    ids = shared.take(4 * 2 * kRows);
    found = shared.take(int64_t{2} * max_found);
    constexpr int kMaxCounted = BlockTraits<kRows>::kMaxCounted;
    ranks = shared.take(int64_t{4} * (max_found < kMaxCounted ? kMaxCounted : max_found));
    candidates = shared.take(int64_t{8} * max_found);
    codes = shared.take(int64_t{2} * max_found);
    slots = shared.take(4 * WarpGroup::kSlots);
    spoilt = shared.take(4);
    bytes = shared.bytes();
  }
};

// Where a block keeps what the layout names.
struct BlockArrays {
  template <typename Layout>
  __device__ __forceinline__ BlockArrays(const Layout& layout, unsigned char* shared)
      : row_scores(reinterpret_cast<float*>(shared + layout.row_scores)),
        ids(reinterpret_cast<int32_t*>(shared + layout.ids)),
        found(reinterpret_cast<uint16_t*>(shared + layout.found)),
        ranks(reinterpret_cast<uint32_t*>(shared + layout.ranks)),
        candidates(reinterpret_cast<uint64_t*>(shared + layout.candidates)),
        codes(reinterpret_cast<uint16_t*>(shared + layout.codes)),
        slots(reinterpret_cast<uint32_t*>(shared + layout.slots)),
        spoilt(reinterpret_cast<uint32_t*>(shared + layout.spoilt)) {}

  float* row_scores;
  int32_t* ids;
  uint16_t* found;
  uint32_t* ranks;
  uint64_t* candidates;
  uint16_t* codes;
  uint32_t* slots;
  uint32_t* spoilt;
};

// Writes the first topk of `count` pairs, of which those of equal rank are in the order of
// positions. Their sortable ranks are in `ranks`; an entry that is nobody's lies below all.
template <int kPlanes, int kRows>
__device__ __forceinline__ void write_sorted(const Token<kPlanes, kRows>& token,
                                             const BlockArrays& arrays, uint32_t count,
                                             uint32_t topk, uint32_t thread, WarpGroup& block) {
  constexpr int kThreads = BlockTraits<kRows>::kThreads;
  constexpr uint32_t kMaxCounted = BlockTraits<kRows>::kMaxCounted;
  const uint32_t* ranks = arrays.ranks;
  if (count <= kMaxCounted) {
    const uint32_t entry = thread / 2;
    const uint32_t own_four = entry / 4;
    uint32_t place = 0;
    const uint32_t own = ranks[entry];
    if (entry / (kWarpSize / 2) * (kWarpSize / 2) < count) {
#pragma unroll 4
      for (uint32_t four = thread % 2; four < (count + 3) / 4; four += 2) {
        const uint4 others = reinterpret_cast<const uint4*>(ranks)[four];
        // Equals come before where they stand before: no rank is the largest integer.
        const uint32_t least = own + (four >= own_four);
        place += others.x >= least;
        place += others.y >= least;
        place += others.z >= least;
        place += others.w >= least;
      }
      place += __shfl_xor_sync(kFullMask, place, 1);
#pragma unroll
      for (uint32_t i = 0; i < 3; ++i) {
        place += own_four * 4 + i < entry && ranks[own_four * 4 + i] == own;
      }
    }
    if (thread % 2 == 0 && entry < count && place < topk) {
      token.write_pair(static_cast<int>(place), arrays.found[entry], arrays.row_scores, arrays.ids);
    }
    return;
  }
  const auto size = static_cast<uint32_t>(next_power_of_two(static_cast<int>(count)));
  for (uint32_t i = thread; i < size; i += kThreads) {
    arrays.candidates[i] = i < count ? make_candidate(ranks[i], arrays.found[i]) : 0;
  }
  block.sync();
  bitonic_sort_descending(arrays.candidates, static_cast<int>(size), static_cast<int>(thread),
                          kThreads, [&] { block.sync(); });
  for (uint32_t i = thread; i < topk; i += kThreads) {
    arrays.codes[i] = static_cast<uint16_t>(candidate_position(arrays.candidates[i]));
  }
  block.sync();
  token.write(arrays.codes, arrays.row_scores, arrays.ids, static_cast<int>(thread), kThreads);
}

// What `choose_pairs` begins with, a barrier ahead of it.
template <int kRows>
__device__ __forceinline__ void clear_pairs(const BlockArrays& arrays, int thread,
                                            int num_threads) {
  for (int i = thread; i < BlockTraits<kRows>::kMaxCounted; i += num_threads) arrays.ranks[i] = 0;
  if (thread == 0) *arrays.spoilt = 0;
}

// Chooses and writes the best topk pairs of the token, whose row_scores, ids and factors of columns
// are in shared memory, as are the cores, of which cbar is the sum. `thread` is one of the first
// kThreads of the block, whose group `block` is.
template <int kPlanes, int kRows>
__device__ __forceinline__ void choose_pairs(const Token<kPlanes, kRows>& token,
                                             const BlockArrays& arrays,
                                             const float (&cbar)[kPlanes][kPlanes], int m,
                                             uint32_t topk, uint32_t max_found, int thread,
                                             WarpGroup& block) {
  constexpr int kCellCols = BlockTraits<kRows>::kCellCols;
  const float nan = __uint_as_float(kNanBits);
  const int own_row = thread / kRowCells;
  const int first_col = thread % kRowCells * kCellCols;
  float ranks[kCellCols];
  float cell_best = nan;
  float row[kPlanes];
  load_floats<kPlanes>(arrays.row_scores + own_row * kPlanes, row);
  if (!token.additive()) token.fold(cbar, row);
  float zero = 0.0f;
  add_zeros(row, &zero);
  if (thread < m) {
    float col[kPlanes];
    token.load_col(thread, col);
    add_zeros(col, &zero);
  }
  if (!(zero == 0.0f)) *arrays.spoilt = 1;
  if (own_row >= m) row[0] = nan;
#pragma unroll
  for (int j = 0; j < kCellCols; j += kPacket) {
    float cols[kPacket][kPlanes];
    token.load_cols(first_col + j, cols);
#pragma unroll
    for (int x = 0; x < kPacket; ++x) {
      ranks[j + x] = rank_value<kPlanes>(row, cols[x]);
      cell_best = fmaxf(cell_best, ranks[j + x]);
    }
  }
  // A bit per column.
  const auto columns = [&](auto wanted) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kCellCols; ++j) bits |= wanted(ranks[j]) ? 1u << j : 0u;
    return bits;
  };
  const auto lowest_of = [](float x) { return x == x ? sortable(x) : 0xffffffffu; };
  const auto lowest_of_all = [&] {
    float cell_worst = nan;
#pragma unroll
    for (int j = 0; j < kCellCols; ++j) cell_worst = fminf(cell_worst, ranks[j]);
    return lowest_of(cell_worst);
  };
  uint32_t highest = sortable(cell_best);
  uint32_t lowest, num_numbers = m * m;
  float count_low = num_numbers;
  bool count_is_guess = false;
  const bool of_rows = topk <= static_cast<uint32_t>(m);
  if (of_rows) {
    // As in product_key_grid.cu: where all is finite the best of each row are enough.
    float row_best = cell_best;
#pragma unroll
    for (int delta = 1; delta < kRowCells; delta *= 2) {
      row_best = fmaxf(row_best, __shfl_xor_sync(kFullMask, row_best, delta));
    }
    lowest = lowest_of(row_best);
  } else {
    lowest = lowest_of_all();
  }
  block.extremes(&lowest, &highest);
  if (*arrays.spoilt != 0) {
    if (of_rows) lowest = block.lowest(lowest_of_all());
    num_numbers = block.sum(__popc(columns([](float x) { return x == x; })));
    count_low = num_numbers;
  } else if (of_rows) {
    count_low = fmaxf(0.16f * num_numbers, static_cast<float>(max_found + 1));
    count_is_guess = true;
  }

  const bool enough = num_numbers >= topk;  // or else every number is taken, and some NaN
  CutSearch search(lowest, highest, count_low);
  const float wanted = 0.75f * topk + 0.25f * max_found;
  for (int step = 0; enough && search.open(max_found); ++step) {
    if (step >= CutSearch::kGuesses) {
      NextNumbers next(search);
#pragma unroll
      for (int j = 0; j < kCellCols; ++j) next.visit(ranks[j]);
      search.low = block.lowest(lowest_of(next.least()));
      search.high = block.highest(sortable(next.most())) + 1;
      if (!search.open(max_found)) break;
    }
    if constexpr (kRows <= kSmallRows) {
      CutSearch::Cut cuts[CutSearch::kCuts];
      search.spread_cuts(wanted, step, count_is_guess, cuts);
      uint32_t counts[CutSearch::kCuts] = {};
#pragma unroll
      for (int j = 0; j < kCellCols; ++j) {
#pragma unroll
        for (int i = 0; i < CutSearch::kCuts; ++i) counts[i] += is_above(ranks[j], cuts[i].below);
      }
      static_assert(CutSearch::kCuts == 4 && kSmallRows * kSmallRows < 1 << 16);
      uint32_t sums[2] = {counts[0] | counts[1] << 16, counts[2] | counts[3] << 16};
      block.sums(sums);
#pragma unroll
      for (int i = 0; i < CutSearch::kCuts; ++i) {
        search.take_too(cuts[i].rank, sums[i / 2] >> 16 * (i % 2) & 0xffffu, topk);
      }
    } else {
      const CutSearch::Cut guess = search.guess_cut(wanted, step, step > 0 ? 0.25f : 0.0f);
      uint32_t counts[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < kCellCols; ++j) counts[j % 2] += is_above(ranks[j], guess.below);
      search.take(guess.rank, block.sum(counts[0] + counts[1]), topk);
    }
  }

  const bool ties = enough && search.ties(max_found);
  const auto list = [&](uint32_t num_found, uint32_t bits, uint32_t limit) {
    uint32_t count;
    uint32_t place = num_found + block.scan_exclusive(__popc(bits), &count);
    for (; bits != 0 && place < limit; bits &= bits - 1) {
      const int col = first_col + __ffs(static_cast<int>(bits)) - 1;
      float factors[kPlanes];
      token.load_col(col, factors);
      arrays.found[place] = static_cast<uint16_t>(pair_code(own_row, col));
      arrays.ranks[place++] = sortable(rank_value<kPlanes>(row, factors));
    }
    return min(num_found + count, limit);
  };
  const float cut = value_of(!enough ? kLowestNumber : ties ? search.high : search.low);
  uint32_t num_found = list(0, columns([cut](float rank) { return rank >= cut; }), max_found);
  if (!enough) {
    const int inside_cols = own_row < m ? min(max(m - first_col, 0), kCellCols) : 0;
    const uint32_t inside = inside_cols == 0 ? 0u : 0xffffffffu >> (32 - inside_cols);
    num_found = list(num_found, columns([](float rank) { return !(rank == rank); }) & inside, topk);
  } else if (ties) {
    const float tied = value_of(search.low);
    num_found = list(num_found, columns([tied](float rank) { return rank == tied; }), topk);
  }
  block.sync();
  write_sorted(token, arrays, num_found, topk, static_cast<uint32_t>(thread), block);
}

}  // namespace ultramem::cuda
