// product_key_topk on the CPU: checks, then the kernels of this machine's instruction set.
#include "ultramem/product_key_topk.h"

#include <cstdint>
#include <cstring>

#include "common/own_filter.h"
#include "kernel_table.h"
#include "row_groups.h"

namespace ultramem::cpu {
namespace {

Status check(const ProductKeyTopkParams& p) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  if (p.dtype < DType::kFloat32 || p.dtype > DType::kFloat64) {
    return invalid("product_key_topk: unknown dtype");
  }
  if (p.num_tokens < 0) return invalid("product_key_topk: num_tokens must not be negative");
  if (p.num_keys < 1 || p.num_keys > INT32_MAX) {
    return invalid("product_key_topk: num_keys must be in [1, 2^31)");
  }
  if (p.key_dim < 1) return invalid("product_key_topk: key_dim must be positive");
  if (p.num_heads < 1) return invalid("product_key_topk: num_heads must be positive");
  if (p.tucker_rank < 1 || p.tucker_rank > kMaxTuckerRank) {
    return invalid("product_key_topk: tucker_rank must be in [1, 4]");
  }
  if (p.num_cores < 1 || p.num_cores > kMaxNumCores) {
    return invalid("product_key_topk: num_cores must be in [1, 4]");
  }
  if (p.num_queries != 1 && p.num_queries != p.tucker_rank) {
    return invalid("product_key_topk: num_queries must be 1 or tucker_rank");
  }
  if (p.axis_topk < 1 || p.axis_topk > p.num_keys || p.axis_topk > kMaxAxisTopk) {
    return invalid("product_key_topk: axis_topk must be in [1, min(num_keys, 128)]");
  }
  if (p.topk < 1 || p.topk > p.axis_topk * p.axis_topk || p.topk > kMaxTopk) {
    return invalid("product_key_topk: topk must be in [1, min(axis_topk^2, 1024)]");
  }
  switch (p.mode) {
    case ScoreMode::kTucker:
      if (p.core == nullptr) return invalid("product_key_topk: core is null");
      return {};
    case ScoreMode::kAdditive:
      if (p.tucker_rank != 1 || p.num_cores != 1) {
        return invalid("product_key_topk: additive mode needs tucker_rank = num_cores = 1");
      }
      return {};
  }
  return invalid("product_key_topk: unknown mode");
}

Status check_fwd(const ProductKeyTopkParams& p) {
  const Status status = check(p);
  if (status.ok() && p.mode == ScoreMode::kTucker && (p.u == nullptr || p.t == nullptr) &&
      !computes_filter(p)) {
    return Status::invalid_argument("product_key_topk: u or t is null");
  }
  return status;
}

Status check_bwd(const ProductKeyTopkBwdParams& p) {
  const Status status = check(p);
  if (!status.ok()) return status;
  if (p.num_tokens >= kMaxGroupedEntries / (2 * p.num_heads * p.axis_topk)) {
    return Status::invalid_argument(
        "product_key_topk backward: num_tokens * num_heads * 2 * axis_topk must be below 2^32");
  }
  return {};
}

void zero_parameter_gradients(const ProductKeyTopkBwdParams& p) {
  const int64_t key_elements = 2 * p.num_heads * p.tucker_rank * p.num_keys * p.key_dim;
  const int64_t core_elements = int64_t{p.num_cores} * p.num_heads * p.tucker_rank * p.tucker_rank;
  if (p.grad_keys != nullptr) {
    std::memset(p.grad_keys, 0, static_cast<size_t>(key_elements * element_size(p.dtype)));
  }
  if (p.grad_core != nullptr) {
    const DType acc = accumulation_dtype(p.dtype);
    std::memset(p.grad_core, 0, static_cast<size_t>(core_elements * element_size(acc)));
  }
}

}  // namespace

size_t product_key_topk_fwd_workspace(const ProductKeyTopkParams& params,
                                      const Executor& executor) {
  if (!check(params).ok() || params.num_tokens == 0) return 0;
  return kernel_table().product_key_topk_fwd_workspace(params, executor);
}

Status product_key_topk_fwd(const ProductKeyTopkParams& params, const Executor& executor) {
  const Status status = check_fwd(params);
  if (!status.ok() || params.num_tokens == 0) return status;
  if (params.workspace == nullptr) {
    return Status::invalid_argument("product_key_topk: workspace is null");
  }
  const ProductKeyTopkParams filtered = with_filter(params);
  if (computes_filter(params)) {
    const Status filter_status = tucker_filter(filter_params(filtered));
    if (!filter_status.ok()) return filter_status;
  }
  kernel_table().product_key_topk_fwd(filtered, executor);
  return {};
}

size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params,
                                      const Executor& executor) {
  if (!check(params).ok() || params.num_tokens == 0) return 0;
  return kernel_table().product_key_topk_bwd_workspace(params, executor);
}

Status product_key_topk_bwd(const ProductKeyTopkBwdParams& params, const Executor& executor) {
  const Status status = check_bwd(params);
  if (!status.ok()) return status;
  if (params.num_tokens == 0) {
    zero_parameter_gradients(params);
    return {};
  }
  if (params.workspace == nullptr) {
    return Status::invalid_argument("product_key_topk backward: workspace is null");
  }
  const StatusCode code = kernel_table().product_key_topk_bwd(params, executor);
  if (code == StatusCode::kOutOfRange) {
    return {code, 0,
            "product_key_topk backward: axis_indices must lie in [0, num_keys) and grid_positions "
            "in [0, axis_topk^2)"};
  }
  return {code, 0, ""};
}

}  // namespace ultramem::cpu
