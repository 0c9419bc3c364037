// The kernels of one instruction set, as the dispatcher sees them.
//
// The sources of kernels/ are compiled once per instruction set, each time into a namespace of its
// own (ULTRAMEM_CPU_CAPABILITY). They are given parameters that have been checked and a workspace
// that is large enough, so they cannot fail but for an index out of range.
#pragma once

#include "ultramem/product_key_topk.h"
#include "ultramem/rms_norm.h"
#include "ultramem/table_factors.h"
#include "ultramem/table_update.h"
#include "ultramem/value_ffn.h"

namespace ultramem::cpu {

struct KernelTable {
  const char* capability;

  void (*rms_norm_fwd)(const RmsNormParams&, const Executor&);
  size_t (*rms_norm_bwd_workspace)(const RmsNormBwdParams&, const Executor&);
  void (*rms_norm_bwd)(const RmsNormBwdParams&, const Executor&);

  size_t (*product_key_topk_fwd_workspace)(const ProductKeyTopkParams&, const Executor&);
  void (*product_key_topk_fwd)(const ProductKeyTopkParams&, const Executor&);
  size_t (*product_key_topk_bwd_workspace)(const ProductKeyTopkBwdParams&, const Executor&);
  StatusCode (*product_key_topk_bwd)(const ProductKeyTopkBwdParams&, const Executor&);

  size_t (*value_ffn_fwd_workspace)(const ValueFfnParams&, const Executor&);
  StatusCode (*value_ffn_fwd)(const ValueFfnParams&, const Executor&);
  size_t (*value_ffn_bwd_workspace)(const ValueFfnBwdParams&, const Executor&);
  StatusCode (*value_ffn_bwd)(const ValueFfnBwdParams&, const Executor&);
  StatusCode (*value_ffn_factors)(const ValueFfnBwdDeferredParams&, int64_t position,
                                  const Executor&);

  size_t (*table_grad_sum_sq_workspace)(const TableGradSumSqParams&, const Executor&);
  void (*table_grad_sum_sq)(const TableGradSumSqParams&, const Executor&);
  size_t (*table_grad_row_sq_workspace)(const TableGradRowSqParams&, const Executor&);
  void (*table_grad_row_sq)(const TableGradRowSqParams&, const Executor&);
  size_t (*table_update_workspace)(const TableUpdateParams&, const Executor&);
  void (*table_update)(const TableUpdateParams&, const Executor&);
};

// The table of the best instruction set that was built and that this machine has.
const KernelTable& kernel_table();

namespace DEFAULT {
const KernelTable& kernel_table();
}
namespace AVX2 {
const KernelTable& kernel_table();
}
namespace AVX512 {
const KernelTable& kernel_table();
}

}  // namespace ultramem::cpu
