// Product-key retrieval, forward, axis stage: the best m of the candidates of a token, head and
// side, a warp each (product_key_candidates.cuh).
#include "async_copy.cuh"
#include "kernel_registry.h"
#include "product_key_candidates.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

constexpr int kWarps = 8;

// A warp's shared memory. What it keeps is put in the order of ids by counting bits of a set.
struct PickLayout {
  int bits;    // [words] a bit for each key
  int before;  // [words] how many bits are in words before
  int kept;    // [1 + R, m] ids, then scores of one rank after the other
  int words;
  int64_t bytes;

  __host__ __device__ PickLayout(const ProductKeyTopkParams& p) {
    words = static_cast<int>(ceil_div(p.num_keys, kWarpSize * kWarpSize)) * kWarpSize;
    SharedLayout layout;
    bits = layout.take(int64_t{4} * words);
    before = layout.take(int64_t{2} * words);
    kept = layout.take(int64_t{4} * (1 + p.tucker_rank) * p.axis_topk);
    bytes = layout.bytes();
  }
};

// Grid: rows of the chunk, kWarps a block. kEntries candidates a lane.
template <int kPlanes, int kEntries>
__global__ void __launch_bounds__(kWarps* kWarpSize, kEntries <= 6 ? 5 : 4)
    product_key_topk_fwd_pick_kernel(ProductKeyTopkParams p, Candidates candidates,
                                     int64_t first_token) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const PickLayout layout(p);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  unsigned char* shared = shared_bytes + warp * layout.bytes;
  auto* bits = reinterpret_cast<uint32_t*>(shared + layout.bits);
  auto* before = reinterpret_cast<uint16_t*>(shared + layout.before);
  auto* kept = reinterpret_cast<uint32_t*>(shared + layout.kept);

  wait_for_prerequisite_grid();
  release_dependent_grid();
  const int chunk_token = static_cast<int>(blockIdx.x) * kWarps + warp;
  const int64_t token = first_token + chunk_token;
  if (token >= p.num_tokens) return;
  const int head_side = static_cast<int>(blockIdx.y);
  const int head = head_side / 2, side = head_side % 2;
  const int64_t row = candidates.row(head_side, chunk_token);
  const int first_count = candidates.counts[kCandidateLists * row];
  const int total = first_count + candidates.counts[kCandidateLists * row + 1];
  const int gap = candidates.capacities[0] - first_count;  // between the lists
  const float* scores = candidates.scores + row * candidates.capacity() * kPlanes;
  const uint16_t* row_ids = candidates.ids + row * candidates.capacity();
  const int m = p.axis_topk;

  float filter[kPlanes];
  const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t);
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f : vector[head * kPlanes + r];
  }
  for (int i = lane; i < layout.words; i += kWarpSize) bits[i] = 0;
  uint32_t ranks[kEntries], ids[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int i = e * kWarpSize + lane;
    ranks[e] = 0;
    ids[e] = kNoId;
    if (i < total) {
      const int at = i + (i < first_count ? 0 : gap);
      float of_key[kPlanes];
      load_scores(scores + at * kPlanes, of_key);
      ranks[e] = sortable(rank_value<kPlanes>(filter, of_key));
      ids[e] = row_ids[at];
    }
  }
  Cut cut{0, kNoId - 1};
  if (total > m) {
    cut = find_cut(ranks, ids, total, static_cast<uint32_t>(m), static_cast<uint32_t>(p.num_keys));
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (!cut.keeps(ranks[e], ids[e])) ids[e] = kNoId;
    if (ids[e] != kNoId) atomicOr(bits + ids[e] / kWarpSize, 1u << ids[e] % kWarpSize);
  }
  __syncwarp();
  const int own_words = layout.words / kWarpSize;
  int own_bits = 0;
  for (int i = 0; i < own_words; ++i) own_bits += __popc(bits[lane * own_words + i]);
  int sum = 0;
  int first = warp_scan_exclusive(own_bits, lane, &sum);
  for (int i = 0; i < own_words; ++i) {
    before[lane * own_words + i] = static_cast<uint16_t>(first);
    first += __popc(bits[lane * own_words + i]);
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (ids[e] == kNoId) continue;
    const int i = e * kWarpSize + lane;
    const uint32_t word = ids[e] / kWarpSize;
    const int place = before[word] + __popc(bits[word] & ((1u << ids[e] % kWarpSize) - 1));
    float of_key[kPlanes];
    load_scores(scores + (i + (i < first_count ? 0 : gap)) * kPlanes, of_key);
    kept[place] = ids[e];
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) kept[(1 + r) * m + place] = __float_as_uint(of_key[r]);
  }
  __syncwarp();
  const int64_t axis_row = (token * p.num_heads + head) * 2 + side;
  int32_t* axis_indices = p.axis_indices + axis_row * m;
  auto* axis_scores = static_cast<float*>(p.axis_scores) + axis_row * kPlanes * m;
  for (int i = lane; i < m; i += kWarpSize) axis_indices[i] = static_cast<int32_t>(kept[i]);
  for (int i = lane; i < kPlanes * m; i += kWarpSize) axis_scores[i] = __uint_as_float(kept[m + i]);
}

#define ULTRAMEM_REGISTER_PICK(planes, entries)                                    \
  ULTRAMEM_REGISTER_KERNEL(pick_##planes##_##entries,                              \
                           "product_key_topk_fwd_pick<" #planes ", " #entries ">", \
                           kWarps* kWarpSize, product_key_topk_fwd_pick_kernel<planes, entries>)
ULTRAMEM_REGISTER_PICK(1, 6);
ULTRAMEM_REGISTER_PICK(1, 12);
ULTRAMEM_REGISTER_PICK(2, 6);
ULTRAMEM_REGISTER_PICK(2, 12);

template <int kPlanes>
Status launch(const ProductKeyTopkParams& p, const Candidates& candidates, int64_t first_token,
              Stream stream) {
  const int capacity = candidates.capacity();
  // A list is no longer than it can be cut.
  static_assert(kCandidateLists * kMaxListEntries <= 12);
  const auto kernel = capacity <= 6 * kWarpSize ? product_key_topk_fwd_pick_kernel<kPlanes, 6>
                                                : product_key_topk_fwd_pick_kernel<kPlanes, 12>;
  const int64_t shared_bytes = kWarps * PickLayout(p).bytes;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, shared_bytes));
  const int64_t num_tokens = candidates.tokens_from(first_token, p.num_tokens);
  const dim3 grid(static_cast<unsigned>(ceil_div(num_tokens, kWarps)),
                  static_cast<unsigned>(2 * p.num_heads));
  return launch_overlapping(kernel, grid, kWarps * kWarpSize, shared_bytes, stream, p, candidates,
                            first_token);
}

}  // namespace

Status launch_pick(const ProductKeyTopkParams& params, const Candidates& candidates,
                   int64_t first_token, Stream stream) {
  return params.tucker_rank == 1 ? launch<1>(params, candidates, first_token, stream)
                                 : launch<2>(params, candidates, first_token, stream);
}

}  // namespace ultramem::cuda
