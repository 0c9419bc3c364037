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
#include "product_key_topk_bwd_buckets.cuh"
#include "product_key_topk_bwd_core.cuh"
#include "product_key_topk_bwd_scores.cuh"

namespace ultramem::cuda {
namespace {

// ---- scores: dg -> dS, dcore -------------------------------------------------------------------

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

// grad_axis_scores [T, H, 2, R, m]; core_partials [slices, H, C, R, R], or null. Grid: slice of the
// tokens and head; then, where they are asked for, blocks that check keys. R and C are kRank and
// kCores if kExact, and at most these if not.
template <int kRank, int kCores, bool kExact>
__global__ void __launch_bounds__(kScoresThreads, kExact ? kScoresResidency : 2)
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

  const PairTerms<kRank, kCores, kExact> terms(p, core);
  const int m = terms.m, M = terms.M, R = terms.R, C = terms.C;
  const int num_scores = 2 * R * m;
  const bool in_packets =
      num_scores % kPacket == 0 && reinterpret_cast<uintptr_t>(p.axis_scores) % 16 == 0;
  const int head = static_cast<int>(blockIdx.x % p.num_heads);
  const int slice = static_cast<int>(blockIdx.x / p.num_heads);

  load_core(p, terms, head, core, thread, kScoresThreads);
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
      const int row = terms.by_m.quotient(pair.position);
      const int col = pair.position - row * m;
      const bool exists = first + lane < M;
      PairParts<kRank> parts;
      if (exists) {
        atomicOr(&line_lanes[row], 1u << lane);
        atomicOr(&line_lanes[m + col], 1u << lane);
        const PairScores<kRank> of_keys(terms, scores, row, col);
        parts = PairParts<kRank>(terms, pair, of_keys, grad_core);
      }
      __syncwarp();
      const uint32_t row_lanes = exists ? line_lanes[row] : 0;
      const uint32_t col_lanes = exists ? line_lanes[m + col] : 0;
      const bool first_in_row = is_first_lane(row_lanes, lane);
      const bool first_in_col = is_first_lane(col_lanes, lane);
      __syncwarp();
      if (first_in_row) line_lanes[row] = 0;
      if (first_in_col) line_lanes[m + col] = 0;
      parts.sum_lines(LineLanes(row_lanes, lane), LineLanes(col_lanes, lane));
      // All are read before any is written, so that the reads do not wait for each other.
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        if (r < R && first_in_row) parts.to_row[r] += grads[r * m + row];
        if (r < R && first_in_col) parts.to_col[r] += grads[(R + r) * m + col];
      }
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        if (r < R && first_in_row) grads[r * m + row] = parts.to_row[r];
        if (r < R && first_in_col) grads[(R + r) * m + col] = parts.to_col[r];
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
  const int core_size = C * R * R;
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

__global__ void __launch_bounds__(kReduceThreads) product_key_topk_bwd_core_kernel(CoreSums sums) {
  const auto thread = static_cast<int>(blockIdx.x * kReduceThreads + threadIdx.x);
  sum_core(sums, thread / kWarpSize, static_cast<int>(gridDim.x * kReduceThreads / kWarpSize));
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
  const DensePlan& dense = workspace->dense;
  workspace->num_slices = dense.entries_at_once
                              ? ceil_div(p.num_tokens, kBucketSize)
                              : std::min(ceil_div(p.num_tokens, kScoresWarps), kMaxTokenSlices);
  const int64_t grad_axis_scores_bytes =
      p.num_tokens * p.num_heads * 2 * p.tucker_rank * p.axis_topk * int64_t{sizeof(float)};
  workspace->grad_axis_scores = layout.take(
      std::max(dense.entries_at_once || dense.grad_query_holds_grads ? 0 : grad_axis_scores_bytes,
               dense.partial_bytes));
  workspace->core_partials = layout.take(workspace->num_slices * p.num_heads * p.num_cores *
                                         p.tucker_rank * p.tucker_rank * sizeof(float));
  if (dense.applies) {
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

Status launch_core(const CoreSums& sums, Stream stream) {
  if (sums.partials == nullptr) return {};
  const int64_t num_blocks = ceil_div(sums.num_elements() * kWarpSize, kReduceThreads);
  product_key_topk_bwd_core_kernel<<<static_cast<unsigned>(num_blocks), kReduceThreads, 0,
                                     stream>>>(sums);
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
  const DensePlan& dense = workspace.dense;
  const bool wants_core = params.grad_core != nullptr && params.mode == ScoreMode::kTucker;
  float* core_partials =
      wants_core ? workspace_piece<float>(params, workspace.core_partials) : nullptr;
  const CoreSums core_sums{
      core_partials,    workspace.num_slices, static_cast<float*>(params.grad_core),
      params.num_heads, params.num_cores,     params.tucker_rank * params.tucker_rank};
  const float* grad_axis_scores = nullptr;
  if (dense.entries_at_once) {
    ULTRAMEM_RETURN_IF_ERROR(launch_entries(params, dense, core_partials, stream));
  } else {
    ULTRAMEM_RETURN_IF_ERROR(launch_scores(params, workspace, core_partials, stream));
    grad_axis_scores = workspace.grads(params);
  }
  const bool dense_sums = dense_sums_core(params, dense);
  if (!dense_sums) ULTRAMEM_RETURN_IF_ERROR(launch_core(core_sums, stream));
  if (!dense.applies) return launch_gather(params, workspace.gather, grad_axis_scores, stream);
  return launch_dense(params, dense, grad_axis_scores, dense_sums ? core_sums : CoreSums{},
                      workspace_piece<float>(params, workspace.grad_axis_scores), stream);
}

}  // namespace ultramem::cuda
