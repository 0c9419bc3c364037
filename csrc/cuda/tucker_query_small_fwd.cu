// tucker_query for few tokens, forward: query = RMSNorm_Kd(x W^T) in one kernel.
//
// A thread block cluster works on one segment (Kd rows of W), its blocks on a tile of rows by a
// slice of D each, so that W is read once and x once per tile of rows. Every token belongs to one
// block of the cluster: to it the others send what they have of the token, into its shared memory,
// and it has then all that the norm needs. That is the only time that the cluster meets, and nobody
// reads another's shared memory, which would be a round trip.
//
// In a block every warp multiplies 32 rows of W with all tokens, taking turns over the slice where
// there are fewer rows than warps. A fragment of W is used by one thread only. It is copied to
// where that thread alone reads it, 16 consecutive bytes a row: within 32 columns the order in
// which tensor cores see them is free, as long as x is read in the same order.
#include <algorithm>
#include <optional>

#include "async_copy.cuh"
#include "cluster.cuh"
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
constexpr int kStepPieces = 4;  // 16-byte pieces of W that a thread needs for a step
constexpr int kRingStepBytes = kStepPieces * kThreads * 16;
constexpr int kTokenTile = 8;
// Steps in flight. Of many tokens two blocks share a multiprocessor, and its shared memory.
__host__ __device__ constexpr bool is_many(int token_tiles) { return token_tiles > 2; }
__host__ __device__ constexpr int ring_steps(int token_tiles) {
  return is_many(token_tiles) ? 4 : 8;
}
constexpr int kMaxRowGroups = 4;
constexpr int kMaxGroupRows = kWarps * kUnitRows;
constexpr int kMaxKeyDim = kMaxRowGroups * kMaxGroupRows;
// The squares of a token are added up by chunks of 128 rows, four a lane.
constexpr int kChunkRows = kWarpSize * 4;
constexpr int kMaxChunks = kMaxKeyDim / kChunkRows;

int token_tiles(int num_tokens) {
  for (const int tiles : {1, 2, 4}) {
    if (num_tokens <= tiles * kTokenTile) return tiles;
  }
  return 8;
}

// How the clusters share out the tokens and the segments, and a cluster its segment. A block is
// (row group, column group).
struct Plan {
  int cluster_blocks;
  int token_groups;  // clusters of a segment
  int group_tokens;
  int column_groups;
  int cluster_shift, token_shift, column_shift;  // logarithms of these numbers, powers of two
  int group_rows;                                // rows of W of a row group, a multiple of 16
  int group_steps;                               // steps of a column group
  int units;                                     // warps that share the rows of a block
  int unit_warps;                                // warps that share the steps of a unit
  int x_stride;         // bytes from token to token of the block's slice of x
  int partial_stride;   // floats from token to token of its partial sums
  int received_stride;  // floats from column group to column group of what it receives
  int x_offset;         // bytes into shared memory, behind the ring
  int received_offset;  // behind the partial sums, and the ring and x
  int gains_offset;     // behind all these
  int shared_bytes;
};

// Of a block's tokens the sums of squares, and the barriers of x and of what it receives.
constexpr int kMaxOwnTokens = kTuckerQuerySmallTokens / kPortableCluster;
constexpr int kTailBytes = kMaxOwnTokens * kMaxChunks * 4 + 2 * 8;

