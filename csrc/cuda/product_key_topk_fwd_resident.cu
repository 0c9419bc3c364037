// Product-key retrieval, forward, axis stage for short keys on the tensor cores of sm_90: all R
// queries of a token fit in the registers of the threads that multiply them.
//
// With only keys to stream it pays to multiply twice. First for a bound: of 64 groups of keys, a
// key being of group `id modulo 64`, the maxima; the m-th best of them is no better than the m-th
// best key, for each of them is a key. In any order but a contrived one about a third more than m
// keys are above. Then for those: they are few, and their scores go to lists in shared memory
// (product_key_lists.cuh), from which the best m are picked once.
//
// A block has 128 tokens of one head and side. Where more are above the bound than a list has room
// for, or too few because of ties or NaN, the block leaves its tokens to another kernel.
#include "common.cuh"
#include "kernel_registry.h"
#include "mma.cuh"
#include "product_key_axis_launch.h"
#include "product_key_common.cuh"
#include "product_key_lists.cuh"
#include "product_key_topk_fwd.h"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kPlanes = 2;
constexpr int kGroups = 2;  // warpgroups, of 64 tokens
constexpr int kTokens = 64 * kGroups;
constexpr int kMultipliers = 128 * kGroups;  // threads
// And one thread that copies, of a warpgroup for its registers' sake.
constexpr int kThreads = kMultipliers + 128;
constexpr int kMultiplierRegisters = 240;
constexpr int kCopierRegisters = 24;
constexpr int kKeys = 64;        // of a tile
constexpr int kBoxColumns = 64;  // elements of Kd: one 128-byte row
constexpr int kBoxBytes = kKeys * kBoxColumns * 2;
constexpr int kMaxBoxes = kAxisResidentMaxKeyDim / kBoxColumns;  // of a plane
constexpr int kBoxSteps = kBoxColumns / 16;
constexpr int kQueryBoxBytes = kTokens * kBoxColumns * 2;
constexpr int kStageBytes = kMaxBoxes * kBoxBytes;  // one plane of a tile
constexpr int kStages = 4;
constexpr int kSlots = 52;
using Lists = KeyListTraits<kPlanes, kSlots, 2 * kTokens, 0, true>;
constexpr int kListsOffset = kStages * kStageBytes;
constexpr int kBarriersOffset = kListsOffset + Lists::kBytes;
constexpr int kOverflowOffset = kBarriersOffset + (2 * kStages + 1) * 8;
constexpr int kSharedBytes = kOverflowOffset + 8;
// Named barriers, one for each group, and one more.
constexpr int kFirstTurn = 1;
static_assert(kSharedBytes <= 232448, "more than a block of sm_90 has");
// Queries wait where lists will be.
static_assert(kPlanes * kMaxBoxes * kQueryBoxBytes <= Lists::kBytes && kListsOffset % 1024 == 0);
constexpr int kScores = kKeys / 2;  // of a thread, a plane and a tile; see wgmma_k16

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A thread's part of the queries of its warp's 16 tokens, as products take them.
template <int kBoxes>
struct Queries {
  uint32_t parts[kPlanes][kBoxes * kBoxSteps][4];
};

// From where they were copied to, a [kTokens, 64] box for each plane and 64 columns.
template <int kBoxes>
__device__ __forceinline__ void load_queries(uint32_t boxes, int first_row, int lane,
                                             Queries<kBoxes>& queries) {
  // Lanes 0 to 7 name the rows of the first matrix of 8 x 8, the next eight those of the one below,
  // and the others those of the two eight columns further on.
  const int row = first_row + lane % 16;
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
    for (int step = 0; step < kBoxes * kBoxSteps; ++step) {
      const int piece =
          step % kBoxSteps * 2 + lane / 16;  // of 16 bytes, swizzled within a row of 128
      const uint32_t from = boxes + (r * kBoxes + step / kBoxSteps) * kQueryBoxBytes + row * 128 +
                            (piece ^ row % 8) * 16;
      ldmatrix_x4(queries.parts[r][step], from);
    }
  }
}

// Shared addresses of what streams through the stages.
struct Stages {
  uint32_t shared;

