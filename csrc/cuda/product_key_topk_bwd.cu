// Product-key retrieval, backward (selection is not differentiated):
//
//   dS_row[:,i] += sum_c dg_c core_c   S_col[:,j]      dq_r     = sum_i dS[r,i] K[r,i]
//   dS_col[:,j] += sum_c dg_c core_c^T S_row[:,i]      dK[r,i] += dS[r,i] q_r
//   dcore_c     += dg_c S_row[:,i] S_col[:,j]^T
//
// over the kept (i, j) of every token and head; in additive mode dS_row[i] += dg, dS_col[j] += dg.
// dS is kept for the kept keys only. Every sum has a fixed order: the keys' gradients gather, for
// each key, its sorted entries instead of scattering to it.
#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "sort_pairs.h"

namespace ultramem::cuda {
namespace {

// ---- scores: dg -> dS, dcore -------------------------------------------------------------------

// A block takes a head and a slice of the tokens. One thread per kept row and per kept column; the
// warps of rows come first.
constexpr int kScoresMaxThreads = 2 * kMaxAxisTopk;
constexpr int64_t kMaxTokenSlices = 1024;

__host__ __device__ constexpr int side_threads(int axis_topk) {
  return static_cast<int>(ceil_div(axis_topk, kWarpSize)) * kWarpSize;
}

struct ScoresLayout {
  int core;          // [C, R, R]
  int warp_cores;    // [warps of rows, C, R, R] sums of dcore
  int scores;        // [2, R, m] S
  int grad_scores;   // [M, C] dg
  int entries;       // [m, entry_stride] 1 + k where the kept pair k lies, 0 where none does
  int entry_stride;  // an odd number of 32-bit words: threads along a column meet 32 banks
  int64_t bytes;

  __host__ __device__ explicit ScoresLayout(const ProductKeyTopkParams& p) {
    const int64_t m = p.axis_topk;
    const int64_t cores = int64_t{4} * p.num_cores * p.tucker_rank * p.tucker_rank;
    entry_stride = 2 * static_cast<int>((m + 1) / 2 | 1);
    SharedLayout layout;
    core = layout.take(cores);
    warp_cores = layout.take(cores * (side_threads(p.axis_topk) / kWarpSize));
    scores = layout.take(4 * 2 * p.tucker_rank * m);
    grad_scores = layout.take(int64_t{4} * p.topk * p.num_cores);
    entries = layout.take(2 * m * entry_stride);
    bytes = layout.bytes();
  }
};

// grad_axis_scores [T, H, 2, R, m]; core_partials [slices, H, C, R, R], or null.
__global__ void __launch_bounds__(kScoresMaxThreads)
    product_key_topk_bwd_scores_kernel(ProductKeyTopkBwdParams p, int64_t tokens_per_slice,
                                       float* grad_axis_scores, float* core_partials) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const ScoresLayout layout(p);
  auto* core = reinterpret_cast<float*>(shared_bytes + layout.core);
  auto* warp_cores = reinterpret_cast<float*>(shared_bytes + layout.warp_cores);
  auto* scores = reinterpret_cast<float*>(shared_bytes + layout.scores);
  auto* grad_scores = reinterpret_cast<float*>(shared_bytes + layout.grad_scores);
  auto* entries = reinterpret_cast<uint16_t*>(shared_bytes + layout.entries);

  const int thread = threadIdx.x;
  const int num_threads = blockDim.x;
  const int lane = thread % kWarpSize;
  const int m = p.axis_topk;
  const int R = p.tucker_rank;
  const int C = p.num_cores;
  const int core_size = C * R * R;
  const bool additive = p.mode == ScoreMode::kAdditive;
  const int64_t head = blockIdx.x % p.num_heads;
  const int64_t slice = blockIdx.x / p.num_heads;

