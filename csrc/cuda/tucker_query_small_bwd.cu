// tucker_query for few tokens, backward. With P = 2 H Q Kd and r = 1 / rms:
//   dP = r (g w - p r^2 mean(g w p))   for the gradient g and the projection p of each segment
//   grad_x = dP W,   grad_weight = dP^T x,   grad_norm_weight = sum over tokens, segments of g p r
//
// A block works on some columns of D and the rows of W of one segment. It has then all that the
// norm needs: it makes dP itself, from g and p, which come from the L2 cache, while its tile of W
// is on the way from memory. Where there are many tokens a kernel ahead makes dP, while the tiles
// of W come. The block writes its tile of grad_weight and has its share of grad_x. The blocks of a
// thread block cluster have the same columns and a segment each. Every token belongs to one of
// them, to which the others send their shares of grad_x.
#include "tucker_query_small_bwd.cuh"

#include <optional>

#include "kernel_registry.h"

namespace ultramem::cuda {
namespace {

using namespace tucker_query_bwd;

constexpr int kWideColumns = 80;
constexpr int kNarrowColumns = 32;

constexpr int min_blocks(int token_tiles, int columns) {
  return token_tiles <= 4 && columns == kNarrowColumns ? 2 : 1;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Tensor-core operands of 16 rows of W or x by the columns of tiles 2 `pair` and 2 `pair` + 1.
template <typename T>
__device__ __forceinline__ void load_tile_pair(uint32_t (&b)[4], const unsigned char* rows,
                                               int pair) {
  const int lane = threadIdx.x % kWarpSize;
  const int tile = pair * 2 + lane / 16;
  ldmatrix_x4_trans(b, shared_address(rows + lane % 16 * T::kStride + tile * 16));
}

// The block's tile of grad_weight, the warps by turns 16 rows of it.
template <typename scalar_t, typename T>
__device__ __forceinline__ void store_grad_weight(const TuckerQueryBwdParams& p, const Plan& plan,
                                                  const Block& block) {
  constexpr int kGroups = T::kColumnTiles / 4;      // of columns in the order of store_x
  constexpr bool kRest = T::kColumnTiles % 4 != 0;  // of two tiles
  const int lane = threadIdx.x % kWarpSize;
  const int matrix = lane / 8;
  const int matrix_row = lane % 8;
  const auto columns = static_cast<int>(p.d_model - block.first_column);
  auto* tile_target = static_cast<scalar_t*>(p.grad_weight) + block.first_column +
                      block.rank * p.key_dim * p.d_model;
#pragma unroll 1
  for (int item = threadIdx.x / kWarpSize; item < plan.rows / 16; item += kWarps) {
    float acc[T::kColumnTiles][4] = {};
#pragma unroll
    for (int step = 0; step < T::kTokens / 16; ++step) {
      uint32_t a[4];
      const int token = step * 16 + matrix / 2 * 8 + matrix_row;
      const int row = item * 16 + matrix % 2 * 8;
      ldmatrix_x4_trans(a, shared_address(block.grad + token * plan.row_stride + row * 2));
#pragma unroll
      for (int pair = 0; pair < T::kColumnTiles / 2; ++pair) {
        uint32_t b[4];
        load_tile_pair<T>(b, block.x + step * 16 * T::kStride, pair);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          mma_m16n8k16<scalar_t>(acc[pair * 2 + tile], a, b[tile * 2], b[tile * 2 + 1]);
        }
      }
    }
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = item * 16 + lower * 8 + lane / 4;
      if (row >= p.key_dim) continue;
      scalar_t* target = tile_target + row * p.d_model;
      auto packed = [&](int tile) {
        return pack_rounded<scalar_t>(acc[tile][lower * 2], acc[tile][lower * 2 + 1]);
      };
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int column = group * kOrderColumns + lane % 4 * kVector;
        const uint4 piece = {packed(group * 4), packed(group * 4 + 1), packed(group * 4 + 2),
                             packed(group * 4 + 3)};
        // Four stores otherwise: the compiler takes the piece apart.
        if (column < columns) __stcg(reinterpret_cast<uint4*>(target + column), piece);
      }
      if constexpr (kRest) {
        const int column = kGroups * kOrderColumns + lane % 4 * (kVector / 2);
        const uint2 half = {packed(kGroups * 4), packed(kGroups * 4 + 1)};
        if (column < columns) __stcg(reinterpret_cast<uint2*>(target + column), half);
      }
    }
  }
}

