// Product-key retrieval, backward (selection is not differentiated):
//
//   dS_row[:,i] += sum_c dg_c core_c   S_col[:,j]      dq_r     = sum_i dS[r,i] K[r,i]
//   dS_col[:,j] += sum_c dg_c core_c^T S_row[:,i]      dK[r,i] += dS[r,i] q_r
//   dcore_c     += dg_c S_row[:,i] S_col[:,j]^T
//
// over the kept (i, j) of every token and head; in additive mode dS_row[i] += dg, dS_col[j] += dg.
// dS is kept for the kept keys only. Every sum has a fixed order.
//
// This file makes dS and dcore and chooses how the rest is made: product_key_topk_bwd.h.
#include "product_key_topk_bwd.h"

#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_topk_bwd_core.cuh"

namespace ultramem::cuda {
namespace {

// ---- scores: dg -> dS, dcore -------------------------------------------------------------------

// A warp takes a token and head, and its lanes 32 kept pairs at a time, each of which adds a vector
// of R to its row of dS and one to its column. Lanes whose pairs share a row (or a column) add up
// in a tree that only depends on which lanes these are, and one of them adds the sum to shared
// memory: hot rows cost no more than others, and every sum has a fixed order.
constexpr int kScoresThreads = 256;
constexpr int kScoresWarps = kScoresThreads / kWarpSize;
// Blocks of a multiprocessor, for small cores. All of them are to be resident at once on the larger
// GPUs, together with those that check keys.
constexpr int kScoresResidency = 5;
constexpr int64_t kMaxTokenSlices = 512;
constexpr int64_t kMaxCheckBlocks = 264;
constexpr int64_t kCheckRowsPerWarp = 4;

struct ScoresLayout {
  int core;       // [C, R, R]
  int core_sums;  // [warps, C, R, R] of dcore
  int warps;      // where the warps' own parts begin
  int warp_bytes;
  // From the beginning of a warp's part:
  int scores;  // [2, R, m] S
  int grads;   // [2, R, m] dS
  int lanes;   // [2, m] those whose pair is in a row, or in a column; zeros between uses
  int64_t bytes;

  __host__ __device__ explicit ScoresLayout(const ProductKeyTopkParams& p) {
    const int64_t rows = int64_t{4} * 2 * p.tucker_rank * p.axis_topk;
    SharedLayout warp;
    scores = warp.take(rows);
    grads = warp.take(rows);
    lanes = warp.take(int64_t{4} * 2 * p.axis_topk);
    warp_bytes = static_cast<int>(warp.bytes());
    const int64_t cores = int64_t{4} * p.num_cores * p.tucker_rank * p.tucker_rank;
    SharedLayout layout;
    core = layout.take(cores);
    core_sums = layout.take(cores * kScoresWarps);
    warps = layout.take(warp.bytes() * kScoresWarps);
    bytes = layout.bytes();
  }
};

__device__ __forceinline__ bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

// Finds the key rows that are not finite: those with a 16-bit element whose exponent is all ones.
__device__ __forceinline__ void check_keys(const ProductKeyTopkBwdParams& p, uint8_t* key_finite,
                                           int64_t block, int64_t num_blocks) {
  const uint32_t low = p.dtype == DType::kBFloat16 ? 0x7f80u : 0x7c00u;
  const uint32_t high = low << 16;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t block_warps = blockDim.x / kWarpSize;
  const int64_t num_rows = int64_t{2} * p.num_heads * p.tucker_rank * p.num_keys;
  const int chunks = static_cast<int>(p.key_dim / 8);
  const auto* keys = static_cast<const uint4*>(p.keys);
  for (int64_t row = block * block_warps + threadIdx.x / kWarpSize; row < num_rows;
       row += num_blocks * block_warps) {
    bool finite = true;
#pragma unroll 4
    for (int i = lane; i < chunks; i += kWarpSize) {
      const uint4 chunk = keys[row * chunks + i];
      const uint32_t words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
      for (const uint32_t word : words) {
        finite = finite && (word & low) != low && (word & high) != high;
      }
    }
    finite = __all_sync(kFullMask, finite);
    if (lane == 0) key_finite[row] = finite ? 1 : 0;
  }
}

// By a warp. Packets need 16-byte aligned addresses and a multiple of four. The scores are there
// after cp_async_wait<0>.
__device__ __forceinline__ void load_scores(const float* from, float* to, int count, int lane,
                                            bool in_packets) {
  if (in_packets) {
#pragma unroll 1
    for (int i = lane * kPacket; i < count; i += kWarpSize * kPacket) {
      cp_async_16(shared_address(to + i), from + i);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < count; i += kWarpSize) cp_async_4(shared_address(to + i), from + i);
  }
  cp_async_commit();
}

__device__ __forceinline__ void store_grads(const float* from, float* to, int count, int lane,
                                            bool in_packets) {
  if (in_packets) {
#pragma unroll 2
    for (int i = lane * kPacket; i < count; i += kWarpSize * kPacket) {
      *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < count; i += kWarpSize) to[i] = from[i];
  }
}

// How the lanes of a line (a row or column) add up: in every round those of even rank take in the
// next lane's part, and those of odd rank are done.
struct LineLanes {
  uint32_t above;  // the line's lanes above this one that are not done
  uint32_t rank;   // of this lane among those
  bool is_first;   // whether this lane ends with the sum

