// The products of the dense path of the backward: dS, unfolded from its buckets tile by tile in
// shared memory, times rows of keys or queries. product_key_topk_bwd_dense.cu makes the buckets and
// launches.
#pragma once

#include "async_copy.cuh"
#include "common.cuh"
#include "mma.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "product_key_topk_bwd_buckets.cuh"

namespace ultramem::cuda {

// ---- the scale of float16 ----------------------------------------------------------------------

// max_grad holds the bits of the largest |dS|. The scale brings it to [2^14, 2^15).
__device__ __forceinline__ int scale_exponent(const uint32_t* max_grad) {
  if (max_grad == nullptr) return 0;
  const int exponent = static_cast<int>(__ldcg(max_grad) >> 23) - 127;
  return min(max(14 - exponent, -126), 126);
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// ---- products: unfolded dS times rows ----------------------------------------------------------

// Rows of Kd elements of every (head, side, rank): of query, keys, or a gradient of theirs.
struct RowSet {
  void* data;
  int64_t head_stride;
  int64_t side_stride;
  int64_t rank_stride;
  int64_t row_stride;
  int64_t num_rows;
};

// The dense rows as an array [planes, rows, Kd] of any strides, which is how a tensor map sees
// them: how far apart heads, sides and ranks are, in planes.
struct DensePlanes {
  int head;
  int side;
  int rank;
  int64_t count;
  int64_t element_stride;  // from plane to plane
};

// Parts of tiles, [slots, cluster, 128, tile columns]: the first of them in memory that is not
// needed yet, where there is any.
struct PartialSums {
  float* borrowed = nullptr;
  int64_t num_borrowed = 0;
  float* rest = nullptr;

  __device__ __forceinline__ float* part(int64_t index, int64_t elements) const {
    const int64_t beyond = index - num_borrowed;
    return beyond < 0 ? borrowed + index * elements : rest + beyond * elements;
  }
};

struct Product {
  bool rows_are_tokens;  // of the output: grad_query. Otherwise they are keys: grad_keys.
  RowSet dense;
  DensePlanes dense_planes;
  RowSet out;
  const uint8_t* dense_finite;    // [H, 2, R, dense rows]
  const uint32_t* entries;        // [H, 2, R, T * m]
  const uint16_t* bucket_starts;  // [H, 2, token_tiles, key_tiles + 1]
  const uint32_t* max_grad;       // null: dS is not scaled
  PartialSums partials;
  ProductSchedule schedule;
  int64_t entries_per_rank;  // T * m
  int axis_topk;
  int key_dim;
  int tucker_rank;
  int out_ranks;    // Q or R
  int token_tiles;  // of 64
  int key_tiles;    // of 64
  int row_tiles;    // of the output: of 128 rows if schedule.odd_rows, else of 128 * cluster
  int col_tiles;
  int dense_tiles;  // of 64: steps of one rank. A shared query takes the steps of all ranks.
  Divisor by_out_ranks, by_row_tiles, by_col_tiles, by_dense_tiles;
};

inline constexpr int kTileRows = 128;
inline constexpr int kTileDepth = 64;
inline constexpr int kBucketsPerStep = kTileRows / kBucketSize;
static_assert(kTileDepth == kBucketSize);

// Eight warps multiply, two down and four across; four more fill the ring. The rows of both
// operands are padded by 16 bytes, an odd number of 16-byte units: eight rows of one column meet
// all banks, without a swizzle that the scattered entries would have to follow.
template <int kCols>
struct ProductTraits {
  static constexpr int kMmaThreads = 256;
  static constexpr int kProducerThreads = 128;
  static constexpr int kThreads = kMmaThreads + kProducerThreads;
  // Of the 168 a thread that a block of this size is launched with: more for the multipliers, so
  // that they load fragments ahead.
  static constexpr int kMmaRegisters = 208;
  static constexpr int kProducerRegisters = 88;
  static_assert(kMmaThreads * kMmaRegisters + kProducerThreads * kProducerRegisters ==
                kThreads * 168);
  static constexpr int kWarpsAcross = 4;
  static constexpr int kWarpRows = kTileRows / 2;
  static constexpr int kWarpCols = kCols / kWarpsAcross;
  static constexpr int kSparsePitch = 2 * kTileDepth + 16;
  static constexpr int kDensePitch = 2 * kCols + 16;
  static constexpr int kDenseOffset = kTileRows * kSparsePitch;
  static constexpr int kStageBytes = kDenseOffset + kTileDepth * kDensePitch;
  static_assert(kWarpCols % 16 == 0 && kStageBytes % 16 == 0);
};

// A stage is full once every producer has written and its copies are complete.
inline constexpr int kFullArrivals = 2 * ProductTraits<128>::kProducerThreads;
inline constexpr int kEmptyArrivals = ProductTraits<128>::kMmaThreads / kWarpSize;
inline constexpr int kProducerBarrier = 1;
inline constexpr int kMinStages = 2;
inline constexpr int kMaxStages = 4;
inline constexpr int kBarrierBytes = 2 * 8 * kMaxStages;

// Where in the ring a thread is. Barriers: [stages] full, then [stages] empty.
struct RingPosition {
  uint32_t base;  // of the ring
  uint32_t barriers;
  int num_stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ uint32_t full() const { return barriers + 8 * stage; }
  __device__ uint32_t empty() const { return barriers + 8 * (kMaxStages + stage); }
  __device__ void advance() {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct TileCoords {
  int head;
  int side;
  int rank;  // of the output
  int row_tile;
  int col_tile;
  bool shares;  // dense rows, with the other blocks of the cluster

  // Of the block of this rank in its cluster.
  __device__ TileCoords(const Product& p, int tile, int block_rank) {
    const int rows_tile = p.by_col_tiles.quotient(tile);
    col_tile = tile - rows_tile * p.col_tiles;
    int group = p.by_row_tiles.quotient(rows_tile);
    row_tile = rows_tile - group * p.row_tiles;
    shares = !p.schedule.odd_rows || row_tile < p.row_tiles - 1;
    if (p.schedule.odd_rows) {
      // Of two planes: pairs of tiles of the one, then of the other, then the last of both.
      const int pairs = p.row_tiles / 2;
      const int second = shares ? row_tile >= pairs : block_rank;
      group = 2 * group + second;
      row_tile = shares ? 2 * (row_tile - second * pairs) + block_rank : p.row_tiles - 1;
    } else {
      row_tile = row_tile * p.schedule.cluster + block_rank;
    }
    const int head_side = p.by_out_ranks.quotient(group);
    rank = group - head_side * p.out_ranks;
    side = head_side % 2;
    head = head_side / 2;
  }
  __device__ int64_t offset(const RowSet& rows, int of_rank) const {
    return head * rows.head_stride + side * rows.side_stride + of_rank * rows.rank_stride;
  }
};

// ---- steps

// What a producer needs to know of a step before it can fill a stage.
struct Step {
  TileCoords coords;
  int dense_rank;
  int first_dense_row;
  int num_dense_rows;     // up to 64
  const uint8_t* finite;  // [64]
  const uint32_t* entries[kBucketsPerStep];
  int num_entries[kBucketsPerStep];
};

// Walks the steps of a block in order.
class StepCursor {
 public:
  __device__ StepCursor(const Product& p, int64_t step, int block_rank)
      : p_(p),
        block_rank_(block_rank),
        tile_(p.schedule.tile_of(step)),
        coords_(p, tile_, block_rank) {
    const int step_of_tile = static_cast<int>(step - tile_ * p.schedule.tile_steps);
    inner_rank_ = p.by_dense_tiles.quotient(step_of_tile);
    dense_tile_ = step_of_tile - inner_rank_ * p.dense_tiles;
  }

  __device__ void advance() {
    if (++dense_tile_ < p_.dense_tiles) return;
    dense_tile_ = 0;
    if (++inner_rank_ * int64_t{p_.dense_tiles} < p_.schedule.tile_steps) return;
    inner_rank_ = 0;
    coords_ = TileCoords(p_, ++tile_, block_rank_);
  }

  __device__ Step read() const {
    Step step{coords_};
    step.dense_rank = coords_.rank + inner_rank_;
    const int64_t head_side = coords_.head * 2 + coords_.side;
    const int64_t plane = head_side * p_.tucker_rank + step.dense_rank;
    step.first_dense_row = dense_tile_ * kTileDepth;
    step.finite = p_.dense_finite + plane * p_.dense.num_rows + step.first_dense_row;
    step.num_dense_rows =
        static_cast<int>(min(p_.dense.num_rows - step.first_dense_row, int64_t{kTileDepth}));
#pragma unroll
    for (int half = 0; half < kBucketsPerStep; ++half) {
      const int row_tile = coords_.row_tile * kBucketsPerStep + half;
      const int token_tile = p_.rows_are_tokens ? row_tile : dense_tile_;
      const int key_tile = p_.rows_are_tokens ? dense_tile_ : row_tile;
      const bool exists = token_tile < p_.token_tiles && key_tile < p_.key_tiles;
      const uint16_t* starts = p_.bucket_starts +
                               (head_side * p_.token_tiles + token_tile) * (p_.key_tiles + 1) +
                               key_tile;
      const int first = exists ? __ldcg(starts) : 0;
      const int last = exists ? __ldcg(starts + 1) : 0;
      step.entries[half] = p_.entries + plane * p_.entries_per_rank +
                           int64_t{token_tile} * kBucketSize * p_.axis_topk + first;
      step.num_entries[half] = last - first;
    }
    return step;
  }

 private:
  const Product& p_;
  int block_rank_;
  int tile_;
  TileCoords coords_;
  int inner_rank_;
  int dense_tile_;
};

// The first of a step's dense rows, at its tile's first column.
template <typename scalar_t>
__device__ __forceinline__ const scalar_t* dense_rows(const Product& p, const Step& step,
                                                      int tile_cols) {
  return static_cast<const scalar_t*>(p.dense.data) + step.coords.offset(p.dense, step.dense_rank) +
         step.first_dense_row * p.dense.row_stride + step.coords.col_tile * tile_cols;
}

// Where an entry belongs in the unfolded tile: [128, 64].
struct EntryPlace {
  uint32_t row;
  uint32_t col;
};
__device__ __forceinline__ EntryPlace entry_place(uint32_t entry, int half, bool rows_are_tokens) {
  const uint32_t token = entry / kBucketRowBytes % kBucketSize;
  const uint32_t key = bucket_offset(token, entry / 2) % kBucketRowBytes / 2;
  return {half * kBucketSize + (rows_are_tokens ? token : key), rows_are_tokens ? key : token};
}

// ---- the producers' part

// Entries of a bucket that a producer reads ahead; longer buckets are read in place.
inline constexpr int kEntriesAhead = 6;

// A row goes to as many lanes as it has 16-byte chunks, and a warp copies 16 of the 64 rows.
template <int kCols, typename scalar_t>
__device__ __forceinline__ void copy_dense_rows(const scalar_t* rows, int64_t row_stride,
                                                int num_cols, bool row_finite, uint32_t to,
                                                int warp, int lane) {
  constexpr int kLanesPerRow = kCols / 8;
  constexpr int kRowsAtOnce = kWarpSize / kLanesPerRow;
  constexpr int kRowsPerWarp = kTileDepth / (ProductTraits<kCols>::kProducerThreads / kWarpSize);
  const uint32_t finite = __ballot_sync(kFullMask, row_finite);
  if (lane >= kRowsAtOnce * kLanesPerRow) return;
  const int row = lane / kLanesPerRow;
  const int col = (lane - row * kLanesPerRow) * 8;
  const uint32_t present = col < num_cols ? finite >> row : 0;
  const scalar_t* from = rows + (warp * kRowsPerWarp + row) * row_stride + col;
  to += (warp * kRowsPerWarp + row) * ProductTraits<kCols>::kDensePitch + 2 * col;
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; i += kRowsAtOnce) {
    const bool copied = (present >> i & 1) != 0;
    // A row that is not copied may lie behind the last one: its address is not used.
    cp_async_16(to + i * ProductTraits<kCols>::kDensePitch, copied ? from : rows, copied);
    from += kRowsAtOnce * row_stride;
  }
}

template <int kCols>
__device__ __forceinline__ void store_entry(uint32_t entry, int half, bool rows_are_tokens,
                                            uint32_t to) {
  const EntryPlace place = entry_place(entry, half, rows_are_tokens);
  store_shared(to + place.row * ProductTraits<kCols>::kSparsePitch + 2 * place.col,
               static_cast<uint16_t>(entry >> 16));
}

template <typename scalar_t, int kCols>
__device__ __forceinline__ void produce(const Product& p, RingPosition ring, int64_t first_step,
                                        int64_t last_step) {
  using Traits = ProductTraits<kCols>;
  constexpr int kThreads = Traits::kProducerThreads;
  constexpr int kRowsPerWarp = kTileDepth / (kThreads / kWarpSize);
  const int thread = static_cast<int>(threadIdx.x) - Traits::kMmaThreads;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  // Lanes below kRowsPerWarp say whether the warp's rows exist and are finite.
  const int own_row = warp * kRowsPerWarp + lane;

  StepCursor cursor(p, first_step, 0);
  Step step = cursor.read();
  uint32_t ahead[kBucketsPerStep][kEntriesAhead];
  bool row_finite;
  const auto read_ahead = [&] {
    row_finite = lane < kRowsPerWarp && own_row < step.num_dense_rows && step.finite[own_row] != 0;
#pragma unroll
    for (int half = 0; half < kBucketsPerStep; ++half) {
#pragma unroll
      for (int i = 0; i < kEntriesAhead; ++i) {
        const int entry = thread + i * kThreads;
        ahead[half][i] = entry < step.num_entries[half] ? step.entries[half][entry] : 0;
      }
    }
  };
  read_ahead();

  for (int64_t i = first_step; i < last_step; ++i) {
    const scalar_t* rows = dense_rows<scalar_t>(p, step, kCols);
    // Columns of this tile that exist, Kd being a multiple of 8.
    const int num_cols = p.key_dim - step.coords.col_tile * kCols;
    // The bounds of the next buckets are on their way while this stage is filled.
    Step next = step;
    if (i + 1 < last_step) {
      cursor.advance();
      next = cursor.read();
    }
    mbarrier_wait(ring.empty(), ring.parity ^ 1);
    const uint32_t sparse = ring.base + ring.stage * Traits::kStageBytes;
    copy_dense_rows<kCols>(rows, p.dense.row_stride, num_cols, row_finite,
                           sparse + Traits::kDenseOffset, warp, lane);

    constexpr int kChunksPerRow = 2 * kTileDepth / 16;
#pragma unroll
    for (int chunk = 0; chunk < kTileRows * kChunksPerRow; chunk += kThreads) {
      const int row = (chunk + thread) / kChunksPerRow;
      const int col = (chunk + thread) % kChunksPerRow;
      store_shared(sparse + row * Traits::kSparsePitch + 16 * col, make_uint4(0, 0, 0, 0));
    }
    named_barrier_sync(kProducerBarrier, kThreads);
#pragma unroll
    for (int half = 0; half < kBucketsPerStep; ++half) {
#pragma unroll
      for (int j = 0; j < kEntriesAhead; ++j) {
        if (thread + j * kThreads < step.num_entries[half]) {
          store_entry<kCols>(ahead[half][j], half, p.rows_are_tokens, sparse);
        }
      }
      for (int entry = thread + kEntriesAhead * kThreads; entry < step.num_entries[half];
           entry += kThreads) {
        store_entry<kCols>(step.entries[half][entry], half, p.rows_are_tokens, sparse);
      }
    }
    mbarrier_arrive_after_copies(ring.full());
    mbarrier_arrive(ring.full());
    ring.advance();
    step = next;
    read_ahead();
  }
  // The block's shared memory outlives its copies.
  cp_async_wait_all();
}

// ---- the multipliers' part

template <int kCols>
using Accumulators =
    float[ProductTraits<kCols>::kWarpRows / 16][ProductTraits<kCols>::kWarpCols / 8][4];

// acc += the 64 rows of one warp and all 64 columns of the sparse tile times its dense columns.
template <typename scalar_t, int kCols>
__device__ __forceinline__ void multiply_stage(uint32_t sparse, uint32_t dense,
                                               Accumulators<kCols>& acc) {
  using Traits = ProductTraits<kCols>;
#pragma unroll
  for (int k = 0; k < kTileDepth; k += 16) {
    uint32_t a[Traits::kWarpRows / 16][4];
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
      ldmatrix_x4(a[i], sparse + 16 * i * Traits::kSparsePitch + 2 * k);
    }
#pragma unroll
    for (int j = 0; j < Traits::kWarpCols / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, dense + k * Traits::kDensePitch + 2 * 16 * j);
#pragma unroll
      for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
        mma_m16n8k16<scalar_t>(acc[i][2 * j], a[i], b[0], b[1]);
        mma_m16n8k16<scalar_t>(acc[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// A lane holds two neighbouring columns of rows lane / 4 and lane / 4 + 8 of each 16 x 8 tile.
// Even and odd lanes swap halves of two such tiles, so that each stores four columns of one.
template <typename scalar_t, int kCols>
__device__ __forceinline__ void store_tile(const Product& p, const TileCoords& coords,
                                           int first_row, int first_col, int lane,
                                           const Accumulators<kCols>& acc) {
  using Traits = ProductTraits<kCols>;
  const float unscale = power_of_two(-scale_exponent(p.max_grad));
  const bool odd = lane % 2 != 0;
  const int tile_col = coords.col_tile * kCols + first_col + (odd ? 8 : 0);
  const int lane_col = lane % 4 / 2 * 4;
  auto* out =
      static_cast<scalar_t*>(p.out.data) + coords.offset(p.out, coords.rank) + tile_col + lane_col;
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const int64_t row =
          int64_t{coords.row_tile} * kTileRows + first_row + 16 * i + 8 * low + lane / 4;
#pragma unroll
      for (int j = 0; j < Traits::kWarpCols / 8; j += 2) {
        const float* left = acc[i][j] + 2 * low;
        const float* right = acc[i][j + 1] + 2 * low;
        const uint32_t packed_left = pack_rounded<scalar_t>(left[0] * unscale, left[1] * unscale);
        const uint32_t packed_right =
            pack_rounded<scalar_t>(right[0] * unscale, right[1] * unscale);
        const uint32_t received = __shfl_xor_sync(kFullMask, odd ? packed_left : packed_right, 1);
        if (row < p.out.num_rows && tile_col + 8 * j < p.key_dim) {
          *reinterpret_cast<uint2*>(out + row * p.out.row_stride + 8 * j) =
              odd ? make_uint2(received, packed_right) : make_uint2(packed_left, received);
        }
      }
    }
  }
}

// A part of a tile, scaled and unrounded.
template <int kCols>
__device__ __forceinline__ void store_partial(float* partial, int first_row, int first_col,
                                              int lane, const Accumulators<kCols>& acc) {
  using Traits = ProductTraits<kCols>;
  partial += (first_row + lane / 4) * kCols + first_col + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kWarpCols / 8; ++j) {
      float* to = partial + 16 * i * kCols + 8 * j;
      *reinterpret_cast<float2*>(to) = make_float2(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<float2*>(to + 8 * kCols) = make_float2(acc[i][j][2], acc[i][j][3]);
    }
  }
}

template <typename scalar_t, int kCols>
__device__ __forceinline__ void consume(const Product& p, RingPosition ring, int64_t first_step,
                                        int64_t last_step) {
  using Traits = ProductTraits<kCols>;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int first_row = warp / Traits::kWarpsAcross * Traits::kWarpRows;
  const int first_col = warp % Traits::kWarpsAcross * Traits::kWarpCols;
  // Lane l names row l % 16 of a 16 x 16 block, and its right half from lane 16 on.
  const uint32_t sparse =
      ring.base + (first_row + lane % 16) * Traits::kSparsePitch + lane / 16 * 16;
  const uint32_t dense = ring.base + Traits::kDenseOffset + lane % 16 * Traits::kDensePitch +
                         2 * first_col + lane / 16 * 16;

  const int64_t tile_steps = p.schedule.tile_steps;
  const int first_tile = p.schedule.tile_of(first_step);
  int tile = first_tile;
  for (int64_t step = first_step; step < last_step; ++tile) {
    const int64_t tile_end = min((tile + 1) * tile_steps, last_step);
    const bool whole = tile_end - step == tile_steps;
    Accumulators<kCols> acc = {};
    for (int left = static_cast<int>(tile_end - step); left > 0; --left) {
      mbarrier_wait(ring.full(), ring.parity);
      const uint32_t stage = ring.stage * Traits::kStageBytes;
      multiply_stage<scalar_t, kCols>(sparse + stage, dense + stage, acc);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.advance();
    }
    step = tile_end;
    if (whole) {
      store_tile<scalar_t, kCols>(p, TileCoords(p, tile, 0), first_row, first_col, lane, acc);
    } else {
      const int64_t slot = p.schedule.slot(blockIdx.x, first_tile, tile);
      store_partial<kCols>(p.partials.part(slot, kTileRows * kCols), first_row, first_col, lane,
                           acc);
    }
  }
}

// One block an SM. Blocks take the schedule's steps in order, tile after tile, and the producers
// run ahead across tiles while results are stored.
template <typename scalar_t, int kCols>
__global__ void __launch_bounds__(ProductTraits<kCols>::kThreads, 1)
    product_key_topk_bwd_product_kernel(__grid_constant__ const Product p, int num_stages) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using Traits = ProductTraits<kCols>;
  RingPosition ring;
  ring.base = shared_address(shared_bytes);
  ring.barriers = ring.base + num_stages * Traits::kStageBytes;
  ring.num_stages = num_stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < num_stages; ++i) {
      mbarrier_init(ring.barriers + 8 * i, kFullArrivals);
      mbarrier_init(ring.barriers + 8 * (kMaxStages + i), kEmptyArrivals);
    }
  }
  __syncthreads();
  const int64_t first_step = p.schedule.first_step(static_cast<int>(blockIdx.x));
  const int64_t last_step = p.schedule.first_step(static_cast<int>(blockIdx.x) + 1);
  if (threadIdx.x < Traits::kMmaThreads) {
    take_registers<Traits::kMmaRegisters>();
    consume<scalar_t, kCols>(p, ring, first_step, last_step);
  } else {
    give_up_registers<Traits::kProducerRegisters>();
    produce<scalar_t, kCols>(p, ring, first_step, last_step);
  }
}

// ---- on sm_90 ----------------------------------------------------------------------------------

// The same products where sm90a_available; tile_cols is 256 or 192. Sums the parts of `summed`,
// which the kernel ahead has left, if its schedule is split, or else those of core_sums, if there
// are any.
Status launch_product_wgmma(const Product& product, const Product& summed,
                            const CoreSums& core_sums, DType dtype, int tile_cols, Stream stream);

}  // namespace ultramem::cuda
