// Product-key retrieval, forward, grid stage for up to 32 kept keys a side: a warp per token, a row
// per lane, all its ranks in registers.
//
// Ranks, order and ties are those of product_key_grid.cu. A number is searched that M pairs or a
// few more are at or above; those are listed in the order of positions, and sorted.
#include "async_copy.cuh"
#include "block_topk.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "product_key_topk_fwd.h"
#include "threshold_search.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = kThreads / kWarpSize;

template <int kPlanes>
struct SmallLayout {
  using TokenView = Token<kPlanes, kSmallRows>;
  SharedLayout shared;
  typename TokenView::Layout token;
  int row_scores;  // [kSmallRows, kPlanes], not folded
  int ids;         // [2, kSmallRows] int32
  int codes;       // [max_found] uint16
  int candidates;  // [max_found] uint64
  int max_found;
  int64_t bytes;  // of a warp

  __host__ __device__ explicit SmallLayout(const ProductKeyTopkParams& p) : token(shared) {
    // More room than topk lets the search stop early.
    const int roomy = next_power_of_two(p.topk + p.topk / 4);
    const int all = next_power_of_two(p.axis_topk * p.axis_topk);
    max_found = roomy < all ? roomy : all;
    if (max_found < 2 * kWarpSize) max_found = 2 * kWarpSize;
    row_scores = shared.take(4 * kPlanes * kSmallRows);
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
  const float nan = __uint_as_float(kNanBits);
  float ranks[kSmallRows];
  float best[2] = {nan, nan};
#pragma unroll
  for (int j = 0; j < kSmallRows; j += kPacket) {
    float cols[kPacket][kPlanes];
    token.load_cols(j, cols);
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      ranks[j + i] = rank_value<kPlanes>(row, cols[i]);
      best[i % 2] = fmaxf(best[i % 2], ranks[j + i]);
    }
  }
  const float row_best = fmaxf(best[0], best[1]);
  // A bit per column, that of the first the highest.
  const auto columns = [&](auto wanted) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kSmallRows; ++j) bits |= wanted(ranks[j]) ? 0x80000000u >> j : 0u;
    return bits;
  };
  const auto columns_above = [&](float threshold) {
    constexpr int kHalf = kSmallRows / 2;
    uint32_t first = 0, last = 0;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      first = first << 1 | is_above(ranks[j], threshold);
      last = last << 1 | is_above(ranks[kHalf + j], threshold);
    }
    return first << kHalf | last;
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
  uint32_t bits = 0;
  int step = 0;
  for (; search.open(max_found); ++step) {
    if (step >= CutSearch::kGuesses) {
      NextNumbers next(search);
#pragma unroll
      for (int j = 0; j < kSmallRows; ++j) next.visit(ranks[j]);
      next.narrow(search);
      if (!search.open(max_found)) break;
    }
    const CutSearch::Cut guess = search.guess_cut(wanted, step);
    bits = columns_above(guess.below);
    search.take(guess.rank, __reduce_add_sync(kFullMask, __popc(bits)), topk);
  }

  const bool ties = search.ties(max_found);
  // A search that found a cut has counted what is at or above it last.
  if (!enough || ties || step == 0) {
    const float cut = value_of(!enough ? kLowestNumber : ties ? search.high : search.low);
    bits = columns([cut](float rank) { return rank >= cut; });
  }
  int num_found = 0;
  const auto list = [&](uint32_t bits) {
    int count;
    uint16_t* next = codes + num_found + warp_scan_exclusive(__popc(bits), &count);
    num_found += count;
    const int last = pair_code(lane, kSmallRows - 1);
    for (; bits != 0; ++next) {
      const int bit = highest_bit(bits);
      *next = static_cast<uint16_t>(last - bit);
      bits &= ~(1u << bit);
    }
  };
  list(bits);
  if (!enough || ties) {
    const float tied = value_of(search.low);
    const uint32_t inside = lane < m ? 0xffffffffu << (kSmallRows - m) : 0u;
    bits = inside & columns([&](float rank) { return enough ? rank == tied : !(rank == rank); });
    // So many of them as are wanted.
    int count;
    const int before = warp_scan_exclusive(__popc(bits), &count);
    const int room = static_cast<int>(topk) - num_found - before;
    while (__popc(bits) > max(room, 0)) bits &= bits - 1;
    list(bits);
  }
  *lowest = enough ? search.low : 0u;
  return num_found;
}

