// Product-key retrieval, forward, grid stage: the best pairs by a look at all.
//
// Rows are cut into chunks of columns. Only chunks whose best is at or above a value are looked at
// pair by pair: if M pairs there are at or above it, no pair elsewhere is among the M best.
#pragma once

#include "common.cuh"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "threshold_search.cuh"

namespace ultramem::cuda {

inline constexpr int kChunk = 16;
inline constexpr int kRowChunks = kMaxAxisTopk / kChunk;
inline constexpr int kMaxChunks = kMaxAxisTopk * kRowChunks;

// Lists the codes of at least topk pairs and at most max_found: all that are at or above a number
// *lowest, or so many of those that equal it that they are topk; equal pairs in the order of
// positions. With lowest = 0 some are NaN. *highest is the best pair's, both sortable ranks.
// Returns how many. `finite`: every factor is. stored_maxima [kMaxChunks] may take the place of
// chunks [kMaxChunks] and codes.
template <int kPlanes>
__device__ __forceinline__ uint32_t list_chunks(const Token<kPlanes, kMaxAxisTopk>& token,
                                                bool finite, int m, uint32_t topk,
                                                uint32_t max_found, int lane, float* stored_maxima,
                                                uint16_t* chunks, uint16_t* codes, uint32_t* lowest,
                                                uint32_t* highest) {
  using TokenView = Token<kPlanes, kMaxAxisTopk>;
  constexpr int kLaneRows = kMaxAxisTopk / kWarpSize;
  static_assert(kRowChunks * kLaneRows == kWarpSize, "a lane's chunks are the bits of an integer");
  const int row_chunks = static_cast<int>(ceil_div(m, kChunk));
  const float nan = __uint_as_float(kNanBits);
  uint32_t lowest_maximum = 0;
  uint32_t num_found = 0;
  int num_chunks = 0;
  // Lists the pairs of the listed chunks that are wanted after the first num_found, in the order of
  // positions, as far as `limit`. Returns how many there are.
  const auto list_pairs = [&](uint32_t num_found, uint32_t limit, auto wanted) {
#pragma unroll 1
    for (int base = 0; base < num_chunks; base += kWarpSize) {
      uint32_t bits = 0;
      int chunk = 0;
      if (base + lane < num_chunks) {
        chunk = chunks[base + lane];
        const int first = chunk % kRowChunks * kChunk;
        const float* own_cols = token.cols + TokenView::col_place(first);
        float factors[kPlanes];
        token.load_row(chunk / kRowChunks, factors);
#pragma unroll
        for (int j = 0; j < kChunk; j += kPacket) {
          float cols[kPacket][kPlanes];
          token.load_packet(own_cols + j * kPlanes, cols);
#pragma unroll
          for (int x = 0; x < kPacket; ++x) {
            bits |= wanted(rank_value<kPlanes>(factors, cols[x])) ? 1u << (j + x) : 0u;
          }
        }
        const int inside = m - first;
        if (inside < kChunk) bits &= (1u << inside) - 1;
      }
      int count;
      uint32_t place = num_found + warp_scan_exclusive(__popc(bits), &count);
      const int code = pair_code(chunk / kRowChunks, chunk % kRowChunks * kChunk);
      for (; bits != 0 && place < limit; bits &= bits - 1) {
        codes[place++] = static_cast<uint16_t>(code + __ffs(static_cast<int>(bits)) - 1);
      }
      num_found += count;
    }
    return num_found;
  };

  // At first about as few chunks are listed as hold topk pairs; where they do not, topk chunks.
#pragma unroll 1
  for (bool certain = false;; certain = true) {
    float row[kLaneRows][kPlanes];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      token.load_row(i * kWarpSize + lane, row[i]);
    }
    float row_best[kLaneRows] = {nan, nan, nan, nan};
#pragma unroll 1
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      float best[kLaneRows] = {nan, nan, nan, nan};  // NaN where a chunk has no number
      const float* cols = token.cols + TokenView::col_place(chunk * kChunk);
#pragma unroll
      for (int j = 0; j < kChunk; j += kPacket) {
        if (chunk >= row_chunks) break;
        float packet[kPacket][kPlanes];
        token.load_packet(cols + j * kPlanes, packet);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          if (i >= 2 && m <= 2 * kWarpSize) break;
#pragma unroll
          for (int x = 0; x < kPacket; ++x) {
            best[i] = fmaxf(best[i], rank_value<kPlanes>(row[i], packet[x]));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) row_best[i] = fmaxf(row_best[i], best[i]);
      store_rounded<kLaneRows>(best, stored_maxima + (chunk * kWarpSize + lane) * kLaneRows);
    }
    // Calls visit(chunk, maxima) for the chunks of the lane's rows, NaN where there is no number. A
    // lane reads what it wrote: no barrier. They stay in shared memory to keep registers few.
    const auto for_each_chunk = [&](auto visit) {
#pragma unroll 2
      for (int chunk = 0; chunk < kRowChunks; ++chunk) {
        float maxima[kLaneRows];
        load_floats<kLaneRows>(stored_maxima + (chunk * kWarpSize + lane) * kLaneRows, maxima);
        visit(chunk, maxima);
      }
    };
    const auto count_chunks = [&](auto wanted) {
      uint32_t counts[2] = {0, 0};
      for_each_chunk([&](int, const float (&maxima)[kLaneRows]) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) counts[i % 2] += wanted(maxima[i]);
      });
      return __reduce_add_sync(kFullMask, counts[0] + counts[1]);
    };
    // Bit 8 i + chunk per chunk of the lane.
    const auto chunk_bits = [&](float value) {
      uint32_t bits = 0;
      for_each_chunk([&](int chunk, const float (&maxima)[kLaneRows]) {
        uint32_t rows = 0;
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          rows |= maxima[i] >= value ? 1u << (i * kRowChunks) : 0u;
        }
        bits |= rows << chunk;
      });
      return bits;
    };

    float least_best = row_best[0], best = row_best[0];
