// Product-key retrieval, forward, axis stage: the best m of the candidates of a token, head and
// side, a warp each (product_key_candidates.cuh).
#include "async_copy.cuh"
#include "block_topk.cuh"
#include "kernel_registry.h"
#include "product_key_candidates.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kPickBins = 4 * kWarpSize;  // four neighbours for each lane
// Candidates of one bin that are compared with each other; where there are more, a search cuts.
constexpr int kMaxCompared = 32;

// A warp's shared memory. What it keeps is put in the order of ids by counting bits of a set.
struct PickLayout {
  int bins;      // [kPickBins] how many candidates; the best come first
  int compared;  // [kMaxCompared] candidates of one bin, then how many
  int bits;      // [words] a bit for each key
  int before;    // [words] how many bits are in words before
  int kept;      // [m] which of the candidates
  int words;
  int64_t bytes;

  __host__ __device__ PickLayout(const ProductKeyTopkParams& p) {
    words = static_cast<int>(ceil_div(p.num_keys, kWarpSize * kWarpSize)) * kWarpSize;
    SharedLayout layout;
    bins = layout.take(int64_t{4} * kPickBins);
    compared = layout.take(int64_t{8} * kMaxCompared + 4);
    bits = layout.take(int64_t{4} * words);
    before = layout.take(int64_t{2} * words);
    kept = layout.take(int64_t{2} * p.axis_topk);
    bytes = layout.bytes();
  }
};

// Of a row's candidates, in whichever list they are.
template <int kLists, bool kRecords>
struct ListCounts {
  int counts[kLists];
  int total = 0;

  __device__ ListCounts(const Candidates<kLists, kRecords>& candidates, int64_t row) {
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      counts[i] = candidates.counts[kLists * row + i];
      total += counts[i];
    }
  }
  // Where the i-th of them is.
  __device__ __forceinline__ int place(const Candidates<kLists, kRecords>& candidates,
                                       int i) const {
    int place = i, end = 0;
#pragma unroll
    for (int list = 0; list < kLists - 1; ++list) {
      end += counts[list];
      place += i < end ? 0 : candidates.capacities[list] - counts[list];
    }
    return place;
  }
};

// The bin of a warp's histogram that the `wanted`-th best candidate is in.
struct PickBin {
  uint32_t index;
  uint32_t above;  // candidates in the bins before
  uint32_t count;  // candidates in it

  __device__ __forceinline__ PickBin(const uint32_t* bins, uint32_t wanted, int lane) {
    const uint4 four = *reinterpret_cast<const uint4*>(bins + 4 * lane);
    const uint32_t until[4] = {four.x, four.x + four.y, four.x + four.y + four.z,
                               four.x + four.y + four.z + four.w};
    int all = 0;
    const auto before =
        static_cast<uint32_t>(warp_scan_exclusive(static_cast<int>(until[3]), lane, &all));
    const uint32_t reached = __ballot_sync(kFullMask, before + until[3] >= wanted);
    uint32_t in_lane = 0, first = before, end = before + until[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      if (before + until[i - 1] >= wanted) break;
      in_lane = i;
      first = before + until[i - 1];
      end = before + until[i];
    }
    // Of the lane that reaches it; all three are below 2^10.
    const uint32_t found =
        __shfl_sync(kFullMask, (4 * lane + in_lane) | first << 10 | (end - first) << 20,
                    __ffs(static_cast<int>(reached)) - 1);
    index = found & 0x3ffu;
    above = found >> 10 & 0x3ffu;
    count = found >> 20;
  }
};

// Of a warp's candidates, of which there is at least one, those of a lane: i * 32 + lane for all i.
// What is none has rank 0 and kNoId. place_of(i) is where the i-th of all is.
template <int kEntries, int kPlanes>
struct Entries {
  uint32_t ranks[kEntries];
  uint32_t ids[kEntries];

  template <int kLists, bool kRecords, typename PlaceOf>
  __device__ __forceinline__ Entries(const Candidates<kLists, kRecords>& candidates, int total,
                                     const float (&filter)[kPlanes], int lane, PlaceOf place_of) {
    // Nothing stands between the loads, so that they are on their way together.
    float scores[kEntries][kPlanes];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int64_t place = place_of(min(e * kWarpSize + lane, total - 1));
      ids[e] = load_candidate(candidates, place, scores[e]);
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const bool exists = e * kWarpSize + lane < total;
      ranks[e] = exists ? sortable(rank_value<kPlanes>(filter, scores[e])) : 0;
      ids[e] = exists ? ids[e] : kNoId;
    }
  }
};