  const int threads_per_side = num_threads / 2;
  const int side = thread >= threads_per_side;
  const int own = thread - side * threads_per_side;  // this thread's row or column
  const int num_core_warps = threads_per_side / kWarpSize;
  const int own_step = side == 0 ? layout.entry_stride : 1;
  const int other_step = side == 0 ? 1 : layout.entry_stride;
  const float* own_scores = scores + side * R * m;
  const float* other_scores = scores + (1 - side) * R * m;

  const auto* cores = static_cast<const float*>(p.core);
  for (int i = thread; i < core_size; i += num_threads) {
    const int c = i / (R * R);
    core[i] = additive ? 1.0f : cores[(c * int64_t{p.num_heads} + head) * R * R + (i - c * R * R)];
  }
  for (int i = thread; i < num_core_warps * core_size; i += num_threads) warp_cores[i] = 0.0f;

  const int64_t first_token = slice * tokens_per_slice;
  const int64_t last_token = min(first_token + tokens_per_slice, p.num_tokens);
  for (int64_t token = first_token; token < last_token; ++token) {
    const int64_t token_head = token * p.num_heads + head;
    __syncthreads();  // the previous token's tiles have been read
    const auto* axis_scores = static_cast<const float*>(p.axis_scores) + token_head * 2 * R * m;
    // Additive scores are Tucker scores whose other factor is one.
    for (int i = thread; i < 2 * R * m; i += num_threads) {
      scores[i] = additive ? 1.0f : axis_scores[i];
    }
    const auto* dg = static_cast<const float*>(p.grad_scores) + token_head * p.topk * C;
    for (int i = thread; i < p.topk * C; i += num_threads) grad_scores[i] = dg[i];
    for (int i = thread; i < m * layout.entry_stride; i += num_threads) entries[i] = 0;
    __syncthreads();
    // The positions of a token are distinct, so no two threads write the same entry.
    const int16_t* positions = p.grid_positions + token_head * p.topk;
    for (int k = thread; k < p.topk; k += num_threads) {
      const int row = positions[k] / m;
      const int col = positions[k] - row * m;
      entries[row * layout.entry_stride + col] = static_cast<uint16_t>(k + 1);
    }
    __syncthreads();

    // sums[c][x] = sum over the pairs of this row (column) of dg_c times S of the other side.
    float sums[kMaxNumCores][kMaxTuckerRank] = {};
    bool any = false;
    for (int other = 0; other < m && own < m; ++other) {
      const int entry = entries[own * own_step + other * other_step];
      if (entry == 0) continue;
      any = true;
#pragma unroll
      for (int c = 0; c < kMaxNumCores; ++c) {
        if (c >= C) break;
        const float weight = grad_scores[(entry - 1) * C + c];
#pragma unroll
        for (int x = 0; x < kMaxTuckerRank; ++x) {
          if (x < R) sums[c][x] = fmaf(weight, other_scores[x * m + other], sums[c][x]);
        }
      }
    }
    if (own < m) {
      float* out = grad_axis_scores + (token_head * 2 + side) * R * m + own;
      for (int y = 0; y < R; ++y) {
        float total = 0.0f;
#pragma unroll
        for (int c = 0; c < kMaxNumCores; ++c) {
#pragma unroll
          for (int x = 0; x < kMaxTuckerRank; ++x) {
            if (c >= C || x >= R) continue;
            const float weight = side == 0 ? core[(c * R + y) * R + x] : core[(c * R + x) * R + y];
            total = fmaf(weight, sums[c][x], total);
          }
        }
        out[y * m] = any ? total : 0.0f;
      }
    }
    if (core_partials == nullptr || side != 0) continue;
    float* warp_core = warp_cores + thread / kWarpSize * core_size;
    for (int r = 0; r < R; ++r) {
      // Without a pair the product is no term of the sum, even where S is infinite.
      const float row_score = any ? own_scores[r * m + own] : 0.0f;
#pragma unroll
      for (int c = 0; c < kMaxNumCores; ++c) {
#pragma unroll
        for (int s = 0; s < kMaxTuckerRank; ++s) {
          if (c >= C || s >= R) continue;
          const float sum = warp_sum(row_score * sums[c][s]);
          if (lane == 0) warp_core[(c * R + r) * R + s] += sum;
        }
      }
    }
  }
  if (core_partials == nullptr) return;
  __syncthreads();
  for (int i = thread; i < core_size; i += num_threads) {
    float sum = 0.0f;
    for (int w = 0; w < num_core_warps; ++w) sum += warp_cores[w * core_size + i];
    core_partials[(slice * p.num_heads + head) * core_size + i] = sum;
  }
}

constexpr int kReduceThreads = 256;

// A warp per element of the cores sums over the slices of tokens.
__global__ void __launch_bounds__(kReduceThreads)
    product_key_topk_bwd_core_kernel(ProductKeyTopkBwdParams p, int64_t num_slices,
                                     const float* core_partials) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t core_size = int64_t{p.num_cores} * p.tucker_rank * p.tucker_rank;
  const int64_t num_elements = p.num_heads * core_size;
  const int64_t element =
      (int64_t{blockIdx.x} * kReduceThreads + threadIdx.x) / kWarpSize;  // of [H, C, R, R]
  if (element >= num_elements) return;
  float sum = 0.0f;
  for (int64_t slice = lane; slice < num_slices; slice += kWarpSize) {
    sum += core_partials[slice * num_elements + element];
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const int64_t matrix = int64_t{p.tucker_rank} * p.tucker_rank;
  const int64_t head = element / core_size;
  const int64_t c = element % core_size / matrix;
  static_cast<float*>(p.grad_core)[(c * p.num_heads + head) * matrix + element % matrix] = sum;
}

// ---- query -----------------------------------------------------------------------------------

constexpr int kQueryThreads = 128;

template <int kVec, typename scalar_t>
__device__ __forceinline__ void accumulate_query(const ProductKeyTopkBwdParams& p,
                                                 const scalar_t* keys, const float* weights,
                                                 const int32_t* ids, scalar_t* grad_query) {
  const int m = p.axis_topk;
  const int key_packets = static_cast<int>(p.key_dim / kVec);
  for (int i = threadIdx.x; i < p.num_queries * key_packets; i += kQueryThreads) {
    const int query = i / key_packets;
    const int packet = i - query * key_packets;
    // A shared query collects from all ranks.
    const int first_rank = p.num_queries == 1 ? 0 : query;
    const int last_rank = p.num_queries == 1 ? p.tucker_rank : query + 1;
    float sum[kVec] = {};
    for (int r = first_rank; r < last_rank; ++r) {
      const scalar_t* rank_keys = keys + r * p.num_keys * p.key_dim + packet * kVec;
#pragma unroll 4
      for (int k = 0; k < m; ++k) {
        float key[kVec];
        load_floats<kVec>(rank_keys + ids[k] * p.key_dim, key);
#pragma unroll
        for (int x = 0; x < kVec; ++x) sum[x] = fmaf(weights[r * m + k], key[x], sum[x]);
      }
    }
    store_rounded<kVec>(sum, grad_query + int64_t{i} * kVec);
  }
}

// Grid: row (token, side, head) of the query.
template <typename scalar_t>
__global__ void __launch_bounds__(kQueryThreads)
    product_key_topk_bwd_query_kernel(ProductKeyTopkBwdParams p, const float* grad_axis_scores,
                                      bool use_packets) {
  __shared__ float weights[kMaxTuckerRank * kMaxAxisTopk];
  __shared__ int32_t ids[kMaxAxisTopk];
  const int m = p.axis_topk;
  const int64_t row = blockIdx.x;
  const int64_t head = row % p.num_heads;
  const int64_t side = row / p.num_heads % 2;
  const int64_t token = row / p.num_heads / 2;
  const int64_t axis_row = (token * p.num_heads + head) * 2 + side;
  const float* dS = grad_axis_scores + axis_row * p.tucker_rank * m;
  for (int i = threadIdx.x; i < p.tucker_rank * m; i += kQueryThreads) weights[i] = dS[i];
  for (int i = threadIdx.x; i < m; i += kQueryThreads) ids[i] = p.axis_indices[axis_row * m + i];
  __syncthreads();
  const scalar_t* keys = static_cast<const scalar_t*>(p.keys) +
                         (head * 2 + side) * p.tucker_rank * p.num_keys * p.key_dim;
  scalar_t* grad_query = static_cast<scalar_t*>(p.grad_query) + row * p.num_queries * p.key_dim;
  if (use_packets) {
    accumulate_query<kPacket>(p, keys, weights, ids, grad_query);
  } else {
    accumulate_query<1>(p, keys, weights, ids, grad_query);
  }
}

// ---- keys ------------------------------------------------------------------------------------

// An entry is one kept key of one token, head and side: its number is its offset in axis_indices.
// A key row is (head, side, key id).
constexpr int kEntryThreads = 256;
constexpr int64_t kMaxEntryBlocks = 1 << 20;

__global__ void __launch_bounds__(kEntryThreads)
    product_key_topk_bwd_entries_kernel(ProductKeyTopkBwdParams p, int64_t num_entries,
                                        uint32_t* key_rows, uint32_t* entries) {
  const int64_t stride = int64_t{gridDim.x} * kEntryThreads;
  for (int64_t entry = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x; entry < num_entries;
       entry += stride) {
    const int64_t axis_row = entry / p.axis_topk;
    const int64_t head_side = axis_row % (2 * p.num_heads);
    key_rows[entry] = static_cast<uint32_t>(head_side * p.num_keys + p.axis_indices[entry]);
    entries[entry] = static_cast<uint32_t>(entry);
  }
}

// row_starts [num_key_rows + 1]: where the entries of each key row begin in sorted order.
__global__ void __launch_bounds__(kEntryThreads)
    product_key_topk_bwd_row_starts_kernel(const uint32_t* sorted_key_rows, int64_t num_entries,
                                           int64_t num_key_rows, uint32_t* row_starts) {
  const int64_t key_row = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (key_row > num_key_rows) return;
  int64_t first = 0;
  int64_t last = num_entries;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (sorted_key_rows[middle] < key_row) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  row_starts[key_row] = static_cast<uint32_t>(first);
}

// One block per key row and span of at most kKeyThreads packets of its [R, Kd] gradient. Tokens and
// weights of a tile of entries go through shared memory, so that nothing but the queries' own loads
// is waited for; narrow spans split the entries between groups of threads.
constexpr int kKeyThreads = 256;
constexpr int kTileEntries = 128;

struct KeySpans {
  int packets;  // of a span
  int count;    // of spans in a key row

