// The gradients of query and keys as products on tensor cores. For each head, side and rank
//
//   grad_query [T, Kd] = dS [T, n] keys [n, Kd]
//   grad_keys  [n, Kd] = dS^T [n, T] query [T, Kd]
//
// dS, of which a token holds m entries, is never in memory: its entries are first grouped into
// buckets of 64 tokens by 64 keys, and a product unfolds the buckets of a tile in shared memory as
// it goes along. On tensor cores the zeros cost less than gathering the rows that are not zero
// would in traffic of the L2 cache.
//
// dS is rounded to the dtype of the keys; float16, whose range is small, after a scale by a power
// of two. A zero of dS must add nothing even where it meets an infinite key or query, which a
// product would turn into NaN. So rows that are not finite are loaded as zeros, and the entries of
// dS that meet them become NaN.
#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "product_key_topk_bwd_buckets.cuh"
#include "product_key_topk_bwd_product.cuh"
#include "product_key_topk_bwd_sum.cuh"

namespace ultramem::cuda {
namespace {

// ---- buckets -----------------------------------------------------------------------------------

constexpr int kBucketThreads = 512;
constexpr int kBucketWarps = kBucketThreads / kWarpSize;

struct BucketLayout {
  int counts;      // [key_tiles + 1]
  int key_bits;    // [ceil(n / 32)] whether a key is finite
  int token_bits;  // [2] whether a query is finite
  int places;      // [64 * m] of an entry in its bucket
  int sorted;      // [64 * m] entries by bucket
  int64_t bytes;

  __host__ __device__ BucketLayout(int axis_topk, int64_t num_keys) {
    SharedLayout layout;
    counts = layout.take(int64_t{4} * (ceil_div(num_keys, kBucketSize) + 1));
    key_bits = layout.take(int64_t{4} * ceil_div(num_keys, kWarpSize));
    token_bits = layout.take(int64_t{4} * kBucketSize / kWarpSize);
    places = layout.take(int64_t{2} * kBucketSize * axis_topk);
    sorted = layout.take(int64_t{4} * kBucketSize * axis_topk);
    bytes = layout.bytes();
  }
};

// One bit for each of `count` flags, by all warps of the block.
__device__ __forceinline__ void gather_bits(const uint8_t* flags, int count, uint32_t* bits) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 4
  for (int word = threadIdx.x / kWarpSize; word * kWarpSize < count; word += kBucketWarps) {
    const int i = word * kWarpSize + lane;
    const uint32_t set = __ballot_sync(kFullMask, i < count && flags[i] != 0);
    if (lane == 0) bits[word] = set;
  }
}

__device__ __forceinline__ bool bit_of(const uint32_t* bits, uint32_t i) {
  return (bits[i / kWarpSize] >> (i % kWarpSize) & 1) != 0;
}

// Some entries of a token that follow each other.
template <int kVec>
struct EntryPacket {
  Packet<uint32_t, kVec> keys = {};
  Packet<float, kVec> grads = {};
};

// Grid: tile of 64 tokens, (head, side, rank).
//   entries [H, 2, R, T * m]: those of a tile of tokens lie where its rows of dS would, by bucket
//   bucket_starts [H, 2, token_tiles, key_tiles + 1], counted from the tile's first entry
// The order within a bucket is whatever the atomics make it, and has no effect. kVec divides m.
template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(kBucketThreads, 4)
    product_key_topk_bwd_buckets_kernel(ProductKeyTopkBwdParams p, ScoresFindings findings,
                                        const float* grad_axis_scores, uint32_t* entries,
                                        uint16_t* bucket_starts) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  release_dependent_grid();
  const int thread = threadIdx.x;
  const auto block = static_cast<int>(blockIdx.x);
  const BucketLayout layout(p.axis_topk, p.num_keys);
  auto* counts = reinterpret_cast<uint32_t*>(shared_bytes + layout.counts);
  auto* key_bits = reinterpret_cast<uint32_t*>(shared_bytes + layout.key_bits);
  auto* token_bits = reinterpret_cast<uint32_t*>(shared_bytes + layout.token_bits);
  auto* places = reinterpret_cast<uint16_t*>(shared_bytes + layout.places);
  auto* sorted = reinterpret_cast<uint32_t*>(shared_bytes + layout.sorted);

