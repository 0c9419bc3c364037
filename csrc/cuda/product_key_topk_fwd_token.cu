// Product-key retrieval, forward, behind the scores of few tokens: a block for each token and head
// picks the best keys of both sides and then the best pairs, so that what is kept does not go
// through memory, and no kernel has to begin for it.
//
// Half of the warps look after either side, as in product_key_topk_fwd_small.cu; where they are
// done the first of them go on as in product_key_grid_block.cu.
#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "device.h"
#include "kernel_registry.h"
#include "key_selection.cuh"
#include "product_key_common.cuh"
#include "product_key_grid.cuh"
#include "product_key_grid_block.cuh"
#include "product_key_topk_fwd.h"
#include "warp_group.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kPlanes = 2;
// Half as many warps as with one set, where what all of them do whatever they hold is most of it.
constexpr int kSets = 2;
constexpr int kMaxSideWarps = 8;
constexpr int kMaxThreads = 2 * kMaxSideWarps * kWarpSize;
static_assert(BlockTraits<kMaxAxisTopk>::kThreads <= kMaxThreads);
// Named barriers: of the sides, and of the threads that choose pairs.
constexpr int kSideBarrier = 1;
constexpr int kPairBarrier = 3;
// Shared memory of a block that begins while the scores are computed, if there are no more than
// multiprocessors: with as much there is one on each, beside a block of scores that has 112 KB.
constexpr int64_t kLoneBytes = 116224;

template <int kRows>
struct TokenLayout {
  BlockLayout<kPlanes, kRows> grid;
  int selections;  // [2], a side's each
  int slots;       // [2], of a side's WarpGroup
  int spoilt;      // [2], of a side: not zero where a factor is not finite
  int side_warps;
  int score_stride;
  int64_t bytes;

  TokenLayout(const ProductKeyTopkParams& p, int stride)
      : grid(p),
        selections(grid.shared.take(2 * kSelectionBytes)),
        slots(grid.shared.take(2 * 4 * WarpGroup::kSlots)),
        spoilt(grid.shared.take(2 * 4)),
        side_warps(static_cast<int>(ceil_div(p.num_keys, kSets * kWarpSetKeys))),
        score_stride(stride),
        bytes(grid.shared.bytes()) {}
};

template <int kRows>
__global__ void __launch_bounds__(kMaxThreads, 1)
    product_key_topk_fwd_token_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                      const __grid_constant__ TokenLayout<kRows> layout,
                                      const float* all_scores) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using TokenView = typename BlockLayout<kPlanes, kRows>::TokenView;
  constexpr int kPairWarps = BlockTraits<kRows>::kWarps;
  const int thread = threadIdx.x;
  const int warp = warp_of(thread);
  const int lane = thread % kWarpSize;
  const int side_warps = layout.side_warps;
  const int side = warp >= side_warps;
  const int side_warp = warp - side * side_warps;
  const bool picks = side_warp < side_warps;
  const int m = p.axis_topk;
  const int R = p.tucker_rank;
  const auto num_keys = static_cast<int>(p.num_keys);
  const BlockArrays arrays(layout.grid, shared_bytes);
  const Selection selection(shared_bytes + layout.selections + side * kSelectionBytes);
  WarpGroup group(
      reinterpret_cast<uint32_t*>(shared_bytes + layout.slots) + side * WarpGroup::kSlots,
      kSideBarrier + side, side_warp, side_warps);
  auto* spoilt = reinterpret_cast<uint32_t*>(shared_bytes + layout.spoilt);

  // The kernel ahead waits for all kernels before it: what is older than the scores may be read.
  const TokenView token(p, blockIdx.x, shared_bytes, layout.grid.token, lane);
  if (picks) selection.clear(side_warp * kWarpSize + lane, side_warps * kWarpSize);
  if (warp == 0) token.store_core(lane);
  if (picks && side_warp == 0 && lane == 0) spoilt[side] = 0;
  // No rank beyond the last kept keys is a number.
  for (int i = m + thread; i < kRows; i += static_cast<int>(blockDim.x)) {
    const float none[kPlanes] = {__uint_as_float(kNanBits), 0.0f};
    token.store_row(i, none);
    token.store_col(i, none);
  }
  const uint32_t head = p.num_heads == 1 ? 0 : blockIdx.x % static_cast<uint32_t>(p.num_heads);
  float filter[kPlanes] = {1.0f, 1.0f};
  if (!token.additive()) {
    const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t) + head * R;
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      if (r < R) filter[r] = vector[r];
    }
  }
  // Scores take up to 2^23 floats (kTensorCoreSmallBytes).
  const uint32_t row = blockIdx.x * 2 + side;
  OwnKeys<kSets> own;
  own.first = side_warp * kWarpSetKeys + lane * kSetKeys;
  own.stride = side_warps * kWarpSetKeys;
  const float* scores = all_scores + row * static_cast<uint32_t>(R * layout.score_stride);
  // Whoever has no key reads the last.
  const float* from[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    from[set] = scores + min(own.first + set * own.stride, layout.score_stride - kSetKeys);
  }
  int32_t* axis_ids = p.axis_indices + row * m;
  auto* axis_scores = static_cast<float*>(p.axis_scores) + row * (R * m);
  wait_for_words(reinterpret_cast<uintptr_t>(from[0]), reinterpret_cast<uintptr_t>(from[1]),
                 reinterpret_cast<uintptr_t>(axis_ids), reinterpret_cast<uintptr_t>(axis_scores),
                 __float_as_uint(filter[0]), num_keys);
  wait_for_prerequisite_grid();
  release_dependent_grid();

  if (picks) {
    float of_ranks[kPlanes][kSets][kSetKeys];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      load_floats<kSetKeys>(from[set], of_ranks[0][set]);
      if (R > 1) load_floats<kSetKeys>(from[set] + layout.score_stride, of_ranks[1][set]);
    }
