// Appending factors on the CPU. Of value_ffn_bwd_deferred, value_ffn_bwd leaves da where it
// belongs, and the rest of the factors is written after it.
#include "common/table_factors_check.h"
#include "common/value_ffn_checks.h"
#include "kernel_table.h"

namespace ultramem::cpu {
namespace {

ValueFfnBwdParams backward_params(const ValueFfnBwdDeferredParams& params) {
  ValueFfnBwdParams backward = params;
  backward.grad_table_dtype = accumulation_dtype(params.table_dtype);  // of no table, but checked
  return backward;
}

bool fits(const TableFactors& factors, int64_t num_tokens) {
  return num_tokens <= factors.capacity - factors.header->num_tokens;
}

// What the backward or the caller has not written yet, and the header.
Status append(const ValueFfnBwdDeferredParams& params, const Executor& executor) {
  TableFactorsHeader& header = *params.factors.header;
  if (!fits(params.factors, params.num_tokens)) {
    header.overflow += params.num_tokens;
    return {};
  }
  const StatusCode code = kernel_table().value_ffn_factors(params, header.num_tokens, executor);
  if (code != StatusCode::kOk) {
    return {code, 0,
            "table factors: indices must lie in [0, expand * window), or in [0, num_slots)"};
  }
  header.num_tokens += params.num_tokens;
  return {};
}

}  // namespace

size_t value_ffn_bwd_deferred_workspace(const ValueFfnBwdDeferredParams& params,
                                        const Executor& executor) {
  // With da in it, as where the factors have no room.
  return value_ffn_bwd_workspace(backward_params(params), executor);
}

Status value_ffn_bwd_deferred(const ValueFfnBwdDeferredParams& params, const Executor& executor) {
  const Status status = check_factors(params);
  if (!status.ok() || params.num_tokens == 0) return status;
  const TableFactors& factors = params.factors;
  ValueFfnBwdParams backward = backward_params(params);
  if (fits(factors, params.num_tokens) && factors.grad_a != nullptr) {
    const int64_t bytes = element_size(accumulation_dtype(params.table_dtype));
    backward.grad_a = static_cast<char*>(factors.grad_a) +
                      factors.header->num_tokens * params.num_selected * bytes;
  }
  const Status backward_status = value_ffn_bwd(backward, executor);
  if (!backward_status.ok()) return backward_status;
  return append(params, executor);
}

Status table_factors_append(const TableFactorsAppendParams& params, const Executor& executor) {
  Status status = check_append(params);
  if (status.ok()) status = check_addressing(params.addressing);
  if (!status.ok() || params.num_tokens == 0) return status;
  return append(as_backward(params), executor);
}

}  // namespace ultramem::cpu
