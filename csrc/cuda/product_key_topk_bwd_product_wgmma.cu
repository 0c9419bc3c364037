// The products of the dense path of the backward on sm_90: see product_key_topk_bwd_product.cuh.
//
// Two warpgroups multiply a bucket of dS each, or its transposed, by up to 256 columns. Each warp
// of a third one fills the ring for every fourth step alone: it unfolds the entries of dS, and one
// of its lanes has the dense rows copied as boxes of 64 columns (TMA), which wgmma transposes. The
// blocks of a cluster take neighbouring rows of the output and need the same dense rows in the same
// step: each copies its share of them to all. (Not the last ones of two planes: see
// ProductSchedule.)
#include "cluster.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "mma.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "product_key_topk_bwd_core.cuh"
#include "product_key_topk_bwd_product.cuh"
#include "product_key_topk_bwd_sum.cuh"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;
constexpr int kGroups = kTileRows / kGroupRows;  // that multiply
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
// A block of this size is launched with 168 registers a thread. A multiplier holds up to 128 sums.
constexpr int kLaunchRegisters = 168;
constexpr int kMultiplierRegisters = 184;
constexpr int kFillerRegisters = 136;
static_assert(kGroups * kMultiplierRegisters + kFillerRegisters ==
              (kGroups + 1) * kLaunchRegisters);
constexpr int kBoxCols = 64;
constexpr int kRowBytes = 128;  // of a box
constexpr int kBoxBytes = kTileDepth * kRowBytes;
constexpr int kBucketBytes = kBucketSize * kBucketRowBytes;
constexpr int kAlignment = 1024;  // of swizzled tiles
static_assert(2 * kBoxCols == kRowBytes && kGroupRows == kBucketSize);

template <int kCols>
struct WgmmaTraits {
  static constexpr int kBoxes = kCols / kBoxCols;
  static constexpr int kSparseBytes = kBucketsPerStep * kBucketBytes;
  static constexpr int kStageBytes = kSparseBytes + kBoxes * kBoxBytes;
  static constexpr int kStages = kCols == 256 ? 4 : 5;
  static constexpr int kBarriersOffset = kStages * kStageBytes;
  static constexpr int kSharedBytes = kBarriersOffset + 2 * 8 * kStages;
  static_assert(kCols % kBoxCols == 0 && kStageBytes % kAlignment == 0);
  static_assert(kSharedBytes + kAlignment <= 232448, "more than a block of sm_90 has");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kMultiplierWarps = kGroups * kGroupThreads / kWarpSize;
constexpr int kFillers = kGroupThreads / kWarpSize;
constexpr int kPieceBytes = 16;  // that are swizzled
// Of a thread that multiplies.
template <int kCols>
constexpr int kSums = kCols / 2;

// The ring, by how many steps a block has begun.
template <int kCols>
struct Ring {
  using Traits = WgmmaTraits<kCols>;
  uint32_t base;

  __device__ static uint32_t parity(int step) { return step / Traits::kStages & 1; }
  __device__ uint32_t sparse(int step) const {
    return base + step % Traits::kStages * Traits::kStageBytes;
  }
  __device__ uint32_t dense(int step) const { return sparse(step) + Traits::kSparseBytes; }
  __device__ uint32_t full(int step) const {
    return base + Traits::kBarriersOffset + 8 * (step % Traits::kStages);
  }
  __device__ uint32_t empty(int step) const { return full(step) + 8 * Traits::kStages; }
};

// What a block does of the schedule, along with its cluster.
struct WorkerSteps {
  int worker;
  int64_t first;
  int count;

  __device__ explicit WorkerSteps(const ProductSchedule& schedule)
      : worker(static_cast<int>(blockIdx.x) / schedule.cluster),
        first(schedule.first_step(worker)),
        count(static_cast<int>(schedule.first_step(worker + 1) - first)) {}
};

// A stage is full once its warp has said how many bytes it has copied, or copied them itself, and
// once each of the warp's lanes has unfolded its entries. (One lane could arrive for all; racecheck
// only credits a thread with what it arrives for itself.)
constexpr int kFullArrivals = 1 + kWarpSize;

// ---- the warps that fill the ring

// Entries of a bucket that a lane reads ahead; longer buckets are read in place.
constexpr int kLaneEntries = 16;
constexpr int kEntryUnroll = 4;
constexpr int kLaneRows = kTileDepth / kWarpSize;  // dense

// What a warp needs to know of a step.
struct FillStep {
  int64_t first_entry[kBucketsPerStep];
  int64_t first_finite;      // of the dense rows' flags
  uint32_t num_entries = 0;  // of both buckets, 16 bits each
  int first_dense_row;
  int dense_plane;
  int first_col;
  int shares;  // whether others need its dense rows, too
  static_assert(kBucketSize * kMaxAxisTopk < 1 << 16);

