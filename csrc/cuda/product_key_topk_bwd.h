// What the files of the backward of product_key_topk share. Its scores kernel turns dg into dS, the
// gradient of the scores of the kept keys; then one of two paths turns dS into the gradients of
// query and keys: sums over gathered rows, for any shape and dtype, or products on tensor cores. Of
// few pairs a token one kernel takes dg to what these products read.
#pragma once

#include "async_copy.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "sm90a.h"
#include "ultramem/product_key_topk.h"

namespace ultramem::cuda {

class WorkspaceLayout {
 public:
  size_t take(int64_t size) {
    const size_t offset = bytes_;
    bytes_ += align_up(static_cast<size_t>(size));
    return offset;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

template <typename T>
T* workspace_piece(const ProductKeyTopkBwdParams& p, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
}

// Divides integers below 2^14 whose quotient is below 128, without an integer division.
class SmallDivisor {
 public:
  __device__ explicit SmallDivisor(int divisor)
      : inverse_(((1u << kShift) + divisor - 1) / divisor) {}
  // The inverse is less than 1 too large: the quotient by less than 2^14 / 2^24, below 1 / divisor.
  __device__ int quotient(int x) const {
    return static_cast<int>(static_cast<uint32_t>(x) * inverse_ >> kShift);
  }

 private:
  static constexpr int kShift = 24;
  uint32_t inverse_;
};

// Of the current device.
struct DeviceLimits {
  int shared_bytes = 0;  // the most that a block can have
  int num_sms = 0;
  bool wgmma = false;  // sm90a_available
};

inline Status device_limits(DeviceLimits* limits) {
  limits->wgmma = sm90a_available();
  ULTRAMEM_RETURN_IF_ERROR(
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_bytes));
  return device_attribute(cudaDevAttrMultiProcessorCount, &limits->num_sms);
}

// ---- dcore -------------------------------------------------------------------------------------

// What slices of the tokens add to dcore, and where their sums go.
struct CoreSums {
  const float* partials = nullptr;  // [slices, H, C, R, R]; null where dcore is not wanted
  int64_t num_slices = 0;
  float* grad_core = nullptr;  // [C, H, R, R]
  int num_heads = 0;
  int num_cores = 0;
  int matrix = 0;  // R * R

  __host__ __device__ int64_t num_elements() const {
    return int64_t{num_heads} * num_cores * matrix;
  }
};

// ---- gathered rows -----------------------------------------------------------------------------

struct GatherWorkspace {
  int64_t num_entries;
  int64_t num_key_rows;
  int num_key_bits;
  size_t sort_bytes;
  // Offsets.
  size_t key_rows, sorted_key_rows, entries, sorted_entries, row_starts, sort;
};

void lay_out_gather(const ProductKeyTopkParams& p, GatherWorkspace* workspace,
                    WorkspaceLayout& layout);

// grad_axis_scores [T, H, 2, R, m] is dS.
Status launch_gather(const ProductKeyTopkBwdParams& p, const GatherWorkspace& workspace,
                     const float* grad_axis_scores, Stream stream);

// ---- products on tensor cores ------------------------------------------------------------------

// How the steps of a product (each 64 deep, into one tile of the output) are spread over blocks.
// Tiles are taken in order. Where whole tiles would leave the machine half idle, a tile's steps may
// be split between blocks, whose partial sums a later kernel adds in the order of the blocks.
//
// In a cluster, blocks take neighbouring rows of tiles in step and share what they load. A tile of
// the schedule then stands for one of each of them, and a block of it for the cluster. Where a
// plane (head, side and rank) has an odd number of rows of tiles, the last ones of two planes are
// taken together, too, without sharing anything, or each has a partner that does nothing.
struct ProductSchedule {
  int cluster = 1;
  bool odd_rows = false;  // of tiles of a plane in a cluster, whose last ones are taken together
  int64_t num_tiles = 0;
  int64_t tile_steps = 0;
  bool split = false;
  bool disjoint = false;  // as many blocks for every tile: none has parts of two
  // Of share_out:
  int num_blocks = 0;
  int spare_units = 0;
  int64_t block_units = 0;
  Divisor by_blocks, by_tile_steps;
  Divisor by_steps;  // of all tiles, where these are split

