// tucker_query for few tokens, forward: query = RMSNorm_Kd(x W^T) in one kernel.
//
// A thread block cluster works on one segment (Kd rows of W), its blocks on a tile of rows by a
// slice of D each, so that W is read once and x once per tile of rows. Their partial sums meet in
// distributed shared memory, and so do the sums of squares that the norm needs.
//
// In a block every warp multiplies 32 rows of W with all tokens, taking turns over the slice where
// there are fewer rows than warps. A fragment of W is used by one thread only. It is copied to
// where that thread alone reads it, 16 consecutive bytes a row: within 32 columns the order in
// which tensor cores see them is free, as long as x is read in the same order.
#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "async_copy.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "mma.cuh"
#include "ultramem/tucker_query.h"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kUnitRows = 32;     // rows of W that a warp multiplies: two tiles of 16
constexpr int kStepColumns = 32;  // columns of one step: two tensor-core products
constexpr int kStepBytes = kStepColumns * 2;
constexpr int kStepPieces = 4;    // 16-byte pieces of W that a thread needs for a step
constexpr int kMaxRingSteps = 8;  // steps in flight
constexpr int kRingStepBytes = kStepPieces * kThreads * 16;
constexpr int kTokenTile = 8;
// More than the 8 blocks of a portable cluster; Hopper allows 16.
constexpr int kLargeCluster = 16;
constexpr int kPortableCluster = 8;
constexpr int kMaxGroupRows = kWarps * kUnitRows;

// How a cluster shares out a segment. A block is (row group, column group).
struct Plan {
  int cluster_blocks;
  int column_groups;
  int group_rows;      // rows of W of a row group, a multiple of 16
  int group_steps;     // steps of a column group
  int units;           // warps that share the rows of a block
  int unit_warps;      // warps that share the steps of a unit
  int x_stride;        // bytes from token to token of the block's slice of x
  int partial_stride;  // floats from token to token of its partial sums
  int x_offset;        // bytes into shared memory, behind the ring and the partial sums
  int gains_offset;    // behind x
  int shared_bytes;
};

// Behind the gains: 1 / rms and the sums of squares, for each token, and the barrier of x.
constexpr int kTailBytes = 2 * kTuckerQuerySmallTokens * 4 + 16;

Plan make_plan(const TuckerQueryParams& p, int cluster_blocks, int column_groups, int token_tiles) {
  Plan plan{};
  plan.cluster_blocks = cluster_blocks;
  plan.column_groups = column_groups;
  const int row_groups = cluster_blocks / column_groups;
  plan.group_rows = static_cast<int>(16 * ceil_div(p.key_dim, 16 * row_groups));
  const int64_t steps = ceil_div(p.d_model, kStepColumns);
  plan.group_steps = static_cast<int>(ceil_div(steps, column_groups));
  plan.units = static_cast<int>(ceil_div(plan.group_rows, kUnitRows));
  plan.unit_warps = std::max(kWarps / plan.units, 1);
  // An odd number of 64-byte steps: the 16-byte reads of two neighbouring tokens then fall into
  // different banks.
  plan.x_stride = (plan.group_steps | 1) * kStepBytes;
  // 4 more than a multiple of 16, so that the fragments of a warp are written without conflicts.
  plan.partial_stride = plan.units * kUnitRows + 4;
  const int tokens = token_tiles * kTokenTile;
  const int warp_steps = static_cast<int>(ceil_div(plan.group_steps, plan.unit_warps));
  const int ring_bytes = std::min(warp_steps, kMaxRingSteps) * kRingStepBytes;
  const int partial_bytes = plan.unit_warps * tokens * plan.partial_stride * 4;
  plan.x_offset = std::max(ring_bytes, partial_bytes);
  plan.gains_offset = plan.x_offset + tokens * plan.x_stride;
  plan.shared_bytes = plan.gains_offset + plan.units * kUnitRows * 4 + kTailBytes;
  return plan;
}