  __device__ __forceinline__ uint32_t tile(int stage) const { return shared + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared + kBarriersOffset + 8 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t queries() const { return full(2 * kStages); }
  // Not 0 if the block leaves its tokens to others.
  __device__ __forceinline__ uint32_t overflow() const { return shared + kOverflowOffset; }
};

template <int kBoxes>
__device__ __forceinline__ void copy_queries(const ProductKeyTopkParams& p, const CUtensorMap* map,
                                             Stages stages) {
  const int head_side = blockIdx.y;
  const int head = head_side / 2, side = head_side % 2;
  mbarrier_expect_bytes(stages.queries(), kPlanes * kBoxes * kQueryBoxBytes);
  for (int r = 0; r < kPlanes; ++r) {
    const int plane = (side * p.num_heads + head) * p.num_queries + (p.num_queries > 1 ? r : 0);
    for (int box = 0; box < kBoxes; ++box) {
      copy_box(map, stages.shared + kListsOffset + (r * kBoxes + box) * kQueryBoxBytes,
               stages.queries(), box * kBoxColumns, static_cast<int>(blockIdx.x * kTokens), plane);
    }
  }
}

// Both rounds of all keys. The second ends early where the block leaves its tokens to others.
template <int kBoxes>
__device__ __forceinline__ void copy_keys(const ProductKeyTopkParams& p, const CUtensorMap* map,
                                          Stages stages) {
  const auto num_keys = static_cast<int>(p.num_keys);
  RingCursor<kStages> at;
  int ahead = kStages;  // of the second round, before anything of it was released
  for (int round = 0; round < 2; ++round) {
    for (int key = 0; key < num_keys; key += kKeys) {
      for (int r = 0; r < kPlanes; ++r) {
        mbarrier_wait(stages.empty(at.place), at.parity ^ 1);
        if (round == 1 && --ahead < 0 && load_shared_u32(stages.overflow()) != 0) return;
        const uint32_t full = stages.full(at.place);
        mbarrier_expect_bytes(full, kBoxes * kBoxBytes);
        for (int box = 0; box < kBoxes; ++box) {
          copy_box(map, stages.tile(at.place) + box * kBoxBytes, full, box * kBoxColumns, key,
                   static_cast<int>(blockIdx.y) * kPlanes + r);
        }
        at.advance();
      }
    }
  }
}

using Scores = float[kPlanes][kScores];

// Multiplies one tile after the other and calls `use(first_key, scores)`.
template <typename scalar_t, int kBoxes>
class Products {
 public:
  __device__ Products(const ProductKeyTopkParams& p, const Queries<kBoxes>& queries, Stages stages,
                      int lane)
      : queries_(queries),
        stages_(stages),
        num_keys_(static_cast<int>(p.num_keys)),
        group_(__shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 128, 0)),
        lane_(lane) {
    if (group_ == kGroups - 1) pass_turn();
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores_[r][i] = 0.0f;
    }
  }

  template <typename Use>
  __device__ __forceinline__ void round(const Use& use) {
    for (int first_key = 0; first_key < num_keys_; first_key += kKeys) {
      int used[kPlanes];
      wait_for_turn();
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        mbarrier_wait(stages_.full(at_.place), at_.parity);
        used[r] = at_.place;
        at_.advance();
      }
      wgmma_fence();
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        const uint64_t tile = tile_descriptor(stages_.tile(used[r]));
        // Without a branch in between, or they would not follow each other as fast as they could.
#pragma unroll
        for (int step = 0; step < kBoxes * kBoxSteps; ++step) {
          wgmma_k16_registers<scalar_t>(
              scores_[r], queries_.parts[r][step],
              tile + step / kBoxSteps * (kBoxBytes >> 4) + step % kBoxSteps * 2, step > 0);
        }
      }
      wgmma_commit();
      pass_turn();
      wgmma_wait<0>();
      if (lane_ == 0) {
#pragma unroll
        for (int r = 0; r < kPlanes; ++r) mbarrier_arrive(stages_.empty(used[r]));
      }
      use(first_key, scores_);
      __syncwarp();
    }
  }

  // Waits for what is on its way of a round that nobody needs, and lets the thread that copies see
  // that.
  __device__ __forceinline__ void skip_round() {
    const int copied = min(kStages, static_cast<int>(ceil_div(num_keys_, kKeys)) * kPlanes);
    for (int i = 0; i < copied; ++i) {
      mbarrier_wait(stages_.full(at_.place), at_.parity);
      at_.advance();
    }
    if (lane_ == 0) mbarrier_arrive(stages_.empty(at_.place));
  }

  // After the last round: a turn was passed that nobody has taken.
  __device__ __forceinline__ void finish() const {
    if (group_ == 0) wait_for_turn();
  }

 private:
  // The warpgroups multiply in turn: while one uses its scores, the tensor cores are the other's.
  static_assert(kGroups == 2, "");
  __device__ __forceinline__ void wait_for_turn() const {
    named_barrier_sync(kFirstTurn + group_, kMultipliers);
  }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(kFirstTurn + (1 - group_), kMultipliers);
  }

  const Queries<kBoxes>& queries_;
  Stages stages_;
  int num_keys_;
  int group_, lane_;
  RingCursor<kStages> at_;
  Scores scores_;
};