// g p / rms, summed over the tokens: a warp for each of the cluster's vectors.
template <typename scalar_t, typename T>
__device__ __forceinline__ void add_gain_grad(const Block& block) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int i = threadIdx.x / kWarpSize; i < block.num_gain_vectors; i += kWarps) {
    float sums[kVector] = {};
#pragma unroll
    for (int first = 0; first < T::kTokens; first += kWarpSize) {
      const int token = first + lane % T::kLaneTokens;
      float grads[kVector];
      float values[kVector];
      unpack<scalar_t>(reinterpret_cast<const uint4*>(block.gain_grads)[i * T::kTokens + token],
                       grads);
      unpack<scalar_t>(reinterpret_cast<const uint4*>(block.gain_values)[i * T::kTokens + token],
                       values);
      // Half of the lanes have none of 16 tokens.
      const float rstd = lane < T::kTokens ? block.rstd[token] : 0.0f;
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] = fmaf(grads[e], values[e] * rstd, sums[e]);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float sum = warp_sum(sums[e]);
      if (lane == e) block.gain_sums[i * kVector + e] = sum;
    }
  }
}

// dP W of 16 tokens over the warp's part of the rows.
template <typename scalar_t, typename T>
__device__ __forceinline__ void multiply(const Plan& plan, const Block& block,
                                         float (&acc)[T::kColumnTiles][4]) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int token = warp % T::kTokenParts * 16 + lane % 16;
  const unsigned char* grads = block.grad + token * plan.row_stride + lane / 16 * 16;
#pragma unroll 2
  for (int step = warp / T::kTokenParts; step < plan.rows / 16; step += T::kRowParts) {
    uint32_t a[4];
    ldmatrix_x4(a, shared_address(grads + step * 32));
#pragma unroll
    for (int pair = 0; pair < T::kColumnTiles / 2; ++pair) {
      uint32_t b[4];
      load_tile_pair<T>(b, block.weight + step * 16 * T::kStride, pair);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma_m16n8k16<scalar_t>(acc[pair * 2 + tile], a, b[tile * 2], b[tile * 2 + 1]);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_partials(const Block& block,
                                               const float (&acc)[T::kColumnTiles][4]) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int token = warp % T::kTokenParts * 16 + lane / 4;
  float* target = block.partials + warp / T::kTokenParts * T::kPartialSize +
                  token * T::kPartialStride + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < T::kColumnTiles; ++tile) {
    *reinterpret_cast<float2*>(target + tile * 8) = {acc[tile][0], acc[tile][1]};
    if (T::kPartialTokens >= 16) {
      *reinterpret_cast<float2*>(target + 8 * T::kPartialStride + tile * 8) = {acc[tile][2],
                                                                               acc[tile][3]};
    }
  }
}

__device__ __forceinline__ void add_four(float4& sum, const float* four) {
  const float4 add = *reinterpret_cast<const float4*>(four);
  sum.x += add.x;
  sum.y += add.y;
  sum.z += add.z;
  sum.w += add.w;
}

// The block's share of grad_x, summed over the warps that shared the rows, to the tokens' owners.
template <typename T, int kColumns>
__device__ __forceinline__ void send_grad_x(const Plan& plan, const Block& block) {
  constexpr int kFours = kColumns / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < block.num_tokens * kFours; i += kThreads) {
    const int token = i / kFours;
    const int column = i % kFours * 4;
    float4 sum{};
#pragma unroll
    for (int part = 0; part < T::kRowParts; ++part) {
      add_four(sum, block.partials + part * T::kPartialSize + token * T::kPartialStride + column);
    }
    const auto owner = static_cast<uint32_t>(token % plan.cluster_blocks);
    const int slot = token / plan.cluster_blocks;
    const float* target =
        block.received + (slot * plan.cluster_blocks + block.rank) * kColumns + column;
    store_async(address_in_block(shared_address(target), owner), sum,
                address_in_block(block.received_barrier, owner));
  }
}

