// What the warps of product_key_topk_fwd_split.cu share: where things are in shared memory, what
// passes, and how warps that multiply pass scores on.
#pragma once

#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "product_key_candidate_lists.cuh"
#include "product_key_sample.h"
#include "shared_memory.cuh"

namespace ultramem::cuda::split {

using namespace candidate_lists;

inline constexpr int kPlanes = 2;                 // ranks
inline constexpr int kBlocks = kPlanes;           // of a cluster
inline constexpr int kKeys = 128;                 // of a tile
inline constexpr int kOwnKeys = kKeys / kBlocks;  // of these, those that a block looks at
static_assert(kBlocks == Sample::kBlocks && kOwnKeys == Sample::kPieceKeys);
inline constexpr int kParts = 2;  // in which these are handed over
inline constexpr int kPartKeys = kOwnKeys / kParts;
inline constexpr int kPartScores = num_scores(kPartKeys);  // of a thread
inline constexpr int kTileScores = num_scores(kKeys);
inline constexpr int kColumnSets = 2;                    // at which tiles of a sample take turns
inline constexpr int kColumns = kColumnSets * kOwnKeys;  // of maxima
inline constexpr int kGroups = 2;                        // warpgroups that multiply
inline constexpr int kGroupTokens = 64;
inline constexpr int kTokens = kGroups * kGroupTokens;
inline constexpr int kMultipliers = 128 * kGroups;       // threads
inline constexpr int kWarps = kMultipliers / kWarpSize;  // that multiply; as many select
inline constexpr int kBoxColumns = 64;                   // elements of Kd: one 128-byte row
inline constexpr int kRowBytes = 2 * kBoxColumns;
inline constexpr int kQueryBoxBytes = kTokens * kRowBytes;
inline constexpr int kHalfStageBytes = kOwnKeys * kRowBytes;
inline constexpr int kStageBytes = kBlocks * kHalfStageBytes;
inline constexpr int kStages = 4;
// A warp's scores of a part and rank: 16 bytes of each lane side by side.
inline constexpr int kPacketStride = 16 * kWarpSize;
inline constexpr int kPartBytes = kPartScores / 4 * kPacketStride;
// What a warp that selects keeps in shared memory.
inline constexpr int kWarpWords = 4;
// Words of bits for works that have to be done again.
inline constexpr int kMarkWords = 16;

// Rows of Kd have so many boxes of 64 columns, the last of them empty where Kd is shorter.
inline constexpr int kFewBoxes = 4, kManyBoxes = 8;
// For parts: one, or one for each part of a tile where long queries leave room.
__host__ __device__ constexpr int num_slots(int boxes) { return boxes == kFewBoxes ? kParts : 1; }

// Shared memory: barriers, stages of keys, queries, parts and what is known of the tokens.
template <int kBoxes>
struct Shared {
  static constexpr int kSlots = num_slots(kBoxes);
  static constexpr int kRing = 1024;  // swizzled tiles are aligned so
  static constexpr int kQueries = kRing + kStages * kStageBytes;
  static constexpr int kPartsBegin = kQueries + kBoxes * kQueryBoxBytes;
  static constexpr int kSlotStride = kWarps * kPlanes * kPartBytes;
  static constexpr int kBounds = kPartsBegin + kSlots * kSlotStride;
  static constexpr int kLeast = kBounds + kTokens * static_cast<int>(sizeof(float));
  static constexpr int kCounts = kLeast + kTokens * static_cast<int>(sizeof(float));
  static constexpr int kOwnCounts = kCounts + kTokens * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kOwnCounts + kTokens * static_cast<int>(sizeof(float));
  static_assert(kBytes <= 232448, "more than a block of sm_90 has");
  static constexpr int kBarrierStride = kWarps * 8;  // from slot to slot

  uint32_t base;  // address

  // Barriers: a stage is filled; it was multiplied; some columns of the queries are there; a part
  // is there for a warp that selects; the last part of one that multiplies was read, in both
  // blocks; what the other block says of a warp's tokens is there, and how many keys it found.
  __device__ __forceinline__ uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t queries_there(int box) const {
    return full(2 * kStages + box);
  }
  __device__ __forceinline__ uint32_t part_there(int slot, int warp) const {
    return full(2 * kStages + kBoxes + slot * kWarps + warp);
  }
  __device__ __forceinline__ uint32_t part_read(int slot, int warp) const {
    return part_there(kSlots + slot, warp);
  }
  __device__ __forceinline__ uint32_t bounds_there(int warp) const {
    return part_there(2 * kSlots, warp);
  }
  __device__ __forceinline__ uint32_t counts_there(int warp) const {
    return part_there(2 * kSlots + 1, warp);
  }
  // Behind the barriers: words of each warp that selects, and marks.
  static constexpr int kMarks = kRing - 4 * kMarkWords, kWords = kMarks - 4 * kWarpWords * kWarps;
  static_assert((2 * kStages + kBoxes + (2 * kSlots + 2) * kWarps) * 8 <= kWords);
  __device__ __forceinline__ uint32_t words(int warp) const {
    return base + kWords + 4 * kWarpWords * warp;
  }

