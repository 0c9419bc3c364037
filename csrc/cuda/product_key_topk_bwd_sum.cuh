// The sums of the parts that the blocks of a split product leave (product_key_topk_bwd.h).
#pragma once

#include "async_copy.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "product_key_topk_bwd_product.cuh"

namespace ultramem::cuda {

inline constexpr int kSumThreads = 256;
// On their way together, besides the first.
inline constexpr int kPartsAtOnce = 4;

// Grid: piece of kSumThreads packets of a block's part of a tile, (tile, block of its cluster). The
// kernel is little longer than one access to memory: a thread knows where its parts are before it
// reads the first, and reads them together.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads)
    product_key_topk_bwd_sum_kernel(__grid_constant__ const Product p, int tile_cols) {
  release_dependent_grid();
  const ProductSchedule& schedule = p.schedule;
  const int tile = static_cast<int>(blockIdx.y) / schedule.cluster;
  const int block_rank = static_cast<int>(blockIdx.y) % schedule.cluster;
  const int64_t first_step = tile * schedule.tile_steps;
  const auto first_block = static_cast<int>(schedule.block_of(first_step));
  const auto last_block = static_cast<int>(schedule.block_of(first_step + schedule.tile_steps - 1));
  // This is schedule.slot() without its divisions. Blocks after the first one begin in this tile,
  // and the first one here or, with fewer tiles than blocks, in the tile before; with more tiles,
  // the block is the smaller of the two numbers wherever it begins. Disjoint blocks have one each.
  const int most_shared = schedule.disjoint ? 0 : tile;
  const bool begins_here = schedule.first_step(first_block) >= first_step;
  const int first_slot =
      first_block + (begins_here ? min(most_shared, first_block) : min(tile - 1, first_block) + 1);

  const TileCoords coords(p, tile, block_rank);
  const uint32_t element = (blockIdx.x * kSumThreads + threadIdx.x) * kPacket;
  const uint32_t row_of_tile = element / static_cast<uint32_t>(tile_cols);
  const int64_t row = int64_t{coords.row_tile} * kTileRows + row_of_tile;
  const int col = coords.col_tile * tile_cols + static_cast<int>(element - row_of_tile * tile_cols);
  // A slot has the parts of all blocks of a cluster.
  const int64_t part_elements = int64_t{kTileRows} * tile_cols;
  const auto part_of = [&](int slot) {
    return p.partials.part(slot * schedule.cluster + block_rank, part_elements) + element;
  };
  wait_for_prerequisite_grid();
  if (first_block == last_block) return;  // stored by its block
  if (row >= p.out.num_rows || col >= p.key_dim) return;

  float sum[kPacket];
  load_floats<kPacket>(part_of(first_slot), sum);
  for (int block = first_block + 1; block <= last_block; block += kPartsAtOnce) {
    float part[kPartsAtOnce][kPacket] = {};
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int of_block = block + i;
      if (of_block > last_block) break;
      load_floats<kPacket>(part_of(of_block + min(most_shared, of_block)), part[i]);
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kPacket; ++j) sum[j] += part[i][j];
    }
  }
  const float unscale = power_of_two(-scale_exponent(p.max_grad));
#pragma unroll
  for (int i = 0; i < kPacket; ++i) sum[i] *= unscale;
  auto* out = static_cast<scalar_t*>(p.out.data) + coords.offset(p.out, coords.rank) +
              row * p.out.row_stride + col;
  store_rounded<kPacket>(sum, out);
}

}  // namespace ultramem::cuda
