#include "matrix_product.h"

namespace {

template <typename T>
void product(const Matrix& a, const Matrix& b, T* out, bool accumulate) {
  const T* a_data = static_cast<const T*>(a.data);
  const T* b_data = static_cast<const T*>(b.data);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < b.columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < a.columns; ++k) {
        sum += static_cast<double>(a_data[i * a.row_stride + k * a.column_stride]) *
               b_data[k * b.row_stride + j * b.column_stride];
      }
      T& element = out[i * b.columns + j];
      element = static_cast<T>(accumulate ? element + sum : sum);
    }
  }
}

}  // namespace

void matrix_product(Device& device, ultramem::DType dtype, const Matrix& a, const Matrix& b,
                    const Buffer& out, bool accumulate) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (device.is_cuda()) {
    return check(matrix_product_cuda(a, b, out.data<float>(), accumulate, device.stream()),
                 "matrix_product");
  }
#endif
  (void)device;
  if (dtype == ultramem::DType::kFloat64) {
    product(a, b, out.data<double>(), accumulate);
  } else {
    product(a, b, out.data<float>(), accumulate);
  }
}
