// value_ffn on the CPU: checks, then the kernels of this machine's instruction set.
#include "ultramem/value_ffn.h"

#include "common/value_ffn_checks.h"
#include "kernel_table.h"
#include "row_groups.h"

namespace ultramem::cpu {
namespace {

bool known(DType dtype) { return dtype >= DType::kFloat32 && dtype <= DType::kFloat64; }

Status check(const ValueFfnParams& p) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  if (!known(p.table_dtype) || !known(p.dtype)) return invalid("value_ffn: unknown dtype");
  if ((p.table_dtype == DType::kFloat64) != (p.dtype == DType::kFloat64)) {
    return invalid("value_ffn: the tables and pre_input must both be float64 or neither");
  }
  if (p.num_tokens < 0 || p.num_selected < 0) {
    return invalid("value_ffn: num_tokens and num_selected must not be negative");
  }
  if (p.num_cores < 1 || p.num_cores > kMaxNumCores) {
    return invalid("value_ffn: num_cores must be in [1, 4]");
  }
  if (p.value_dim < 1 || p.value_dim % p.num_cores != 0) {
    return invalid("value_ffn: value_dim must be positive and a multiple of num_cores");
  }
  if (p.activation < Activation::kIdentity || p.activation > Activation::kSilu) {
    return invalid("value_ffn: unknown activation");
  }
  if (p.pre_value_dim < 0) return invalid("value_ffn: pre_value_dim must not be negative");
  if (p.pre_value_dim > 0 && p.num_tokens > 0 &&
      (p.pre_input == nullptr || (p.pre_values == nullptr && p.addressing.num_slots > 0))) {
    return invalid("value_ffn: pre_value_dim is positive but pre_values or pre_input is null");
  }
  return check_addressing(p.addressing);
}

Status check_bwd(const ValueFfnBwdParams& p) {
  const Status status = check(p);
  if (!status.ok()) return status;
  if (!known(p.grad_table_dtype) ||
      (p.grad_table_dtype == DType::kFloat64) != (p.dtype == DType::kFloat64)) {
    return Status::invalid_argument(
        "value_ffn backward: grad_table_dtype must be float64 if and only if dtype is");
  }
  const Status scales = check_scales(p);
  if (!scales.ok()) return scales;
  if (p.scores == nullptr && needs_scores(p) && p.num_tokens > 0 && p.num_selected > 0) {
    return Status::invalid_argument("value_ffn backward: scores is null");
  }
  if (p.num_selected > 0 && p.num_tokens >= kMaxGroupedEntries / p.num_selected) {
    return Status::invalid_argument(
        "value_ffn backward: num_tokens * num_selected must be below 2^32");
  }
  return {};
}

Status result(StatusCode code) {
  if (code == StatusCode::kOutOfRange) {
    return {code, 0,
            "value_ffn: indices must lie in [0, expand * window), or in [0, num_slots) without "
            "addressing"};
  }
  return {code, 0, ""};
}

}  // namespace

size_t value_ffn_fwd_workspace(const ValueFfnParams& params, const Executor& executor) {
  if (!check(params).ok() || params.num_tokens == 0) return 0;
  return kernel_table().value_ffn_fwd_workspace(params, executor);
}

Status value_ffn_fwd(const ValueFfnParams& params, const Executor& executor) {
  const Status status = check(params);
  if (!status.ok() || params.num_tokens == 0) return status;
  if (params.workspace == nullptr) {
    return Status::invalid_argument("value_ffn: workspace is null");
  }
  return result(kernel_table().value_ffn_fwd(params, executor));
}

size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params, const Executor& executor) {
  if (!check_bwd(params).ok() || params.num_tokens == 0) return 0;
  return kernel_table().value_ffn_bwd_workspace(params, executor);
}

Status value_ffn_bwd(const ValueFfnBwdParams& params, const Executor& executor) {
  const Status status = check_bwd(params);
  if (!status.ok() || params.num_tokens == 0) return status;
  if (params.workspace == nullptr) {
    return Status::invalid_argument("value_ffn backward: workspace is null");
  }
  return result(kernel_table().value_ffn_bwd(params, executor));
}

}  // namespace ultramem::cpu