// Four values of a row of the output, which may end among them.
template <typename scalar_t>
__device__ __forceinline__ void store_four(scalar_t* target, const float (&values)[4], int count,
                                           bool aligned) {
  if (aligned && count >= 4) {
    scalar_t rounded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = from_float<scalar_t>(values[i]);
    uint2 packed;
    memcpy(&packed, rounded, sizeof(packed));
    *reinterpret_cast<uint2*>(target) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) target[i] = from_float<scalar_t>(values[i]);
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

// What a block works on, and where it keeps it.
struct Block {
  __device__ Block(const TuckerQueryParams& p, const Plan& plan, unsigned char* shared)
      : shared(shared) {
    const auto rank = static_cast<int>(cg::this_cluster().block_rank());
    segment = blockIdx.x / plan.cluster_blocks;
    row_groups = plan.cluster_blocks / plan.column_groups;
    row_group = rank / plan.column_groups;
    column_group = rank % plan.column_groups;
    num_tokens = static_cast<int>(p.num_tokens);
    first_row = row_group * plan.group_rows;
    num_rows = max(min(static_cast<int>(p.key_dim) - first_row, plan.group_rows), 0);
    const int width = plan.group_steps * kStepColumns;
    first_column = column_group * width;
    num_columns = max(min(static_cast<int>(p.d_model) - first_column, width), 0);
    num_steps = (num_columns + kStepColumns - 1) / kStepColumns;
    own_tokens = (num_tokens - column_group + plan.column_groups - 1) / plan.column_groups;

    partials = reinterpret_cast<float*>(shared);
    x_tile = shared + plan.x_offset;
    gains = reinterpret_cast<float*>(shared + plan.gains_offset);
    squares = gains + plan.units * kUnitRows;
    rstd = squares + kTuckerQuerySmallTokens;
    x_barrier = shared_address(rstd + kTuckerQuerySmallTokens);
  }

  int64_t segment;
  int row_groups, row_group, column_group;
  int num_tokens;
  int first_row, num_rows;                   // within the segment
  int first_column, num_columns, num_steps;  // of D
  int own_tokens;  // tokens column_group, column_group + column_groups, ...: it finishes these

  unsigned char* shared;  // the ring of W, then the partial sums
  float* partials;        // [unit warp][token][row]
  unsigned char* x_tile;  // [token][column]
  float* gains;           // [row]
  float* squares;         // [token]
  float* rstd;            // [token]
  uint32_t x_barrier;
};

// The slice of x: one bulk copy a token, so that its requests do not stand before those of W.
template <typename scalar_t>
__device__ __forceinline__ void copy_x(const TuckerQueryParams& p, const Plan& plan,
                                       const Block& block) {
  if (threadIdx.x < kWarpSize && block.num_columns > 0) {
    const auto row_bytes = static_cast<uint32_t>(block.num_columns * 2);
    if (threadIdx.x == 0) {
      mbarrier_init(block.x_barrier, 1);
      mbarrier_init_fence();
      fence_shared_writes();
      mbarrier_expect_bytes(block.x_barrier, row_bytes * block.num_tokens);
    }
    __syncwarp();
    const auto* x = static_cast<const scalar_t*>(p.x) + block.first_column;
    for (int token = threadIdx.x; token < block.num_tokens; token += kWarpSize) {
      bulk_copy(shared_address(block.x_tile + token * plan.x_stride), x + token * p.d_model,
                row_bytes, block.x_barrier);
    }
  }
  // The last step may end behind D: zeros there, in x as in W.
  const int missing_pieces = (block.num_steps * kStepColumns - block.num_columns) / 8;
  for (int i = threadIdx.x; i < block.num_tokens * missing_pieces; i += kThreads) {
    unsigned char* end = block.x_tile + i / missing_pieces * plan.x_stride + block.num_columns * 2;
    reinterpret_cast<uint4*>(end)[i % missing_pieces] = uint4{0, 0, 0, 0};
  }
}

// Rows of W by tokens, the sums over the warp's share of the slice, into the partial sums.
template <typename scalar_t, int kTokenTiles>
__device__ __forceinline__ void multiply(const TuckerQueryParams& p, const Plan& plan,
                                         const Block& block) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int unit = warp % plan.units;
  const int unit_warp = warp / plan.units;
  const int warp_steps = unit_warp < plan.unit_warps
                             ? (block.num_steps - unit_warp + plan.unit_warps - 1) / plan.unit_warps
                             : 0;
  // This thread's pieces of a step are 8 columns of rows r, r + 8, r + 16, r + 24 of its unit.
  const int first_row = unit * kUnitRows + lane / 4;
  const int fragment_column = lane % 4 * 8;
  const scalar_t* weight = static_cast<const scalar_t*>(p.weight) +
                           (block.segment * p.key_dim + block.first_row) * p.d_model +
                           block.first_column;
  unsigned char* pieces = block.shared + static_cast<int>(threadIdx.x) * 16;
  auto copy_step = [&](int i) {
    if (i < warp_steps) {
      const int column = (i * plan.unit_warps + unit_warp) * kStepColumns + fragment_column;
      unsigned char* slot = pieces + i % kMaxRingSteps * kRingStepBytes;
#pragma unroll
      for (int piece = 0; piece < kStepPieces; ++piece) {
        const int row = first_row + piece * 8;
        const bool valid = row < block.num_rows && column < block.num_columns;
        const scalar_t* source =
            valid ? weight + row * p.d_model + column : static_cast<const scalar_t*>(p.weight);
        cp_async_16(shared_address(slot + piece * kThreads * 16), source, valid);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kMaxRingSteps; ++i) copy_step(i);

  __syncthreads();  // the barrier is initialised, the zeros are written
  if (block.num_columns > 0) mbarrier_wait(block.x_barrier, 0);

  float acc[2][kTokenTiles][4] = {};
  const unsigned char* x_rows = block.x_tile + lane / 4 * plan.x_stride + fragment_column * 2;
  for (int i = 0; i < warp_steps; ++i) {
    cp_async_wait<kMaxRingSteps - 1>();
    const unsigned char* slot = pieces + i % kMaxRingSteps * kRingStepBytes;
    uint4 w[kStepPieces];
#pragma unroll
    for (int piece = 0; piece < kStepPieces; ++piece) {
      w[piece] = *reinterpret_cast<const uint4*>(slot + piece * kThreads * 16);
    }
    const uint32_t a[2][2][4] = {
        {{w[0].x, w[1].x, w[0].y, w[1].y}, {w[0].z, w[1].z, w[0].w, w[1].w}},
        {{w[2].x, w[3].x, w[2].y, w[3].y}, {w[2].z, w[3].z, w[2].w, w[3].w}}};
    const unsigned char* x_step = x_rows + (i * plan.unit_warps + unit_warp) * kStepBytes;
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const uint4 b = *reinterpret_cast<const uint4*>(x_step + tile * kTokenTile * plan.x_stride);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<scalar_t>(acc[half][tile], a[half][0], b.x, b.y);
        mma_m16n8k16<scalar_t>(acc[half][tile], a[half][1], b.z, b.w);
      }
    }
    copy_step(i + kMaxRingSteps);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring is empty: the partial sums take its place

  if (unit_warp >= plan.unit_warps) return;
  float* target = block.partials + unit_warp * kTokenTiles * kTokenTile * plan.partial_stride;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* tokens =
          target + (tile * kTokenTile + lane % 4 * 2) * plan.partial_stride + first_row + half * 16;
      tokens[0] = acc[half][tile][0];
      tokens[plan.partial_stride] = acc[half][tile][1];
      tokens[8] = acc[half][tile][2];
      tokens[plan.partial_stride + 8] = acc[half][tile][3];
    }
  }
}

