// RMS normalisation of rows, forward and backward. With rstd = 1 / sqrt(mean(x^2) + eps):
//   y = x rstd w
//   grad_x = rstd (g w - x rstd^2 mean(g w x)),   grad_w = sum_rows g x rstd
//
// Rows of whole 16-byte vectors live in registers while they are worked on, so that every element
// is read and written once. Any other row is read twice, element by element.
#include "ultramem/rms_norm.h"

#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"

namespace ultramem::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;

// Sums over rows: a tile of 32 columns by some rows of threads.
constexpr int kSliceLanes = 8;
constexpr int kSliceThreads = kWarpSize * kSliceLanes;
constexpr int kReduceLanes = 16;
constexpr int kReduceThreads = kWarpSize * kReduceLanes;

// Vectorised backward: two blocks for each multiprocessor of an H100 walk over all rows.
constexpr int64_t kMaxPartials = 264;

Status check(const RmsNormParams& params) {
  if (params.dtype == DType::kFloat64) {
    return Status::invalid_argument("rms_norm: float64 is offered on the CPU only");
  }
  if (params.num_rows < 0 || params.dim < 1) {
    return Status::invalid_argument("rms_norm: num_rows must be at least 0, dim at least 1");
  }
  return {};
}

unsigned row_blocks(int64_t num_rows, int64_t rows_per_block) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  return static_cast<unsigned>(std::min(ceil_div(num_rows, rows_per_block), kMaxBlocks));
}

// ---- rows in registers ------------------------------------------------------------------------

template <typename scalar_t>
constexpr int kVectorElements = 16 / static_cast<int>(sizeof(scalar_t));

template <typename scalar_t>
__device__ __forceinline__ void unpack(const uint4& vector, float* out) {
  const auto* elements = reinterpret_cast<const scalar_t*>(&vector);
#pragma unroll
  for (int e = 0; e < kVectorElements<scalar_t>; ++e) out[e] = to_float(elements[e]);
}

template <typename scalar_t>
__device__ __forceinline__ uint4 pack(const float* values) {
  uint4 vector;
  auto* elements = reinterpret_cast<scalar_t*>(&vector);
#pragma unroll
  for (int e = 0; e < kVectorElements<scalar_t>; ++e) elements[e] = from_float<scalar_t>(values[e]);
  return vector;
}

template <typename scalar_t>
__device__ __forceinline__ void load_gains(const float* weight, int vector, float* out) {
  const auto* source =
      reinterpret_cast<const float4*>(weight) + int64_t{vector} * (kVectorElements<scalar_t> / 4);
#pragma unroll
  for (int i = 0; i < kVectorElements<scalar_t> / 4; ++i) {
    const float4 gains = source[i];
    out[4 * i] = gains.x;
    out[4 * i + 1] = gains.y;
    out[4 * i + 2] = gains.z;
    out[4 * i + 3] = gains.w;
  }
}

// The sum over the kLanes neighbouring lanes that share a row.
template <int kLanes>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int delta = kLanes / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(kFullMask, x, delta);
  return x;
}

// kLanes lanes share a row; lane l holds its vectors l, l + kLanes, ..., kVectors at most.
template <typename scalar_t, int kLanes, int kVectors>
__global__ void __launch_bounds__(kRowThreads) rms_norm_fwd_kernel(RmsNormParams p) {
  constexpr int kElements = kVectorElements<scalar_t>;
  constexpr int kRows = kRowThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const auto num_vectors = static_cast<int>(p.dim / kElements);
  const auto* weight = static_cast<const float*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  const float eps = static_cast<float>(p.eps);
  // All lanes of a warp go round together: they meet in the sums.
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < p.num_rows;
       first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + threadIdx.x / kLanes;
    const bool exists = row < p.num_rows;
    const auto* x = static_cast<const uint4*>(p.x) + row * num_vectors;
    auto* y = static_cast<uint4*>(p.y) + row * num_vectors;
    uint4 raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * kLanes + lane;
      raw[v] = exists && vector < num_vectors ? x[vector] : uint4{0, 0, 0, 0};
    }
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kElements];
      unpack<scalar_t>(raw[v], values);
#pragma unroll
      for (int e = 0; e < kElements; ++e) squares = fmaf(values[e], values[e], squares);
    }
    const float rstd = 1.0f / sqrtf(row_sum<kLanes>(squares) / dim + eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * kLanes + lane;
      if (!exists || vector >= num_vectors) continue;
      float values[kElements];
      float gains[kElements];
      unpack<scalar_t>(raw[v], values);
      load_gains<scalar_t>(weight, vector, gains);
#pragma unroll
      for (int e = 0; e < kElements; ++e) values[e] = values[e] * rstd * gains[e];
      y[vector] = pack<scalar_t>(values);
    }
  }
}