  const int m = p.axis_topk;
  const int R = p.tucker_rank;
  const int num_keys = static_cast<int>(p.num_keys);
  const int key_tiles = static_cast<int>(ceil_div(num_keys, kBucketSize));
  const int head_sides = 2 * p.num_heads;
  const int plane = block % (head_sides * R);  // head, side and rank
  const int head_side = plane / R;
  const int rank = plane - head_side * R;
  const int token_tile = block / (head_sides * R);
  const int64_t first_token = int64_t{token_tile} * kBucketSize;
  const int num_tokens = static_cast<int>(min(int64_t{kBucketSize}, p.num_tokens - first_token));
  const int count = num_tokens * m;
  const SmallDivisor by_m(m);
  const int64_t first_axis_row = first_token * head_sides + head_side;
  const int32_t* axis_indices = p.axis_indices + first_axis_row * m;
  const auto load_keys = [&](int i, int token) {
    return *reinterpret_cast<const Packet<uint32_t, kVec>*>(axis_indices + i +
                                                            int64_t{token} * (head_sides - 1) * m);
  };

#pragma unroll 1
  for (int i = thread; i < key_tiles; i += kBucketThreads) counts[i] = 0;
  __syncthreads();
#pragma unroll 2
  for (int i = thread * kVec; i < count; i += kBucketThreads * kVec) {
    const Packet<uint32_t, kVec> keys = load_keys(i, by_m.quotient(i));
    Packet<uint16_t, kVec> packet;
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      packet.elements[v] =
          static_cast<uint16_t>(atomicAdd(&counts[keys.elements[v] / kBucketSize], 1u));
    }
    *reinterpret_cast<Packet<uint16_t, kVec>*>(places + i) = packet;
  }
  // So far nothing depends on the scores kernel.
  wait_for_prerequisite_grid();
  __syncthreads();

  const float* dS = grad_axis_scores + (first_axis_row * R + rank) * m;
  const auto load_entries = [&](int i) {
    EntryPacket<kVec> packet;
    if (i >= count) return packet;
    const int token = by_m.quotient(i);
    packet.keys = load_keys(i, token);
    packet.grads = *reinterpret_cast<const Packet<float, kVec>*>(
        dS + i + int64_t{token} * (head_sides * R - 1) * m);
    return packet;
  };
  EntryPacket<kVec> next = load_entries(thread * kVec);
  if (thread < kWarpSize) exclusive_sums(counts, key_tiles, thread);
  gather_bits(findings.key_finite + int64_t{plane} * num_keys, num_keys, key_bits);
  gather_bits(findings.query_finite + plane * p.num_tokens + first_token, num_tokens, token_bits);
  const float scale = power_of_two(scale_exponent(findings.max_grad));
  __syncthreads();

#pragma unroll 1
  for (int i = thread * kVec; i < count; i += kBucketThreads * kVec) {
    const EntryPacket<kVec> packet = next;
    next = load_entries(i + kBucketThreads * kVec);
    const auto in_bucket = *reinterpret_cast<const Packet<uint16_t, kVec>*>(places + i);
    const int token = by_m.quotient(i);
    const bool query_finite = bit_of(token_bits, static_cast<uint32_t>(token));
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const uint32_t key = packet.keys.elements[v];
      const uint32_t key_tile = key / kBucketSize;
      const float grad = query_finite && bit_of(key_bits, key) ? packet.grads.elements[v] * scale
                                                               : __int_as_float(0x7fffffff);
      const auto value = static_cast<uint16_t>(pack_rounded<scalar_t>(grad, 0.0f));
      sorted[counts[key_tile] + in_bucket.elements[v]] =
          pack_entry(value, static_cast<uint32_t>(token), key % kBucketSize);
    }
  }
  __syncthreads();

  uint32_t* out = entries + (plane * p.num_tokens + first_token) * m;
