// RMS normalisation of rows, forward and backward. With rstd = 1 / sqrt(mean(x^2) + eps):
//   y = x rstd w
//   grad_x = rstd (g w - x rstd^2 mean(g w x)),   grad_w = sum_rows g x rstd
//
// Rows of whole 16-byte vectors live in registers while they are worked on, so that every element
// is read and written once. Any other row is read twice, element by element.
#include "ultramem/rms_norm.h"

#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "common.cuh"
#include "kernel_registry.h"

namespace ultramem::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;

// Sums over rows: a tile of 32 columns by some rows of threads.
constexpr int kSliceLanes = 8;
constexpr int kSliceThreads = kWarpSize * kSliceLanes;
constexpr int kReduceLanes = 32;
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
  if (params.weight_dtype != params.dtype && params.weight_dtype != DType::kFloat32) {
    return Status::invalid_argument("rms_norm: weight_dtype must be dtype or float32");
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
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    // One instruction an element: a bfloat16 is the upper half of a float.
    const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(pairs[i] << 16);
      out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
    const auto* elements = reinterpret_cast<const scalar_t*>(&vector);
#pragma unroll
    for (int e = 0; e < kVectorElements<scalar_t>; ++e) out[e] = to_float(elements[e]);
  }
}

template <typename scalar_t>
__device__ __forceinline__ uint4 pack(const float* values) {
  uint4 vector;
  auto* elements = reinterpret_cast<scalar_t*>(&vector);
#pragma unroll
  for (int e = 0; e < kVectorElements<scalar_t>; ++e) elements[e] = from_float<scalar_t>(values[e]);
  return vector;
}

// The gain of rows of up to kMaxVectors vectors for the whole block, zeros behind it. Quarters of a
// warp read it without bank conflicts: four elements of neighbouring vectors are neighbours.
template <typename scalar_t, int kMaxVectors>
struct Gains {
  static constexpr int kElements = kVectorElements<scalar_t>;
  static constexpr int kThreadGains =
      static_cast<int>(ceil_div(kMaxVectors * kElements, kRowThreads));

  // What a thread will store. Rows can be requested in between.
  static __device__ __forceinline__ void request(const RmsNormParams& p,
                                                 uint32_t (&bits)[kThreadGains]) {
#pragma unroll
    for (int n = 0; n < kThreadGains; ++n) {
      const unsigned i = n * kRowThreads + threadIdx.x;
      bits[n] = i < p.dim ? load_bits(p.weight, p.weight_dtype, i) : 0;
    }
  }

  __device__ __forceinline__ void store(const RmsNormParams& p,
                                        const uint32_t (&bits)[kThreadGains]) {
#pragma unroll
    for (int n = 0; n < kThreadGains; ++n) {
      const unsigned i = n * kRowThreads + threadIdx.x;
      if (i >= kMaxVectors * kElements) continue;
      auto* four = reinterpret_cast<float*>(&fours[i % kElements / 4][i / kElements]);
      four[i % 4] = bits_to_float(bits[n], p.weight_dtype);
    }
  }

  __device__ __forceinline__ void load(int vector, float* out) const {
#pragma unroll
    for (int i = 0; i < kElements / 4; ++i) {
      const float4 four = fours[i][vector];
      out[4 * i] = four.x;
      out[4 * i + 1] = four.y;
      out[4 * i + 2] = four.z;
      out[4 * i + 3] = four.w;
    }
  }

  float4 fours[kElements / 4][kMaxVectors];
};

// Sums over the kLanes neighbouring lanes that share a row.
template <int kLanes, int kCount>
__device__ __forceinline__ void sum_over_row(float (&sums)[kCount]) {
#pragma unroll
  for (int delta = kLanes / 2; delta > 0; delta /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += __shfl_xor_sync(kFullMask, sums[i], delta);
  }
}

// kLanes lanes share a row; lane l holds its vectors l, l + kLanes, ..., kVectors at most. Zeros
// for what does not exist.
template <int kLanes, int kVectors>
__device__ __forceinline__ void load_row(const void* rows, int64_t row, bool exists,
                                         int num_vectors, uint4 (&out)[kVectors]) {
  const int lane = threadIdx.x % kLanes;
  const auto* vectors = static_cast<const uint4*>(rows) + row * num_vectors;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int vector = v * kLanes + lane;
    out[v] = exists && vector < num_vectors ? vectors[vector] : uint4{0, 0, 0, 0};
  }
}

