// What a block of tucker_query_small_bwd.cu works on, the copies of it, and dP.
#pragma once

#include <algorithm>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "mma.cuh"
#include "ultramem/tucker_query.h"

namespace ultramem::cuda::tucker_query_bwd {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kTokenTile = 8;
inline constexpr int kVector = 8;  // elements in 16 bytes
inline constexpr int kMaxKeyDim = 1024;
inline constexpr int kThreadGains = kMaxKeyDim / kThreads;
inline constexpr int kOrderColumns = 32;  // of x, in an order of their own, see store_x
inline constexpr int kOrderPieces = kOrderColumns / kVector;

// kTokenTiles tiles of 8 tokens, kColumns columns of D.
template <int kTokenTiles, int kColumns>
struct Traits {
  static constexpr int kTokens = std::max(kTokenTiles * kTokenTile, 16);
  static constexpr int kLaneTokens = std::min(kTokens, kWarpSize);
  // dP of many tokens takes long, and every tile of columns needs it: a kernel ahead makes it.
  static constexpr bool kGradGiven = kTokenTiles > 4;
  // Whole sectors of 32 bytes of every row, half of which cost the L2 cache more than all.
  static_assert(kColumns % 16 == 0);
  static constexpr int kPieces = kColumns / kVector;  // of a row of W or x
  // Rows of W and x in shared memory: an odd number of 16-byte pieces, so that ldmatrix finds eight
  // of them in different banks.
  static constexpr int kStride = (kPieces | 1) * 16;
  static constexpr int kThreadX = (kTokens * kPieces + kThreads - 1) / kThreads;

  // How the warps share out grad_x: 16 tokens by all columns each, and the rows of W.
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kTokenParts = kTokens / 16;
  static constexpr int kRowParts = kWarps / kTokenParts;
  // 8 more or less than a multiple of 32: the fragments of a warp are written without conflicts.
  static constexpr int kPartialStride = kColumns + 8;
  static_assert(kPartialStride % 32 == 8 || kPartialStride % 32 == 24, "conflicts");
  static constexpr int kPartialTokens = kTokenTiles * kTokenTile;
  static constexpr int kPartialSize = kPartialTokens * kPartialStride;
};

struct Plan {
  int columns;             // of a block
  int column_tiles;        // clusters
  int cluster_blocks;      // one for each segment
  int rows;                // of W in shared memory: Kd, in whole steps of 16
  int row_stride;          // bytes from token to token of g, p and dP
  int tile_vectors;        // of grad_norm_weight, that belong to one cluster
  int grad_offset;         // bytes into shared memory, behind W
  int x_offset;            // behind dP
  int values_offset;       // behind x
  int received_offset;     // behind p
  int gains_offset;        // behind what others send
  int rstd_offset;         // behind the gains
  int gain_grads_offset;   // behind 1 / rms
  int gain_values_offset;  // behind g of the gain's vectors
  int gain_sums_offset;    // behind p of the gain's vectors
  int gain_total_offset;   // behind the block's sums: those of all blocks
  int barrier_offset;
  int shared_bytes;
};

template <int kTokenTiles, int kColumns>
Plan make_plan(const TuckerQueryBwdParams& p) {
  using T = Traits<kTokenTiles, kColumns>;
  Plan plan{};
  plan.columns = kColumns;
  plan.column_tiles = static_cast<int>(ceil_div(p.d_model, kColumns));
  plan.cluster_blocks = static_cast<int>(p.num_segments);
  plan.rows = static_cast<int>(16 * ceil_div(p.key_dim, 16));
  plan.row_stride = plan.rows * 2 + 16;  // an odd number of pieces, as for x
  plan.tile_vectors = static_cast<int>(ceil_div(p.key_dim / kVector, plan.column_tiles));
  const int own_tokens = static_cast<int>(ceil_div(p.num_tokens, plan.cluster_blocks));
  // The partial sums of grad_x take the place of W, while dP and x are still in use.
  plan.grad_offset = std::max(plan.rows * T::kStride, T::kRowParts * T::kPartialSize * 4);
  plan.x_offset = plan.grad_offset + T::kTokens * plan.row_stride;
  plan.values_offset = plan.x_offset + T::kTokens * T::kStride;
  plan.received_offset = plan.values_offset + (T::kGradGiven ? 0 : T::kTokens * plan.row_stride);
  plan.gains_offset = plan.received_offset + own_tokens * plan.cluster_blocks * kColumns * 4;
  plan.rstd_offset = plan.gains_offset + (T::kGradGiven ? 0 : plan.rows * 4);
  plan.gain_grads_offset = plan.rstd_offset + T::kTokens * 4;
  plan.gain_values_offset = plan.gain_grads_offset + plan.tile_vectors * T::kTokens * 16;
  plan.gain_sums_offset = plan.gain_values_offset + plan.tile_vectors * T::kTokens * 16;
  const int gain_bytes = plan.tile_vectors * kVector * 4;
  plan.gain_total_offset = plan.gain_sums_offset + gain_bytes;
  plan.barrier_offset = plan.gain_total_offset + plan.cluster_blocks * gain_bytes;
  plan.shared_bytes = plan.barrier_offset + 16;
  return plan;
}

// Where the kernel ahead leaves dP, [T, 2 H Q Kd], and 1 / rms, [T, 2 H Q].
struct Workspace {
  explicit Workspace(const TuckerQueryBwdParams& p)
      : grad(p.workspace),
        rstd(reinterpret_cast<float*>(static_cast<unsigned char*>(p.workspace) + grad_bytes(p))) {}

