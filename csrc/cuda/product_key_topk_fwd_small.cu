// Product-key retrieval, forward, axis stage for few tokens on sm_90.
//
// A thread block cluster takes up to 32 tokens of one head and side, each of its blocks an equal
// share of the keys, so that these are read once and by many multiprocessors. What counts is how
// soon how many bytes of keys are on their way: every warp has a ring of its own, and waits for no
// other. A warp multiplies 16 keys of one rank with all tokens at a time (keys are the rows of the
// product, so that one token costs one tile of 8) and sends the scores to the shared memory of the
// block that looks after the token. These blocks then cut their tokens' ranks to the best m: a
// histogram says in which bin the m-th best lies, and only the few keys of that bin are compared.
//
// What comes before `wait_for_prerequisite_grid` overlaps with the kernel ahead, and touches no
// tensor but for hints that its keys be brought to the L2 cache.
//
// A score is the same sum over Kd whatever the key's place and the number of tokens.
#include <algorithm>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "key_selection.cuh"
#include "mma.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_fwd.h"
#include "sm90a.h"
#include "warp_group.cuh"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileKeys = 16;
constexpr int kSentKeys = 2;  // neighbours, sent together
constexpr int kTokenTile = 8;
constexpr int kMaxClusterTokens = 32;
constexpr int kChunk = 64;  // elements of Kd of a ring slot: one line of 128 bytes for each key
constexpr int kPieces = kChunk / 8;
constexpr int kRowBytes = kChunk * 2;
constexpr int kSlotBytes = kTileKeys * kRowBytes;
constexpr int kMaxSlots = 8;  // of a warp's ring
constexpr int kStep = 32;     // elements of Kd of one step, two products

static_assert(kTensorCore90MaxKeys <= kWarps * kMaxSets * kWarpSetKeys, "a block holds all keys");
static_assert(kWarps <= WarpGroup::kMaxWarps);

struct Plan {
  int cluster_blocks;
  int cluster_tokens;
  int block_keys;
  int key_tiles;      // of a block and rank
  int num_slots;      // of a warp's ring
  int query_stride;   // bytes
  int score_stride;   // floats
  int working_warps;  // have tiles of keys
  int own_tokens;     // tokens rank, rank + cluster_blocks, ... of the cluster are the block's own
  int num_groups;     // of warps, each with a token at a time
  int group_warps;    // share a token
  int warp_groups;    // 65536 / group_warps, rounded up
  int sets;           // of keys of a thread
  // Offsets into shared memory, the rings first.
  int query;       // [Q, cluster_tokens] rows
  int scores;      // [own_tokens, R, score_stride]
  int selections;  // [num_groups, kSelectionBytes]
  int slots;       // [num_groups, WarpGroup::kSlots]
  int barriers;    // [kWarps, kMaxSlots], then those of the query and of the scores
  int shared_bytes;
};

Plan make_plan(const ProductKeyTopkParams& p, int cluster_blocks, int cluster_tokens,
               int num_slots) {
  Plan plan{};
  plan.cluster_blocks = cluster_blocks;
  plan.cluster_tokens = cluster_tokens;
  plan.block_keys = static_cast<int>(ceil_div(p.num_keys, cluster_blocks * kSentKeys)) * kSentKeys;
  plan.key_tiles = static_cast<int>(ceil_div(plan.block_keys, kTileKeys));
  const int64_t own_chunks =
      ceil_div(p.tucker_rank * plan.key_tiles, kWarps) * ceil_div(p.key_dim, kChunk);
  plan.num_slots = static_cast<int>(std::min(int64_t{num_slots}, own_chunks));
  // 16 bytes more than whole steps: rows that are read together lie in different banks.
  plan.query_stride = static_cast<int>(ceil_div(p.key_dim, kStep)) * kStep * 2 + 16;
  plan.score_stride = static_cast<int>(ceil_div(p.num_keys, kSetKeys)) * kSetKeys;
  plan.own_tokens = static_cast<int>(ceil_div(cluster_tokens, cluster_blocks));
  // As few keys a thread as let all own tokens be worked on at once.
  for (plan.sets = 1;; plan.sets *= 2) {
    plan.group_warps = static_cast<int>(ceil_div(p.num_keys, plan.sets * kWarpSetKeys));
    if (plan.own_tokens * plan.group_warps <= kWarps || plan.sets == kMaxSets) break;
  }
  plan.num_groups = std::min(plan.own_tokens, kWarps / plan.group_warps);
  plan.warp_groups = (65536 + plan.group_warps - 1) / plan.group_warps;

  plan.working_warps = std::min(kWarps, p.tucker_rank * plan.key_tiles);
  SharedLayout layout;
  layout.take(int64_t{plan.working_warps} * plan.num_slots * kSlotBytes);
  plan.query = layout.take(int64_t{p.num_queries} * cluster_tokens * plan.query_stride);
  plan.scores = layout.take(int64_t{4} * plan.own_tokens * p.tucker_rank * plan.score_stride);
  plan.selections = layout.take(int64_t{kSelectionBytes} * plan.num_groups);
  plan.slots = layout.take(int64_t{4} * plan.num_groups * WarpGroup::kSlots);
  plan.barriers = layout.take(8 * (kWarps * kMaxSlots + 2));
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(layout.bytes(), 0x7fffffff));
  return plan;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a block works on.
