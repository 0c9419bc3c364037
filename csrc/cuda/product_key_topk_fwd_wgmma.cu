// Product-key retrieval, forward, axis stage on the tensor cores of sm_90.
//
// A block takes 64 or 128 tokens of one head and side. Tiles of queries and keys stream through
// shared memory (TMA); one or two warpgroups multiply them into R score planes in registers, 64
// tokens each; as many warps select (product_key_lists.cuh). Scores pass from those
// that multiply to those that select in parts of a few keys, through a ring in shared memory: there
// a thread finds all scores of its token, which a product in registers scatters over four lanes.
#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_axis_launch.h"
#include "product_key_common.cuh"
#include "product_key_lists.cuh"
#include "product_key_topk_fwd.h"
#include "sm90a.h"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kDepth = 64;        // elements of Kd in a stage: one 128-byte row
constexpr int kGroupTokens = 64;  // of a warpgroup
constexpr int kRowBytes = 2 * kDepth;
// Tokens may keep up to this many keys where 128 of them share a block's memory.
constexpr int kMaxSharedTopk = 40;

// kPlanes: score planes in registers, at least R. kGroups: warpgroups that multiply.
template <int kPlanes_, int kGroups_>
struct Traits {
  static constexpr int kPlanes = kPlanes_;
  static constexpr int kGroups = kGroups_;
  static_assert(kPlanes == 1 || kPlanes == 2 || kPlanes == 4, "");
  static_assert(kGroups == 1 || kGroups == 2, "");
  static constexpr int kKeys = 64;  // of a tile
  static constexpr int kTokens = kGroupTokens * kGroups;
  static constexpr int kStages = kPlanes == 4 ? 2 : 3;

  // What is handed over at once, kParts times a tile, and how often the ring has room for it.
  static constexpr int kPartKeys = kPlanes <= 2 ? 16 : 8;
  static constexpr int kParts = kKeys / kPartKeys;
  static constexpr int kRing = kPlanes == 1 || (kGroups == 1 && kPlanes == 2) ? 4 : 3;
  static constexpr int kPartBytes = kPartKeys * kGroupTokens * 4 * kPlanes;
  // Two threads select for a token: the keys of a part that each sees.
  static constexpr int kListKeys = kPartKeys / 2;
  static constexpr int kSlots = kGroups == 1 ? (kPlanes == 4 ? 72 : 116) : kPlanes == 1 ? 64 : 40;
  using Lists = KeyListTraits<kPlanes, kSlots, 2 * kTokens, kListKeys>;

  // The first warps multiply, the others select.
  static constexpr int kMultiplierWarps = 4 * kGroups;
  static constexpr int kSelectorWarps = Lists::kLists / kWarpSize;
  static constexpr int kThreads = (kMultiplierWarps + kSelectorWarps) * kWarpSize;
  // Of the registers that 16 warps start with, 128 a thread, some go from one half to the other.
  static constexpr int kMultiplierRegisters = 104;
  static constexpr int kSelectorRegisters = 152;
  static_assert(kMultiplierRegisters + kSelectorRegisters == 256, "");
  static_assert(kSelectorWarps == kMultiplierWarps && Lists::kTokensOfWarp == 16, "");

  static constexpr int kQueryBytes = kTokens * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = kQueryBytes + kKeyBytes;
  // Offsets into shared memory; stages first, because swizzled tiles are aligned to 1024 bytes.
  static constexpr int kRingOffset = kStages * kStageBytes;
  static constexpr int kListsOffset = kRingOffset + kGroups * kRing * kPartBytes;
  static constexpr int kStageBarriersOffset = kListsOffset + Lists::kBytes;
  static constexpr int kRingBarriersOffset = kStageBarriersOffset + 8 * 2 * kStages;
  static constexpr int kSharedBytes = kRingBarriersOffset + 8 * 2 * kMultiplierWarps * kRing;
  static_assert(kSharedBytes <= 232448, "more than a block of sm_90 has");
};

// Where a block's shared memory has what.
template <typename T>
class Shared {
 public:
  __device__ explicit Shared(const unsigned char* bytes) : base(shared_address(bytes)) {
    // Or it would be worked out again wherever it is needed.
    asm volatile("" : "+r"(base));
  }

  __device__ __forceinline__ uint32_t stage(int i) const { return base + i * T::kStageBytes; }
  // Scores of a group's tokens at a place in the ring.
  __device__ __forceinline__ uint32_t part(int group, int place) const {
    return base + T::kRingOffset + (group * T::kRing + place) * T::kPartBytes;
  }
  __device__ __forceinline__ uint32_t lists() const { return base + T::kListsOffset; }

