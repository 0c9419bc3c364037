// tucker_query for few tokens, backward, in two kernels: the norm's (rms_norm.cuh), which leaves
// dP [T, P] with P = 2 H Q Kd, and one whose blocks share out what follows from it:
//   grad_x = dP W              bound by reading W: a block takes 32 columns of it, all rows
//   grad_weight = dP^T x       bound by writing it: a block takes a tile of 64 x 128
//   grad_norm_weight           the sum of the partial sums that the norm's kernel left
// On Hopper the second begins while the first runs, and reads ahead what that does not write.
#include <algorithm>

#include "async_copy.cuh"
#include "common.cuh"
#include "kernel_registry.h"
#include "mma.cuh"
#include "rms_norm.cuh"
#include "ultramem/tucker_query.h"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTokenTile = 8;

// grad_x^T = W^T dP^T: the warps take turns over steps of 32 rows of W.
constexpr int kInputColumns = 32;
constexpr int kStepRows = 32;
constexpr int kStepWeightBytes = kStepRows * kInputColumns * 2;
constexpr int kTileBytes = kWarpSize * 16;  // of dP: 8 tokens by 32 rows of W
// 4 more than a multiple of 16, so that the fragments of a warp are written without conflicts.
constexpr int kInputStride = kInputColumns + 4;

// grad_weight: tiles of 64 rows by 128 columns, a warp has 32 by 32 of it. Rows in shared memory
// are 16 bytes longer than they need to be, so that ldmatrix finds them in different banks.
constexpr int kTileRows = 64;
constexpr int kTileColumns = 128;
constexpr int kRowsStride = kTileRows * 2 + 16;
constexpr int kColumnsStride = kTileColumns * 2 + 16;

// kTokenTiles tiles of 8 tokens.
template <int kTokenTiles>
struct Traits {
  // Steps in flight a warp: as many as let two blocks share a multiprocessor.
  static constexpr int kRingSteps = kTokenTiles <= 2 ? 4 : kTokenTiles == 4 ? 3 : 2;
  static constexpr int kStepBytes = kStepWeightBytes + kTokenTiles * kTileBytes;
  static constexpr int kWarpPartials = kTokenTiles * kTokenTile * kInputStride;
  static constexpr int kInputBytes =
      kWarps * std::max(kRingSteps * kStepBytes, kWarpPartials* static_cast<int>(sizeof(float)));

  // The tokens are what grad_weight sums over: whole steps of 16.
  static constexpr int kTokens = std::max(kTokenTiles * kTokenTile, 16);
  static constexpr int kWeightBytes =
      kTokens * (kRowsStride + kColumnsStride) + kTileRows * kColumnsStride;

  static constexpr int kSharedBytes = std::max(kInputBytes, kWeightBytes);
  static_assert(kSharedBytes <= 99 * 1024, "what every architecture from sm_80 on has");
};

struct Arguments {
  TuckerQueryBwdParams p;
  const void* grad_projection;  // dP [T, P]
  const float* partial_sums;    // [num_partials, Kd]
  int64_t num_partials;
  int64_t row_width;  // P
  int input_blocks;
  int weight_blocks;
  int weight_column_tiles;
};

template <typename scalar_t, int kTokenTiles>
__device__ __forceinline__ void input_block(const Arguments& args, int block,
                                            unsigned char* shared) {
  constexpr int kRing = Traits<kTokenTiles>::kRingSteps;
  constexpr int kStepBytes = Traits<kTokenTiles>::kStepBytes;
  const TuckerQueryBwdParams& p = args.p;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_column = int64_t{block} * kInputColumns;
  const int64_t num_steps = ceil_div(args.row_width, kStepRows);
  const auto warp_steps = static_cast<int>((num_steps - warp + kWarps - 1) / kWarps);
  const auto* weight = static_cast<const scalar_t*>(p.weight);
  const auto* grad = static_cast<const scalar_t*>(args.grad_projection);
  unsigned char* ring = shared + warp * kRing * kStepBytes;

  // A step of W is [32 rows][4 pieces of 8 columns]; which piece of a row stands where depends on
  // row / 8, so that the rows that ldmatrix reads together below lie in different banks.
  auto copy_weight = [&](int i) {
    if (i >= warp_steps) return;
    unsigned char* slot = ring + i % kRing * kStepBytes;
    const int64_t first_row = (int64_t{i} * kWarps + warp) * kStepRows;
    const int64_t column = first_column + lane % 4 * 8;
#pragma unroll
    for (int eight = 0; eight < kStepRows / 8; ++eight) {
      const int64_t row = first_row + eight * 8 + lane / 4;
      const bool valid = row < args.row_width && column < p.d_model;
      cp_async_16(shared_address(slot + (eight * 8 + lane / 4) * 64 + (lane % 4 ^ eight) * 16),
                  valid ? weight + row * p.d_model + column : weight, valid);
    }
  };
  auto copy_grad = [&](int i) {
    if (i >= warp_steps) return;
    unsigned char* slot = ring + i % kRing * kStepBytes + kStepWeightBytes;
    const int64_t column = (int64_t{i} * kWarps + warp) * kStepRows + lane % 4 * 8;
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const int64_t token = tile * kTokenTile + lane / 4;
      const bool valid = token < p.num_tokens && column < args.row_width;
      cp_async_16(shared_address(slot + tile * kTileBytes + lane * 16),
                  valid ? grad + token * args.row_width + column : grad, valid);
    }
  };
