// Product-key retrieval, forward, grid stage: the best M of the m * m pairs of kept keys.
//
// The rank of pair (i, j) is a product of R factors a side: the row's, with the summed cores folded
// in, and the column's; an additive score is the product (row, 1) . (1, col), the same sums. Ranks
// are computed where they are needed and never kept as a whole. Kept keys are in ascending order of
// their ids, so a pair's position i * m + j is ordered like its product index, which breaks ties.
//
// A warp per token lists the pairs at or above a number that M pairs or some more are, in the order
// of positions, and sorts them. Where equal pairs do not all fit, those above come first in the
// list and then as many of the equal as there is room for; NaN are taken like that, too.
//
// A look at few of the pairs lists most tokens' (product_key_grid_guess.cuh), a look at all those
// of the others (product_key_grid_chunks.cuh). Few kept keys and few tokens have kernels of their
// own.
#include <algorithm>

#include "async_copy.cuh"
#include "block_topk.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "product_key_grid_chunks.cuh"
#include "product_key_grid_guess.cuh"
#include "product_key_topk_fwd.h"
#include "threshold_search.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = kThreads / kWarpSize;
constexpr int kLaneRows = kMaxAxisTopk / kWarpSize;

template <int kPlanes>
struct GridLayout {
  using TokenView = Token<kPlanes, kMaxAxisTopk>;
  static_assert(4 * kPlanes * kMaxAxisTopk <= 8 * kMaxRegisterItems * kWarpSize);

  SharedLayout shared;
  typename TokenView::Layout token;
  int maxima;  // [kMaxChunks], before the following, in the same place
  int codes;   // [max_found] uint16
  int chunks;  // [kMaxChunks] uint16, the listed ones; or a GuessScratch; or [max_sorted] uint16,
               // codes. With the latter two:
  int keys;    // [max_found] sortable ranks, or [max_sorted] uint64; before, factors for guesses;
               // after, [2, kMaxAxisTopk] int32, ids
  int max_found;
  int max_sorted;
  float num_guessed;  // as many pairs are guessed for: 0 where guesses are not tried
  int64_t bytes;      // of a warp

  explicit GridLayout(const ProductKeyTopkParams& p) : token(shared) {
    const int all = next_power_of_two(p.axis_topk * p.axis_topk);
    const int best = next_power_of_two(p.topk);
    max_sorted = best < kMaxRegisterItems * kWarpSize ? kMaxRegisterItems * kWarpSize : best;
    // About twice topk pairs are found in the chunks that are listed, of some inputs more.
    max_found = best <= 256 ? 4 * best : best < 512 ? 1024 : 2 * best;
    if (max_found < max_sorted) max_found = max_sorted;
    if (max_found > all) max_found = all;
    num_guessed = list_guessed_applies(p) ? pairs_to_guess(p.topk, max_sorted) : 0.0f;
    maxima = shared.take(0);
    codes = shared.take(int64_t{2} * max_found);
    // Of the place of the chunks, what is in use while keys are. The listed chunks reach into
    // these, and the maxima over all three.
    chunks = shared.take(std::max(static_cast<int>(sizeof(GuessScratch)), 2 * max_sorted));
    keys = shared.take(std::max(int64_t{4} * max_found, int64_t{8} * max_sorted));
    for (const int end : {chunks + 2 * kMaxChunks, maxima + 4 * kMaxChunks}) {
      if (end > shared.bytes()) shared.take(end - shared.bytes());
    }
    bytes = shared.bytes();
  }
};

// Fewer to sort: cuts again, among the codes that were found, all of which lie in *lowest ..
// highest. Writes topk to max_sorted of them to `kept`, in their order, and raises *lowest. Returns
// how many.
template <int kPlanes>
__device__ __forceinline__ uint32_t cut_listed(const Token<kPlanes, kMaxAxisTopk>& token,
                                               const uint16_t* codes, uint32_t num_found,
                                               uint32_t topk, uint32_t max_sorted, int lane,
                                               uint32_t* keys, uint16_t* kept, uint32_t* lowest,
                                               uint32_t highest) {
  for (uint32_t i = lane; i < num_found; i += kWarpSize) {
    keys[i] = sortable(token.rank_of(codes[i]));
  }
  CutSearch search(*lowest, highest, static_cast<float>(num_found));
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
      if (take && place < limit) kept[place] = codes[i];
      num_kept = min(num_kept + __popc(takers), limit);
    }
  }
  *lowest = search.low;
  __syncwarp();
  return num_kept;
}

