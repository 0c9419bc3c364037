// The gradients of query and keys as sums over gathered rows: any shape, any dtype. Every sum has a
// fixed order: the keys' gradients gather, for each key, its sorted entries instead of scattering
// to it.
#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "sort_pairs.h"

namespace ultramem::cuda {
namespace {

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
    product_key_topk_bwd_key_entries_kernel(ProductKeyTopkBwdParams p, int64_t num_entries,
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

template <typename scalar_t>
Status launch_query(const ProductKeyTopkBwdParams& p, const float* grad_axis_scores,
                    Stream stream) {
  const bool use_packets =
      packets_fit(p.keys, p.key_dim, p.dtype) && packets_fit(p.grad_query, p.key_dim, p.dtype);
  const int64_t num_blocks = p.num_tokens * 2 * p.num_heads;
  product_key_topk_bwd_query_kernel<scalar_t>
      <<<static_cast<unsigned>(num_blocks), kQueryThreads, 0, stream>>>(p, grad_axis_scores,
                                                                        use_packets);
  return launch_status();
}

template <typename scalar_t>
Status launch_keys(const ProductKeyTopkBwdParams& p, const GatherWorkspace& workspace,
                   const float* grad_axis_scores, Stream stream) {
  const bool use_packets =
      packets_fit(p.query, p.key_dim, p.dtype) && packets_fit(p.grad_keys, p.key_dim, p.dtype);
  const KeySpans spans(p, use_packets ? kPacket : 1);
  const int64_t num_key_blocks = workspace.num_key_rows * spans.count;
  if (num_key_blocks > 0x7fffffff) {
    return Status::invalid_argument(
        "product_key_topk_bwd: too many keys of too large a key_dim for one launch");
  }
  auto* key_rows = workspace_piece<uint32_t>(p, workspace.key_rows);
  auto* sorted_key_rows = workspace_piece<uint32_t>(p, workspace.sorted_key_rows);
  auto* entries = workspace_piece<uint32_t>(p, workspace.entries);
  auto* sorted_entries = workspace_piece<uint32_t>(p, workspace.sorted_entries);
  auto* row_starts = workspace_piece<uint32_t>(p, workspace.row_starts);

  const int64_t entry_blocks =
      std::min(ceil_div(workspace.num_entries, kEntryThreads), kMaxEntryBlocks);
  product_key_topk_bwd_key_entries_kernel<<<static_cast<unsigned>(entry_blocks), kEntryThreads, 0,
                                            stream>>>(p, workspace.num_entries, key_rows, entries);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  // Stable, so the entries of a key row stay in the order of their tokens.
  ULTRAMEM_RETURN_IF_ERROR(sort_pairs(key_rows, sorted_key_rows, entries, sorted_entries,
                                      workspace.num_entries, workspace.num_key_bits,
                                      workspace_piece<void>(p, workspace.sort),
                                      workspace.sort_bytes, stream));
  const int64_t row_blocks = ceil_div(workspace.num_key_rows + 1, kEntryThreads);
  product_key_topk_bwd_row_starts_kernel<<<static_cast<unsigned>(row_blocks), kEntryThreads, 0,
                                           stream>>>(sorted_key_rows, workspace.num_entries,
                                                     workspace.num_key_rows, row_starts);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  product_key_topk_bwd_keys_kernel<scalar_t>
      <<<static_cast<unsigned>(num_key_blocks), kKeyThreads, 0, stream>>>(
          p, spans, use_packets, grad_axis_scores, sorted_entries, row_starts);
  return launch_status();
}

ULTRAMEM_REGISTER_KERNEL(query_f32, "product_key_topk_bwd_query<fp32>", kQueryThreads,
                         product_key_topk_bwd_query_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(query_bf16, "product_key_topk_bwd_query<bf16>", kQueryThreads,
                         product_key_topk_bwd_query_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(query_f16, "product_key_topk_bwd_query<fp16>", kQueryThreads,
                         product_key_topk_bwd_query_kernel<__half>);
ULTRAMEM_REGISTER_KERNEL(key_entries, "product_key_topk_bwd_key_entries", kEntryThreads,
                         product_key_topk_bwd_key_entries_kernel);
ULTRAMEM_REGISTER_KERNEL(row_starts, "product_key_topk_bwd_row_starts", kEntryThreads,
                         product_key_topk_bwd_row_starts_kernel);
ULTRAMEM_REGISTER_KERNEL(keys_f32, "product_key_topk_bwd_keys<fp32>", kKeyThreads,
                         product_key_topk_bwd_keys_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(keys_bf16, "product_key_topk_bwd_keys<bf16>", kKeyThreads,
                         product_key_topk_bwd_keys_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(keys_f16, "product_key_topk_bwd_keys<fp16>", kKeyThreads,
                         product_key_topk_bwd_keys_kernel<__half>);

}  // namespace

void lay_out_gather(const ProductKeyTopkParams& p, GatherWorkspace* workspace,
                    WorkspaceLayout& layout) {
  const int64_t entries = p.num_tokens * p.num_heads * 2 * p.axis_topk;
  workspace->num_entries = entries;
  workspace->num_key_rows = int64_t{2} * p.num_heads * p.num_keys;
  workspace->num_key_bits = key_bits(static_cast<uint64_t>(workspace->num_key_rows - 1));
  workspace->sort_bytes = sort_pairs_workspace(entries, workspace->num_key_bits);
  workspace->key_rows = layout.take(entries * sizeof(uint32_t));
  workspace->sorted_key_rows = layout.take(entries * sizeof(uint32_t));
  workspace->entries = layout.take(entries * sizeof(uint32_t));
  workspace->sorted_entries = layout.take(entries * sizeof(uint32_t));
  workspace->row_starts = layout.take((workspace->num_key_rows + 1) * sizeof(uint32_t));
  workspace->sort = layout.take(workspace->sort_bytes);
}

Status launch_gather(const ProductKeyTopkBwdParams& p, const GatherWorkspace& workspace,
                     const float* grad_axis_scores, Stream stream) {
  return ULTRAMEM_DISPATCH_DTYPE(p.dtype, scalar_t, [&]() -> Status {
    if (p.grad_query != nullptr) {
      ULTRAMEM_RETURN_IF_ERROR(launch_query<scalar_t>(p, grad_axis_scores, stream));
    }
    if (p.grad_keys == nullptr) return {};
    return launch_keys<scalar_t>(p, workspace, grad_axis_scores, stream);
  });
}

}  // namespace ultramem::cuda
