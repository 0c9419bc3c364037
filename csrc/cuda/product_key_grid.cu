// Product-key retrieval, forward, grid stage: the best M of the m * m pairs of kept keys.
//
// The rank of pair (i, j) is a product of R factors a side: the row's, with the summed cores folded
// in, and the column's; an additive score is the product (row, 1) . (1, col), the same sums. Ranks
// are computed where they are needed and never kept as a whole. Kept keys are in ascending order of
// their ids, so a pair's position i * m + j is ordered like its product index, which breaks ties.
//
// A warp per token searches a number that M pairs or a few more are at or above, lists those in the
// order of positions, and sorts them. Where equal pairs do not all fit, those above come first in
// the list and then as many of the equal as there is room for; NaN are taken like that, too.
//
// In additive mode a look at few of the pairs lists most tokens' (product_key_grid_additive.cuh);
// the others go the way of all.
#include <algorithm>

#include "async_copy.cuh"
#include "block_topk.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "product_key_grid_additive.cuh"
#include "product_key_topk_fwd.h"
#include "threshold_search.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = kThreads / kWarpSize;

// ---- m <= 32: a row per lane, all its ranks in registers
// -----------------------------------------

constexpr int kSmallRows = 32;

template <int kPlanes>
struct SmallLayout {
  using TokenView = Token<kPlanes, kSmallRows>;
  static constexpr int kMinFound = 2 * kWarpSize;

  SharedLayout shared;
  typename TokenView::Layout token;
  int ids;         // [2 m] int32
  int codes;       // [max_found] uint16
  int candidates;  // [max_found] uint64
  int max_found;
  int64_t bytes;  // of a warp

  __host__ __device__ explicit SmallLayout(const ProductKeyTopkParams& p) : token(shared) {
    // More room than topk lets the search stop early.
    const int roomy = next_power_of_two(p.topk + p.topk / 4);
    const int all = next_power_of_two(p.axis_topk * p.axis_topk);
    max_found = roomy < all ? roomy : all;
    if (max_found < kMinFound) max_found = kMinFound;
    ids = shared.take(4 * 2 * kSmallRows);
    codes = shared.take(int64_t{2} * max_found);
    candidates = shared.take(int64_t{8} * max_found);
    bytes = shared.bytes();
  }
};

