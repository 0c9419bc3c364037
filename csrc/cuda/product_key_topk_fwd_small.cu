// Product-key retrieval, forward, axis stage for few tokens, on the tensor cores of sm_80 and
// later: so few that the scores of all their keys, as a rule, stay in the L2 cache.
//
// Two kernels. In the first a block multiplies a tile of keys with a tile of tokens: small tiles,
// so that all multiprocessors read keys, and what a block reads is on its way all at once. In the
// second a block looks after a token's side: its threads hold the ranks of the keys in registers
// and cut them to the best m (key_selection.cuh). Of very few tokens a kernel that goes on with
// the pairs takes its place (product_key_topk_fwd_token.cu).
//
// A score is the same sum over Kd whatever the key's place and the number of tokens, to the last
// bit in product_key_topk_fwd_small_wgmma.cu, too, which takes the place of the first kernel on
// sm_90a for long keys and more than a few tokens.
#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "device.h"
#include "kernel_registry.h"
#include "key_selection.cuh"
#include "mma.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_fwd.h"
#include "warp_group.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kTileKeys = 16;  // of a product
constexpr int kTileTokens = 8;
constexpr int kChunk = 64;  // elements of Kd that are copied at once: one line of 128 bytes a row
constexpr int kRowBytes = kChunk * 2;
constexpr int kRowPieces = kRowBytes / 16;
constexpr int kMaxStages = 8;
constexpr int kStep = 32;  // elements of Kd of two products

// Warps share the block's keys and tokens; each has kTiles tiles of tokens.
template <int kKeyWarps_, int kTokenWarps_, int kTiles_>
struct ScoreTraits {
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kThreads = kKeyWarps * kTokenWarps * kWarpSize;
  static constexpr int kKeys = kKeyWarps * kTileKeys;
  static constexpr int kTokens = kTokenWarps * kTiles * kTileTokens;
  static constexpr int kStageBytes = (kKeys + kTokens) * kRowBytes;
};

struct ScoreLayout {
  float* scores;     // [T, H, 2, R, stride]
  int score_stride;  // floats
  int key_tiles;     // blocks for the keys of a rank
  int num_chunks;
};

// Grid: tile of keys, then rank, then head and side (x); tile of tokens (y).
template <typename scalar_t, typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    product_key_topk_fwd_scores_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                       const __grid_constant__ ScoreLayout layout) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  constexpr int kTiles = Traits::kTiles;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int key_warp = thread / kWarpSize % Traits::kKeyWarps;
  const int token_warp = thread / kWarpSize / Traits::kKeyWarps;
  const auto block = static_cast<int>(blockIdx.x);
  const int rank_block = block / layout.key_tiles;
  const int first_key = (block - rank_block * layout.key_tiles) * Traits::kKeys;
  const int head_side = rank_block / p.tucker_rank;
  const int rank = rank_block - head_side * p.tucker_rank;
  const int head = head_side / 2, side = head_side % 2;
  const int64_t first_token = int64_t{blockIdx.y} * Traits::kTokens;
  const auto key_dim = static_cast<int>(p.key_dim);
  const int num_keys = min(static_cast<int>(p.num_keys) - first_key, Traits::kKeys);
  const int num_tokens =
      static_cast<int>(min(p.num_tokens - first_token, int64_t{Traits::kTokens}));
  const scalar_t* keys = static_cast<const scalar_t*>(p.keys) +
                         (int64_t{rank_block} * p.num_keys + first_key) * key_dim;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (thread == 0 && blockIdx.y == 0) {
    prefetch_to_l2(keys, min(static_cast<uint32_t>(num_keys) * key_dim * 2, kMaxPrefetchBytes));
  }