__device__ __forceinline__ float rank_at(const Scores& scores, const float (&filter)[kPlanes],
                                         int i) {
  const float of_key[kPlanes] = {scores[0][i], scores[1][i]};
  return rank_value<kPlanes>(filter, of_key);
}
// Score i of a thread is of row i / 2 % 2, the other being eight below, and of this column.
__device__ __forceinline__ int column_of(int i, int lane) {
  return i / 4 * 8 + lane % 4 * 2 + i % 2;
}

// ---- the m-th best of what a quad holds ---------------------------------------------------------

constexpr int kRowScores = kScores / 2;  // of a lane
static_assert(kAxisResidentMaxTopk == 2 * kRowScores, "the best m of a quad are in two lanes");

// The next number below, of any but the least.
__device__ __forceinline__ float next_below(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x == 0.0f) return -__uint_as_float(1);
  return __uint_as_float(x > 0.0f ? bits - 1 : bits + 1);
}

__device__ __forceinline__ void order(float& high, float& low) {
  const float least = fminf(high, low);
  high = fmaxf(high, low);
  low = least;
}

// Descending, by merging pairs of sorted runs (Batcher): from runs of kSorted on, whose merging has
// come to this stride.
template <int kSorted = 1, int kStride = kSorted>
__device__ __forceinline__ void sort_in_lane(float (&x)[kRowScores]) {
#pragma unroll
  for (int i = 0; i < kRowScores - kStride; ++i) {
    const int place = i % (2 * kStride) - kStride % kSorted;
    const bool is_first = place >= 0 && place < kStride;
    if (is_first && i / (2 * kSorted) == (i + kStride) / (2 * kSorted)) order(x[i], x[i + kStride]);
  }
  if constexpr (kStride > 1) {
    sort_in_lane<kSorted, kStride / 2>(x);
  } else if constexpr (2 * kSorted < kRowScores) {
    sort_in_lane<2 * kSorted>(x);
  }
}

// Descending, of what first rises and then falls, or the other way about.
template <int kStride = kRowScores / 2>
__device__ __forceinline__ void merge_in_lane(float (&x)[kRowScores]) {
#pragma unroll
  for (int i = 0; i < kRowScores; ++i) {
    if ((i & kStride) == 0) order(x[i], x[i + kStride]);
  }
  if constexpr (kStride > 1) merge_in_lane<kStride / 2>(x);
}

// Of this lane's and another's descending numbers, the greater or the lesser half.
__device__ __forceinline__ void keep_half(float (&x)[kRowScores], int other_lane, bool greater) {
  float others[kRowScores];
#pragma unroll
  for (int i = 0; i < kRowScores; ++i) {
    others[i] = __shfl_xor_sync(kFullMask, x[kRowScores - 1 - i], other_lane);
  }
#pragma unroll
  for (int i = 0; i < kRowScores; ++i) {
    x[i] = greater ? fmaxf(x[i], others[i]) : fminf(x[i], others[i]);
  }
}

// The m-th greatest of what the lanes of a quad hold, for all of them.
__device__ __forceinline__ float find_greatest(float (&x)[kRowScores], int m, int lane) {
  const bool is_second = lane % 2 != 0;
  sort_in_lane(x);
  keep_half(x, 1, !is_second);
  merge_in_lane(x);
  // A pair has 32 in order now. Of the other's, the last comes against the first.
  keep_half(x, 3, true);
  float found = x[0];
  if (m == kAxisResidentMaxTopk) {  // the least of them, in whatever order
#pragma unroll
    for (int i = 1; i < kRowScores; ++i) found = fminf(found, x[i]);
    return fminf(found, __shfl_xor_sync(kFullMask, found, 1));
  }
#pragma unroll
  for (int i = 0; i < kRowScores; ++i) {
    const float other = __shfl_xor_sync(kFullMask, x[i], 1);
    x[i] = is_second ? fminf(x[i], other) : fmaxf(x[i], other);
  }
  merge_in_lane(x);
  found = -__uint_as_float(kInfinityBits);
#pragma unroll
  for (int i = 0; i < kRowScores; ++i) {
    if (i >= (m - 1) % kRowScores) found = fmaxf(found, x[i]);
  }
  return __shfl_sync(kFullMask, found, lane / 4 * 4 + (m - 1) / kRowScores);
}

