// Product-key retrieval, forward, axis stage on the tensor cores of sm_80 and later (mma.sync,
// ldmatrix, cp.async): all keys that may be among a token's best m (product_key_candidates.cuh),
// from which another kernel picks. What product_key_topk_fwd_candidates does on sm_90, in two
// rounds over the keys as there, which see.
//
// A block has 64 tokens of one head and side. Two groups of four warps take tiles of keys in turn,
// each with a ring of stages that it fills itself: while one looks at its scores, the other
// multiplies. Of a group's tile a warp has half of the tokens and half of the keys: 32 tokens are
// as many as make reading keys from shared memory no slower than multiplying. So a token has four
// lists, of every fourth half tile.
//
// Queries stay in shared memory where they leave room for the rings; else they come with the keys
// again and again.
#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "device.h"
#include "kernel_registry.h"
#include "mma.cuh"
#include "product_key_candidate_lists.cuh"
#include "product_key_topk_fwd.h"

namespace ultramem::cuda {
namespace {

using namespace candidate_lists;

constexpr int kTokens = 64;
constexpr int kGroups = 2;
constexpr int kGroupWarps = 4;
constexpr int kGroupThreads = kGroupWarps * kWarpSize;
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kStrips = 2;  // of 16 tokens, a warp's
constexpr int kWarpRows = kStrips * kWarpTokens;
constexpr int kKeyHalves = 2;
static_assert(kTokens / kWarpRows * kKeyHalves == kGroupWarps);
constexpr int kLists = kGroups * kKeyHalves;
constexpr int kColumns = 64;  // of a list, with a maximum each
constexpr int kRounds = 2;
constexpr int kMinStages = 2;
constexpr int kEnoughStages = 3;
constexpr int kMaxStages = 4;
constexpr int kFewKept = 40;  // keys: few, as far as emptying small staging rows goes

// Of a row of queries or keys in a stage.
constexpr int kSliceColumns = 32;
constexpr int kRowBytes = 2 * kSliceColumns;
constexpr int kRowChunks = kRowBytes / 16;
constexpr int kQueryBytes = kTokens * kRowBytes;

// 128 sums a thread, at most.
template <int kPlanes>
struct Tile {
  static constexpr int kWarpKeys = kPlanes <= 2 ? kColumns : kColumns / 2;
  static constexpr int kKeys = kKeyHalves * kWarpKeys;
};
constexpr int tile_keys(int planes) { return planes <= 2 ? Tile<2>::kKeys : Tile<4>::kKeys; }

// Offsets into shared memory, which begins with the rings. Made on the host: as an argument it
// takes no registers.
struct Layout {
  int num_slices;  // of a row of Kd
  int query_planes;
  int stage_bytes;
  int num_stages;  // of each group
  int queries;     // 0 where they come with the keys
  int states;      // RowState of each list and token
  int staged;      // [lists, tokens] rows
  int room;        // of such a row
  int bounds_there;
  int bytes;

  Layout(const ProductKeyTopkParams& p, int limit) {
    num_slices = static_cast<int>(ceil_div(p.key_dim, kSliceColumns));
    query_planes = p.num_queries;
    const int least_room = p.axis_topk <= kFewKept ? kMinRoom : kEnoughRoom;
    const bool found = fit(p, limit, true, kEnoughStages, least_room) ||
                       fit(p, limit, true, kMinStages, least_room) ||
                       fit(p, limit, false, kEnoughStages, least_room) ||
                       fit(p, limit, false, kMinStages, kMinRoom);
    if (!found) bytes = limit + 1;
  }

 private:
  // With these, staged rows of every rank begin in different banks.
  static constexpr int kRooms[] = {30, 20, 14, 10, 8, 6, 4};
  static constexpr int kMinRoom = 4, kEnoughRoom = 10;
  static_assert(kRooms[0] <= kMaxStaged);