__device__ __forceinline__ void add_four(float (&sum)[4], const float* four) {
  const float4 add = *reinterpret_cast<const float4*>(four);
  sum[0] += add.x;
  sum[1] += add.y;
  sum[2] += add.z;
  sum[3] += add.w;
}

// The warps that shared the steps of a unit: their sums, in the place of the first.
__device__ __forceinline__ void add_unit_warps(const Plan& plan, const Block& block,
                                               int partial_size) {
  const int row_fours = plan.units * kUnitRows / 4;
  for (int i = threadIdx.x; i < block.num_tokens * row_fours; i += kThreads) {
    float* four = block.partials + i / row_fours * plan.partial_stride + i % row_fours * 4;
    float sum[4] = {};
    for (int unit_warp = 0; unit_warp < plan.unit_warps; ++unit_warp) {
      add_four(sum, four + unit_warp * partial_size);
    }
    *reinterpret_cast<float4*>(four) = {sum[0], sum[1], sum[2], sum[3]};
  }
}

// The column groups: for each of its own tokens the block adds up what all have of its rows. No
// other block reads these here, so that the sum can stay in place. It is rounded: what is
// normalised is the projection as it is saved.
template <typename scalar_t>
__device__ __forceinline__ void add_column_groups(const Plan& plan, const Block& block) {
  const cg::cluster_group cluster = cg::this_cluster();
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < block.own_tokens; i += kWarps) {
    const int token = block.column_group + i * plan.column_groups;
    float squares = 0.0f;
    for (int row = lane * 4; row < block.num_rows; row += kWarpSize * 4) {
      float* own = block.partials + token * plan.partial_stride + row;
      float sum[4] = {};
      for (int group = 0; group < plan.column_groups; ++group) {
        add_four(sum, cluster.map_shared_rank(own, block.row_group * plan.column_groups + group));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[e] = row + e < block.num_rows ? to_float(from_float<scalar_t>(sum[e])) : 0.0f;
        squares = fmaf(sum[e], sum[e], squares);
      }
      *reinterpret_cast<float4*>(own) = {sum[0], sum[1], sum[2], sum[3]};
    }
    squares = warp_sum(squares);
    if (lane == 0) block.squares[token] = squares;
  }
}