  // Barriers: what was copied to a stage is there; it has been multiplied.
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + T::kStageBarriersOffset + 8 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(T::kStages + stage); }
  // Barriers of a warp that multiplies and of the one that selects from its scores, which has the
  // same index: they have been written; they have been read.
  __device__ __forceinline__ uint32_t written(int warp, int place) const {
    return base + T::kRingBarriersOffset + 8 * (warp * T::kRing + place);
  }
  __device__ __forceinline__ uint32_t read(int warp, int place) const {
    return written(T::kMultiplierWarps + warp, place);
  }

  uint32_t base;
};

// A part is [pair of keys, token] scores: those of both keys side by side, but with four planes a
// key comes after the other. The tokens of a pair are permuted, so that neither a warp that writes
// 4 pairs of 8 tokens nor one that reads one pair of 16 or 32 tokens meets in a bank.
template <int kPlanes>
struct PartLayout {
  static constexpr int kUnitBytes = kPlanes == 1 ? 8 : 16;
  static constexpr int kPairUnits = 8 * kPlanes / kUnitBytes;
  static constexpr int kUnitStride = kGroupTokens * kUnitBytes;
  static constexpr int kPairStride = kPairUnits * kUnitStride;
  // Of a token's place, with the index of a pair modulo 4: an address that is a multiple of 1024
  // but for the token's is changed by it alone.
  static __host__ __device__ constexpr int permutation(int pair) { return pair % 4 * 32; }
  static_assert(permutation(3) < 16 * kUnitBytes, "within what a quarter of a warp reads");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Copies the tiles of queries and keys, in the order in which they are multiplied. One thread of
// the block has it.
template <typename T>
class Copier {
 public:
  __device__ Copier(const ProductKeyTopkParams& p, const CUtensorMap* query_map,
                    const CUtensorMap* key_map)
      : p_(p), query_map_(query_map), key_map_(key_map) {
    prefetch_tensor_map(query_map);
    prefetch_tensor_map(key_map);
  }

  // The next step to a stage that is free, if there is one.
  __device__ __forceinline__ void copy_next(const Shared<T>& shared, int stage) {
    if (key_ >= static_cast<int>(p_.num_keys)) return;
    const int head_side = blockIdx.y;
    const int head = head_side / 2, side = head_side % 2;
    const int query_plane =
        (side * p_.num_heads + head) * p_.num_queries + (p_.num_queries > 1 ? rank_ : 0);
    const uint32_t full = shared.full(stage);
    const uint32_t to = shared.stage(stage);
    mbarrier_expect_bytes(full, T::kStageBytes);
    copy_box(key_map_, to + T::kQueryBytes, full, x_, key_, head_side * p_.tucker_rank + rank_);
    copy_box(query_map_, to, full, x_, static_cast<int>(blockIdx.x * T::kTokens), query_plane);
    x_ += kDepth;
    if (x_ < static_cast<int>(p_.key_dim)) return;
    x_ = 0;
    if (++rank_ < p_.tucker_rank) return;
    rank_ = 0;
    key_ += T::kKeys;
  }

 private:
  const ProductKeyTopkParams& p_;
  const CUtensorMap* query_map_;
  const CUtensorMap* key_map_;
  int key_ = 0, rank_ = 0, x_ = 0;
};

// The scores of two keys, acc[.][first] and the next.
template <int kPlanes, int kCount>
__device__ __forceinline__ void store_pair(uint32_t to, const float (&acc)[kPlanes][kCount],
                                           int first) {
  if constexpr (kPlanes == 1) {
    store_shared_floats<2>(to, {acc[0][first], acc[0][first + 1]});
  } else if constexpr (kPlanes == 2) {
    store_shared_floats<4>(to,
                           {acc[0][first], acc[1][first], acc[0][first + 1], acc[1][first + 1]});
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      store_shared_floats<4>(
          to + j * PartLayout<kPlanes>::kUnitStride,
          {acc[0][first + j], acc[1][first + j], acc[2][first + j], acc[3][first + j]});
    }
  }
}

