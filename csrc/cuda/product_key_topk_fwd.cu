// Product-key retrieval, forward: the best m keys of either axis, then the best M pairs of them.
//
// Here: which kernels do it, and the axis stage for any dtype, shape and device. The scores of all
// keys never reach memory, but for those of few tokens. Sums are fp32, in an order that depends on
// the shape of a key alone: equal keys get bitwise equal ranks, and among as many tokens as the
// same kernels take, a token's result does not depend on how many they are.
#include "block_topk.cuh"
#include "common.cuh"
#include "common/own_filter.h"
#include "device.h"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

// A block scores a tile of tokens against all keys of one head and side, in chunks whose ranks fit
// in shared memory; after every chunk one warp per token folds the ranks into the best so far.
// Tiles of eight reuse a key eight times; single tokens serve few tokens and very long queries.
template <int kTileTokens>
struct AxisTraits {
  static constexpr int kTile = kTileTokens;
  // A single token has little arithmetic to hide latency with: more warps and keys in flight.
  static constexpr int kThreads = kTile == 1 ? 512 : 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kKeysPerWarp = kTile == 1 ? 8 : 4;
  static_assert(kKeysPerWarp * kTile <= kWarpSize, "a warp reduces at most one sum per lane");
  static_assert(kWarps >= kTile, "a warp per token selects");
};
constexpr int kMaxChunkKeys = 1024;
constexpr int kRescoredKeys = 4;

struct AxisLayout {
  int filter;  // [R] u or t
  int query;   // [tile, query_stride]
  int kept;    // [tile, kept_stride] candidates
  int ranks;   // [tile, chunk] sortable ranks
  int query_stride;
  int kept_stride;
  int64_t bytes;

  __host__ __device__ AxisLayout(const ProductKeyTopkParams& p, int tile, int chunk) {
    query_stride = static_cast<int>(ceil_div(p.num_queries * p.key_dim, kPacket)) * kPacket;
    kept_stride = p.axis_topk;
    SharedLayout layout;
    filter = layout.take(kMaxTuckerRank * sizeof(float));
    query = layout.take(int64_t{4} * tile * query_stride);
    kept = layout.take(int64_t{8} * tile * kept_stride);
    ranks = layout.take(int64_t{4} * tile * chunk);
    bytes = layout.bytes();
  }
};

// Exchanges half of the kLive accumulators with the lane across, then a half of that half. As a
// recursion, so that every accumulator keeps its register.
template <int kLive, int kCount>
__device__ __forceinline__ void halve_accumulators(float (&acc)[kCount], int lane) {
  if constexpr (kLive > 1) {
    constexpr int kHalf = kLive / 2;
    constexpr int kDelta = kHalf * (kWarpSize / kCount);
    const bool upper = (lane & kDelta) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? acc[i] : acc[i + kHalf];
      const float mine = upper ? acc[i + kHalf] : acc[i];
      acc[i] = mine + __shfl_xor_sync(kFullMask, sent, kDelta);
    }
    halve_accumulators<kHalf>(acc, lane);
  }
}

// Sums all accumulators over the warp, with one shuffle where warp_sum takes five. Returns to lane
// l the sum of accumulator l / (32 / kCount). Each is added as the same tree.
template <int kCount>
__device__ __forceinline__ float warp_sum_transposed(float (&acc)[kCount], int lane) {
  halve_accumulators<kCount>(acc, lane);
  float sum = acc[0];
#pragma unroll
  for (int delta = kWarpSize / kCount / 2; delta > 0; delta /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, delta);
  }
  return sum;
}