#pragma unroll
  for (int i = 0; i < kRing; ++i) copy_weight(i);
  wait_for_prerequisite_grid();
#pragma unroll
  for (int i = 0; i < kRing; ++i) {
    copy_grad(i);
    cp_async_commit();
  }

  // A thread has 8 consecutive elements of dP, the pairs of which go to two products: what they
  // call rows 2t, 2t + 1 and 2t + 8, 2t + 9 are rows 8t + 4 product + {0, 1} and {2, 3} of W.
  const int matrix = lane / 8;
  const int matrix_row = lane % 8;
  const int weight_row = matrix_row / 2 * 8 + matrix_row % 2 + matrix / 2 * 2;
  float acc[2][kTokenTiles][4] = {};
  for (int i = 0; i < warp_steps; ++i) {
    cp_async_wait<kRing - 1>();
    __syncwarp();
    const unsigned char* slot = ring + i % kRing * kStepBytes;
    uint32_t a[2][2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        const int piece = (half * 2 + matrix % 2) ^ (matrix_row / 2);
        ldmatrix_x4_trans(a[half][product],
                          shared_address(slot + (weight_row + product * 4) * 64 + piece * 16));
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const uint4 b =
          *reinterpret_cast<const uint4*>(slot + kStepWeightBytes + tile * kTileBytes + lane * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<scalar_t>(acc[half][tile], a[half][0], b.x, b.y);
        mma_m16n8k16<scalar_t>(acc[half][tile], a[half][1], b.z, b.w);
      }
    }
    __syncwarp();  // all lanes have read what the next copy overwrites
    copy_weight(i + kRing);
    copy_grad(i + kRing);
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring is empty: the warps' partial sums take its place

  constexpr int kWarpPartials = Traits<kTokenTiles>::kWarpPartials;
  float* partials = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* target = partials + warp * kWarpPartials +
                      (tile * kTokenTile + lane % 4 * 2) * kInputStride + half * 16 + lane / 4;
      target[0] = acc[half][tile][0];
      target[kInputStride] = acc[half][tile][1];
      target[8] = acc[half][tile][2];
      target[kInputStride + 8] = acc[half][tile][3];
    }
  }
  __syncthreads();
  constexpr int kFours = kInputColumns / 4;
  for (int i = threadIdx.x; i < p.num_tokens * kFours; i += kThreads) {
    const int token = i / kFours;
    const int column = i % kFours * 4;
    if (first_column + column >= p.d_model) continue;
    float sum[4] = {};
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const float4 add = *reinterpret_cast<const float4*>(partials + other * kWarpPartials +
                                                          token * kInputStride + column);
      sum[0] += add.x;
      sum[1] += add.y;
      sum[2] += add.z;
      sum[3] += add.w;
    }
    scalar_t rounded[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) rounded[e] = from_float<scalar_t>(sum[e]);
    uint2 packed;
    memcpy(&packed, rounded, sizeof(packed));
    *reinterpret_cast<uint2*>(static_cast<scalar_t*>(p.grad_x) + token * p.d_model + first_column +
                              column) = packed;
  }
}