// Multiplies all tiles for one group of tokens and hands their scores over. A warp has 16 tokens of
// the group; see wgmma_k16 for what a thread holds.
template <typename scalar_t, typename T>
__device__ __forceinline__ void multiply_tiles(const ProductKeyTopkParams& p,
                                               const Shared<T>& shared,
                                               const CUtensorMap* query_map,
                                               const CUtensorMap* key_map, int group,
                                               bool has_tokens, int lane) {
  constexpr int kPlanes = T::kPlanes;
  const int num_keys = static_cast<int>(p.num_keys);
  const int num_tiles = static_cast<int>(ceil_div(num_keys, T::kKeys));
  const int num_steps = static_cast<int>(ceil_div(p.key_dim, kDepth));  // of a plane
  // Each warp for itself: that its share of a product is complete says nothing of the others'.
  const auto release = [&](int stage) {
    if (lane == 0) mbarrier_arrive(shared.empty(stage));
  };
  const int warp = threadIdx.x / kWarpSize;
  const int first_token = warp % 4 * 16 + lane / 4;
  using Layout = PartLayout<kPlanes>;
  const uint32_t own_place =
      lane % 4 * Layout::kPairStride + (first_token * Layout::kUnitBytes ^ lane % 4 * 32);
  // Of the token eight below.
  const uint32_t place_below = own_place ^ 8 * Layout::kUnitBytes;

  // The first thread copies as well, while products run.
  const bool copies = threadIdx.x == 0;
  Copier<T> copier(p, query_map, key_map);
  if (copies) {
    for (int i = 0; i < T::kStages; ++i) copier.copy_next(shared, i);
  }
  float acc[kPlanes][T::kKeys / 2];
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
    for (int i = 0; i < T::kKeys / 2; ++i) acc[r][i] = 0.0f;
  }
  RingCursor<T::kStages> stage, used;
  used.place = -1;
  // The stage that was multiplied last, when the next is being multiplied: others have released it
  // by then.
  const auto refill = [&] {
    if (copies && used.place >= 0) {
      mbarrier_wait(shared.empty(used.place), used.parity);
      copier.copy_next(shared, used.place);
      used.place = -1;
    }
    __syncwarp();
  };
  RingCursor<T::kRing> part;
  for (int tile = 0; tile < num_tiles; ++tile) {
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      if (r >= p.tucker_rank) break;
      for (int step = 0; step < num_steps; ++step) {
        mbarrier_wait(shared.full(stage.place), stage.parity);
        const uint32_t from = shared.stage(stage.place);
        const uint64_t query_tile = tile_descriptor(from + group * kGroupTokens * kRowBytes);
        const uint64_t key_tile = tile_descriptor(from + T::kQueryBytes);
        multiply_boxes<scalar_t>(acc[r], query_tile, key_tile, step > 0);
        refill();
        // Before the next begins: the copies that can follow are worth more than the overlap.
        wgmma_wait<0>();
        release(stage.place);
        used = stage;
        stage.advance();
      }
    }
    refill();
    if (!has_tokens) continue;
#pragma unroll
    for (int i = 0; i < T::kParts; ++i) {
      if (tile * T::kKeys + i * T::kPartKeys >= num_keys) break;
      mbarrier_wait(shared.read(warp, part.place), part.parity ^ 1);
      const uint32_t to = shared.part(group, part.place);
#pragma unroll
      for (int eight = 0; eight < T::kPartKeys / 8; ++eight) {
        const int first = 4 * (i * T::kPartKeys / 8 + eight);
        store_pair(to + eight * 4 * Layout::kPairStride + own_place, acc, first);
        store_pair(to + eight * 4 * Layout::kPairStride + place_below, acc, first + 2);
      }
      mbarrier_arrive(shared.written(warp, part.place));
      part.advance();
    }
  }
}

template <int kPlanes>
__device__ __forceinline__ void load_pair(uint32_t from, float (&even)[kPlanes],
                                          float (&odd)[kPlanes]) {
  if constexpr (kPlanes == 4) {
    load_shared_floats<4>(from, even);
    load_shared_floats<4>(from + PartLayout<kPlanes>::kUnitStride, odd);
  } else {
    float both[2 * kPlanes];
    load_shared_floats<2 * kPlanes>(from, both);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      even[r] = both[r];
      odd[r] = both[kPlanes + r];
    }
  }
}