  FillStep() = default;
  __device__ __forceinline__ FillStep(const Product& p, const Step& step, int tile_cols) {
    for (int half = 0; half < kBucketsPerStep; ++half) {
      first_entry[half] = step.entries[half] - p.entries;
      num_entries |= static_cast<uint32_t>(step.num_entries[half]) << 16 * half;
    }
    first_finite = step.finite - p.dense_finite;
    first_dense_row = step.first_dense_row;
    dense_plane = step.coords.head * p.dense_planes.head + step.coords.side * p.dense_planes.side +
                  step.dense_rank * p.dense_planes.rank;
    first_col = step.coords.col_tile * tile_cols;
    shares = step.coords.shares;
  }

  // The one that this lane has.
  __device__ __forceinline__ FillStep of(int lane) const {
    const auto get = [lane](auto x) { return __shfl_sync(kFullMask, x, lane); };
    FillStep step;
    for (int half = 0; half < kBucketsPerStep; ++half) {
      step.first_entry[half] = get(first_entry[half]);
    }
    step.first_finite = get(first_finite);
    step.num_entries = get(num_entries);
    step.first_dense_row = get(first_dense_row);
    step.dense_plane = get(dense_plane);
    step.first_col = get(first_col);
    step.shares = get(shares);
    return step;
  }
  __device__ __forceinline__ int count(int half) const {
    return static_cast<int>(num_entries >> 16 * half & 0xffff);
  }
};

// Past the L1 cache; `to` stays what it was where it is not wanted.
__device__ __forceinline__ void load_if(bool wanted, const uint32_t* from, uint32_t& to) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.cg.u32 %0, [%1]; }"
               : "+r"(to)
               : "l"(from), "r"(static_cast<int>(wanted))
               : "memory");
}
__device__ __forceinline__ void load_if(bool wanted, const uint8_t* from, uint32_t& to) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.cg.u8 %0, [%1]; }"
               : "+r"(to)
               : "l"(from), "r"(static_cast<int>(wanted))
               : "memory");
}

__device__ __forceinline__ void unfold_entry(uint32_t entry, uint32_t bucket) {
  store_shared(bucket + (entry & 0xffff), static_cast<uint16_t>(entry >> 16));
}

// Rows of a block's dense rows, from `row` on, to the blocks of the cluster in `mask`.
template <int kCols>
__device__ __forceinline__ void copy_boxes(const CUtensorMap& dense_map, uint16_t mask, int row,
                                           int num_boxes, const FillStep& step, uint32_t to,
                                           uint32_t full) {
#pragma unroll
  for (int i = 0; i < WgmmaTraits<kCols>::kBoxes; ++i) {
    if (i == num_boxes) break;
    copy_box_multicast(&dense_map, to + i * kBoxBytes + row * kRowBytes, full, mask,
                       step.first_col + i * kBoxCols, step.first_dense_row + row, step.dense_plane);
  }
}

// A block's dense rows, by this warp: zeros where they are not finite or do not exist.
template <typename scalar_t, int kCols>
__device__ __forceinline__ void copy_finite_rows(const Product& p, const FillStep& step,
                                                 uint64_t finite, uint32_t to, int lane) {
  constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(scalar_t));
  constexpr int kPieces = kCols / kPieceElements;  // of a row
  const auto* rows = static_cast<const scalar_t*>(p.dense.data) +
                     step.dense_plane * p.dense_planes.element_stride +
                     step.first_dense_row * p.dense.row_stride + step.first_col;
  const int num_cols = p.key_dim - step.first_col;
#pragma unroll 4
  for (int i = lane; i < kTileDepth * kPieces; i += kWarpSize) {
    const int row = i / kPieces;
    const int col = (i - row * kPieces) * kPieceElements;
    uint4 piece = make_uint4(0, 0, 0, 0);
    if ((finite >> row & 1) != 0 && col < num_cols) {
      piece = *reinterpret_cast<const uint4*>(rows + row * p.dense.row_stride + col);
    }
    const auto byte = static_cast<uint32_t>(2 * (col % kBoxCols));
    store_shared(to + col / kBoxCols * kBoxBytes + row * kRowBytes + (byte ^ row % 8 * kPieceBytes),
                 piece);
  }
}