template <typename scalar_t, int kLanes, int kVectors>
__global__ void __launch_bounds__(kRowThreads) rms_norm_fwd_kernel(RmsNormParams p) {
  constexpr int kElements = kVectorElements<scalar_t>;
  constexpr int kRows = kRowThreads / kLanes;
  using BlockGains = Gains<scalar_t, kLanes * kVectors>;
  __shared__ BlockGains gains;
  const int lane = threadIdx.x % kLanes;
  const auto num_vectors = static_cast<int>(p.dim / kElements);
  const float per_element = 1.0f / static_cast<float>(p.dim);
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const bool exists = row < p.num_rows;
  wait_for_prerequisite_grid();
  release_dependent_grid();
  uint32_t gain_bits[BlockGains::kThreadGains];
  BlockGains::request(p, gain_bits);
  uint4 raw[kVectors];
  load_row<kLanes>(p.x, row, exists, num_vectors, raw);
  gains.store(p, gain_bits);
  __syncthreads();
  float squares[1] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float values[kElements];
    unpack<scalar_t>(raw[v], values);
#pragma unroll
    for (int e = 0; e < kElements; ++e) squares[0] = fmaf(values[e], values[e], squares[0]);
  }
  sum_over_row<kLanes>(squares);
  const float rstd = 1.0f / sqrtf(squares[0] * per_element + static_cast<float>(p.eps));
  if (!exists) return;
  auto* y = static_cast<uint4*>(p.y) + row * num_vectors;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int vector = v * kLanes + lane;
    if (vector >= num_vectors) continue;
    float values[kElements];
    float factors[kElements];
    unpack<scalar_t>(raw[v], values);
    gains.load(vector, factors);
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = values[e] * rstd * factors[e];
    y[vector] = pack<scalar_t>(values);
  }
}

// The block's sums of grad_weight from those of its threads, to its row of block_sums: over the
// rows of a warp, then over the warps, always in the same order.
template <typename scalar_t, int kLanes, int kVectors>
__device__ __forceinline__ void store_block_sums(float (&sums)[kVectors][kVectorElements<scalar_t>],
                                                 int64_t dim, void* block_sums, DType dtype) {
  constexpr int kElements = kVectorElements<scalar_t>;
  constexpr int kColumns = kLanes * kElements;
  static_assert(kColumns <= kRowThreads, "a thread sums one column");
  // Two in turns: nobody has to wait until all have read one before the next is written.
  __shared__ __align__(16) float warp_sums[2][kRowWarps][kColumns];
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
      auto* target = reinterpret_cast<float4*>(&warp_sums[v % 2][warp][lane * kElements]);
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
      for (int w = 0; w < kRowWarps; ++w) total += warp_sums[v % 2][w][threadIdx.x];
      store_element(block_sums, dtype, int64_t{blockIdx.x} * dim + column, total);
    }
  }
}

// block_sums [blocks, dim] of sums_dtype.
template <typename scalar_t, int kLanes, int kVectors>
__global__ void __launch_bounds__(kRowThreads, kVectors* kVectorElements<scalar_t> > 32 ? 1 : 2)
    rms_norm_bwd_kernel(RmsNormBwdParams p, void* block_sums, DType sums_dtype) {
  constexpr int kElements = kVectorElements<scalar_t>;
  constexpr int kRows = kRowThreads / kLanes;
  using BlockGains = Gains<scalar_t, kLanes * kVectors>;
  __shared__ BlockGains gains;
  const int lane = threadIdx.x % kLanes;
  const auto num_vectors = static_cast<int>(p.dim / kElements);
  const float per_element = 1.0f / static_cast<float>(p.dim);
  const int64_t grid_rows = int64_t{gridDim.x} * kRows;
  int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  uint4 raw_x[kVectors];
  uint4 raw_grad[kVectors];
  const auto load_rows = [&] {
    load_row<kLanes>(p.x, row, row < p.num_rows, num_vectors, raw_x);
    load_row<kLanes>(p.grad_y, row, row < p.num_rows, num_vectors, raw_grad);
  };
  wait_for_prerequisite_grid();
  release_dependent_grid();
  uint32_t gain_bits[BlockGains::kThreadGains];
  BlockGains::request(p, gain_bits);
  load_rows();
  gains.store(p, gain_bits);
  __syncthreads();
  float sums[kVectors][kElements] = {};
  // All lanes of a warp go round together: they meet in the sums.
  for (int64_t first = row - threadIdx.x % kWarpSize / kLanes; first < p.num_rows;
       first += grid_rows) {
    float sums_of_row[2] = {};  // of x^2 and of g w x
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kElements];
      float grads[kElements];
      float factors[kElements];
      unpack<scalar_t>(raw_x[v], values);
      unpack<scalar_t>(raw_grad[v], grads);
      gains.load(v * kLanes + lane, factors);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sums_of_row[0] = fmaf(values[e], values[e], sums_of_row[0]);
        sums_of_row[1] = fmaf(grads[e] * factors[e], values[e], sums_of_row[1]);
      }
    }
    sum_over_row<kLanes>(sums_of_row);
    const float rstd = 1.0f / sqrtf(sums_of_row[0] * per_element + static_cast<float>(p.eps));
    const float projection = sums_of_row[1] * per_element * rstd * rstd;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int vector = v * kLanes + lane;
      if (row >= p.num_rows || vector >= num_vectors) continue;
      float values[kElements];
      float grads[kElements];
      unpack<scalar_t>(raw_x[v], values);
      unpack<scalar_t>(raw_grad[v], grads);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sums[v][e] = fmaf(grads[e], values[e] * rstd, sums[v][e]);
      }
      float factors[kElements];
      gains.load(vector, factors);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        values[e] = rstd * (grads[e] * factors[e] - values[e] * projection);
      }
      static_cast<uint4*>(p.grad_x)[row * num_vectors + vector] = pack<scalar_t>(values);
    }
    row += grid_rows;
    load_rows();
  }
  store_block_sums<scalar_t, kLanes, kVectors>(sums, p.dim, block_sums, sums_dtype);
}