// Lists the codes of at least topk pairs, all that are at or above a number *lowest, or so many of
// those that equal it that they are topk; equal pairs in the order of positions. With lowest = 0
// some are NaN. *highest is the best pair's, both sortable ranks. Returns how many.
template <int kPlanes>
__device__ __forceinline__ int list_small(const Token<kPlanes, kSmallRows>& token,
                                          const float (&row)[kPlanes], bool finite, int m,
                                          uint32_t topk, uint32_t max_found, int lane,
                                          uint16_t* codes, uint32_t* lowest, uint32_t* highest) {
  using TokenView = Token<kPlanes, kSmallRows>;
  const float nan = __uint_as_float(kNanBits);
  float ranks[kSmallRows];
  float row_best = nan;
#pragma unroll
  for (int j = 0; j < kSmallRows; j += kPacket) {
    float col[kPlanes][kPacket];
#pragma unroll
    for (int s = 0; s < kPlanes; ++s) {
      load_floats<kPacket>(token.cols + s * TokenView::kColStride + col_place(j), col[s]);
    }
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      float factors[kPlanes];
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) factors[s] = col[s][i];
      ranks[j + i] = rank_value<kPlanes>(row, factors);
      row_best = fmaxf(row_best, ranks[j + i]);
    }
  }
  // A bit per column.
  const auto columns = [&](auto wanted) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kSmallRows; ++j) bits |= wanted(ranks[j]) ? 1u << j : 0u;
    return bits;
  };
  *highest = warp_highest(row_best);
  uint32_t least, num_numbers = m * m;
  float count_low;
  if (finite && topk <= static_cast<uint32_t>(m)) {
    // The best of each row are enough, and about a sixth of a random grid is at or above the least
    // of them.
    least = warp_lowest(row_best);
    count_low = num_numbers <= max_found
                    ? num_numbers
                    : fmaxf(0.16f * num_numbers, static_cast<float>(max_found + 1));
  } else {
    float row_worst = nan;
#pragma unroll
    for (int j = 0; j < kSmallRows; ++j) row_worst = fminf(row_worst, ranks[j]);
    least = warp_lowest(row_worst);
    if (!finite) {
      num_numbers =
          __reduce_add_sync(kFullMask, __popc(columns([](float rank) { return rank == rank; })));
    }
    count_low = num_numbers;
  }

  const bool enough = num_numbers >= topk;  // or else every number is taken, and some NaN
  CutSearch search(least, *highest, count_low);
  const float wanted = 0.5f * topk + 0.25f * (topk + max_found);
  for (int step = 0; search.open(max_found); ++step) {
    if (step >= CutSearch::kGuesses) {
      NextNumbers next(search);
#pragma unroll
      for (int j = 0; j < kSmallRows; ++j) next.visit(ranks[j]);
      next.narrow(search);
      if (!search.open(max_found)) break;
    }
    const uint32_t guess = search.guess(wanted, step);
    const float value = threshold_at(guess - 1);
    uint32_t counts[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kSmallRows; ++j) counts[j % 2] += is_above(ranks[j], value);
    search.take(guess, __reduce_add_sync(kFullMask, counts[0] + counts[1]), topk);
  }

  const bool ties = search.ties(max_found);
  int num_found = 0;
  const auto list = [&](uint32_t bits, int limit) {
    int count;
    int place = num_found + warp_scan_exclusive(__popc(bits), lane, &count);
    for (; bits != 0 && place < limit; bits &= bits - 1) {
      codes[place++] = static_cast<uint16_t>(pair_code(lane, __ffs(static_cast<int>(bits)) - 1));
    }
    num_found = min(num_found + count, limit);
  };
  const float cut = value_of(!enough ? kLowestNumber : ties ? search.high : search.low);
  list(columns([cut](float rank) { return rank >= cut; }), static_cast<int>(max_found));
  if (!enough) {
    const uint32_t inside = lane < m ? 0xffffffffu >> (kSmallRows - m) : 0u;
    list(columns([](float rank) { return !(rank == rank); }) & inside, topk);
  } else if (ties) {
    const float tied = value_of(search.low);
    list(columns([tied](float rank) { return rank == tied; }), topk);
  }
  *lowest = enough ? search.low : 0u;
  return num_found;
}

template <int kPlanes, bool kAdditive>
__global__ void __launch_bounds__(kThreads, kPlanes == 2 ? 8 : 5)
    product_key_topk_fwd_grid_small_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                           const __grid_constant__ SmallLayout<kPlanes> layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename SmallLayout<kPlanes>::TokenView;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t token_head = int64_t{blockIdx.x} * kTokens + warp;
  if (token_head >= p.num_tokens * p.num_heads) {
    wait_for_prerequisite_grid();
    return;
  }
  unsigned char* shared = shared_bytes + warp * layout.bytes;
  auto* ids = reinterpret_cast<int32_t*>(shared + layout.ids);
  auto* codes = reinterpret_cast<uint16_t*>(shared + layout.codes);
  auto* candidates = reinterpret_cast<uint64_t*>(shared + layout.candidates);
  const int m = p.axis_topk;
  const uint32_t topk = p.topk;
  const uint32_t max_found = layout.max_found;
  const float nan = __uint_as_float(kNanBits);

  const TokenView token(p, token_head, shared, layout.token, lane);
  read_arguments(reinterpret_cast<uintptr_t>(p.axis_scores), layout.max_found);
  wait_for_prerequisite_grid();
  release_dependent_grid();
  int32_t own_ids[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) own_ids[i] = lane < m ? token.key_id(i * m + lane) : 0;
  float row[kPlanes], own_col[kPlanes];
  token.load_scores(lane, row, own_col);
  if constexpr (!kAdditive) token.store_core(lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (lane < m) ids[i * m + lane] = own_ids[i];
  }
#pragma unroll
  for (int s = 0; s < kPlanes; ++s) {
    token.cols[s * TokenView::kColStride + col_place(lane)] = own_col[s];
  }
  __syncwarp();
  if constexpr (!kAdditive) {
    float cbar[kPlanes][kPlanes];
    token.sum_cores(cbar);
    token.fold(cbar, row);
    if (lane >= m) row[0] = nan;
  }
