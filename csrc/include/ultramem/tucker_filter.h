// Singular value decomposition of the summed Tucker cores: Cbar = sum_c core_c, R x R, per head.
//
// The leading pair (u, t) reduces a rank-R score to one number per key, which is what the axes are
// filtered by (UltraMem, arXiv 2411.12364, section 3). Computed by one-sided Jacobi in float64 and
// rounded, so that backends agree. There is no backward: u and t only rank, and what is trained by
// sigma (the Tucker penalty) has its gradient from `left` and `right`:
//   dCbar = left diag(dsigma) right^T,  the same for every core.
#pragma once

#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

// Invalid: another dtype, R or C outside 1..4, a negative H. All outputs are written, but for
// sigma, left and right where sigma is null.
struct TuckerFilterParams {
  int32_t num_cores = 1;          // C
  int32_t num_heads = 1;          // H
  int32_t tucker_rank = 1;        // R
  DType dtype = DType::kFloat32;  // float32 or float64, of everything below

  const void* core = nullptr;  // [C, H, R, R]
  // The filter: the leading singular vectors with sum(u) >= 0 (where |sum(u)| <= 1e-9, the first
  // component above 1e-9 is positive); e_1 where Cbar is zero, its two largest singular values are
  // equal (to 1e-9 of the first), or it is not finite (sigma, left and right are then NaN).
  void* u = nullptr;      // [H, R]
  void* t = nullptr;      // [H, R]
  void* sigma = nullptr;  // [H, R], descending; null: not wanted, nor left and right
  // Cbar = left diag(sigma) right^T; column i belongs to sigma_i. Kept for sigma's gradient.
  void* left = nullptr;   // [H, R, R]
  void* right = nullptr;  // [H, R, R]
};

}  // namespace ULTRAMEM_API

namespace cpu ULTRAMEM_PUBLIC {
// On the calling thread: a few hundred operations a head.
Status tucker_filter(const TuckerFilterParams& params);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
// One launch, a thread a head.
Status tucker_filter(const TuckerFilterParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