  // A lane that is in no line has 0.
  __device__ LineLanes(uint32_t lanes, int lane) {
    const uint32_t below = (1u << lane) - 1;
    above = lanes & ~below & ~(1u << lane);
    rank = __popc(lanes & below);
    is_first = lanes != 0 && rank == 0;
  }

  template <int kRank>
  __device__ void add_round(float (&parts)[kRank]) {
    const int next = (__ffs(above) - 1) & (kWarpSize - 1);
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const float part = __shfl_sync(kFullMask, parts[r], next);
      if (above != 0) parts[r] += part;
    }
    above &= ~__ballot_sync(kFullMask, (rank & 1) != 0);
    rank >>= 1;
  }
};

// The pair of a lane.
template <int kCores>
struct KeptPair {
  int position = 0;  // row * m + col
  float grads[kCores] = {};
};

// The pair of this index in [T, H, M].
template <int kCores>
__device__ __forceinline__ KeptPair<kCores> load_pair(const ProductKeyTopkBwdParams& p,
                                                      int64_t index, bool exists, int C) {
  KeptPair<kCores> pair;
  if (!exists) return pair;
  pair.position = p.grid_positions[index];
#pragma unroll
  for (int c = 0; c < kCores; ++c) {
    if (c < C) pair.grads[c] = static_cast<const float*>(p.grad_scores)[index * C + c];
  }
  return pair;
}

// Whether any score of each (side, rank), one to a lane, is finite. Nearly always the first is.
__device__ __forceinline__ bool any_score_finite(const float* scores, int m, int planes, int lane) {
  bool finite = lane >= planes || is_finite(scores[lane * m]);
  if (!__all_sync(kFullMask, finite)) {
#pragma unroll 1
    for (int i = 1; i < m && !finite; ++i) finite = is_finite(scores[lane * m + i]);
  }
  return finite;
}

// grad_axis_scores [T, H, 2, R, m]; core_partials [slices, H, C, R, R], or null. Grid: slice of the
// tokens and head; then, where they are asked for, blocks that check keys. R and C are kRank and
// kCores if kExact, and at most these if not.
template <int kRank, int kCores, bool kExact>
__global__ void __launch_bounds__(kScoresThreads, kExact ? kScoresResidency : 1)
    product_key_topk_bwd_scores_kernel(ProductKeyTopkBwdParams p, int64_t num_slices,
                                       float* grad_axis_scores, float* core_partials,
                                       ScoresFindings findings) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  release_dependent_grid();
  const int64_t score_blocks = num_slices * p.num_heads;
  if (blockIdx.x >= score_blocks) {
    check_keys(p, findings.key_finite, blockIdx.x - score_blocks, gridDim.x - score_blocks);
    return;
  }
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const ScoresLayout layout(p);
  auto* core = reinterpret_cast<float*>(shared_bytes + layout.core);
  auto* core_sums = reinterpret_cast<float*>(shared_bytes + layout.core_sums);
  unsigned char* own_bytes = shared_bytes + layout.warps + warp * layout.warp_bytes;
  auto* scores = reinterpret_cast<float*>(own_bytes + layout.scores);
  auto* grads = reinterpret_cast<float*>(own_bytes + layout.grads);
  auto* line_lanes = reinterpret_cast<uint32_t*>(own_bytes + layout.lanes);

  const int m = p.axis_topk;
  const int M = p.topk;
  const int R = kExact ? kRank : p.tucker_rank;
  const int C = kExact ? kCores : p.num_cores;
  const int core_size = C * R * R;
  const int num_scores = 2 * R * m;
  const SmallDivisor by_m(m);
  // Which has a rank and a core of one.
  const bool additive = (!kExact || (kRank == 1 && kCores == 1)) && p.mode == ScoreMode::kAdditive;
  const bool in_packets =
      num_scores % kPacket == 0 && reinterpret_cast<uintptr_t>(p.axis_scores) % 16 == 0;
  const int head = static_cast<int>(blockIdx.x % p.num_heads);
  const int slice = static_cast<int>(blockIdx.x / p.num_heads);

