// What every backend asks of factors to append, and of value_ffn_bwd_deferred beyond value_ffn_bwd.
#pragma once

#include "ultramem/table_factors.h"

namespace ultramem {

inline Status check_arena(const TableFactors& factors, const AddressingParams& addressing) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  if (factors.header == nullptr) {
    return invalid("table factors: factors must be an arena laid out for this shape");
  }
  if (factors.num_groups < 1 || factors.num_groups > kMaxFactorGroups) {
    return invalid("table factors: factors offer up to 256 groups E");
  }
  if (addressing.rows_in_memory() >= int64_t{kNoSlot}) {
    return invalid("table factors: factors offer fewer than 2^32-1 rows");
  }
  return {};
}

inline Status check_factors(const ValueFfnBwdDeferredParams& params) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  const TableFactors& factors = params.factors;
  if (params.grad_values != nullptr || params.grad_pre_values != nullptr ||
      params.grad_a != nullptr) {
    return invalid("value_ffn_bwd_deferred: grad_values, grad_pre_values and grad_a must be null");
  }
  const Status arena = check_arena(factors, params.addressing);
  if (!arena.ok()) return arena;
  const int64_t num_groups = params.sum_groups ? 1 : params.addressing.expand;
  if (factors.num_selected != params.num_selected || factors.value_dim != params.value_dim ||
      factors.pre_value_dim != params.pre_value_dim || factors.num_cores != params.num_cores ||
      factors.num_groups != num_groups || factors.table_dtype != params.table_dtype ||
      factors.dtype != params.dtype) {
    return invalid("value_ffn_bwd_deferred: factors and parameters must be of one shape");
  }
  return {};
}

inline Status check_append(const TableFactorsAppendParams& params) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  const TableFactors& factors = params.factors;
  const Status arena = check_arena(factors, params.addressing);
  if (!arena.ok()) return arena;
  if (factors.num_groups != (params.sum_groups ? 1 : params.addressing.expand)) {
    return invalid("table_factors_append: factors must have the groups of grad_out");
  }
  if (params.num_tokens < 0 || params.num_tokens > INT32_MAX) {
    return invalid("table_factors_append: num_tokens must be in 0..2^31-1");
  }
  if (params.num_tokens == 0) return {};
  const bool has_pre_values = factors.pre_value_dim > 0;
  if (params.grad_out == nullptr || (has_pre_values && params.pre_input == nullptr)) {
    return invalid("table_factors_append: grad_out and pre_input must not be null");
  }
  if (factors.num_selected > 0 && (params.indices == nullptr || params.weights == nullptr ||
                                   (has_pre_values && params.grad_a == nullptr))) {
    return invalid("table_factors_append: indices, weights and grad_a must not be null");
  }
  return {};
}

// What the backends' kernels, which take a backward's factors, make of known ones: the scores are
// the weights, for without pre_activation h is 1, and da is given.
inline ValueFfnBwdDeferredParams as_backward(const TableFactorsAppendParams& params) {
  const TableFactors& factors = params.factors;
  ValueFfnBwdDeferredParams backward;
  backward.num_tokens = params.num_tokens;
  backward.num_selected = factors.num_selected;
  backward.pre_value_dim = factors.pre_value_dim;
  backward.value_dim = factors.value_dim;
  backward.num_cores = factors.num_cores;
  backward.sum_groups = params.sum_groups;
  backward.indices_are_int64 = params.indices_are_int64;
  backward.table_dtype = factors.table_dtype;
  backward.dtype = factors.dtype;
  backward.addressing = params.addressing;
  backward.indices = params.indices;
  backward.scores = params.weights;
  backward.pre_input = params.pre_input;
  backward.grad_out = params.grad_out;
  backward.grad_a = const_cast<void*>(params.grad_a);
  backward.factors = factors;
  return backward;
}

}  // namespace ultramem