  // Whether so many stages fit, with as much room for staged candidates as they leave.
  bool fit(const ProductKeyTopkParams& p, int limit, bool resident, int stages, int least_room) {
    stage_bytes = tile_keys(p.tucker_rank) * kRowBytes + (resident ? 0 : kQueryBytes);
    const int query_bytes = resident ? query_planes * num_slices * kQueryBytes : 0;
    constexpr int kStates = kLists * kTokens * static_cast<int>(sizeof(RowState));
    constexpr int kBarrier = 16;
    const int left = limit - query_bytes - kStates - kBarrier;
    for (const int staged_keys : kRooms) {
      room = staged_keys;
      const int staged_bytes = kLists * kTokens * staged_row_bytes(p.tucker_rank, room);
      num_stages = std::min((left - staged_bytes) / (kGroups * stage_bytes), kMaxStages);
      if (num_stages < stages || room < least_room) continue;
      const int ring_bytes = kGroups * num_stages * stage_bytes;
      queries = resident ? ring_bytes : 0;
      states = ring_bytes + query_bytes;
      staged = states + kStates;
      bounds_there = staged + staged_bytes;
      bytes = bounds_there + kBarrier;
      return true;
    }
    return false;
  }
};

// Where 16 bytes of a row are: in the eight rows that a matrix has, in eight different places
// modulo 128 bytes.
__device__ __forceinline__ uint32_t place_of(int row, int chunk) {
  return row * kRowBytes + 16 * (chunk ^ (row * kRowChunks / 8 % kRowChunks));
}

// A thread's share of the copies of rows, 32 elements of each at a time: 16 bytes of every
// kStep-th.
template <typename scalar_t, int kStep>
struct RowCopier {
  const scalar_t* from;  // in its first row
  int rows_left;         // that exist, from its first one on
  int columns_left;

  __device__ __forceinline__ RowCopier(const scalar_t* rows, int64_t row_stride, int num_rows,
                                       int num_columns, int thread) {
    static_assert(kStep % 8 == 0, "chunks are in the same place in each of its rows");
    const int row = thread / kRowChunks, column = thread % kRowChunks * 8;
    from = rows + row * row_stride + column;
    rows_left = num_rows - row;
    columns_left = num_columns - column;
  }

  // What does not exist becomes zeros: its address, which may lie behind the last row, is not used.
  template <int kRows, typename stride_t>
  __device__ __forceinline__ void copy(uint32_t to, stride_t row_stride) const {
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      cp_async_16(to + i * kRowBytes, from + i * row_stride, columns_left > 0 && i < rows_left);
    }
  }

  __device__ __forceinline__ void next_slice() {
    from += kSliceColumns;
    columns_left -= kSliceColumns;
  }
};
// Where the first of them goes in a stage.
__device__ __forceinline__ uint32_t copier_place(int thread) {
  return place_of(thread / kRowChunks, thread % kRowChunks);
}

// A block's queries and keys.
template <typename scalar_t>
struct Operands {
  const scalar_t* queries;  // of the block's first token
  const scalar_t* keys;
  int64_t token_stride;
  int num_tokens;  // of the block

  __device__ Operands(const ProductKeyTopkParams& p, int head_side, int64_t first_token) {
    const int head = head_side / 2, side = head_side % 2;
    const int64_t query_dim = p.num_queries * p.key_dim;
    token_stride = 2 * p.num_heads * query_dim;
    queries = static_cast<const scalar_t*>(p.query) + first_token * token_stride +
              (side * p.num_heads + head) * query_dim;
    keys = static_cast<const scalar_t*>(p.keys) +
           int64_t{head_side} * p.tucker_rank * p.num_keys * p.key_dim;
    num_tokens = static_cast<int>(min(int64_t{kTokens}, p.num_tokens - first_token));
  }

  template <int kCopiers>
  __device__ __forceinline__ auto query_copier(const ProductKeyTopkParams& p, int plane,
                                               int thread) const {
    const auto key_dim = static_cast<int>(p.key_dim);
    return RowCopier<scalar_t, kCopiers / kRowChunks>(
        queries + (p.num_queries > 1 ? plane : 0) * key_dim, token_stride, num_tokens, key_dim,
        thread);
  }
  template <int kCopiers>
  __device__ __forceinline__ auto key_copier(const ProductKeyTopkParams& p, int plane,
                                             int first_key, int thread) const {
    const auto key_dim = static_cast<int>(p.key_dim), num_keys = static_cast<int>(p.num_keys);
    return RowCopier<scalar_t, kCopiers / kRowChunks>(
        keys + (int64_t{plane} * num_keys + first_key) * key_dim, key_dim, num_keys - first_key,
        key_dim, thread);
  }
};

// A group's stages, in the order in which it needs them: slices of a tile's keys, plane after
// plane, its tiles, twice. Each thread copies its share of every stage, num_stages - 1 ahead.
template <typename scalar_t, int kPlanes>
class Ring {
 public:
  __device__ Ring(const ProductKeyTopkParams& p, const Layout& layout,
                  const Operands<scalar_t>& operands, uint32_t shared, int group, int thread)
      : p_(p),
        layout_(layout),
        operands_(operands),
        base_(shared + group * layout.num_stages * layout.stage_bytes),
        group_(group),
        thread_(thread),
        first_key_(group * kTileKeys),
        keys_(operands.template key_copier<kGroupThreads>(p, 0, first_key_, thread)),
        queries_(operands.template query_copier<kGroupThreads>(p, 0, thread)) {
    const int group_tiles =
        static_cast<int>(ceil_div(p.num_keys - first_key_, kGroups * kTileKeys));
    left_ = kRounds * group_tiles * kPlanes * layout.num_slices;
    for (int i = 0; i < layout_.num_stages - 1; ++i) copy_next();
  }

