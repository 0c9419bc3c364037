// Product-key retrieval, forward, axis stage for R up to 2 on the tensor cores of sm_90: all keys
// that may be among a token's best m (product_key_candidates.cuh), from which another kernel picks.
//
// A block has 64 tokens of one head and side. Their queries stay in shared memory, keys stream in
// tiles of 128 that the two blocks of a cluster copy for each other. Two warpgroups take the tiles
// in turn: while one multiplies, the other looks at its scores, which are in registers.
//
// Keys pass twice. In the first round each warpgroup keeps, for every token and column of its
// tiles, the maximum rank: m/2 of them above some number, and as many of the other warpgroup's, are
// m different keys, so the lesser of both numbers bounds the m-th best key from below. In the
// second round the keys that are not below go to the warpgroup's list of the token. A list that is
// full is cut down to its best m, and bounds from then on, too: every order of scores comes out
// right, and only contrived ones are slower, and tokens whose scores are NaN.
#include <algorithm>

#include "cluster.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_axis_launch.h"
#include "product_key_candidate_lists.cuh"
#include "product_key_topk_fwd.h"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

using namespace candidate_lists;

constexpr int kMaxPlanes = 2;  // ranks
constexpr int kKeys = 128;     // of a tile
constexpr int kScores = num_scores(kKeys);
constexpr int kTokens = 64;
constexpr int kBoxColumns = 64;  // elements of Kd: one 128-byte row
constexpr int kRowBytes = 2 * kBoxColumns;
constexpr int kBoxRows = 64;
constexpr int kBoxBytes = kBoxRows * kRowBytes;
constexpr int kStageBytes = kKeys * kRowBytes;  // 64 columns of a rank's keys
constexpr int kClusterBlocks = 2;
static_assert(kStageBytes == kClusterBlocks * kBoxBytes && kTokens == kBoxRows);
constexpr int kRounds = 2;
constexpr int kMinStages = 3;
constexpr int kMaxStages = 10;
constexpr int kGroups = 2;                    // warpgroups that multiply, a list each
constexpr int kMultipliers = 128 * kGroups;   // threads
constexpr int kThreads = kMultipliers + 128;  // and one that copies, of a warpgroup of its own
constexpr int kMultiplierRegisters = 240;
constexpr int kCopierRegisters = 24;
constexpr int kGroupWarps = 4;
constexpr int kMaxSharedBytes = 232448;
constexpr int kMaxFewKept = 40;  // keys: few, as far as selection goes
constexpr int kMinStaged = 8, kMidStaged = 20;

// Offsets into shared memory, which begins with barriers and the ring. Made on the host: as an
// argument it takes no registers.
constexpr int kRingOffset = 1024;  // swizzled tiles are aligned so
struct Layout {
  int num_boxes;  // of a row of Kd
  int query_planes;
  int num_stages;
  int queries;
  int states;  // RowState of each group and token
  int staged;  // [groups, tokens] rows
  int room;    // of such a row

  explicit Layout(const ProductKeyTopkParams& p) {
    constexpr int kStates = kGroups * kTokens * static_cast<int>(sizeof(RowState));
    num_boxes = static_cast<int>(ceil_div(p.key_dim, kBoxColumns));
    query_planes = p.num_queries;
    const int query_bytes = query_planes * num_boxes * kBoxBytes;
    const int left = kMaxSharedBytes - kRingOffset - query_bytes - kStates;
    // To empty small ones takes longer than stages beyond these save; where few keys are kept, it
    // is done seldom enough.
    constexpr int kEnoughStages = 6;
    const auto leaves = [&](int stages) { return left - staged_bytes() >= stages * kStageBytes; };
    room = kMaxStaged;
    if (!leaves(kEnoughStages)) room = kMidStaged;
    if (!leaves(kMinStages) && p.axis_topk <= kMaxFewKept) room = kMinStaged;
    const int ring = left - staged_bytes();
    num_stages = ring / kStageBytes < kMaxStages ? ring / kStageBytes : kMaxStages;
    queries = kRingOffset + num_stages * kStageBytes;
    states = queries + query_bytes;
    staged = states + kStates;
  }
  int staged_bytes() const { return kGroups * kTokens * staged_row_bytes(kMaxPlanes, room); }
  int bytes() const { return staged + staged_bytes(); }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Addresses.
struct Shared {
  uint32_t base;