#pragma unroll 2
  for (int i = thread * kVec; i < count; i += kBucketThreads * kVec) {
    *reinterpret_cast<Packet<uint32_t, kVec>*>(out + i) =
        *reinterpret_cast<const Packet<uint32_t, kVec>*>(sorted + i);
  }
  if (rank != 0) return;
  const int64_t token_tiles = ceil_div(p.num_tokens, kBucketSize);
  uint16_t* starts = bucket_starts + (head_side * token_tiles + token_tile) * (key_tiles + 1);
#pragma unroll 1
  for (int i = thread; i <= key_tiles; i += kBucketThreads) {
    starts[i] = static_cast<uint16_t>(counts[i]);
  }
}

// ---- plan --------------------------------------------------------------------------------------

// Fewer tokens than this do not fill tiles, and gathering their rows is quick.
constexpr int64_t kMinDenseTokens = 257;
// Up to this many rows are multiplied in the time in which one kept row is gathered; the more by
// wgmma.
constexpr int64_t dense_rows_per_gathered_row(bool wgmma) { return wgmma ? 192 : 128; }
constexpr int64_t kMaxDenseKeys = 65536;  // the counts of buckets fit in shared memory
// Whole tiles are preferred where they keep this share of the machine busy, in percent.
constexpr int64_t kBusyEnough = 90;
constexpr int64_t kMinStepsPerBlock = 4;
constexpr int kCluster = 2;  // blocks that load together
constexpr int64_t kMaxInt = 0x7fffffff;

struct TileWidth {
  int cols;
  int cost;  // of a column, relative: narrow tiles read more of shared memory for each product
  int stage_bytes;
  bool wgmma;  // whether launch_product_wgmma offers it
};
constexpr TileWidth kTileWidths[] = {{256, 16, ProductTraits<256>::kStageBytes, true},
                                     {192, 17, ProductTraits<192>::kStageBytes, true},
                                     {128, 20, ProductTraits<128>::kStageBytes, false}};

// groups: of matrices [num_rows, columns], col_tiles wide, an even number. Where these have an odd
// number of rows of tiles, the last ones of two are taken together, or else alone, with a partner
// that does nothing.
ProductSchedule make_schedule(int64_t groups, int64_t num_rows, int64_t col_tiles,
                              int64_t tile_steps, bool together, const DeviceLimits& limits) {
  ProductSchedule schedule;
  schedule.cluster = limits.wgmma && limits.num_sms >= kCluster ? kCluster : 1;
  const int64_t workers = limits.num_sms / schedule.cluster;
  const int64_t row_tiles = ceil_div(num_rows, kTileRows);
  schedule.odd_rows = together && row_tiles % schedule.cluster != 0;
  const int64_t num_tiles = (schedule.odd_rows ? groups * row_tiles / schedule.cluster
                                               : groups * ceil_div(row_tiles, schedule.cluster)) *
                            col_tiles;
  schedule.num_tiles = num_tiles;
  schedule.tile_steps = tile_steps;
  const int64_t rounds = ceil_div(num_tiles, workers);
  schedule.split = num_tiles * 100 < rounds * workers * kBusyEnough &&
                   num_tiles * tile_steps < kMaxInt / workers;  // block_of
  const int64_t most_blocks =
      schedule.split ? std::max(num_tiles, num_tiles * tile_steps / kMinStepsPerBlock) : num_tiles;
  schedule.share_out(std::min(workers, most_blocks));  // none is without work
  return schedule;
}

// Gives every tile as many blocks, which leave fewer parts, if few multiprocessors stay idle then.
void make_disjoint(ProductSchedule* schedule) {
  const int64_t blocks = schedule->num_blocks / schedule->num_tiles * schedule->num_tiles;
  if (!schedule->split || blocks * 100 < schedule->num_blocks * kBusyEnough) return;
  schedule->share_out(blocks);
  schedule->disjoint = true;
}