#pragma unroll
  for (int s = 0; s < kPlanes; ++s) token.rows[s * TokenView::kRowStride + lane] = row[s];
  const bool finite = __all_sync(kFullMask, lane >= m || (is_finite(row) && is_finite(own_col)));

  uint32_t lowest, highest;
  uint32_t num_found = 0;
  if constexpr (kAdditive) {
    if (finite) {
      auto& scratch = *reinterpret_cast<AdditiveScratch<kSmallRows>*>(candidates);
      static_assert(sizeof(scratch) <= 8 * SmallLayout<kPlanes>::kMinFound);
      num_found = list_additive(token, m, topk, max_found, lane, scratch, codes, &lowest, &highest);
    }
  }
  if (num_found == 0) {
    num_found = list_small(token, row, finite, m, topk, max_found, lane, codes, &lowest, &highest);
  }
  sort_codes(codes, num_found, lowest, highest, candidates, lane,
             [&](int code) { return token.rank_of(code); });
  token.write(codes, ids, lane);
}

// ---- m > 32
// --------------------------------------------------------------------------------------

// Rows are cut into chunks of columns. Only chunks whose best is at or above a value are looked at
// pair by pair: if M pairs there are at or above it, no pair elsewhere is among the M best.
constexpr int kChunk = 16;
constexpr int kRowChunks = kMaxAxisTopk / kChunk;
constexpr int kLaneRows = kMaxAxisTopk / kWarpSize;
static_assert(kRowChunks * kLaneRows == kWarpSize, "a lane's chunks are the bits of an integer");

template <int kPlanes>
struct ChunkLayout {
  using TokenView = Token<kPlanes, kMaxAxisTopk>;
  static constexpr int kChunkBytes = 2 * kMaxAxisTopk * kRowChunks;

  SharedLayout shared;
  typename TokenView::Layout token;
  int maxima;  // [kRowChunks, kWarpSize, kLaneRows], before the following, in the same place
  int chunks;  // [kMaxAxisTopk * kRowChunks] uint16, the listed ones; later codes
  int codes;   // [max_found] uint16
  int keys;    // [max_found] sortable ranks, or [max_sorted] uint64
  int max_found;
  int max_sorted;
  int max_listed;  // of an additive grid: more room than topk lets the search stop early
  int64_t bytes;   // of a warp

  __host__ __device__ explicit ChunkLayout(const ProductKeyTopkParams& p) : token(shared) {
    const int all = next_power_of_two(p.axis_topk * p.axis_topk);
    const int best = next_power_of_two(p.topk);
    max_sorted = best < kMaxRegisterItems * kWarpSize ? kMaxRegisterItems * kWarpSize : best;
    // About twice topk pairs are found in the chunks that are listed, of some inputs more.
    max_found = best <= 256 ? 4 * best : best < 512 ? 1024 : 2 * best;
    if (max_found < max_sorted) max_found = max_sorted;
    if (max_found > all) max_found = all;
    const int roomy = next_power_of_two(p.topk + p.topk / 4);
    max_listed = roomy < 2 * kWarpSize ? 2 * kWarpSize : roomy;
    maxima = shared.take(0);
    chunks = shared.take(kChunkBytes);
    codes = shared.take(int64_t{2} * max_found);
    keys =
        shared.take(max_found > 2 * max_sorted ? int64_t{4} * max_found : int64_t{8} * max_sorted);
    const int64_t lacking = maxima + int64_t{4} * kMaxAxisTopk * kRowChunks - shared.bytes();
    if (lacking > 0) shared.take(lacking);
    bytes = shared.bytes();
  }
};