// Sets the bits of the ids of a warp's best `wanted` candidates of `total`, more than that. A
// histogram says in which bin the last of them lies, and those of that bin are compared.
template <int kEntries>
__device__ __forceinline__ void mark_best(const uint32_t (&ranks)[kEntries],
                                          const uint32_t (&ids)[kEntries], int total,
                                          uint32_t wanted, uint32_t num_ids, uint32_t* bins,
                                          uint64_t* compared, uint32_t* bits, int lane) {
  auto* num_compared = reinterpret_cast<uint32_t*>(compared + kMaxCompared);
  *reinterpret_cast<uint4*>(bins + 4 * lane) = make_uint4(0, 0, 0, 0);
  if (lane == 0) *num_compared = 0;
  uint32_t highest = 0, lowest = 0xffffffffu;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    highest = max(highest, ranks[e]);
    // What is no entry has rank 0, and so has NaN.
    lowest = min(lowest, ids[e] == kNoId ? lowest : ranks[e]);
  }
  highest = __reduce_max_sync(kFullMask, highest);
  lowest = __reduce_min_sync(kFullMask, lowest);
  // A bin never lies behind that of a lower rank, also where there is an infinity or no range at
  // all: what is not a number then becomes 0 and the rest saturates.
  const float first = value_of(highest);
  const float scale = __fdividef(static_cast<float>(kPickBins), first - value_of(lowest));
  uint32_t own_bins[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    own_bins[e] = min(__float2uint_rz((first - value_of(ranks[e])) * scale), kPickBins - 1u);
    if (ids[e] == kNoId) own_bins[e] = kPickBins;
    if (ids[e] != kNoId) atomicAdd(bins + own_bins[e], 1u);
  }
  __syncwarp();
  const PickBin bin(bins, wanted, lane);
  const bool all_of_bin = bin.above + bin.count == wanted;
  if (lowest == 0 || (bin.count > kMaxCompared && !all_of_bin)) {
    const Cut cut = find_cut(ranks, ids, total, wanted, num_ids);
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (ids[e] != kNoId && cut.keeps(ranks[e], ids[e])) {
        atomicOr(bits + ids[e] / kWarpSize, 1u << ids[e] % kWarpSize);
      }
    }
    return;
  }
  const uint32_t end = bin.index + (all_of_bin ? 1 : 0);
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (own_bins[e] < end) atomicOr(bits + ids[e] / kWarpSize, 1u << ids[e] % kWarpSize);
  }
  if (all_of_bin) return;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (own_bins[e] == end) {
      compared[atomicAdd(num_compared, 1u)] = make_candidate(ranks[e], ids[e]);
    }
  }
  __syncwarp();
  if (lane >= bin.count) return;
  const uint64_t own = compared[lane];
  uint32_t place = bin.above;
#pragma unroll 1
  for (uint32_t i = 0; i < bin.count; ++i) place += compared[i] > own;
  if (place >= wanted) return;
  const uint32_t id = candidate_position(own);
  atomicOr(bits + id / kWarpSize, 1u << id % kWarpSize);
}

// A warp picks the best of a row's candidates, up to kEntries a lane.
template <int kPlanes, int kEntries, int kLists, bool kRecords>
__device__ __forceinline__ void pick(const ProductKeyTopkParams& p,
                                     const Candidates<kLists, kRecords>& candidates,
                                     const ListCounts<kLists, kRecords>& lists, int64_t row,
                                     int head_side, int64_t token, const PickLayout& layout,
                                     unsigned char* shared, int lane) {
  auto* bits = reinterpret_cast<uint32_t*>(shared + layout.bits);
  auto* before = reinterpret_cast<uint16_t*>(shared + layout.before);
  auto* kept = reinterpret_cast<uint16_t*>(shared + layout.kept);
  const int head = head_side / 2, side = head_side % 2;
  const int64_t first_place = row * candidates.capacity();
  const int m = p.axis_topk;

  float filter[kPlanes];
  const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t);
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f : vector[head * kPlanes + r];
  }
  for (int i = lane; i < layout.words; i += kWarpSize) bits[i] = 0;
  const auto place_of = [&](int i) { return first_place + lists.place(candidates, i); };
  const Entries<kEntries, kPlanes> entries(candidates, lists.total, filter, lane, place_of);
  const auto& ranks = entries.ranks;
  const auto& ids = entries.ids;
  __syncwarp();
  if (lists.total > m) {
    mark_best(ranks, ids, lists.total, static_cast<uint32_t>(m), static_cast<uint32_t>(p.num_keys),
              reinterpret_cast<uint32_t*>(shared + layout.bins),
              reinterpret_cast<uint64_t*>(shared + layout.compared), bits, lane);
  } else {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (ids[e] != kNoId) atomicOr(bits + ids[e] / kWarpSize, 1u << ids[e] % kWarpSize);
    }
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
    const uint32_t bit = 1u << ids[e] % kWarpSize;
    if ((bits[word] & bit) == 0) continue;
    const int place = before[word] + __popc(bits[word] & (bit - 1));
    kept[place] = static_cast<uint16_t>(e * kWarpSize + lane);
  }
  __syncwarp();
  const int64_t axis_row = (token * p.num_heads + head) * 2 + side;
  int32_t* axis_indices = p.axis_indices + axis_row * m;
  auto* axis_scores = static_cast<float*>(p.axis_scores) + axis_row * kPlanes * m;
  // Read once more, for registers to hold what is kept of them would cost warps.
