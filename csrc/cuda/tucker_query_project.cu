// The product of tucker_query for a few dozen tokens and a large weight: projection = x W^T.
//
// Such a product takes as long as W takes to reach the multiprocessors: all of them read a part of
// it, once, and W is on its way to the L2 cache before the kernel ahead has ended. A block has 72
// rows of W by a quarter of D, so that the blocks for 2048 rows run at once although not all
// multiprocessors can be in a thread block cluster of four, and x of all tokens. One warp has boxes
// of 64 columns copied (TMA), one warpgroup multiplies them. Of a warp's 16 tokens one block of the
// cluster adds up the quarters, always in the same order.
#include "cluster.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "mma.cuh"
#include "shared_memory.cuh"
#include "sm90a.h"
#include "ultramem/tucker_query.h"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kCluster = 4;   // blocks, that share out D
constexpr int kTokens = 64;   // 16 for each warp that multiplies, and for each block
constexpr int kRows = 72;     // of W
constexpr int kColumns = 64;  // of x and W in a stage
constexpr int kRowBytes = 2 * kColumns;
constexpr int kXBytes = kTokens * kRowBytes;
constexpr int kStageBytes = kXBytes + kRows * kRowBytes;
constexpr int kStages = 8;
constexpr int kAlignment = 1024;  // of swizzled tiles
static_assert(kXBytes % kAlignment == 0 && kStageBytes % kAlignment == 0);
constexpr int kMultiplierWarps = 4;
constexpr int kThreads = (kMultiplierWarps + 1) * kWarpSize;
constexpr int kSums = kTokens * kRows / (kMultiplierWarps * kWarpSize);  // of a thread
// What a warp sends: four sums of each lane for every eight rows.
constexpr int kPieces = kRows / 8;
constexpr int kSentBytes = kPieces * kWarpSize * 16;
static_assert(kSums == 4 * kPieces && kTokens == 16 * kCluster && kCluster == kMultiplierWarps);
constexpr int kReceivedOffset = kStages * kStageBytes;
constexpr int kBarriersOffset = kReceivedOffset + kCluster * kSentBytes;
constexpr int kSharedBytes = kBarriersOffset + 8 * (2 * kStages + 1) + kAlignment;

struct Projection {
  int num_tokens;
  int64_t num_rows;  // of W
  int num_chunks;    // of kColumns of D
  void* out;         // [T, rows]
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a block works on, and where it keeps it.
struct Block {
  uint32_t base;
  int rank;  // in the cluster
  int first_row;
  int first_chunk;
  int num_chunks;

