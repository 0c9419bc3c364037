// The filter of one head, the same code on host and device (tucker_filter.h has the contract).
#pragma once

#include <cstdint>

#include "common/jacobi_svd.h"
#include "ultramem/tucker_filter.h"

namespace ultramem {

namespace tucker_detail {

// float64 on the way in, the tensor's dtype on the way out.
struct Elements {
  void* data;
  bool is_double;

  ULTRAMEM_SVD_FUNCTION double load(int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  ULTRAMEM_SVD_FUNCTION void store(int64_t i, double x) const {
    if (is_double) {
      static_cast<double*>(data)[i] = x;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(x);
    }
  }
};

// Relative gap below which the first two singular values count as equal: their vectors would not
// survive the rounding of the cores.
constexpr double kEqual = 1e-9;

}  // namespace tucker_detail

inline Status check_tucker_filter(const TuckerFilterParams& params) {
  if (params.dtype != DType::kFloat32 && params.dtype != DType::kFloat64) {
    return Status::invalid_argument("tucker_filter: core must be float32 or float64");
  }
  if (params.tucker_rank < 1 || params.tucker_rank > kMaxTuckerRank) {
    return Status::invalid_argument("tucker_filter: the Tucker rank R must be 1..4");
  }
  if (params.num_cores < 1 || params.num_cores > kMaxNumCores) {
    return Status::invalid_argument("tucker_filter: the number of cores C must be 1..4");
  }
  if (params.num_heads < 0) {
    return Status::invalid_argument("tucker_filter: the number of heads H must not be negative");
  }
  return {};
}

template <int R>
ULTRAMEM_SVD_FUNCTION void tucker_filter_head(const TuckerFilterParams& params, int64_t head) {
  using tucker_detail::Elements;
  const bool is_double = params.dtype == DType::kFloat64;
  const Elements core{const_cast<void*>(params.core), is_double};
  double sum[R][R];
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R * R; ++i) {
    sum[i / R][i % R] = 0;
    for (int c = 0; c < params.num_cores; ++c) {
      sum[i / R][i % R] += core.load((int64_t{c} * params.num_heads + head) * R * R + i);
    }
  }
  const Svd<R> svd = jacobi_svd<R>(sum);

  // Without a leading pair any unit vector will do, and e_1 is one that all backends agree on; also
  // where Cbar is not finite, so that only scores, not the filter, carry the NaN.
  bool degenerate = !(svd.sigma[0] > 0);
  if constexpr (R > 1) {
    degenerate |= svd.sigma[0] - svd.sigma[1] <= tucker_detail::kEqual * svd.sigma[0];
  }
  const Elements u{params.u, is_double}, t{params.t, is_double}, sigma{params.sigma, is_double};
  const Elements left{params.left, is_double}, right{params.right, is_double};
  ULTRAMEM_SVD_UNROLL
  for (int i = 0; i < R; ++i) {
    const double unit = i == 0 ? 1 : 0;
    u.store(head * R + i, degenerate ? unit : svd.left[i][0]);
    t.store(head * R + i, degenerate ? unit : svd.right[i][0]);
    if (params.sigma == nullptr) continue;
    sigma.store(head * R + i, svd.sigma[i]);
    ULTRAMEM_SVD_UNROLL
    for (int j = 0; j < R; ++j) {
      left.store((head * R + i) * R + j, svd.left[i][j]);
      right.store((head * R + i) * R + j, svd.right[i][j]);
    }
  }
}

}  // namespace ultramem
