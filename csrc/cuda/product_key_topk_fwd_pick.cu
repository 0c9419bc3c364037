// Product-key retrieval, forward, axis stage: the best m of the candidates of a token, head and
// side, a warp each (product_key_candidates.cuh).
#include <algorithm>

#include "async_copy.cuh"
#include "kernel_registry.h"
#include "product_key_candidates.cuh"
#include "product_key_pick.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kWorkBlocks = kWorkTokens / kWarps;

// A warp's shared memory.
struct RowLayout {
  PickLayout picking;
  int kept;  // [1 + R, m] words: ids, then scores; in the place of what picking works with
  int bytes;
  bool packets;  // whether what is kept can be stored four words at a time

  explicit RowLayout(const ProductKeyTopkParams& p)
      : picking(p.num_keys),
        kept(picking.scratch),
        packets(p.axis_topk % kPacket == 0 && is_aligned(p.axis_indices) &&
                is_aligned(p.axis_scores)) {
    const int kept_bytes = 4 * (1 + p.tucker_rank) * p.axis_topk;
    bytes = kept + (std::max(kept_bytes, PickLayout::kScratchBytes) + 15) / 16 * 16;
  }
};

// Of a row's candidates, in whichever list they are.
template <int kLists>
struct ListCounts {
  int counts[kLists];
  int total = 0;

  __device__ __forceinline__ explicit ListCounts(const int32_t* of_row) {
    static_assert(kLists == 2 || kLists == 4, "loaded at once");
    if constexpr (kLists == 2) {
      const int2 both = *reinterpret_cast<const int2*>(of_row);
      counts[0] = both.x;
      counts[1] = both.y;
    } else {
      const int4 four = *reinterpret_cast<const int4*>(of_row);
      counts[0] = four.x;
      counts[1] = four.y;
      counts[2] = four.z;
      counts[3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < kLists; ++i) total += counts[i];
  }
  // Where the i-th of them is.
  template <bool kRecords>
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

// Of lists from which all was read that will be, lines of their own.
template <int kLists>
__device__ __forceinline__ void discard_records(const Candidates<kLists, true>& candidates,
                                                const ListCounts<kLists>& lists,
                                                uint32_t first_place, int lane) {
  const auto* records = reinterpret_cast<const float4*>(candidates.scores);
#pragma unroll
  for (int list = 0; list < kLists; ++list) {
    for (int i = lane * kLineRecords; i < lists.counts[list]; i += kWarpSize * kLineRecords) {
      discard_line(records + first_place + candidates.before(list) + i);
    }
  }
}

// Copies words, kWidth at a time: the first of them there, the others, from `first_others` on,
// elsewhere.
template <int kWidth>
__device__ __forceinline__ void copy_words(const unsigned char* from, int count, int first_others,
                                           int32_t* to, float* others, int lane) {
  using Words = Packet<uint32_t, kWidth>;
  for (int i = lane * kWidth; i < count; i += kWarpSize * kWidth) {
    uint32_t* place = reinterpret_cast<uint32_t*>(to) + i;
    if (i >= first_others) place = reinterpret_cast<uint32_t*>(others) + (i - first_others);
    *reinterpret_cast<Words*>(place) = *reinterpret_cast<const Words*>(from + 4 * i);
  }
}

// A warp picks the best of a row's candidates, up to kEntries a lane, which begin at `first_place`.
// Their scores stay in registers, or are read once more.
template <int kPlanes, int kEntries, bool kHolds, int kLists, bool kRecords>
__device__ __forceinline__ void pick(const ProductKeyTopkParams& p,
                                     const Candidates<kLists, kRecords>& candidates,
                                     const ListCounts<kLists>& lists, uint32_t first_place,
                                     int64_t axis_row, const float (&filter)[kPlanes],
                                     const RowLayout& layout, unsigned char* shared, int lane) {
  const int m = p.axis_topk;
  const PickedIds picked(shared, layout.picking);
  picked.clear(lane);

  float scores[kHolds ? kEntries : 1][kPlanes];
  float ranks[kEntries];
  uint32_t ids[kEntries];
  const auto load = [&](int e, float (&of_key)[kPlanes], bool once) {
    const auto place = static_cast<uint32_t>(lists.place(candidates, e * kWarpSize + lane));
    return load_candidate(candidates, int64_t{first_place + place}, of_key, once);
  };
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    float (&of_key)[kPlanes] = scores[kHolds ? e : 0];
    ids[e] = picked.no_id();
    ranks[e] = -__uint_as_float(kInfinityBits);
    if (e * kWarpSize + lane < lists.total) {
      ids[e] = load(e, of_key, kHolds);
      if constexpr (!kHolds) ranks[e] = rank_value<kPlanes>(filter, of_key);
    }
  }
  if constexpr (kHolds) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (ids[e] != picked.no_id()) ranks[e] = rank_value<kPlanes>(filter, scores[e]);
    }
  }
  __syncwarp();
  unsigned char* scratch = shared + layout.picking.scratch;
  pick_best(ranks, ids, static_cast<uint32_t>(lists.total), static_cast<uint32_t>(m), picked,
            scratch, lane);
  __syncwarp();
  picked.count(lane);
  __syncwarp();
  unsigned char* kept = shared + layout.kept;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    uint32_t place;
    if (!picked.find(ids[e], &place) || place >= static_cast<uint32_t>(m)) continue;
    float (&of_key)[kPlanes] = scores[kHolds ? e : 0];
    if constexpr (!kHolds) load(e, of_key, true);
    auto* to = reinterpret_cast<uint32_t*>(kept) + place;
    to[0] = ids[e];
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) to[(1 + r) * m] = __float_as_uint(of_key[r]);
  }
  __syncwarp();
  if constexpr (kRecords) discard_records(candidates, lists, first_place, lane);
  int32_t* axis_indices = p.axis_indices + axis_row * m;
  float* axis_scores = static_cast<float*>(p.axis_scores) + axis_row * (kPlanes * m);
  const int count = (1 + kPlanes) * m;
  if (layout.packets) {
    copy_words<kPacket>(kept, count, m, axis_indices, axis_scores, lane);
  } else {
    copy_words<1>(kept, count, m, axis_indices, axis_scores, lane);
  }
}

