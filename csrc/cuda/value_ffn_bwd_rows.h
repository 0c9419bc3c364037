// Dense gradients of the tables of the value FFN: which entries name a row, and their sums.
#pragma once

#include <cuda_runtime.h>

#include "ultramem/value_ffn.h"
#include "value_ffn_bwd_tokens.h"

namespace ultramem::cuda {

size_t value_ffn_bwd_rows_workspace(const ValueFfnBwdParams& params);

// The entries' slots, into the workspace, and counters there cleared; then sorts the entries by the
// slots.
Status value_ffn_bwd_keys(const ValueFfnBwdParams& params, void* workspace, cudaStream_t stream);
Status value_ffn_bwd_sort(const ValueFfnBwdParams& params, void* workspace, cudaStream_t stream);

// With the entries sorted, the gradients of the tables that `params` asks for, from their factors.
Status value_ffn_bwd_rows(const ValueFfnBwdParams& params, const TokenFactors& factors,
                          void* workspace, cudaStream_t stream);

}  // namespace ultramem::cuda
