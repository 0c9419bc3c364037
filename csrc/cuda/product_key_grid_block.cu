// Product-key retrieval, forward, grid stage with a block for each token and head: for so few of
// them that one warp each would leave most of the GPU without work.
//
// The threads hold the ranks of all m * m pairs in registers, search a number that M pairs or some
// more are at or above, list those in the order of positions and sort them. Ranks, order and ties
// are those of product_key_grid.cu.
#include <algorithm>

#include "async_copy.cuh"
#include "block_topk.cuh"
#include "common.cuh"
#include "device.h"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "product_key_topk_fwd.h"
#include "threshold_search.cuh"
#include "warp_group.cuh"

namespace ultramem::cuda {
namespace {

// A block holds the pairs of kRows rows and columns; a thread so many columns of a row, a bit each.
constexpr int kRowCells = 4;

// About two blocks for each multiprocessor of a GPU of today; for R above 2 these take turns.
constexpr int64_t kMaxTokenHeads = 264;
// Shared memory of a block that begins while the axis stage runs, if there are no more than
// multiprocessors: with as much there is one on each. They would all start on the few that the axis
// stage leaves free.
constexpr int64_t kLoneBytes = 116 * 1024;
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
    bytes = shared.bytes();
  }
};

// Sorts `count` pairs, of which those of equal rank are in the order of positions, into the codes
// of the first topk.
template <int kRows, typename RankOf>
__device__ __forceinline__ void sort_pairs(const uint16_t* found, uint32_t* ranks,
                                           uint64_t* candidates, uint32_t count, uint32_t topk,
                                           uint16_t* codes, RankOf rank_of) {
  constexpr int kThreads = BlockTraits<kRows>::kThreads;
  constexpr uint32_t kMaxCounted = BlockTraits<kRows>::kMaxCounted;
  const uint32_t thread = threadIdx.x;
  if (count <= kMaxCounted) {
    // An entry that is nobody's lies below all.
    if (thread < kMaxCounted) ranks[thread] = thread < count ? sortable(rank_of(found[thread])) : 0;
    __syncthreads();
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
    if (thread % 2 == 0 && entry < count && place < topk) codes[place] = found[entry];
    __syncthreads();
    return;
  }
  const auto size = static_cast<uint32_t>(next_power_of_two(static_cast<int>(count)));
  for (uint32_t i = thread; i < size; i += kThreads) {
    candidates[i] = i < count ? make_candidate(sortable(rank_of(found[i])), found[i]) : 0;
  }
  __syncthreads();
  bitonic_sort_descending(candidates, static_cast<int>(size), static_cast<int>(thread), kThreads,
                          [] { __syncthreads(); });
  for (uint32_t i = thread; i < topk; i += kThreads) {
    codes[i] = static_cast<uint16_t>(candidate_position(candidates[i]));
  }
  __syncthreads();
}