// The row groups: the norm of each of the block's own tokens.
__device__ __forceinline__ void add_row_groups(const TuckerQueryParams& p, const Plan& plan,
                                               const Block& block) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i >= block.own_tokens) return;
  const cg::cluster_group cluster = cg::this_cluster();
  const int token = block.column_group + i * plan.column_groups;
  float squares = 0.0f;
  for (int group = 0; group < block.row_groups; ++group) {
    squares += *cluster.map_shared_rank(&block.squares[token],
                                        group * plan.column_groups + block.column_group);
  }
  const float mean = squares / static_cast<float>(p.key_dim);
  block.rstd[token] = 1.0f / sqrtf(mean + static_cast<float>(p.eps));
}

template <typename scalar_t>
__device__ __forceinline__ void store_outputs(const TuckerQueryParams& p, const Plan& plan,
                                              const Block& block) {
  const int64_t row_width = p.num_segments * p.key_dim;
  const bool aligned = p.key_dim % 4 == 0;
  for (int i = threadIdx.x / kWarpSize; i < block.own_tokens; i += kWarps) {
    const int token = block.column_group + i * plan.column_groups;
    const float rstd = block.rstd[token];
    const int64_t output = token * row_width + block.segment * p.key_dim + block.first_row;
    auto* projection = static_cast<scalar_t*>(p.projection) + output;
    auto* query = static_cast<scalar_t*>(p.query) + output;
    for (int row = static_cast<int>(threadIdx.x) % kWarpSize * 4; row < block.num_rows;
         row += kWarpSize * 4) {
      float values[4] = {};
      add_four(values, block.partials + token * plan.partial_stride + row);
      store_four(projection + row, values, block.num_rows - row, aligned);
      const float4 gains = *reinterpret_cast<const float4*>(block.gains + row);
      const float normed[4] = {values[0] * rstd * gains.x, values[1] * rstd * gains.y,
                               values[2] * rstd * gains.z, values[3] * rstd * gains.w};
      store_four(query + row, normed, block.num_rows - row, aligned);
    }
  }
}

#endif  // __CUDA_ARCH__ >= 900

