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
    if (max_found < 2 * kWarpSize) max_found = 2 * kWarpSize;
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

template <int kPlanes>
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
  token.store_core(lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (lane < m) ids[i * m + lane] = own_ids[i];
  }
#pragma unroll
  for (int s = 0; s < kPlanes; ++s) {
    token.cols[s * TokenView::kColStride + col_place(lane)] = own_col[s];
  }
  __syncwarp();
  if (!token.additive()) {
    float cbar[kPlanes][kPlanes];
    token.sum_cores(cbar);
    token.fold(cbar, row);
    if (lane >= m) row[0] = nan;
  }
#pragma unroll
  for (int s = 0; s < kPlanes; ++s) token.rows[s * TokenView::kRowStride + lane] = row[s];
  const bool finite = __all_sync(kFullMask, lane >= m || (is_finite(row) && is_finite(own_col)));

  uint32_t lowest, highest;
  const int num_found =
      list_small(token, row, finite, m, topk, max_found, lane, codes, &lowest, &highest);
  sort_codes(codes, num_found, lowest, highest, candidates, lane,
             [&](int code) { return token.rank_of(code); });
  token.write(codes, ids, lane);
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