struct Block {
  __device__ Block(const ProductKeyTopkParams& p, const Plan& plan, unsigned char* shared)
      : shared(shared) {
    rank = static_cast<int>(cluster_rank());
    cluster_bits = __ffs(plan.cluster_blocks) - 1;
    head_side = static_cast<int>(blockIdx.x) >> cluster_bits;
    first_token = static_cast<int64_t>(blockIdx.y) * plan.cluster_tokens;
    num_tokens = static_cast<int>(min(p.num_tokens - first_token, int64_t{plan.cluster_tokens}));
    first_key = rank * plan.block_keys;
    num_keys = max(min(static_cast<int>(p.num_keys) - first_key, plan.block_keys), 0);
    query = shared_address(shared + plan.query);
    scores = reinterpret_cast<float*>(shared + plan.scores);
    barriers = shared_address(shared + plan.barriers);
    query_barrier = barriers + kWarps * kMaxSlots * 8;
    score_barrier = query_barrier + 8;
    own_tokens = (num_tokens - rank + plan.cluster_blocks - 1) >> cluster_bits;
  }

  __device__ int64_t output_row(const ProductKeyTopkParams& p, int token) const {
    return ((first_token + token) * p.num_heads + head_side / 2) * 2 + head_side % 2;
  }

  unsigned char* shared;
  int cluster_bits;
  int rank;       // in the cluster
  int head_side;  // 2 * head + side
  int64_t first_token;
  int num_tokens;
  int first_key;
  int num_keys;
  uint32_t query;
  float* scores;
  uint32_t barriers;
  uint32_t query_barrier;
  uint32_t score_barrier;
  int own_tokens;
};

// x / by for x < kMaxTuckerRank * by, sooner than by a division.
__device__ __forceinline__ int small_quotient(int x, int by) {
  int quotient = 0;
#pragma unroll
  for (int i = 1; i < kMaxTuckerRank; ++i) quotient += x >= i * by;
  return quotient;
}

// The first of the warps that copy the query: those that have no keys to copy, or else all.
__device__ __forceinline__ int query_warp(const Plan& plan) { return plan.working_warps % kWarps; }

// All rows of the query, with zeros behind Kd as far as steps go.
template <typename scalar_t>
__device__ __forceinline__ void copy_query(const ProductKeyTopkParams& p, const Plan& plan,
                                           const Block& block, int warp, int lane) {
  const int first_warp = query_warp(plan);
  if (warp < first_warp) return;
  const auto* query = static_cast<const scalar_t*>(p.query);
  const auto key_dim = static_cast<int>(p.key_dim);
  const int row_pieces = (plan.query_stride - 16) / 16;
#pragma unroll 1
  for (int row = warp - first_warp; row < p.num_queries * block.num_tokens;
       row += kWarps - first_warp) {
    const int q = small_quotient(row, block.num_tokens);
    const int token = row - q * block.num_tokens;
    const int64_t head_row =
        ((block.first_token + token) * 2 + block.head_side % 2) * p.num_heads + block.head_side / 2;
    const scalar_t* from = query + (head_row * p.num_queries + q) * key_dim;
#pragma unroll 1
    for (int piece = lane; piece < row_pieces; piece += kWarpSize) {
      const bool valid = piece * 8 < key_dim;
      cp_async_16(block.query + row * plan.query_stride + piece * 16,
                  valid ? from + piece * 8 : query, valid);
    }
  }
  mbarrier_arrive_after_copies(block.query_barrier);
}

