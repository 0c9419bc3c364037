// The scores of few tokens (product_key_topk_fwd_small.cu) on the tensor cores of sm_90a, for keys
// so long that what the L2 cache delivers decides.
//
// A block multiplies 48 keys with all tokens. Two blocks of a plane (a head, side and rank) are a
// cluster, in which either fetches half of the columns of the queries for both: 80 KB a block
// instead of 112 for 64 tokens and Kd 512. One warp has boxes of 64 columns copied (TMA), each to a
// place of its own, so that all are on their way at once; one warpgroup multiplies them as they
// arrive. Keys are on their way to the L2 cache before the kernel ahead has ended, and come after
// the queries, which leaves them time.
//
// The tensor cores add the products of 16 columns and the sum so far at once, in wgmma as in
// mma.sync: in the same order of columns scores have the same bits.
#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_axis_launch.h"
#include "product_key_topk_fwd.h"
#include "sm90a.h"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kCluster = 2;
constexpr int kTokens = 64;   // 16 for each warp that multiplies
constexpr int kKeys = 48;     // of a block
constexpr int kColumns = 64;  // of queries and keys in a chunk
constexpr int kRowBytes = 2 * kColumns;
constexpr int kQueryBytes = kTokens * kRowBytes;
constexpr int kChunkBytes = kQueryBytes + kKeys * kRowBytes;
constexpr int kAlignment = 1024;  // of swizzled tiles
static_assert(kQueryBytes % kAlignment == 0 && kChunkBytes % kAlignment == 0);
constexpr int kMultiplierWarps = kTokens / 16;
constexpr int kThreads = (kMultiplierWarps + 1) * kWarpSize;
constexpr int kSums = kTokens * kKeys / (kMultiplierWarps * kWarpSize);  // of a thread
constexpr int kStarts = 8;  // chunks of queries that clusters begin with, at most

// Where this kernel is used. Of shorter keys neither kernel is bound by what the cache delivers; of
// longer ones few blocks would find room.
constexpr int64_t kLeastTokens = 33;
constexpr int64_t kLeastKeyDim = 256 + 1;
constexpr int64_t kMostKeyDim = 512;
constexpr int shared_bytes(int num_chunks) { return num_chunks * (kChunkBytes + 8); }
static_assert(shared_bytes(kMostKeyDim / kColumns) <= 232448, "more than a block of sm_90 has");

struct ScoreTiles {
  float* scores;  // [T, planes, stride]
  int num_tokens;
  int score_stride;  // floats
  int num_planes;    // heads, then sides, then ranks
  int num_heads;
  int num_queries;
  int tucker_rank;
  int num_chunks;  // of kColumns of Kd
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a block works on, and where it keeps it.
struct Block {
  uint32_t base;
  int num_chunks;
  int rank;  // in the cluster
  int first_key;
  int plane;        // of keys
  int query_plane;  // sides, then heads, then queries
  // Chunks of queries that the block fetches, every other one, and with which of them it begins:
  // clusters with different ones, for not all to ask for the same lines at once.
  int num_own;
  int first_own;

  __device__ Block(const ScoreTiles& p, const unsigned char* shared)
      : base(shared_address(shared)),
        num_chunks(p.num_chunks),
        rank(static_cast<int>(cluster_rank())),
        first_key(static_cast<int>(blockIdx.x) * kKeys),
        plane(static_cast<int>(blockIdx.y)),
        num_own((num_chunks + kCluster - 1 - rank) / kCluster),
        first_own(static_cast<int>(blockIdx.x) / kCluster % kStarts * num_own / kStarts) {
    const int head_side = plane / p.tucker_rank;
    const int query = p.num_queries == 1 ? 0 : plane - head_side * p.tucker_rank;
    query_plane = (head_side % 2 * p.num_heads + head_side / 2) * p.num_queries + query;
  }

  __device__ uint32_t queries(int chunk) const { return base + chunk * kChunkBytes; }
  __device__ uint32_t keys(int chunk) const { return queries(chunk) + kQueryBytes; }
  __device__ uint32_t full(int chunk) const { return base + num_chunks * kChunkBytes + 8 * chunk; }
};

// All that the block fetches, of the queries for both blocks.
__device__ __forceinline__ void copy_all(const Block& block, const CUtensorMap* query_map,
                                         const CUtensorMap* key_map) {
  constexpr uint16_t kBoth = (1 << kCluster) - 1;
  int own = block.first_own;
#pragma unroll 1
  for (int i = 0; i < block.num_own; ++i) {
    const int chunk = kCluster * own + block.rank;
    copy_box_multicast(query_map, block.queries(chunk), block.full(chunk), kBoth, chunk * kColumns,
                       0, block.query_plane);
    own = own + 1 == block.num_own ? 0 : own + 1;
  }
#pragma unroll 1
  for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
    copy_box(key_map, block.keys(chunk), block.full(chunk), chunk * kColumns, block.first_key,
             block.plane);
  }
}

// Begins sums += queries keys^T, over all columns.
template <typename scalar_t>
__device__ __forceinline__ void multiply(const Block& block, float (&sums)[kSums]) {
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
  for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
    mbarrier_wait(block.full(chunk), 0);
    multiply_boxes<scalar_t>(sums, tile_descriptor(block.queries(chunk)),
                             tile_descriptor(block.keys(chunk)), true);
  }
}

