// What both backends refuse of a value FFN.
#pragma once

#include "ultramem/value_ffn.h"

namespace ultramem {

inline Status check_addressing(const AddressingParams& addressing) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  const AddressingParams& a = addressing;
  if (a.num_slots < 0) return invalid("value_ffn: num_slots must not be negative");
  if (a.first_row < 0 || a.num_rows < 0 || a.first_row > a.num_slots - a.rows_in_memory()) {
    return invalid("value_ffn: rows [first_row, first_row + num_rows) must lie in [0, num_slots)");
  }
  if (a.window == 0) {
    return a.expand == 1 && a.shuffle == Shuffle::kNone
               ? Status{}
               : invalid("value_ffn: expand and shuffle need a window");
  }
  if (a.window < 0 || a.window > a.num_slots) {
    return invalid("value_ffn: window must be in 1..num_slots");
  }
  if (a.offset < 0 || a.offset >= a.num_slots) {
    return invalid("value_ffn: offset must be in [0, num_slots)");
  }
  if (a.expand < 1 || a.expand > INT32_MAX || a.window > INT64_MAX / a.expand) {
    return invalid("value_ffn: expand must be in 1..2^31-1, and expand * window below 2^63");
  }
  constexpr int64_t kMaxKeys = 3037000499;  // whose square is below 2^63
  switch (a.shuffle) {
    case Shuffle::kNone:
      return {};
    case Shuffle::kFeistel:
      return a.num_keys >= 1 && a.num_keys <= kMaxKeys &&
                     a.num_keys * a.num_keys == a.expand * a.window
                 ? Status{}
                 : invalid("value_ffn: the feistel shuffle needs num_keys^2 == expand * window");
    case Shuffle::kPermutation:
      return a.permutation != nullptr
                 ? Status{}
                 : invalid("value_ffn: the permutation shuffle needs a permutation");
  }
  return invalid("value_ffn: unknown shuffle");
}

// Whether a backward that appends no factors reads scores.
inline bool needs_scores(const ValueFfnBwdParams& params) {
  return params.pre_value_dim > 0 || params.grad_values != nullptr;
}

inline Status check_scales(const ValueFfnBwdParams& params) {
  const bool scaled = params.value_scale != nullptr || params.pre_value_scale != nullptr;
  if (scaled && (params.grad_values != nullptr || params.grad_pre_values != nullptr)) {
    return Status::invalid_argument(
        "value_ffn_bwd: dense gradients of the tables are not offered where these have scales");
  }
  return {};
}

}  // namespace ultramem