// A warp's tiles of keys, (rank, 16 keys), one after the other in chunks of Kd. Addresses are kept
// and not computed: what a copy takes in instructions decides how soon all are on their way.
template <typename scalar_t>
class KeyStream {
 public:
  __device__ __forceinline__ KeyStream(const ProductKeyTopkParams& p, const Plan& plan,
                                       const Block& block, int warp, int lane)
      : p_(p), plan_(plan), block_(block), tile_(warp), lane_row_(lane / kPieces) {
    key_dim_ = static_cast<int>(p.key_dim);
    lane_column_ = lane % kPieces * 8;
    // Which piece of a row stands where depends on half the row, so that rows that are read
    // together, every other one, lie in different banks. Here for row lane_row; 4 below, it is 2
    // pieces away.
    place_ = lane_row_ * kRowBytes + (lane % kPieces ^ lane_row_ / 2) * 16;
    start_tile();
  }

  // Copies the next chunk, if there is one.
  __device__ __forceinline__ void copy_next(uint32_t slot, uint32_t barrier) {
    if (tile_ >= p_.tucker_rank * plan_.key_tiles) return;
    const bool valid = column_ < key_dim_;
    const scalar_t* from = from_;
#pragma unroll
    for (int i = 0; i < kTileKeys / kLaneRows; ++i) {
      const int place = place_ ^ i * kLaneRows / 2 * 16;
      if (i < num_rows_) cp_async_16(slot + i * kLaneRows * kRowBytes + place, from, valid);
      from += kLaneRows * key_dim_;
    }
    mbarrier_arrive_after_copies(barrier);
    from_ += kChunk;
    column_ += kChunk;
    if (column_ - lane_column_ >= key_dim_) {
      tile_ += kWarps;
      start_tile();
    }
  }

 private:
  static constexpr int kLaneRows = kWarpSize / kPieces;  // rows that a warp copies at once
  static_assert(kLaneRows == 4);

  __device__ __forceinline__ void start_tile() {
    const int rank = small_quotient(tile_, plan_.key_tiles);
    const int first_row = (tile_ - rank * plan_.key_tiles) * kTileKeys + lane_row_;
    num_rows_ = (block_.num_keys - first_row + kLaneRows - 1) / kLaneRows;
    column_ = lane_column_;
    const int64_t row = (int64_t{block_.head_side} * p_.tucker_rank + rank) * p_.num_keys +
                        block_.first_key + first_row;
    from_ = static_cast<const scalar_t*>(p_.keys) + row * key_dim_ + column_;
  }

  const ProductKeyTopkParams& p_;
  const Plan& plan_;
  const Block& block_;
  int tile_;  // of the next chunk to copy
  int lane_row_;
  int lane_column_;
  int place_;
  int key_dim_;
  // Of this lane: rows of the tile (any number below 1 where it has none), and what comes next.
  int num_rows_;
  int column_;
  const scalar_t* from_;
};

// Sends the scores of a tile to the blocks that look after the tokens: row i of the product is key
// 2 i of the tile, row 8 + i the next. A pair at the end of the keys may have one too many.
template <int kTokenTiles>
__device__ __forceinline__ void send_scores(const ProductKeyTopkParams& p, const Plan& plan,
                                            const Block& block, int rank, int first_row, int lane,
                                            const float (&acc)[kTokenTiles][4]) {
  const int key = first_row + lane / 4 * kSentKeys;
  if (key >= block.num_keys) return;
  const uint32_t to =
      shared_address(block.scores) + (rank * plan.score_stride + block.first_key + key) * 4;
  const int token_bytes = p.tucker_rank * plan.score_stride * 4;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = tile * kTokenTile + lane % 4 * 2 + e;
      if (token >= block.num_tokens) continue;
      const auto owner = static_cast<uint32_t>(token & (plan.cluster_blocks - 1));
      store_async(address_in_block(to + (token >> block.cluster_bits) * token_bytes, owner),
                  float2{acc[tile][e], acc[tile][2 + e]},
                  address_in_block(block.score_barrier, owner));
    }
  }
}

