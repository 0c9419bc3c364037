// The beginning of the backward of product_key_topk in one kernel, for up to 32 pairs a token: from
// dg to entries of dS in buckets of 64 tokens by 64 keys, as the products take them.
// (product_key_topk_bwd.cu and product_key_topk_bwd_dense.cu do the same in two kernels otherwise.)
//
// A block has the 64 tokens of a tile, each warp two of them, and each lane a pair of either. Only
// keys of some pair have an entry, as many as a token has different rows and columns. Where it goes
// depends on the pairs alone: entries are counted while scores are still on their way.
#include "async_copy.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "mma.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "product_key_topk_bwd_buckets.cuh"
#include "product_key_topk_bwd_scores.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kOwnTokens = kBucketSize / kWarps;  // of a warp

struct EntriesLayout {
  int core;       // [C, R, R]
  int core_sums;  // [warps, C, R, R] of dcore
  int counts;     // [2, key_tiles + 1] of entries
  int sorted;     // [2, R, max_entries] entries by bucket
  int warps;      // where the warps' own parts begin
  int warp_bytes;
  // From the beginning of a warp's part:
  int scores;       // [tokens, 2, R, m] S
  int ids;          // [tokens, 2, m] of kept keys
  int lanes;        // [tokens, 2, m] those whose pair is in a row, or in a column
  int max_entries;  // of a side and rank
  int64_t bytes;

  explicit EntriesLayout(const ProductKeyTopkParams& p)
      : max_entries(kBucketSize * (p.axis_topk < p.topk ? p.axis_topk : p.topk)) {
    const int64_t of_keys = int64_t{4} * kOwnTokens * 2 * p.axis_topk;
    SharedLayout warp;
    scores = warp.take(of_keys * p.tucker_rank);
    ids = warp.take(of_keys);
    lanes = warp.take(of_keys);
    warp_bytes = static_cast<int>(warp.bytes());
    const int64_t cores = int64_t{4} * p.num_cores * p.tucker_rank * p.tucker_rank;
    SharedLayout layout;
    core = layout.take(cores);
    core_sums = layout.take(cores * kWarps);
    counts = layout.take(int64_t{4} * 2 * (ceil_div(p.num_keys, kBucketSize) + 1));
    sorted = layout.take(int64_t{4} * 2 * p.tucker_rank * max_entries);
    warps = layout.take(warp.bytes() * kWarps);
    bytes = layout.bytes();
  }
};

// Copies `count` words of each of a warp's tokens, of all heads of which the array has as many, to
// shared memory, by packets. They are there once the lanes have waited for their copies.
template <typename T>
__device__ __forceinline__ void load_tokens(const T* from, T* to, int count, int num_tokens,
                                            int num_heads, int lane) {
  static_assert(sizeof(T) == 4 && kOwnTokens == 2);
#pragma unroll 1
  for (int i = lane * kPacket; i < num_tokens * count; i += kWarpSize * kPacket) {
    cp_async_16(shared_address(to + i), from + i + (i < count ? 0 : (num_heads - 1) * count));
  }
}

// By a thread.
__device__ __forceinline__ bool key_is_finite(const ProductKeyTopkBwdParams& p, int64_t row) {
  const FiniteElements elements(p.dtype);
  const int chunks = static_cast<int>(p.key_dim / 8);
  const uint4* key = static_cast<const uint4*>(p.keys) + row * chunks;
  bool finite = true;
  for (int i = 0; i < chunks && finite; ++i) finite = elements.are(key[i]);
  return finite;
}

// A line of a token, row or column, as a lane sees that has a pair in it.
struct OwnLine {
  uint32_t lanes = 0;   // that have; none where there is no pair
  uint32_t target = 0;  // of the line's entry, which is its first lane's: in the lower half at
                        // first its place in the bucket, then in `sorted`; in the upper half the
                        // key, then where the unfolded bucket has it