// The block's share of grad_norm_weight, to the first block.
__device__ __forceinline__ void send_gain_grad(const Plan& plan, const Block& block) {
  const int fours = block.num_gain_vectors * (kVector / 4);
#pragma unroll 1
  for (int i = threadIdx.x; i < fours; i += kThreads) {
    float4 sum{};
    add_four(sum, block.gain_sums + i * 4);
    const float* target = block.gain_totals + block.rank * plan.tile_vectors * kVector + i * 4;
    store_async(address_in_block(shared_address(target), 0), sum,
                address_in_block(block.received_barrier, 0));
  }
}

template <typename scalar_t, int kColumns>
__device__ __forceinline__ void store_grad_x(const TuckerQueryBwdParams& p, const Plan& plan,
                                             const Block& block) {
  constexpr int kFours = kColumns / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < block.own_tokens * kFours; i += kThreads) {
    const int slot = i / kFours;
    const int column = i % kFours * 4;
    if (block.first_column + column >= p.d_model) continue;
    float4 sum{};
#pragma unroll 4
    for (int other = 0; other < plan.cluster_blocks; ++other) {
      add_four(sum, block.received + (slot * plan.cluster_blocks + other) * kColumns + column);
    }
    const int64_t token = block.rank + slot * plan.cluster_blocks;
    *reinterpret_cast<uint2*>(static_cast<scalar_t*>(p.grad_x) + token * p.d_model +
                              block.first_column + column) = {pack_rounded<scalar_t>(sum.x, sum.y),
                                                              pack_rounded<scalar_t>(sum.z, sum.w)};
  }
}

__device__ __forceinline__ void store_gain_grad(const TuckerQueryBwdParams& p, const Plan& plan,
                                                const Block& block) {
#pragma unroll 1
  for (int i = threadIdx.x; i < block.num_gain_vectors * kVector; i += kThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int other = 0; other < plan.cluster_blocks; ++other) {
      sum += block.gain_totals[other * plan.tile_vectors * kVector + i];
    }
    const int64_t row =
        int64_t{block.tile + i / kVector * plan.column_tiles} * kVector + i % kVector;
    store_element(p.grad_norm_weight, p.norm_dtype, row, sum);
  }
}

// dP, and the copies of all that the products need on their way: in the first group that is pending
// then what the gradient of the gain needs, in the second W. What dP needs is requested ahead of
// them, else it would arrive behind them.
template <typename scalar_t, typename T>
__device__ __forceinline__ void begin(const TuckerQueryBwdParams& p, const Plan& plan,
                                      const Block& block) {
  if (p.grad_x != nullptr) prefetch_weight<scalar_t, T>(p, block);
  wait_for_prerequisite_grid();
  release_dependent_grid();
  uint32_t gains[kThreadGains] = {};
#pragma unroll
  for (int i = 0; i < kThreadGains; ++i) {
    const int row = i * kThreads + static_cast<int>(threadIdx.x);
    if (row < p.key_dim) gains[i] = load_bits(p.norm_weight, p.norm_dtype, row);
  }
  copy_norm_rows<scalar_t, T>(p, plan, block);
  cp_async_commit();
  uint4 x[T::kThreadX];
  load_x<scalar_t, T>(p, block, x);
  copy_gain_rows<scalar_t, T>(p, plan, block);
  cp_async_commit();
  if (p.grad_x != nullptr) copy_weight<scalar_t, T>(p, plan, block);
  cp_async_commit();
#pragma unroll
  for (int i = 0; i < kThreadGains; ++i) {
    const int row = i * kThreads + static_cast<int>(threadIdx.x);
    if (row < plan.rows) block.gains[row] = bits_to_float(gains[i], p.norm_dtype);
  }
  store_x<T>(block, x);
  __syncthreads();
  cp_async_wait<2>();
  make_grad<scalar_t, T>(p, plan, block);
}