  static size_t grad_bytes(const TuckerQueryBwdParams& p) {
    return align_up(static_cast<size_t>(p.num_tokens * p.num_segments * p.key_dim) * 2);
  }
  static size_t bytes(const TuckerQueryBwdParams& p) {
    return grad_bytes(p) + static_cast<size_t>(p.num_tokens * p.num_segments) * sizeof(float);
  }

  void* grad;
  float* rstd;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// What a block works on, and where it keeps it.
struct Block {
  __device__ Block(const TuckerQueryBwdParams& p, const Plan& plan, unsigned char* shared)
      : weight(shared),
        grad(shared + plan.grad_offset),
        x(shared + plan.x_offset),
        values(shared + plan.values_offset),
        gain_grads(shared + plan.gain_grads_offset),
        gain_values(shared + plan.gain_values_offset) {
    rank = static_cast<int>(cluster_rank());
    tile = static_cast<int>(blockIdx.x) / plan.cluster_blocks;
    first_column = int64_t{tile} * plan.columns;
    num_tokens = static_cast<int>(p.num_tokens);
    own_tokens = (num_tokens - rank + plan.cluster_blocks - 1) / plan.cluster_blocks;
    const auto vectors = static_cast<int>(p.key_dim / kVector);
    num_gain_vectors = (vectors - tile + plan.column_tiles - 1) / plan.column_tiles;

    partials = reinterpret_cast<float*>(shared);
    received = reinterpret_cast<float*>(shared + plan.received_offset);
    gains = reinterpret_cast<float*>(shared + plan.gains_offset);
    rstd = reinterpret_cast<float*>(shared + plan.rstd_offset);
    gain_sums = reinterpret_cast<float*>(shared + plan.gain_sums_offset);
    gain_totals = reinterpret_cast<float*>(shared + plan.gain_total_offset);
    received_barrier = shared_address(shared + plan.barrier_offset);
    grad_barrier = received_barrier + 8;
  }

  int rank;  // in the cluster
  int tile;
  int64_t first_column;
  int num_tokens;
  int own_tokens;        // its tokens are rank, rank + cluster_blocks, ...
  int num_gain_vectors;  // tile, tile + column_tiles, ... of the gain are the cluster's