// The block's sums of grad_weight from those of its threads: over the rows of a warp, then over
// the warps, always in the same order.
template <typename scalar_t, int kLanes, int kVectors>
__device__ __forceinline__ void store_block_sums(float (&sums)[kVectors][kVectorElements<scalar_t>],
                                                 int64_t dim, float* block_sums) {
  constexpr int kElements = kVectorElements<scalar_t>;
  constexpr int kColumns = kLanes * kElements;
  static_assert(kColumns <= kRowThreads, "a thread sums one column");
  __shared__ __align__(16) float warp_sums[kRowWarps][kColumns];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first_column = int64_t{v} * kColumns;
    if (first_column >= dim) break;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
#pragma unroll
      for (int delta = kWarpSize / 2; delta >= kLanes; delta /= 2) {
        sums[v][e] += __shfl_xor_sync(kFullMask, sums[v][e], delta);
      }
    }
    if (lane < kLanes) {
      auto* target = reinterpret_cast<float4*>(&warp_sums[warp][lane * kElements]);
#pragma unroll
      for (int i = 0; i < kElements / 4; ++i) {
        target[i] = {sums[v][4 * i], sums[v][4 * i + 1], sums[v][4 * i + 2], sums[v][4 * i + 3]};
      }
    }
    __syncthreads();
    const int64_t column = first_column + threadIdx.x;
    if (threadIdx.x < kColumns && column < dim) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kRowWarps; ++w) total += warp_sums[w][threadIdx.x];
      block_sums[column] = total;
    }
    __syncthreads();
  }
}

template <typename scalar_t, int kLanes, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
    rms_norm_bwd_kernel(RmsNormBwdParams p, float* partial_sums) {
  constexpr int kElements = kVectorElements<scalar_t>;
  constexpr int kRows = kRowThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const auto num_vectors = static_cast<int>(p.dim / kElements);
  const auto* weight = static_cast<const float*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  const float eps = static_cast<float>(p.eps);
  float sums[kVectors][kElements] = {};
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < p.num_rows;
       first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + threadIdx.x / kLanes;
    const bool exists = row < p.num_rows;
    const auto* x = static_cast<const uint4*>(p.x) + row * num_vectors;
    const auto* grad_y = static_cast<const uint4*>(p.grad_y) + row * num_vectors;
    uint4 raw_x[kVectors];
    uint4 raw_grad[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * kLanes + lane;
      const bool inside = exists && vector < num_vectors;
      raw_x[v] = inside ? x[vector] : uint4{0, 0, 0, 0};
      raw_grad[v] = inside ? grad_y[vector] : uint4{0, 0, 0, 0};
    }
    float squares = 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * kLanes + lane;
      if (vector >= num_vectors) continue;
      float values[kElements];
      float grads[kElements];
      float gains[kElements];
      unpack<scalar_t>(raw_x[v], values);
      unpack<scalar_t>(raw_grad[v], grads);
      load_gains<scalar_t>(weight, vector, gains);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        squares = fmaf(values[e], values[e], squares);
        dot = fmaf(grads[e] * gains[e], values[e], dot);
      }
    }
    const float rstd = 1.0f / sqrtf(row_sum<kLanes>(squares) / dim + eps);
    const float projection = row_sum<kLanes>(dot) / dim * rstd * rstd;
    if (!exists) continue;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * kLanes + lane;
      if (vector >= num_vectors) continue;
      float values[kElements];
      float grads[kElements];
      unpack<scalar_t>(raw_x[v], values);
      unpack<scalar_t>(raw_grad[v], grads);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sums[v][e] = fmaf(grads[e], values[e] * rstd, sums[v][e]);
      }
      if (p.grad_x == nullptr) continue;
      float gains[kElements];
      load_gains<scalar_t>(weight, vector, gains);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        values[e] = rstd * (grads[e] * gains[e] - values[e] * projection);
      }
      static_cast<uint4*>(p.grad_x)[row * num_vectors + vector] = pack<scalar_t>(values);
    }
  }
  if (partial_sums != nullptr) {
    store_block_sums<scalar_t, kLanes, kVectors>(sums, p.dim,
                                                 partial_sums + int64_t{blockIdx.x} * p.dim);
  }
}

