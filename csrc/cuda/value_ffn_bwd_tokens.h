// The part of the value FFN's backward that goes by token.
#pragma once

#include "ultramem/table_factors.h"
#include "ultramem/value_ffn.h"

namespace ultramem::cuda {

// What the pass leaves for the gradients of the tables. Pointers are null for what nobody asks for.
struct TokenFactors {
  float* weights;  // [T, S, C]: act(a) * score, the values' factor
  float* grad_a;   // [T, S]: da, the pre-values' factor
  // With a header: factors are appended to it, its count is not advanced, and weights must be null.
  // grad_a is still needed, as workspace.
  TableFactors arena;
};

// grad_scores, grad_pre_input and the factors. For at least one token. `leaves_room`: for small
// kernels on another stream, which are what is waited for.
Status launch_value_ffn_bwd_tokens(const ValueFfnBwdParams& params, const TokenFactors& factors,
                                   bool leaves_room, Stream stream);

// The factors alone, to an arena, with da given as `factors.grad_a` and the scores. For at least
// one token.
Status launch_value_ffn_factors(const ValueFfnBwdParams& params, const TokenFactors& factors,
                                Stream stream);

// value_ffn_bwd with factors that are appended to `arena`, where that has a header.
Status value_ffn_bwd_with(const ValueFfnBwdParams& params, const TableFactors& arena,
                          Stream stream);

}  // namespace ultramem::cuda