  __device__ __forceinline__ bool is_first(int lane) const { return is_first_lane(lanes, lane); }
  __device__ __forceinline__ void count(uint32_t of_line, int32_t key, uint32_t* counts, int lane) {
    lanes = of_line;
    if (!is_first(lane)) return;
    target = static_cast<uint32_t>(key) << 16 | atomicAdd(&counts[key / kBucketSize], 1u);
  }
  __device__ __forceinline__ void place(const uint32_t* starts, int token) {
    const uint32_t key = target >> 16;
    target = (target & 0xffff) + starts[key / kBucketSize] +
             (bucket_offset(static_cast<uint32_t>(token), key % kBucketSize) << 16);
  }
};

// Sums over the warp of kValues numbers of each lane, a power of two: that of number i in lanes
// i * (32 / kValues) and the following.
template <int kValues>
__device__ __forceinline__ float warp_sums(float (&values)[kValues], int lane) {
#pragma unroll
  for (int num = kValues / 2, step = kWarpSize / 2; step > 0; num /= 2, step /= 2) {
    if (num == 0) {
      values[0] += __shfl_xor_sync(kFullMask, values[0], step);
      continue;
    }
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      if (i >= num) break;
      const float given = upper ? values[i] : values[i + num];
      const float kept = upper ? values[i + num] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullMask, given, step);
    }
  }
  return values[0];
}

// Grid: (tile of 64 tokens, head).
//   core_partials [blocks, C, R, R], or null
//   entries, bucket_starts: as of product_key_topk_bwd_buckets_kernel, but of fewer entries
template <int kRank>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_bwd_entries_kernel(const __grid_constant__ ProductKeyTopkBwdParams p,
                                        const __grid_constant__ EntriesLayout layout,
                                        ScoresFindings findings, float* core_partials,
                                        uint32_t* entries, uint16_t* bucket_starts) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  constexpr int kCores = kRank;
  constexpr int kPlanes = 2 * kRank;
  constexpr int kCoreSize = kCores * kRank * kRank;
  const int thread = threadIdx.x;
  const int warp = warp_of(thread);
  const int lane = thread % kWarpSize;
  auto* core = reinterpret_cast<float*>(shared_bytes + layout.core);
  auto* core_sums = reinterpret_cast<float*>(shared_bytes + layout.core_sums);
  auto* counts = reinterpret_cast<uint32_t*>(shared_bytes + layout.counts);
  auto* sorted = reinterpret_cast<uint32_t*>(shared_bytes + layout.sorted);
  unsigned char* own_bytes = shared_bytes + layout.warps + warp * layout.warp_bytes;
  auto* scores = reinterpret_cast<float*>(own_bytes + layout.scores);
  auto* ids = reinterpret_cast<int32_t*>(own_bytes + layout.ids);
  auto* line_lanes = reinterpret_cast<uint32_t*>(own_bytes + layout.lanes);

  const PairTerms<kRank, kCores, true> terms(p, core);
  const int m = p.axis_topk;
  const int key_tiles = static_cast<int>(ceil_div(p.num_keys, kBucketSize));
  const int head = p.num_heads == 1 ? 0 : static_cast<int>(blockIdx.x) % p.num_heads;
  const int token_tile =
      p.num_heads == 1 ? static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x) / p.num_heads;
  const int64_t first_token = int64_t{token_tile} * kBucketSize;
  const int first_own = warp * kOwnTokens;
  const int num_own =
      static_cast<int>(min(p.num_tokens - first_token - first_own, int64_t{kOwnTokens}));
  const int64_t token_head = (first_token + first_own) * p.num_heads + head;  // the first own
  const bool has_pair = lane < terms.M;

  wait_for_prerequisite_grid();
  release_dependent_grid();

  KeptPair<kCores> pairs[kOwnTokens];
#pragma unroll
  for (int t = 0; t < kOwnTokens; ++t) {
    pairs[t] = load_pair<kCores>(p, (token_head + t * p.num_heads) * terms.M + lane,
                                 has_pair && t < num_own, kCores);
  }
  const int num_tokens = max(num_own, 0);
  load_tokens(p.axis_indices + token_head * (2 * m), ids, 2 * m, num_tokens, p.num_heads, lane);
  load_tokens(static_cast<const float*>(p.axis_scores) + token_head * (kPlanes * m), scores,
              kPlanes * m, num_tokens, p.num_heads, lane);