// acc[k * kTile + t] = this lane's part of sum_r filter_r <query[t, r], keys[k, r]>, without
// kFiltered of <query[t], keys[k]> over num_ranks ranks. `keys` point at rank 0 of each key.
template <bool kFiltered, int kVec, int kKeys, int kTile, typename scalar_t>
__device__ __forceinline__ void partial_dots(const float* query, int query_stride,
                                             int query_rank_stride, const float* filter,
                                             const scalar_t* const (&keys)[kKeys],
                                             int64_t key_rank_stride, int num_ranks, int key_dim,
                                             int lane, float (&acc)[kKeys * kTile]) {
#pragma unroll
  for (int i = 0; i < kKeys * kTile; ++i) acc[i] = 0.0f;
  // Lanes walk the ranks as one long row, so that a short key leaves none of them idle.
  const int packets = key_dim / kVec;
  int packet = lane;
  int rank = 0;
  while (true) {
    while (packet >= packets && rank < num_ranks) {
      packet -= packets;
      ++rank;
    }
    if (rank >= num_ranks) break;
    const int64_t key_offset = rank * key_rank_stride + packet * kVec;
    float key[kKeys][kVec];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) load_floats<kVec>(keys[k] + key_offset, key[k]);
    if constexpr (kFiltered) {
      const float weight = filter[rank];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) key[k][i] *= weight;
      }
    }
    const float* query_packet = query + rank * query_rank_stride + packet * kVec;
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      float q[kVec];
      load_floats<kVec>(query_packet + t * query_stride, q);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          acc[k * kTile + t] = fmaf(q[i], key[k][i], acc[k * kTile + t]);
        }
      }
    }
    packet += kWarpSize;
  }
}

// Writes the sortable ranks of keys [first_key, first_key + num_chunk) for all tokens of the tile.
template <typename Traits, int kVec, typename scalar_t>
__device__ __forceinline__ void rank_chunk(const ProductKeyTopkParams& p, const scalar_t* keys,
                                           const float* filter, const float* query,
                                           int query_stride, int64_t first_key, int num_chunk,
                                           uint32_t* ranks, int ranks_stride, int warp, int lane) {
  constexpr int kKeys = Traits::kKeysPerWarp;
  constexpr int kTile = Traits::kTile;
  constexpr int kLanesPerSum = kWarpSize / (kKeys * kTile);
  const int key_dim = static_cast<int>(p.key_dim);
  const int query_rank_stride = p.num_queries == 1 ? 0 : key_dim;
  for (int base = warp * kKeys; base < num_chunk; base += Traits::kWarps * kKeys) {
    const scalar_t* key_rows[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      // Past the end the last key is read again; its rank is not written.
      key_rows[k] = keys + (first_key + min(base + k, num_chunk - 1)) * p.key_dim;
    }
    float acc[kKeys * kTile];
    partial_dots<true, kVec, kKeys, kTile>(query, query_stride, query_rank_stride, filter, key_rows,
                                           p.num_keys * p.key_dim, p.tucker_rank, key_dim, lane,
                                           acc);
    const float sum = warp_sum_transposed(acc, lane);
    const int which = lane / kLanesPerSum;
    const int k = which / kTile;
    const int t = which % kTile;
    if (lane % kLanesPerSum == 0 && base + k < num_chunk) {
      ranks[t * ranks_stride + base + k] = sortable(sum);
    }
  }
}

// S[r, i] = <query_r, keys_{r,i}> for the kept keys of all tokens of the tile. Recomputed: keeping
// R scores for every candidate would cost more shared memory than this costs time.
template <typename Traits, int kVec, typename scalar_t>
__device__ __forceinline__ void score_kept(const ProductKeyTopkParams& p, const scalar_t* keys,
                                           const float* query, int query_stride,
                                           const uint64_t* kept, int kept_stride, int num_tokens,
                                           int64_t first_output, int64_t output_stride, int warp,
                                           int lane) {
  const int m = p.axis_topk;
  const int key_dim = static_cast<int>(p.key_dim);
  const int groups = static_cast<int>(ceil_div(m, kRescoredKeys));
  auto* axis_scores = static_cast<float*>(p.axis_scores);
  for (int work = warp; work < num_tokens * groups; work += Traits::kWarps) {
    const int token = work / groups;
    const int first = (work - token * groups) * kRescoredKeys;
    const scalar_t* key_rows[kRescoredKeys];
#pragma unroll
    for (int k = 0; k < kRescoredKeys; ++k) {
      const uint64_t candidate = kept[token * kept_stride + min(first + k, m - 1)];
      key_rows[k] = keys + int64_t{candidate_position(candidate)} * p.key_dim;
    }
    const int64_t output = (first_output + token * output_stride) * p.tucker_rank * m;
    for (int r = 0; r < p.tucker_rank; ++r) {
      float acc[kRescoredKeys];
      const int query_offset = token * query_stride + (p.num_queries == 1 ? 0 : r * key_dim);
      partial_dots<false, kVec, kRescoredKeys, 1>(query + query_offset, 0, 0, nullptr, key_rows, 0,
                                                  1, key_dim, lane, acc);
      const float sum = warp_sum_transposed(acc, lane);
      constexpr int kLanesPerSum = kWarpSize / kRescoredKeys;
      const int kept_key = first + lane / kLanesPerSum;
      if (lane % kLanesPerSum == 0 && kept_key < m) axis_scores[output + r * m + kept_key] = sum;
#pragma unroll
      for (int k = 0; k < kRescoredKeys; ++k) key_rows[k] += p.num_keys * p.key_dim;
    }
  }
}