  KeySpans(const ProductKeyTopkParams& p, int packet_elements) {
    const int64_t row_packets = p.tucker_rank * p.key_dim / packet_elements;
    count = static_cast<int>(ceil_div(row_packets, kKeyThreads));
    packets = static_cast<int>(ceil_div(row_packets, count));
  }
};

template <int kVec, typename scalar_t>
__device__ __forceinline__ void accumulate_key(const ProductKeyTopkBwdParams& p, KeySpans spans,
                                               const float* grad_axis_scores,
                                               const uint32_t* sorted_entries,
                                               const uint32_t* row_starts) {
  __shared__ int32_t tokens[kTileEntries];
  __shared__ float weights[kMaxTuckerRank * kTileEntries];
  __shared__ Packet<float, kVec> group_sums[kKeyThreads];

  const int thread = threadIdx.x;
  const int m = p.axis_topk;
  const int64_t key_row = blockIdx.x / spans.count;
  const int span = static_cast<int>(blockIdx.x - key_row * spans.count);
  const int64_t key = key_row % p.num_keys;
  const int64_t head_side = key_row / p.num_keys;
  const int64_t head = head_side / 2;
  const int64_t side = head_side % 2;

  const int num_groups = kKeyThreads / spans.packets;
  const int group = thread / spans.packets;
  const int key_packets = static_cast<int>(p.key_dim / kVec);
  const int row_packet = span * spans.packets + thread % spans.packets;
  const bool active = group < num_groups && row_packet < p.tucker_rank * key_packets;
  const int rank = active ? row_packet / key_packets : 0;
  const int64_t dim = active ? int64_t{row_packet - rank * key_packets} * kVec : 0;
  const int64_t query_dim = p.num_queries * p.key_dim;
  const scalar_t* query = static_cast<const scalar_t*>(p.query) +
                          (side * p.num_heads + head) * query_dim +
                          (p.num_queries == 1 ? 0 : rank * p.key_dim) + dim;
  const int64_t token_stride = 2 * p.num_heads * query_dim;

  const int64_t first = row_starts[key_row];
  const int64_t last = row_starts[key_row + 1];
  float total[kVec] = {};
  for (int64_t base = first; base < last; base += kTileEntries) {
    const int count = static_cast<int>(min(int64_t{kTileEntries}, last - base));
    __syncthreads();  // the previous tile has been read
    for (int i = thread; i < count; i += kKeyThreads) {
      const int64_t entry = sorted_entries[base + i];
      const int64_t axis_row = entry / m;
      tokens[i] = static_cast<int32_t>(axis_row / (2 * p.num_heads));
      const float* dS = grad_axis_scores + axis_row * p.tucker_rank * m + (entry - axis_row * m);
      for (int r = 0; r < p.tucker_rank; ++r) weights[r * kTileEntries + i] = dS[r * m];
    }
    __syncthreads();
    if (!active) continue;
    // A tile is summed by itself, so that the error grows with the number of tiles, not of entries.
    float sum[kVec] = {};
#pragma unroll 4
    for (int i = group; i < count; i += num_groups) {
      float q[kVec];
      load_floats<kVec>(query + tokens[i] * token_stride, q);
      const float weight = weights[rank * kTileEntries + i];
#pragma unroll
      for (int x = 0; x < kVec; ++x) sum[x] = fmaf(weight, q[x], sum[x]);
    }
#pragma unroll
    for (int x = 0; x < kVec; ++x) total[x] += sum[x];
  }

  if (active) {
#pragma unroll
    for (int x = 0; x < kVec; ++x) group_sums[thread].elements[x] = total[x];
  }
  __syncthreads();
  if (!active || group != 0) return;
  for (int g = 1; g < num_groups; ++g) {
#pragma unroll
    for (int x = 0; x < kVec; ++x) total[x] += group_sums[g * spans.packets + thread].elements[x];
  }
  const int64_t out = ((head_side * p.tucker_rank + rank) * p.num_keys + key) * p.key_dim + dim;
  store_rounded<kVec>(total, static_cast<scalar_t*>(p.grad_keys) + out);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKeyThreads)
    product_key_topk_bwd_keys_kernel(ProductKeyTopkBwdParams p, KeySpans spans, bool use_packets,
                                     const float* grad_axis_scores, const uint32_t* sorted_entries,
                                     const uint32_t* row_starts) {
  if (use_packets) {
    accumulate_key<kPacket, scalar_t>(p, spans, grad_axis_scores, sorted_entries, row_starts);
  } else {
    accumulate_key<1, scalar_t>(p, spans, grad_axis_scores, sorted_entries, row_starts);
  }
}

// ---- launches ----------------------------------------------------------------------------------

struct Workspace {
  int64_t num_entries;
  int64_t num_key_rows;
  int64_t tokens_per_slice;
  int64_t num_slices;
  int num_key_bits;
  size_t sort_bytes;
  // Offsets.
  size_t grad_axis_scores, core_partials;
  size_t key_rows, sorted_key_rows, entries, sorted_entries, row_starts, sort;
  size_t bytes = 0;

