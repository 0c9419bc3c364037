// The part of the value FFN's backward that goes by token.
#pragma once

#include "ultramem/value_ffn.h"

namespace ultramem::cuda {

// grad_scores, grad_pre_input and, where it is not null, grad_a [T, S]: da, which grad_pre_values
// take. For at least one token.
Status launch_value_ffn_bwd_tokens(const ValueFfnBwdParams& params, float* grad_a, Stream stream);

}  // namespace ultramem::cuda
