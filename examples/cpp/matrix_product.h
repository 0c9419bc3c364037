// Matrix products, which ultramem leaves to others. These are plain loops, so that the example
// depends on nothing; a program uses its BLAS, cuBLAS or CUTLASS. (For up to 64 tokens in bfloat16
// or float16 on compute capability 9.0, ultramem/tucker_query.h has the query projection.)
#pragma once

#include <cstdint>

#include "device.h"

struct Matrix {
  const void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // in elements

  // Row-major.
  static Matrix of(const Buffer& buffer, int64_t rows, int64_t columns) {
    return {buffer.data(), rows, columns, columns, 1};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// out [a.rows, b.columns] = a b, or += with accumulate; float32, or float64 on the CPU.
void matrix_product(Device& device, ultramem::DType dtype, const Matrix& a, const Matrix& b,
                    const Buffer& out, bool accumulate = false);

#if defined(ULTRAMEM_WITH_CUDA)
ultramem::Status matrix_product_cuda(const Matrix& a, const Matrix& b, float* out, bool accumulate,
                                     ultramem::Stream stream);
#endif