  // The address of the next stage, once it is there, for all of the group.
  __device__ __forceinline__ uint32_t next() {
    // Copies are awaited in the order in which they began: all but the last so many.
    if (layout_.num_stages == 4) {
      cp_async_wait<2>();
    } else if (layout_.num_stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    // The group has also multiplied the stage before, which is filled again.
    named_barrier_sync(1 + group_, kGroupThreads);
    const uint32_t stage = base_ + place_ * layout_.stage_bytes;
    if (++place_ == layout_.num_stages) place_ = 0;
    copy_next();
    return stage;
  }

 private:
  static constexpr int kTileKeys = Tile<kPlanes>::kKeys;

  __device__ __forceinline__ void copy_next() {
    if (left_ > 0) {
      --left_;
      const uint32_t to = base_ + copied_place_ * layout_.stage_bytes + copier_place(thread_);
      keys_.template copy<kTileKeys>(to, static_cast<int>(p_.key_dim));
      keys_.next_slice();
      if (layout_.queries == 0) {
        queries_.template copy<kTokens>(to + kTileKeys * kRowBytes, operands_.token_stride);
        queries_.next_slice();
      }
      if (++slice_ == layout_.num_slices) next_plane();
    }
    // None where nothing is left, so that they can be counted.
    cp_async_commit();
    if (++copied_place_ == layout_.num_stages) copied_place_ = 0;
  }

  __device__ __forceinline__ void next_plane() {
    slice_ = 0;
    if (++plane_ == kPlanes) {
      plane_ = 0;
      first_key_ += kGroups * kTileKeys;
      // The next round.
      if (first_key_ >= static_cast<int>(p_.num_keys)) first_key_ = group_ * kTileKeys;
    }
    keys_ = operands_.template key_copier<kGroupThreads>(p_, plane_, first_key_, thread_);
    queries_ = operands_.template query_copier<kGroupThreads>(p_, plane_, thread_);
  }

  const ProductKeyTopkParams& p_;
  const Layout& layout_;
  const Operands<scalar_t>& operands_;
  uint32_t base_;
  int group_, thread_;
  int place_ = 0;
  // What is copied next, and where to.
  int copied_place_ = 0;
  int left_, first_key_, plane_ = 0, slice_ = 0;
  RowCopier<scalar_t, kGroupThreads / kRowChunks> keys_, queries_;
};

template <int kPlanes>
using WarpScores = Scores<kPlanes, Tile<kPlanes>::kWarpKeys>[kStrips];

// Adds a slice's products of the warp's queries and keys. Addresses are of the lane's own rows.
template <typename scalar_t, int kPlanes, int kPlane>
__device__ __forceinline__ void multiply_slice(uint32_t queries, uint32_t keys,
                                               WarpScores<kPlanes>& scores) {
#pragma unroll
  for (int k = 0; k < kSliceColumns / 16; ++k) {
    uint32_t a[kStrips][4];
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      ldmatrix_x4(a[strip], (queries ^ 32 * k) + strip * kWarpTokens * kRowBytes);
    }
#pragma unroll
    for (int j = 0; j < Tile<kPlanes>::kWarpKeys / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4(b, (keys ^ 32 * k) + j * 16 * kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          auto& sums = reinterpret_cast<float (&)[4]>(scores[strip][kPlane][8 * j + 4 * half]);
          mma_m16n8k16<scalar_t>(sums, a[strip], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
}

// A tile's scores. `own_queries` and `own_keys` are where the lane's rows are, in the block's
// queries and in the keys of a stage.
template <typename scalar_t, int kPlanes, int kPlane = 0>
__device__ __forceinline__ void multiply_tile(const Layout& layout, Ring<scalar_t, kPlanes>& ring,
                                              uint32_t queries, uint32_t own_queries,
                                              uint32_t own_keys, WarpScores<kPlanes>& scores) {
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
    for (int i = 0; i < num_scores(Tile<kPlanes>::kWarpKeys); ++i) {
      scores[strip][kPlane][i] = 0.0f;
    }
  }
#pragma unroll 1
  for (int slice = 0; slice < layout.num_slices; ++slice) {
    const uint32_t stage = ring.next();
    const uint32_t tile = layout.queries == 0 ? stage + Tile<kPlanes>::kKeys * kRowBytes : queries;
    multiply_slice<scalar_t, kPlanes, kPlane>(tile + own_queries, stage + own_keys, scores);
    queries += kQueryBytes;
  }
  if constexpr (kPlane + 1 < kPlanes) {
    if (layout.query_planes == 1) queries -= layout.num_slices * kQueryBytes;
    multiply_tile<scalar_t, kPlanes, kPlane + 1>(layout, ring, queries, own_queries, own_keys,
                                                 scores);
  }
}

// Of rows lane / 4 and eight below, the keys that exist, a bit for each score: none where there is
// no token.
template <int kKeys>
__device__ __forceinline__ void find_existing(int first_token, int num_tokens, int first_key,
                                              int num_keys, int lane, uint32_t (&exist)[kRows]) {
  constexpr uint32_t kAll = ~0u >> (32 - num_row_scores(kKeys));
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    exist[row] = first_token + lane / 4 + 8 * row < num_tokens ? kAll : 0;
  }
  if (first_key + kKeys <= num_keys) return;
#pragma unroll
  for (int i = 0; i < num_row_scores(kKeys); ++i) {
    if (first_key + column_of(i, lane) >= num_keys) {
      exist[0] &= ~(1u << i);
      exist[1] &= ~(1u << i);
    }
  }
}

// Of a strip's rows, the least of the bounds that all lists have; `states` are of its tokens.
__device__ __forceinline__ void least_of_bounds(const RowState* states, int lane,
                                                float (&least)[kRows]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const RowState* of_token = states + lane / 4 + 8 * row;
    least[row] = of_token->bound;
#pragma unroll
    for (int i = 1; i < kLists; ++i) least[row] = fminf(least[row], of_token[i * kTokens].bound);
  }
}

// Grid: x the tiles of tokens of the chunk, y (head, side).
template <typename scalar_t, int kPlanes>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_fwd_mma_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                    const __grid_constant__ Layout layout,
                                    const __grid_constant__ Candidates<kLists> candidates,
                                    int64_t first_chunk_token) {
  constexpr int kTileKeys = Tile<kPlanes>::kKeys;
  constexpr int kWarpKeys = Tile<kPlanes>::kWarpKeys;
  extern __shared__ __align__(128) unsigned char shared_bytes[];  // as the rows of a matrix lie
  const uint32_t shared = shared_address(shared_bytes);
  auto* states = reinterpret_cast<RowState*>(shared_bytes + layout.states);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x; i < kLists * kTokens; i += kThreads) states[i] = {0.0f, 0x7fffffff, 0};
  const uint32_t bounds_there = shared + layout.bounds_there;
  if (threadIdx.x == 0) mbarrier_init(bounds_there, kThreads);
  wait_for_prerequisite_grid();
  release_dependent_grid();

