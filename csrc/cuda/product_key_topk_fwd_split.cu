// Product-key retrieval, forward, axis stage for R = 2 on the tensor cores of sm_90: all keys that
// may be among a token's best m (product_key_candidates.cuh), from which another kernel picks.
//
// The two blocks of a cluster have the same 128 tokens of one head and side, and a rank each: its
// queries fit in shared memory, and a key that arrives there is multiplied with 128 of them. Of
// every tile of 128 keys a block then looks at 64, for which the other sends it the scores of its
// rank. Warps that multiply do nothing else: they pass scores on, a part at a time, to warps that
// select, of their own block and of the other.
//
// Keys pass twice, at first a sample of them (product_key_sample.h). In the first round each block
// keeps, for every token and column of two of its tiles, the maximum rank. In the second the keys
// that pass a bound go to the block's list of the token. The bound is guessed from the maxima of
// both blocks. Where it turns out that their lists have less than m keys of some token, both do the
// token's tile once more when all else is done, and for sure: some of a block's maxima above some
// number, and of the other's above another, m in all, are m different keys, so the lesser of both
// numbers bounds the m-th best key from below.
//
// Clusters take up one work after the other, a tile of tokens of a head and side. Where some have
// none in the last turn, their multiprocessors already pick from works that are complete for good.
//
// A list without room for more is cut down to its best m, and bounds from then on, too: every order
// of scores comes out right. Sorted scores take somewhat longer than others, NaN and scores in step
// with the sample several times as long.
// Where so many maxima are above the number that lists would hardly have room, as with equal
// scores, blocks compare their lists after the first tiles: the least rank in both lists of m/2
// keys bounds what comes later.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>

#include "kernel_registry.h"
#include "product_key_axis_launch.h"
#include "product_key_split.cuh"
#include "product_key_split_selector.cuh"
#include "product_key_topk_fwd.h"
#include "wgmma.cuh"

namespace ultramem::cuda {
namespace {

using namespace split;

constexpr int kCopiers = 128;  // threads, of which one copies, of a warpgroup of its own
constexpr int kThreads = 2 * kMultipliers + kCopiers;
constexpr int kSelectorBarrier = 1;
// Warps that multiply hold a part where there is one slot for parts.
__host__ __device__ constexpr int multiplier_registers(int boxes) {
  return num_slots(boxes) == 1 ? 112 : 96;
}
__host__ __device__ constexpr int selector_registers(int boxes) {
  return 224 - multiplier_registers(boxes);
}
constexpr int kCopierRegisters = 32;

// Places of a list: of such lists a smaller kernel picks, and no more can be cut.
constexpr int kSmallList = 128, kMaxList = kMaxListEntries * kWarpSize;

// How the keys pass, and places of lists for what is found.
struct Schedule {
  Rounds rounds[2];  // at first, and of works where a bound turned out to be wrong
  int capacity;

  Schedule(int64_t num_keys, int m) {
    auto& [guessing, exact] = rounds;
    exact.second = static_cast<int>(ceil_div(num_keys, kKeys));
    // For a certain bound. Part of the keys bound less well, but a few more above the bound cost
    // less than keys that are multiplied twice. The more are kept, the more there would be above a
    // bound by few: nine tenths of the keys at 128. Of one tile, half of the columns would have no
    // maxima.
    const double share = 0.42 + 0.48 * std::max(m - 32, 0) / 96;
    exact.first = std::min(std::max(static_cast<int>(std::lround(share * exact.second)), 2),
                           Sample::most_tiles(num_keys));
    if (exact.first < 2) exact.first = 0;
    exact.least = m;
    exact.exact = true;
    exact.sample = Sample(num_keys, exact.first);
    const double sampled = static_cast<double>(std::max(exact.first, 1)) / exact.second;
    const double found = keys_above_maxima(m, kColumns, kBlocks) / sampled;
    double room = found + 8 * std::sqrt(found);

    // No more than are picked from by a smaller kernel, if so few will do. Another tile takes about
    // as long as a dozen keys of each token.
    constexpr double kTileKeys = 12;
    const int limit = m <= kSmallList / 2 ? kSmallList : kMaxList;
    guessing = exact;
    double guessed = static_cast<double>(num_keys) + kTileKeys;  // keys above the bound
    for (int first = 2; first < exact.first; ++first) {
      const GuessedBound bound(num_keys, m, kKeys, first, kColumnSets);
      const double guessed_room = bound.room(1.0 / kBlocks);
      if (!(guessed_room <= limit)) continue;
      if (!(bound.found() < guessed - kTileKeys)) break;
      guessed = bound.found();
      guessing = {first, exact.second, static_cast<int>(std::ceil(bound.maxima)), false,
                  Sample(num_keys, first)};
      room = guessed_room;
    }
    // So that a list of m has room for what comes at once. A bound that is certain lets more pass:
    // of works that are done again lists may be cut.
    room = std::max(room, static_cast<double>(m + kPartKeys));
    const double all = exact.second * kOwnKeys;
    capacity = std::min(list_capacity(std::min(room, all)), limit);
  }

