// What both backends refuse of a value FFN's backward.
#pragma once

#include "ultramem/value_ffn.h"

namespace ultramem {

inline Status check_scales(const ValueFfnBwdParams& params) {
  const bool scaled = params.value_scale != nullptr || params.pre_value_scale != nullptr;
  if (scaled && (params.grad_values != nullptr || params.grad_pre_values != nullptr)) {
    return Status::invalid_argument(
        "value_ffn_bwd: dense gradients of the tables are not offered where these have scales");
  }
  return {};
}

}  // namespace ultramem