// The same where the kernel ahead makes dP. It has waited for those ahead of it before it let this
// one begin: all but dP is there.
template <typename scalar_t, typename T>
__device__ __forceinline__ void begin_given(const TuckerQueryBwdParams& p,
                                            const Workspace& workspace, const Plan& plan,
                                            const Block& block) {
  uint4 x[T::kThreadX];
  load_x<scalar_t, T>(p, block, x);
  copy_gain_rows<scalar_t, T>(p, plan, block);
  cp_async_commit();
  if (p.grad_x != nullptr) copy_weight<scalar_t, T>(p, plan, block);
  cp_async_commit();
  store_x<T>(block, x);
  wait_for_prerequisite_grid();
  release_dependent_grid();
  copy_given_grad<scalar_t, T>(p, workspace, plan, block);
  mbarrier_wait(block.grad_barrier, 0);
}

#endif  // __CUDA_ARCH__ >= 900

// Grid: a cluster for each tile of columns.
template <typename scalar_t, int kTokenTiles, int kColumns>
__global__ void __launch_bounds__(kThreads, min_blocks(kTokenTiles, kColumns))
    tucker_query_small_bwd_kernel(__grid_constant__ const TuckerQueryBwdParams p,
                                  __grid_constant__ const Workspace workspace,
                                  __grid_constant__ const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using T = Traits<kTokenTiles, kColumns>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Block block(p, plan, shared);
  const int gain_bytes = block.num_gain_vectors * kVector * 4;
  const int received_bytes =
      plan.cluster_blocks * ((p.grad_x != nullptr ? block.own_tokens * kColumns * 4 : 0) +
                             (block.rank == 0 ? gain_bytes : 0));
  if (threadIdx.x == 0) {
    mbarrier_init(block.received_barrier, 1);
    mbarrier_init(block.grad_barrier, 1);
    mbarrier_init_fence();
    fence_shared_writes();
    mbarrier_expect_bytes(block.received_barrier, static_cast<uint32_t>(received_bytes));
    if (T::kGradGiven) {
      mbarrier_expect_bytes(block.grad_barrier,
                            static_cast<uint32_t>(p.num_tokens * p.key_dim * 2));
    }
  }

  __syncthreads();           // the barriers are initialised
  cluster_arrive_relaxed();  // and others may send, once all of the cluster have arrived
  if constexpr (T::kGradGiven) {
    begin_given<scalar_t, T>(p, workspace, plan, block);
  } else {
    begin<scalar_t, T>(p, plan, block);
  }
  cp_async_wait<1>();
  __syncthreads();  // dP and x are there
  add_gain_grad<scalar_t, T>(block);
  cp_async_wait<0>();
  __syncthreads();  // W is there
  if (p.grad_x != nullptr) {
    float acc[T::kColumnTiles][4] = {};
    multiply<scalar_t, T>(plan, block, acc);
    __syncthreads();  // all have read W: the partial sums take its place
    store_partials<T>(block, acc);
  }
  __syncthreads();
  cluster_wait();
  send_gain_grad(plan, block);
  if (p.grad_x != nullptr) send_grad_x<T, kColumns>(plan, block);
  // While the sums are on their way: nobody else waits for this.
  if (p.grad_weight != nullptr) store_grad_weight<scalar_t, T>(p, plan, block);
  if (received_bytes == 0) return;
  mbarrier_wait_cluster(block.received_barrier, 0);
  if (p.grad_x != nullptr) store_grad_x<scalar_t, kColumns>(p, plan, block);
  if (block.rank == 0) store_gain_grad(p, plan, block);
#endif
}

// ---- the kernel ahead -------------------------------------------------------------------------

constexpr int kNormWarps = 2;
constexpr int kNormThreads = kNormWarps * kWarpSize;

// dP and 1 / rms: a warp for each token and segment.
template <typename scalar_t>
__global__ void __launch_bounds__(kNormThreads)
    tucker_query_small_norm_bwd_kernel(__grid_constant__ const TuckerQueryBwdParams p,
                                       __grid_constant__ const Workspace workspace) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  wait_for_prerequisite_grid();
  release_dependent_grid();  // no sooner: see begin_given
  const int64_t segment = int64_t{blockIdx.x} * kNormWarps + threadIdx.x / kWarpSize;
  if (segment >= p.num_tokens * p.num_segments) return;
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kLaneVectors = kMaxKeyDim / (kWarpSize * kVector);
  const auto key_dim = static_cast<int>(p.key_dim);
  float weighted[kLaneVectors][kVector] = {};
  float values[kLaneVectors][kVector] = {};