// Blocks that run at once, as the registers of so many entries allow.
constexpr int pick_blocks(int entries, bool records) {
  return entries <= 6 ? 9 : entries <= 8 ? 8 : entries <= 12 ? (records ? 7 : 6) : 4;
}

// Waits until all lists of a work are complete, or known to be late: whether they are complete.
template <int kLists>
__device__ __forceinline__ bool wait_for_lists(const EarlyWorks& early, int work, int lane) {
  const int32_t* state = early.of_work(work, kLists) + lane % (EarlyWorks::kGroups * kLists);
  while (true) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(state) : "memory");
    if (__any_sync(kFullMask, value == EarlyWorks::kLate)) return false;
    if (__all_sync(kFullMask, value == EarlyWorks::kComplete)) break;
    __nanosleep(200);
  }
  __syncwarp();  // what other lanes' states say is there for all
  return true;
}

// Grid: rows of the chunk, a warp each, work by work. kEntries candidates a lane, and mostly no
// more than kFewEntries.
template <int kPlanes, int kEntries, int kFewEntries, int kLists, bool kRecords>
__global__ void __launch_bounds__(kWarps* kWarpSize, pick_blocks(kEntries, kRecords))
    product_key_topk_fwd_pick_kernel(
        const __grid_constant__ ProductKeyTopkParams p,
        const __grid_constant__ Candidates<kLists, kRecords> candidates, int64_t first_token,
        int tiles, Divisor by_tiles, const __grid_constant__ RowLayout layout) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  // Works that may be complete ahead of the others; then first what was written last, which the L2
  // cache still has where it could not keep everything.
  const int turn = static_cast<int>(blockIdx.x) / kWorkBlocks;
  const bool is_early = turn < candidates.early.count;
  const int works = static_cast<int>(gridDim.x) / kWorkBlocks;
  const int work = is_early ? turn : works - 1 - (turn - candidates.early.count);
  const int head_side = by_tiles.quotient(work);
  const int tile = work - head_side * tiles;
  const int head = head_side / 2, side = head_side % 2;
  const int chunk_token =
      tile * kWorkTokens + static_cast<int>(blockIdx.x) % kWorkBlocks * kWarps + warp;
  const int64_t token = first_token + chunk_token;

  // What follows takes the end of this kernel for the end of the one ahead: works that are not
  // early wait for that.
  if (!is_early || !wait_for_lists<kLists>(candidates.early, work, lane)) {
    wait_for_prerequisite_grid();
  }
  release_dependent_grid();
  if (chunk_token >= candidates.chunk_tokens || token >= p.num_tokens) return;
  float filter[kPlanes];
  const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t);
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f : vector[head * kPlanes + r];
  }
  const auto row = static_cast<uint32_t>(candidates.row(head_side, chunk_token));
  const ListCounts<kLists> lists(candidates.counts + row * kLists);
  const uint32_t first_place = row * static_cast<uint32_t>(candidates.capacity());
  const int64_t axis_row = (token * p.num_heads + head) * 2 + side;
  unsigned char* shared = shared_bytes + warp * layout.bytes;
  if (kFewEntries < kEntries && lists.total <= kFewEntries * kWarpSize) {
    pick<kPlanes, kFewEntries, true>(p, candidates, lists, first_place, axis_row, filter, layout,
                                     shared, lane);
  } else {
    pick<kPlanes, kEntries, false>(p, candidates, lists, first_place, axis_row, filter, layout,
                                   shared, lane);
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
ULTRAMEM_REGISTER_PICK(2, 8, 5, 2, true);
ULTRAMEM_REGISTER_PICK(2, 12, 8, 2, true);
ULTRAMEM_REGISTER_PICK(1, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(1, 20, 10, 4, false);
ULTRAMEM_REGISTER_PICK(2, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(2, 20, 10, 4, false);
ULTRAMEM_REGISTER_PICK(3, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(3, 20, 10, 4, false);
ULTRAMEM_REGISTER_PICK(4, 8, 3, 4, false);
ULTRAMEM_REGISTER_PICK(4, 20, 10, 4, false);

// Entries of a lane: enough for all lists, but rather few where that will do.
template <int kLists, bool kRecords>
struct PickEntries;
template <>
struct PickEntries<2, true> {
  static constexpr int kSome = 8, kFewOfSome = 5, kMost = 12, kFewOfMost = 8;
};
template <>
struct PickEntries<2, false> {
  static constexpr int kSome = 6, kFewOfSome = 3, kMost = 12, kFewOfMost = 7;
};
template <>
struct PickEntries<4, false> {
  static constexpr int kSome = 8, kFewOfSome = 3, kMost = 20, kFewOfMost = 10;
};

template <int kPlanes, int kLists, bool kRecords>
Status launch(const ProductKeyTopkParams& p, const Candidates<kLists, kRecords>& candidates,
              int64_t first_token, Stream stream) {
  using Counts = PickEntries<kLists, kRecords>;
  if (candidates.capacity() > Counts::kMost * kWarpSize) {
    return Status::invalid_argument("product_key_topk: more candidates than are picked from");
  }
  const auto kernel = candidates.capacity() <= Counts::kSome * kWarpSize
                          ? product_key_topk_fwd_pick_kernel<kPlanes, Counts::kSome,
                                                             Counts::kFewOfSome, kLists, kRecords>
                          : product_key_topk_fwd_pick_kernel<kPlanes, Counts::kMost,
                                                             Counts::kFewOfMost, kLists, kRecords>;
  const RowLayout layout(p);
  const int64_t bytes = int64_t{kWarps} * layout.bytes;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, bytes));
  const int64_t num_tokens = candidates.tokens_from(first_token, p.num_tokens);
  const auto tiles = static_cast<int>(ceil_div(num_tokens, kWorkTokens));
  const dim3 grid(static_cast<unsigned>(2 * p.num_heads * tiles * kWorkBlocks));
  return launch_overlapping(kernel, grid, kWarps * kWarpSize, bytes, stream, p, candidates,
                            first_token, tiles, Divisor(tiles), layout);
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