// Of every 16 keys, the four from own_key(lane) on of token lane / 4 and of the one eight further
// on: with its neighbour a lane exchanges two scores of eight keys for two of the other eight, so
// that a warp stores 64 bytes of a token at once.
__device__ __forceinline__ int own_key(int lane) { return lane % 2 * 8 + lane / 2 % 2 * 4; }

__device__ __forceinline__ float4 own_scores(const float* of_16_keys, int lower, int lane) {
  const float* first = of_16_keys + 2 * lower;
  const float* second = first + 4;
  const bool odd = lane % 2 != 0;
  const float x = __shfl_xor_sync(kFullMask, odd ? first[0] : second[0], 1);
  const float y = __shfl_xor_sync(kFullMask, odd ? first[1] : second[1], 1);
  return odd ? float4{x, y, second[0], second[1]} : float4{first[0], first[1], x, y};
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Grid: tile of keys (x), an even number of them, the last maybe without a key; plane (y).
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_fwd_scores_wgmma_kernel(const __grid_constant__ ScoreTiles p,
                                             const __grid_constant__ CUtensorMap query_map,
                                             const __grid_constant__ CUtensorMap key_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(kAlignment) unsigned char shared[];
  const Block block(p, shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (warp == kMultiplierWarps && lane == 0) {
    prefetch_tensor_map(&key_map);
    prefetch_tensor_map(&query_map);
#pragma unroll 1
    for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
      prefetch_box(&key_map, chunk * kColumns, block.first_key, block.plane);
    }
  }
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int chunk = 0; chunk < block.num_chunks; ++chunk) mbarrier_init(block.full(chunk), 1);
    mbarrier_init_fence();
#pragma unroll 1
    for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
      mbarrier_expect_bytes(block.full(chunk), kChunkBytes);
    }
  }
  const int token = warp * 16 + lane / 4;
  const int key = block.first_key + own_key(lane);
  // Scores take up to 2^23 floats (kTensorCoreSmallBytes).
  float* out = p.scores + ((token * p.num_planes + block.plane) * p.score_stride + key);
  const int to_lower = 8 * p.num_planes * p.score_stride;
  __syncthreads();  // the barriers are initialised,
  cluster_arrive_relaxed();
  cluster_wait();  // in both blocks
  wait_for_words(reinterpret_cast<uintptr_t>(out), to_lower, p.num_tokens, block.base,
                 block.query_plane, block.num_own, block.first_own);
  wait_for_prerequisite_grid();
  release_dependent_grid();

  if (warp == kMultiplierWarps) {
    if (lane == 0) copy_all(block, &query_map, &key_map);
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();
    return;
  }
  float sums[kSums];
  multiply<scalar_t>(block, sums);
  // No block leaves before what it fetches for the other is there.
  cluster_arrive_relaxed();
  wgmma_wait<0>();
  wgmma_results(sums);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const float4 four = own_scores(sums + 8 * i, lower, lane);
      // The stride is a multiple of four: keys are there, or room for them, or none.
      if (token + 8 * lower < p.num_tokens && key + 16 * i < p.score_stride) {
        *reinterpret_cast<float4*>(out + lower * to_lower + 16 * i) = four;
      }
    }
  }
  cluster_wait();
#endif
}

template <typename scalar_t>
Status launch(const ProductKeyTopkParams& p, Stream stream) {
  CUtensorMap query_map, key_map;
  ULTRAMEM_RETURN_IF_ERROR(make_axis_maps(p, kTokens, kKeys, &query_map, &key_map));
  const ScoreTiles tiles{static_cast<float*>(p.workspace),
                         static_cast<int>(p.num_tokens),
                         small_score_stride(p),
                         2 * p.num_heads * p.tucker_rank,
                         p.num_heads,
                         p.num_queries,
                         p.tucker_rank,
                         static_cast<int>(ceil_div(p.key_dim, kColumns))};
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.num_keys, kCluster * kKeys) * kCluster),
                    static_cast<unsigned>(tiles.num_planes));
  return launch_overlapping_clusters(product_key_topk_fwd_scores_wgmma_kernel<scalar_t>, blocks,
                                     kCluster, kThreads, shared_bytes(tiles.num_chunks), stream,
                                     tiles, query_map, key_map);
}

ULTRAMEM_REGISTER_KERNEL(scores_wgmma_bf16, "product_key_topk_fwd_scores_wgmma<bf16>", kThreads,
                         product_key_topk_fwd_scores_wgmma_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(scores_wgmma_f16, "product_key_topk_fwd_scores_wgmma<fp16>", kThreads,
                         product_key_topk_fwd_scores_wgmma_kernel<__half>);

}  // namespace

bool small_scores_wgmma_applies(const ProductKeyTopkParams& p) {
  return sm90a_available() && p.num_tokens >= kLeastTokens && p.num_tokens <= kTokens &&
         p.key_dim >= kLeastKeyDim && p.key_dim <= kMostKeyDim;
}

Status launch_small_scores_wgmma(const ProductKeyTopkParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace ultramem::cuda