// Of both rows: the greatest number that at least m of the maxima that a quad holds are above. NaN
// if there is none, or so many equal the last of them that the keys above would hardly fit.
__device__ __forceinline__ void find_bounds(const float (&maxima)[kScores], int m, int lane,
                                            float (&bounds)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float of_row[kRowScores];
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) of_row[i] = maxima[i / 2 * 4 + row * 2 + i % 2];
    const float least = find_greatest(of_row, m, lane);
    uint32_t above = 0;
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) above += maxima[i / 2 * 4 + row * 2 + i % 2] >= least;
    const bool fits = 2 * quad_sum(above) <= static_cast<uint32_t>(m + kKeys);
    bounds[row] = fits && least > -__uint_as_float(kInfinityBits) ? next_below(least)
                                                                  : __uint_as_float(kNanBits);
  }
}

// Where a lane adds keys to a list of each of its two rows. A quad's first two lanes share a list
// of a row, one from slot 0 up, the other from the last slot down, and the other two its other
// list.
class ListEnds {
  // With more keys of a lane a list might not have room for another tile's.
  static constexpr int kFullSlots = kSlots - kRowScores;
  static constexpr int kFullBytes = kFullSlots * Lists::kScoreStride;

 public:
  __device__ ListEnds(uint32_t lists, int warp, int lane) {
    const int list = warp * kWarpSize + lane % 4 / 2 * Lists::kTokensOfWarp + lane / 4;
    const bool is_back = lane % 2 != 0;
    const uint32_t front = lists + Lists::scores_offset(list);
    step_ = is_back ? -Lists::kScoreStride : Lists::kScoreStride;
    first_ = is_back ? front + (kSlots - 1) * Lists::kScoreStride : front;
    lowest_ = is_back ? first_ - kFullBytes : first_;
    next_[0] = first_;
    next_[1] = first_ + Lists::kEightScores;
    // One number for the warp, which addresses take without an instruction.
    to_ids_ = __shfl_sync(kFullMask, Lists::ids_offset(list) - Lists::scores_offset(list), 0);
  }

  // Keys that this lane has added to the row's list; more than the list has slots where it may have
  // left some out.
  __device__ __forceinline__ int count(int row) const {
    const auto added = static_cast<int>(next_[row] - row * Lists::kEightScores - first_);
    return is_full(row) ? kSlots + 1 : abs(added) / Lists::kScoreStride;
  }

  // Adds the keys of a tile that are above the bounds, which NaN is not. Where there might be no
  // room for all, a bound becomes infinite.
  __device__ __forceinline__ void append(const Scores& scores, const float (&filter)[kPlanes],
                                         int first_key, int lane, float (&bounds)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (is_full(row)) bounds[row] = __uint_as_float(kInfinityBits);
    }
    // A column after the other, the rows in turn: an address must have been read by the stores
    // before it can change.
#pragma unroll
    for (int column = 0; column < kRowScores; ++column) {
      const int of_column = column / 2 * 4 + column % 2;
      int id = first_key + column_of(of_column, lane);
      // Or it would be worked out again for the other row.
      asm volatile("" : "+r"(id));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int i = of_column + row * 2;
        if (rank_at(scores, filter, i) > bounds[row]) {
          const float of_key[kPlanes] = {scores[0][i], scores[1][i]};
          store_shared_floats<kPlanes>(next_[row], of_key);
          store_shared_u16(next_[row] + to_ids_ + row * (Lists::kEightIds - Lists::kEightScores),
                           id);
          next_[row] += step_;
        }
      }
    }
  }

 private:
  __device__ __forceinline__ bool is_full(int row) const {
    return next_[row] - row * Lists::kEightScores - lowest_ > kFullBytes;
  }

  uint32_t next_[2];  // where the scores of the next key of a row go
  uint32_t step_;
  uint32_t to_ids_;  // from the scores to the id, of the first row
  // Of the first row: where the first key's scores go, and the least place while it is not full.
  uint32_t first_, lowest_;
};