  // Worked out once for calls that follow each other: it takes microseconds.
  static const Schedule& of(const ProductKeyTopkParams& p) {
    struct Last {
      int64_t num_keys;
      int m;
      Schedule schedule;
    };
    thread_local std::optional<Last> last;
    if (!last || last->num_keys != p.num_keys || last->m != p.axis_topk) {
      last = Last{p.num_keys, p.axis_topk, Schedule(p.num_keys, p.axis_topk)};
    }
    return last->schedule;
  }
};

// What there is to do in a chunk of so many tokens.
struct Plan {
  Rounds rounds[2];
  int tiles;  // of tokens
  int works;

  Plan(const ProductKeyTopkParams& p, int64_t num_tokens) {
    const Schedule& schedule = Schedule::of(p);
    std::copy(std::begin(schedule.rounds), std::end(schedule.rounds), rounds);
    tiles = static_cast<int>(ceil_div(num_tokens, kTokens));
    works = 2 * p.num_heads * tiles;
  }
};

// Tensor maps; of samples, that of the first time and that of works that are done again.
struct Maps {
  CUtensorMap queries, keys, samples[2];

  Status make(const ProductKeyTopkParams& p) {
    ULTRAMEM_RETURN_IF_ERROR(make_axis_maps(p, kTokens, kOwnKeys, &queries, &keys));
    for (int i = 0; i < 2; ++i) {
      ULTRAMEM_RETURN_IF_ERROR(make_sample_map(p, Schedule::of(p).rounds[i].sample, &samples[i]));
    }
    return {};
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Whether a work has to be done at first, or again.
template <int kBoxes>
__device__ __forceinline__ bool has_to_be_done(const Shared<kBoxes>& shared, Work work,
                                               bool again) {
  return !again || shared.is_marked(work.number);
}

// By a warp of each block: of none of its works is anything known.
__device__ __forceinline__ void clear_states(const EarlyWorks& early, int lane) {
  for (Work work{0}; work.index() < early.count; ++work.number) {
    if (lane < EarlyWorks::kGroups) {
      early.of_work(work.index(), kBlocks)[lane * kBlocks + cluster_rank()] = EarlyWorks::kUnknown;
    }
  }
  // Who picks reads them without waiting for this kernel, once it may begin.
  __threadfence();
  __syncwarp();
}

// Copies the block's queries, and keys of its rank in both rounds, for all its work. What a block
// looks at comes first in its tiles. `again`: 0 or, for works that are done again, 1; as a bool it
// would be a register too many.
template <int kBoxes>
__device__ __forceinline__ void copy_all(const ProductKeyTopkParams& p, const Plan& plan,
                                         const Shared<kBoxes>& shared, const Maps& maps,
                                         int64_t first_chunk_token, int again,
                                         RingCursor<kStages>& at) {
  const Rounds& rounds = plan.rounds[again];
#pragma unroll 1
  for (Work work{0}; work.index() < plan.works; ++work.number) {
    if (!has_to_be_done(shared, work, again != 0)) continue;
    const auto rank = static_cast<int>(cluster_rank());  // not kept: a register too many
    const int head_side = work.head_side(plan.tiles);
    const int query_plane = (head_side % 2 * p.num_heads + head_side / 2) * p.num_queries +
                            (p.num_queries > 1 ? rank : 0);
    const auto first_token =
        static_cast<int>(first_chunk_token + work.first_chunk_token(plan.tiles));
    const auto copy_queries = [&](int box) {
      mbarrier_expect_bytes(shared.queries_there(box), kQueryBoxBytes);
      copy_box_once(&maps.queries, shared.queries(box), shared.queries_there(box),
                    box * kBoxColumns, first_token, query_plane);
    };
#pragma unroll 1
    for (int tile = 0; tile < rounds.tiles(); ++tile) {
      const bool is_first = tile < rounds.first;
      const CUtensorMap* map = is_first ? &maps.samples[again] : &maps.keys;
      // Where the keys of the first block begin, and how far from there those of the other.
      const int row = is_first ? 0 : (tile - rounds.first) * kKeys;
      const int block_rows = is_first ? 0 : kOwnKeys;
      int plane = head_side * kPlanes + rank;
      int block_planes = 0;
      if (is_first) {
        plane = plane * static_cast<int>(p.num_keys) + rounds.sample.first_key(tile);
        block_planes = rounds.sample.block_keys();
      }
#pragma unroll 1
      for (int box = 0; box < kBoxes; ++box) {
        mbarrier_wait(shared.empty(at.place), at.parity ^ 1);
        // What was multiplied last from this stage were the queries of the work before, of this
        // box and of the one that is a turn of the ring further on.
        if (tile == 0 && box < kStages) copy_queries(box);
        const uint32_t full = shared.full(at.place);
        mbarrier_expect_bytes(full, kStageBytes);
#pragma unroll
        for (int half = 0; half < kBlocks; ++half) {
          const int block = half ^ rank;
          copy_box(map, shared.stage(at.place) + half * kHalfStageBytes, full, box * kBoxColumns,
                   row + block * block_rows, plane + block * block_planes);
        }
        at.advance();
        // The others before the ring makes this wait.
        if (tile == 0 && box + 1 == kStages) {
#pragma unroll 1
          for (int other = kStages; other < kBoxes; ++other) copy_queries(other);
        }
      }
    }
  }
}

// Multiplies all tiles, so many for each work, by a warp that does so with the others of its
// warpgroup. `tile` and `work` count them.
template <typename scalar_t, int kBoxes>
__device__ __forceinline__ void multiply_all(const Shared<kBoxes>& shared, int num_works,
                                             int work_tiles, int warp, int lane, int& tile,
                                             int& work) {
  constexpr bool kHolds = num_slots(kBoxes) == 1;
  // A tile's boxes go round the ring a whole number of times.
  constexpr int kTurns = kBoxes / kStages;
  static_assert(kBoxes % kStages == 0 && (kTurns == 1 || kTurns == 2));
  const Sender<kBoxes> sender(shared, warp, lane);
  const uint64_t queries = tile_descriptor(shared.queries(0) + warp / 4 * kGroupTokens * kRowBytes);
  const uint64_t keys = tile_descriptor(shared.stage(0));
  // Each warp for itself: that its share of a product is complete says nothing of the others'.
  const auto release = [&](int stage) {
    if (lane == 0) mbarrier_arrive(shared.empty(stage));
  };
  // Of the keys that this block looks at, then of those that the other does.
  float sums[kTileScores];
#pragma unroll
  for (int i = 0; i < kTileScores; ++i) sums[i] = 0.0f;
  float held[kBlocks][kPartScores];  // the second part, until the first was read
  int left = work_tiles;             // of the work's tiles
#pragma unroll 1
  for (int i = 0; i < num_works * work_tiles; ++i, ++tile) {
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      // Half a tile is the selectors' time for each part.
      if (kHolds && turn == 1 && i > 0) sender.template send<1>(tile - 1, held[0], held[1]);
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        if (left == work_tiles) {
          mbarrier_wait(shared.queries_there(turn * kStages + stage), work & 1);
        }
        mbarrier_wait(shared.full(stage), kTurns == 2 ? turn : tile & 1);
        const uint64_t query_tile = queries + (turn * kStages + stage) * (kQueryBoxBytes / 16);
        multiply_boxes<scalar_t>(sums, query_tile, keys + stage * (kStageBytes / 16),
                                 turn + stage > 0);
        if (turn + stage > 0) {
          wgmma_wait<1>();
          release((stage + kStages - 1) % kStages);
        }
      }
    }
    wgmma_wait<0>();
    wgmma_results(sums);
    release((kBoxes - 1) % kStages);
    sender.template send<0>(tile, sums, sums + kTileScores / 2);
    if constexpr (kHolds) {
#pragma unroll
      for (int i = 0; i < kPartScores; ++i) {
        held[0][i] = sums[kPartScores + i];
        held[1][i] = sums[kTileScores / 2 + kPartScores + i];
        // A copy in any case: sums that stay where they are would leave no room for the next.
        asm volatile("" : "+f"(held[0][i]), "+f"(held[1][i]));
      }
    } else {
      sender.template send<1>(tile, sums + kPartScores, sums + kTileScores / 2 + kPartScores);
    }
    if (--left == 0) {
      left = work_tiles;
      ++work;
    }
  }
  if constexpr (kHolds) {
    sender.template send<1>(tile - 1, held[0], held[1]);
  }
}

// The end of all works, for all threads: no block may leave while the other still sends to it or
// arrives at its barriers. Whether those that are marked have to be done again.
template <int kBoxes>
__device__ __forceinline__ bool goes_on(const Shared<kBoxes>& shared, bool again, int lane) {
  __syncwarp();
  cluster_sync();
  return !again && __any_sync(kFullMask, load_shared_u32(shared.marks(lane % kMarkWords)) != 0);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Grid: the blocks of clusters, which share out the chunk's tiles of tokens of all heads and sides.
template <typename scalar_t, int kBoxes>
__global__ void __launch_bounds__(kThreads, 1)
    product_key_topk_fwd_split_kernel(const __grid_constant__ ProductKeyTopkParams p,
                                      const __grid_constant__ Plan plan,
                                      const __grid_constant__ Candidates<kBlocks, true> candidates,
                                      int64_t first_chunk_token, bool filter_ahead,
                                      const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];  // as swizzled tiles are
  const Shared<kBoxes> shared{shared_address(shared_bytes)};
  const int warp = warp_number();
  const int lane = threadIdx.x % kWarpSize;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), kWarps);
    }
    for (int box = 0; box < kBoxes; ++box) mbarrier_init(shared.queries_there(box), 1);
    for (int i = 0; i < kWarps; ++i) {
      for (int slot = 0; slot < shared.kSlots; ++slot) {
        // By who sends and who expects, and by who reads here and there.
        mbarrier_init(shared.part_there(slot, i), kWarpSize + 1);
        mbarrier_init(shared.part_read(slot, i), kWarpSize + 1);
      }
      mbarrier_init(shared.bounds_there(i), 1);
      mbarrier_init(shared.counts_there(i), 1);
    }
    for (int i = 0; i < kWarps; ++i) store_shared_u32(shared.words(i), 0);
    for (int word = 0; word < kMarkWords; ++word) store_shared_u32(shared.marks(word), 0);
    mbarrier_init_fence();
    prefetch_tensor_map(&maps.queries);
    prefetch_tensor_map(&maps.keys);
    prefetch_tensor_map(&maps.samples[0]);
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();
  // What is copied is there if the filter alone is not.
  if (!filter_ahead || warp < 2 * kWarps) wait_for_prerequisite_grid();
  if (warp == kWarps) {
    clear_states(candidates.early, lane);
    // In this order: what the grid stage reads before it waits must be there when it begins, and no
    // work may seem to be complete.
    release_dependent_grid();
  }
  if (warp / kWarps == 1) named_barrier_sync(kSelectorBarrier, kMultipliers);  // states are cleared

  if (warp >= 2 * kWarps) {
    give_up_registers<kCopierRegisters>();
    RingCursor<kStages> at;
    int again = 0;
    while (true) {
      if (threadIdx.x == 2 * kMultipliers) {
        copy_all(p, plan, shared, maps, first_chunk_token, again, at);
      }
      if (!goes_on(shared, again != 0, lane)) break;
      again = 1;
    }
  } else if (warp >= kWarps) {
    take_registers<selector_registers(kBoxes)>();
    Selector<kBoxes> selector(p, shared, plan.rounds, candidates, warp_number() - kWarps, lane);
    while (true) {
#pragma unroll 1
      for (selector.set_work(0); selector.work().index() < plan.works;
           selector.set_work(selector.work().number + 1)) {
        const Work work = selector.work();
        if (!has_to_be_done(shared, work, selector.again())) continue;
        const int chunk_token =
            work.first_chunk_token(plan.tiles) + (warp_number() - kWarps) * kWarpTokens;
        const int64_t left = p.num_tokens - first_chunk_token - chunk_token;
        selector.run(work.head_side(plan.tiles), chunk_token,
                     static_cast<int>(min(int64_t{kTokens}, left)));
      }
      selector.finish();
      if (!goes_on(shared, selector.again(), lane)) break;
      selector.begin_again();
    }
  } else {
    take_registers<multiplier_registers(kBoxes)>();
    // Counts works, before any is done again below 0: another register would be one too many.
    int work = -(1 << 30), tile = 0;
    while (true) {
      int num_works = 0;
      for (Work of_cluster{0}; of_cluster.index() < plan.works; ++of_cluster.number) {
        num_works += has_to_be_done(shared, of_cluster, work >= 0);
      }
      multiply_all<scalar_t>(shared, num_works, plan.rounds[work >= 0 ? 1 : 0].tiles(),
                             warp_number(), lane, tile, work);
      if (!goes_on(shared, work >= 0, lane)) break;
      work &= 1;
    }
  }