template <typename scalar_t, int kTokenTiles>
__device__ __forceinline__ void weight_block(const Arguments& args, int block,
                                             unsigned char* shared) {
  constexpr int kTokens = Traits<kTokenTiles>::kTokens;
  const TuckerQueryBwdParams& p = args.p;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_row = int64_t{block / args.weight_column_tiles} * kTileRows;
  const int64_t first_column = int64_t{block % args.weight_column_tiles} * kTileColumns;
  unsigned char* rows = shared;                             // dP [tokens][64]
  unsigned char* columns = rows + kTokens * kRowsStride;    // x [tokens][128]
  unsigned char* out = columns + kTokens * kColumnsStride;  // [64][128]

  auto copy = [&](unsigned char* target, int stride, const void* source, int64_t width,
                  int64_t first, int pieces) {
    for (int i = threadIdx.x; i < kTokens * pieces; i += kThreads) {
      const int token = i / pieces;
      const int64_t column = first + i % pieces * 8;
      const bool valid = token < p.num_tokens && column < width;
      const auto* elements = static_cast<const scalar_t*>(source);
      cp_async_16(shared_address(target + token * stride + i % pieces * 16),
                  valid ? elements + token * width + column : elements, valid);
    }
  };
  copy(columns, kColumnsStride, p.x, p.d_model, first_column, kTileColumns / 8);
  wait_for_prerequisite_grid();
  copy(rows, kRowsStride, args.grad_projection, args.row_width, first_row, kTileRows / 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const int matrix = lane / 8;
  const int matrix_row = lane % 8;
  const int warp_row = warp / 4 * 32;
  const int warp_column = warp % 4 * 32;
  float acc[2][4][4] = {};
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step) {
    uint32_t a[2][4];
    uint32_t b[2][4];  // two tiles of 8 columns each
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int a_token = step * 16 + matrix / 2 * 8 + matrix_row;
      const int a_row = warp_row + half * 16 + matrix % 2 * 8;
      ldmatrix_x4_trans(a[half], shared_address(rows + a_token * kRowsStride + a_row * 2));
      const int b_token = step * 16 + matrix % 2 * 8 + matrix_row;
      const int b_column = warp_column + half * 16 + matrix / 2 * 8;
      ldmatrix_x4_trans(b[half], shared_address(columns + b_token * kColumnsStride + b_column * 2));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        mma_m16n8k16<scalar_t>(acc[half][tile], a[half], b[tile / 2][tile % 2 * 2],
                               b[tile / 2][tile % 2 * 2 + 1]);
      }
    }
  }

  // Through shared memory, so that whole rows of the tile are written at once.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const scalar_t pair[2] = {from_float<scalar_t>(acc[half][tile][lower * 2]),
                                  from_float<scalar_t>(acc[half][tile][lower * 2 + 1])};
        const int row = warp_row + half * 16 + lower * 8 + lane / 4;
        const int column = warp_column + tile * 8 + lane % 4 * 2;
        memcpy(out + row * kColumnsStride + column * 2, pair, sizeof(pair));
      }
    }
  }
  __syncthreads();
  constexpr int kPieces = kTileColumns / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kTileRows * kPieces; i += kThreads) {
    const int64_t row = first_row + i / kPieces;
    const int64_t column = first_column + i % kPieces * 8;
    if (row >= args.row_width || column >= p.d_model) continue;
    const auto* piece =
        reinterpret_cast<const uint4*>(out + i / kPieces * kColumnsStride + i % kPieces * 16);
    *reinterpret_cast<uint4*>(static_cast<scalar_t*>(p.grad_weight) + row * p.d_model + column) =
        *piece;
  }
}

__device__ __forceinline__ void gain_block(const Arguments& args, int block) {
  const int64_t i = int64_t{block} * kThreads + threadIdx.x;
  if (i >= args.p.key_dim) return;
  wait_for_prerequisite_grid();
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t partial = 0; partial < args.num_partials; ++partial) {
    sum += args.partial_sums[partial * args.p.key_dim + i];
  }
  static_cast<float*>(args.p.grad_norm_weight)[i] = sum;
}

// The blocks of grad_x come first: each of them has the most to do.
template <typename scalar_t, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2)
    tucker_query_small_bwd_kernel(__grid_constant__ const Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto block = static_cast<int>(blockIdx.x);
  if (block < args.input_blocks) {
    input_block<scalar_t, kTokenTiles>(args, block, shared);
    return;
  }
  block -= args.input_blocks;
  if (block < args.weight_blocks) {
    weight_block<scalar_t, kTokenTiles>(args, block, shared);
    return;
  }
  gain_block(args, block - args.weight_blocks);
}

int token_tiles(int64_t num_tokens) {
  for (const int tiles : {1, 2, 4}) {
    if (num_tokens <= tiles * kTokenTile) return tiles;
  }
  return 8;
}

template <typename scalar_t, int kTokenTiles>
Status launch(const Arguments& args, unsigned blocks, Stream stream) {
  auto* kernel = tucker_query_small_bwd_kernel<scalar_t, kTokenTiles>;
  constexpr int kSharedBytes = Traits<kTokenTiles>::kSharedBytes;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  return launch_overlapping(kernel, dim3(blocks), kThreads, kSharedBytes, stream, args);
}