  // Additive scores are Tucker scores whose other factor and core are one.
#pragma unroll 1
  for (int i = thread; i < core_size; i += kScoresThreads) {
    const int c = i / (R * R);
    core[i] = additive ? 1.0f
                       : static_cast<const float*>(
                             p.core)[(int64_t{c} * p.num_heads + head) * R * R + i - c * R * R];
  }
#pragma unroll 1
  for (int i = lane; i < 2 * m; i += kWarpSize) line_lanes[i] = 0;
  __syncthreads();

  uint8_t* own_query_finite = findings.query_finite + (int64_t{head} * 2 * R + lane) * p.num_tokens;
  float grad_core[kCores][kRank][kRank] = {};
  uint32_t max_grad = 0;
  // T is below 2^30, and a step to a warp's next token at most 4096.
  const int token_step = static_cast<int>(num_slices) * kScoresWarps;
  for (int token = slice * kScoresWarps + warp; token < p.num_tokens; token += token_step) {
    const int64_t token_head = int64_t{token} * p.num_heads + head;
    int64_t next_index = token_head * M + lane;
    KeptPair<kCores> next_pair = load_pair<kCores>(p, next_index, lane < M, C);
    __syncwarp();  // the previous token's parts have been read
    load_scores(static_cast<const float*>(p.axis_scores) + token_head * num_scores, scores,
                num_scores, lane, in_packets);
    // A part of shared memory ends at a multiple of a packet.
#pragma unroll 1
    for (int i = lane * kPacket; i < num_scores; i += kWarpSize * kPacket) {
      *reinterpret_cast<float4*>(grads + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    cp_async_wait<0>();
    __syncwarp();
    if (findings.query_finite != nullptr) {
      const bool finite = any_score_finite(scores, m, 2 * R, lane);
      if (lane < 2 * R) own_query_finite[token] = finite ? 1 : 0;
    }

#pragma unroll 1
    for (int first = 0; first < M; first += kWarpSize) {
      const KeptPair<kCores> pair = next_pair;
      next_index += kWarpSize;
      next_pair = load_pair<kCores>(p, next_index, first + kWarpSize + lane < M, C);
      const int row = by_m.quotient(pair.position);
      const int col = pair.position - row * m;
      const bool exists = first + lane < M;
      float to_row[kRank] = {};
      float to_col[kRank] = {};
      if (exists) {
        atomicOr(&line_lanes[row], 1u << lane);
        atomicOr(&line_lanes[m + col], 1u << lane);
        float row_scores[kRank];
        float col_scores[kRank];
#pragma unroll
        for (int r = 0; r < kRank; ++r) {
          row_scores[r] = r >= R || additive ? 1.0f : scores[r * m + row];
          col_scores[r] = r >= R || additive ? 1.0f : scores[(R + r) * m + col];
        }
#pragma unroll
        for (int r = 0; r < kRank; ++r) {
#pragma unroll
          for (int s = 0; s < kRank; ++s) {
            if (r >= R || s >= R) continue;
            const float product = row_scores[r] * col_scores[s];
            float weight = 0.0f;
#pragma unroll
            for (int c = 0; c < kCores; ++c) {
              if (c >= C) break;
              weight = fmaf(pair.grads[c], core[(c * R + r) * R + s], weight);
              grad_core[c][r][s] = fmaf(pair.grads[c], product, grad_core[c][r][s]);
            }
            to_row[r] = fmaf(weight, col_scores[s], to_row[r]);
            to_col[s] = fmaf(weight, row_scores[r], to_col[s]);
          }
        }
      }

      __syncwarp();
      LineLanes row_lanes(exists ? line_lanes[row] : 0, lane);
      LineLanes col_lanes(exists ? line_lanes[m + col] : 0, lane);
      __syncwarp();
      if (row_lanes.is_first) line_lanes[row] = 0;
      if (col_lanes.is_first) line_lanes[m + col] = 0;
      while (__any_sync(kFullMask, (row_lanes.above | col_lanes.above) != 0)) {
        row_lanes.add_round(to_row);
        col_lanes.add_round(to_col);
      }
      // All are read before any is written, so that the reads do not wait for each other.
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        if (r < R && row_lanes.is_first) to_row[r] += grads[r * m + row];
        if (r < R && col_lanes.is_first) to_col[r] += grads[(R + r) * m + col];
      }
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        if (r < R && row_lanes.is_first) grads[r * m + row] = to_row[r];
        if (r < R && col_lanes.is_first) grads[(R + r) * m + col] = to_col[r];
      }
      __syncwarp();
    }

    store_grads(grads, grad_axis_scores + token_head * num_scores, num_scores, lane, in_packets);
    if (findings.max_grad == nullptr) continue;
#pragma unroll 1
    for (int i = lane; i < num_scores; i += kWarpSize) {
      if (is_finite(grads[i])) max_grad = max(max_grad, __float_as_uint(fabsf(grads[i])));
    }
  }

