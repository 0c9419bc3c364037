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
// Warps that write what is kept while others choose pairs, at least.
constexpr int kWriteWarps = 4;
template <int kRows>
constexpr int kMaxWarps = std::max(2 * kMaxSideWarps, BlockTraits<kRows>::kWarps + kWriteWarps);
// Registers of many rows for so many threads that a block finds room beside one of scores.
template <int kRows>
constexpr int kBoundThreads = kRows > kSmallRows ? 1024 : kMaxWarps<kRows> * kWarpSize;
// Named barrier of the threads that choose pairs.
constexpr int kPairBarrier = 1;
// Of a side's WarpGroup: slots and an mbarrier.
constexpr int kSlotBytes = 4 * WarpGroup::kSlots;
constexpr int kSideBytes = kSlotBytes + 16;
// Shared memory of a block that begins while the scores are computed, if there are no more than
// multiprocessors: with as much there is one on each, beside a block of scores that has 112 KB.
constexpr int64_t kLoneBytes = 116224;

template <int kRows>
struct TokenLayout {
  BlockLayout<kPlanes, kRows> grid;
  int selections;  // [2], a side's each
  int sides;       // [2], of kSideBytes
  int side_warps;
  int score_stride;
  int64_t bytes;

  TokenLayout(const ProductKeyTopkParams& p, int stride)
      : grid(p),
        selections(grid.shared.take(2 * kSelectionBytes)),
        sides(grid.shared.take(2 * kSideBytes)),
        side_warps(static_cast<int>(ceil_div(p.num_keys, kSets * kWarpSetKeys))),
        score_stride(stride),
        bytes(grid.shared.bytes()) {}
};

// The kept keys and their scores, [2, m] and [2, R, m], by num_threads together.
template <int kRows>
__device__ __forceinline__ void write_kept(const ProductKeyTopkParams& p,
                                           const Token<kPlanes, kRows>& token,
                                           const BlockArrays& arrays, int thread, int num_threads) {
  const int m = p.axis_topk;
  const int R = p.tucker_rank;
  const uint32_t first = blockIdx.x * static_cast<uint32_t>(2 * m);
  int32_t* axis_ids = p.axis_indices + first;
  auto* axis_scores = static_cast<float*>(p.axis_scores) + first * R;
#pragma unroll 1
  for (int i = thread; i < 2 * m; i += num_threads) {
    const int side = i >= m;
    const int key = i - side * m;
    axis_ids[i] = arrays.ids[side * kRows + key];
    float kept[kPlanes];
    if (side == 0) {
      load_floats<kPlanes>(arrays.row_scores + key * kPlanes, kept);
    } else {
      token.load_col(key, kept);
      if (token.additive()) kept[0] = kept[1];
    }
    float* to = axis_scores + (side * R * m + key);
    to[0] = kept[0];
    if (R > 1) to[m] = kept[1];
  }
}

template <int kRows>
__global__ void __launch_bounds__(kBoundThreads<kRows>, 1)
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
  unsigned char* const of_side = shared_bytes + layout.sides + side * kSideBytes;
  const uint32_t barrier = shared_address(of_side + kSlotBytes);
  WarpGroup group(reinterpret_cast<uint32_t*>(of_side), 0, side_warp, side_warps, barrier);
  if (side_warp == 0 && lane == 0) mbarrier_init(barrier, side_warps * kWarpSize);

  // The kernel ahead waits for all kernels before it: what is older than the scores may be read.
  const TokenView token(p, blockIdx.x, shared_bytes, layout.grid.token, lane);
  if (picks) selection.clear(side_warp * kWarpSize + lane, side_warps * kWarpSize);
  if (warp == 0) token.store_core(lane);
  clear_pairs<kRows>(arrays, thread, static_cast<int>(blockDim.x));
  // No rank beyond the last kept column is a number. Rows there are zeros, until choose_pairs has
  // seen whether all factors are finite.
  for (int i = m + thread; i < kRows; i += static_cast<int>(blockDim.x)) {
    const float row[kPlanes] = {};
    const float col[kPlanes] = {__uint_as_float(kNanBits), 0.0f};
    store_rounded<kPlanes>(row, arrays.row_scores + i * kPlanes);
    token.store_col(i, col);
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
  __syncthreads();  // the cores are there, and the sides' barriers initialised
  float cbar[kPlanes][kPlanes];
  if (!token.additive()) token.sum_cores(cbar);
  wait_for_words(reinterpret_cast<uintptr_t>(from[0]), reinterpret_cast<uintptr_t>(from[1]),
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
    if (R == 1) {
#pragma unroll
      for (int i = 0; i < own.kCount; ++i) {
        float& first = of_ranks[0][i / kSetKeys][i % kSetKeys];
        float& second = of_ranks[1][i / kSetKeys][i % kSetKeys];
        second = 0.0f;
        if (!token.additive()) continue;
        second = side == 0 ? 1.0f : first;
        if (side == 1) first = 1.0f;
      }
    }
    const uint32_t best =
        find_best(own, static_cast<uint32_t>(m), num_keys, selection, side_warp, lane, group);
    const Places<kSets> places(best, side_warp, lane, group);
    int32_t* ids = arrays.ids + side * kRows;
    float* kept = side == 0 ? arrays.row_scores : token.cols;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      auto place = static_cast<int>(places.first[set]);
#pragma unroll
      for (int e = 0; e < kSetKeys; ++e) {
        const int i = set * kSetKeys + e;
        if ((best >> i & 1u) == 0) continue;
        const int gap = side == 0 ? 0 : TokenView::col_place(place) - place * kPlanes;
        const float scores_of_key[kPlanes] = {of_ranks[0][set][e], of_ranks[1][set][e]};
        ids[place] = own.key(i);
        store_rounded<kPlanes>(scores_of_key, kept + place * kPlanes + gap);
        ++place;
      }
    }
  }
  __syncthreads();
  if (warp >= kPairWarps) {
    write_kept(p, token, arrays, thread - kPairWarps * kWarpSize,
               static_cast<int>(blockDim.x) - kPairWarps * kWarpSize);
    return;
  }
  WarpGroup block(arrays.slots, kPairBarrier, warp, kPairWarps);
  choose_pairs(token, arrays, cbar, m, static_cast<uint32_t>(p.topk),
               static_cast<uint32_t>(layout.grid.max_found), thread, block);
}

template <int kRows>
Status launch(const ProductKeyTopkParams& p, int score_stride, Stream stream) {
  const TokenLayout<kRows> layout(p, score_stride);
  const auto kernel = product_key_topk_fwd_token_kernel<kRows>;
  const int64_t bytes =
      kLoneBytes <= max_shared_bytes() ? std::max(layout.bytes, kLoneBytes) : layout.bytes;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
  const int warps = std::max(2 * layout.side_warps, BlockTraits<kRows>::kWarps + kWriteWarps);
  const dim3 blocks(static_cast<unsigned>(p.num_tokens * p.num_heads));
  return launch_overlapping(kernel, blocks, warps * kWarpSize, bytes, stream, p, layout,
                            static_cast<const float*>(p.workspace));
}

ULTRAMEM_REGISTER_KERNEL(token_32, "product_key_topk_fwd_token<32>",
                         kMaxWarps<kSmallRows>* kWarpSize,
                         product_key_topk_fwd_token_kernel<kSmallRows>);
ULTRAMEM_REGISTER_KERNEL(token_128, "product_key_topk_fwd_token<128>",
                         kMaxWarps<kMaxAxisTopk>* kWarpSize,
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