  // Every block gets as many steps, or tiles where these are not split, and some one more.
  void share_out(int64_t blocks) {
    const int64_t units = split ? num_tiles * tile_steps : num_tiles;
    num_blocks = static_cast<int>(blocks);
    block_units = units / blocks;
    spare_units = static_cast<int>(units % blocks);
    by_blocks = Divisor(blocks);
    by_tile_steps = Divisor(tile_steps);
    by_steps = Divisor(split ? units : 1);
  }
  // Of all units, (block / num_blocks) rounded down.
  __host__ __device__ int64_t first_step(int block) const {
    return (block * block_units + by_blocks.quotient(block * spare_units)) *
           (split ? 1 : tile_steps);
  }
  // The block that does a step of a split schedule.
  __host__ __device__ int block_of(int64_t step) const {
    return by_steps.quotient(static_cast<int>((step + 1) * num_blocks - 1));
  }
  __host__ __device__ int tile_of(int64_t step) const {
    return by_tile_steps.quotient(static_cast<int>(step));
  }
  // Where a block whose first step is in first_tile leaves its part of a tile that it shares with
  // others. With fewer tiles than blocks, (block, tile) goes up by at least one in sum from part to
  // part; with more, a block shares at most its first and its last tile.
  __host__ __device__ int64_t slot(int64_t block, int64_t first_tile, int64_t tile) const {
    if (disjoint) return block;
    return block + (first_tile < block ? first_tile : block) + (tile != first_tile);
  }
  int64_t num_slots() const {
    if (disjoint) return cluster * num_blocks;
    return split ? cluster * (num_blocks + (num_tiles < num_blocks ? num_tiles : num_blocks)) : 0;
  }
};

struct DensePlan {
  bool applies = false;
  bool wgmma = false;            // whether launch_product_wgmma takes the products
  bool entries_at_once = false;  // whether launch_entries makes the buckets, and no dS before
  int tile_cols = 0;             // of the output
  int num_stages = 0;            // of the ring in shared memory; not where wgmma
  ProductSchedule query;
  ProductSchedule keys;
  // Until the last product writes it, grad_query is memory for dS, which is grouped into buckets
  // first, and then for parts of tiles of grad_keys, unless the kernel of grad_query sums these.
  bool grad_query_holds_grads = false;
  bool query_sums_keys = false;
  int64_t grad_query_parts = 0;
  int64_t partial_bytes = 0;  // beside those, of whichever product needs more
  // Offsets.
  size_t entries, bucket_starts, key_finite, query_finite, max_grad;
};

// Says whether the dense path takes this call and how. Which gradients are wanted changes only how
// much memory it takes, so that the others' values do not depend on it.
void plan_dense(const ProductKeyTopkBwdParams& p, const DeviceLimits& limits, DensePlan* plan);

// Takes what the plan needs apart from the partial sums, which may overlay dS.
void lay_out_dense(const ProductKeyTopkBwdParams& p, DensePlan* plan, WorkspaceLayout& layout);

// What the scores kernel finds out for the products; null where they are not used.
struct ScoresFindings {
  // 1 where a row is known to be finite. A query is taken to be where any of its kept scores is.
  uint8_t* key_finite = nullptr;    // [H, 2, R, n]
  uint8_t* query_finite = nullptr;  // [H, 2, R, T]
  // The bits of the largest finite |dS|; null where dS needs no scale.
  uint32_t* max_grad = nullptr;
};
ScoresFindings scores_findings(const ProductKeyTopkBwdParams& p, const DensePlan& plan);

// dg to entries in buckets, and parts of dcore [token_tiles, H, C, R, R], or null, for bfloat16, R
// = C of 1 or 2, an even m and up to 32 pairs a token: one kernel in place of that of the scores
// and that of the buckets.
bool entries_apply(const ProductKeyTopkBwdParams& p, const DeviceLimits& limits);
Status launch_entries(const ProductKeyTopkBwdParams& p, const DensePlan& plan, float* core_partials,
                      Stream stream);

// Whether launch_dense makes the sums of dcore: where a kernel of a product has time for it.
bool dense_sums_core(const ProductKeyTopkBwdParams& p, const DensePlan& plan);

// `partials` has plan.partial_bytes and may overlay grad_axis_scores, and grad_axis_scores
// grad_query. Without plan.entries_at_once, grad_axis_scores is dS.
Status launch_dense(const ProductKeyTopkBwdParams& p, const DensePlan& plan,
                    const float* grad_axis_scores, const CoreSums& core_sums, float* partials,
                    Stream stream);

}  // namespace ultramem::cuda