// Whether any thread that multiplies says so, now or before. All of them call it, and are done with
// what came ahead of it.
__device__ __forceinline__ bool is_left_over(uint32_t shared, bool says_so) {
  if (says_so) store_shared_u32(Stages{shared}.overflow(), 1);
  named_barrier_sync(kFirstTurn + kGroups, kMultipliers);
  return load_shared_u32(Stages{shared}.overflow()) != 0;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Grid: x the tiles of tokens, y (head, side). left_over[y, x] becomes 1 where a block has written
// nothing, else 0. kBoxes hold a key.
template <typename scalar_t, int kBoxes>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_fwd_axis_resident_kernel(ProductKeyTopkParams p, int32_t* left_over,
                                              bool filter_ahead,
                                              const __grid_constant__ CUtensorMap query_map,
                                              const __grid_constant__ CUtensorMap key_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];  // as swizzled tiles are
  const uint32_t shared = shared_address(shared_bytes);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int head_side = blockIdx.y;
  const int head = head_side / 2, side = head_side % 2;
  const auto num_keys = static_cast<int>(p.num_keys);
  const int64_t warp_token = int64_t{blockIdx.x} * kTokens + warp * Lists::kTokensOfWarp;

  const Stages stages{shared};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(stages.full(stage), 1);
      mbarrier_init(stages.empty(stage), kMultipliers / kWarpSize);
    }
    mbarrier_init(stages.queries(), 1);
    store_shared_u32(shared + kOverflowOffset, 0);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp >= kMultipliers / kWarpSize) {
    give_up_registers<kCopierRegisters>();
    if (threadIdx.x == kMultipliers) {
      // What is copied is there if the filter alone is not.
      if (!filter_ahead) wait_for_prerequisite_grid();
      copy_queries<kBoxes>(p, &query_map, stages);
      copy_keys<kBoxes>(p, &key_map, stages);
    }
    return;
  }
  take_registers<kMultiplierRegisters>();
  // In this order: what the grid stage reads before it waits must be there when it begins.
  wait_for_prerequisite_grid();
  release_dependent_grid();

  Queries<kBoxes> queries;
  mbarrier_wait(stages.queries(), 0);
  load_queries(shared + kListsOffset, warp * Lists::kTokensOfWarp, lane, queries);
  float filter[kPlanes];
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    filter[r] = static_cast<const float*>(side == 0 ? p.u : p.t)[head * kPlanes + r];
  }

  Products<scalar_t, kBoxes> products(p, queries, stages, lane);
  float bounds[2];
  {
    float maxima[kScores];
#pragma unroll
    for (int i = 0; i < kScores; ++i) maxima[i] = -__uint_as_float(kInfinityBits);
    products.round([&](int first_key, const Scores& scores) {
      const bool whole = first_key + kKeys <= num_keys;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float rank = rank_at(scores, filter, i);
        if (whole || first_key + column_of(i, lane) < num_keys) maxima[i] = fmaxf(maxima[i], rank);
      }
    });
    find_bounds(maxima, p.axis_topk, lane, bounds);
  }
  // Where a token has no bound, the block's tokens are left over.
  const bool has_bounds = (warp_token + lane / 4 >= p.num_tokens || bounds[0] == bounds[0]) &&
                          (warp_token + lane / 4 + 8 >= p.num_tokens || bounds[1] == bounds[1]);
  if (is_left_over(shared, !has_bounds)) {
    products.skip_round();
    products.finish();
    if (threadIdx.x == 0) left_over[blockIdx.y * gridDim.x + blockIdx.x] = 1;
    return;
  }

  ListEnds ends(shared + kListsOffset, warp, lane);
  products.round([&](int first_key, Scores& scores) {
    if (first_key + kKeys > num_keys) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (first_key + column_of(i, lane) >= num_keys) scores[0][i] = __uint_as_float(kNanBits);
      }
    }
    ends.append(scores, filter, first_key, lane, bounds);
  });
  products.finish();

  // From here on a lane looks after one list: of token lane % 16, from the quad's first two lanes
  // or its others.
  const int from = lane % 8 * 4 + lane / 16 * 2;
  const int lane_counts = ends.count(0) | ends.count(1) << 16;
  const float row_bounds[2] = {__shfl_sync(kFullMask, bounds[0], from),
                               __shfl_sync(kFullMask, bounds[1], from)};
  const bool is_below = lane % 16 >= 8;
  const int shift = is_below ? 16 : 0;
  const int front = __shfl_sync(kFullMask, lane_counts, from) >> shift & 0xffff;
  const int back = __shfl_sync(kFullMask, lane_counts, from + 1) >> shift & 0xffff;
  const bool exists = warp_token + lane % 16 < p.num_tokens;
  const int count = front + back;
  const int total = count + __shfl_xor_sync(kFullMask, count, 16);
  const bool fits = !exists || (count <= kSlots && total >= p.axis_topk);
  const bool overflows = is_left_over(shared, !fits);
  if (threadIdx.x == 0) left_over[blockIdx.y * gridDim.x + blockIdx.x] = overflows;
  if (overflows) return;

  KeyList<Lists> found(shared + kListsOffset, threadIdx.x, filter, exists);
  found.take_over(exists ? front : 0, exists ? back : 0, is_below ? row_bounds[1] : row_bounds[0]);
  const IdCut cut = found.find_cut(p.axis_topk);
  const auto num_tokens = static_cast<int>(
      max(int64_t{0}, min(int64_t{Lists::kTokensOfWarp}, p.num_tokens - warp_token)));
  found.write(p, (warp_token * p.num_heads + head) * 2 + side, num_tokens, cut, lane);