  const int head_side = static_cast<int>(blockIdx.y);
  const int chunk_token = static_cast<int>(blockIdx.x) * kTokens;
  const int64_t first_token = first_chunk_token + chunk_token;
  const Operands<scalar_t> operands(p, head_side, first_token);
  if (layout.queries != 0) {
    uint32_t to = shared + layout.queries + copier_place(threadIdx.x);
    for (int plane = 0; plane < layout.query_planes; ++plane) {
      auto copier = operands.template query_copier<kThreads>(p, plane, threadIdx.x);
      for (int slice = 0; slice < layout.num_slices; ++slice, to += kQueryBytes) {
        copier.template copy<kTokens>(to, operands.token_stride);
        copier.next_slice();
      }
    }
  }
  const int group = warp / kGroupWarps;
  Ring<scalar_t, kPlanes> ring(p, layout, operands, shared, group, threadIdx.x % kGroupThreads);
  cp_async_wait_all();
  __syncthreads();

  const int warp_token = warp % (kTokens / kWarpRows) * kWarpRows;
  const int half = warp % kGroupWarps / (kTokens / kWarpRows);
  const int list = group * kKeyHalves + half;
  // See mma_m16n8k16 for which matrices it takes: of queries, the upper and lower eight rows, then
  // the same of the next eight columns; of keys, both columns of the upper eight, then of the
  // lower.
  const uint32_t own_queries = place_of(warp_token + lane % 16, lane / 16);
  const uint32_t own_keys = place_of(half * kWarpKeys + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  float filter[kPlanes];
  const auto* vector = static_cast<const float*>(head_side % 2 == 0 ? p.u : p.t);
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f : vector[head_side / 2 * kPlanes + r];
  }

