// Deferred backward of the value FFN: value_ffn_bwd for the gradients of scores and pre_input and
// da, then the factors of the tables' gradients, appended to what the arena holds.
//
// The position to append at is in device memory, so that a captured graph appends at every replay:
// one kernel writes there (value_ffn_factors), a second one advances it (value_ffn_factors_advance)
// when all blocks of the first have read it.
#include "common/table_factors_check.h"
#include "kernel_registry.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

// A row of each kind, copied in the widest words that the rows of both sides are aligned to.
struct RowCopy {
  const void* from;  // [T, row_words]
  void* to;          // [capacity, row_words]
  int64_t row_words;
  int word_bytes;  // 16, 4 or 2
};

struct FactorArguments {
  const float* grad_a;  // [T, S]: da; null without pre-values
  RowCopy grad_out, pre_input;
};

template <typename Word>
__device__ __forceinline__ void copy_words(const RowCopy& copy, int64_t token, int64_t to_token) {
  const Word* from = static_cast<const Word*>(copy.from) + token * copy.row_words;
  Word* to = static_cast<Word*>(copy.to) + to_token * copy.row_words;
  for (int64_t i = threadIdx.x; i < copy.row_words; i += kThreads) to[i] = __ldg(from + i);
}

__device__ __forceinline__ void copy_row(const RowCopy& copy, int64_t token, int64_t to_token) {
  if (copy.word_bytes == 16) {
    copy_words<uint4>(copy, token, to_token);
  } else if (copy.word_bytes == 4) {
    copy_words<uint32_t>(copy, token, to_token);
  } else {
    copy_words<uint16_t>(copy, token, to_token);
  }
}

// A block a token.
__global__ void __launch_bounds__(kThreads)
    value_ffn_factors_kernel(const __grid_constant__ ValueFfnParams params,
                             const __grid_constant__ TableFactors factors,
                             const __grid_constant__ FactorArguments arguments) {
  const int64_t position = factors.header->num_tokens;
  if (params.num_tokens > factors.capacity - position) return;
  const int64_t token = blockIdx.x;
  const int64_t to_token = position + token;
  const int num_cores = params.num_cores;
  const int num_selected = static_cast<int>(params.num_selected);
  for (int i = threadIdx.x; i < num_selected; i += kThreads) {
    const int64_t entry = token * num_selected + i;
    const int64_t to = to_token * num_selected + i;
    const SlotAddress address = resolve_slot(params.addressing, load_index(params, entry));
    const bool in_range = address.slot >= 0;
    float h = 1;
    if (params.pre_activation != nullptr) {
      h = activate(params.activation, static_cast<const float*>(params.pre_activation)[entry]);
    }
    const float* scores = static_cast<const float*>(params.scores) + entry * num_cores;
    float* weights = static_cast<float*>(factors.weights) + to * num_cores;
    for (int c = 0; c < num_cores; ++c) weights[c] = in_range ? h * scores[c] : 0.0f;
    factors.slots[to] = in_range ? static_cast<uint32_t>(address.slot) : kNoSlot;
    if (factors.groups != nullptr) factors.groups[to] = static_cast<uint8_t>(address.group);
    // Zero where out of range.
    if (factors.grad_a != nullptr)
      static_cast<float*>(factors.grad_a)[to] = arguments.grad_a[entry];
  }
  copy_row(arguments.grad_out, token, to_token);
  copy_row(arguments.pre_input, token, to_token);
}

__global__ void value_ffn_factors_advance_kernel(TableFactorsHeader* header, int64_t capacity,
                                                 int64_t num_tokens) {
  const bool fits = num_tokens <= capacity - header->num_tokens;
  (fits ? header->num_tokens : header->overflow) += num_tokens;
}

ULTRAMEM_REGISTER_KERNEL(value_ffn_factors, "value_ffn_factors", kThreads,
                         value_ffn_factors_kernel);
ULTRAMEM_REGISTER_KERNEL(value_ffn_factors_advance, "value_ffn_factors_advance", 1,
                         value_ffn_factors_advance_kernel);

RowCopy row_copy(void* to, const void* from, int64_t row_bytes) {
  const auto fits = [&](int64_t word) {
    return row_bytes % word == 0 && reinterpret_cast<uintptr_t>(from) % word == 0;
  };
  const int word_bytes = fits(16) ? 16 : fits(4) ? 4 : 2;
  return {from, to, row_bytes / word_bytes, word_bytes};
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
  ULTRAMEM_RETURN_IF_ERROR(value_ffn_bwd(backward, stream));
  if (params.num_tokens == 0) return {};

  const TableFactors& factors = params.factors;
  const int64_t element = element_size(params.dtype);
  FactorArguments arguments{};
  arguments.grad_a = static_cast<const float*>(backward.grad_a);
  arguments.grad_out = row_copy(factors.grad_outs, params.grad_out,
                                factors.num_groups * factors.value_dim * element);
  arguments.pre_input =
      row_copy(factors.pre_inputs, params.pre_input, factors.pre_value_dim * element);
  value_ffn_factors_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(
      params, factors, arguments);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  value_ffn_factors_advance_kernel<<<1, 1, 0, stream>>>(factors.header, factors.capacity,
                                                        params.num_tokens);
  return launch_status();
}

Status is_capturing(Stream stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaStreamIsCapturing(stream, &status));
  *capturing = status != cudaStreamCaptureStatusNone;
  return {};
}

}  // namespace ultramem::cuda