// Selects from the scores of a group's tokens, and writes what was kept.
template <typename T>
__device__ __forceinline__ void select_keys(const ProductKeyTopkParams& p, const Shared<T>& shared,
                                            KeptCounts kept, int selector, int lane) {
  using Lists = typename T::Lists;
  constexpr int kPlanes = T::kPlanes;
  constexpr int kTokensOfWarp = Lists::kTokensOfWarp;
  const int head_side = blockIdx.y;
  const int head = head_side / 2, side = head_side % 2;
  const int num_keys = static_cast<int>(p.num_keys);
  const int group = selector / 4;
  const int group_token = selector % 4 * kTokensOfWarp + lane % kTokensOfWarp;
  // Below 2^31, see check_product_key_topk: the registers of 64 bits would be missed.
  const int first_token = static_cast<int>(blockIdx.x) * T::kTokens + group * kGroupTokens;
  const int token = first_token + group_token;
  const int sub = lane / kTokensOfWarp;  // which of the token's lists

  float filter[kPlanes];
  const auto* vector = static_cast<const float*>(side == 0 ? p.u : p.t);
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f
                : r < p.tucker_rank            ? vector[head * p.tucker_rank + r]
                                               : 0.0f;
  }
  KeyList<Lists> list(shared.lists(), selector * kWarpSize + lane, filter, token < p.num_tokens);
  const int num_parts =
      first_token < p.num_tokens ? static_cast<int>(ceil_div(num_keys, T::kPartKeys)) : 0;
  // A token's lists take its pairs of scores in turn.
  using Layout = PartLayout<kPlanes>;
  uint32_t place = shared.part(group, 0) + sub * Layout::kPairStride +
                   (group_token * Layout::kUnitBytes ^ sub * Layout::permutation(1));
  uint32_t first_id = 2 * sub;
  int id_offsets[T::kListKeys];
#pragma unroll
  for (int j = 0; j < T::kListKeys; ++j) {
    id_offsets[j] = j / 2 * 2 * kListsOfToken + j % 2;
  }
  RingCursor<T::kRing> part;
  int room = T::kSlots;
  for (int i = 0; i < num_parts; ++i) {
    mbarrier_wait(shared.written(selector, part.place), part.parity);
    float scores[T::kListKeys][kPlanes];
#pragma unroll
    for (int j = 0; j < T::kListKeys / 2; ++j) {
      load_pair<kPlanes>(
          (place + part.place * T::kPartBytes ^ Layout::permutation(j * kListsOfToken)) +
              j * kListsOfToken * Layout::kPairStride,
          scores[2 * j], scores[2 * j + 1]);
    }
    mbarrier_arrive(shared.read(selector, part.place));
    part.advance();
    const bool last = i == num_parts - 1;
    if (!last) {
      list.template push<true>(scores, first_id, id_offsets, num_keys);
    } else {
      list.template push<false>(scores, first_id, id_offsets, num_keys);
    }
    first_id += T::kPartKeys;
    // No list is looked at before it could be full.
    room -= T::kListKeys;
    if (room >= T::kListKeys || last) continue;
    room = list.room_of_warp();
    if (room < T::kListKeys) {
      list.prune(kept);
      room = list.room_of_warp();
    }
  }

  const int64_t warp_token = token - lane % kTokensOfWarp;
  const int num_tokens =
      static_cast<int>(max(int64_t{0}, min(int64_t{kTokensOfWarp}, p.num_tokens - warp_token)));
  const IdCut cut = list.find_cut(kept.least);
  list.write(p, (warp_token * p.num_heads + head) * 2 + side, num_tokens, cut, lane);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// From the 128 that a thread starts with.
template <int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kRegisters < 128) {
    give_up_registers<kRegisters>();
  } else {
    take_registers<kRegisters>();
  }
}

// Grid: x the tiles of tokens, y (head, side). With left_over only blocks that it marks do
// anything.
template <typename scalar_t, int kPlanes, int kGroups>
__global__ void __launch_bounds__(Traits<kPlanes, kGroups>::kThreads, 1)
    product_key_topk_fwd_axis_wgmma_kernel(ProductKeyTopkParams p, KeptCounts kept,
                                           const int32_t* left_over,
                                           const __grid_constant__ CUtensorMap query_map,
                                           const __grid_constant__ CUtensorMap key_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = Traits<kPlanes, kGroups>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];  // as swizzled tiles are
  const Shared<T> shared(shared_bytes);
  release_dependent_grid();
  if (left_over != nullptr) {
    wait_for_prerequisite_grid();
    if (left_over[blockIdx.y * gridDim.x + blockIdx.x] == 0) return;
  }
  const int warp = threadIdx.x / kWarpSize;
  int lane = threadIdx.x % kWarpSize;
  // Or it would be worked out again wherever it is needed.
  asm volatile("" : "+r"(lane));

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), T::kMultiplierWarps);
    }
    for (int warp = 0; warp < T::kMultiplierWarps; ++warp) {
      for (int place = 0; place < T::kRing; ++place) {
        mbarrier_init(shared.written(warp, place), kWarpSize);
        mbarrier_init(shared.read(warp, place), kWarpSize);
      }
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp < T::kMultiplierWarps) {
    if constexpr (kGroups == 2) set_registers<T::kMultiplierRegisters>();
    const int group = warp / 4;
    const bool has_tokens = int64_t{blockIdx.x} * T::kTokens + group * kGroupTokens < p.num_tokens;
    multiply_tiles<scalar_t, T>(p, shared, &query_map, &key_map, group, has_tokens, lane);
  } else {
    if constexpr (kGroups == 2) set_registers<T::kSelectorRegisters>();
    select_keys<T>(p, shared, kept, warp - T::kMultiplierWarps, lane);
  }