int64_t token_tiles(const ProductKeyTopkParams& p) { return ceil_div(p.num_tokens, kBucketSize); }
int64_t key_tiles(const ProductKeyTopkParams& p) { return ceil_div(p.num_keys, kBucketSize); }

RowSet query_rows(const ProductKeyTopkParams& p, const void* data) {
  const int64_t head_stride = p.num_queries * p.key_dim;
  const int64_t side_stride = p.num_heads * head_stride;
  return {const_cast<void*>(data), head_stride, side_stride, p.num_queries == 1 ? 0 : p.key_dim,
          2 * side_stride,         p.num_tokens};
}

RowSet key_rows(const ProductKeyTopkParams& p, const void* data) {
  const int64_t rank_stride = p.num_keys * p.key_dim;
  const int64_t side_stride = p.tucker_rank * rank_stride;
  return {
      const_cast<void*>(data), 2 * side_stride, side_stride, rank_stride, p.key_dim, p.num_keys};
}

Product make_product(const ProductKeyTopkBwdParams& p, const DensePlan& plan, float* partials,
                     bool rows_are_tokens) {
  const ScoresFindings findings = scores_findings(p, plan);
  Product product;
  product.rows_are_tokens = rows_are_tokens;
  product.dense = rows_are_tokens ? key_rows(p, p.keys) : query_rows(p, p.query);
  product.out = rows_are_tokens ? query_rows(p, p.grad_query) : key_rows(p, p.grad_keys);
  if (rows_are_tokens) {
    product.dense_planes = {2 * p.tucker_rank, p.tucker_rank, 1,
                            int64_t{2} * p.num_heads * p.tucker_rank, p.num_keys * p.key_dim};
  } else {
    product.dense_planes = {p.num_queries, p.num_heads * p.num_queries, p.num_queries > 1,
                            int64_t{2} * p.num_heads * p.num_queries, p.key_dim};
  }
  product.dense_finite = rows_are_tokens ? findings.key_finite : findings.query_finite;
  product.entries = workspace_piece<uint32_t>(p, plan.entries);
  product.bucket_starts = workspace_piece<uint16_t>(p, plan.bucket_starts);
  product.max_grad = findings.max_grad;
  product.partials.rest = partials;
  if (!rows_are_tokens) {
    product.partials.borrowed = static_cast<float*>(p.grad_query);
    product.partials.num_borrowed = plan.grad_query_parts;
  }
  product.schedule = rows_are_tokens ? plan.query : plan.keys;
  product.entries_per_rank = p.num_tokens * p.axis_topk;
  product.axis_topk = p.axis_topk;
  product.key_dim = static_cast<int>(p.key_dim);
  product.tucker_rank = p.tucker_rank;
  product.out_ranks = rows_are_tokens ? p.num_queries : p.tucker_rank;
  product.token_tiles = static_cast<int>(token_tiles(p));
  product.key_tiles = static_cast<int>(key_tiles(p));
  product.row_tiles = static_cast<int>(
      ceil_div(product.out.num_rows,
               kTileRows * (product.schedule.odd_rows ? 1 : product.schedule.cluster)));
  product.col_tiles = static_cast<int>(ceil_div(p.key_dim, plan.tile_cols));
  product.dense_tiles = static_cast<int>(ceil_div(product.dense.num_rows, kTileDepth));
  product.by_out_ranks = Divisor(product.out_ranks);
  product.by_row_tiles = Divisor(product.row_tiles);
  product.by_col_tiles = Divisor(product.col_tiles);
  product.by_dense_tiles = Divisor(product.dense_tiles);
  return product;
}

// ---- launches ----------------------------------------------------------------------------------