// Grid: (tile of tokens fastest, head, side).
template <typename scalar_t, int kTileTokens>
__global__ void __launch_bounds__(AxisTraits<kTileTokens>::kThreads, kTileTokens == 1 ? 1 : 2)
    product_key_topk_fwd_axis_kernel(ProductKeyTopkParams p, int chunk, bool use_packets) {
  using Traits = AxisTraits<kTileTokens>;
  constexpr int kTile = Traits::kTile;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const AxisLayout layout(p, kTile, chunk);
  auto* filter = reinterpret_cast<float*>(shared_bytes + layout.filter);
  auto* query = reinterpret_cast<float*>(shared_bytes + layout.query);
  auto* kept = reinterpret_cast<uint64_t*>(shared_bytes + layout.kept);
  auto* ranks = reinterpret_cast<uint32_t*>(shared_bytes + layout.ranks);

  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int64_t num_tiles = ceil_div(p.num_tokens, kTile);
  const int64_t head_side = blockIdx.x / num_tiles;
  const int64_t head = head_side / 2;
  const int64_t side = head_side % 2;
  const int64_t first_token = (blockIdx.x - head_side * num_tiles) * kTile;
  const int num_tokens = static_cast<int>(min(int64_t{kTile}, p.num_tokens - first_token));
  const int m = p.axis_topk;

  if (thread < p.tucker_rank) {
    const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t);
    filter[thread] = p.mode == ScoreMode::kAdditive ? 1.0f : vector[head * p.tucker_rank + thread];
  }
  const int query_dim = static_cast<int>(p.num_queries * p.key_dim);
  for (int t = 0; t < kTile; ++t) {
    const int64_t row = ((first_token + t) * 2 + side) * p.num_heads + head;
    const scalar_t* from = static_cast<const scalar_t*>(p.query) + row * query_dim;
    // Tokens past the end are zeros: computed with the others, never selected from.
    for (int i = thread; i < query_dim; i += Traits::kThreads) {
      query[t * layout.query_stride + i] = t < num_tokens ? to_float(from[i]) : 0.0f;
    }
  }
  __syncthreads();

  const scalar_t* keys =
      static_cast<const scalar_t*>(p.keys) + head_side * p.tucker_rank * p.num_keys * p.key_dim;
  int num_kept = 0;
  for (int64_t first_key = 0; first_key < p.num_keys; first_key += chunk) {
    const int num_chunk = static_cast<int>(min(int64_t{chunk}, p.num_keys - first_key));
    if (use_packets) {
      rank_chunk<Traits, kPacket>(p, keys, filter, query, layout.query_stride, first_key, num_chunk,
                                  ranks, chunk, warp, lane);
    } else {
      rank_chunk<Traits, 1>(p, keys, filter, query, layout.query_stride, first_key, num_chunk,
                            ranks, chunk, warp, lane);
    }
    __syncthreads();
    if (warp < num_tokens) {
      num_kept = merge_best(kept + warp * layout.kept_stride, num_kept, ranks + warp * chunk,
                            num_chunk, static_cast<uint32_t>(first_key), m, lane);
    }
    __syncthreads();
  }

  // Row (token, head, side) of the axis outputs.
  const int64_t first_output = (first_token * p.num_heads + head) * 2 + side;
  const int64_t output_stride = int64_t{2} * p.num_heads;
  if (warp < num_tokens) {
    // In the order of their positions, as merge_best leaves them.
    const uint64_t* best = kept + warp * layout.kept_stride;
    int32_t* axis_indices = p.axis_indices + (first_output + warp * output_stride) * m;
    for (int i = lane; i < m; i += kWarpSize) {
      axis_indices[i] = static_cast<int32_t>(candidate_position(best[i]));
    }
  }
  __syncthreads();
  if (use_packets) {
    score_kept<Traits, kPacket>(p, keys, query, layout.query_stride, kept, layout.kept_stride,
                                num_tokens, first_output, output_stride, warp, lane);
  } else {
    score_kept<Traits, 1>(p, keys, query, layout.query_stride, kept, layout.kept_stride, num_tokens,
                          first_output, output_stride, warp, lane);
  }
}