Plan make_plan(const TuckerQueryParams& p, int cluster_blocks, int column_groups,
               int token_groups) {
  Plan plan{};
  plan.cluster_blocks = cluster_blocks;
  plan.token_groups = token_groups;
  plan.group_tokens = static_cast<int>(ceil_div(p.num_tokens, token_groups));
  plan.column_groups = column_groups;
  auto logarithm = [](int power) {
    int shift = 0;
    while (1 << shift < power) ++shift;
    return shift;
  };
  plan.cluster_shift = logarithm(cluster_blocks);
  plan.token_shift = logarithm(token_groups);
  plan.column_shift = logarithm(column_groups);
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
  plan.received_stride = static_cast<int>(4 * ceil_div(p.key_dim, 4));
  const int tokens = token_tiles(plan.group_tokens) * kTokenTile;
  const int warp_steps = static_cast<int>(ceil_div(plan.group_steps, plan.unit_warps));
  const int own_tokens = static_cast<int>(ceil_div(plan.group_tokens, cluster_blocks));
  plan.x_offset = std::min(warp_steps, ring_steps(tokens / kTokenTile)) * kRingStepBytes;
  // What others send takes the place of the ring and x where these are large, else its own: nobody
  // has to wait then until all have read theirs.
  const int partials_end = plan.unit_warps * tokens * plan.partial_stride * 4;
  const int x_end = plan.x_offset + tokens * plan.x_stride;
  plan.received_offset =
      is_many(tokens / kTokenTile) ? partials_end : std::max(partials_end, x_end);
  plan.gains_offset =
      std::max(x_end, plan.received_offset + own_tokens * column_groups * plan.received_stride * 4);
  plan.shared_bytes = plan.gains_offset + plan.received_stride * 4 + kTailBytes;
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

// What a block works on, and where it keeps it.
struct Block {
  __device__ Block(const TuckerQueryParams& p, const Plan& plan, unsigned char* shared)
      : shared(shared) {
    rank = static_cast<int>(cluster_rank());
    const int cluster = static_cast<int>(blockIdx.x) >> plan.cluster_shift;
    segment = cluster >> plan.token_shift;
    first_token = (cluster & (plan.token_groups - 1)) * plan.group_tokens;
    num_tokens = min(static_cast<int>(p.num_tokens) - first_token, plan.group_tokens);
    const int row_group = rank >> plan.column_shift;
    column_group = rank & (plan.column_groups - 1);
    first_row = row_group * plan.group_rows;
    num_rows = max(min(static_cast<int>(p.key_dim) - first_row, plan.group_rows), 0);
    const int width = plan.group_steps * kStepColumns;
    first_column = column_group * width;
    num_columns = max(min(static_cast<int>(p.d_model) - first_column, width), 0);
    num_steps = (num_columns + kStepColumns - 1) / kStepColumns;
    own_tokens = (num_tokens - rank + plan.cluster_blocks - 1) >> plan.cluster_shift;

    partials = reinterpret_cast<float*>(shared);
    x_tile = shared + plan.x_offset;
    received = reinterpret_cast<float*>(shared + plan.received_offset);
    gains = reinterpret_cast<float*>(shared + plan.gains_offset);
    squares = gains + plan.received_stride;
    x_barrier = shared_address(squares + kMaxOwnTokens * kMaxChunks);
    received_barrier = x_barrier + 8;
  }

  int rank;  // in the cluster
  int64_t segment;
  int first_token, num_tokens;
  int column_group;
  int first_row, num_rows;                   // within the segment
  int first_column, num_columns, num_steps;  // of D
  int own_tokens;                            // its tokens are rank, rank + cluster_blocks, ...

  unsigned char* shared;  // the ring of W, then the partial sums
  float* partials;        // [unit warp][token][row]
  unsigned char* x_tile;  // [token][column]
  float* received;        // [own token][column group][row of the segment]
  float* gains;           // [row of the segment]
  float* squares;         // [own token][chunk]
  uint32_t x_barrier;
  uint32_t received_barrier;
};

// Both are complete once: when x is there, and when all have sent what they have of the own tokens.
__device__ __forceinline__ void init_barriers(const Plan& plan, const Block& block) {
  mbarrier_init(block.x_barrier, 1);
  mbarrier_init(block.received_barrier, 1);
  mbarrier_init_fence();
  fence_shared_writes();
  mbarrier_expect_bytes(block.x_barrier,
                        static_cast<uint32_t>(block.num_columns * 2 * block.num_tokens));
  mbarrier_expect_bytes(
      block.received_barrier,
      static_cast<uint32_t>(block.own_tokens * plan.column_groups * plan.received_stride * 4));
}

// The block's slice of W to the L2 cache.
template <typename scalar_t>
__device__ __forceinline__ void prefetch_weight(const TuckerQueryParams& p, const Block& block) {
  constexpr int kColumns = kPrefetchBytes / 2;
  const auto* weight = static_cast<const scalar_t*>(p.weight) +
                       (block.segment * p.key_dim + block.first_row) * p.d_model +
                       block.first_column;
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 1
  for (int row = threadIdx.x / kWarpSize; row < block.num_rows; row += kWarps) {
    for (int column = lane * kColumns; column < block.num_columns; column += kWarpSize * kColumns) {
      prefetch_l2(weight + row * p.d_model + column);
    }
  }
}

// The slice of x: one bulk copy a token, so that its requests do not stand before those of W. A
// warp has its lanes issue such copies one after another: all warps have some.
template <typename scalar_t, int kTokenTiles>
__device__ __forceinline__ void copy_x(const TuckerQueryParams& p, const Plan& plan,
                                       const Block& block) {
  constexpr int kWarpTokens = kTokenTiles * kTokenTile / kWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int copied_token = static_cast<int>(threadIdx.x) / kWarpSize * kWarpTokens + lane;
  if (lane < kWarpTokens && copied_token < block.num_tokens && block.num_columns > 0) {
    const auto* x = static_cast<const scalar_t*>(p.x) +
                    (block.first_token + copied_token) * p.d_model + block.first_column;
    bulk_copy(shared_address(block.x_tile + copied_token * plan.x_stride), x,
              static_cast<uint32_t>(block.num_columns * 2), block.x_barrier);
  }
  // The last step may end behind D: zeros there, in x as in W.
  const int missing_pieces = (block.num_steps * kStepColumns - block.num_columns) / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < block.num_tokens * missing_pieces; i += kThreads) {
    unsigned char* end = block.x_tile + i / missing_pieces * plan.x_stride + block.num_columns * 2;
    reinterpret_cast<uint4*>(end)[i % missing_pieces] = uint4{0, 0, 0, 0};
  }
}