// kTokenTiles tiles of 8 tokens. Grid: a cluster for each segment.
template <typename scalar_t, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    tucker_query_small_fwd_kernel(__grid_constant__ const TuckerQueryParams p,
                                  __grid_constant__ const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  cg::cluster_group cluster = cg::this_cluster();
  const Block block(p, plan, shared);
  copy_x<scalar_t>(p, plan, block);
  // Part of the first group of copies that `multiply` waits for.
  for (int row = threadIdx.x; row < block.num_rows; row += kThreads) {
    cp_async_4(shared_address(&block.gains[row]),
               static_cast<const float*>(p.norm_weight) + block.first_row + row);
  }
  multiply<scalar_t, kTokenTiles>(p, plan, block);
  if (plan.unit_warps > 1) {
    __syncthreads();
    add_unit_warps(plan, block, kTokenTiles * kTokenTile * plan.partial_stride);
  }
  cluster.sync();
  add_column_groups<scalar_t>(plan, block);
  cluster.sync();
  add_row_groups(p, plan, block);
  // The others' shared memory is read no more; ours stays until they say the same. Nothing was
  // written to global memory so far: arriving would wait for that.
  cluster.barrier_arrive();
  __syncthreads();
  store_outputs<scalar_t>(p, plan, block);
  cluster.barrier_wait();
#endif
}

// ---- choosing and launching -------------------------------------------------------------------

// Clusters of each size that the device holds at once; zeros where the kernel cannot run.
struct ClusterLimits {
  int large = 0;
  int portable = 0;
  int shared_bytes = 0;
};

template <typename Kernel>
cudaError_t allow_clusters(Kernel* kernel, int shared_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

cudaLaunchConfig_t launch_config(unsigned num_blocks, int cluster_blocks, int shared_bytes,
                                 cudaLaunchAttribute* attribute, Stream stream) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

ClusterLimits query_cluster_limits(int device) {
  auto* kernel = tucker_query_small_fwd_kernel<__nv_bfloat16, 8>;
  cudaFuncAttributes attributes{};
  ClusterLimits limits;
  // Code made from the PTX of an older architecture has no clusters in it, whatever it runs on.
  const bool usable =
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
      cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                             device) == cudaSuccess &&
      allow_clusters(kernel, limits.shared_bytes) == cudaSuccess;
  auto max_clusters = [&](int cluster_blocks) {
    int clusters = 0;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config =
        launch_config(cluster_blocks, cluster_blocks, limits.shared_bytes, &attribute, nullptr);
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
  };
  if (usable) {
    limits.large = max_clusters(kLargeCluster);
    limits.portable = max_clusters(kPortableCluster);
  }
  cudaGetLastError();  // a device without clusters is not an error
  return limits;
}

// Asked once a device: the answers take longer than the kernel.
ClusterLimits cluster_limits() {
  constexpr int kMaxDevices = 64;
  static std::atomic<uint64_t> known[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {};
  // A bit that says the rest is known, then 16 bits each, and 24 for the bytes.
  constexpr uint64_t kKnown = uint64_t{1} << 63;
  uint64_t packed = known[device].load(std::memory_order_relaxed);
  if ((packed & kKnown) == 0) {
    const ClusterLimits limits = query_cluster_limits(device);
    packed = kKnown | static_cast<uint64_t>(limits.shared_bytes) << 32 |
             static_cast<uint64_t>(limits.large) << 16 | static_cast<uint64_t>(limits.portable);
    known[device].store(packed, std::memory_order_relaxed);
  }
  return {static_cast<int>(packed >> 16 & 0xffff), static_cast<int>(packed & 0xffff),
          static_cast<int>(packed >> 32 & 0xffffff)};
}

int token_tiles(const TuckerQueryParams& p) {
  for (const int tiles : {1, 2, 4}) {
    if (p.num_tokens <= tiles * kTokenTile) return tiles;
  }
  return 8;
}

// The large cluster where all segments find room at once, else the portable one. Of its blocks,
// four share the rows unless the slice of x is then too wide for shared memory.
std::optional<Plan> choose_plan(const TuckerQueryParams& p) {
  const ClusterLimits limits = cluster_limits();
  if (limits.portable == 0) return std::nullopt;
  const int cluster_blocks = limits.large >= p.num_segments ? kLargeCluster : kPortableCluster;
  for (int row_groups = 4; row_groups >= 1; row_groups /= 2) {
    const Plan plan = make_plan(p, cluster_blocks, cluster_blocks / row_groups, token_tiles(p));
    if (plan.group_rows <= kMaxGroupRows && plan.shared_bytes <= limits.shared_bytes) return plan;
  }
  return std::nullopt;
}

template <typename scalar_t, int kTokenTiles>
Status launch(const TuckerQueryParams& p, const Plan& plan, Stream stream) {
  auto* kernel = tucker_query_small_fwd_kernel<scalar_t, kTokenTiles>;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(allow_clusters(kernel, cluster_limits().shared_bytes));
  cudaLaunchAttribute attribute;
  const auto num_blocks = static_cast<unsigned>(p.num_segments * plan.cluster_blocks);
  const cudaLaunchConfig_t config =
      launch_config(num_blocks, plan.cluster_blocks, plan.shared_bytes, &attribute, stream);
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, kernel, p, plan));
  return launch_status();
}

