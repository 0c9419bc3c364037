// Backward of the value FFN: the same bits on every run.
//
// By token, the gradients of the scores and of pre_input: value_ffn_bwd_tokens.cu.
// Gradients of the tables: value_ffn_bwd_rows.cu.
#include "common/value_ffn_checks.h"
#include "side_stream.h"
#include "value_ffn_bwd_rows.h"
#include "value_ffn_bwd_tokens.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

// Where things lie in the workspace, in bytes from its beginning; what is not needed is empty.
struct Workspace {
  bool needs_weights, needs_grad_a, needs_rows;
  size_t weights = 0, grad_a, rows, total;

  explicit Workspace(const ValueFfnBwdParams& params) {
    const int64_t num_entries = params.num_tokens * params.num_selected;
    needs_grad_a = params.grad_a == nullptr && params.pre_value_dim > 0 &&
                   (params.grad_pre_input != nullptr || params.grad_pre_values != nullptr);
    needs_rows =
        num_entries > 0 && (params.grad_values != nullptr || params.grad_pre_values != nullptr);
    needs_weights = num_entries > 0 && params.grad_values != nullptr;
    grad_a = needs_weights ? align_up(num_entries * params.num_cores * sizeof(float)) : 0;
    rows = grad_a + (needs_grad_a ? align_up(num_entries * sizeof(float)) : 0);
    total = rows + (needs_rows ? value_ffn_bwd_rows_workspace(params) : 0);
  }
};

// Whether the pass over the tokens takes less than the sort beside it, which is then waited for.
bool is_short_pass(const ValueFfnBwdParams& params) {
  constexpr int64_t kShortBytes = int64_t{300} << 20;  // some 130 us, on an H100
  return params.num_tokens * params.num_selected * (params.value_dim + params.pre_value_dim) *
             static_cast<int64_t>(element_size(params.table_dtype)) <=
         kShortBytes;
}

Status check_bwd_params(const ValueFfnBwdParams& params) {
  ULTRAMEM_RETURN_IF_ERROR(check_params(params, needs_scores(params)));
  ULTRAMEM_RETURN_IF_ERROR(check_scales(params));
  if (params.grad_table_dtype == DType::kFloat64) {
    return Status::invalid_argument("value_ffn_bwd: float64 is offered on the CPU only");
  }
  if (params.num_tokens == 0) return {};
  if (params.grad_out == nullptr) {
    return Status::invalid_argument("value_ffn_bwd: grad_out must not be null");
  }
  if (params.pre_values == nullptr &&
      (params.grad_pre_input != nullptr || params.grad_pre_values != nullptr ||
       params.grad_a != nullptr)) {
    return Status::invalid_argument(
        "value_ffn_bwd: grad_pre_input, grad_pre_values and grad_a need pre_values");
  }
  const Workspace workspace(params);
  constexpr int64_t kMaxWords = int64_t{1} << 32;
  constexpr int64_t kMaxColumns = int64_t{1} << 21;
  const int64_t num_groups = params.sum_groups ? 1 : params.addressing.expand;
  const int64_t columns = (params.grad_values != nullptr ? params.value_dim : 0) +
                          (params.grad_pre_values != nullptr ? params.pre_value_dim : 0);
  if (workspace.needs_rows &&
      (params.num_tokens * params.num_selected >= kMaxWords ||
       params.num_tokens * num_groups >= kMaxWords || columns > kMaxColumns ||
       params.addressing.rows_in_memory() >= UINT32_MAX)) {
    return Status::invalid_argument(
        "value_ffn_bwd: CUDA offers gradients of the tables for fewer than 2^32 retrieved slots "
        "and rows of grad_out, fewer than 2^32-1 rows, and gradient rows of up to 2^21 elements, "
        "both tables' together");
  }
  if (workspace.total > 0 && params.workspace == nullptr) {
    return Status::invalid_argument("value_ffn_bwd: the workspace must not be null");
  }
  return {};
}

}  // namespace

size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params) { return Workspace(params).total; }

Status value_ffn_bwd(const ValueFfnBwdParams& params, Stream stream) {
  return value_ffn_bwd_with(params, TableFactors{}, stream);
}

Status value_ffn_bwd_with(const ValueFfnBwdParams& params, const TableFactors& arena,
                          Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_bwd_params(params));
  if (params.num_tokens == 0) return {};
  const Workspace workspace(params);
  auto* base = static_cast<char*>(params.workspace);
  TokenFactors factors{nullptr, static_cast<float*>(params.grad_a), arena};
  if (workspace.needs_weights) {
    factors.weights = reinterpret_cast<float*>(base + workspace.weights);
  }
  if (workspace.needs_grad_a) factors.grad_a = reinterpret_cast<float*>(base + workspace.grad_a);
  // An empty grad_scores (S = 0) is a null pointer; grad_pre_input is then still to be zeroed.
  const bool needs_tokens = params.grad_scores != nullptr || params.grad_pre_input != nullptr ||
                            factors.weights != nullptr || factors.grad_a != nullptr ||
                            arena.header != nullptr;
  if (!workspace.needs_rows) {
    return needs_tokens ? launch_value_ffn_bwd_tokens(params, factors, false, stream) : Status{};
  }

  // Sorting waits for latency, the pass over the tokens for memory. The keys come before both: once
  // the pass fills the device, every kernel waits for room.
  ULTRAMEM_RETURN_IF_ERROR(value_ffn_bwd_keys(params, base + workspace.rows, stream));
  SideStream side(stream);
  ULTRAMEM_RETURN_IF_ERROR(side.fork());
  Status status = value_ffn_bwd_sort(params, base + workspace.rows, side.get());
  if (status.ok()) {
    status = launch_value_ffn_bwd_tokens(params, factors, is_short_pass(params), stream);
  }
  const Status joined = side.join();
  ULTRAMEM_RETURN_IF_ERROR(status);
  ULTRAMEM_RETURN_IF_ERROR(joined);
  return value_ffn_bwd_rows(params, factors, base + workspace.rows, stream);
}

}  // namespace ultramem::cuda