template <int kPlanes, int kRows>
__global__ void __launch_bounds__(BlockTraits<kRows>::kThreads, 1)
    product_key_topk_fwd_grid_block_kernel(
        const __grid_constant__ ProductKeyTopkParams p,
        const __grid_constant__ BlockLayout<kPlanes, kRows> layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename BlockLayout<kPlanes, kRows>::TokenView;
  constexpr int kCellCols = BlockTraits<kRows>::kCellCols;
  constexpr int kThreads = BlockTraits<kRows>::kThreads;
  constexpr int kWarps = BlockTraits<kRows>::kWarps;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  auto* row_scores = reinterpret_cast<float*>(shared_bytes + layout.row_scores);
  auto* ids = reinterpret_cast<int32_t*>(shared_bytes + layout.ids);
  auto* found = reinterpret_cast<uint16_t*>(shared_bytes + layout.found);
  auto* codes = reinterpret_cast<uint16_t*>(shared_bytes + layout.codes);
  WarpGroup block(reinterpret_cast<uint32_t*>(shared_bytes + layout.slots), 0, warp, kWarps);
  const int m = p.axis_topk;
  const uint32_t topk = p.topk;
  const auto max_found = static_cast<uint32_t>(layout.max_found);
  const float nan = __uint_as_float(kNanBits);

  const TokenView token(p, blockIdx.x, shared_bytes, layout.token, lane);
  read_arguments(reinterpret_cast<uintptr_t>(p.axis_scores), layout.max_found);
  wait_for_prerequisite_grid();
  release_dependent_grid();
  float zero = 0.0f;
  int32_t key_ids[2] = {0, 0};
  const int own_key = thread - kRows;  // of those threads that load no scores
  const bool has_ids = own_key >= 0 && own_key < kRows;
  if (has_ids) token.load_ids(0, own_key, key_ids);
  float row[kPlanes];
  if (thread < kRows) {
    float col[kPlanes];
    token.load_row_scores(0, thread, row);
    token.load_col_scores(0, thread, col);
    add_zeros(col, &zero);
    if (thread >= m) col[0] = nan;
    token.store_col(thread, col);
    store_rounded<kPlanes>(row, row_scores + thread * kPlanes);
  }
  if (warp == 0) token.store_core(lane);
  if (has_ids) {
#pragma unroll
    for (int side = 0; side < 2; ++side) ids[side * kRows + own_key] = key_ids[side];
  }
  __syncthreads();
  if (thread < kRows) {
    if (!token.additive()) {
      float cbar[kPlanes][kPlanes];
      token.sum_cores(cbar);
      token.fold(cbar, row);
    }
    add_zeros(row, &zero);
    if (thread >= m) row[0] = nan;
    token.store_row(thread, row);
  }
  const bool finite = __syncthreads_and(zero == 0.0f);

  const int own_row = thread / kRowCells;
  const int first_col = thread % kRowCells * kCellCols;
  float ranks[kCellCols];
  float cell_best = nan;
  token.load_row(own_row, row);
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
  uint32_t highest = sortable(cell_best);
  uint32_t lowest, num_numbers = m * m;
  float count_low;
  if (finite && topk <= static_cast<uint32_t>(m)) {
    // As in product_key_grid.cu: the best of each row are enough.
    float row_best = cell_best;
#pragma unroll
    for (int delta = 1; delta < kRowCells; delta *= 2) {
      row_best = fmaxf(row_best, __shfl_xor_sync(kFullMask, row_best, delta));
    }
    lowest = lowest_of(row_best);
    block.extremes(&lowest, &highest);
    count_low = fmaxf(0.16f * num_numbers, static_cast<float>(max_found + 1));
  } else {
    float cell_worst = nan;
#pragma unroll
    for (int j = 0; j < kCellCols; ++j) cell_worst = fminf(cell_worst, ranks[j]);
    lowest = lowest_of(cell_worst);
    block.extremes(&lowest, &highest);
    if (!finite) num_numbers = block.sum(__popc(columns([](float x) { return x == x; })));
    count_low = num_numbers;
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
    const CutSearch::Cut guess = search.guess_cut(wanted, step);
    uint32_t counts[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kCellCols; ++j) counts[j % 2] += is_above(ranks[j], guess.below);
    search.take(guess.rank, block.sum(counts[0] + counts[1]), topk);
  }

  const bool ties = enough && search.ties(max_found);
  const auto list = [&](uint32_t num_found, uint32_t bits, uint32_t limit) {
    uint32_t count;
    uint32_t place = num_found + block.scan_exclusive(__popc(bits), &count);
    for (; bits != 0 && place < limit; bits &= bits - 1) {
      const int col = first_col + __ffs(static_cast<int>(bits)) - 1;
      found[place++] = static_cast<uint16_t>(pair_code(own_row, col));
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
  __syncthreads();
  sort_pairs<kRows>(found, reinterpret_cast<uint32_t*>(shared_bytes + layout.ranks),
                    reinterpret_cast<uint64_t*>(shared_bytes + layout.candidates), num_found, topk,
                    codes, [&](int code) { return token.rank_of(code); });
  token.write(codes, row_scores, ids, thread, kThreads);
}

template <int kPlanes, int kRows>
Status launch(const ProductKeyTopkParams& p, Stream stream, bool overlapping) {
  constexpr int kThreads = BlockTraits<kRows>::kThreads;
  const BlockLayout<kPlanes, kRows> layout(p);
  const auto kernel = product_key_topk_fwd_grid_block_kernel<kPlanes, kRows>;
  const dim3 blocks(static_cast<unsigned>(p.num_tokens * p.num_heads));
  if (overlapping) {
    // Where a block may not have as much, none begins early.
    const bool alone =
        static_cast<int>(blocks.x) <= multiprocessors() && kLoneBytes <= max_shared_bytes();
    const int64_t bytes = std::max(layout.bytes, alone ? kLoneBytes : 0);
    ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
    return launch_overlapping(kernel, blocks, kThreads, bytes, stream, p, layout);
  }
  kernel<<<blocks, kThreads, layout.bytes, stream>>>(p, layout);
  return launch_status();
}

#define ULTRAMEM_REGISTER_BLOCK(planes, rows)                                             \
  ULTRAMEM_REGISTER_KERNEL(                                                               \
      block_##planes##_##rows, "product_key_topk_fwd_grid_block<" #planes ", " #rows ">", \
      BlockTraits<rows>::kThreads, product_key_topk_fwd_grid_block_kernel<planes, rows>)
ULTRAMEM_REGISTER_BLOCK(2, 32);
ULTRAMEM_REGISTER_BLOCK(4, 32);
ULTRAMEM_REGISTER_BLOCK(2, 128);
ULTRAMEM_REGISTER_BLOCK(4, 128);

}  // namespace

bool grid_block_applies(const ProductKeyTopkParams& p) {
  return p.num_tokens * p.num_heads <= kMaxTokenHeads;
}

Status launch_grid_block(const ProductKeyTopkParams& params, Stream stream, bool overlapping) {
  if (params.axis_topk <= kSmallRows) {
    return params.tucker_rank <= 2 ? launch<2, kSmallRows>(params, stream, overlapping)
                                   : launch<4, kSmallRows>(params, stream, overlapping);
  }
  return params.tucker_rank <= 2 ? launch<2, kMaxAxisTopk>(params, stream, overlapping)
                                 : launch<4, kMaxAxisTopk>(params, stream, overlapping);
}

}  // namespace ultramem::cuda
