// RMS normalisation of rows, the norm of queries and keys:
//   y = x / sqrt(mean(x^2) + eps) * weight
// types.h says what holds for every operator: workspaces, errors, streams, threads.
#pragma once

#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

// Invalid: dim < 1, a negative num_rows, another weight_dtype.
struct RmsNormParams {
  int64_t num_rows = 0;
  int64_t dim = 0;                       // width of a row
  double eps = 1e-6;                     // added to the mean of the squares
  DType dtype = DType::kFloat32;         // of x, y and their gradients
  DType weight_dtype = DType::kFloat32;  // of weight and its gradient: `dtype` or accumulation's

  const void* x = nullptr;       // [num_rows, dim]
  const void* weight = nullptr;  // [dim]
  void* y = nullptr;             // [num_rows, dim]
};

// Reads x and weight of the forward; `y` is not read. Both gradients are computed, and overwritten.
struct RmsNormBwdParams : RmsNormParams {
  const void* grad_y = nullptr;  // [num_rows, dim]
  void* grad_x = nullptr;        // [num_rows, dim]
  void* grad_weight = nullptr;   // [dim]
  void* workspace = nullptr;     // rms_norm_bwd_workspace(params) bytes
};

}  // namespace ULTRAMEM_API

namespace cpu ULTRAMEM_PUBLIC {
Status rms_norm_fwd(const RmsNormParams& params, const Executor& executor);
size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params, const Executor& executor);
Status rms_norm_bwd(const RmsNormBwdParams& params, const Executor& executor);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
Status rms_norm_fwd(const RmsNormParams& params, Stream stream);
size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params);
Status rms_norm_bwd(const RmsNormBwdParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
