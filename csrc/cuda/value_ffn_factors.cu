// Appending factors of the tables' gradients to what the arena holds. Deferred backward of the
// value FFN: value_ffn_bwd for the gradients of scores and pre_input, whose pass over the tokens
// appends.
#include "common.cuh"
#include "common/table_factors_check.h"
#include "common/value_ffn_checks.h"
#include "kernel_registry.h"
#include "value_ffn_bwd_tokens.h"

namespace ultramem::cuda {
namespace {

// When all blocks of the pass have read the position.
__global__ void value_ffn_factors_advance_kernel(TableFactorsHeader* header, int64_t capacity,
                                                 int64_t num_tokens) {
  const bool fits = num_tokens <= capacity - header->num_tokens;
  (fits ? header->num_tokens : header->overflow) += num_tokens;
}

ULTRAMEM_REGISTER_KERNEL(value_ffn_factors_advance, "value_ffn_factors_advance", 1,
                         value_ffn_factors_advance_kernel);

Status launch_advance(const TableFactors& factors, int64_t num_tokens, Stream stream) {
  value_ffn_factors_advance_kernel<<<1, 1, 0, stream>>>(factors.header, factors.capacity,
                                                        num_tokens);
  return launch_status();
}

bool has_grad_a(const ValueFfnBwdDeferredParams& params) {
  return params.pre_value_dim > 0 && params.num_selected > 0;
}

size_t grad_a_bytes(const ValueFfnBwdDeferredParams& params) {
  return has_grad_a(params) ? align_up(params.num_tokens * params.num_selected * sizeof(float)) : 0;
}

// The parameters of value_ffn_bwd, with da and what it needs itself in the workspace.
ValueFfnBwdParams backward_params(const ValueFfnBwdDeferredParams& params) {
  ValueFfnBwdParams backward = params;
  if (has_grad_a(params)) backward.grad_a = params.workspace;
  backward.workspace = static_cast<unsigned char*>(params.workspace) + grad_a_bytes(params);
  return backward;
}

}  // namespace

size_t value_ffn_bwd_deferred_workspace(const ValueFfnBwdDeferredParams& params) {
  ValueFfnBwdParams backward = params;
  // Not null: it then needs no da of its own.
  if (has_grad_a(params)) backward.grad_a = backward.grad_scores;
  return grad_a_bytes(params) + value_ffn_bwd_workspace(backward);
}

Status value_ffn_bwd_deferred(const ValueFfnBwdDeferredParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_factors(params));
  if (params.num_tokens > 0 && has_grad_a(params) && params.workspace == nullptr) {
    return Status::invalid_argument("value_ffn_bwd_deferred: the workspace must not be null");
  }
  const ValueFfnBwdParams backward = backward_params(params);
  const TableFactors& factors = params.factors;
  ULTRAMEM_RETURN_IF_ERROR(value_ffn_bwd_with(backward, factors, stream));
  return params.num_tokens == 0 ? Status{} : launch_advance(factors, params.num_tokens, stream);
}

Status table_factors_append(const TableFactorsAppendParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_append(params));
  ULTRAMEM_RETURN_IF_ERROR(check_addressing(params.addressing));
  if (accumulation_dtype(params.factors.table_dtype) == DType::kFloat64) {
    return Status::invalid_argument("table_factors_append: float64 is offered on the CPU only");
  }
  if (params.num_tokens == 0) return {};
  const ValueFfnBwdDeferredParams backward = as_backward(params);
  const TokenFactors factors{nullptr, static_cast<float*>(backward.grad_a), params.factors};
  ULTRAMEM_RETURN_IF_ERROR(launch_value_ffn_factors(backward, factors, stream));
  return launch_advance(params.factors, params.num_tokens, stream);
}

Status is_capturing(Stream stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaStreamIsCapturing(stream, &status));
  *capturing = status != cudaStreamCaptureStatusNone;
  return {};
}

}  // namespace ultramem::cuda