#endif
}

ULTRAMEM_REGISTER_KERNEL(bf16_4, "product_key_topk_fwd_split<bf16, 4>", kThreads,
                         product_key_topk_fwd_split_kernel<__nv_bfloat16, kFewBoxes>);
ULTRAMEM_REGISTER_KERNEL(bf16_8, "product_key_topk_fwd_split<bf16, 8>", kThreads,
                         product_key_topk_fwd_split_kernel<__nv_bfloat16, kManyBoxes>);
ULTRAMEM_REGISTER_KERNEL(fp16_4, "product_key_topk_fwd_split<fp16, 4>", kThreads,
                         product_key_topk_fwd_split_kernel<__half, kFewBoxes>);
ULTRAMEM_REGISTER_KERNEL(fp16_8, "product_key_topk_fwd_split<fp16, 8>", kThreads,
                         product_key_topk_fwd_split_kernel<__half, kManyBoxes>);

// For 16384 tokens at once with lists of 128 places, a head and its two sides.
constexpr size_t kMaxWorkspace = 136 << 20;

int clusters_at_once() { return std::max(multiprocessors() / kBlocks, 1); }

// Of so many works those whose lists are picked from before the last ones are complete: as many as
// multiprocessors without a work in the last turn manage, and some more.
int early_works(int works) {
  // For each cluster without a work. Two multiprocessors pick of about six at B while one is under
  // way, of four at M; eight were measured to be better than five at both.
  constexpr int kPickedMeanwhile = 8;
  const int clusters = clusters_at_once();
  const int turns = static_cast<int>(ceil_div(works, clusters));
  // Beyond, a work may be done again because another one has to be.
  if (turns > 32 * kMarkWords) return 0;
  const int idle = turns * clusters - works;
  return std::min(kPickedMeanwhile * idle, (turns - 1) * clusters);
}