#endif
}

template <typename scalar_t, int kPlanes, int kGroups>
Status launch(const ProductKeyTopkParams& p, Stream stream, const int32_t* left_over) {
  using T = Traits<kPlanes, kGroups>;
  CUtensorMap query_map, key_map;
  ULTRAMEM_RETURN_IF_ERROR(make_axis_maps(p, T::kTokens, T::kKeys, &query_map, &key_map));
  const auto kernel = product_key_topk_fwd_axis_wgmma_kernel<scalar_t, kPlanes, kGroups>;
  constexpr int kBytes = T::kSharedBytes;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, kBytes));
  const auto m = static_cast<uint32_t>(p.axis_topk);
  const KeptCounts kept{m, m + std::max(m / 16, 6u)};

  const dim3 blocks(static_cast<unsigned>(ceil_div(p.num_tokens, T::kTokens)),
                    static_cast<unsigned>(2 * p.num_heads));
  if (left_over != nullptr) {
    return launch_overlapping(kernel, blocks, T::kThreads, kBytes, stream, p, kept, left_over,
                              query_map, key_map);
  }
  kernel<<<blocks, T::kThreads, kBytes, stream>>>(p, kept, left_over, query_map, key_map);
  return launch_status();
}

template <typename scalar_t>
Status launch_planes(const ProductKeyTopkParams& p, Stream stream, const int32_t* left_over) {
  const bool shared_by_two = p.axis_topk <= kMaxSharedTopk;
  switch (p.tucker_rank) {
    case 1:
      if (shared_by_two) return launch<scalar_t, 1, 2>(p, stream, left_over);
      return launch<scalar_t, 1, 1>(p, stream, left_over);
    case 2:
      if (!shared_by_two) return launch<scalar_t, 2, 1>(p, stream, left_over);
      return launch<scalar_t, 2, 2>(p, stream, left_over);
    default:
      return launch<scalar_t, 4, 1>(p, stream, left_over);
  }
}

#define ULTRAMEM_REGISTER_WGMMA(type, scalar_t, planes, groups)                                    \
  ULTRAMEM_REGISTER_KERNEL(type##_##planes##_##groups,                                             \
                           "product_key_topk_fwd_axis_wgmma<" #type ", " #planes ", " #groups ">", \
                           (Traits<planes, groups>::kThreads),                                     \
                           product_key_topk_fwd_axis_wgmma_kernel<scalar_t, planes, groups>)
ULTRAMEM_REGISTER_WGMMA(bf16, __nv_bfloat16, 1, 2);
ULTRAMEM_REGISTER_WGMMA(bf16, __nv_bfloat16, 1, 1);
ULTRAMEM_REGISTER_WGMMA(bf16, __nv_bfloat16, 2, 2);
ULTRAMEM_REGISTER_WGMMA(bf16, __nv_bfloat16, 2, 1);
ULTRAMEM_REGISTER_WGMMA(bf16, __nv_bfloat16, 4, 1);
ULTRAMEM_REGISTER_WGMMA(fp16, __half, 1, 2);
ULTRAMEM_REGISTER_WGMMA(fp16, __half, 1, 1);
ULTRAMEM_REGISTER_WGMMA(fp16, __half, 2, 2);
ULTRAMEM_REGISTER_WGMMA(fp16, __half, 2, 1);
ULTRAMEM_REGISTER_WGMMA(fp16, __half, 4, 1);

}  // namespace

bool axis_wgmma_applies(const ProductKeyTopkParams& p) {
  constexpr int kMaxBlocksAlongY = 0xffff;
  if (!is_aligned(p.query) || !is_aligned(p.keys) || p.num_heads > kMaxBlocksAlongY / 2)
    return false;
  constexpr int kSm90 = 90;
  return sm90a_available() && product_key_topk_fwd_path(p, kSm90) == RetrievalPath::kTensorCore90;
}

Status launch_axis_marked_lists(const ProductKeyTopkParams& params, Stream stream,
                                const int32_t* left_over) {
  if (params.dtype == DType::kFloat16) return launch_planes<__half>(params, stream, left_over);
  return launch_planes<__nv_bfloat16>(params, stream, left_over);
}

}  // namespace ultramem::cuda
