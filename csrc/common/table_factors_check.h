// What every backend's value_ffn_bwd_deferred asks of its parameters beyond value_ffn_bwd.
#pragma once

#include "ultramem/table_factors.h"

namespace ultramem {

inline Status check_factors(const ValueFfnBwdDeferredParams& params) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  const TableFactors& factors = params.factors;
  if (params.grad_values != nullptr || params.grad_pre_values != nullptr ||
      params.grad_a != nullptr) {
    return invalid("value_ffn_bwd_deferred: grad_values, grad_pre_values and grad_a must be null");
  }
  if (factors.header == nullptr) {
    return invalid("value_ffn_bwd_deferred: factors must be an arena laid out for this shape");
  }
  if (factors.num_groups < 1 || factors.num_groups > kMaxFactorGroups) {
    return invalid("value_ffn_bwd_deferred: factors offer up to 256 groups E");
  }
  const int64_t num_groups = params.sum_groups ? 1 : params.addressing.expand;
  if (factors.num_selected != params.num_selected || factors.value_dim != params.value_dim ||
      factors.pre_value_dim != params.pre_value_dim || factors.num_cores != params.num_cores ||
      factors.num_groups != num_groups || factors.table_dtype != params.table_dtype ||
      factors.dtype != params.dtype) {
    return invalid("value_ffn_bwd_deferred: factors and parameters must be of one shape");
  }
  if (params.addressing.num_slots >= int64_t{kNoSlot}) {
    return invalid("value_ffn_bwd_deferred: factors offer fewer than 2^32-1 rows");
  }
  return {};
}

}  // namespace ultramem