#pragma unroll
    for (int i = 0; i < own.kCount; ++i) {
      const int set = i / kSetKeys, e = i % kSetKeys;
      float sum = __fmul_rn(filter[0], of_ranks[0][set][e]);
      if (R > 1) sum = __fmaf_rn(filter[1], of_ranks[1][set][e], sum);
      own.ranks[i] = own.key(i) < num_keys ? sortable(sum) : 0;
    }
    const uint32_t best =
        find_best(own, static_cast<uint32_t>(m), num_keys, selection, side_warp, lane, group);
    const Places<kSets> places(best, side_warp, lane, group);
#pragma unroll 1
    for (uint32_t bits = best; bits != 0; bits &= bits - 1) {
      const int i = __ffs(static_cast<int>(bits)) - 1;
      const bool in_first = i < kSetKeys;
      const uint32_t before = best & ((1u << i) - 1) & (in_first ? 0xfu : 0xf0u);
      const auto place =
          static_cast<int>((in_first ? places.first[0] : places.first[1]) + __popc(before));
      const int key = own.key(i);
      float kept[kPlanes] = {of_ranks[0][0][0], 0.0f};
      if (R > 1) kept[1] = of_ranks[1][0][0];
#pragma unroll
      for (int j = 1; j < own.kCount; ++j) {
        if (i == j) kept[0] = of_ranks[0][j / kSetKeys][j % kSetKeys];
        if (i == j && R > 1) kept[1] = of_ranks[1][j / kSetKeys][j % kSetKeys];
      }
      const float kept_scores[kPlanes] = {kept[0], kept[1]};
      arrays.ids[side * kRows + place] = key;
      float zero = 0.0f;
      if (side == 0) {
        if (token.additive()) kept[1] = 1.0f;
        store_rounded<kPlanes>(kept, arrays.row_scores + place * kPlanes);
        if (!token.additive()) {
          float cbar[kPlanes][kPlanes];
          token.sum_cores(cbar);
          token.fold(cbar, kept);
        }
        add_zeros(kept, &zero);
        token.store_row(place, kept);
      } else {
        if (token.additive()) {
          kept[1] = kept[0];
          kept[0] = 1.0f;
        }
        add_zeros(kept, &zero);
        token.store_col(place, kept);
      }
      if (!(zero == 0.0f)) spoilt[side] = 1;
      axis_ids[place] = key;
      axis_scores[place] = kept_scores[0];
      if (R > 1) axis_scores[m + place] = kept_scores[1];
    }
  }
  __syncthreads();
  if (warp >= kPairWarps) return;
  WarpGroup block(arrays.slots, kPairBarrier, warp, kPairWarps);
  choose_pairs(token, arrays, (spoilt[0] | spoilt[1]) == 0, m, static_cast<uint32_t>(p.topk),
               static_cast<uint32_t>(layout.grid.max_found), thread, block);
}

template <int kRows>
Status launch(const ProductKeyTopkParams& p, int score_stride, Stream stream) {
  const TokenLayout<kRows> layout(p, score_stride);
  const auto kernel = product_key_topk_fwd_token_kernel<kRows>;
  const int64_t bytes =
      kLoneBytes <= max_shared_bytes() ? std::max(layout.bytes, kLoneBytes) : layout.bytes;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
  const int warps = std::max(2 * layout.side_warps, BlockTraits<kRows>::kWarps);
  const dim3 blocks(static_cast<unsigned>(p.num_tokens * p.num_heads));
  return launch_overlapping(kernel, blocks, warps * kWarpSize, bytes, stream, p, layout,
                            static_cast<const float*>(p.workspace));
}

ULTRAMEM_REGISTER_KERNEL(token_32, "product_key_topk_fwd_token<32>", kMaxThreads,
                         product_key_topk_fwd_token_kernel<kSmallRows>);
ULTRAMEM_REGISTER_KERNEL(token_128, "product_key_topk_fwd_token<128>", kMaxThreads,
                         product_key_topk_fwd_token_kernel<kMaxAxisTopk>);

}  // namespace

bool token_applies(const ProductKeyTopkParams& p) {
  return p.tucker_rank <= kPlanes && p.num_keys <= kMaxSideWarps * kSets * kWarpSetKeys &&
         p.num_tokens * p.num_heads <= multiprocessors() && axis_small_applies(p);
}

Status launch_token(const ProductKeyTopkParams& params, int score_stride, Stream stream) {
  return params.axis_topk <= kSmallRows ? launch<kSmallRows>(params, score_stride, stream)
                                        : launch<kMaxAxisTopk>(params, score_stride, stream);
}

}  // namespace ultramem::cuda