#pragma unroll
  for (int n = 0; n < kLaneVectors; ++n) {
    const int row = (n * kWarpSize + lane) * kVector;
    if (row >= key_dim) continue;
    const int64_t element = segment * key_dim + row;
    const uint4 grad = __ldcg(
        reinterpret_cast<const uint4*>(static_cast<const scalar_t*>(p.grad_query) + element));
    const uint4 value = __ldcg(
        reinterpret_cast<const uint4*>(static_cast<const scalar_t*>(p.projection) + element));
    uint32_t gains[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) gains[e] = load_bits(p.norm_weight, p.norm_dtype, row + e);
    unpack<scalar_t>(grad, weighted[n]);
    unpack<scalar_t>(value, values[n]);
#pragma unroll
    for (int e = 0; e < kVector; ++e) weighted[n][e] *= bits_to_float(gains[e], p.norm_dtype);
  }
  float squares = 0.0f;
  float dot = 0.0f;
#pragma unroll
  for (int n = 0; n < kLaneVectors; ++n) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      squares = fmaf(values[n][e], values[n][e], squares);
      dot = fmaf(weighted[n][e], values[n][e], dot);
    }
  }
  const float per_element = 1.0f / static_cast<float>(key_dim);
  const float mean = warp_sum(squares) * per_element;
  const float rstd = rsqrtf(mean + static_cast<float>(p.eps));
  const float along = warp_sum(dot) * per_element * rstd * rstd;
  if (lane == 0) workspace.rstd[segment] = rstd;
#pragma unroll
  for (int n = 0; n < kLaneVectors; ++n) {
    const int row = (n * kWarpSize + lane) * kVector;
    if (row >= key_dim) continue;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      values[n][e] = rstd * (weighted[n][e] - values[n][e] * along);
    }
    auto* target = static_cast<scalar_t*>(workspace.grad) + segment * key_dim + row;
    *reinterpret_cast<uint4*>(target) = pack<scalar_t>(values[n]);
  }
#endif
}

// ---- choosing and launching -------------------------------------------------------------------

ClusterLimits limits_of_device() {
  static ClusterLimitsCache cache;
  return cluster_limits(tucker_query_small_bwd_kernel<__nv_bfloat16, 8, kWideColumns>, kThreads,
                        cache);
}

// Calls the lambda with kTokenTiles bound to the tiles of 8 that hold the tokens.
#define ULTRAMEM_TOKEN_SWITCH(num_tokens, ...) \
  [&] {                                        \
    if ((num_tokens) <= 8) {                   \
      constexpr int kTokenTiles = 1;           \
      return __VA_ARGS__();                    \
    }                                          \
    if ((num_tokens) <= 16) {                  \
      constexpr int kTokenTiles = 2;           \
      return __VA_ARGS__();                    \
    }                                          \
    if ((num_tokens) <= 32) {                  \
      constexpr int kTokenTiles = 4;           \
      return __VA_ARGS__();                    \
    }                                          \
    constexpr int kTokenTiles = 8;             \
    return __VA_ARGS__();                      \
  }()

// Narrow tiles, which are more blocks, where all clusters find room at once, by what is known of
// the large and the portable cluster. Of blocks of half a multiprocessor there is room for twice as
// many.
std::optional<Plan> choose_plan(const TuckerQueryBwdParams& p) {
  const ClusterLimits limits = limits_of_device();
  const bool portable = p.num_segments <= kPortableCluster;
  const int blocks = portable ? limits.portable * kPortableCluster : limits.large * kLargeCluster;
  if (blocks == 0) return std::nullopt;
  const Plan narrow = ULTRAMEM_TOKEN_SWITCH(
      p.num_tokens, [&] { return make_plan<kTokenTiles, kNarrowColumns>(p); });
  const Plan wide =
      ULTRAMEM_TOKEN_SWITCH(p.num_tokens, [&] { return make_plan<kTokenTiles, kWideColumns>(p); });
  constexpr int kReservedBytes = 1024;  // of a multiprocessor's shared memory, by each block
  const bool pairs = 2 * (narrow.shared_bytes + kReservedBytes) <= limits.shared_bytes &&
                     p.num_tokens <= 4 * kTokenTile;
  const int room = (pairs ? 2 : 1) * (blocks / narrow.cluster_blocks);
  const bool narrow_fits = narrow.shared_bytes <= limits.shared_bytes;
  const bool wide_fits = wide.shared_bytes <= limits.shared_bytes;
  if (narrow_fits && (narrow.column_tiles <= room || !wide_fits)) return narrow;
  if (wide_fits) return wide;
  return std::nullopt;
}

