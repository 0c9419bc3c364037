// value_ffn_bwd_deferred on the CPU: value_ffn_bwd leaves da where it belongs, the rest of the
// factors is written after it.
#include "common/table_factors_check.h"
#include "kernel_table.h"

namespace ultramem::cpu {
namespace {

ValueFfnBwdParams backward_params(const ValueFfnBwdDeferredParams& params) {
  ValueFfnBwdParams backward = params;
  backward.grad_table_dtype = accumulation_dtype(params.table_dtype);  // of no table, but checked
  return backward;
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
  TableFactorsHeader& header = *factors.header;
  const int64_t position = header.num_tokens;
  const bool fits = params.num_tokens <= factors.capacity - position;

  ValueFfnBwdParams backward = backward_params(params);
  if (fits && factors.grad_a != nullptr) {
    const int64_t bytes = element_size(accumulation_dtype(params.table_dtype));
    backward.grad_a = static_cast<char*>(factors.grad_a) + position * params.num_selected * bytes;
  }
  const Status backward_status = value_ffn_bwd(backward, executor);
  if (!backward_status.ok()) return backward_status;
  if (!fits) {
    header.overflow += params.num_tokens;
    return {};
  }
  kernel_table().value_ffn_factors(params, position, executor);
  header.num_tokens = position + params.num_tokens;
  return {};
}

}  // namespace ultramem::cpu