// Lanes of a row and vectors of a lane, by the vectors of the row: short rows share a warp. Calls
// the lambda with kLanes and kVectors bound.
constexpr int64_t kShortVectors = 32;
constexpr int64_t kMediumVectors = 128;
constexpr int64_t kLongVectors = 256;

#define ULTRAMEM_ROW_SWITCH(num_vectors, ...) \
  [&]() -> Status {                           \
    if ((num_vectors) <= kShortVectors) {     \
      constexpr int kLanes = 8;               \
      constexpr int kVectors = 4;             \
      return __VA_ARGS__();                   \
    }                                         \
    constexpr int kLanes = 32;                \
    if ((num_vectors) <= kMediumVectors) {    \
      constexpr int kVectors = 4;             \
      return __VA_ARGS__();                   \
    }                                         \
    constexpr int kVectors = 8;               \
    return __VA_ARGS__();                     \
  }()

int64_t num_vectors(const RmsNormParams& p) { return p.dim * element_size(p.dtype) / 16; }

int64_t rows_per_block(const RmsNormParams& p) {
  return num_vectors(p) <= kShortVectors ? kRowThreads / 8 : kRowThreads / 32;
}

// Whether rows can be read in 16-byte vectors and fit the registers of a warp.
bool is_vectorised(const RmsNormParams& p) {
  return p.dim * element_size(p.dtype) % 16 == 0 && num_vectors(p) <= kLongVectors &&
         is_aligned(p.x) && is_aligned(p.weight) && is_aligned(p.y);
}

bool is_vectorised(const RmsNormBwdParams& p) {
  return is_vectorised(static_cast<const RmsNormParams&>(p)) && is_aligned(p.grad_y) &&
         is_aligned(p.grad_x);
}

// Partial sums of grad_weight that vectorised rows leave.
int64_t bwd_num_partials(const RmsNormBwdParams& p) {
  return std::min(ceil_div(p.num_rows, rows_per_block(p)), kMaxPartials);
}

template <typename scalar_t>
Status launch_fwd(const RmsNormParams& p, Stream stream) {
  return ULTRAMEM_ROW_SWITCH(num_vectors(p), [&] {
    rms_norm_fwd_kernel<scalar_t, kLanes, kVectors>
        <<<row_blocks(p.num_rows, kRowThreads / kLanes), kRowThreads, 0, stream>>>(p);
    return launch_status();
  });
}

template <typename scalar_t>
Status launch_bwd_rows(const RmsNormBwdParams& p, float* partial_sums, Stream stream) {
  const auto blocks = static_cast<unsigned>(bwd_num_partials(p));
  return ULTRAMEM_ROW_SWITCH(num_vectors(p), [&] {
    rms_norm_bwd_kernel<scalar_t, kLanes, kVectors>
        <<<blocks, kRowThreads, 0, stream>>>(p, partial_sums);
    return launch_status();
  });
}

// ---- any row ----------------------------------------------------------------------------------

template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads) rms_norm_fwd_any_kernel(RmsNormParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
  const auto* weight = static_cast<const float*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  const float eps = static_cast<float>(p.eps);
  for (int64_t row = warp; row < p.num_rows; row += int64_t{gridDim.x} * kRowWarps) {
    const scalar_t* x = static_cast<const scalar_t*>(p.x) + row * p.dim;
    scalar_t* y = static_cast<scalar_t*>(p.y) + row * p.dim;
    float squares = 0.0f;
    for (int64_t i = lane; i < p.dim; i += kWarpSize) {
      const float value = to_float(x[i]);
      squares = fmaf(value, value, squares);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
    for (int64_t i = lane; i < p.dim; i += kWarpSize) {
      y[i] = from_float<scalar_t>(to_float(x[i]) * rstd * weight[i]);
    }
  }
}

// grad_x, and rstd for the sums over rows. Either may be null.
template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads)
    rms_norm_bwd_any_kernel(RmsNormBwdParams p, float* row_rstd) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
  const auto* weight = static_cast<const float*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  const float eps = static_cast<float>(p.eps);
  for (int64_t row = warp; row < p.num_rows; row += int64_t{gridDim.x} * kRowWarps) {
    const scalar_t* x = static_cast<const scalar_t*>(p.x) + row * p.dim;
    const scalar_t* grad_y = static_cast<const scalar_t*>(p.grad_y) + row * p.dim;
    float squares = 0.0f;
    float dot = 0.0f;
    for (int64_t i = lane; i < p.dim; i += kWarpSize) {
      const float value = to_float(x[i]);
      squares = fmaf(value, value, squares);
      dot = fmaf(to_float(grad_y[i]) * weight[i], value, dot);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
    const float projection = warp_sum(dot) / dim * rstd * rstd;
    if (row_rstd != nullptr && lane == 0) row_rstd[row] = rstd;
    if (p.grad_x == nullptr) continue;
    scalar_t* grad_x = static_cast<scalar_t*>(p.grad_x) + row * p.dim;
    for (int64_t i = lane; i < p.dim; i += kWarpSize) {
      const float normed_grad = to_float(grad_y[i]) * weight[i];
      grad_x[i] = from_float<scalar_t>(rstd * (normed_grad - to_float(x[i]) * projection));
    }
  }
}