struct Workspace {
  Candidates<kBlocks, true> candidates{};
  size_t bytes;

  // All tokens at once where there is room. Otherwise in chunks, for which all multiprocessors have
  // the same number of works each as often as fit: the next chunk's candidates overwrite those of
  // the last.
  explicit Workspace(const ProductKeyTopkParams& p) : num_head_sides(2 * p.num_heads) {
    for (int32_t& capacity : candidates.capacities) capacity = Schedule::of(p).capacity;
    const int64_t tiles = ceil_div(p.num_tokens, kTokens);
    place(p, tiles);
    if (bytes <= kMaxWorkspace) return;
    const int64_t at_once = std::max(clusters_at_once() / (2 * p.num_heads), 1);
    place(p, at_once);
    const int64_t fitting = std::max<int64_t>(kMaxWorkspace / bytes, 1) * at_once;
    place(p, ceil_div(tiles, ceil_div(tiles, fitting)));
  }

 private:
  void place(const ProductKeyTopkParams& p, int64_t tiles) {
    candidates.chunk_tokens = static_cast<int>(kTokens * tiles);
    candidates.early.count = early_works(static_cast<int>(num_head_sides * tiles));
    bytes = place_candidates(p, &candidates);
  }

  int num_head_sides;
};

template <typename scalar_t, int kBoxes>
Status launch(const ProductKeyTopkParams& p, Stream stream, bool filter_ahead) {
  Maps maps;
  ULTRAMEM_RETURN_IF_ERROR(maps.make(p));
  const auto kernel = product_key_topk_fwd_split_kernel<scalar_t, kBoxes>;
  const Workspace workspace(p);
  Candidates<kBlocks, true> candidates = workspace.candidates;
  for (int64_t first = 0; first < p.num_tokens; first += candidates.chunk_tokens) {
    const Plan plan(p, candidates.tokens_from(first, p.num_tokens));
    // The last chunk may have fewer works.
    candidates.early.count = std::min(workspace.candidates.early.count, early_works(plan.works));
    const int clusters = std::min(plan.works, clusters_at_once());
    const dim3 grid(static_cast<unsigned>(kBlocks * clusters));
    ULTRAMEM_RETURN_IF_ERROR(
        launch_overlapping_clusters(kernel, grid, kBlocks, kThreads, Shared<kBoxes>::kBytes, stream,
                                    p, plan, candidates, first, filter_ahead && first == 0, maps));
    ULTRAMEM_RETURN_IF_ERROR(launch_pick(p, candidates, first, stream));
  }
  return {};
}