template <typename scalar_t>
Status launch_for_tokens(const TuckerQueryParams& p, const Plan& plan, Stream stream) {
  switch (token_tiles(p)) {
    case 1:
      return launch<scalar_t, 1>(p, plan, stream);
    case 2:
      return launch<scalar_t, 2>(p, plan, stream);
    case 4:
      return launch<scalar_t, 4>(p, plan, stream);
    default:
      return launch<scalar_t, 8>(p, plan, stream);
  }
}

bool fits(const TuckerQueryParams& p) {
  constexpr int64_t kMaxSize = 1 << 20;
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.num_tokens >= 1 &&
         p.num_tokens <= kTuckerQuerySmallTokens && p.d_model >= 8 && p.d_model <= kMaxSize &&
         p.d_model % 8 == 0 && p.key_dim >= 1 && p.key_dim <= kMaxSize && p.num_segments >= 1 &&
         p.num_segments <= kMaxSize && is_aligned(p.x) && is_aligned(p.weight) &&
         is_aligned(p.query) && is_aligned(p.projection);
}

ULTRAMEM_REGISTER_KERNEL(fwd_8_bf16, "tucker_query_small_fwd<bf16, 8 tokens>", kThreads,
                         tucker_query_small_fwd_kernel<__nv_bfloat16, 1>);
ULTRAMEM_REGISTER_KERNEL(fwd_16_bf16, "tucker_query_small_fwd<bf16, 16 tokens>", kThreads,
                         tucker_query_small_fwd_kernel<__nv_bfloat16, 2>);
ULTRAMEM_REGISTER_KERNEL(fwd_32_bf16, "tucker_query_small_fwd<bf16, 32 tokens>", kThreads,
                         tucker_query_small_fwd_kernel<__nv_bfloat16, 4>);
ULTRAMEM_REGISTER_KERNEL(fwd_64_bf16, "tucker_query_small_fwd<bf16, 64 tokens>", kThreads,
                         tucker_query_small_fwd_kernel<__nv_bfloat16, 8>);

}  // namespace

bool tucker_query_small_fwd_supported(const TuckerQueryParams& params) {
  return fits(params) && choose_plan(params).has_value();
}

Status tucker_query_small_fwd(const TuckerQueryParams& params, Stream stream) {
  std::optional<Plan> plan;
  if (fits(params)) plan = choose_plan(params);
  if (!plan.has_value()) {
    return Status::invalid_argument(
        "tucker_query: ask tucker_query_small_fwd_supported whether this kernel takes the shape");
  }
  if (params.dtype == DType::kBFloat16) {
    return launch_for_tokens<__nv_bfloat16>(params, *plan, stream);
  }
  return launch_for_tokens<__half>(params, *plan, stream);
}

}  // namespace ultramem::cuda
