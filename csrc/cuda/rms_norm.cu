// RMS normalisation of rows, forward and backward. With rstd = 1 / sqrt(mean(x^2) + eps):
//   y = x rstd w
//   grad_x = rstd (g w - x rstd^2 mean(g w x)),   grad_w = sum_rows g x rstd
#include "ultramem/rms_norm.h"

#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"

namespace ultramem::cuda {
namespace {

// A warp per row.
constexpr int kRowThreads = 256;
constexpr int kRowsPerBlock = kRowThreads / kWarpSize;

// Sums over rows: a tile of 32 columns by 8 rows of threads walks down one slice of the rows. Two
// stages in a fixed order, first over the rows of each slice, then over the slices.
constexpr int kColumnLanes = 8;
constexpr int kColumnThreads = kWarpSize * kColumnLanes;
constexpr int64_t kMinSliceRows = 64;
constexpr int64_t kMaxSlices = 512;

int64_t slice_rows(int64_t num_rows) {
  return std::max(kMinSliceRows, ceil_div(num_rows, kMaxSlices));
}

unsigned row_blocks(int64_t num_rows) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  return static_cast<unsigned>(std::min(ceil_div(num_rows, kRowsPerBlock), kMaxBlocks));
}

Status check(const RmsNormParams& params) {
  if (params.dtype == DType::kFloat64) {
    return Status::invalid_argument("rms_norm: float64 is offered on the CPU only");
  }
  if (params.num_rows < 0 || params.dim < 1) {
    return Status::invalid_argument("rms_norm: num_rows must be at least 0, dim at least 1");
  }
  return {};
}

template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads) rms_norm_fwd_kernel(RmsNormParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarpSize;
  const auto* weight = static_cast<const float*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  const float eps = static_cast<float>(p.eps);
  for (int64_t row = warp; row < p.num_rows; row += int64_t{gridDim.x} * kRowsPerBlock) {
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
    rms_norm_bwd_rows_kernel(RmsNormBwdParams p, float* row_rstd) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarpSize;
  const auto* weight = static_cast<const float*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  const float eps = static_cast<float>(p.eps);
  for (int64_t row = warp; row < p.num_rows; row += int64_t{gridDim.x} * kRowsPerBlock) {
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
__device__ __forceinline__ float sum_row_lanes(float sum, int column, int row_lane) {
  __shared__ float partials[kColumnLanes][kWarpSize];
  partials[row_lane][column] = sum;
  __syncthreads();
  float total = 0.0f;
  if (row_lane == 0) {
#pragma unroll
    for (int i = 0; i < kColumnLanes; ++i) total += partials[i][column];
  }
  return total;
}

// partial_sums [slices, dim]; grid (columns / 32, slices).
template <typename scalar_t>
__global__ void __launch_bounds__(kColumnThreads)
    rms_norm_bwd_weight_kernel(RmsNormBwdParams p, int64_t rows_per_slice, const float* row_rstd,
                               float* partial_sums) {
  const int column = threadIdx.x % kWarpSize;
  const int row_lane = threadIdx.x / kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kWarpSize + column;
  const int64_t first_row = blockIdx.y * rows_per_slice;
  const int64_t last_row = min(first_row + rows_per_slice, p.num_rows);
  float sum = 0.0f;
  if (i < p.dim) {
    const auto* x = static_cast<const scalar_t*>(p.x);
    const auto* grad_y = static_cast<const scalar_t*>(p.grad_y);
    for (int64_t row = first_row + row_lane; row < last_row; row += kColumnLanes) {
      const float normed = to_float(x[row * p.dim + i]) * row_rstd[row];
      sum = fmaf(to_float(grad_y[row * p.dim + i]), normed, sum);
    }
  }
  const float total = sum_row_lanes(sum, column, row_lane);
  if (row_lane == 0 && i < p.dim) partial_sums[blockIdx.y * p.dim + i] = total;
}

__global__ void __launch_bounds__(kColumnThreads)
    rms_norm_bwd_reduce_kernel(const float* partial_sums, int64_t num_slices, int64_t dim,
                               float* grad_weight) {
  const int column = threadIdx.x % kWarpSize;
  const int row_lane = threadIdx.x / kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kWarpSize + column;
  float sum = 0.0f;
  if (i < dim) {
    for (int64_t slice = row_lane; slice < num_slices; slice += kColumnLanes) {
      sum += partial_sums[slice * dim + i];
    }
  }
  const float total = sum_row_lanes(sum, column, row_lane);
  if (row_lane == 0 && i < dim) grad_weight[i] = total;
}

template <typename scalar_t>
Status launch_bwd(const RmsNormBwdParams& p, Stream stream) {
  const int64_t rows_per_slice = slice_rows(p.num_rows);
  const int64_t num_slices = ceil_div(p.num_rows, rows_per_slice);
  float* row_rstd = nullptr;
  if (p.grad_weight != nullptr) row_rstd = static_cast<float*>(p.workspace);

  rms_norm_bwd_rows_kernel<scalar_t>
      <<<row_blocks(p.num_rows), kRowThreads, 0, stream>>>(p, row_rstd);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  if (p.grad_weight == nullptr) return {};

  auto* partial_sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                                align_up(p.num_rows * sizeof(float)));
  const auto column_blocks = static_cast<unsigned>(ceil_div(p.dim, kWarpSize));
  const dim3 grid(column_blocks, static_cast<unsigned>(num_slices));
  rms_norm_bwd_weight_kernel<scalar_t>
      <<<grid, kColumnThreads, 0, stream>>>(p, rows_per_slice, row_rstd, partial_sums);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  rms_norm_bwd_reduce_kernel<<<column_blocks, kColumnThreads, 0, stream>>>(
      partial_sums, num_slices, p.dim, static_cast<float*>(p.grad_weight));
  return launch_status();
}

ULTRAMEM_REGISTER_KERNEL(fwd_f32, "rms_norm_fwd<fp32>", kRowThreads, rms_norm_fwd_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(fwd_bf16, "rms_norm_fwd<bf16>", kRowThreads,
                         rms_norm_fwd_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(fwd_f16, "rms_norm_fwd<fp16>", kRowThreads, rms_norm_fwd_kernel<__half>);
ULTRAMEM_REGISTER_KERNEL(bwd_rows_f32, "rms_norm_bwd_rows<fp32>", kRowThreads,
                         rms_norm_bwd_rows_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(bwd_rows_bf16, "rms_norm_bwd_rows<bf16>", kRowThreads,
                         rms_norm_bwd_rows_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_rows_f16, "rms_norm_bwd_rows<fp16>", kRowThreads,
                         rms_norm_bwd_rows_kernel<__half>);
ULTRAMEM_REGISTER_KERNEL(bwd_weight_f32, "rms_norm_bwd_weight<fp32>", kColumnThreads,
                         rms_norm_bwd_weight_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(bwd_weight_bf16, "rms_norm_bwd_weight<bf16>", kColumnThreads,
                         rms_norm_bwd_weight_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_weight_f16, "rms_norm_bwd_weight<fp16>", kColumnThreads,
                         rms_norm_bwd_weight_kernel<__half>);
ULTRAMEM_REGISTER_KERNEL(bwd_reduce, "rms_norm_bwd_reduce", kColumnThreads,
                         rms_norm_bwd_reduce_kernel);

}  // namespace

Status rms_norm_fwd(const RmsNormParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check(params));
  if (params.num_rows == 0) return {};
  return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t, [&] {
    rms_norm_fwd_kernel<scalar_t><<<row_blocks(params.num_rows), kRowThreads, 0, stream>>>(params);
    return launch_status();
  });
}

size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params) {
  if (!check(params).ok() || params.num_rows == 0) return 0;
  const int64_t num_slices = ceil_div(params.num_rows, slice_rows(params.num_rows));
  return align_up(params.num_rows * sizeof(float)) +
         align_up(num_slices * params.dim * sizeof(float));
}

Status rms_norm_bwd(const RmsNormBwdParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check(params));
  if (params.num_rows == 0) {
    if (params.grad_weight == nullptr) return {};
    return to_status(cudaMemsetAsync(params.grad_weight, 0, params.dim * sizeof(float), stream));
  }
  return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t,
                                 [&] { return launch_bwd<scalar_t>(params, stream); });
}

}  // namespace ultramem::cuda
