// Product-key retrieval, forward, axis stage: the best m of the candidates of a token, head and
// side, a warp each (product_key_candidates.cuh).
#include "async_copy.cuh"
#include "kernel_registry.h"
#include "product_key_candidates.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

constexpr int kMaxWarps = 8;

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

// Of a row's candidates, in whichever list they are.
template <int kLists>
struct ListCounts {
  int counts[kLists];
  int total = 0;

  __device__ ListCounts(const Candidates<kLists>& candidates, int64_t row) {
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      counts[i] = candidates.counts[kLists * row + i];
      total += counts[i];
    }
  }
  // Where the i-th of them is.
  __device__ __forceinline__ int place(const Candidates<kLists>& candidates, int i) const {
    int place = i, end = 0;
#pragma unroll
    for (int list = 0; list < kLists - 1; ++list) {
      end += counts[list];
      place += i < end ? 0 : candidates.capacities[list] - counts[list];
    }
    return place;
  }
};

// A warp picks the best of a row's candidates, up to kEntries a lane.
template <int kPlanes, int kEntries, int kLists>
__device__ __forceinline__ void pick(const ProductKeyTopkParams& p,
                                     const Candidates<kLists>& candidates,
                                     const ListCounts<kLists>& lists, int64_t row, int head_side,
                                     int64_t token, const PickLayout& layout, unsigned char* shared,
                                     int lane) {
  auto* bits = reinterpret_cast<uint32_t*>(shared + layout.bits);
  auto* before = reinterpret_cast<uint16_t*>(shared + layout.before);
  auto* kept = reinterpret_cast<uint32_t*>(shared + layout.kept);
  const int head = head_side / 2, side = head_side % 2;
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
    if (i < lists.total) {
      const int at = lists.place(candidates, i);
      float of_key[kPlanes];
      load_scores(scores + at * kPlanes, of_key);
      ranks[e] = sortable(rank_value<kPlanes>(filter, of_key));
      ids[e] = row_ids[at];
    }
  }
  Cut cut{0, kNoId - 1};
  if (lists.total > m) {
    cut = find_cut(ranks, ids, lists.total, static_cast<uint32_t>(m),
                   static_cast<uint32_t>(p.num_keys));
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
    const uint32_t word = ids[e] / kWarpSize;
    const int place = before[word] + __popc(bits[word] & ((1u << ids[e] % kWarpSize) - 1));
    float of_key[kPlanes];
    load_scores(scores + lists.place(candidates, e * kWarpSize + lane) * kPlanes, of_key);
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

// Grid: rows of the chunk, a warp each. kEntries candidates a lane, and mostly no more than
// kFewEntries.
template <int kPlanes, int kEntries, int kFewEntries, int kLists>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kEntries <= 6    ? 5
                                                        : kEntries <= 12 ? 4
                                                                         : 3)
    product_key_topk_fwd_pick_kernel(ProductKeyTopkParams p, Candidates<kLists> candidates,
                                     int64_t first_token) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const PickLayout layout(p);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  wait_for_prerequisite_grid();
  release_dependent_grid();
  const int chunk_token = static_cast<int>(blockIdx.x * (blockDim.x / kWarpSize)) + warp;
  const int64_t token = first_token + chunk_token;
  if (token >= p.num_tokens) return;
  const int head_side = static_cast<int>(blockIdx.y);
  const int64_t row = candidates.row(head_side, chunk_token);
  const ListCounts<kLists> lists(candidates, row);
  unsigned char* shared = shared_bytes + warp * layout.bytes;
  if (kFewEntries < kEntries && lists.total <= kFewEntries * kWarpSize) {
    pick<kPlanes, kFewEntries>(p, candidates, lists, row, head_side, token, layout, shared, lane);
  } else {
    pick<kPlanes, kEntries>(p, candidates, lists, row, head_side, token, layout, shared, lane);
  }
}

