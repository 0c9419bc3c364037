// The sums of the parts that the blocks of a split product leave (product_key_topk_bwd.h).
#pragma once

#include "async_copy.cuh"
#include "common.cuh"
#include "product_key_common.cuh"
#include "product_key_topk_bwd.h"
#include "product_key_topk_bwd_product.cuh"

namespace ultramem::cuda {

inline constexpr int kSumThreads = 256;

// Where the parts of a tile are that a block of a cluster shares with others.
struct TileParts {
  TileCoords coords;
  int block_rank;
  int first_block, last_block;
  int first_slot;
  int most_shared;

  // The tile of this index in [tiles, blocks of a cluster].
  __device__ TileParts(const Product& p, int index)
      : coords(p, index / p.schedule.cluster, index % p.schedule.cluster),
        block_rank(index % p.schedule.cluster) {
    const ProductSchedule& schedule = p.schedule;
    const int tile = index / schedule.cluster;
    const int64_t first_step = tile * schedule.tile_steps;
    first_block = schedule.block_of(first_step);
    last_block = schedule.block_of(first_step + schedule.tile_steps - 1);
    // This is schedule.slot() without its divisions. Blocks after the first one begin in this tile,
    // and the first one here or, with fewer tiles than blocks, in the tile before; with more tiles,
    // the block is the smaller of the two numbers wherever it begins. Disjoint blocks have one
    // each.
    most_shared = schedule.disjoint ? 0 : tile;
    const bool begins_here = schedule.first_step(first_block) >= first_step;
    first_slot = first_block +
                 (begins_here ? min(most_shared, first_block) : min(tile - 1, first_block) + 1);
  }
};

// Sums the parts of kPieces packets of a tile, each kThreads after the one before, of which the
// first num_pieces exist. A thread knows where its parts are before it reads the first, and reads
// kPartsAtOnce and the first together.
template <typename scalar_t, int kThreads, int kPieces, int kPartsAtOnce>
__device__ __forceinline__ void sum_packets(const Product& p, int tile_cols, const TileParts& parts,
                                            uint32_t first_packet, uint32_t num_pieces) {
  if (parts.first_block == parts.last_block) return;  // stored by its block
  uint32_t elements[kPieces];
  int rows[kPieces], cols[kPieces];
  bool exists[kPieces];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    elements[k] = (first_packet + k * kThreads) * kPacket;
    const uint32_t row = elements[k] / static_cast<uint32_t>(tile_cols);
    rows[k] = static_cast<int>(row);
    cols[k] = parts.coords.col_tile * tile_cols + static_cast<int>(elements[k] - row * tile_cols);
    exists[k] = static_cast<uint32_t>(k) < num_pieces && cols[k] < p.key_dim &&
                int64_t{parts.coords.row_tile} * kTileRows + rows[k] < p.out.num_rows;
  }
  // A slot has the parts of all blocks of a cluster.
  const int64_t part_elements = int64_t{kTileRows} * tile_cols;
  const auto part_of = [&](int slot) {
    return p.partials.part(int64_t{slot} * p.schedule.cluster + parts.block_rank, part_elements);
  };

  float sums[kPieces][kPacket] = {};
  const float* first_part = part_of(parts.first_slot);
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (exists[k]) load_floats<kPacket>(first_part + elements[k], sums[k]);
  }
  for (int block = parts.first_block + 1; block <= parts.last_block; block += kPartsAtOnce) {
    float part[kPartsAtOnce][kPieces][kPacket] = {};
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int of_block = block + i;
      if (of_block > parts.last_block) break;
      const float* from = part_of(of_block + min(parts.most_shared, of_block));
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        if (exists[k]) load_floats<kPacket>(from + elements[k], part[i][k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
#pragma unroll
        for (int j = 0; j < kPacket; ++j) sums[k][j] += part[i][k][j];
      }
    }
  }
  const float unscale = power_of_two(-scale_exponent(p.max_grad));
  auto* out = static_cast<scalar_t*>(p.out.data) + parts.coords.offset(p.out, parts.coords.rank);
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (!exists[k]) continue;
#pragma unroll
    for (int j = 0; j < kPacket; ++j) sums[k][j] *= unscale;
    const int64_t row = int64_t{parts.coords.row_tile} * kTileRows + rows[k];
    store_rounded<kPacket>(sums[k], out + row * p.out.row_stride + cols[k]);
  }
}

// Grid: piece of kSumThreads packets of a tile, (tile, block of its cluster). The kernel is little
// longer than one access to memory.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads)
    product_key_topk_bwd_sum_kernel(__grid_constant__ const Product p, int tile_cols) {
  release_dependent_grid();
  const TileParts parts(p, static_cast<int>(blockIdx.y));
  wait_for_prerequisite_grid();
  sum_packets<scalar_t, kSumThreads, 1, 4>(p, tile_cols, parts,
                                           blockIdx.x * kSumThreads + threadIdx.x, 1);
}

// This block's share of all tiles, by so many threads of a kernel behind that of the product. Waits
// for that.
template <typename scalar_t, int kThreads, int kCols>
__device__ __forceinline__ void sum_share(const Product& p, int thread) {
  constexpr int kPieces = 8;
  constexpr int kPartsAtOnce = 2;
  constexpr uint32_t kTilePieces = kTileRows * kCols / (kPacket * kThreads);
  const auto num_pieces =
      static_cast<uint32_t>(p.schedule.num_tiles) * p.schedule.cluster * kTilePieces;
  const uint32_t block_pieces = (num_pieces + gridDim.x - 1) / gridDim.x;
  const uint32_t first = min(blockIdx.x * block_pieces, num_pieces);
  const uint32_t last = min(first + block_pieces, num_pieces);
  uint32_t tile = first / kTilePieces;
  uint32_t in_tile = first - tile * kTilePieces;
  TileParts parts(p, static_cast<int>(tile));
  wait_for_prerequisite_grid();
#pragma unroll 1
  for (uint32_t piece = first; piece < last;) {
    const uint32_t num = min(kPieces, min(last - piece, kTilePieces - in_tile));
    sum_packets<scalar_t, kThreads, kPieces, kPartsAtOnce>(p, kCols, parts,
                                                           in_tile * kThreads + thread, num);
    piece += num;
    in_tile += num;
    if (in_tile == kTilePieces && piece < last) {
      in_tile = 0;
      parts = TileParts(p, static_cast<int>(++tile));
    }
  }
}

}  // namespace ultramem::cuda