template <typename scalar_t, int kCols>
Status launch_product_of_width(const Product& product, const DensePlan& plan, Stream stream) {
  using Traits = ProductTraits<kCols>;
  const int64_t bytes = int64_t{plan.num_stages} * Traits::kStageBytes + kBarrierBytes;
  ULTRAMEM_RETURN_IF_ERROR(
      allow_shared_memory(product_key_topk_bwd_product_kernel<scalar_t, kCols>, bytes));
  product_key_topk_bwd_product_kernel<scalar_t, kCols>
      <<<static_cast<unsigned>(product.schedule.num_blocks), Traits::kThreads, bytes, stream>>>(
          product, plan.num_stages);
  return launch_status();
}

template <typename scalar_t>
Status launch_sum(const Product& product, const DensePlan& plan, Stream stream) {
  // A split schedule has fewer tiles than ten times the multiprocessors.
  const dim3 grid(kTileRows * plan.tile_cols / (kPacket * kSumThreads),
                  static_cast<unsigned>(product.schedule.num_tiles * product.schedule.cluster));
  return launch_overlapping(product_key_topk_bwd_sum_kernel<scalar_t>, grid, kSumThreads, 0, stream,
                            product, plan.tile_cols);
}

// `summed` and `core_sums` as launch_product_wgmma takes them.
template <typename scalar_t>
Status launch_product(const Product& product, const Product& summed, const CoreSums& core_sums,
                      DType dtype, const DensePlan& plan, Stream stream) {
#if defined(ULTRAMEM_WITH_SM90A)
  if (plan.wgmma) {
    return launch_product_wgmma(product, summed, core_sums, dtype, plan.tile_cols, stream);
  }
#endif
  if (plan.tile_cols == 256) return launch_product_of_width<scalar_t, 256>(product, plan, stream);
  if (plan.tile_cols == 192) return launch_product_of_width<scalar_t, 192>(product, plan, stream);
  return launch_product_of_width<scalar_t, 128>(product, plan, stream);
}

template <typename scalar_t, int kVec>
Status launch_buckets(const ProductKeyTopkBwdParams& p, const DensePlan& plan,
                      const float* grad_axis_scores, Stream stream) {
  const BucketLayout layout(p.axis_topk, p.num_keys);
  ULTRAMEM_RETURN_IF_ERROR(
      allow_shared_memory(product_key_topk_bwd_buckets_kernel<scalar_t, kVec>, layout.bytes));
  const int64_t num_blocks = token_tiles(p) * 2 * p.num_heads * p.tucker_rank;
  return launch_overlapping(
      product_key_topk_bwd_buckets_kernel<scalar_t, kVec>, dim3(static_cast<unsigned>(num_blocks)),
      kBucketThreads, layout.bytes, stream, p, scores_findings(p, plan), grad_axis_scores,
      workspace_piece<uint32_t>(p, plan.entries), workspace_piece<uint16_t>(p, plan.bucket_starts));
}

template <typename scalar_t>
Status launch_dense_of_type(const ProductKeyTopkBwdParams& p, const DensePlan& plan,
                            const float* grad_axis_scores, const CoreSums& core_sums,
                            float* partials, Stream stream) {
  if (!plan.entries_at_once) {
    ULTRAMEM_RETURN_IF_ERROR(
        p.axis_topk % kPacket == 0 && is_aligned(p.axis_indices)
            ? (launch_buckets<scalar_t, kPacket>(p, plan, grad_axis_scores, stream))
            : (launch_buckets<scalar_t, 1>(p, plan, grad_axis_scores, stream)));
  }
  CoreSums to_sum = core_sums;
  // Last the one that writes grad_query, which may hold dS and parts of grad_keys before.
  for (const bool rows_are_tokens : {false, true}) {
    if ((rows_are_tokens ? p.grad_query : p.grad_keys) == nullptr) continue;
    const Product product = make_product(p, plan, partials, rows_are_tokens);
    const bool sums_keys = rows_are_tokens && plan.query_sums_keys;
    const Product summed = sums_keys ? make_product(p, plan, partials, false) : Product{};
    ULTRAMEM_RETURN_IF_ERROR(
        launch_product<scalar_t>(product, summed, to_sum, p.dtype, plan, stream));
    to_sum = {};
    // A kernel of grad_query that sums begins ahead of this one's end: nothing may come in between.
    if (product.schedule.split && !plan.query_sums_keys) {
      ULTRAMEM_RETURN_IF_ERROR(launch_sum<scalar_t>(product, plan, stream));
    }
  }
  return {};
}