template <typename scalar_t>
Status launch_for_tokens(const Arguments& args, unsigned blocks, Stream stream) {
  switch (token_tiles(args.p.num_tokens)) {
    case 1:
      return launch<scalar_t, 1>(args, blocks, stream);
    case 2:
      return launch<scalar_t, 2>(args, blocks, stream);
    case 4:
      return launch<scalar_t, 4>(args, blocks, stream);
    default:
      return launch<scalar_t, 8>(args, blocks, stream);
  }
}

RmsNormBwdParams norm_params(const TuckerQueryBwdParams& p) {
  RmsNormBwdParams norm;
  norm.num_rows = p.num_tokens * p.num_segments;
  norm.dim = p.key_dim;
  norm.eps = p.eps;
  norm.dtype = p.dtype;
  norm.x = p.projection;
  norm.weight = p.norm_weight;
  norm.grad_y = p.grad_query;
  norm.grad_x = p.workspace;
  norm.grad_weight = p.grad_norm_weight;
  return norm;
}

size_t grad_projection_bytes(const TuckerQueryBwdParams& p) {
  return align_up(p.num_tokens * p.num_segments * p.key_dim * element_size(p.dtype));
}

ULTRAMEM_REGISTER_KERNEL(bwd_8_bf16, "tucker_query_small_bwd<bf16, 8 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 1>);
ULTRAMEM_REGISTER_KERNEL(bwd_16_bf16, "tucker_query_small_bwd<bf16, 16 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 2>);
ULTRAMEM_REGISTER_KERNEL(bwd_32_bf16, "tucker_query_small_bwd<bf16, 32 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_64_bf16, "tucker_query_small_bwd<bf16, 64 tokens>", kThreads,
                         tucker_query_small_bwd_kernel<__nv_bfloat16, 8>);

}  // namespace

bool tucker_query_small_bwd_supported(const TuckerQueryBwdParams& p) {
  constexpr int64_t kMaxSize = 1 << 20;
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.num_tokens >= 1 &&
         p.num_tokens <= kTuckerQuerySmallTokens && p.d_model >= 8 && p.d_model <= kMaxSize &&
         p.d_model % 8 == 0 && p.key_dim >= 8 && p.num_segments >= 1 &&
         p.num_segments * p.key_dim <= kMaxSize && rms_norm_is_vectorised(norm_params(p)) &&
         is_aligned(p.x) && is_aligned(p.weight) && is_aligned(p.grad_x) &&
         is_aligned(p.grad_weight);
}

size_t tucker_query_small_bwd_workspace(const TuckerQueryBwdParams& params) {
  return grad_projection_bytes(params) +
         align_up(rms_norm_bwd_num_partials(norm_params(params)) * params.key_dim * sizeof(float));
}

Status tucker_query_small_bwd(const TuckerQueryBwdParams& params, Stream stream) {
  if (!tucker_query_small_bwd_supported(params)) {
    return Status::invalid_argument(
        "tucker_query_bwd: ask tucker_query_small_bwd_supported whether these kernels take the "
        "shape");
  }
  const RmsNormBwdParams norm = norm_params(params);
  const int64_t num_partials = rms_norm_bwd_num_partials(norm);
  const bool complete = num_partials == 1;
  auto* partial_sums = complete ? static_cast<float*>(params.grad_norm_weight)
                                : reinterpret_cast<float*>(static_cast<char*>(params.workspace) +
                                                           grad_projection_bytes(params));
  ULTRAMEM_RETURN_IF_ERROR(rms_norm_bwd_rows(norm, partial_sums, stream));

  Arguments args{};
  args.p = params;
  args.grad_projection = params.workspace;
  args.partial_sums = partial_sums;
  args.num_partials = num_partials;
  args.row_width = params.num_segments * params.key_dim;
  if (params.grad_x != nullptr) {
    args.input_blocks = static_cast<int>(ceil_div(params.d_model, kInputColumns));
  }
  if (params.grad_weight != nullptr) {
    args.weight_column_tiles = static_cast<int>(ceil_div(params.d_model, kTileColumns));
    args.weight_blocks =
        static_cast<int>(ceil_div(args.row_width, kTileRows)) * args.weight_column_tiles;
  }
  const int64_t gain_blocks = complete ? 0 : ceil_div(params.key_dim, kThreads);
  const auto blocks = static_cast<unsigned>(args.input_blocks + args.weight_blocks + gain_blocks);
  if (blocks == 0) return {};
  if (params.dtype == DType::kBFloat16) {
    return launch_for_tokens<__nv_bfloat16>(args, blocks, stream);
  }
  return launch_for_tokens<__half>(args, blocks, stream);
}

}  // namespace ultramem::cuda