#endif

  // Rows of a stage: keys, then tokens. A thread copies one piece of every kThreads / 8-th row.
  // Rows that a matrix of 8 x 8 is made of have their pieces in different places: every other one
  // of keys, neighbours of tokens.
  constexpr int kPassRows = Traits::kThreads / kRowPieces;
  constexpr int kKeyPasses = Traits::kKeys / kPassRows;
  constexpr int kPasses = kKeyPasses + (Traits::kTokens + kPassRows - 1) / kPassRows;
  static_assert(Traits::kKeys % kPassRows == 0, "a pass is of keys or of tokens");
  const uint32_t stages = shared_address(shared_bytes);
  const uint32_t piece = threadIdx.x % kRowPieces;
  const int pass_row = static_cast<int>(threadIdx.x / kRowPieces);
  const int query = p.num_queries == 1 ? 0 : rank;
  // All queries are below 2^24 elements, and so are the keys of a tile.
  const int query_stride = 2 * p.num_heads * p.num_queries * key_dim;
  const scalar_t* queries = static_cast<const scalar_t*>(p.query) +
                            static_cast<int>(first_token) * query_stride +
                            ((side * p.num_heads + head) * p.num_queries + query) * key_dim;
  const scalar_t* from[kPasses];
  uint32_t to[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const bool is_key = pass < kKeyPasses;
    const int row = pass_row + (is_key ? pass : pass - kKeyPasses) * kPassRows;
    from[pass] = (is_key ? keys + min(row, num_keys - 1) * key_dim
                         : queries + min(row, num_tokens - 1) * query_stride) +
                 piece * 8;
    const uint32_t swizzle = static_cast<uint32_t>(is_key ? row / 2 : row);
    to[pass] = stages + ((is_key ? 0 : Traits::kKeys) + row) * kRowBytes +
               ((piece ^ swizzle) % kRowPieces) * 16;
  }
  // Nothing is read behind a row, wherever the address points: there are zeros.
  const auto copy_chunk = [&](int chunk, int place) {
    const bool valid = chunk * kChunk + static_cast<int>(piece) * 8 < key_dim;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int last_row = (pass - kKeyPasses + 1) * kPassRows;
      if (last_row > Traits::kTokens && pass_row + last_row - kPassRows >= Traits::kTokens) break;
      cp_async_16(to[pass] + place * Traits::kStageBytes, from[pass] + chunk * kChunk, valid);
    }
  };
  // The addresses are there before the queries are.
  uint32_t addresses = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto address = reinterpret_cast<uint64_t>(from[pass]);
    addresses ^= static_cast<uint32_t>(address) ^ static_cast<uint32_t>(address >> 32) ^ to[pass];
  }
  wait_for_words(addresses, layout.num_chunks);
  wait_for_prerequisite_grid();
  release_dependent_grid();
#pragma unroll
  for (int chunk = 0; chunk < kMaxStages; ++chunk) {
    if (chunk < layout.num_chunks) copy_chunk(chunk, chunk);
    cp_async_commit();
  }

  // Row i of a product is key 2 i of the tile, row 8 + i the next; behind the last there is room
  // for one more. Scores take up to 2^23 floats (kTensorCoreSmallBytes). Where they go is there
  // before the keys are.
  const int key = key_warp * kTileKeys + lane / 4 * 2;
  const bool has_key = first_key + key < layout.score_stride;
  const int own_token = token_warp * kTiles * kTileTokens + lane % 4 * 2;
  const int token_floats = 2 * p.num_heads * p.tucker_rank * layout.score_stride;
  float* out = layout.scores +
               ((static_cast<int>(first_token) + own_token) * token_floats +
                ((head * 2 + side) * p.tucker_rank + rank) * layout.score_stride + first_key + key);
  wait_for_words(reinterpret_cast<uintptr_t>(out), reinterpret_cast<uintptr_t>(out) >> 32);

  const uint32_t lane_unsigned = static_cast<uint32_t>(lane);
  const uint32_t key_row = key_warp * kTileKeys + lane_unsigned % 8 * 2 + lane_unsigned / 8 % 2;
  const uint32_t token_row = token_warp * kTiles * kTileTokens + lane_unsigned % 8;
  float acc[kTiles][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < layout.num_chunks; ++chunk) {
    cp_async_wait<kMaxStages - 1>();
    __syncthreads();
    const uint32_t stage = stages + chunk % kMaxStages * Traits::kStageBytes;
    constexpr int kSteps = kChunk / kStep;
    // All is read before the first product: behind the last element of a row there are zeros.
    uint32_t a[kSteps][2][4], b[kSteps][kTiles][4];
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t at = (step * 4 + half * 2 + lane_unsigned / 16) ^ key_row / 2;
        ldmatrix_x4(a[step][half], stage + key_row * kRowBytes + at % kRowPieces * 16);
      }
#pragma unroll
      for (uint32_t tile = 0; tile < kTiles; ++tile) {
        const uint32_t row = token_row + tile * kTileTokens;
        const uint32_t at = (step * 4 + lane_unsigned / 8) ^ row;
        ldmatrix_x4(b[step][tile],
                    stage + (Traits::kKeys + row) * kRowBytes + at % kRowPieces * 16);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step > 0 && chunk * kChunk + step * kStep >= key_dim) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_m16n8k16<scalar_t>(acc[tile], a[step][half], b[step][tile][2 * half],
                                 b[step][tile][2 * half + 1]);
        }
      }
    }
    if (chunk + kMaxStages < layout.num_chunks) {
      __syncthreads();
      copy_chunk(chunk + kMaxStages, chunk % kMaxStages);
    }
    cp_async_commit();
  }

  if (!has_key) return;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int next = tile * kTileTokens + e;
      if (own_token + next < num_tokens) {
        *reinterpret_cast<float2*>(out + next * token_floats) =
            float2{acc[tile][e], acc[tile][2 + e]};
      }
    }
  }
}