// Rows of W by tokens, the sums over the warp's share of the slice, into the partial sums.
template <typename scalar_t, int kTokenTiles>
__device__ __forceinline__ void multiply(const TuckerQueryParams& p, const Plan& plan,
                                         const Block& block) {
  constexpr int kRingSteps = ring_steps(kTokenTiles);
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
  const int first_column = unit_warp * kStepColumns + fragment_column;
  const scalar_t* sources[kStepPieces];
  bool has_row[kStepPieces];
#pragma unroll
  for (int piece = 0; piece < kStepPieces; ++piece) {
    const int row = first_row + piece * 8;
    has_row[piece] = row < block.num_rows;
    sources[piece] =
        static_cast<const scalar_t*>(p.weight) +
        (block.segment * p.key_dim + (has_row[piece] ? block.first_row + row : 0)) * p.d_model +
        block.first_column + first_column;
  }
  const int step_columns = plan.unit_warps * kStepColumns;
  const int my_columns = block.num_columns - first_column;
  const uint32_t pieces = shared_address(block.shared + static_cast<int>(threadIdx.x) * 16);
  // Nothing is read of a piece that does not exist, wherever its source points.
  auto copy_step = [&](int i) {
    if (i < warp_steps) {
      const int column = i * step_columns;
      const uint32_t slot = pieces + i % kRingSteps * kRingStepBytes;
      const bool has_column = column < my_columns;
#pragma unroll
      for (int piece = 0; piece < kStepPieces; ++piece) {
        cp_async_16(slot + piece * kThreads * 16, sources[piece] + column,
                    has_column && has_row[piece]);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kRingSteps; ++i) copy_step(i);

  __syncthreads();  // the zeros are written
  mbarrier_wait(block.x_barrier, 0);

  float acc[2][kTokenTiles][4] = {};
  const unsigned char* x_rows = block.x_tile + lane / 4 * plan.x_stride + fragment_column * 2;
#pragma unroll 1
  for (int i = 0; i < warp_steps; ++i) {
    cp_async_wait<kRingSteps - 1>();
    const unsigned char* slot =
        block.shared + static_cast<int>(threadIdx.x) * 16 + i % kRingSteps * kRingStepBytes;
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
    copy_step(i + kRingSteps);
  }
  cp_async_wait<0>();
  __syncthreads();  // all have read the ring and x: the partial sums take their place
  if (is_many(kTokenTiles)) cluster_arrive_relaxed();  // and what others send, see make_plan

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

// The sums over the warps that shared the steps of a unit, to the owners of the tokens. A warp
// takes a token, its lanes four rows each.
__device__ __forceinline__ void send_partials(const Plan& plan, const Block& block,
                                              int partial_size) {
  const int lane_row = static_cast<int>(threadIdx.x) % kWarpSize * 4;
#pragma unroll 1
  for (int token = threadIdx.x / kWarpSize; token < block.num_tokens; token += kWarps) {
    const int slot = token >> plan.cluster_shift;
    const auto owner = static_cast<uint32_t>(token & (plan.cluster_blocks - 1));
    const float* target = block.received +
                          (slot * plan.column_groups + block.column_group) * plan.received_stride +
                          block.first_row;
    const uint32_t remote = address_in_block(shared_address(target), owner);
    const uint32_t barrier = address_in_block(block.received_barrier, owner);
    const float* partials = block.partials + token * plan.partial_stride;
#pragma unroll 1
    for (int row = lane_row; row < block.num_rows; row += kWarpSize * 4) {
      float sum[4] = {};
#pragma unroll 2
      for (int unit_warp = 0; unit_warp < plan.unit_warps; ++unit_warp) {
        add_four(sum, partials + row + unit_warp * partial_size);
      }
      store_async(remote + row * 4, {sum[0], sum[1], sum[2], sum[3]}, barrier);
    }
  }
}

// The sums over the column groups, in the place of the first, and those of their squares. They are
// rounded: what is normalised is the projection as it is saved.
template <typename scalar_t>
__device__ __forceinline__ void add_column_groups(const TuckerQueryParams& p, const Plan& plan,
                                                  const Block& block, int slot, int chunk) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = chunk * kChunkRows + lane * 4;
  float squares = 0.0f;
  if (row < plan.received_stride) {
    float* own = block.received + slot * plan.column_groups * plan.received_stride + row;
    float sum[4] = {};
#pragma unroll 4
    for (int group = 0; group < plan.column_groups; ++group) {
      add_four(sum, own + group * plan.received_stride);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sum[e] = row + e < p.key_dim ? to_float(from_float<scalar_t>(sum[e])) : 0.0f;
      squares = fmaf(sum[e], sum[e], squares);
    }
    *reinterpret_cast<float4*>(own) = {sum[0], sum[1], sum[2], sum[3]};
  }
  squares = warp_sum(squares);
  if (lane == 0) block.squares[slot * kMaxChunks + chunk] = squares;
}

template <typename scalar_t>
__device__ __forceinline__ void store_outputs(const TuckerQueryParams& p, const Plan& plan,
                                              const Block& block, int slot, int chunk) {
  const int row = chunk * kChunkRows + static_cast<int>(threadIdx.x) % kWarpSize * 4;
  if (row >= plan.received_stride) return;
  float squares = 0.0f;
#pragma unroll 1
  for (int other = 0; other * kChunkRows < p.key_dim; ++other) {
    squares += block.squares[slot * kMaxChunks + other];
  }
  const float mean = squares / static_cast<float>(p.key_dim);
  const float rstd = 1.0f / sqrtf(mean + static_cast<float>(p.eps));

  float values[4] = {};
  add_four(values, block.received + slot * plan.column_groups * plan.received_stride + row);
  const float4 gains = *reinterpret_cast<const float4*>(block.gains + row);
  const float normed[4] = {values[0] * rstd * gains.x, values[1] * rstd * gains.y,
                           values[2] * rstd * gains.z, values[3] * rstd * gains.w};
  const int64_t token = block.first_token + block.rank + slot * plan.cluster_blocks;
  const int64_t output = (token * p.num_segments + block.segment) * p.key_dim + row;
  const bool aligned = p.key_dim % 4 == 0;
  const int count = static_cast<int>(p.key_dim) - row;
  store_four(static_cast<scalar_t*>(p.projection) + output, values, count, aligned);
  store_four(static_cast<scalar_t*>(p.query) + output, normed, count, aligned);
}

// What the block's own tokens need behind the product. Warps take turns over their chunks.
template <typename scalar_t>
__device__ __forceinline__ void finish_own_tokens(const TuckerQueryParams& p, const Plan& plan,
                                                  const Block& block) {
  if (block.own_tokens == 0) return;
  mbarrier_wait_cluster(block.received_barrier, 0);
  const int chunks = (static_cast<int>(p.key_dim) + kChunkRows - 1) / kChunkRows;
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int i = warp; i < block.own_tokens * chunks; i += kWarps) {
    add_column_groups<scalar_t>(p, plan, block, i / chunks, i % chunks);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = warp; i < block.own_tokens * chunks; i += kWarps) {
    store_outputs<scalar_t>(p, plan, block, i / chunks, i % chunks);
  }
}

#endif  // __CUDA_ARCH__ >= 900

// kTokenTiles tiles of 8 tokens. Grid: a cluster for each (segment, token group).
template <typename scalar_t, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles <= 4 ? 2 : 1)
    tucker_query_small_fwd_kernel(__grid_constant__ const TuckerQueryParams p,
                                  __grid_constant__ const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  const Block block(p, plan, shared);
  if (threadIdx.x == 0) init_barriers(plan, block);
  prefetch_weight<scalar_t>(p, block);
  __syncthreads();  // the barriers are initialised
  // Others may send once all of the cluster have arrived.
  if (!is_many(kTokenTiles)) cluster_arrive_relaxed();
  wait_for_prerequisite_grid();
  release_dependent_grid();
  copy_x<scalar_t, kTokenTiles>(p, plan, block);
  constexpr int kThreadGains = kMaxKeyDim / kThreads;
  // Requested ahead of W, used behind the product: nobody waits for them.
  uint32_t gains[kThreadGains] = {};
#pragma unroll
  for (int i = 0; i < kThreadGains; ++i) {
    const int row = i * kThreads + static_cast<int>(threadIdx.x);
    if (row < p.key_dim) gains[i] = load_bits(p.norm_weight, p.norm_dtype, row);
  }
  multiply<scalar_t, kTokenTiles>(p, plan, block);
#pragma unroll
  for (int i = 0; i < kThreadGains; ++i) {
    const int row = i * kThreads + static_cast<int>(threadIdx.x);
    if (row < p.key_dim) block.gains[row] = bits_to_float(gains[i], p.norm_dtype);
  }
  __syncthreads();
  cluster_wait();
  send_partials(plan, block, kTokenTiles * kTokenTile * plan.partial_stride);
  finish_own_tokens<scalar_t>(p, plan, block);
#endif
}