// Lanes of a row and vectors of a lane, by the vectors of the row: several short rows share a warp,
// so that each lane has as much on its way as it has of a long one. Calls the lambda with kLanes
// and kVectors bound.
constexpr int64_t kShortVectors = 32;
constexpr int64_t kMediumVectors = 64;
constexpr int64_t kLongVectors = 128;
constexpr int64_t kLongestVectors = 256;

#define ULTRAMEM_ROW_SWITCH(num_vectors, ...) \
  [&] {                                       \
    if ((num_vectors) > kLongVectors) {       \
      constexpr int kLanes = 32;              \
      constexpr int kVectors = 8;             \
      return __VA_ARGS__();                   \
    }                                         \
    constexpr int kVectors = 4;               \
    if ((num_vectors) > kMediumVectors) {     \
      constexpr int kLanes = 32;              \
      return __VA_ARGS__();                   \
    }                                         \
    if ((num_vectors) > kShortVectors) {      \
      constexpr int kLanes = 16;              \
      return __VA_ARGS__();                   \
    }                                         \
    constexpr int kLanes = 8;                 \
    return __VA_ARGS__();                     \
  }()

int64_t num_vectors(const RmsNormParams& p) { return p.dim * element_size(p.dtype) / 16; }

int64_t rows_per_block(const RmsNormParams& p) {
  if (num_vectors(p) <= kShortVectors) return kRowThreads / 8;
  return num_vectors(p) <= kMediumVectors ? kRowThreads / 16 : kRowThreads / 32;
}

// Whether rows can be read in 16-byte vectors and fit the registers of a warp.
bool is_vectorised(const RmsNormParams& p) {
  return p.dim * element_size(p.dtype) % 16 == 0 && num_vectors(p) <= kLongestVectors &&
         is_aligned(p.x) && is_aligned(p.y);
}

bool is_vectorised(const RmsNormBwdParams& p) {
  return is_vectorised(static_cast<const RmsNormParams&>(p)) && is_aligned(p.grad_y) &&
         is_aligned(p.grad_x);
}

// Partial sums of grad_weight that vectorised rows leave.
int64_t bwd_num_partials(const RmsNormBwdParams& p) {
  return std::min(ceil_div(p.num_rows, rows_per_block(p)), kMaxPartials);
}

// Every row has its lanes: a grid of blocks of 8 rows or more is never too large for what memory
// holds.
template <typename scalar_t>
Status launch_fwd(const RmsNormParams& p, Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.num_rows, rows_per_block(p)));
  return ULTRAMEM_ROW_SWITCH(num_vectors(p), [&] {
    return launch_overlapping(rms_norm_fwd_kernel<scalar_t, kLanes, kVectors>, dim3(blocks),
                              kRowThreads, 0, stream, p);
  });
}

template <typename scalar_t>
Status launch_bwd_rows(const RmsNormBwdParams& p, void* block_sums, DType sums_dtype,
                       Stream stream) {
  const auto blocks = static_cast<unsigned>(bwd_num_partials(p));
  return ULTRAMEM_ROW_SWITCH(num_vectors(p), [&] {
    return launch_overlapping(rms_norm_bwd_kernel<scalar_t, kLanes, kVectors>, dim3(blocks),
                              kRowThreads, 0, stream, p, block_sums, sums_dtype);
  });
}

// ---- any row ----------------------------------------------------------------------------------

__device__ __forceinline__ float gain(const RmsNormParams& p, int64_t i) {
  return bits_to_float(load_bits(p.weight, p.weight_dtype, i), p.weight_dtype);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads) rms_norm_fwd_any_kernel(RmsNormParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
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
      y[i] = from_float<scalar_t>(to_float(x[i]) * rstd * gain(p, i));
    }
  }
}