  // Barriers: a stage is filled; it was multiplied, by both blocks; queries are there; bounds are.
  __device__ __forceinline__ uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kMaxStages + stage); }
  __device__ __forceinline__ uint32_t queries_there() const { return full(2 * kMaxStages); }
  __device__ __forceinline__ uint32_t bounds_there() const { return full(2 * kMaxStages + 1); }
  __device__ __forceinline__ uint32_t stage(int i) const {
    return base + kRingOffset + i * kStageBytes;
  }
  __device__ __forceinline__ uint32_t queries(const Layout& layout, int plane, int box) const {
    return base + layout.queries + (plane * layout.num_boxes + box) * kBoxBytes;
  }
};
static_assert((2 * kMaxStages + 2) * 8 <= kRingOffset);

// A place in a ring whose size is known at run time; see RingCursor.
struct StageCursor {
  int place = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int steps, int num_stages) {
    place += steps;
    const int rounds = place / num_stages;
    place -= rounds * num_stages;
    parity ^= rounds & 1;
  }
  __device__ __forceinline__ void advance(int num_stages) {
    if (++place == num_stages) {
      place = 0;
      parity ^= 1;
    }
  }
};

// Copies the block's queries, and its half of every tile of keys to both blocks, in both rounds.
__device__ __forceinline__ void copy_all(const ProductKeyTopkParams& p, const Layout& layout,
                                         const Shared& shared, const CUtensorMap* query_map,
                                         const CUtensorMap* key_map, int64_t first_token) {
  const int head_side = blockIdx.y;
  const int head = head_side / 2, side = head_side % 2;
  mbarrier_expect_bytes(shared.queries_there(), layout.query_planes * layout.num_boxes * kBoxBytes);
  for (int plane = 0; plane < layout.query_planes; ++plane) {
    for (int box = 0; box < layout.num_boxes; ++box) {
      copy_box(query_map, shared.queries(layout, plane, box), shared.queries_there(),
               box * kBoxColumns, static_cast<int>(first_token),
               (side * p.num_heads + head) * p.num_queries + plane);
    }
  }
  const auto half = static_cast<int>(cluster_rank());
  constexpr uint16_t kBoth = (1 << kClusterBlocks) - 1;
  StageCursor at;
  for (int round = 0; round < kRounds; ++round) {
    for (int key = 0; key < static_cast<int>(p.num_keys); key += kKeys) {
      for (int r = 0; r < p.tucker_rank; ++r) {
        for (int box = 0; box < layout.num_boxes; ++box) {
          mbarrier_wait(shared.empty(at.place), at.parity ^ 1);
          const uint32_t full = shared.full(at.place);
          mbarrier_expect_bytes(full, kStageBytes);
          copy_box_multicast(key_map, shared.stage(at.place) + half * kBoxBytes, full, kBoth,
                             box * kBoxColumns, key + half * kBoxRows,
                             head_side * p.tucker_rank + r);
          at.advance(layout.num_stages);
        }
      }
    }
  }
}

// The warpgroups multiply in turn, for the tensor cores are one's while the other looks at its
// scores. More than that: who waits for a stage is never so far ahead that the parity of a phase is
// that of one before.
constexpr int kFirstTurn = 1;  // named barriers, one for each warpgroup
static_assert(kGroups == 2, "");
__device__ __forceinline__ void wait_for_turn(int group) {
  named_barrier_sync(kFirstTurn + group, kMultipliers);
}
__device__ __forceinline__ void pass_turn(int group) {
  named_barrier_arrive(kFirstTurn + 1 - group, kMultipliers);
}