  const auto num_keys = static_cast<int>(p.num_keys);
  WarpScores<kPlanes> scores;
  const auto multiply_next = [&] {
    multiply_tile<scalar_t, kPlanes>(layout, ring, shared + layout.queries, own_queries, own_keys,
                                     scores);
  };
  {
    Maxima<kColumns> maxima[kStrips];
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < num_row_scores(kColumns) / 2; ++i) {
          maxima[strip][row][i] = __float2bfloat162_rn(minus_infinity());
        }
      }
    }
#pragma unroll 1
    for (int tile = group * kTileKeys; tile < num_keys; tile += kGroups * kTileKeys) {
      multiply_next();
      const int first_key = tile + half * kWarpKeys;
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        if (first_key + kWarpKeys <= num_keys) {
          take_maxima<true, kPlanes, kWarpKeys, kColumns>(scores[strip], filter, maxima[strip], 0,
                                                          num_keys, lane);
        } else {
          take_maxima<false, kPlanes, kWarpKeys, kColumns>(scores[strip], filter, maxima[strip],
                                                           first_key, num_keys, lane);
        }
        if constexpr (kWarpKeys < kColumns) next_columns<kWarpKeys, kColumns>(maxima[strip]);
      }
    }
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      float bounds[kRows];
      find_bounds<kColumns>(maxima[strip], (p.axis_topk + kLists - 1) / kLists, bounds);
      if (lane % 4 == 0) {
        RowState* own = states + list * kTokens + warp_token + strip * kWarpTokens + lane / 4;
        own[0].bound = bounds[0];
        own[8].bound = bounds[1];
      }
    }
    mbarrier_arrive(bounds_there);
  }

  const auto lists_of = [&](int strip) {
    const int token = warp_token + strip * kWarpTokens;
    const uint32_t staged =
        shared + layout.staged + (list * kTokens + token) * staged_row_bytes(kPlanes, layout.room);
    return Lists<kPlanes, kWarpKeys, kLists>(p, candidates, states + list * kTokens + token, staged,
                                             layout.room, list, chunk_token + token, filter, lane);
  };
  Lists<kPlanes, kWarpKeys, kLists> lists[kStrips] = {lists_of(0), lists_of(1)};
  float least[kStrips][kRows];
  // The first tile is multiplied before other warps' bounds are asked for.
  bool bounded = false;
#pragma unroll 1
  for (int tile = group * kTileKeys; tile < num_keys; tile += kGroups * kTileKeys) {
    multiply_next();
    if (!bounded) {
      mbarrier_wait(bounds_there, 0);
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        least_of_bounds(states + warp_token + strip * kWarpTokens, lane, least[strip]);
      }
      bounded = true;
    }
    const int first_key = tile + half * kWarpKeys;
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      uint32_t exist[kRows];
      find_existing<kWarpKeys>(warp_token + strip * kWarpTokens, operands.num_tokens, first_key,
                               num_keys, lane, exist);
      lists[strip].add(scores[strip], first_key, exist, least[strip]);
    }
  }
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) lists[strip].finish();
}

#define ULTRAMEM_REGISTER_MMA(name, scalar_t, planes)                                    \
  ULTRAMEM_REGISTER_KERNEL(mma_##name##_##planes,                                        \
                           "product_key_topk_fwd_mma<" #name ", " #planes ">", kThreads, \
                           product_key_topk_fwd_mma_kernel<scalar_t, planes>)