template <int kPlanes, bool kAdditive>
__global__ void __launch_bounds__(kThreads, kPlanes == 2 ? 7 : 5)
    product_key_topk_fwd_grid_chunks_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                            const __grid_constant__ ChunkLayout<kPlanes> layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename ChunkLayout<kPlanes>::TokenView;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t token_head = int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + warp;
  if (token_head >= p.num_tokens * p.num_heads) return;
  unsigned char* shared = shared_bytes + warp * layout.bytes;
  auto* stored_maxima = reinterpret_cast<float*>(shared + layout.maxima);
  auto* chunks = reinterpret_cast<uint16_t*>(shared + layout.chunks);
  auto* codes = reinterpret_cast<uint16_t*>(shared + layout.codes);
  auto* keys = reinterpret_cast<uint32_t*>(shared + layout.keys);
  auto* candidates = reinterpret_cast<uint64_t*>(shared + layout.keys);
  const int m = p.axis_topk;
  const int row_chunks = static_cast<int>(ceil_div(m, kChunk));
  const uint32_t topk = p.topk;
  const auto max_found = static_cast<uint32_t>(layout.max_found);
  const auto max_sorted = static_cast<uint32_t>(layout.max_sorted);
  const float nan = __uint_as_float(kNanBits);

  const TokenView token(p, token_head, shared, layout.token, lane);
  bool finite = true;
  {
    float row[kLaneRows][kPlanes];  // of rows lane, lane + 32, ...
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int index = i * kWarpSize + lane;
      float col[kPlanes];
      token.load_scores(index, row[i], col);
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        token.cols[s * TokenView::kColStride + col_place(index)] = col[s];
      }
      finite &= index >= m || is_finite(col);
    }
    if constexpr (!kAdditive) token.store_core(lane);
    __syncwarp();
    float cbar[kPlanes][kPlanes];
    if constexpr (!kAdditive) token.sum_cores(cbar);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int index = i * kWarpSize + lane;
      if constexpr (!kAdditive) token.fold(cbar, row[i]);
      if (index >= m) row[i][0] = nan;
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        token.rows[s * TokenView::kRowStride + index] = row[i][s];
      }
      finite &= index >= m || is_finite(row[i]);
    }
  }
  finite = __all_sync(kFullMask, finite);

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
        float factors[kPlanes];
#pragma unroll
        for (int s = 0; s < kPlanes; ++s) {
          factors[s] = token.rows[s * TokenView::kRowStride + chunk / kRowChunks];
        }
#pragma unroll
        for (int j = 0; j < kChunk; j += kPacket) {
          float col[kPlanes][kPacket];
#pragma unroll
          for (int s = 0; s < kPlanes; ++s) {
            load_floats<kPacket>(token.cols + s * TokenView::kColStride + col_place(first) + j,
                                 col[s]);
          }
#pragma unroll
          for (int x = 0; x < kPacket; ++x) {
            float one[kPlanes];
#pragma unroll
            for (int s = 0; s < kPlanes; ++s) one[s] = col[s][x];
            bits |= wanted(rank_value<kPlanes>(factors, one)) ? 1u << (j + x) : 0u;
          }
        }
        const int inside = m - first;
        if (inside < kChunk) bits &= (1u << inside) - 1;
      }
      int count;
      uint32_t place = num_found + warp_scan_exclusive(__popc(bits), lane, &count);
      const int code = pair_code(chunk / kRowChunks, chunk % kRowChunks * kChunk);
      for (; bits != 0 && place < limit; bits &= bits - 1) {
        codes[place++] = static_cast<uint16_t>(code + __ffs(static_cast<int>(bits)) - 1);
      }
      num_found += count;
    }
    return num_found;
  };

  uint32_t highest, lowest;  // sortable ranks: the best pair's; what listed pairs are at or above
  uint32_t lowest_maximum = 0;
  uint32_t num_found = 0;
  if constexpr (kAdditive) {
    if (finite) {
      auto& scratch = *reinterpret_cast<AdditiveScratch<kMaxAxisTopk>*>(chunks);
      static_assert(sizeof(scratch) <= ChunkLayout<kPlanes>::kChunkBytes);
      num_found =
          list_additive(token, m, topk, layout.max_listed, lane, scratch, codes, &lowest, &highest);
    }
  }
  const bool listed = num_found > 0;
  // At first about as few chunks are listed as hold topk pairs; where they do not, topk chunks.
#pragma unroll 1
  for (bool certain = false; !listed; certain = true) {
    float row[kLaneRows][kPlanes];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int s = 0; s < kPlanes; ++s) {
        row[i][s] = token.rows[s * TokenView::kRowStride + i * kWarpSize + lane];
      }
    }
    float row_best[kLaneRows] = {nan, nan, nan, nan};
#pragma unroll 1
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      float best[kLaneRows] = {nan, nan, nan, nan};  // NaN where a chunk has no number
      const float* cols = token.cols + col_place(chunk * kChunk);