// Sums the partial sums of a block's row lanes, in their order. Returns the total in lane 0.
template <int kLanes>
__device__ __forceinline__ float sum_row_lanes(float sum, int column, int row_lane) {
  __shared__ float partials[kLanes][kWarpSize];
  partials[row_lane][column] = sum;
  __syncthreads();
  float total = 0.0f;
  if (row_lane == 0) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) total += partials[i][column];
  }
  return total;
}

// partial_sums [slices, dim]; grid (columns / 32, slices).
template <typename scalar_t>
__global__ void __launch_bounds__(kSliceThreads)
    rms_norm_bwd_any_weight_kernel(RmsNormBwdParams p, int64_t rows_per_slice,
                                   const float* row_rstd, float* partial_sums) {
  const int column = threadIdx.x % kWarpSize;
  const int row_lane = threadIdx.x / kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kWarpSize + column;
  const int64_t first_row = blockIdx.y * rows_per_slice;
  const int64_t last_row = min(first_row + rows_per_slice, p.num_rows);
  float sum = 0.0f;
  if (i < p.dim) {
    const auto* x = static_cast<const scalar_t*>(p.x);
    const auto* grad_y = static_cast<const scalar_t*>(p.grad_y);
    for (int64_t row = first_row + row_lane; row < last_row; row += kSliceLanes) {
      const float normed = to_float(x[row * p.dim + i]) * row_rstd[row];
      sum = fmaf(to_float(grad_y[row * p.dim + i]), normed, sum);
    }
  }
  const float total = sum_row_lanes<kSliceLanes>(sum, column, row_lane);
  if (row_lane == 0 && i < p.dim) partial_sums[blockIdx.y * p.dim + i] = total;
}

__global__ void __launch_bounds__(kReduceThreads)
    rms_norm_bwd_reduce_kernel(const float* partial_sums, int64_t num_partials, int64_t dim,
                               float* grad_weight) {
  const int column = threadIdx.x % kWarpSize;
  const int row_lane = threadIdx.x / kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kWarpSize + column;
  float sum = 0.0f;
  if (i < dim) {
#pragma unroll 8
    for (int64_t partial = row_lane; partial < num_partials; partial += kReduceLanes) {
      sum += partial_sums[partial * dim + i];
    }
  }
  const float total = sum_row_lanes<kReduceLanes>(sum, column, row_lane);
  if (row_lane == 0 && i < dim) grad_weight[i] = total;
}

Status launch_reduce(const RmsNormBwdParams& p, const float* partial_sums, int64_t num_partials,
                     Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.dim, kWarpSize));
  rms_norm_bwd_reduce_kernel<<<blocks, kReduceThreads, 0, stream>>>(
      partial_sums, num_partials, p.dim, static_cast<float*>(p.grad_weight));
  return launch_status();
}

int64_t slice_rows(int64_t num_rows) {
  constexpr int64_t kMinSliceRows = 64;
  constexpr int64_t kMaxSlices = 512;
  return std::max(kMinSliceRows, ceil_div(num_rows, kMaxSlices));
}

template <typename scalar_t>
Status launch_bwd_any(const RmsNormBwdParams& p, Stream stream) {
  float* row_rstd = nullptr;
  if (p.grad_weight != nullptr) row_rstd = static_cast<float*>(p.workspace);
  rms_norm_bwd_any_kernel<scalar_t>
      <<<row_blocks(p.num_rows, kRowWarps), kRowThreads, 0, stream>>>(p, row_rstd);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  if (p.grad_weight == nullptr) return {};

  const int64_t rows_per_slice = slice_rows(p.num_rows);
  const int64_t num_slices = ceil_div(p.num_rows, rows_per_slice);
  auto* partial_sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                                align_up(p.num_rows * sizeof(float)));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.dim, kWarpSize)),
                  static_cast<unsigned>(num_slices));
  rms_norm_bwd_any_weight_kernel<scalar_t>
      <<<grid, kSliceThreads, 0, stream>>>(p, rows_per_slice, row_rstd, partial_sums);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  return launch_reduce(p, partial_sums, num_slices, stream);
}