  if (findings.max_grad != nullptr) {
    max_grad = __reduce_max_sync(kFullMask, max_grad);
    if (lane == 0) atomicMax(findings.max_grad, max_grad);
  }
  if (core_partials == nullptr) return;
#pragma unroll
  for (int c = 0; c < kCores; ++c) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
#pragma unroll
      for (int s = 0; s < kRank; ++s) {
        if (c >= C || r >= R || s >= R) continue;
        const float sum = warp_sum(grad_core[c][r][s]);
        if (lane == 0) core_sums[warp * core_size + (c * R + r) * R + s] = sum;
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < core_size; i += kScoresThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kScoresWarps; ++w) sum += core_sums[w * core_size + i];
    core_partials[int64_t{blockIdx.x} * core_size + i] = sum;
  }
}

constexpr int kReduceThreads = 256;

__global__ void __launch_bounds__(kReduceThreads)
    product_key_topk_bwd_core_kernel(ProductKeyTopkBwdParams p, CorePartials partials) {
  sum_core_partials(p, partials, (int64_t{blockIdx.x} * kReduceThreads + threadIdx.x) / kWarpSize);
}

// ---- launches ----------------------------------------------------------------------------------

struct Workspace {
  int64_t num_slices;  // of the tokens
  // Offsets. Partial sums of the dense path overlay dS, which is grouped into buckets before; they
  // are all that is there where grad_query holds dS.
  size_t grad_axis_scores;
  size_t core_partials;
  DensePlan dense;
  GatherWorkspace gather;

  // dS [T, H, 2, R, m].
  float* grads(const ProductKeyTopkBwdParams& p) const {
    return dense.grad_query_holds_grads ? static_cast<float*>(p.grad_query)
                                        : workspace_piece<float>(p, grad_axis_scores);
  }
};

Status plan_workspace(const ProductKeyTopkBwdParams& p, Workspace* workspace,
                      WorkspaceLayout& layout) {
  DeviceLimits limits;
  ULTRAMEM_RETURN_IF_ERROR(device_limits(&limits));
  plan_dense(p, limits, &workspace->dense);
  workspace->num_slices = std::min(ceil_div(p.num_tokens, kScoresWarps), kMaxTokenSlices);
  const int64_t grad_axis_scores_bytes =
      p.num_tokens * p.num_heads * 2 * p.tucker_rank * p.axis_topk * int64_t{sizeof(float)};
  workspace->grad_axis_scores =
      layout.take(std::max(workspace->dense.grad_query_holds_grads ? 0 : grad_axis_scores_bytes,
                           workspace->dense.partial_bytes));
  workspace->core_partials = layout.take(workspace->num_slices * p.num_heads * p.num_cores *
                                         p.tucker_rank * p.tucker_rank * sizeof(float));
  if (workspace->dense.applies) {
    lay_out_dense(p, &workspace->dense, layout);
  } else {
    lay_out_gather(p, &workspace->gather, layout);
  }
  return {};
}

template <int kRank, int kCores, bool kExact>
Status launch_scores_kernel(const ProductKeyTopkBwdParams& p, const Workspace& workspace,
                            float* core_partials, Stream stream) {
  const ScoresLayout layout(p);
  ULTRAMEM_RETURN_IF_ERROR(
      allow_shared_memory(product_key_topk_bwd_scores_kernel<kRank, kCores, kExact>, layout.bytes));
  int64_t num_blocks = workspace.num_slices * p.num_heads;
  if (workspace.dense.applies) {
    const int64_t key_rows = int64_t{2} * p.num_heads * p.tucker_rank * p.num_keys;
    num_blocks += std::min(ceil_div(key_rows, kScoresWarps * kCheckRowsPerWarp), kMaxCheckBlocks);
  }
  product_key_topk_bwd_scores_kernel<kRank, kCores, kExact>
      <<<static_cast<unsigned>(num_blocks), kScoresThreads, layout.bytes, stream>>>(
          p, workspace.num_slices, workspace.grads(p), core_partials,
          scores_findings(p, workspace.dense));
  return launch_status();
}