  explicit Workspace(const ProductKeyTopkParams& p) {
    num_entries = p.num_tokens * p.num_heads * 2 * p.axis_topk;
    num_key_rows = int64_t{2} * p.num_heads * p.num_keys;
    tokens_per_slice = ceil_div(p.num_tokens, kMaxTokenSlices);
    num_slices = ceil_div(p.num_tokens, tokens_per_slice);
    num_key_bits = key_bits(static_cast<uint64_t>(num_key_rows - 1));
    sort_bytes = sort_pairs_workspace(num_entries, num_key_bits);
    grad_axis_scores = take(num_entries * p.tucker_rank * sizeof(float));
    core_partials = take(num_slices * p.num_heads * p.num_cores * p.tucker_rank * p.tucker_rank *
                         sizeof(float));
    key_rows = take(num_entries * sizeof(uint32_t));
    sorted_key_rows = take(num_entries * sizeof(uint32_t));
    entries = take(num_entries * sizeof(uint32_t));
    sorted_entries = take(num_entries * sizeof(uint32_t));
    row_starts = take((num_key_rows + 1) * sizeof(uint32_t));
    sort = take(sort_bytes);
  }

 private:
  size_t take(size_t size) {
    const size_t offset = bytes;
    bytes += align_up(size);
    return offset;
  }
};

template <typename T>
T* piece(const ProductKeyTopkBwdParams& p, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
}

Status launch_scores(const ProductKeyTopkBwdParams& p, const Workspace& workspace, Stream stream) {
  const bool wants_core = p.grad_core != nullptr && p.mode == ScoreMode::kTucker;
  float* core_partials = wants_core ? piece<float>(p, workspace.core_partials) : nullptr;
  const ScoresLayout layout(p);
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(product_key_topk_bwd_scores_kernel, layout.bytes));
  product_key_topk_bwd_scores_kernel<<<static_cast<unsigned>(workspace.num_slices * p.num_heads),
                                       2 * side_threads(p.axis_topk), layout.bytes, stream>>>(
      p, workspace.tokens_per_slice, piece<float>(p, workspace.grad_axis_scores), core_partials);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  if (!wants_core) return {};