template <typename scalar_t, int kCols>
__device__ __forceinline__ void fill_ring(const Product& p, bool waits,
                                          const CUtensorMap& dense_map, Ring<kCols> ring) {
  using Traits = WgmmaTraits<kCols>;
  const int warp = (static_cast<int>(threadIdx.x) - kGroups * kGroupThreads) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int cluster = p.schedule.cluster;
  const int block_rank = static_cast<int>(cluster_rank());
  const WorkerSteps steps(p.schedule);
  const int share_rows = kTileDepth / cluster;  // that a block copies for all
  const auto num_dense_rows = static_cast<int>(p.dense.num_rows);

  FillStep next_steps;  // of 32 fills, one in each lane
  FillStep step;
  uint32_t ahead[kBucketsPerStep][kLaneEntries];
  uint32_t finite[kLaneRows];  // flags of dense rows, and 1 where there is none
  const auto exists = [&](int k) {
    return step.first_dense_row + lane + k * kWarpSize < num_dense_rows;
  };
  // Everything that a step waits for is asked for ahead of its turn.
  const auto read_ahead = [&](int i) {
    const int turn = i / kFillers;
    if (turn % kWarpSize == 0) {
      const int own = min(i + lane * kFillers, steps.count - 1);
      const StepCursor cursor(p, steps.first + own, block_rank);
      if (turn == 0 && waits) wait_for_prerequisite_grid();
      next_steps = FillStep(p, cursor.read(), kCols);
    }
    step = next_steps.of(turn % kWarpSize);
    // All addresses are worked out first: a load holds up what changes its own.
    const uint32_t* entries[kBucketsPerStep];
#pragma unroll
    for (int half = 0; half < kBucketsPerStep; ++half) {
      entries[half] = p.entries + step.first_entry[half] + lane;
      asm volatile("" : "+l"(entries[half]));
    }
    const uint8_t* flags = p.dense_finite + step.first_finite + lane;
    asm volatile("" : "+l"(flags));
#pragma unroll
    for (int k = 0; k < kLaneRows; ++k) {
      finite[k] = 1;
      load_if(exists(k), flags + k * kWarpSize, finite[k]);
    }
#pragma unroll
    for (int half = 0; half < kBucketsPerStep; ++half) {
#pragma unroll
      for (int j = 0; j < kLaneEntries; ++j) {
        if (j % kEntryUnroll == 0 && j * kWarpSize >= step.count(half)) break;
        load_if(lane + j * kWarpSize < step.count(half), entries[half] + j * kWarpSize,
                ahead[half][j]);
      }
    }
  };

  const auto fill = [&](int i) {
    const uint32_t sparse = ring.sparse(i);
    const uint32_t dense = ring.dense(i);
    const uint32_t full = ring.full(i);
    // Blocks that share their dense rows see the same flags and agree on who copies them.
    const bool all_finite = __all_sync(kFullMask, finite[0] != 0 && finite[1] != 0) != 0;
    mbarrier_wait(ring.empty(i), Ring<kCols>::parity(i) ^ 1);
    if (all_finite) {
      if (lane == 0) {
        // Columns that are in no box are multiplied, too, but into columns that are not stored.
        const int num_boxes =
            min(Traits::kBoxes, (p.key_dim - step.first_col + kBoxCols - 1) / kBoxCols);
        mbarrier_expect_bytes(full, num_boxes * kBoxBytes);
        const int to_all = (1 << cluster) - 1;
        const auto mask = static_cast<uint16_t>(step.shares != 0 ? to_all : 1 << block_rank);
        const int first_row = step.shares != 0 ? block_rank * share_rows : 0;
        const int num_rows = step.shares != 0 ? share_rows : kTileDepth;
#pragma unroll 1
        for (int row = first_row; row < first_row + num_rows; row += share_rows) {
          copy_boxes<kCols>(dense_map, mask, row, num_boxes, step, dense, full);
        }
      }
    } else {
      const uint64_t low_rows = __ballot_sync(kFullMask, exists(0) && finite[0] != 0);
      const uint64_t high_rows = __ballot_sync(kFullMask, exists(1) && finite[1] != 0);
      copy_finite_rows<scalar_t, kCols>(p, step, high_rows << 32 | low_rows, dense, lane);
      if (lane == 0) mbarrier_arrive(full);  // for the copies; its own are still to be released
    }

#pragma unroll
    for (int piece = 0; piece < Traits::kSparseBytes; piece += kWarpSize * kPieceBytes) {
      store_shared(sparse + piece + lane * kPieceBytes, make_uint4(0, 0, 0, 0));
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < kBucketsPerStep; ++half) {
      const uint32_t bucket = sparse + half * kBucketBytes;
#pragma unroll
      for (int j = 0; j < kLaneEntries; ++j) {
        if (j % kEntryUnroll == 0 && j * kWarpSize >= step.count(half)) break;
        if (lane + j * kWarpSize < step.count(half)) unfold_entry(ahead[half][j], bucket);
      }
#pragma unroll kEntryUnroll
      for (int entry = lane + kLaneEntries * kWarpSize; entry < step.count(half);
           entry += kWarpSize) {
        unfold_entry(__ldcg(p.entries + step.first_entry[half] + entry), bucket);
      }
    }
    fence_shared_writes();
    mbarrier_arrive(full);
  };

  // Once round before the first, so that there is one place that reads.
#pragma unroll 1
  for (int i = warp - kFillers; i < steps.count; i += kFillers) {
    if (i >= 0) fill(i);
    if (i + kFillers < steps.count) read_ahead(i + kFillers);
  }
}