  __device__ __forceinline__ uint32_t stage(int i) const { return base + kRing + i * kStageBytes; }
  __device__ __forceinline__ uint32_t queries(int box) const {
    return base + kQueries + box * kQueryBoxBytes;
  }
  // The other block's bounds, least ranks and counts of a warp's tokens.
  __device__ __forceinline__ uint32_t bounds(int warp) const {
    return base + kBounds + warp * kWarpTokens * 4;
  }
  __device__ __forceinline__ uint32_t least(int warp) const {
    return bounds(warp) + (kLeast - kBounds);
  }
  __device__ __forceinline__ uint32_t counts(int warp) const {
    return bounds(warp) + (kCounts - kBounds);
  }
  static constexpr int kCountsToOwn = kOwnCounts - kCounts;  // to the block's own
  // Scores of the block's own rank, then of the other.
  __device__ __forceinline__ uint32_t part(int slot, int warp, int of_other) const {
    return base + kPartsBegin + slot * kSlotStride + (warp * kPlanes + of_other) * kPartBytes;
  }
  // Of the cluster's works, the same in both blocks. Numbers that are far apart share a bit: a work
  // may be done again that need not be.
  __device__ __forceinline__ uint32_t marks(int word) const { return base + kMarks + 4 * word; }
  __device__ __forceinline__ bool is_marked(int work) const {
    return (load_shared_u32(marks(work / 32 % kMarkWords)) >> work % 32 & 1) != 0;
  }
  __device__ __forceinline__ void mark(int work) const {
    asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(marks(work / 32 % kMarkWords)),
                 "r"(1u << work % 32)
                 : "memory");
  }
};

// What passes of the keys: tiles of a sample (product_key_sample.h), a piece for each block, from
// which comes a bound, and then all tiles.
struct Rounds {
  int first, second;  // tiles
  int least;          // of both blocks' maxima in the first round: so many are above their bounds
  // Whether the lesser of both blocks' bounds is taken, below which none of the best m can be: m
  // maxima are above. Otherwise their mean: m keys are above in all likelihood, and counts show
  // whether.
  bool exact;
  Sample sample;  // of the first round

  __host__ __device__ int tiles() const { return first + second; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By an exchange, so that the compiler knows it to be the warp's; asked for where it is needed, for
// kept from the beginning it would be a register too many.
__device__ __forceinline__ int warp_number() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}

// Where the parts of a tile, which alternate, go, and the parity of the phase in which they do.
template <int kSlots, int kPart>
struct Turn {
  static_assert(kSlots == 1 || kSlots == kParts, "");
  static constexpr int kSlot = kSlots == 1 ? 0 : kPart;
  __device__ __forceinline__ static uint32_t parity(int tile) {
    return kSlots == 1 ? kPart : tile & 1;
  }
};

// How a warp that multiplies passes scores on.
template <int kBoxes>
class Sender {
 public:
  __device__ Sender(const Shared<kBoxes>& shared, int warp, int lane)
      : there_(shared.part_there(0, warp)),
        read_(shared.part_read(0, warp)),
        own_(shared.part(0, warp, 0) + lane * 16) {
    const uint32_t other_block = cluster_rank() ^ 1;
    others_ = address_in_block(shared.part(0, warp, 1) + lane * 16, other_block);
    others_there_ = address_in_block(there_, other_block);
  }

  // Of a tile, scores of keys that the block looks at, and of as many that the other does.
  template <int kPart>
  __device__ __forceinline__ void send(int tile, const float* own, const float* others) const {
    using PartTurn = Turn<num_slots(kBoxes), kPart>;
    constexpr int kSlot = PartTurn::kSlot;
    mbarrier_wait(read_ + kSlot * Shared<kBoxes>::kBarrierStride, PartTurn::parity(tile) ^ 1);
#pragma unroll
    for (int i = 0; i < kPartScores; i += 4) {
      store_async(others_ + kSlot * Shared<kBoxes>::kSlotStride + i / 4 * kPacketStride,
                  make_float4(others[i], others[i + 1], others[i + 2], others[i + 3]),
                  others_there_ + kSlot * Shared<kBoxes>::kBarrierStride);
    }
#pragma unroll
    for (int i = 0; i < kPartScores; i += 4) {
      const float four[4] = {own[i], own[i + 1], own[i + 2], own[i + 3]};
      store_shared_floats(own_ + kSlot * Shared<kBoxes>::kSlotStride + i / 4 * kPacketStride, four);
    }
    mbarrier_arrive(there_ + kSlot * Shared<kBoxes>::kBarrierStride);
  }

 private:
  uint32_t there_, read_, own_, others_, others_there_;  // in the first slot
};

// What a cluster takes up one after the other: the tokens of a tile, of a head and side. The chunk
// has so many tiles.
struct Work {
  int number;  // of those that this cluster has had before

  __device__ __forceinline__ int head_side(int tiles) const { return index() / tiles; }
  __device__ __forceinline__ int first_chunk_token(int tiles) const {
    return index() % tiles * kTokens;
  }

  // Of all work.
  __device__ __forceinline__ int index() const {
    return static_cast<int>((blockIdx.x + number * gridDim.x) / kBlocks);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace ultramem::cuda::split