Status launch_scores(const ProductKeyTopkBwdParams& p, const Workspace& workspace,
                     float* core_partials, Stream stream) {
  const ScoresFindings findings = scores_findings(p, workspace.dense);
  if (findings.max_grad != nullptr) {
    ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(findings.max_grad, 0, sizeof(uint32_t), stream));
  }
  if (p.tucker_rank == 2 && p.num_cores == 2) {
    return launch_scores_kernel<2, 2, true>(p, workspace, core_partials, stream);
  }
  if (p.tucker_rank == 1 && p.num_cores == 1) {
    return launch_scores_kernel<1, 1, true>(p, workspace, core_partials, stream);
  }
  return launch_scores_kernel<kMaxTuckerRank, kMaxNumCores, false>(p, workspace, core_partials,
                                                                   stream);
}

Status launch_core(const ProductKeyTopkBwdParams& p, const CorePartials& partials, Stream stream) {
  if (partials.data == nullptr) return {};
  const int64_t num_blocks = ceil_div(core_elements(p) * kWarpSize, kReduceThreads);
  product_key_topk_bwd_core_kernel<<<static_cast<unsigned>(num_blocks), kReduceThreads, 0,
                                     stream>>>(p, partials);
  return launch_status();
}

// Without tokens nothing adds to a gradient.
Status clear_gradients(const ProductKeyTopkBwdParams& p, Stream stream) {
  if (p.grad_keys != nullptr) {
    const int64_t elements = int64_t{2} * p.num_heads * p.tucker_rank * p.num_keys * p.key_dim;
    ULTRAMEM_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(p.grad_keys, 0, elements * element_size(p.dtype), stream));
  }
  if (p.grad_core != nullptr && p.mode == ScoreMode::kTucker) {
    const int64_t elements = int64_t{p.num_cores} * p.num_heads * p.tucker_rank * p.tucker_rank;
    ULTRAMEM_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(p.grad_core, 0, elements * sizeof(float), stream));
  }
  return {};
}

Status check_bwd(const ProductKeyTopkBwdParams& p) {
  ULTRAMEM_RETURN_IF_ERROR(check_product_key_topk(p));
  if (p.num_tokens * p.num_heads > int64_t{0xffffffff} / 2 / p.axis_topk) {
    return Status::invalid_argument(
        "product_key_topk_bwd: 2 * num_tokens * num_heads * axis_topk must be below 2^32");
  }
  return {};
}

ULTRAMEM_REGISTER_KERNEL(scores_1, "product_key_topk_bwd_scores<1>", kScoresThreads,
                         product_key_topk_bwd_scores_kernel<1, 1, true>);
ULTRAMEM_REGISTER_KERNEL(scores_2, "product_key_topk_bwd_scores<2>", kScoresThreads,
                         product_key_topk_bwd_scores_kernel<2, 2, true>);
ULTRAMEM_REGISTER_KERNEL(scores_4, "product_key_topk_bwd_scores<4>", kScoresThreads,
                         product_key_topk_bwd_scores_kernel<kMaxTuckerRank, kMaxNumCores, false>);
ULTRAMEM_REGISTER_KERNEL(core, "product_key_topk_bwd_core", kReduceThreads,
                         product_key_topk_bwd_core_kernel);

}  // namespace

size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params) {
  Workspace workspace;
  WorkspaceLayout layout;
  if (!check_bwd(params).ok() || params.num_tokens == 0 ||
      !plan_workspace(params, &workspace, layout).ok()) {
    return 0;
  }
  return layout.bytes();
}

Status product_key_topk_bwd(const ProductKeyTopkBwdParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_bwd(params));
  if (params.num_tokens == 0) return clear_gradients(params, stream);
  Workspace workspace;
  WorkspaceLayout layout;
  ULTRAMEM_RETURN_IF_ERROR(plan_workspace(params, &workspace, layout));
  const bool wants_core = params.grad_core != nullptr && params.mode == ScoreMode::kTucker;
  CorePartials core_partials;
  core_partials.num_slices = workspace.num_slices;
  if (wants_core) core_partials.data = workspace_piece<float>(params, workspace.core_partials);
  ULTRAMEM_RETURN_IF_ERROR(launch_scores(params, workspace, core_partials.data, stream));
  const float* grad_axis_scores = workspace.grads(params);
  if (workspace.dense.applies) {
    return launch_dense(params, workspace.dense, grad_axis_scores, core_partials,
                        workspace_piece<float>(params, workspace.grad_axis_scores), stream);
  }
  ULTRAMEM_RETURN_IF_ERROR(launch_core(params, core_partials, stream));
  return launch_gather(params, workspace.gather, grad_axis_scores, stream);
}

}  // namespace ultramem::cuda