// No block may leave while another still arrives at its barriers, or waits for what it copies:
// until all that was filled is free. All warps wait for all stages, since only who has filled one
// knows that its last phase has begun.
template <int kCols>
__device__ __forceinline__ void drain_ring(const Product& p, Ring<kCols> ring) {
  const int count = WorkerSteps(p.schedule).count;
#pragma unroll 1
  for (int i = max(count - WgmmaTraits<kCols>::kStages, 0); i < count; ++i) {
    mbarrier_wait(ring.empty(i), Ring<kCols>::parity(i));
  }
}

// ---- the warpgroups that multiply

// Begins sums += a group's bucket, or its transposed, times the dense rows of a stage.
template <typename scalar_t, int kCols, bool kRowsAreTokens>
__device__ __forceinline__ void multiply_stage(Ring<kCols> ring, int step, int group,
                                               float (&sums)[kSums<kCols>]) {
  mbarrier_wait(ring.full(step), Ring<kCols>::parity(step));
  const uint32_t bucket = ring.sparse(step) + group * kBucketBytes;
  const uint64_t sparse =
      kRowsAreTokens ? tile_descriptor(bucket) : transposed_tile_descriptor(bucket, kBucketBytes);
  const uint64_t dense = transposed_tile_descriptor(ring.dense(step), kBoxBytes);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileDepth / 16; ++k) {
    // 16 keys are 32 bytes of each of the bucket's rows, 16 tokens as many rows of it. In units of
    // 16 bytes.
    wgmma_k16_transposed<scalar_t, !kRowsAreTokens>(
        sums, sparse + (kRowsAreTokens ? 2 : kBucketRowBytes) * k, dense + kRowBytes * k);
  }
  wgmma_commit();
}

// A thread holds, of each eight columns, two neighbouring ones of row lane / 4 of its warp and of
// the row eight below. Even and odd lanes swap halves of two such eights, so that each stores four
// columns of one of them: from first_col() on, `store(column, first pair, second pair)` of the one
// row or the other, where `narrow` has made something else of a pair before.
__device__ __forceinline__ int first_col(int lane) { return lane % 2 * 8 + lane % 4 / 2 * 4; }

template <int kCount, typename Narrow, typename Store>
__device__ __forceinline__ void store_row(const float (&sums)[kCount], int lane, bool lower,
                                          const Narrow& narrow, const Store& store) {
  const bool odd = lane % 2 != 0;
  const int low = lower ? 2 : 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
    const auto left = narrow(sums[i + low], sums[i + low + 1]);
    const auto right = narrow(sums[i + 4 + low], sums[i + 4 + low + 1]);
    const auto received = __shfl_xor_sync(kFullMask, odd ? left : right, 1);
    store(2 * i, odd ? received : left, odd ? right : received);
  }
}