  unsigned char* weight;       // [row][column]
  unsigned char* grad;         // g [token][row], then dP in its place
  unsigned char* x;            // [token][column], see store_x
  unsigned char* values;       // p [token][row]
  unsigned char* gain_grads;   // g [vector][token][8]
  unsigned char* gain_values;  // p [vector][token][8]
  float* partials;             // [part of the rows][token][column], in the place of W
  float* received;             // [own token][block][column]
  float* gains;                // [row], zeros behind Kd
  float* rstd;                 // [token]
  float* gain_sums;            // [vector][8]
  float* gain_totals;          // [block][vector][8]
  uint32_t received_barrier;
  uint32_t grad_barrier;
};

// The block's part of each row of W to the L2 cache.
template <typename scalar_t, typename T>
__device__ __forceinline__ void prefetch_weight(const TuckerQueryBwdParams& p, const Block& block) {
  constexpr int kVectors = kPrefetchBytes / 16;
  constexpr int kRowPrefetches = (T::kPieces + kVectors - 1) / kVectors;
  const auto* weight = static_cast<const scalar_t*>(p.weight) + block.rank * p.key_dim * p.d_model +
                       block.first_column;
  const auto columns = static_cast<int>(p.d_model - block.first_column);
  const auto d_model = static_cast<int>(p.d_model);  // 2^20 by 2^10 rows at most
#pragma unroll 1
  for (int i = threadIdx.x; i < static_cast<int>(p.key_dim) * kRowPrefetches; i += kThreads) {
    const int column = i % kRowPrefetches * kVectors * kVector;
    if (column < columns) prefetch_l2(weight + (i / kRowPrefetches * d_model + column));
  }
}

// Requests the thread's pieces of x.
template <typename scalar_t, typename T>
__device__ __forceinline__ void load_x(const TuckerQueryBwdParams& p, const Block& block,
                                       uint4 (&pieces)[T::kThreadX]) {
#pragma unroll
  for (int n = 0; n < T::kThreadX; ++n) {
    const int i = n * kThreads + static_cast<int>(threadIdx.x);
    const int token = i / T::kPieces;
    const int64_t column = block.first_column + i % T::kPieces * kVector;
    pieces[n] = uint4{};
    if (token < block.num_tokens && column < p.d_model) {
      pieces[n] = __ldcg(reinterpret_cast<const uint4*>(static_cast<const scalar_t*>(p.x) +
                                                        token * p.d_model + column));
    }
  }
}

// A tensor-core product leaves the thread with two neighbouring columns of each tile of 8. Of 32
// columns pair j of piece q stands at pair 4 j + q, so that it has a whole piece of four tiles, and
// of a rest of 16 pair j at pair j % 2 * 4 + j / 2: half a piece of two tiles.
template <typename T>
__device__ __forceinline__ void store_x(const Block& block, const uint4 (&pieces)[T::kThreadX]) {
  constexpr int kOrdered = T::kPieces / kOrderPieces * kOrderPieces;
#pragma unroll
  for (int n = 0; n < T::kThreadX; ++n) {
    const int i = n * kThreads + static_cast<int>(threadIdx.x);
    const int token = i / T::kPieces;
    const int piece = i % T::kPieces;
    if (token >= T::kTokens) continue;
    unsigned char* row = block.x + token * T::kStride;
    if (piece >= kOrdered) {
      auto* halves = reinterpret_cast<uint2*>(row + kOrdered * 16) + (piece - kOrdered);
      halves[0] = {pieces[n].x, pieces[n].z};
      halves[2] = {pieces[n].y, pieces[n].w};
      continue;
    }
    auto* pairs = reinterpret_cast<uint32_t*>(row + piece / kOrderPieces * kOrderColumns * 2) +
                  piece % kOrderPieces;
    pairs[0] = pieces[n].x;
    pairs[4] = pieces[n].y;
    pairs[8] = pieces[n].z;
    pairs[12] = pieces[n].w;
  }
}

template <typename scalar_t, typename T>
__device__ __forceinline__ void copy_weight(const TuckerQueryBwdParams& p, const Plan& plan,
                                            const Block& block) {
  const auto* weight = static_cast<const scalar_t*>(p.weight);
  const scalar_t* tile = weight + block.rank * p.key_dim * p.d_model + block.first_column;
  const uint32_t target = shared_address(block.weight);
  const auto columns = static_cast<int>(p.d_model - block.first_column);
  const auto d_model = static_cast<int>(p.d_model);  // 2^20 by 2^10 rows at most
#pragma unroll 4
  for (int i = threadIdx.x; i < plan.rows * T::kPieces; i += kThreads) {
    const int row = i / T::kPieces;
    const int piece = i % T::kPieces;
    const bool valid = row < p.key_dim && piece * kVector < columns;
    cp_async_16(target + row * T::kStride + piece * 16,
                valid ? tile + (row * d_model + piece * kVector) : weight, valid);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void unpack(uint4 vector, float (&out)[kVector]) {
  scalar_t elements[kVector];
  memcpy(elements, &vector, sizeof(vector));
#pragma unroll
  for (int e = 0; e < kVector; ++e) out[e] = to_float(elements[e]);
}

template <typename scalar_t>
__device__ __forceinline__ uint4 pack(const float (&values)[kVector]) {
  return {
      pack_rounded<scalar_t>(values[0], values[1]), pack_rounded<scalar_t>(values[2], values[3]),
      pack_rounded<scalar_t>(values[4], values[5]), pack_rounded<scalar_t>(values[6], values[7])};
}

// g and p, for the lanes that make dP of them. Zeros for tokens and rows that do not exist.
template <typename scalar_t, typename T>
__device__ __forceinline__ void copy_norm_rows(const TuckerQueryBwdParams& p, const Plan& plan,
                                               const Block& block) {
  const auto* grads = static_cast<const scalar_t*>(p.grad_query);
  const auto* values = static_cast<const scalar_t*>(p.projection);
#pragma unroll 1
  for (int token = threadIdx.x / kWarpSize; token < T::kTokens; token += kWarps) {
    const int64_t source = (token * p.num_segments + block.rank) * p.key_dim;
    const int lane_row = static_cast<int>(threadIdx.x) % kWarpSize * kVector;
    const uint32_t grad_target = shared_address(block.grad) + token * plan.row_stride;
    const uint32_t value_target = shared_address(block.values) + token * plan.row_stride;
    for (int row = lane_row; row < plan.rows; row += kWarpSize * kVector) {
      const bool valid = token < block.num_tokens && row < p.key_dim;
      const int64_t element = valid ? source + row : 0;
      cp_async_16(grad_target + row * 2, grads + element, valid);
      cp_async_16(value_target + row * 2, values + element, valid);
    }
  }
}

// g and p again where the gradient of the gain needs them.
template <typename scalar_t, typename T>
__device__ __forceinline__ void copy_gain_rows(const TuckerQueryBwdParams& p, const Plan& plan,
                                               const Block& block) {
  const auto* grads = static_cast<const scalar_t*>(p.grad_query);
  const auto* values = static_cast<const scalar_t*>(p.projection);
#pragma unroll 1
  for (int i = threadIdx.x; i < block.num_gain_vectors * T::kTokens; i += kThreads) {
    const int token = i % T::kTokens;
    const int64_t row = int64_t{block.tile + i / T::kTokens * plan.column_tiles} * kVector;
    const bool valid = token < block.num_tokens;
    const int64_t element = valid ? (token * p.num_segments + block.rank) * p.key_dim + row : 0;
    cp_async_16(shared_address(block.gain_grads + i * 16), grads + element, valid);
    cp_async_16(shared_address(block.gain_values + i * 16), values + element, valid);
  }
}

// dP and 1 / rms of the kernel ahead: a bulk copy a token, and zeros where there is no token or
// row.
template <typename scalar_t, typename T>
__device__ __forceinline__ void copy_given_grad(const TuckerQueryBwdParams& p,
                                                const Workspace& workspace, const Plan& plan,
                                                const Block& block) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto row_bytes = static_cast<uint32_t>(p.key_dim * 2);
  // A warp has its lanes issue such copies one after another: all warps have some.
  constexpr int kWarpTokens = T::kTokens / kWarps;
  const int warp = thread / kWarpSize;
  const int copied_token = warp * kWarpTokens + thread % kWarpSize;
  if (thread % kWarpSize < kWarpTokens && copied_token < block.num_tokens) {
    const auto* grads = static_cast<const scalar_t*>(workspace.grad) +
                        (copied_token * p.num_segments + block.rank) * p.key_dim;
    bulk_copy(shared_address(block.grad + copied_token * plan.row_stride), grads, row_bytes,
              block.grad_barrier);
  }
  if (thread < T::kTokens) {
    const bool exists = thread < block.num_tokens;
    block.rstd[thread] =
        exists ? __ldcg(workspace.rstd + thread * p.num_segments + block.rank) : 0.0f;
    // Kd is 8 short of whole steps at most.
    unsigned char* row = block.grad + thread * plan.row_stride;
    if (plan.rows > p.key_dim) *reinterpret_cast<uint4*>(row + row_bytes) = uint4{};
  }
  const int row_pieces = plan.rows / kVector;
  for (int token = block.num_tokens + warp; token < T::kTokens; token += kWarps) {
    auto* row = reinterpret_cast<uint4*>(block.grad + token * plan.row_stride);
    for (int i = thread % kWarpSize; i < row_pieces; i += kWarpSize) row[i] = uint4{};
  }
}

__device__ __forceinline__ void load_gains(const Block& block, int vector, float (&out)[kVector]) {
  const auto* source = reinterpret_cast<const float4*>(block.gains) + vector * 2;
  const float4 lower = source[0];
  const float4 upper = source[1];
  out[0] = lower.x;
  out[1] = lower.y;
  out[2] = lower.z;
  out[3] = lower.w;
  out[4] = upper.x;
  out[5] = upper.y;
  out[6] = upper.z;
  out[7] = upper.w;
}

// dP in the place of g, and 1 / rms. A warp makes a token's, a lane of what it has copied itself.
template <typename scalar_t, typename T>
__device__ __forceinline__ void make_grad(const TuckerQueryBwdParams& p, const Plan& plan,
                                          const Block& block) {
  const int lane = threadIdx.x % kWarpSize;
  const int num_vectors = plan.rows / kVector;
  const float per_element = 1.0f / static_cast<float>(p.key_dim);
#pragma unroll 1
  for (int token = threadIdx.x / kWarpSize; token < T::kTokens; token += kWarps) {
    if (token >= block.num_tokens) {  // the copy has left zeros
      if (lane == 0) block.rstd[token] = 0.0f;
      continue;
    }
    auto* token_grads = reinterpret_cast<uint4*>(block.grad + token * plan.row_stride);
    const auto* token_values =
        reinterpret_cast<const uint4*>(block.values + token * plan.row_stride);
    float squares[2] = {};
    float dots[2] = {};
#pragma unroll 2
    for (int vector = lane; vector < num_vectors; vector += kWarpSize) {
      float grads[kVector];
      float values[kVector];
      float gains[kVector];
      unpack<scalar_t>(token_grads[vector], grads);
      unpack<scalar_t>(token_values[vector], values);
      load_gains(block, vector, gains);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        squares[e % 2] = fmaf(values[e], values[e], squares[e % 2]);
        dots[e % 2] = fmaf(grads[e] * gains[e], values[e], dots[e % 2]);
      }
    }
    __syncwarp();
    const float mean = warp_sum(squares[0] + squares[1]) * per_element;
    const float dot = warp_sum(dots[0] + dots[1]) * per_element;
    const float rstd = rsqrtf(mean + static_cast<float>(p.eps));
    const float along = dot * rstd * rstd;
    if (lane == 0) block.rstd[token] = rstd;
#pragma unroll 2
    for (int vector = lane; vector < num_vectors; vector += kWarpSize) {
      float grads[kVector];
      float values[kVector];
      float gains[kVector];
      unpack<scalar_t>(token_grads[vector], grads);
      unpack<scalar_t>(token_values[vector], values);
      load_gains(block, vector, gains);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        values[e] = rstd * (grads[e] * gains[e] - values[e] * along);
      }
      token_grads[vector] = pack<scalar_t>(values);
    }
  }
}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace ultramem::cuda::tucker_query_bwd