// Chunks of equal size: a last one of a few keys would leave most warps without work.
int chunk_keys(const ProductKeyTopkParams& p) {
  return static_cast<int>(ceil_div(p.num_keys, ceil_div(p.num_keys, kMaxChunkKeys)));
}

template <typename scalar_t, int kTileTokens>
Status launch_axis(const ProductKeyTopkParams& p, Stream stream) {
  using Traits = AxisTraits<kTileTokens>;
  const int chunk = chunk_keys(p);
  const AxisLayout layout(p, Traits::kTile, chunk);
  const auto kernel = product_key_topk_fwd_axis_kernel<scalar_t, kTileTokens>;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, layout.bytes));
  const int64_t num_blocks = ceil_div(p.num_tokens, Traits::kTile) * p.num_heads * 2;
  kernel<<<static_cast<unsigned>(num_blocks), Traits::kThreads, layout.bytes, stream>>>(
      p, chunk, packets_fit(p.keys, p.key_dim, p.dtype));
  return launch_status();
}

constexpr int kWideTile = 8;

template <typename scalar_t>
Status launch_axis_tiled(const ProductKeyTopkParams& p, Stream stream) {
  int num_multiprocessors = 0;
  int shared_limit = 0;
  ULTRAMEM_RETURN_IF_ERROR(device_attribute(cudaDevAttrMultiProcessorCount, &num_multiprocessors));
  ULTRAMEM_RETURN_IF_ERROR(
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_limit));
  // A block per token as long as all of them run at once.
  const bool few_tokens = p.num_tokens * p.num_heads * 2 <= num_multiprocessors;
  if (few_tokens || AxisLayout(p, kWideTile, chunk_keys(p)).bytes > shared_limit) {
    return launch_axis<scalar_t, 1>(p, stream);
  }
  return launch_axis<scalar_t, kWideTile>(p, stream);
}

ULTRAMEM_REGISTER_KERNEL(axis_f32, "product_key_topk_fwd_axis<fp32, 8>",
                         AxisTraits<kWideTile>::kThreads,
                         product_key_topk_fwd_axis_kernel<float, kWideTile>);
ULTRAMEM_REGISTER_KERNEL(axis_bf16, "product_key_topk_fwd_axis<bf16, 8>",
                         AxisTraits<kWideTile>::kThreads,
                         product_key_topk_fwd_axis_kernel<__nv_bfloat16, kWideTile>);
ULTRAMEM_REGISTER_KERNEL(axis_f16, "product_key_topk_fwd_axis<fp16, 8>",
                         AxisTraits<kWideTile>::kThreads,
                         product_key_topk_fwd_axis_kernel<__half, kWideTile>);
ULTRAMEM_REGISTER_KERNEL(axis_single_f32, "product_key_topk_fwd_axis<fp32, 1>",
                         AxisTraits<1>::kThreads, product_key_topk_fwd_axis_kernel<float, 1>);
ULTRAMEM_REGISTER_KERNEL(axis_single_bf16, "product_key_topk_fwd_axis<bf16, 1>",
                         AxisTraits<1>::kThreads,
                         product_key_topk_fwd_axis_kernel<__nv_bfloat16, 1>);
ULTRAMEM_REGISTER_KERNEL(axis_single_f16, "product_key_topk_fwd_axis<fp16, 1>",
                         AxisTraits<1>::kThreads, product_key_topk_fwd_axis_kernel<__half, 1>);

}  // namespace

Status launch_axis_generic(const ProductKeyTopkParams& params, Stream stream) {
  return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t,
                                 [&] { return launch_axis_tiled<scalar_t>(params, stream); });
}