template <typename scalar_t, int kTokenTiles>
__device__ __forceinline__ void multiply(const ProductKeyTopkParams& p, const Plan& plan,
                                         const Block& block, KeyStream<scalar_t>& stream,
                                         uint32_t ring, uint32_t barriers, int warp, int lane) {
  const auto key_dim = static_cast<int>(p.key_dim);
  int slot = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int tile = warp; tile < p.tucker_rank * plan.key_tiles; tile += kWarps) {
    const int rank = small_quotient(tile, plan.key_tiles);
    const int first_row = (tile - rank * plan.key_tiles) * kTileKeys;
    // Rows and tokens past the end: the last again, and what comes of it is not used.
    const int row =
        min(lane % 8 * kSentKeys + lane / 8 % 2, max(block.num_keys - first_row - 1, 0));
    const int swizzle = (lane / 16 ^ row / 2) * 16;
    const int query_row = p.num_queries == 1 ? 0 : rank * block.num_tokens;
    uint32_t queries[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int token = min(t * kTokenTile + lane % 8, block.num_tokens - 1);
      queries[t] = block.query + (query_row + token) * plan.query_stride + lane / 8 * 16;
    }
    float acc[kTokenTiles][4] = {};
#pragma unroll 1
    for (int column = 0; column < key_dim; column += kChunk) {
      const uint32_t keys = ring + slot * kSlotBytes + row * kRowBytes;
      mbarrier_wait(barriers + slot * 8, parity);
#pragma unroll
      for (int step = 0; step < kChunk / kStep; ++step) {
        if (column + step * kStep >= key_dim) break;
        uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ldmatrix_x4(a[half], keys + (swizzle ^ (step * 64 + half * 32)));
        }
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          uint32_t b[4];
          ldmatrix_x4(b, queries[t] + (column + step * kStep) * 2);
          mma_m16n8k16<scalar_t>(acc[t], a[0], b[0], b[1]);
          mma_m16n8k16<scalar_t>(acc[t], a[1], b[2], b[3]);
        }
      }
      __syncwarp();
      stream.copy_next(ring + slot * kSlotBytes, barriers + slot * 8);
      if (++slot == plan.num_slots) {
        slot = 0;
        parity ^= 1;
      }
    }
    send_scores<kTokenTiles>(p, plan, block, rank, first_row, lane, acc);
  }
}

// ---- the best m of a token --------------------------------------------------------------------