#pragma unroll 1
  for (int i = thread; i < 2 * (key_tiles + 1); i += kThreads) counts[i] = 0;
#pragma unroll 1
  for (int i = lane; i < kOwnTokens * 2 * m; i += kWarpSize) line_lanes[i] = 0;
  load_core(p, terms, head, core, thread, kThreads);
  check_keys(p, findings.key_finite, blockIdx.x, gridDim.x);
  cp_async_wait_all();
  __syncthreads();

  OwnLine rows[kOwnTokens], cols[kOwnTokens];
  const auto row_of = [&](int position) { return terms.by_m.quotient(position); };
  const auto col_of = [&](int position) { return position - row_of(position) * m; };
#pragma unroll
  for (int t = 0; t < kOwnTokens; ++t) {
    if (!has_pair || t >= num_own) continue;
    atomicOr(&line_lanes[t * 2 * m + row_of(pairs[t].position)], 1u << lane);
    atomicOr(&line_lanes[t * 2 * m + m + col_of(pairs[t].position)], 1u << lane);
  }
  __syncwarp();
  uint32_t* const col_counts = counts + key_tiles + 1;
#pragma unroll
  for (int t = 0; t < kOwnTokens; ++t) {
    if (!has_pair || t >= num_own) continue;
    const int row = t * 2 * m + row_of(pairs[t].position);
    const int col = t * 2 * m + m + col_of(pairs[t].position);
    rows[t].count(line_lanes[row], ids[row], counts, lane);
    cols[t].count(line_lanes[col], ids[col], col_counts, lane);
  }
  __syncthreads();
  if (warp < 2) exclusive_sums(counts + warp * (key_tiles + 1), key_tiles, lane);
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kOwnTokens; ++t) {
    rows[t].place(counts, first_own + t);
    cols[t].place(col_counts, first_own + t);
  }

  float grad_core[kCores][kRank][kRank] = {};
  // Once for both tokens: the less code, the sooner it is there.
#pragma unroll 1
  for (int t = 0; t < num_own; ++t) {
    const float* own_scores = scores + t * kPlanes * m;
    const OwnLine row = t == 0 ? rows[0] : rows[1];
    const OwnLine col = t == 0 ? cols[0] : cols[1];
    const KeptPair<kCores> pair = t == 0 ? pairs[0] : pairs[1];
    PairScores<kRank> of_keys;
    PairParts<kRank> parts;
    if (has_pair) {
      of_keys = PairScores<kRank>(terms, own_scores, row_of(pair.position), col_of(pair.position));
      parts = PairParts<kRank>(terms, pair, of_keys, grad_core);
    }
    parts.sum_lines(LineLanes(row.lanes, lane), LineLanes(col.lanes, lane));

    // A key whose score is finite is itself, and so is the query.
    bool all_finite = true;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      all_finite = all_finite && is_finite(of_keys.row[r]) && is_finite(of_keys.col[r]);
    }
    bool query_finite = true;  // of lanes' planes
    if (!__all_sync(kFullMask, all_finite)) {
      query_finite = any_score_finite(own_scores, m, kPlanes, lane);
      const uint32_t finite_planes = __ballot_sync(kFullMask, query_finite);
      const auto spoil = [&](int plane, int index, float score, float& part) {
        if (is_finite(score)) return;
        const int64_t key = (int64_t{head} * kPlanes + plane) * p.num_keys + ids[t * 2 * m + index];
        if ((finite_planes >> plane & 1) == 0 || !key_is_finite(p, key)) {
          part = __int_as_float(0x7fffffff);
        }
      };
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        spoil(r, row_of(pair.position), of_keys.row[r], parts.to_row[r]);
        spoil(kRank + r, m + col_of(pair.position), of_keys.col[r], parts.to_col[r]);
      }
    }
    if (lane < kPlanes) {
      findings.query_finite[(int64_t{head} * kPlanes + lane) * p.num_tokens + first_token +
                            first_own + t] = query_finite ? 1 : 0;
    }

    const auto write = [&](const OwnLine& line, const float (&values)[kRank], int side) {
      if (!line.is_first(lane)) return;
      uint32_t* to = sorted + side * kRank * layout.max_entries + (line.target & 0xffff);
      const uint32_t packed = pack_rounded<__nv_bfloat16>(values[0], values[kRank - 1]);
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        const uint32_t upper = r == 0 ? packed << 16 : packed & 0xffff0000u;
        to[r * layout.max_entries] = upper | line.target >> 16;
      }
    };
    write(row, parts.to_row, 0);
    write(col, parts.to_col, 1);
  }

  if (core_partials != nullptr) {
    float values[kCoreSize];
#pragma unroll
    for (int i = 0; i < kCoreSize; ++i) {
      values[i] = grad_core[i / (kRank * kRank)][i / kRank % kRank][i % kRank];
    }
    const float sum = warp_sums(values, lane);
    if (lane % (kWarpSize / kCoreSize) == 0) {
      core_sums[warp * kCoreSize + lane / (kWarpSize / kCoreSize)] = sum;
    }
  }
  __syncthreads();
  if (core_partials != nullptr && thread < kCoreSize) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += core_sums[w * kCoreSize + thread];
    core_partials[int64_t{blockIdx.x} * kCoreSize + thread] = sum;
  }
  constexpr int kPlaneThreads = kThreads / kPlanes;
  const int plane = thread / kPlaneThreads;
  const int64_t first_entry =
      (int64_t{head} * kPlanes + plane) * p.num_tokens * m + first_token * m;
  const auto num_entries = static_cast<int>(counts[plane / kRank * (key_tiles + 1) + key_tiles]);