template <int kPlanes>
__global__ void __launch_bounds__(kThreads, kPlanes == 2 ? 8 : 5)
    product_key_topk_fwd_grid_small_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                           const __grid_constant__ SmallLayout<kPlanes> layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename SmallLayout<kPlanes>::TokenView;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_of(threadIdx.x);
  const uint32_t token_head = blockIdx.x * kTokens + warp;
  if (token_head >= static_cast<uint32_t>(p.num_tokens) * p.num_heads) {
    wait_for_prerequisite_grid();
    return;
  }
  unsigned char* shared = shared_bytes + warp * static_cast<int>(layout.bytes);
  auto* row_scores = reinterpret_cast<float*>(shared + layout.row_scores);
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
  token.load_ids(0, lane, own_ids);
  float row[kPlanes], own_col[kPlanes];
  token.load_row_scores(0, lane, row);
  token.load_col_scores(0, lane, own_col);
  float zero = 0.0f;
  add_zeros(own_col, &zero);
  if (lane >= m) own_col[0] = nan;
  token.store_core(lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) ids[i * kSmallRows + lane] = own_ids[i];
  token.store_col(lane, own_col);
  store_rounded<kPlanes>(row, row_scores + lane * kPlanes);
  __syncwarp();
  if (!token.additive()) {
    float cbar[kPlanes][kPlanes];
    token.sum_cores(cbar);
    token.fold(cbar, row);
  }
  add_zeros(row, &zero);
  if (lane >= m) row[0] = nan;
  token.store_row(lane, row);
  const bool finite = __all_sync(kFullMask, zero == 0.0f);

  uint32_t lowest, highest;
  const int num_found =
      list_small(token, row, finite, m, topk, max_found, lane, codes, &lowest, &highest);
  sort_codes(codes, num_found, p.topk, lowest, highest, candidates, lane,
             [&](int code) { return token.rank_of(code); });
  token.write(codes, row_scores, ids, lane);
}

template <int kPlanes>
Status launch(const ProductKeyTopkParams& p, Stream stream, bool overlapping) {
  const SmallLayout<kPlanes> layout(p);
  const int64_t bytes = layout.bytes * kTokens;
  const auto kernel = product_key_topk_fwd_grid_small_kernel<kPlanes>;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.num_tokens * p.num_heads, kTokens)));
  if (overlapping) {
    return launch_overlapping(kernel, blocks, kThreads, bytes, stream, p, layout);
  }
  kernel<<<blocks, kThreads, bytes, stream>>>(p, layout);
  return launch_status();
}

ULTRAMEM_REGISTER_KERNEL(small_2, "product_key_topk_fwd_grid_small<2>", kThreads,
                         product_key_topk_fwd_grid_small_kernel<2>);
ULTRAMEM_REGISTER_KERNEL(small_4, "product_key_topk_fwd_grid_small<4>", kThreads,
                         product_key_topk_fwd_grid_small_kernel<4>);

}  // namespace

bool grid_small_applies(const ProductKeyTopkParams& p) { return p.axis_topk <= kSmallRows; }

Status launch_grid_small(const ProductKeyTopkParams& params, Stream stream, bool overlapping) {
  return params.tucker_rank <= 2 ? launch<2>(params, stream, overlapping)
                                 : launch<4>(params, stream, overlapping);
}

}  // namespace ultramem::cuda