template <int kSets>
__device__ __forceinline__ void rank_keys(const ProductKeyTopkParams& p, const Plan& plan,
                                          const float* scores, const float (&filter)[4],
                                          OwnKeys<kSets>& own) {
  const auto num_keys = static_cast<int>(p.num_keys);
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int key = own.first + set * own.stride;
    float sums[kSetKeys] = {};
    if (key < num_keys) {
#pragma unroll
      for (int r = 0; r < kMaxTuckerRank; ++r) {
        if (r >= p.tucker_rank) break;
        float of_rank[kSetKeys];
        load_floats<kSetKeys>(scores + r * plan.score_stride + key, of_rank);
#pragma unroll
        for (int e = 0; e < kSetKeys; ++e) {
          sums[e] =
              r == 0 ? __fmul_rn(filter[0], of_rank[e]) : __fmaf_rn(filter[r], of_rank[e], sums[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kSetKeys; ++e) {
      own.ranks[set * kSetKeys + e] = key + e < num_keys ? sortable(sums[e]) : 0;
    }
  }
}

template <int kSets>
__device__ __forceinline__ void select(const ProductKeyTopkParams& p, const Plan& plan,
                                       const Block& block, const float (&filter)[4], int warp,
                                       int lane) {
  const int group_index = warp * plan.warp_groups >> 16;
  if (group_index >= plan.num_groups) return;
  mbarrier_wait_cluster(block.score_barrier, 0);
  const int group_warp = warp - group_index * plan.group_warps;
  // Named barrier 0 is the block's.
  WarpGroup group(
      reinterpret_cast<uint32_t*>(block.shared + plan.slots) + group_index * WarpGroup::kSlots,
      1 + group_index, group_warp, plan.group_warps);
  const Selection selection(block.shared + plan.selections + group_index * kSelectionBytes);
  const int m = p.axis_topk;
#pragma unroll 1
  for (int own_token = group_index; own_token < block.own_tokens; own_token += plan.num_groups) {
    const float* scores = block.scores + own_token * p.tucker_rank * plan.score_stride;
    OwnKeys<kSets> own;
    own.first = group_warp * kWarpSetKeys + lane * kSetKeys;
    own.stride = plan.group_warps * kWarpSetKeys;
    rank_keys(p, plan, scores, filter, own);
    const uint32_t best =
        find_best(own, static_cast<uint32_t>(m), static_cast<int>(p.num_keys), selection,
                  group_warp, lane, plan.group_warps * kWarpSize, group);
    const Places<kSets> places(best, group_warp, lane, group);
    const int64_t row = block.output_row(p, (own_token << block.cluster_bits) + block.rank);
    int32_t* ids = p.axis_indices + row * m;
    float* kept_scores = static_cast<float*>(p.axis_scores) + row * p.tucker_rank * m;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      uint32_t place = places.first[set];
#pragma unroll 1
      for (uint32_t bits = best >> 4 * set & 0xfu; bits != 0; bits &= bits - 1) {
        const int key = own.key(set * kSetKeys) + __ffs(static_cast<int>(bits)) - 1;
        ids[place] = key;
        for (int r = 0; r < p.tucker_rank; ++r) {
          kept_scores[r * m + place] = scores[r * plan.score_stride + key];
        }
        ++place;
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// kTokenTiles tiles of 8 tokens. Grid: a cluster for each head and side (x) and group of tokens
// (y).
template <typename scalar_t, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_fwd_axis_small_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                           const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const Block block(p, plan, shared_bytes);
  const uint32_t ring = shared_address(shared_bytes) + warp * plan.num_slots * kSlotBytes;
  const uint32_t barriers = block.barriers + warp * kMaxSlots * 8;
  if (thread < p.tucker_rank && block.num_keys > 0) {
    const int64_t row =
        (int64_t{block.head_side} * p.tucker_rank + thread) * p.num_keys + block.first_key;
    const uint32_t bytes = block.num_keys * static_cast<uint32_t>(p.key_dim) * 2;
    prefetch_to_l2(static_cast<const scalar_t*>(p.keys) + row * p.key_dim,
                   min(bytes, kMaxPrefetchBytes));
  }
  if (lane == 0) {
#pragma unroll 1
    for (int slot = 0; slot < plan.num_slots; ++slot) mbarrier_init(barriers + slot * 8, kWarpSize);
    if (warp == 0) {
      mbarrier_init(block.query_barrier, kThreads - query_warp(plan) * kWarpSize);
      mbarrier_init(block.score_barrier, 1);
      mbarrier_init_fence();
      const int sent_keys = (static_cast<int>(p.num_keys) + kSentKeys - 1) / kSentKeys * kSentKeys;
      mbarrier_expect_bytes(
          block.score_barrier,
          static_cast<uint32_t>(block.own_tokens * p.tucker_rank * sent_keys * 4));
    }
  }
  __syncwarp();
  cluster_arrive_relaxed();
  __syncthreads();
  wait_for_prerequisite_grid();
  // Not before: what the next kernel finds then is also what the kernels ahead of this one wrote.
  release_dependent_grid();
  copy_query<scalar_t>(p, plan, block, warp, lane);
  KeyStream<scalar_t> stream(p, plan, block, warp, lane);
#pragma unroll 1
  for (int slot = 0; slot < plan.num_slots; ++slot) {
    stream.copy_next(ring + slot * kSlotBytes, barriers + slot * 8);
  }

  float filter[kMaxTuckerRank] = {};
#pragma unroll
  for (int r = 0; r < kMaxTuckerRank; ++r) {
    if (p.mode == ScoreMode::kAdditive) {
      filter[r] = 1.0f;
    } else if (r < p.tucker_rank) {
      const auto* vector = static_cast<const float*>(block.head_side % 2 == 0 ? p.u : p.t);
      filter[r] = vector[block.head_side / 2 * p.tucker_rank + r];
    }
  }
  cluster_wait();  // all blocks run: their shared memory may be written
  mbarrier_wait(block.query_barrier, 0);
  multiply<scalar_t, kTokenTiles>(p, plan, block, stream, ring, barriers, warp, lane);
  // Nobody sends to a block without tokens.
  if (block.own_tokens <= 0) return;
  if (plan.sets == 1) {
    select<1>(p, plan, block, filter, warp, lane);
  } else if (plan.sets == 2) {
    select<2>(p, plan, block, filter, warp, lane);
  } else {
    select<kMaxSets>(p, plan, block, filter, warp, lane);
  }
#endif
}

// ---- choosing and launching -------------------------------------------------------------------

// What a block of the largest cluster may have.
struct Room {
  int clusters = 0;        // at once
  int cluster_blocks = 0;  // 0 where there are no clusters
  int shared_bytes = 0;
};

Room find_room() {
  static ClusterLimitsCache known;
  if (!sm90a_available()) return {};
  const ClusterLimits limits =
      cluster_limits(product_key_topk_fwd_axis_small_kernel<__nv_bfloat16, 4>, kThreads, known);
  if (limits.large > 0) return {limits.large, kLargeCluster, limits.shared_bytes};
  return {limits.portable, limits.portable > 0 ? kPortableCluster : 0, limits.shared_bytes};
}

// As many tokens a cluster as leave room for half a ring, or fewer where more clusters find room at
// once; then as long a ring as there is room for. A single token always fits.
Plan choose_plan(const ProductKeyTopkParams& p, const Room& room) {
  const auto ring_tokens = [&](int slots) {
    for (int tokens = kMaxClusterTokens; tokens > 1; tokens /= 2) {
      if (tokens >= 2 * p.num_tokens) continue;
      if (make_plan(p, room.cluster_blocks, tokens, slots).shared_bytes <= room.shared_bytes)
        return tokens;
    }
    return 1;
  };
  const int64_t groups =
      std::max(ceil_div(p.num_tokens, ring_tokens(kMaxSlots / 2)),
               std::min(ceil_div(p.num_tokens, kTokenTile),
                        static_cast<int64_t>(room.clusters / (2 * p.num_heads))));
  const auto tokens = static_cast<int>(ceil_div(p.num_tokens, groups));
  int slots = kMaxSlots;
  while (slots > 1 &&
         make_plan(p, room.cluster_blocks, tokens, slots).shared_bytes > room.shared_bytes) {
    --slots;
  }
  return make_plan(p, room.cluster_blocks, tokens, slots);
}

template <typename scalar_t, int kTokenTiles>
Status launch(const ProductKeyTopkParams& p, const Plan& plan, Stream stream) {
  const dim3 blocks(static_cast<unsigned>(2 * p.num_heads * plan.cluster_blocks),
                    static_cast<unsigned>(ceil_div(p.num_tokens, plan.cluster_tokens)));
  return launch_overlapping_clusters(product_key_topk_fwd_axis_small_kernel<scalar_t, kTokenTiles>,
                                     blocks, plan.cluster_blocks, kThreads, plan.shared_bytes,
                                     stream, p, plan);
}

template <typename scalar_t>
Status launch_tiled(const ProductKeyTopkParams& p, Stream stream) {
  const Plan plan = choose_plan(p, find_room());
  if (plan.cluster_tokens <= kTokenTile) return launch<scalar_t, 1>(p, plan, stream);
  if (plan.cluster_tokens <= 2 * kTokenTile) return launch<scalar_t, 2>(p, plan, stream);
  return launch<scalar_t, 4>(p, plan, stream);
}

#define ULTRAMEM_REGISTER_SMALL(id, name, scalar_t, tiles)                            \
  ULTRAMEM_REGISTER_KERNEL(id, "product_key_topk_fwd_axis_small<" name ">", kThreads, \
                           product_key_topk_fwd_axis_small_kernel<scalar_t, tiles>)
ULTRAMEM_REGISTER_SMALL(bf16_8, "bf16, 8 tokens", __nv_bfloat16, 1);
ULTRAMEM_REGISTER_SMALL(bf16_16, "bf16, 16 tokens", __nv_bfloat16, 2);
ULTRAMEM_REGISTER_SMALL(bf16_32, "bf16, 32 tokens", __nv_bfloat16, 4);
ULTRAMEM_REGISTER_SMALL(f16_8, "fp16, 8 tokens", __half, 1);
ULTRAMEM_REGISTER_SMALL(f16_16, "fp16, 16 tokens", __half, 2);
ULTRAMEM_REGISTER_SMALL(f16_32, "fp16, 32 tokens", __half, 4);

}  // namespace

bool axis_small_applies(const ProductKeyTopkParams& p) {
  constexpr int kSm90 = 90;
  return is_aligned(p.query) && is_aligned(p.keys) &&
         product_key_topk_fwd_path(p, kSm90) == RetrievalPath::kTensorCore90Small &&
         find_room().cluster_blocks > 0;
}

Status launch_axis_small(const ProductKeyTopkParams& params, Stream stream) {
  if (params.dtype == DType::kFloat16) return launch_tiled<__half>(params, stream);
  return launch_tiled<__nv_bfloat16>(params, stream);
}

}  // namespace ultramem::cuda