// Rounded, of a whole tile.
template <typename scalar_t, int kCols>
__device__ __forceinline__ void store_tile_rows(const Product& p, const TileCoords& coords,
                                                int first_row, int lane,
                                                const float (&sums)[kSums<kCols>]) {
  const float unscale = power_of_two(-scale_exponent(p.max_grad));
  const int64_t row = int64_t{coords.row_tile} * kTileRows + first_row + lane / 4;
  const int col = coords.col_tile * kCols + first_col(lane);
  int64_t offset = coords.offset(p.out, coords.rank) + row * p.out.row_stride + col;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int num_cols = row + 8 * lower < p.out.num_rows ? p.key_dim - col : 0;
    // Or it would be worked out again for every store.
    asm volatile("" : "+l"(offset));
    auto* out = static_cast<scalar_t*>(p.out.data) + offset;
    store_row(
        sums, lane, lower != 0,
        [&](float x, float y) { return pack_rounded<scalar_t>(x * unscale, y * unscale); },
        [&](int i, uint32_t first, uint32_t second) {
          if (i < num_cols) *reinterpret_cast<uint2*>(out + i) = make_uint2(first, second);
        });
    offset += 8 * p.out.row_stride;
  }
}

// Scaled and unrounded, of a part of a tile.
template <int kCols>
__device__ __forceinline__ void store_partial_rows(float* partial, int first_row, int lane,
                                                   const float (&sums)[kSums<kCols>]) {
  partial += (first_row + lane / 4) * kCols + first_col(lane);
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    store_row(
        sums, lane, lower != 0,
        [](float x, float y) {
          return uint64_t{__float_as_uint(y)} << 32 | uint64_t{__float_as_uint(x)};
        },
        [&](int i, uint64_t first, uint64_t second) {
          *reinterpret_cast<ulonglong2*>(partial + 8 * lower * kCols + i) =
              make_ulonglong2(first, second);
        });
  }
}