#pragma unroll 4
  for (int i = thread % kPlaneThreads; i < num_entries; i += kPlaneThreads) {
    entries[first_entry + i] = sorted[plane * layout.max_entries + i];
  }
  const int64_t token_tiles = ceil_div(p.num_tokens, kBucketSize);
  for (int i = thread; i < 2 * (key_tiles + 1); i += kThreads) {
    const int side = i > key_tiles ? 1 : 0;
    bucket_starts[((int64_t{head} * 2 + side) * token_tiles + token_tile) * (key_tiles + 1) + i -
                  side * (key_tiles + 1)] = static_cast<uint16_t>(counts[i]);
  }
}

template <int kRank>
Status launch(const ProductKeyTopkBwdParams& p, const DensePlan& plan, float* core_partials,
              Stream stream) {
  const EntriesLayout layout(p);
  const auto kernel = product_key_topk_bwd_entries_kernel<kRank>;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, layout.bytes));
  const int64_t blocks = ceil_div(p.num_tokens, kBucketSize) * p.num_heads;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, layout.bytes,
                            stream, p, layout, scores_findings(p, plan), core_partials,
                            workspace_piece<uint32_t>(p, plan.entries),
                            workspace_piece<uint16_t>(p, plan.bucket_starts));
}

ULTRAMEM_REGISTER_KERNEL(entries_1, "product_key_topk_bwd_entries<1>", kThreads,
                         product_key_topk_bwd_entries_kernel<1>);
ULTRAMEM_REGISTER_KERNEL(entries_2, "product_key_topk_bwd_entries<2>", kThreads,
                         product_key_topk_bwd_entries_kernel<2>);

}  // namespace

bool entries_apply(const ProductKeyTopkBwdParams& p, const DeviceLimits& limits) {
  return p.dtype == DType::kBFloat16 && p.tucker_rank == p.num_cores && p.tucker_rank <= 2 &&
         p.topk <= kWarpSize && p.axis_topk % 2 == 0 && is_aligned(p.axis_indices) &&
         is_aligned(p.axis_scores) && EntriesLayout(p).bytes <= limits.shared_bytes;
}

Status launch_entries(const ProductKeyTopkBwdParams& p, const DensePlan& plan, float* core_partials,
                      Stream stream) {
  return p.tucker_rank == 1 ? launch<1>(p, plan, core_partials, stream)
                            : launch<2>(p, plan, core_partials, stream);
}

}  // namespace ultramem::cuda
