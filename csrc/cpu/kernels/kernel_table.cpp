#include "kernels.h"

#define ULTRAMEM_STRINGIFY_EXPANDED(x) #x
#define ULTRAMEM_STRINGIFY(x) ULTRAMEM_STRINGIFY_EXPANDED(x)

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {

const KernelTable& kernel_table() {
  static constexpr KernelTable kTable = {
      ULTRAMEM_STRINGIFY(ULTRAMEM_CPU_CAPABILITY),
      rms_norm_fwd,
      rms_norm_bwd_workspace,
      rms_norm_bwd,
      product_key_topk_fwd_workspace,
      product_key_topk_fwd,
      product_key_topk_bwd_workspace,
      product_key_topk_bwd,
      value_ffn_fwd_workspace,
      value_ffn_fwd,
      value_ffn_bwd_workspace,
      value_ffn_bwd,
      value_ffn_factors,
      table_grad_sum_sq_workspace,
      table_grad_sum_sq,
      table_grad_row_sq_workspace,
      table_grad_row_sq,
      table_update_workspace,
      table_update,
  };
  return kTable;
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