#pragma unroll 4
  for (int place = lane; place < m; place += kWarpSize) {
    float of_key[kPlanes];
    axis_indices[place] =
        static_cast<int32_t>(load_candidate(candidates, place_of(kept[place]), of_key));
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) axis_scores[r * m + place] = of_key[r];
  }
}

// Blocks that run at once, as the registers of so many entries allow.
constexpr int pick_blocks(int entries, bool records) {
  return entries <= 8 ? 8 : entries <= 12 ? (records ? 7 : 6) : 4;
}

// Grid: rows of the chunk, a warp each. kEntries candidates a lane, and mostly no more than
// kFewEntries.
template <int kPlanes, int kEntries, int kFewEntries, int kLists, bool kRecords>
__global__ void __launch_bounds__(kWarps* kWarpSize, pick_blocks(kEntries, kRecords))
    product_key_topk_fwd_pick_kernel(ProductKeyTopkParams p,
                                     Candidates<kLists, kRecords> candidates, int64_t first_token) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const PickLayout layout(p);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  wait_for_prerequisite_grid();
  release_dependent_grid();
  const int chunk_token = static_cast<int>(blockIdx.x * kWarps) + warp;
  const int64_t token = first_token + chunk_token;
  if (token >= p.num_tokens) return;
  const int head_side = static_cast<int>(blockIdx.y);
  const int64_t row = candidates.row(head_side, chunk_token);
  const ListCounts<kLists, kRecords> lists(candidates, row);
  unsigned char* shared = shared_bytes + warp * layout.bytes;
  if (kFewEntries < kEntries && lists.total <= kFewEntries * kWarpSize) {
    pick<kPlanes, kFewEntries>(p, candidates, lists, row, head_side, token, layout, shared, lane);
  } else {
    pick<kPlanes, kEntries>(p, candidates, lists, row, head_side, token, layout, shared, lane);
  }
}

#define ULTRAMEM_REGISTER_PICK(planes, entries, few, lists, records)                              \
  ULTRAMEM_REGISTER_KERNEL(                                                                       \
      pick_##planes##_##entries##_##lists##_##records,                                            \
      "product_key_topk_fwd_pick<" #planes ", " #entries ", " #few ", " #lists ", " #records ">", \
      kWarps* kWarpSize, product_key_topk_fwd_pick_kernel<planes, entries, few, lists, records>)
ULTRAMEM_REGISTER_PICK(1, 6, 3, 2, false);
ULTRAMEM_REGISTER_PICK(1, 12, 7, 2, false);
ULTRAMEM_REGISTER_PICK(2, 6, 3, 2, false);
ULTRAMEM_REGISTER_PICK(2, 12, 7, 2, false);
ULTRAMEM_REGISTER_PICK(2, 6, 3, 2, true);
ULTRAMEM_REGISTER_PICK(2, 12, 7, 2, true);
ULTRAMEM_REGISTER_PICK(1, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(1, 20, 10, 4, false);
ULTRAMEM_REGISTER_PICK(2, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(2, 20, 10, 4, false);
ULTRAMEM_REGISTER_PICK(3, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(3, 20, 10, 4, false);
ULTRAMEM_REGISTER_PICK(4, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(4, 20, 10, 4, false);

// Entries of a lane: enough for all lists, but rather few where that will do.
template <int kLists>
struct PickEntries;
template <>
struct PickEntries<2> {
  static constexpr int kSome = 6, kFewOfSome = 3, kMost = 12, kFewOfMost = 7;
};
template <>
struct PickEntries<4> {
  static constexpr int kSome = 8, kFewOfSome = 3, kMost = 20, kFewOfMost = 10;
};

template <int kPlanes, int kLists, bool kRecords>
Status launch(const ProductKeyTopkParams& p, const Candidates<kLists, kRecords>& candidates,
              int64_t first_token, Stream stream) {
  using Counts = PickEntries<kLists>;
  const auto kernel = candidates.capacity() <= Counts::kSome * kWarpSize
                          ? product_key_topk_fwd_pick_kernel<kPlanes, Counts::kSome,
                                                             Counts::kFewOfSome, kLists, kRecords>
                          : product_key_topk_fwd_pick_kernel<kPlanes, Counts::kMost,
                                                             Counts::kFewOfMost, kLists, kRecords>;
  const int64_t bytes = kWarps * PickLayout(p).bytes;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
  const int64_t num_tokens = candidates.tokens_from(first_token, p.num_tokens);
  const dim3 grid(static_cast<unsigned>(ceil_div(num_tokens, kWarps)),
                  static_cast<unsigned>(2 * p.num_heads));
  return launch_overlapping(kernel, grid, kWarps * kWarpSize, bytes, stream, p, candidates,
                            first_token);
}

}  // namespace

Status launch_pick(const ProductKeyTopkParams& params, const Candidates<2>& candidates,
                   int64_t first_token, Stream stream) {
  return params.tucker_rank == 1 ? launch<1>(params, candidates, first_token, stream)
                                 : launch<2>(params, candidates, first_token, stream);
}

Status launch_pick(const ProductKeyTopkParams& params, const Candidates<2, true>& candidates,
                   int64_t first_token, Stream stream) {
  return launch<2>(params, candidates, first_token, stream);
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