template <typename scalar_t>
Status launch_boxes(const ProductKeyTopkParams& p, Stream stream, bool filter_ahead) {
  return p.key_dim <= kFewBoxes * kBoxColumns
             ? launch<scalar_t, kFewBoxes>(p, stream, filter_ahead)
             : launch<scalar_t, kManyBoxes>(p, stream, filter_ahead);
}

}  // namespace

bool axis_split_applies(const ProductKeyTopkParams& p) {
  // Shorter keys are multiplied faster than they are selected from.
  constexpr int kLeastKeyDim = 192;
  if (p.tucker_rank != kPlanes || p.key_dim <= kLeastKeyDim ||
      p.key_dim > kManyBoxes * kBoxColumns) {
    return false;
  }
  // Many heads would need more; places are counted in 32 bits, too.
  return axis_split_workspace(p) <= kMaxWorkspace;
}

size_t axis_split_workspace(const ProductKeyTopkParams& p) { return Workspace(p).bytes; }

Status launch_axis_split(const ProductKeyTopkParams& p, Stream stream, bool filter_ahead) {
  return p.dtype == DType::kFloat16 ? launch_boxes<__half>(p, stream, filter_ahead)
                                    : launch_boxes<__nv_bfloat16>(p, stream, filter_ahead);
}

}  // namespace ultramem::cuda