ULTRAMEM_REGISTER_MMA(bf16, __nv_bfloat16, 1);
ULTRAMEM_REGISTER_MMA(bf16, __nv_bfloat16, 2);
ULTRAMEM_REGISTER_MMA(bf16, __nv_bfloat16, 3);
ULTRAMEM_REGISTER_MMA(bf16, __nv_bfloat16, 4);
ULTRAMEM_REGISTER_MMA(fp16, __half, 1);
ULTRAMEM_REGISTER_MMA(fp16, __half, 2);
ULTRAMEM_REGISTER_MMA(fp16, __half, 3);
ULTRAMEM_REGISTER_MMA(fp16, __half, 4);

// Many heads, or tokens, would need more; places are counted in 32 bits, too.
constexpr int64_t kMaxWorkspace = 64 << 20;

struct Workspace {
  Candidates<kLists> candidates{};
  size_t bytes = 0;

  // Chunks of about the same size. With no token in a chunk where a block's do not fit.
  explicit Workspace(const ProductKeyTopkParams& p) {
    set_capacities(p, kColumns, tile_keys(p.tucker_rank) / kKeyHalves, &candidates);
    const int64_t entry_bytes = 4 * p.tucker_rank + 2;
    const int64_t token_bytes =
        2 * p.num_heads * (candidates.capacity() * entry_bytes + 4 * kLists);
    constexpr int64_t kAlignment = 4 * 256;
    const int64_t most = (kMaxWorkspace - kAlignment) / token_bytes / kTokens;
    if (most == 0) return;
    const int64_t blocks = ceil_div(p.num_tokens, kTokens);
    const int64_t chunk_blocks = ceil_div(blocks, ceil_div(blocks, most));
    candidates.chunk_tokens = static_cast<int32_t>(kTokens * chunk_blocks);
    bytes = place_candidates(p, &candidates);
  }
};

template <typename scalar_t, int kPlanes>
Status launch(const ProductKeyTopkParams& p, Stream stream) {
  const auto kernel = product_key_topk_fwd_mma_kernel<scalar_t, kPlanes>;
  const Layout layout(p, max_shared_bytes());
  ULTRAMEM_RETURN_IF_ERROR(allow_shared_memory(kernel, layout.bytes));
  const Workspace workspace(p);
  const Candidates<kLists>& candidates = workspace.candidates;
  for (int64_t first = 0; first < p.num_tokens; first += candidates.chunk_tokens) {
    const int64_t num_tokens = candidates.tokens_from(first, p.num_tokens);
    const dim3 grid(static_cast<unsigned>(ceil_div(num_tokens, kTokens)),
                    static_cast<unsigned>(2 * p.num_heads));
    ULTRAMEM_RETURN_IF_ERROR(launch_overlapping(kernel, grid, kThreads, layout.bytes, stream, p,
                                                layout, candidates, first));
    ULTRAMEM_RETURN_IF_ERROR(launch_pick(p, candidates, first, stream));
  }
  return {};
}

template <typename scalar_t>
Status launch_planes(const ProductKeyTopkParams& p, Stream stream) {
  switch (p.tucker_rank) {
    case 1:
      return launch<scalar_t, 1>(p, stream);
    case 2:
      return launch<scalar_t, 2>(p, stream);
    case 3:
      return launch<scalar_t, 3>(p, stream);
    default:
      return launch<scalar_t, 4>(p, stream);
  }
}

}  // namespace

bool axis_mma_applies(const ProductKeyTopkParams& p) {
  constexpr int kMaxBlocksAlongY = 0xffff;
  if (!is_aligned(p.query) || !is_aligned(p.keys) || p.num_heads > kMaxBlocksAlongY / 2) {
    return false;
  }
  const int shared_limit = max_shared_bytes();
  return product_key_topk_fwd_path(p, compute_capability()) == RetrievalPath::kTensorCore80 &&
         Layout(p, shared_limit).bytes <= shared_limit && Workspace(p).bytes > 0;
}

size_t axis_mma_workspace(const ProductKeyTopkParams& p) { return Workspace(p).bytes; }

Status launch_axis_mma(const ProductKeyTopkParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch_planes<__half>(p, stream)
                                    : launch_planes<__nv_bfloat16>(p, stream);
}

}  // namespace ultramem::cuda