  const int64_t num_elements = int64_t{p.num_heads} * p.num_cores * p.tucker_rank * p.tucker_rank;
  const int64_t num_blocks = ceil_div(num_elements * kWarpSize, kReduceThreads);
  product_key_topk_bwd_core_kernel<<<static_cast<unsigned>(num_blocks), kReduceThreads, 0,
                                     stream>>>(p, workspace.num_slices, core_partials);
  return launch_status();
}

template <typename scalar_t>
Status launch_query(const ProductKeyTopkBwdParams& p, const Workspace& workspace, Stream stream) {
  const bool use_packets =
      packets_fit(p.keys, p.key_dim, p.dtype) && packets_fit(p.grad_query, p.key_dim, p.dtype);
  const int64_t num_blocks = p.num_tokens * 2 * p.num_heads;
  product_key_topk_bwd_query_kernel<scalar_t>
      <<<static_cast<unsigned>(num_blocks), kQueryThreads, 0, stream>>>(
          p, piece<float>(p, workspace.grad_axis_scores), use_packets);
  return launch_status();
}

template <typename scalar_t>
Status launch_keys(const ProductKeyTopkBwdParams& p, const Workspace& workspace, Stream stream) {
  const bool use_packets =
      packets_fit(p.query, p.key_dim, p.dtype) && packets_fit(p.grad_keys, p.key_dim, p.dtype);
  const KeySpans spans(p, use_packets ? kPacket : 1);
  const int64_t num_key_blocks = workspace.num_key_rows * spans.count;
  if (num_key_blocks > 0x7fffffff) {
    return Status::invalid_argument(
        "product_key_topk_bwd: too many keys of too large a key_dim for one launch");
  }
  auto* key_rows = piece<uint32_t>(p, workspace.key_rows);
  auto* sorted_key_rows = piece<uint32_t>(p, workspace.sorted_key_rows);
  auto* entries = piece<uint32_t>(p, workspace.entries);
  auto* sorted_entries = piece<uint32_t>(p, workspace.sorted_entries);
  auto* row_starts = piece<uint32_t>(p, workspace.row_starts);

  const int64_t entry_blocks =
      std::min(ceil_div(workspace.num_entries, kEntryThreads), kMaxEntryBlocks);
  product_key_topk_bwd_entries_kernel<<<static_cast<unsigned>(entry_blocks), kEntryThreads, 0,
                                        stream>>>(p, workspace.num_entries, key_rows, entries);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  // Stable, so the entries of a key row stay in the order of their tokens.
  ULTRAMEM_RETURN_IF_ERROR(sort_pairs(
      key_rows, sorted_key_rows, entries, sorted_entries, workspace.num_entries,
      workspace.num_key_bits, piece<void>(p, workspace.sort), workspace.sort_bytes, stream));
  const int64_t row_blocks = ceil_div(workspace.num_key_rows + 1, kEntryThreads);
  product_key_topk_bwd_row_starts_kernel<<<static_cast<unsigned>(row_blocks), kEntryThreads, 0,
                                           stream>>>(sorted_key_rows, workspace.num_entries,
                                                     workspace.num_key_rows, row_starts);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  product_key_topk_bwd_keys_kernel<scalar_t>
      <<<static_cast<unsigned>(num_key_blocks), kKeyThreads, 0, stream>>>(
          p, spans, use_packets, piece<float>(p, workspace.grad_axis_scores), sorted_entries,
          row_starts);
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

ULTRAMEM_REGISTER_KERNEL(scores, "product_key_topk_bwd_scores", kScoresMaxThreads,
                         product_key_topk_bwd_scores_kernel);
ULTRAMEM_REGISTER_KERNEL(core, "product_key_topk_bwd_core", kReduceThreads,
                         product_key_topk_bwd_core_kernel);
ULTRAMEM_REGISTER_KERNEL(query_f32, "product_key_topk_bwd_query<fp32>", kQueryThreads,
                         product_key_topk_bwd_query_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(query_bf16, "product_key_topk_bwd_query<bf16>", kQueryThreads,
                         product_key_topk_bwd_query_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(query_f16, "product_key_topk_bwd_query<fp16>", kQueryThreads,
                         product_key_topk_bwd_query_kernel<__half>);
ULTRAMEM_REGISTER_KERNEL(entries, "product_key_topk_bwd_entries", kEntryThreads,
                         product_key_topk_bwd_entries_kernel);
ULTRAMEM_REGISTER_KERNEL(row_starts, "product_key_topk_bwd_row_starts", kEntryThreads,
                         product_key_topk_bwd_row_starts_kernel);
ULTRAMEM_REGISTER_KERNEL(keys_f32, "product_key_topk_bwd_keys<fp32>", kKeyThreads,
                         product_key_topk_bwd_keys_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(keys_bf16, "product_key_topk_bwd_keys<bf16>", kKeyThreads,
                         product_key_topk_bwd_keys_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(keys_f16, "product_key_topk_bwd_keys<fp16>", kKeyThreads,
                         product_key_topk_bwd_keys_kernel<__half>);

}  // namespace

size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params) {
  if (!check_bwd(params).ok() || params.num_tokens == 0) return 0;
  return Workspace(params).bytes;
}

Status product_key_topk_bwd(const ProductKeyTopkBwdParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_bwd(params));
  if (params.num_tokens == 0) return clear_gradients(params, stream);
  const Workspace workspace(params);
  ULTRAMEM_RETURN_IF_ERROR(launch_scores(params, workspace, stream));
  return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t, [&]() -> Status {
    if (params.grad_query != nullptr) {
      ULTRAMEM_RETURN_IF_ERROR(launch_query<scalar_t>(params, workspace, stream));
    }
    if (params.grad_keys == nullptr) return {};
    return launch_keys<scalar_t>(params, workspace, stream);
  });
}

}  // namespace ultramem::cuda