#define ULTRAMEM_REGISTER_PICK(planes, entries, few, lists)                         \
  ULTRAMEM_REGISTER_KERNEL(                                                         \
      pick_##planes##_##entries##_##lists,                                          \
      "product_key_topk_fwd_pick<" #planes ", " #entries ", " #few ", " #lists ">", \
      kMaxWarps* kWarpSize, product_key_topk_fwd_pick_kernel<planes, entries, few, lists>)
ULTRAMEM_REGISTER_PICK(1, 6, 6, 2);
ULTRAMEM_REGISTER_PICK(1, 12, 12, 2);
ULTRAMEM_REGISTER_PICK(2, 6, 6, 2);
ULTRAMEM_REGISTER_PICK(2, 12, 12, 2);
ULTRAMEM_REGISTER_PICK(1, 8, 3, 4);
ULTRAMEM_REGISTER_PICK(1, 20, 10, 4);
ULTRAMEM_REGISTER_PICK(2, 8, 3, 4);
ULTRAMEM_REGISTER_PICK(2, 20, 10, 4);
ULTRAMEM_REGISTER_PICK(3, 8, 3, 4);
ULTRAMEM_REGISTER_PICK(3, 20, 10, 4);
ULTRAMEM_REGISTER_PICK(4, 8, 3, 4);
ULTRAMEM_REGISTER_PICK(4, 20, 10, 4);

// Entries of a lane: enough for all lists, but rather few where that will do.
template <int kLists>
struct PickEntries;
template <>
struct PickEntries<2> {
  static constexpr int kSome = 6, kFewOfSome = 6, kMost = 12, kFewOfMost = 12;
};
template <>
struct PickEntries<4> {
  static constexpr int kSome = 8, kFewOfSome = 3, kMost = 20, kFewOfMost = 10;
};

template <int kPlanes, int kLists>
Status launch(const ProductKeyTopkParams& p, const Candidates<kLists>& candidates,
              int64_t first_token, Stream stream) {
  using Entries = PickEntries<kLists>;
  const auto kernel =
      candidates.capacity() <= Entries::kSome * kWarpSize
          ? product_key_topk_fwd_pick_kernel<kPlanes, Entries::kSome, Entries::kFewOfSome, kLists>
          : product_key_topk_fwd_pick_kernel<kPlanes, Entries::kMost, Entries::kFewOfMost, kLists>;
  // Beyond what every device has without being asked, fewer warps.
  constexpr int64_t kEnoughShared = 96 * 1024;
  const int64_t warp_bytes = PickLayout(p).bytes;
  int warps = kMaxWarps;
  while (warps * warp_bytes > kEnoughShared) warps /= 2;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, warps * warp_bytes));
  const int64_t num_tokens = candidates.tokens_from(first_token, p.num_tokens);
  const dim3 grid(static_cast<unsigned>(ceil_div(num_tokens, warps)),
                  static_cast<unsigned>(2 * p.num_heads));
  return launch_overlapping(kernel, grid, warps * kWarpSize, warps * warp_bytes, stream, p,
                            candidates, first_token);
}

}  // namespace

Status launch_pick(const ProductKeyTopkParams& params, const Candidates<2>& candidates,
                   int64_t first_token, Stream stream) {
  return params.tucker_rank == 1 ? launch<1>(params, candidates, first_token, stream)
                                 : launch<2>(params, candidates, first_token, stream);
}

Status launch_pick(const ProductKeyTopkParams& params, const Candidates<4>& candidates,
                   int64_t first_token, Stream stream) {
  switch (params.tucker_rank) {
    case 1:
      return launch<1>(params, candidates, first_token, stream);
    case 2:
      return launch<2>(params, candidates, first_token, stream);
    case 3:
      return launch<3>(params, candidates, first_token, stream);
    default:
      return launch<4>(params, candidates, first_token, stream);
  }
}

}  // namespace ultramem::cuda