// ---- choosing and launching -------------------------------------------------------------------

ClusterLimits limits_of_device() {
  static ClusterLimitsCache cache;
  return cluster_limits(tucker_query_small_fwd_kernel<__nv_bfloat16, 8>, kThreads, cache);
}

// The large cluster where all segments find room at once, else the portable one. Two clusters share
// more than 32 tokens where all find room, if need be two blocks to a multiprocessor, so that
// tensor cores and the norm are not what W waits for. Of the blocks of a cluster four share the
// rows unless the slice of x is then too wide for shared memory.
std::optional<Plan> choose_plan(const TuckerQueryParams& p) {
  const ClusterLimits limits = limits_of_device();
  if (limits.portable == 0) return std::nullopt;
  const int cluster_blocks = limits.large >= p.num_segments ? kLargeCluster : kPortableCluster;
  constexpr int kReservedBytes = 1024;  // of a multiprocessor's shared memory, by each block
  for (const int token_groups : {2, 1}) {
    if (token_groups == 2 && (p.num_tokens <= 32 || cluster_blocks != kLargeCluster)) continue;
    for (int row_groups = kMaxRowGroups; row_groups >= 1; row_groups /= 2) {
      const Plan plan = make_plan(p, cluster_blocks, cluster_blocks / row_groups, token_groups);
      if (plan.group_rows > kMaxGroupRows || plan.shared_bytes > limits.shared_bytes) continue;
      const bool pairs = 2 * (plan.shared_bytes + kReservedBytes) <= limits.shared_bytes;
      const int room = (pairs ? 2 : 1) * limits.large;
      if (token_groups == 1 || room >= 2 * p.num_segments) return plan;
    }
  }
  return std::nullopt;
}

template <typename scalar_t, int kTokenTiles>
Status launch(const TuckerQueryParams& p, const Plan& plan, Stream stream) {
  const auto num_blocks =
      static_cast<unsigned>(p.num_segments * plan.token_groups * plan.cluster_blocks);
  return launch_overlapping_clusters(tucker_query_small_fwd_kernel<scalar_t, kTokenTiles>,
                                     num_blocks, plan.cluster_blocks, kThreads, plan.shared_bytes,
                                     stream, p, plan);
}

template <typename scalar_t>
Status launch_for_tokens(const TuckerQueryParams& p, const Plan& plan, Stream stream) {
  switch (token_tiles(plan.group_tokens)) {
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
         p.d_model >= 8 && p.d_model <= kMaxSize && p.d_model % 8 == 0 && p.key_dim >= 1 &&
         p.key_dim <= kMaxKeyDim && p.num_segments >= 1 && p.num_segments <= kMaxSize &&
         p.num_tokens <= kTuckerQuerySmallTokens && is_aligned(p.x) && is_aligned(p.weight) &&
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