template <typename scalar_t>
Status launch(const TuckerQueryBwdParams& p, const Plan& plan, Stream stream) {
  const Workspace workspace(p);
  return ULTRAMEM_TOKEN_SWITCH(p.num_tokens, [&]() -> Status {
    if (Traits<kTokenTiles, kNarrowColumns>::kGradGiven) {
      const auto norm_blocks =
          static_cast<unsigned>(ceil_div(p.num_tokens * p.num_segments, kNormWarps));
      ULTRAMEM_RETURN_IF_ERROR(launch_overlapping(tucker_query_small_norm_bwd_kernel<scalar_t>,
                                                  dim3(norm_blocks), kNormThreads, 0, stream, p,
                                                  workspace));
    }
    auto* kernel = plan.columns == kWideColumns
                       ? tucker_query_small_bwd_kernel<scalar_t, kTokenTiles, kWideColumns>
                       : tucker_query_small_bwd_kernel<scalar_t, kTokenTiles, kNarrowColumns>;
    const auto num_blocks = static_cast<unsigned>(plan.column_tiles * plan.cluster_blocks);
    return launch_overlapping_clusters(kernel, num_blocks, plan.cluster_blocks, kThreads,
                                       plan.shared_bytes, stream, p, workspace, plan);
  });
}

bool fits(const TuckerQueryBwdParams& p) {
  constexpr int64_t kMaxSize = 1 << 20;
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.num_tokens >= 1 &&
         p.d_model >= 8 && p.d_model <= kMaxSize && p.d_model % 8 == 0 && p.key_dim >= 8 &&
         p.key_dim <= kMaxKeyDim && p.key_dim % 8 == 0 && p.num_segments >= 1 &&
         p.num_segments <= kLargeCluster && p.num_tokens <= kTuckerQuerySmallTokens &&
         is_aligned(p.x) && is_aligned(p.weight) && is_aligned(p.projection) &&
         is_aligned(p.grad_query) && is_aligned(p.grad_x) && is_aligned(p.grad_weight);
}

ULTRAMEM_REGISTER_KERNEL(norm_bwd_bf16, "tucker_query_small_norm_bwd<bf16>", kNormThreads,
                         tucker_query_small_norm_bwd_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_8_bf16, "tucker_query_small_bwd<bf16, 8 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 1, kWideColumns>);
ULTRAMEM_REGISTER_KERNEL(bwd_16_bf16, "tucker_query_small_bwd<bf16, 16 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 2, kWideColumns>);
ULTRAMEM_REGISTER_KERNEL(bwd_32_bf16, "tucker_query_small_bwd<bf16, 32 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 4, kWideColumns>);
ULTRAMEM_REGISTER_KERNEL(bwd_64_bf16, "tucker_query_small_bwd<bf16, 64 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 8, kWideColumns>);

}  // namespace

bool tucker_query_small_bwd_supported(const TuckerQueryBwdParams& params) {
  return fits(params) && choose_plan(params).has_value();
}

size_t tucker_query_small_bwd_workspace(const TuckerQueryBwdParams& params) {
  return params.num_tokens > 4 * kTokenTile ? Workspace::bytes(params) : 0;
}

Status tucker_query_small_bwd(const TuckerQueryBwdParams& params, Stream stream) {
  std::optional<Plan> plan;
  if (fits(params)) plan = choose_plan(params);
  if (!plan.has_value()) {
    return Status::invalid_argument(
        "tucker_query_bwd: ask tucker_query_small_bwd_supported whether this kernel takes the "
        "shape");
  }
  if (params.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, *plan, stream);
  return launch<__half>(params, *plan, stream);
}

}  // namespace ultramem::cuda
