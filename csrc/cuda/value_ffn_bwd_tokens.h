// The part of the value FFN's backward that goes by token.
#pragma once

#include "ultramem/value_ffn.h"

namespace ultramem::cuda {

// What the pass leaves for the gradients of the tables; null where nobody asks for it.
struct TokenFactors {
  float* weights;  // [T, S, C]: act(a) * score, the values' factor
  float* grad_a;   // [T, S]: da, the pre-values' factor
};

// grad_scores, grad_pre_input and the factors. For at least one token.
Status launch_value_ffn_bwd_tokens(const ValueFfnBwdParams& params, const TokenFactors& factors,
                                   Stream stream);

}  // namespace ultramem::cuda