template <int kPlanes>
__global__ void __launch_bounds__(kThreads, kPlanes == 2 ? 8 : 5)
    product_key_topk_fwd_grid_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                     const __grid_constant__ GridLayout<kPlanes> layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename GridLayout<kPlanes>::TokenView;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_of(threadIdx.x);
  const uint32_t token_head = blockIdx.x * (blockDim.x / kWarpSize) + warp;
  wait_for_prerequisite_grid();
  release_dependent_grid();
  if (token_head >= static_cast<uint32_t>(p.num_tokens) * p.num_heads) return;
  unsigned char* shared = shared_bytes + warp * static_cast<int>(layout.bytes);
  auto* stored_maxima = reinterpret_cast<float*>(shared + layout.maxima);
  auto* chunks = reinterpret_cast<uint16_t*>(shared + layout.chunks);
  auto* codes = reinterpret_cast<uint16_t*>(shared + layout.codes);
  auto* keys = reinterpret_cast<uint32_t*>(shared + layout.keys);
  auto* candidates = reinterpret_cast<uint64_t*>(shared + layout.keys);
  const int m = p.axis_topk;
  const uint32_t topk = p.topk;
  const auto max_found = static_cast<uint32_t>(layout.max_found);
  const auto max_sorted = static_cast<uint32_t>(layout.max_sorted);
  const float nan = __uint_as_float(kNanBits);

  const TokenView token(p, token_head, shared, layout.token, lane);
  float zero = 0.0f;
  {
    float row[kLaneRows][kPlanes], col[kLaneRows][kPlanes];  // of keys lane, lane + 32, ...
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      token.load_row_scores(i, lane, row[i]);
      token.load_col_scores(i, lane, col[i]);
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      add_zeros(col[i], &zero);
      if (i * kWarpSize + lane >= m) col[i][0] = nan;
      token.store_col(i, lane, col[i]);
    }
    token.store_core(lane);
    __syncwarp();
    if (!token.additive()) {
      float cbar[kPlanes][kPlanes];
      token.sum_cores(cbar);
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) token.fold(cbar, row[i]);
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int index = i * kWarpSize + lane;
      add_zeros(row[i], &zero);
      if (index >= m) row[i][0] = nan;
      token.store_row(index, row[i]);
    }
  }
  const bool finite = __all_sync(kFullMask, zero == 0.0f);
  __syncwarp();

  uint32_t highest, lowest;  // sortable ranks that no pair is above and no listed pair is below
  uint32_t num_found = 0;
  if (finite && layout.num_guessed > 0.0f) {
    auto& scratch = *reinterpret_cast<GuessScratch*>(chunks);
    num_found = list_guessed(token, m, topk, max_found, layout.num_guessed, lane, scratch,
                             reinterpret_cast<float*>(keys), codes, &lowest, &highest);
  }
  if (num_found == 0) {
    __syncwarp();  // all have read what guesses left, where maxima are stored now
    num_found = list_chunks(token, finite, m, topk, max_found, lane, stored_maxima, chunks, codes,
                            &lowest, &highest);
  }
  if (num_found > max_sorted) {
    num_found =
        cut_listed(token, codes, num_found, topk, max_sorted, lane, keys, chunks, &lowest, highest);
    codes = chunks;
  }
  // What is written of the keys is on its way while the pairs are sorted.
  int32_t key_ids[kLaneRows][2];
  float row_scores[kLaneRows][kPlanes];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    token.load_row_scores(i, lane, row_scores[i]);
    token.load_ids(i, lane, key_ids[i]);
  }
  sort_codes(codes, static_cast<int>(num_found), p.topk, lowest, highest, candidates, lane,
             [&](int code) { return token.rank_of(code); });
  auto* ids = reinterpret_cast<int32_t*>(keys);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int key = i * kWarpSize + lane;
    token.store_row(key, row_scores[i]);
#pragma unroll
    for (int side = 0; side < 2; ++side) ids[side * kMaxAxisTopk + key] = key_ids[i][side];
  }
  __syncwarp();
  token.write(codes, token.rows, ids, lane);
}

template <int kPlanes>
Status launch(const ProductKeyTopkParams& p, Stream stream, bool overlapping) {
  const GridLayout<kPlanes> layout(p);
  // As many tokens a block as leave room for two blocks.
  constexpr int64_t kBlockBytes = 96 * 1024;
  const int tokens =
      static_cast<int>(std::clamp(kBlockBytes / layout.bytes, int64_t{1}, int64_t{kTokens}));
  const auto kernel = product_key_topk_fwd_grid_kernel<kPlanes>;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, layout.bytes * tokens));
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.num_tokens * p.num_heads, tokens)));
  if (overlapping) {
    return launch_overlapping(kernel, blocks, tokens * kWarpSize, layout.bytes * tokens, stream, p,
                              layout);
  }
  kernel<<<blocks, tokens * kWarpSize, layout.bytes * tokens, stream>>>(p, layout);
  return launch_status();
}

ULTRAMEM_REGISTER_KERNEL(grid_2, "product_key_topk_fwd_grid<2>", kThreads,
                         product_key_topk_fwd_grid_kernel<2>);
ULTRAMEM_REGISTER_KERNEL(grid_4, "product_key_topk_fwd_grid<4>", kThreads,
                         product_key_topk_fwd_grid_kernel<4>);

}  // namespace

Status launch_grid(const ProductKeyTopkParams& params, Stream stream, bool overlapping) {
  if (grid_block_applies(params)) return launch_grid_block(params, stream, overlapping);
  if (grid_small_applies(params)) return launch_grid_small(params, stream, overlapping);
  return params.tucker_rank <= 2 ? launch<2>(params, stream, overlapping)
                                 : launch<4>(params, stream, overlapping);
}

}  // namespace ultramem::cuda
