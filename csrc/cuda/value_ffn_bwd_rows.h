// Dense gradients of the tables of the value FFN: which entries name a row, and their sums.
#pragma once

#include <cuda_runtime.h>

#include "ultramem/value_ffn.h"

namespace ultramem::cuda {

size_t value_ffn_bwd_rows_workspace(const ValueFfnBwdParams& params);

// Of the tables whose gradients `params` asks for. grad_a: [T, S], the gradient of the
// pre-activation; read where that of the pre-values is wanted.
Status value_ffn_bwd_rows(const ValueFfnBwdParams& params, const float* grad_a, void* workspace,
                          cudaStream_t stream);

}  // namespace ultramem::cuda