#define ULTRAMEM_REGISTER_PRODUCT(id, type_name, scalar_t)                                       \
  ULTRAMEM_REGISTER_KERNEL(buckets_##id, "product_key_topk_bwd_buckets<" type_name ",1>",        \
                           kBucketThreads, product_key_topk_bwd_buckets_kernel<scalar_t, 1>);    \
  ULTRAMEM_REGISTER_KERNEL(bucket_packets_##id, "product_key_topk_bwd_buckets<" type_name ",4>", \
                           kBucketThreads,                                                       \
                           product_key_topk_bwd_buckets_kernel<scalar_t, kPacket>);              \
  ULTRAMEM_REGISTER_KERNEL(sum_##id, "product_key_topk_bwd_sum<" type_name ">", kSumThreads,     \
                           product_key_topk_bwd_sum_kernel<scalar_t>);                           \
  ULTRAMEM_REGISTER_KERNEL(product_256_##id, "product_key_topk_bwd_product<" type_name ",256>",  \
                           ProductTraits<256>::kThreads,                                         \
                           product_key_topk_bwd_product_kernel<scalar_t, 256>);                  \
  ULTRAMEM_REGISTER_KERNEL(product_192_##id, "product_key_topk_bwd_product<" type_name ",192>",  \
                           ProductTraits<192>::kThreads,                                         \
                           product_key_topk_bwd_product_kernel<scalar_t, 192>);                  \
  ULTRAMEM_REGISTER_KERNEL(product_128_##id, "product_key_topk_bwd_product<" type_name ",128>",  \
                           ProductTraits<128>::kThreads,                                         \
                           product_key_topk_bwd_product_kernel<scalar_t, 128>)
ULTRAMEM_REGISTER_PRODUCT(bf16, "bf16", __nv_bfloat16);
ULTRAMEM_REGISTER_PRODUCT(f16, "fp16", __half);

}  // namespace