template <typename scalar_t, int kCols, bool kRowsAreTokens>
__device__ __forceinline__ void multiply(const Product& p, Ring<kCols> ring) {
  using Traits = WgmmaTraits<kCols>;
  const int lane = threadIdx.x % kWarpSize;
  const int group = threadIdx.x / kGroupThreads;
  const int group_warp = threadIdx.x % kGroupThreads / kWarpSize;
  const int first_row = group * kGroupRows + group_warp * (kGroupRows / 4);
  const int cluster = p.schedule.cluster;
  // Each warp for itself: that its share of a product is complete says nothing of the others'.
  const auto release = [&](int step) {
    if (lane < cluster) mbarrier_arrive_in_block(address_in_block(ring.empty(step), lane));
  };

  const int block_rank = static_cast<int>(cluster_rank());
  const WorkerSteps steps(p.schedule);
  const int64_t tile_steps = p.schedule.tile_steps;
  const int first_tile = p.schedule.tile_of(steps.first);
  int tile = first_tile;
  for (int begun = 0; begun < steps.count; ++tile) {
    const int tile_end =
        static_cast<int>(min((tile + 1) * tile_steps - steps.first, int64_t{steps.count}));
    const bool whole = tile_end - begun == tile_steps;
    float sums[kSums<kCols>];
#pragma unroll
    for (int i = 0; i < kSums<kCols>; ++i) sums[i] = 0.0f;
    multiply_stage<scalar_t, kCols, kRowsAreTokens>(ring, begun, group, sums);
    ++begun;
#pragma unroll 1
    for (; begun < tile_end; ++begun) {
      multiply_stage<scalar_t, kCols, kRowsAreTokens>(ring, begun, group, sums);
      wgmma_wait<1>();
      release(begun - 1);
    }
    wgmma_wait<0>();
    wgmma_results(sums);
    release(tile_end - 1);

    if (whole) {
      store_tile_rows<scalar_t, kCols>(p, TileCoords(p, tile, block_rank), first_row, lane, sums);
    } else {
      const int64_t slot = p.schedule.slot(steps.worker, first_tile, tile) * cluster + block_rank;
      store_partial_rows<kCols>(p.partials.part(slot, kTileRows * kCols), first_row, lane, sums);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// One block an SM, in clusters of p.schedule.cluster. Clusters take the schedule's steps in order,
// tile after tile, and the ring is filled ahead across tiles while results are stored. If `summed`
// is split, its product is the kernel ahead, and the parts it leaves are summed while the ring is
// filled for the first time.
//
// A product lets what follows begin once it has seen the end of the kernel ahead of it, and not
// before. So one with parts to sum, which begins while these are made, finds complete what both
// products read; it reads past the L1 cache. It waits for the kernel ahead before it sums.
template <typename scalar_t, int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_bwd_product_wgmma_kernel(const __grid_constant__ Product p,
                                              const __grid_constant__ Product summed,
                                              const __grid_constant__ CoreSums core_sums,
                                              const __grid_constant__ CUtensorMap dense_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = WgmmaTraits<kCols>;
  extern __shared__ unsigned char shared_bytes[];
  const bool sums = summed.schedule.split;
  const int cluster = p.schedule.cluster;
  Ring<kCols> ring;
  ring.base = (shared_address(shared_bytes) + kAlignment - 1) / kAlignment * kAlignment;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(ring.full(stage), kFullArrivals);
      mbarrier_init(ring.empty(stage), kMultiplierWarps * cluster);
    }
    mbarrier_init_fence();
    prefetch_tensor_map(&dense_map);
  }
  cluster_arrive_relaxed();
  cluster_wait();

  if (threadIdx.x >= kGroups * kGroupThreads) {
    give_up_registers<kFillerRegisters>();
    fill_ring<scalar_t, kCols>(p, !sums, dense_map, ring);
    drain_ring<kCols>(p, ring);
    return;
  }
  take_registers<kMultiplierRegisters>();
  // While the ring is filled there is time for sums.
  if (sums) {
    sum_share<scalar_t, kGroups * kGroupThreads, kCols>(summed, static_cast<int>(threadIdx.x));
    release_dependent_grid();
  } else {
    wait_for_prerequisite_grid();
    release_dependent_grid();
    if (core_sums.partials != nullptr) {
      sum_core(core_sums, static_cast<int>(blockIdx.x * kMultiplierWarps + threadIdx.x / kWarpSize),
               static_cast<int>(gridDim.x * kMultiplierWarps));
    }
  }
  if (p.rows_are_tokens) {
    multiply<scalar_t, kCols, true>(p, ring);
  } else {
    multiply<scalar_t, kCols, false>(p, ring);
  }
#endif
}

template <typename scalar_t, int kCols>
Status launch_width(const Product& product, const Product& summed, const CoreSums& core_sums,
                    DType dtype, Stream stream) {
  using Traits = WgmmaTraits<kCols>;
  const ProductSchedule& schedule = product.schedule;
  const RowSet& dense = product.dense;
  const DensePlanes& planes = product.dense_planes;
  CUtensorMap dense_map;
  ULTRAMEM_RETURN_IF_ERROR(make_tensor_map(&dense_map, dense.data, dtype, product.key_dim,
                                           dense.num_rows, planes.count, dense.row_stride,
                                           planes.element_stride, kTileDepth / schedule.cluster));
  return launch_overlapping_clusters(
      product_key_topk_bwd_product_wgmma_kernel<scalar_t, kCols>,
      dim3(static_cast<unsigned>(schedule.num_blocks * schedule.cluster)), schedule.cluster,
      kThreads, Traits::kSharedBytes + kAlignment, stream, product, summed, core_sums, dense_map);
}

template <typename scalar_t>
Status launch_type(const Product& product, const Product& summed, const CoreSums& core_sums,
                   DType dtype, int tile_cols, Stream stream) {
  if (tile_cols == 256) {
    return launch_width<scalar_t, 256>(product, summed, core_sums, dtype, stream);
  }
  return launch_width<scalar_t, 192>(product, summed, core_sums, dtype, stream);
}

#define ULTRAMEM_REGISTER_PRODUCT_WGMMA(id, type_name, scalar_t, cols)                    \
  ULTRAMEM_REGISTER_KERNEL(product_wgmma_##cols##_##id,                                   \
                           "product_key_topk_bwd_product_wgmma<" type_name "," #cols ">", \
                           kThreads, product_key_topk_bwd_product_wgmma_kernel<scalar_t, cols>)
ULTRAMEM_REGISTER_PRODUCT_WGMMA(bf16, "bf16", __nv_bfloat16, 256);
ULTRAMEM_REGISTER_PRODUCT_WGMMA(bf16, "bf16", __nv_bfloat16, 192);
ULTRAMEM_REGISTER_PRODUCT_WGMMA(f16, "fp16", __half, 256);
ULTRAMEM_REGISTER_PRODUCT_WGMMA(f16, "fp16", __half, 192);

}  // namespace

Status launch_product_wgmma(const Product& product, const Product& summed,
                            const CoreSums& core_sums, DType dtype, int tile_cols, Stream stream) {
  if (dtype == DType::kFloat16) {
    return launch_type<__half>(product, summed, core_sums, dtype, tile_cols, stream);
  }
  return launch_type<__nv_bfloat16>(product, summed, core_sums, dtype, tile_cols, stream);
}

}  // namespace ultramem::cuda
