// Product-key retrieval, forward, grid stage with a block for each token and head: for so few of
// them that one warp each would leave most of the GPU without work.
//
// The kept keys come from the axis stage; the rest is in product_key_grid_block.cuh.
#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "device.h"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "product_key_grid_block.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

// About two blocks for each multiprocessor of a GPU of today; for R above 2 these take turns.
constexpr int64_t kMaxTokenHeads = 264;
// Shared memory of a block that begins while the axis stage runs, if there are no more than
// multiprocessors: with as much there is one on each. They would all start on the few that the axis
// stage leaves free.
constexpr int64_t kLoneBytes = 116 * 1024;

template <int kPlanes, int kRows>
__global__ void __launch_bounds__(BlockTraits<kRows>::kThreads, 1)
    product_key_topk_fwd_grid_block_kernel(
        const __grid_constant__ ProductKeyTopkParams p,
        const __grid_constant__ BlockLayout<kPlanes, kRows> layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename BlockLayout<kPlanes, kRows>::TokenView;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const BlockArrays arrays(layout, shared_bytes);
  WarpGroup block(arrays.slots, 0, warp, BlockTraits<kRows>::kWarps);
  const int m = p.axis_topk;
  const float nan = __uint_as_float(kNanBits);

  const TokenView token(p, blockIdx.x, shared_bytes, layout.token, lane);
  if (warp == 0) token.store_core(lane);
  clear_pairs<kRows>(arrays, thread, BlockTraits<kRows>::kThreads);
  read_arguments(reinterpret_cast<uintptr_t>(p.axis_scores), layout.max_found);
  wait_for_prerequisite_grid();
  release_dependent_grid();
  int32_t key_ids[2] = {0, 0};
  const int own_key = thread - kRows;  // of those threads that load no scores
  const bool has_ids = own_key >= 0 && own_key < kRows;
  if (has_ids) token.load_ids(0, own_key, key_ids);
  if (thread < kRows) {
    float row[kPlanes], col[kPlanes];
    token.load_row_scores(0, thread, row);
    token.load_col_scores(0, thread, col);
    if (thread >= m) col[0] = nan;
    token.store_col(thread, col);
    store_rounded<kPlanes>(row, arrays.row_scores + thread * kPlanes);
  }
  if (has_ids) {
#pragma unroll
    for (int side = 0; side < 2; ++side) arrays.ids[side * kRows + own_key] = key_ids[side];
  }
  __syncthreads();
  float cbar[kPlanes][kPlanes];
  if (!token.additive()) token.sum_cores(cbar);
  choose_pairs(token, arrays, cbar, m, p.topk, layout.max_found, thread, block);
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