// grad_x, and rstd for the sums over rows.
template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads)
    rms_norm_bwd_any_kernel(RmsNormBwdParams p, float* row_rstd) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
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
      dot = fmaf(to_float(grad_y[i]) * gain(p, i), value, dot);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
    const float projection = warp_sum(dot) / dim * rstd * rstd;
    if (lane == 0) row_rstd[row] = rstd;
    scalar_t* grad_x = static_cast<scalar_t*>(p.grad_x) + row * p.dim;
    for (int64_t i = lane; i < p.dim; i += kWarpSize) {
      const float normed_grad = to_float(grad_y[i]) * gain(p, i);
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
                               void* grad_weight, DType dtype) {
  const int column = threadIdx.x % kWarpSize;
  const int row_lane = threadIdx.x / kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kWarpSize + column;
  wait_for_prerequisite_grid();
  float sum = 0.0f;
  if (i < dim) {
#pragma unroll 8
    for (int64_t partial = row_lane; partial < num_partials; partial += kReduceLanes) {
      sum += partial_sums[partial * dim + i];
    }
  }
  const float total = sum_row_lanes<kReduceLanes>(sum, column, row_lane);
  if (row_lane == 0 && i < dim) store_element(grad_weight, dtype, i, total);
}

Status launch_reduce(const RmsNormBwdParams& p, const float* partial_sums, int64_t num_partials,
                     Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.dim, kWarpSize));
  return launch_overlapping(rms_norm_bwd_reduce_kernel, dim3(blocks), kReduceThreads, 0, stream,
                            partial_sums, num_partials, p.dim, p.grad_weight, p.weight_dtype);
}

int64_t slice_rows(int64_t num_rows) {
  constexpr int64_t kMinSliceRows = 64;
  constexpr int64_t kMaxSlices = 512;
  return std::max(kMinSliceRows, ceil_div(num_rows, kMaxSlices));
}

template <typename scalar_t>
Status launch_bwd_any(const RmsNormBwdParams& p, Stream stream) {
  auto* row_rstd = static_cast<float*>(p.workspace);
  rms_norm_bwd_any_kernel<scalar_t>
      <<<row_blocks(p.num_rows, kRowWarps), kRowThreads, 0, stream>>>(p, row_rstd);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
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
                         rms_norm_fwd_kernel<__nv_bfloat16, 16, 4>);
ULTRAMEM_REGISTER_KERNEL(fwd_long_bf16, "rms_norm_fwd<bf16, long rows>", kRowThreads,
                         rms_norm_fwd_kernel<__nv_bfloat16, 32, 4>);
ULTRAMEM_REGISTER_KERNEL(fwd_longest_bf16, "rms_norm_fwd<bf16, longest rows>", kRowThreads,
                         rms_norm_fwd_kernel<__nv_bfloat16, 32, 8>);
ULTRAMEM_REGISTER_KERNEL(fwd_any_bf16, "rms_norm_fwd<bf16, any rows>", kRowThreads,
                         rms_norm_fwd_any_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(bwd_short_f32, "rms_norm_bwd<fp32, short rows>", kRowThreads,
                         rms_norm_bwd_kernel<float, 8, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_short_bf16, "rms_norm_bwd<bf16, short rows>", kRowThreads,
                         rms_norm_bwd_kernel<__nv_bfloat16, 8, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_medium_bf16, "rms_norm_bwd<bf16, medium rows>", kRowThreads,
                         rms_norm_bwd_kernel<__nv_bfloat16, 16, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_long_bf16, "rms_norm_bwd<bf16, long rows>", kRowThreads,
                         rms_norm_bwd_kernel<__nv_bfloat16, 32, 4>);
ULTRAMEM_REGISTER_KERNEL(bwd_longest_bf16, "rms_norm_bwd<bf16, longest rows>", kRowThreads,
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
    return to_status(cudaMemsetAsync(params.grad_weight, 0,
                                     params.dim * element_size(params.weight_dtype), stream));
  }
  if (!is_vectorised(params)) {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t,
                                   [&] { return launch_bwd_any<scalar_t>(params, stream); });
  }
  const auto launch_rows = [&](void* block_sums, DType sums_dtype) {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, scalar_t, [&] {
      return launch_bwd_rows<scalar_t>(params, block_sums, sums_dtype, stream);
    });
  };
  const int64_t num_partials = bwd_num_partials(params);
  if (num_partials == 1) return launch_rows(params.grad_weight, params.weight_dtype);
  ULTRAMEM_RETURN_IF_ERROR(launch_rows(params.workspace, DType::kFloat32));
  return launch_reduce(params, static_cast<const float*>(params.workspace), num_partials, stream);
}

}  // namespace ultramem::cuda