#endif
}

#define ULTRAMEM_REGISTER_RESIDENT(name, scalar_t, boxes)                                         \
  ULTRAMEM_REGISTER_KERNEL(resident_##name##_##boxes,                                             \
                           "product_key_topk_fwd_axis_resident<" #name ", " #boxes ">", kThreads, \
                           product_key_topk_fwd_axis_resident_kernel<scalar_t, boxes>)
ULTRAMEM_REGISTER_RESIDENT(bf16, __nv_bfloat16, 1);
ULTRAMEM_REGISTER_RESIDENT(bf16, __nv_bfloat16, 2);
ULTRAMEM_REGISTER_RESIDENT(bf16, __nv_bfloat16, 3);
ULTRAMEM_REGISTER_RESIDENT(fp16, __half, 1);
ULTRAMEM_REGISTER_RESIDENT(fp16, __half, 2);
ULTRAMEM_REGISTER_RESIDENT(fp16, __half, 3);

template <typename scalar_t, int kBoxes>
Status launch(const ProductKeyTopkParams& p, Stream stream, bool filter_ahead) {
  CUtensorMap query_map, key_map;
  ULTRAMEM_RETURN_IF_ERROR(make_axis_maps(p, kTokens, kKeys, &query_map, &key_map));
  const auto kernel = product_key_topk_fwd_axis_resident_kernel<scalar_t, kBoxes>;
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, kSharedBytes));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.num_tokens, kTokens)),
                  static_cast<unsigned>(2 * p.num_heads));
  return launch_overlapping(kernel, grid, kThreads, kSharedBytes, stream, p,
                            static_cast<int32_t*>(p.workspace), filter_ahead, query_map, key_map);
}

template <typename scalar_t>
Status launch_boxes(const ProductKeyTopkParams& p, Stream stream, bool filter_ahead) {
  static_assert(kMaxBoxes == 3);
  if (p.key_dim <= kBoxColumns) return launch<scalar_t, 1>(p, stream, filter_ahead);
  if (p.key_dim <= 2 * kBoxColumns) return launch<scalar_t, 2>(p, stream, filter_ahead);
  return launch<scalar_t, 3>(p, stream, filter_ahead);
}

}  // namespace

size_t axis_resident_workspace(const ProductKeyTopkParams& p) {
  return sizeof(int32_t) * static_cast<size_t>(2 * p.num_heads * ceil_div(p.num_tokens, kTokens));
}

Status launch_axis_resident(const ProductKeyTopkParams& params, Stream stream, bool filter_ahead) {
  ULTRAMEM_RETURN_IF_ERROR(params.dtype == DType::kFloat16
                               ? launch_boxes<__half>(params, stream, filter_ahead)
                               : launch_boxes<__nv_bfloat16>(params, stream, filter_ahead));
  return launch_axis_marked_lists(params, stream, static_cast<const int32_t*>(params.workspace));
}

}  // namespace ultramem::cuda