// A tile's scores for the 64 tokens. `at` is where its first stage is; in the blocks whose rank is
// a lane's number, `empty` is the address of the first stage's barrier.
template <typename scalar_t, int kPlanes>
__device__ __forceinline__ void multiply_tile(const Layout& layout, const Shared& shared,
                                              uint32_t empty, int group, bool passes_turn,
                                              StageCursor& at, Scores<kPlanes, kKeys>& scores,
                                              int lane) {
  // Each warp for itself: that its share of a product is complete says nothing of the others'.
  const auto release = [&](int stage) {
    if (lane < kClusterBlocks) mbarrier_arrive_in_block(empty + 8 * stage);
  };
  const int num_boxes = layout.num_boxes, num_stages = layout.num_stages;
  int last = -1;
  wait_for_turn(group);
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) {
    uint64_t query_tile =
        tile_descriptor(shared.queries(layout, layout.query_planes > 1 ? r : 0, 0));
#pragma unroll 1
    for (int box = 0; box < num_boxes; ++box) {
      mbarrier_wait(shared.full(at.place), at.parity);
      const uint64_t key_tile = tile_descriptor(shared.stage(at.place));
      multiply_boxes<scalar_t>(scores[r], query_tile, key_tile, box > 0);
      if (last >= 0) {
        wgmma_wait<1>();
        release(last);
      }
      last = at.place;
      at.advance(num_stages);
      query_tile += kBoxBytes / 16;
    }
  }
  if (passes_turn) pass_turn(group);
  wgmma_wait<0>();
#pragma unroll
  for (int r = 0; r < kPlanes; ++r) wgmma_results(scores[r]);
  release(last);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Grid: x the tiles of tokens of the chunk, an even number, y (head, side).
template <typename scalar_t, int kPlanes>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_fwd_candidates_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                           const __grid_constant__ Layout layout,
                                           const __grid_constant__ Candidates<kGroups> candidates,
                                           int64_t first_chunk_token,
                                           const __grid_constant__ CUtensorMap query_map,
                                           const __grid_constant__ CUtensorMap key_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];  // as swizzled tiles are
  const Shared shared{shared_address(shared_bytes)};
  const int warp = threadIdx.x / kWarpSize;
  // Exchanged with itself, or it would be read again wherever it is needed.
  const int lane = __shfl_sync(kFullMask, threadIdx.x % kWarpSize, threadIdx.x % kWarpSize);
  auto* states = reinterpret_cast<RowState*>(shared_bytes + layout.states);
  if (threadIdx.x < kGroups * kTokens) states[threadIdx.x] = {0.0f, 0x7fffffff, 0.0f};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < layout.num_stages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), kGroupWarps * kClusterBlocks);
    }
    mbarrier_init(shared.queries_there(), 1);
    mbarrier_init(shared.bounds_there(), kMultipliers);
    mbarrier_init_fence();
    prefetch_tensor_map(&query_map);
    prefetch_tensor_map(&key_map);
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();
  // In this order: what the grid stage reads before it waits must be there when it begins.
  wait_for_prerequisite_grid();
  release_dependent_grid();

  const int chunk_token = static_cast<int>(blockIdx.x) * kTokens;
  const int64_t first_token = first_chunk_token + chunk_token;
  if (warp >= kMultipliers / kWarpSize) {
    give_up_registers<kCopierRegisters>();
    if (threadIdx.x == kMultipliers) copy_all(p, layout, shared, &query_map, &key_map, first_token);
    __syncwarp();
  } else {
    take_registers<kMultiplierRegisters>();
    const int group = warp / kGroupWarps;
    const int group_token = warp % kGroupWarps * 16;
    const int head_side = static_cast<int>(blockIdx.y);
    float filter[kPlanes];
    const auto* vector = static_cast<const float*>(head_side % 2 == 0 ? p.u : p.t);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      filter[r] = p.mode == ScoreMode::kAdditive ? 1.0f : vector[head_side / 2 * kPlanes + r];
    }
    RowState* own_states = states + group * kTokens + group_token;
    RowState* other_states = states + (1 - group) * kTokens + group_token;
    const uint32_t staged = shared.base + layout.staged +
                            warp * kWarpTokens * staged_row_bytes(kMaxPlanes, layout.room);
    Lists<kPlanes, kKeys, kGroups> lists(p, candidates, own_states, staged, layout.room, group,
                                         chunk_token + group_token, filter, lane);
    const auto m = static_cast<uint32_t>(p.axis_topk);
    const auto num_keys = static_cast<int>(p.num_keys);
    const int tile_steps = kPlanes * layout.num_boxes;
    Scores<kPlanes, kKeys> scores;
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores[r][i] = 0.0f;
    }
    StageCursor at;
    at.advance(group * tile_steps, layout.num_stages);
    const uint32_t empty =
        address_in_block(shared.empty(0), lane < kClusterBlocks ? lane : cluster_rank());
    const int num_tiles = (num_keys + kKeys - 1) / kKeys;
    // Tiles of both rounds, one after the other.
    const int num_turns = kRounds * num_tiles;
    int turn = group;
    const auto multiply_next = [&] {
      multiply_tile<scalar_t, kPlanes>(layout, shared, empty, group, turn + 1 < num_turns, at,
                                       scores, lane);
      at.advance((kGroups - 1) * tile_steps, layout.num_stages);
      turn += kGroups;
    };
    if (group == 1) pass_turn(group);
    mbarrier_wait(shared.queries_there(), 0);

    float least[kRows];
    {
      Maxima<kKeys> maxima;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < num_row_scores(kKeys) / 2; ++i) {
          maxima[row][i] = __float2bfloat162_rn(minus_infinity());
        }
      }