#pragma unroll
      for (int j = 0; j < kChunk; j += kPacket) {
        if (chunk >= row_chunks) break;
        float col[kPlanes][kPacket];
#pragma unroll
        for (int s = 0; s < kPlanes; ++s) {
          load_floats<kPacket>(cols + s * TokenView::kColStride + j, col[s]);
        }
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          if (i >= 2 && m <= 2 * kWarpSize) break;
#pragma unroll
          for (int x = 0; x < kPacket; ++x) {
            float one[kPlanes];
#pragma unroll
            for (int s = 0; s < kPlanes; ++s) one[s] = col[s][x];
            best[i] = fmaxf(best[i], rank_value<kPlanes>(row[i], one));
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
    highest = warp_highest(best);
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

    CutSearch search(lowest_maximum, highest, count_low);
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
      const uint32_t guess = search.guess(0.5f * (min_chunks + max_chunks), step);
      const float value = value_of(guess);
      search.take(guess, count_chunks([value](float maximum) { return maximum >= value; }),
                  min_chunks);
    }
    lowest = everything ? kLowestNumber : search.low;
    const bool ties = !everything && search.ties(max_chunks);
    uint32_t listed = chunk_bits(value_of(lowest));
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
        uint32_t before = num_tied + warp_scan_exclusive(__popc(bits), lane, &count);
        num_tied += count;
        uint32_t kept = above >> (i * kRowChunks) & ((1u << kRowChunks) - 1);
        for (; bits != 0 && before < topk; bits &= bits - 1) {
          kept |= bits & -bits;
          ++before;
        }
        bits = kept;
      }
      int place = num_chunks + warp_scan_exclusive(__popc(bits), lane, &count);
      num_chunks += count;
      for (; bits != 0; bits &= bits - 1) {
        const int chunk = __ffs(static_cast<int>(bits)) - 1;
        chunks[place++] = static_cast<uint16_t>((i * kWarpSize + lane) * kRowChunks + chunk);
      }
    }
    __syncwarp();
    const float cut = value_of(lowest);
    num_found = list_pairs(0, max_found, [cut](float rank) { return rank >= cut; });
    if (num_found >= topk || everything || certain) break;
    __syncwarp();  // the maxima take the place of the list
  }

  if (num_found < topk) {
    lowest = 0;
    num_found = list_pairs(num_found, topk, [](float rank) { return !(rank == rank); });
    num_found = topk;
  } else if (num_found > max_found) {
    // More pairs than expected are in the chunks: the cut is raised, at first by the least, as in a
    // grid of equal pairs.
    CutSearch search(lowest, highest, static_cast<float>(num_found));
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
      uint32_t guess = lowest + 1;
      if (lowest == kLowestNumber) guess = max(guess, min(lowest_maximum, search.high - 1));
      if (step > 0) guess = search.guess(wanted, step - 1);
      const float value = value_of(guess);
      search.take(guess, list_pairs(0, 0, [value](float rank) { return rank >= value; }), topk);
    }
    __syncwarp();
    lowest = search.low;
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

  const auto rank_of = [&](int code) { return token.rank_of(code); };
  if (num_found > max_sorted) {
    // Fewer to sort: cut again, among what was found.
    for (uint32_t i = lane; i < num_found; i += kWarpSize) keys[i] = sortable(rank_of(codes[i]));
    CutSearch search(lowest, highest, static_cast<float>(num_found));
    const float wanted = 0.5f * (topk + max_sorted);
    for (int step = 0; search.open(max_sorted); ++step) {
      if (step >= CutSearch::kGuesses) {
        uint32_t least = 0xffffffffu, most = 0;
        for (uint32_t i = lane; i < num_found; i += kWarpSize) {
          if (keys[i] >= search.low) least = min(least, keys[i]);
          if (keys[i] < search.high) most = max(most, keys[i]);
        }
        search.low = __reduce_min_sync(kFullMask, least);
        search.high = __reduce_max_sync(kFullMask, most) + 1;
        if (!search.open(max_sorted)) break;
      }
      const uint32_t guess = search.guess(wanted, step);
      uint32_t count = 0;
      for (uint32_t i = lane; i < num_found; i += kWarpSize) count += keys[i] >= guess;
      search.take(guess, __reduce_add_sync(kFullMask, count), topk);
    }
    const bool ties = search.ties(max_sorted);
    const uint32_t cut = ties ? search.high : search.low;
    uint32_t num_kept = 0;
    for (int pass = 0; pass < (ties ? 2 : 1); ++pass) {
      const uint32_t limit = pass == 0 ? max_sorted : topk;
      for (uint32_t base = 0; base < num_found; base += kWarpSize) {
        const uint32_t i = base + lane;
        const bool take = i < num_found && (pass == 0 ? keys[i] >= cut : keys[i] == search.low);
        const uint32_t takers = __ballot_sync(kFullMask, take);
        const uint32_t place = num_kept + __popc(takers & ((1u << lane) - 1));
        if (take && place < limit) chunks[place] = codes[i];
        num_kept = min(num_kept + __popc(takers), limit);
      }
    }
    lowest = search.low;
    num_found = num_kept;
    codes = chunks;
    __syncwarp();
  }
  sort_codes(codes, static_cast<int>(num_found), lowest, highest, candidates, lane, rank_of);
  token.write(codes, token.ids(), lane);
}