// ---- the best m of a token ----------------------------------------------------------------------

constexpr int kMaxSelectWarps = WarpGroup::kMaxWarps;
static_assert(kTensorCoreSmallMaxKeys <= kMaxSelectWarps * kMaxSets * kWarpSetKeys,
              "a block holds all keys");

// A block for each row of [T, H, 2].
template <int kSets>
__global__ void __launch_bounds__(kMaxSelectWarps* kWarpSize, 1)
    product_key_topk_fwd_select_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                       const float* all_scores, int stride) {
  __shared__ __align__(16) unsigned char selection_bytes[kSelectionBytes];
  __shared__ uint32_t slots[WarpGroup::kSlots];
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const auto num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const uint32_t row = blockIdx.x;
  const auto num_keys = static_cast<int>(p.num_keys);
  const int m = p.axis_topk;
  const int R = p.tucker_rank;
  WarpGroup group(slots, 0, warp, num_warps);
  const Selection selection(selection_bytes);
  // Scores take up to 2^23 floats (kTensorCoreSmallBytes).
  const float* scores = all_scores + row * static_cast<uint32_t>(R * stride);
  const uint32_t head = p.num_heads == 1 ? 0 : row / 2 % static_cast<uint32_t>(p.num_heads);
  const auto* vector = static_cast<const float*>(row % 2 == 0 ? p.u : p.t) + head * R;
  OwnKeys<kSets> own;
  own.first = warp * kWarpSetKeys + lane * kSetKeys;
  own.stride = num_warps * kWarpSetKeys;
  selection.clear(thread, static_cast<int>(blockDim.x));
  wait_for_words(reinterpret_cast<uintptr_t>(scores), reinterpret_cast<uintptr_t>(vector),
                 own.first, R, m);
  wait_for_prerequisite_grid();
  release_dependent_grid();
  // All are on their way before the first is used.
  float filter[kMaxTuckerRank];
#pragma unroll
  for (int r = 0; r < kMaxTuckerRank; ++r) {
    filter[r] = 1.0f;
    if (r < R && p.mode != ScoreMode::kAdditive) filter[r] = vector[r];
  }
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int key = own.first + set * own.stride;
    const float* from = scores + min(key, stride - kSetKeys);
    float of_ranks[kMaxTuckerRank][kSetKeys];
#pragma unroll
    for (int r = 0; r < kMaxTuckerRank; ++r) {
      // Whoever has no key reads the last.
      if (r == 0 || r < R) load_floats<kSetKeys>(from + r * stride, of_ranks[r]);
    }
#pragma unroll
    for (int e = 0; e < kSetKeys; ++e) {
      float sum = __fmul_rn(filter[0], of_ranks[0][e]);
#pragma unroll
      for (int r = 1; r < kMaxTuckerRank; ++r) {
        if (r < R) sum = __fmaf_rn(filter[r], of_ranks[r][e], sum);
      }
      own.ranks[set * kSetKeys + e] = key + e < num_keys ? sortable(sum) : 0;
    }
  }
  const uint32_t best =
      find_best(own, static_cast<uint32_t>(m), num_keys, selection, warp, lane, group);
  const Places<kSets> places(best, warp, lane, group);
  int32_t* ids = p.axis_indices + row * m;
  float* kept_scores = static_cast<float*>(p.axis_scores) + row * (R * m);
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    uint32_t place = places.first[set];
#pragma unroll 1
    for (uint32_t bits = best >> 4 * set & 0xfu; bits != 0; bits &= bits - 1) {
      const int key = own.key(set * kSetKeys) + __ffs(static_cast<int>(bits)) - 1;
      ids[place] = key;
      for (int r = 0; r < R; ++r) {
        kept_scores[r * m + place] = scores[r * stride + key];
      }
      ++place;
    }
  }
}

// ---- choosing and launching ---------------------------------------------------------------------

template <typename Traits>
int64_t shared_bytes(const ScoreLayout& layout) {
  return int64_t{Traits::kStageBytes} * std::min(layout.num_chunks, kMaxStages);
}