void plan_dense(const ProductKeyTopkBwdParams& p, const DeviceLimits& limits, DensePlan* plan) {
  *plan = {};
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return;
  if (p.key_dim % 8 != 0 || p.num_keys > kMaxDenseKeys || p.num_tokens < kMinDenseTokens) return;
  if (!is_aligned(p.query) || !is_aligned(p.keys) || !is_aligned(p.grad_query) ||
      !is_aligned(p.grad_keys)) {
    return;
  }
  if (BucketLayout(p.axis_topk, p.num_keys).bytes > limits.shared_bytes) return;
  plan->wgmma = limits.wgmma;
  int64_t best_cost = 0;
  for (const TileWidth& width : kTileWidths) {
    if (limits.wgmma && !width.wgmma) continue;
    const int stages =
        std::min((limits.shared_bytes - kBarrierBytes) / width.stage_bytes, kMaxStages);
    const int64_t cost = ceil_div(p.key_dim, width.cols) * width.cols * width.cost;
    if (stages < kMinStages || (plan->tile_cols != 0 && cost >= best_cost)) continue;
    best_cost = cost;
    plan->tile_cols = width.cols;
    plan->num_stages = stages;
  }
  if (plan->tile_cols == 0) return;
  const int64_t col_tiles = ceil_div(p.key_dim, plan->tile_cols);
  const int64_t padded_rows = p.num_keys * col_tiles * plan->tile_cols;
  if (padded_rows > dense_rows_per_gathered_row(limits.wgmma) * p.axis_topk * p.key_dim) return;

  const int64_t head_sides = int64_t{2} * p.num_heads;
  const int64_t inner_ranks = p.tucker_rank / p.num_queries;
  plan->query = make_schedule(head_sides * p.num_queries, p.num_tokens, col_tiles,
                              inner_ranks * key_tiles(p), true, limits);
  const int64_t part_bytes = int64_t{kTileRows} * plan->tile_cols * int64_t{sizeof(float)};
  const int64_t query_bytes =
      p.num_tokens * head_sides * p.num_queries * p.key_dim * element_size(p.dtype);
  const auto keys_schedule = [&](bool together) {
    ProductSchedule schedule = make_schedule(head_sides * p.tucker_rank, p.num_keys, col_tiles,
                                             token_tiles(p), together, limits);
    if (schedule.num_slots() * part_bytes > query_bytes) make_disjoint(&schedule);
    return schedule;
  };
  plan->keys = keys_schedule(true);
  if (plan->keys.odd_rows && plan->keys.split && !plan->keys.disjoint) {
    // One part a block is worth more than the tile that is wasted.
    const ProductSchedule alone = keys_schedule(false);
    if (alone.disjoint) plan->keys = alone;
  }
  // Steps and pieces of tiles, and blocks of the buckets, are counted in 32 bits.
  plan->applies = true;
  for (const ProductSchedule* schedule : {&plan->query, &plan->keys}) {
    plan->applies = plan->applies && schedule->num_tiles < kMaxInt / (32 * kCluster) &&
                    schedule->num_tiles * schedule->tile_steps < kMaxInt;
  }
  if (!plan->applies) return;
  plan->entries_at_once = entries_apply(p, limits);

  int64_t parts = p.grad_keys != nullptr ? plan->keys.num_slots() : 0;
  if (p.grad_query != nullptr) {
    const int64_t grad_bytes =
        p.num_tokens * head_sides * p.tucker_rank * p.axis_topk * int64_t{sizeof(float)};
    plan->grad_query_holds_grads = grad_bytes <= query_bytes;
    plan->query_sums_keys = plan->wgmma && parts > 0 && !plan->query.split;
    if (!plan->query_sums_keys) plan->grad_query_parts = std::min(parts, query_bytes / part_bytes);
    parts = std::max(parts - plan->grad_query_parts, plan->query.num_slots());
  }
  plan->partial_bytes = parts * part_bytes;
}

void lay_out_dense(const ProductKeyTopkBwdParams& p, DensePlan* plan, WorkspaceLayout& layout) {
  const int64_t planes = int64_t{2} * p.num_heads * p.tucker_rank;
  plan->entries = layout.take(planes * p.num_tokens * p.axis_topk * sizeof(uint32_t));
  plan->bucket_starts = layout.take(int64_t{2} * p.num_heads * token_tiles(p) * (key_tiles(p) + 1) *
                                    sizeof(uint16_t));
  plan->key_finite = layout.take(planes * p.num_keys);
  plan->query_finite = layout.take(planes * p.num_tokens);
  plan->max_grad = layout.take(sizeof(uint32_t));
}

ScoresFindings scores_findings(const ProductKeyTopkBwdParams& p, const DensePlan& plan) {
  if (!plan.applies) return {};
  ScoresFindings findings;
  findings.key_finite = workspace_piece<uint8_t>(p, plan.key_finite);
  findings.query_finite = workspace_piece<uint8_t>(p, plan.query_finite);
  if (p.dtype == DType::kFloat16) findings.max_grad = workspace_piece<uint32_t>(p, plan.max_grad);
  return findings;
}

bool dense_sums_core(const ProductKeyTopkBwdParams& p, const DensePlan& plan) {
  return plan.applies && plan.wgmma && (p.grad_query != nullptr || p.grad_keys != nullptr);
}

Status launch_dense(const ProductKeyTopkBwdParams& p, const DensePlan& plan,
                    const float* grad_axis_scores, const CoreSums& core_sums, float* partials,
                    Stream stream) {
  if (p.dtype == DType::kFloat16) {
    return launch_dense_of_type<__half>(p, plan, grad_axis_scores, core_sums, partials, stream);
  }
  return launch_dense_of_type<__nv_bfloat16>(p, plan, grad_axis_scores, core_sums, partials,
                                             stream);
}

}  // namespace ultramem::cuda