#pragma unroll
    for (int i = 1; i < kLaneRows; ++i) {
      least_best = fminf(least_best, row_best[i]);
      best = fmaxf(best, row_best[i]);
    }
    *highest = warp_highest(best);
    uint32_t numbers = m * row_chunks;
    // Random pairs fall into about as many chunks as that, factors that they share into fewer.
    const uint32_t min_chunks =
        certain ? topk : max(1u, topk * numbers * 7 / (8 * (topk + numbers)));
    const uint32_t max_chunks = min_chunks + min_chunks / 4 + 1;
    float count_low;
    if (finite && min_chunks <= static_cast<uint32_t>(m)) {
      lowest_maximum = warp_lowest(least_best);
      count_low = fmaxf(0.6f * numbers, static_cast<float>(max_chunks + 1));
    } else {
      float least = nan;
      for_each_chunk([&](int, const float (&maxima)[kLaneRows]) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) least = fminf(least, maxima[i]);
      });
      lowest_maximum = warp_lowest(least);
      if (!finite) numbers = count_chunks([](float maximum) { return maximum == maximum; });
      count_low = numbers;
    }
    const bool everything = numbers < min_chunks;

    CutSearch search(lowest_maximum, *highest, count_low);
    for (int step = 0; !everything && search.open(max_chunks); ++step) {
      if (step >= CutSearch::kGuesses) {
        NextNumbers next(search);
        for_each_chunk([&](int, const float (&maxima)[kLaneRows]) {
#pragma unroll
          for (int i = 0; i < kLaneRows; ++i) next.visit(maxima[i]);
        });
        next.narrow(search);
        if (!search.open(max_chunks)) break;
      }
      const CutSearch::Cut guess = search.guess_cut(0.5f * (min_chunks + max_chunks), step);
      const float below = guess.below;
      search.take(guess.rank, count_chunks([below](float maximum) { return maximum > below; }),
                  min_chunks);
    }
    *lowest = everything ? kLowestNumber : search.low;
    const bool ties = !everything && search.ties(max_chunks);
    uint32_t listed = chunk_bits(value_of(*lowest));
    uint32_t above = 0;
    if (ties) above = chunk_bits(value_of(search.high));
    if (everything) {
      // Those without a number as well.
      listed = 0;
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        if (i * kWarpSize + lane < m) listed |= ((1u << row_chunks) - 1) << (i * kRowChunks);
      }
    }
    __syncwarp();  // the list takes the place of the maxima

    num_chunks = 0;
    uint32_t num_tied = 0;  // and above, so far
#pragma unroll 1
    for (int i = 0; i < kLaneRows; ++i) {
      uint32_t bits = listed >> (i * kRowChunks) & ((1u << kRowChunks) - 1);
      int count;
      if (ties) {
        // Equal chunks that topk others come before have no pair among the best.
        uint32_t before = num_tied + warp_scan_exclusive(__popc(bits), &count);
        num_tied += count;
        uint32_t kept = above >> (i * kRowChunks) & ((1u << kRowChunks) - 1);
        for (; bits != 0 && before < topk; bits &= bits - 1) {
          kept |= bits & -bits;
          ++before;
        }
        bits = kept;
      }
      int place = num_chunks + warp_scan_exclusive(__popc(bits), &count);
      num_chunks += count;
      for (; bits != 0; bits &= bits - 1) {
        const int chunk = __ffs(static_cast<int>(bits)) - 1;
        chunks[place++] = static_cast<uint16_t>((i * kWarpSize + lane) * kRowChunks + chunk);
      }
    }
    __syncwarp();
    const float cut = value_of(*lowest);
    num_found = list_pairs(0, max_found, [cut](float rank) { return rank >= cut; });
    if (num_found >= topk || everything || certain) break;
    __syncwarp();  // the maxima take the place of the list
  }

  if (num_found < topk) {
    *lowest = 0;
    num_found = list_pairs(num_found, topk, [](float rank) { return !(rank == rank); });
    num_found = topk;
  } else if (num_found > max_found) {
    // More pairs than expected are in the chunks: the cut is raised, at first by the least, as in a
    // grid of equal pairs.
    CutSearch search(*lowest, *highest, static_cast<float>(num_found));
    const float wanted = 0.5f * (topk + max_found);
    for (int step = 0; search.open(max_found); ++step) {
      if (step >= CutSearch::kGuesses) {
        NextNumbers next(search);
        list_pairs(0, 0, [&](float rank) {
          next.visit(rank);
          return false;
        });
        next.narrow(search);
        if (!search.open(max_found)) break;
      }
      uint32_t guess = *lowest + 1;
      if (*lowest == kLowestNumber) guess = max(guess, min(lowest_maximum, search.high - 1));
      if (step > 0) guess = search.guess(wanted, step - 1);
      const float value = value_of(guess);
      search.take(guess, list_pairs(0, 0, [value](float rank) { return rank >= value; }), topk);
    }
    __syncwarp();
    *lowest = search.low;
    const bool ties = search.ties(max_found);
    const float cut = value_of(ties ? search.high : search.low);
    num_found = list_pairs(0, max_found, [cut](float rank) { return rank >= cut; });
    if (ties) {
      const float tied = value_of(search.low);
      list_pairs(num_found, topk, [tied](float rank) { return rank == tied; });
      num_found = topk;
    }
  }
  __syncwarp();
  return num_found;
}

}  // namespace ultramem::cuda