template <typename Traits>
int key_tiles(const ProductKeyTopkParams& p) {
  return static_cast<int>(ceil_div(p.num_keys, Traits::kKeys));
}

template <typename Traits>
dim3 score_blocks(const ProductKeyTopkParams& p) {
  return dim3(static_cast<unsigned>(2 * p.num_heads * p.tucker_rank * key_tiles<Traits>(p)),
              static_cast<unsigned>(ceil_div(p.num_tokens, Traits::kTokens)));
}

template <typename scalar_t, typename Traits>
Status launch_scores(const ProductKeyTopkParams& p, ScoreLayout layout, Stream stream) {
  layout.key_tiles = key_tiles<Traits>(p);
  const dim3 blocks = score_blocks<Traits>(p);
  const auto kernel = product_key_topk_fwd_scores_kernel<scalar_t, Traits>;
  const int64_t bytes = shared_bytes<Traits>(layout);
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
  return launch_overlapping(kernel, blocks, Traits::kThreads, bytes, stream, p, layout);
}

// Large tiles, one a multiprocessor at a time, of so many warps' keys.
template <int kKeyWarps>
using LargeTraits = ScoreTraits<kKeyWarps, 2, 8>;

// Proportional to how long they take in all: turns of all multiprocessors by the keys of a tile. No
// tile of which a block has not the shared memory.
template <int kKeyWarps>
int64_t large_cost(const ProductKeyTopkParams& p, const ScoreLayout& layout) {
  using Traits = LargeTraits<kKeyWarps>;
  if (shared_bytes<Traits>(layout) > max_shared_bytes()) return INT64_MAX;
  const dim3 blocks = score_blocks<Traits>(p);
  const int64_t at_once = std::max(multiprocessors(), 1);
  return ceil_div(int64_t{blocks.x} * blocks.y, at_once) * Traits::kKeys;
}

// Of few tokens a block has no more than there are, of some 32 or 64. Many, with long keys, are
// worth larger tiles, which read everything less often.
template <typename scalar_t>
Status launch_scores_tiled(const ProductKeyTopkParams& p, const ScoreLayout& layout,
                           Stream stream) {
  constexpr int64_t kLongKeys = 256;
  if (p.num_tokens <= 8) return launch_scores<scalar_t, ScoreTraits<2, 1, 1>>(p, layout, stream);
  if (p.num_tokens <= 16) return launch_scores<scalar_t, ScoreTraits<2, 2, 1>>(p, layout, stream);
  if (p.num_tokens > 64 && p.key_dim > kLongKeys) {
    const int64_t of_4 = large_cost<4>(p, layout), of_5 = large_cost<5>(p, layout);
    const int64_t of_6 = large_cost<6>(p, layout);
    const int64_t least = std::min({of_4, of_5, of_6});
    if (least < INT64_MAX) {
      if (of_4 == least) return launch_scores<scalar_t, LargeTraits<4>>(p, layout, stream);
      if (of_5 == least) return launch_scores<scalar_t, LargeTraits<5>>(p, layout, stream);
      return launch_scores<scalar_t, LargeTraits<6>>(p, layout, stream);
    }
  }
  // All of 64 tokens in a block: two thirds of the bytes of tiles of 32, and at 1500 keys one tile
  // a multiprocessor. Where a block may have as much shared memory.
  using AllTraits = ScoreTraits<3, 2, 4>;
  if (p.num_tokens > 32 && p.num_tokens <= AllTraits::kTokens &&
      shared_bytes<AllTraits>(layout) <= max_shared_bytes()) {
    return launch_scores<scalar_t, AllTraits>(p, layout, stream);
  }
  return launch_scores<scalar_t, ScoreTraits<2, 2, 2>>(p, layout, stream);
}

template <int kSets>
Status launch_select(const ProductKeyTopkParams& p, int warps, Stream stream) {
  const dim3 blocks(static_cast<unsigned>(p.num_tokens * p.num_heads * 2));
  return launch_overlapping(product_key_topk_fwd_select_kernel<kSets>, blocks, warps * kWarpSize, 0,
                            stream, p, static_cast<const float*>(p.workspace),
                            small_score_stride(p));
}

#define ULTRAMEM_REGISTER_SCORES(id, name, scalar_t, ...)                        \
  ULTRAMEM_REGISTER_KERNEL(scores_##id, "product_key_topk_fwd_scores<" name ">", \
                           (ScoreTraits<__VA_ARGS__>::kThreads),                 \
                           product_key_topk_fwd_scores_kernel<scalar_t, ScoreTraits<__VA_ARGS__>>)
