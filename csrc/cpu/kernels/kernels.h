// The kernels of the capability being compiled; kernel_table.h says what they may assume.
#pragma once

#include "../kernel_table.h"
#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {

void rms_norm_fwd(const RmsNormParams& params, const Executor& executor);
size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params, const Executor& executor);
void rms_norm_bwd(const RmsNormBwdParams& params, const Executor& executor);

size_t product_key_topk_fwd_workspace(const ProductKeyTopkParams& params, const Executor& executor);
void product_key_topk_fwd(const ProductKeyTopkParams& params, const Executor& executor);
size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params,
                                      const Executor& executor);
StatusCode product_key_topk_bwd(const ProductKeyTopkBwdParams& params, const Executor& executor);

size_t value_ffn_fwd_workspace(const ValueFfnParams& params, const Executor& executor);
StatusCode value_ffn_fwd(const ValueFfnParams& params, const Executor& executor);
size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params, const Executor& executor);
StatusCode value_ffn_bwd(const ValueFfnBwdParams& params, const Executor& executor);
// All of the factors, of da what params.grad_a gives, from token `position` of theirs on.
StatusCode value_ffn_factors(const ValueFfnBwdDeferredParams& params, int64_t position,
                             const Executor& executor);

size_t table_grad_sum_sq_workspace(const TableGradSumSqParams& params, const Executor& executor);
void table_grad_sum_sq(const TableGradSumSqParams& params, const Executor& executor);
size_t table_grad_row_sq_workspace(const TableGradRowSqParams& params, const Executor& executor);
void table_grad_row_sq(const TableGradRowSqParams& params, const Executor& executor);
size_t table_update_workspace(const TableUpdateParams& params, const Executor& executor);
void table_update(const TableUpdateParams& params, const Executor& executor);

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