  __device__ Block(const Projection& p, const unsigned char* shared)
      : base((shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment),
        rank(static_cast<int>(cluster_rank())),
        first_row(static_cast<int>(blockIdx.x) / kCluster * kRows) {
    const int share = (p.num_chunks + kCluster - 1) / kCluster;
    first_chunk = rank * share;
    num_chunks = max(min(share, p.num_chunks - first_chunk), 0);
  }

  __device__ static uint32_t parity(int step) { return step / kStages & 1; }
  __device__ uint32_t x(int step) const { return base + step % kStages * kStageBytes; }
  __device__ uint32_t weight(int step) const { return x(step) + kXBytes; }
  __device__ uint32_t full(int step) const { return base + kBarriersOffset + 8 * (step % kStages); }
  __device__ uint32_t empty(int step) const { return full(step) + 8 * kStages; }
  __device__ uint32_t received(int source) const {
    return base + kReceivedOffset + source * kSentBytes;
  }
  __device__ uint32_t received_barrier() const { return base + kBarriersOffset + 8 * 2 * kStages; }
};

// Begins sums += x W^T over the columns of a stage.
template <typename scalar_t>
__device__ __forceinline__ void multiply_stage(const Block& block, int step, float (&sums)[kSums]) {
  mbarrier_wait(block.full(step), Block::parity(step));
  multiply_boxes<scalar_t>(sums, tile_descriptor(block.x(step)),
                           tile_descriptor(block.weight(step)), true);
}

template <typename scalar_t>
__device__ __forceinline__ void multiply(const Block& block, float (&sums)[kSums]) {
  const bool leader = threadIdx.x % kWarpSize == 0;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  if (block.num_chunks == 0) return;
  multiply_stage<scalar_t>(block, 0, sums);
#pragma unroll 1
  for (int step = 1; step < block.num_chunks; ++step) {
    multiply_stage<scalar_t>(block, step, sums);
    wgmma_wait<1>();
    if (leader) mbarrier_arrive(block.empty(step - 1));
  }
  wgmma_wait<0>();
  wgmma_results(sums);
}

__device__ __forceinline__ void send(const Block& block, int owner, int lane,
                                     const float (&sums)[kSums]) {
  const uint32_t to = address_in_block(block.received(block.rank), owner) + lane * 16;
  const uint32_t barrier = address_in_block(block.received_barrier(), owner);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const float* four = sums + 4 * piece;
    store_async(to + piece * kWarpSize * 16, {four[0], four[1], four[2], four[3]}, barrier);
  }
}

// Of the block's tokens the sums over the cluster. A lane has two neighbouring rows of each eight
// of token lane / 4, and the same of the token eight further on.
template <typename scalar_t>
__device__ __forceinline__ void store_total(const Projection& p, const Block& block, int lane,
                                            const float (&sums)[kSums]) {
  mbarrier_wait_cluster(block.received_barrier(), 0);
  const int token = 16 * block.rank + lane / 4;
  const int row = block.first_row + lane % 4 * 2;
  auto* out = static_cast<scalar_t*>(p.out) + token * p.num_rows + row;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    float total[4] = {};
#pragma unroll
    for (int source = 0; source < kCluster; ++source) {
      float part[4] = {sums[4 * piece], sums[4 * piece + 1], sums[4 * piece + 2],
                       sums[4 * piece + 3]};
      if (source != block.rank) {
        load_shared_floats(block.received(source) + (piece * kWarpSize + lane) * 16, part);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += part[e];
    }
    if (row + piece * 8 >= p.num_rows) continue;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      if (token + 8 * lower < p.num_tokens) {
        *reinterpret_cast<uint32_t*>(out + 8 * lower * p.num_rows + piece * 8) =
            pack_rounded<scalar_t>(total[2 * lower], total[2 * lower + 1]);
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Grid: a cluster for every 72 rows.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    tucker_query_project_kernel(const __grid_constant__ Projection p,
                                const __grid_constant__ CUtensorMap x_map,
                                const __grid_constant__ CUtensorMap weight_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  const Block block(p, shared);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (warp == kMultiplierWarps && lane == 0) {
    prefetch_tensor_map(&weight_map);
    prefetch_tensor_map(&x_map);
    for (int i = 0; i < block.num_chunks; ++i) {
      prefetch_box(&weight_map, (block.first_chunk + i) * kColumns, block.first_row, 0);
    }
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(block.full(stage), 1);
      mbarrier_init(block.empty(stage), kMultiplierWarps);
    }
    mbarrier_init(block.received_barrier(), 1);
    mbarrier_init_fence();
    if (16 * block.rank < p.num_tokens) {
      mbarrier_expect_bytes(block.received_barrier(), (kCluster - 1) * kSentBytes);
    }
  }
  __syncthreads();           // the barriers are initialised
  cluster_arrive_relaxed();  // and others may send, once all of the cluster have arrived
  wait_for_prerequisite_grid();
  release_dependent_grid();

  if (warp == kMultiplierWarps) {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < block.num_chunks; ++i) {
        mbarrier_wait(block.empty(i), Block::parity(i) ^ 1);
        mbarrier_expect_bytes(block.full(i), kStageBytes);
        const int column = (block.first_chunk + i) * kColumns;
        copy_box(&weight_map, block.weight(i), block.full(i), column, block.first_row, 0);
        copy_box(&x_map, block.x(i), block.full(i), column, 0, 0);
      }
    }
    __syncwarp();
    cluster_wait();
    return;
  }
  float sums[kSums];
  multiply<scalar_t>(block, sums);
  cluster_wait();
  if (16 * warp >= p.num_tokens) return;
  if (warp == block.rank) {
    store_total<scalar_t>(p, block, lane, sums);
  } else {
    send(block, warp, lane, sums);
  }
#endif
}

template <typename scalar_t>
Status launch(const TuckerQueryParams& p, Stream stream) {
  const int64_t num_rows = p.num_segments * p.key_dim;
  CUtensorMap x_map, weight_map;
  ULTRAMEM_RETURN_IF_ERROR(make_tensor_map(&x_map, p.x, p.dtype, p.d_model, p.num_tokens, 1,
                                           p.d_model, p.num_tokens * p.d_model, kTokens));
  ULTRAMEM_RETURN_IF_ERROR(make_tensor_map(&weight_map, p.weight, p.dtype, p.d_model, num_rows, 1,
                                           p.d_model, num_rows * p.d_model, kRows));
  const Projection projection{static_cast<int>(p.num_tokens), num_rows,
                              static_cast<int>(ceil_div(p.d_model, kColumns)), p.projection};
  const dim3 num_blocks(static_cast<unsigned>(ceil_div(num_rows, kRows) * kCluster));
  return launch_overlapping_clusters(tucker_query_project_kernel<scalar_t>, num_blocks, kCluster,
                                     kThreads, kSharedBytes, stream, projection, x_map, weight_map);
}

ULTRAMEM_REGISTER_KERNEL(project_bf16, "tucker_query_project<bf16>", kThreads,
                         tucker_query_project_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(project_f16, "tucker_query_project<fp16>", kThreads,
                         tucker_query_project_kernel<__half>);

}  // namespace

bool tucker_query_project_supported(const TuckerQueryParams& p) {
  constexpr int64_t kMaxSize = 1 << 20;
  return sm90a_available() && (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         p.num_tokens >= 1 && p.num_tokens <= kTokens && p.d_model >= 8 && p.d_model <= kMaxSize &&
         p.d_model % 8 == 0 && p.key_dim >= 1 && p.num_segments >= 1 &&
         p.num_segments * p.key_dim <= kMaxSize && p.num_segments * p.key_dim % 2 == 0 &&
         is_aligned(p.x) && is_aligned(p.weight) && is_aligned(p.projection);
}

Status tucker_query_project(const TuckerQueryParams& p, Stream stream) {
  if (!tucker_query_project_supported(p)) {
    return Status::invalid_argument(
        "tucker_query: ask tucker_query_project_supported whether this kernel takes the shape");
  }
  if (p.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(p, stream);
  return launch<__half>(p, stream);
}

}  // namespace ultramem::cuda