#pragma unroll 1
      while (turn < num_tiles) {
        const int first_key = turn * kKeys;
        multiply_next();
        if (first_key + kKeys <= num_keys) {
          take_maxima<true, kPlanes, kKeys, kKeys>(scores, filter, maxima, 0, num_keys, lane);
        } else {
          take_maxima<false, kPlanes, kKeys, kKeys>(scores, filter, maxima, first_key, num_keys,
                                                    lane);
        }
      }
      float bounds[kRows];
      find_bounds<kKeys>(maxima, (m + 1) / 2, bounds);
      if (lane % 4 == 0) {
        own_states[lane / 4].bound = bounds[0];
        own_states[lane / 4 + 8].bound = bounds[1];
      }
      mbarrier_arrive(shared.bounds_there());
      mbarrier_wait(shared.bounds_there(), 0);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        least[row] = fminf(bounds[row], other_states[lane / 4 + 8 * row].bound);
      }
    }

#pragma unroll 1
    while (turn < num_turns) {
      const int first_key = (turn - num_tiles) * kKeys;
      multiply_next();
      // Rows without a token have no keys.
      uint32_t exist[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        exist[row] = first_token + group_token + lane / 4 + 8 * row < p.num_tokens ? ~0u : 0;
      }
      if (first_key + kKeys > num_keys) {
#pragma unroll
        for (int i = 0; i < num_row_scores(kKeys); ++i) {
          if (first_key + column_of(i, lane) >= num_keys) {
            exist[0] &= ~(1u << i);
            exist[1] &= ~(1u << i);
          }
        }
      }
      lists.add(scores, first_key, exist, least);
    }
    lists.finish();
  }
  // No block may leave while the other still arrives at its barriers or copies into its memory.
  cluster_sync();
#endif
}

ULTRAMEM_REGISTER_KERNEL(bf16_1, "product_key_topk_fwd_candidates<bf16, 1>", kThreads,
                         product_key_topk_fwd_candidates_kernel<__nv_bfloat16, 1>);
ULTRAMEM_REGISTER_KERNEL(bf16_2, "product_key_topk_fwd_candidates<bf16, 2>", kThreads,
                         product_key_topk_fwd_candidates_kernel<__nv_bfloat16, 2>);