ULTRAMEM_REGISTER_SCORES(bf16_8, "bf16, 8 tokens", __nv_bfloat16, 2, 1, 1);
ULTRAMEM_REGISTER_SCORES(bf16_16, "bf16, 16 tokens", __nv_bfloat16, 2, 2, 1);
ULTRAMEM_REGISTER_SCORES(bf16_32, "bf16, 32 tokens", __nv_bfloat16, 2, 2, 2);
ULTRAMEM_REGISTER_SCORES(bf16_64, "bf16, 64 tokens", __nv_bfloat16, 3, 2, 4);
ULTRAMEM_REGISTER_SCORES(bf16_128_4, "bf16, 128 tokens, 64 keys", __nv_bfloat16, 4, 2, 8);
ULTRAMEM_REGISTER_SCORES(bf16_128_5, "bf16, 128 tokens, 80 keys", __nv_bfloat16, 5, 2, 8);
ULTRAMEM_REGISTER_SCORES(bf16_128_6, "bf16, 128 tokens, 96 keys", __nv_bfloat16, 6, 2, 8);
ULTRAMEM_REGISTER_SCORES(f16_8, "fp16, 8 tokens", __half, 2, 1, 1);
ULTRAMEM_REGISTER_SCORES(f16_16, "fp16, 16 tokens", __half, 2, 2, 1);
ULTRAMEM_REGISTER_SCORES(f16_32, "fp16, 32 tokens", __half, 2, 2, 2);
ULTRAMEM_REGISTER_SCORES(f16_64, "fp16, 64 tokens", __half, 3, 2, 4);
ULTRAMEM_REGISTER_SCORES(f16_128_4, "fp16, 128 tokens, 64 keys", __half, 4, 2, 8);
ULTRAMEM_REGISTER_SCORES(f16_128_5, "fp16, 128 tokens, 80 keys", __half, 5, 2, 8);
ULTRAMEM_REGISTER_SCORES(f16_128_6, "fp16, 128 tokens, 96 keys", __half, 6, 2, 8);
ULTRAMEM_REGISTER_KERNEL(select_1, "product_key_topk_fwd_select<1>", kMaxSelectWarps* kWarpSize,
                         product_key_topk_fwd_select_kernel<1>);
ULTRAMEM_REGISTER_KERNEL(select_2, "product_key_topk_fwd_select<2>", kMaxSelectWarps* kWarpSize,
                         product_key_topk_fwd_select_kernel<2>);
ULTRAMEM_REGISTER_KERNEL(select_4, "product_key_topk_fwd_select<4>", kMaxSelectWarps* kWarpSize,
                         product_key_topk_fwd_select_kernel<kMaxSets>);

}  // namespace

bool axis_small_applies(const ProductKeyTopkParams& p) {
  return is_aligned(p.query) && is_aligned(p.keys) &&
         product_key_topk_fwd_path(p, compute_capability()) == RetrievalPath::kTensorCoreSmall;
}

int small_score_stride(const ProductKeyTopkParams& p) {
  return static_cast<int>(ceil_div(p.num_keys, kSetKeys)) * kSetKeys;
}

size_t axis_small_workspace(const ProductKeyTopkParams& p) {
  return static_cast<size_t>(p.num_tokens) * p.num_heads * 2 * p.tucker_rank *
         small_score_stride(p) * sizeof(float);
}

Status launch_small_scores(const ProductKeyTopkParams& p, Stream stream) {
#if defined(ULTRAMEM_WITH_SM90A)
  if (small_scores_wgmma_applies(p)) return launch_small_scores_wgmma(p, stream);
#endif
  ScoreLayout layout{};
  layout.scores = static_cast<float*>(p.workspace);
  layout.score_stride = small_score_stride(p);
  layout.num_chunks = static_cast<int>(ceil_div(p.key_dim, kChunk));
  return p.dtype == DType::kFloat16 ? launch_scores_tiled<__half>(p, layout, stream)
                                    : launch_scores_tiled<__nv_bfloat16>(p, layout, stream);
}

Status launch_axis_small(const ProductKeyTopkParams& p, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(launch_small_scores(p, stream));
  int sets = 1;
  while (ceil_div(p.num_keys, sets * kWarpSetKeys) > kMaxSelectWarps) sets *= 2;
  const auto warps = static_cast<int>(ceil_div(p.num_keys, sets * kWarpSetKeys));
  if (sets == 1) return launch_select<1>(p, warps, stream);
  if (sets == 2) return launch_select<2>(p, warps, stream);
  return launch_select<kMaxSets>(p, warps, stream);
}

}  // namespace ultramem::cuda