template <int kPlanes, bool kAdditive>
Status launch(const ProductKeyTopkParams& p, Stream stream, bool overlapping) {
  const int64_t token_heads = p.num_tokens * p.num_heads;
  if (p.axis_topk <= kSmallRows) {
    const SmallLayout<kPlanes> layout(p);
    const int64_t bytes = layout.bytes * kTokens;
    const auto kernel = product_key_topk_fwd_grid_small_kernel<kPlanes, kAdditive>;
    ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
    const dim3 blocks(static_cast<unsigned>(ceil_div(token_heads, kTokens)));
    if (overlapping) {
      return launch_overlapping(kernel, blocks, kThreads, bytes, stream, p, layout);
    }
    kernel<<<blocks, kThreads, bytes, stream>>>(p, layout);
    return launch_status();
  }
  const ChunkLayout<kPlanes> layout(p);
  // As many tokens a block as leave room for two blocks.
  constexpr int64_t kBlockBytes = 96 * 1024;
  const int tokens =
      static_cast<int>(std::clamp(kBlockBytes / layout.bytes, int64_t{1}, int64_t{kTokens}));
  const auto kernel = product_key_topk_fwd_grid_chunks_kernel<kPlanes, kAdditive>;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, layout.bytes * tokens));
  kernel<<<static_cast<unsigned>(ceil_div(token_heads, tokens)), tokens * kWarpSize,
           layout.bytes * tokens, stream>>>(p, layout);
  return launch_status();
}

ULTRAMEM_REGISTER_KERNEL(small_2, "product_key_topk_fwd_grid_small<2>", kThreads,
                         product_key_topk_fwd_grid_small_kernel<2, false>);
ULTRAMEM_REGISTER_KERNEL(small_4, "product_key_topk_fwd_grid_small<4>", kThreads,
                         product_key_topk_fwd_grid_small_kernel<4, false>);
ULTRAMEM_REGISTER_KERNEL(small_additive, "product_key_topk_fwd_grid_small_additive", kThreads,
                         product_key_topk_fwd_grid_small_kernel<2, true>);
ULTRAMEM_REGISTER_KERNEL(chunks_2, "product_key_topk_fwd_grid_chunks<2>", kThreads,
                         product_key_topk_fwd_grid_chunks_kernel<2, false>);
ULTRAMEM_REGISTER_KERNEL(chunks_4, "product_key_topk_fwd_grid_chunks<4>", kThreads,
                         product_key_topk_fwd_grid_chunks_kernel<4, false>);
ULTRAMEM_REGISTER_KERNEL(chunks_additive, "product_key_topk_fwd_grid_chunks_additive", kThreads,
                         product_key_topk_fwd_grid_chunks_kernel<2, true>);

}  // namespace

Status launch_grid(const ProductKeyTopkParams& params, Stream stream, bool overlapping) {
  if (grid_block_applies(params)) return launch_grid_block(params, stream, overlapping);
  if (list_additive_applies(params)) return launch<2, true>(params, stream, overlapping);
  return params.tucker_rank <= 2 ? launch<2, false>(params, stream, overlapping)
                                 : launch<4, false>(params, stream, overlapping);
}

}  // namespace ultramem::cuda