ULTRAMEM_REGISTER_KERNEL(fp16_1, "product_key_topk_fwd_candidates<fp16, 1>", kThreads,
                         product_key_topk_fwd_candidates_kernel<__half, 1>);
ULTRAMEM_REGISTER_KERNEL(fp16_2, "product_key_topk_fwd_candidates<fp16, 2>", kThreads,
                         product_key_topk_fwd_candidates_kernel<__half, 2>);

// Tokens of a chunk, which bounds the workspace for few heads: the next chunk's candidates
// overwrite it. Blocks for all multiprocessors twice, in chunks of about the same size.
int chunk_tokens(const ProductKeyTopkParams& p) {
  const int64_t pairs = ceil_div(p.num_tokens, kTokens * kClusterBlocks);
  const int64_t most = std::max(multiprocessors() / (p.num_heads * kClusterBlocks), 1);
  const int64_t chunk_pairs = ceil_div(pairs, ceil_div(pairs, most));
  return static_cast<int>(kTokens * kClusterBlocks * chunk_pairs);
}

struct Workspace {
  Candidates<kGroups> candidates{};
  size_t bytes;

  explicit Workspace(const ProductKeyTopkParams& p) {
    set_capacities(p, kKeys, kKeys, &candidates);
    candidates.chunk_tokens = chunk_tokens(p);
    bytes = place_candidates(p, &candidates);
  }
};

template <typename scalar_t, int kPlanes>
Status launch(const ProductKeyTopkParams& p, Stream stream) {
  CUtensorMap query_map, key_map;
  ULTRAMEM_RETURN_IF_ERROR(make_axis_maps(p, kBoxRows, kBoxRows, &query_map, &key_map));
  const auto kernel = product_key_topk_fwd_candidates_kernel<scalar_t, kPlanes>;
  const Layout layout(p);
  const Workspace workspace(p);
  const Candidates<kGroups>& candidates = workspace.candidates;
  for (int64_t first = 0; first < p.num_tokens; first += candidates.chunk_tokens) {
    const int64_t pairs =
        ceil_div(candidates.tokens_from(first, p.num_tokens), kTokens * kClusterBlocks);
    const dim3 grid(static_cast<unsigned>(kClusterBlocks * pairs),
                    static_cast<unsigned>(2 * p.num_heads));
    ULTRAMEM_RETURN_IF_ERROR(launch_overlapping_clusters(kernel, grid, kClusterBlocks, kThreads,
                                                         layout.bytes(), stream, p, layout,
                                                         candidates, first, query_map, key_map));
    ULTRAMEM_RETURN_IF_ERROR(launch_pick(p, candidates, first, stream));
  }
  return {};
}

template <typename scalar_t>
Status launch_planes(const ProductKeyTopkParams& p, Stream stream) {
  return p.tucker_rank == 1 ? launch<scalar_t, 1>(p, stream) : launch<scalar_t, 2>(p, stream);
}

}  // namespace

bool axis_candidates_applies(const ProductKeyTopkParams& p) {
  // Where every block runs at once, two rounds of products take less time than to read queries
  // again and again, or than one block takes whose queries are in registers; and where many keys
  // are kept, selection is what takes longest elsewhere.
  const int64_t num_blocks = 2 * p.num_heads * ceil_div(p.num_tokens, kTokens);
  if (p.axis_topk <= kMaxFewKept && num_blocks > multiprocessors()) return false;
  if (p.tucker_rank > kMaxPlanes || Layout(p).num_stages < kMinStages) return false;
  // Many heads would need more; places are counted in 32 bits, too.
  constexpr size_t kMaxWorkspace = 64 << 20;
  return axis_candidates_workspace(p) <= kMaxWorkspace;
}

size_t axis_candidates_workspace(const ProductKeyTopkParams& p) { return Workspace(p).bytes; }

Status launch_axis_candidates(const ProductKeyTopkParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch_planes<__half>(p, stream)
                                    : launch_planes<__nv_bfloat16>(p, stream);
}

}  // namespace ultramem::cuda