ULTRAMEM_REGISTER_KERNEL(fwd_short_f32, "rms_norm_fwd<fp32, short rows>", kRowThreads,
                         rms_norm_fwd_kernel<float, 8, 4>);
ULTRAMEM_REGISTER_KERNEL(fwd_short_bf16, "rms_norm_fwd<bf16, short rows>", kRowThreads,
                         rms_norm_fwd_kernel<__nv_bfloat16, 8, 4>);
ULTRAMEM_REGISTER_KERNEL(fwd_medium_bf16, "rms_norm_fwd<bf16, medium rows>", kRowThreads,
                         rms_norm_fwd_kernel<__nv_bfloat16, 32, 4>);
ULTRAMEM_REGISTER_KERNEL(fwd_long_bf16, "rms_norm_fwd<bf16, long rows>", kRowThreads,
                         rms_norm_fwd_kernel<__nv_bfloat16, 32, 8>);
ULTRAMEM_REGISTER_KERNEL(fwd_any_bf16, "rms_norm_fwd<bf16, any rows>", kRowThreads,
                         rms_norm_fwd_any_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_short_f32, "rms_norm_bwd<fp32, short rows>", kRowThreads,
                         rms_norm_bwd_kernel<float, 8, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_short_bf16, "rms_norm_bwd<bf16, short rows>", kRowThreads,
                         rms_norm_bwd_kernel<__nv_bfloat16, 8, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_medium_bf16, "rms_norm_bwd<bf16, medium rows>", kRowThreads,
                         rms_norm_bwd_kernel<__nv_bfloat16, 32, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_long_bf16, "rms_norm_bwd<bf16, long rows>", kRowThreads,
                         rms_norm_bwd_kernel<__nv_bfloat16, 32, 8>);
ULTRAMEM_REGISTER_KERNEL(bwd_any_bf16, "rms_norm_bwd<bf16, any rows>", kRowThreads,
                         rms_norm_bwd_any_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_any_weight_bf16, "rms_norm_bwd_weight<bf16, any rows>", kSliceThreads,
                         rms_norm_bwd_any_weight_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_reduce, "rms_norm_bwd_reduce", kReduceThreads,
                         rms_norm_bwd_reduce_kernel);

}  // namespace

Status rms_norm_fwd(const RmsNormParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check(params));
  if (params.num_rows == 0) return {};
  const bool vectorised = is_vectorised(params);
  return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t, [&] {
    if (vectorised) return launch_fwd<scalar_t>(params, stream);
    rms_norm_fwd_any_kernel<scalar_t>
        <<<row_blocks(params.num_rows, kRowWarps), kRowThreads, 0, stream>>>(params);
    return launch_status();
  });
}

// Enough for either way: the pointers, which decide, may not be known yet.
size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params) {
  if (!check(params).ok() || params.num_rows == 0) return 0;
  const int64_t num_slices = ceil_div(params.num_rows, slice_rows(params.num_rows));
  const size_t any_bytes =
      align_up(params.num_rows * sizeof(float)) + align_up(num_slices * params.dim * sizeof(float));
  const size_t vectorised_bytes = align_up(bwd_num_partials(params) * params.dim * sizeof(float));
  return std::max(any_bytes, vectorised_bytes);
}

Status rms_norm_bwd(const RmsNormBwdParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check(params));
  if (params.num_rows == 0) {
    if (params.grad_weight == nullptr) return {};
    return to_status(cudaMemsetAsync(params.grad_weight, 0, params.dim * sizeof(float), stream));
  }
  if (!is_vectorised(params)) {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t,
                                   [&] { return launch_bwd_any<scalar_t>(params, stream); });
  }
  const auto launch_rows = [&](float* partial_sums) {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t, [&] {
      return launch_bwd_rows<scalar_t>(params, partial_sums, stream);
    });
  };
  if (params.grad_weight == nullptr) return launch_rows(nullptr);
  const int64_t num_partials = bwd_num_partials(params);
  const bool complete = num_partials == 1;
  auto* partial_sums = static_cast<float*>(complete ? params.grad_weight : params.workspace);
  ULTRAMEM_RETURN_IF_ERROR(launch_rows(partial_sums));
  return complete ? Status{} : launch_reduce(params, partial_sums, num_partials, stream);
}

}  // namespace ultramem::cuda