namespace {

enum class AxisStage { kGeneric, kSmall, kSplit, kCandidates, kResident, kLists, kMma };

// For sizes that check_product_key_topk lets pass.
AxisStage axis_stage(const ProductKeyTopkParams& p) {
  if (axis_small_applies(p)) return AxisStage::kSmall;
#if defined(ULTRAMEM_WITH_SM90A)
  if (axis_wgmma_applies(p)) {
    if (axis_split_applies(p)) return AxisStage::kSplit;
    if (axis_candidates_applies(p)) return AxisStage::kCandidates;
    return axis_resident_applies(p) ? AxisStage::kResident : AxisStage::kLists;
  }
#endif
  return axis_mma_applies(p) ? AxisStage::kMma : AxisStage::kGeneric;
}

Status check_fwd(const ProductKeyTopkParams& p) {
  ULTRAMEM_RETURN_IF_ERROR(check_product_key_topk(p));
  if (p.mode == ScoreMode::kTucker && p.core == nullptr) {
    return Status::invalid_argument("product_key_topk: core is null");
  }
  if (p.mode == ScoreMode::kTucker && (p.u == nullptr || p.t == nullptr) && !computes_filter(p)) {
    return Status::invalid_argument("product_key_topk: u or t is null");
  }
  return {};
}

}  // namespace

size_t product_key_topk_fwd_workspace(const ProductKeyTopkParams& params) {
  if (!check_product_key_topk(params).ok() || params.num_tokens == 0) return 0;
  switch (axis_stage(params)) {
    case AxisStage::kSmall:
      return axis_small_workspace(params);
#if defined(ULTRAMEM_WITH_SM90A)
    case AxisStage::kSplit:
      return axis_split_workspace(params);
    case AxisStage::kCandidates:
      return axis_candidates_workspace(params);
    case AxisStage::kResident:
      return axis_resident_workspace(params);
#endif
    case AxisStage::kMma:
      return axis_mma_workspace(params);
    default:
      return 0;
  }
}

Status product_key_topk_fwd_axes(const ProductKeyTopkParams& given, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_fwd(given));
  if (given.num_tokens == 0) return {};
  const ProductKeyTopkParams params = with_filter(given);
  const bool filter_ahead = computes_filter(given);
  if (filter_ahead) ULTRAMEM_RETURN_IF_ERROR(tucker_filter(filter_params(params), stream));
  switch (axis_stage(params)) {
    case AxisStage::kSmall:
      return launch_axis_small(params, stream);
#if defined(ULTRAMEM_WITH_SM90A)
    case AxisStage::kSplit:
      return launch_axis_split(params, stream, filter_ahead);
    case AxisStage::kCandidates:
      return launch_axis_candidates(params, stream);
    case AxisStage::kResident:
      return launch_axis_resident(params, stream, filter_ahead);
    case AxisStage::kLists:
      return launch_axis_lists(params, stream);
#endif
    case AxisStage::kMma:
      return launch_axis_mma(params, stream);
    default:
      return launch_axis_generic(params, stream);
  }
}

Status product_key_topk_fwd_grid(const ProductKeyTopkParams& given, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_fwd(given));
  if (given.num_tokens == 0) return {};
  const ProductKeyTopkParams params = with_filter(given);
  return launch_grid(params, stream, axis_stage(params) != AxisStage::kGeneric);
}

bool product_key_topk_fwd_joined(const ProductKeyTopkParams& params) {
  return check_product_key_topk(params).ok() && params.num_tokens > 0 && token_applies(params);
}

Status product_key_topk_fwd(const ProductKeyTopkParams& given, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_fwd(given));
  if (product_key_topk_fwd_joined(given)) {
    const ProductKeyTopkParams params = with_filter(given);
    if (computes_filter(given)) {
      ULTRAMEM_RETURN_IF_ERROR(tucker_filter(filter_params(params), stream));
    }
    ULTRAMEM_RETURN_IF_ERROR(launch_small_scores(params, stream));
    return launch_token(params, small_score_stride(params), stream);
  }
  ULTRAMEM_RETURN_IF_ERROR(product_key_topk_fwd_axes(given, stream));
  return product_key_topk_fwd_grid(given, stream);
}

}  // namespace ultramem::cuda
