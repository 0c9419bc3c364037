#include <cuda_runtime.h>

#include "matrix_product.h"

namespace {

constexpr int kTile = 16;

// An element a thread; nothing is shared. See matrix_product.h.
__global__ void matrix_product_kernel(Matrix a, Matrix b, float* out, bool accumulate) {
  const int64_t row = int64_t{blockIdx.y} * kTile + threadIdx.y;
  const int64_t column = int64_t{blockIdx.x} * kTile + threadIdx.x;
  if (row >= a.rows || column >= b.columns) return;
  const auto* a_data = static_cast<const float*>(a.data);
  const auto* b_data = static_cast<const float*>(b.data);
  float sum = 0;
  for (int64_t k = 0; k < a.columns; ++k) {
    sum += a_data[row * a.row_stride + k * a.column_stride] *
           b_data[k * b.row_stride + column * b.column_stride];
  }
  float& element = out[row * b.columns + column];
  element = accumulate ? element + sum : sum;
}

unsigned tiles(int64_t length) { return static_cast<unsigned>((length + kTile - 1) / kTile); }

}  // namespace

ultramem::Status matrix_product_cuda(const Matrix& a, const Matrix& b, float* out, bool accumulate,
                                     ultramem::Stream stream) {
  const dim3 grid(tiles(b.columns), tiles(a.rows));
  matrix_product_kernel<<<grid, dim3(kTile, kTile), 0, stream>>>(a, b, out, accumulate);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {ultramem::StatusCode::kCudaError, error, cudaGetErrorString(error)};
}
