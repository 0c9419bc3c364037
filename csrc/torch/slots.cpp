// The halves of value_ffn by themselves, for a table whose shards hold some columns of a row each:
// dot products that are then summed over the shards, and weighted sums of rows. Both are value_ffn
// without pre-values, the dot products its backward.
#include "ops.h"
#include "slot_addressing.h"
#include "table_factors.h"
#include "ultramem/value_ffn.h"

namespace ultramem::torch_binding {
namespace {

// rows [N, W] and their scale, as the values of a value_ffn without pre-values.
void take_rows(const OpContext& context, const Tensor& rows, const OptionalTensor& row_scale,
               int64_t num_cores, ValueFfnParams& params) {
  context.check_shape("rows", rows, "[N, W]", {-1, -1});
  context.check(rows.size(0) >= 1 && rows.size(1) >= 1, "rows must not be empty");
  params.table_dtype = context.dtype("rows", rows);
  params.value_dim = rows.size(1);
  context.check(num_cores >= 1 && num_cores <= kMaxNumCores,
                "the number of cores C must be 1..4, got " + std::to_string(num_cores));
  context.check(params.value_dim % num_cores == 0,
                "the number of cores C must divide W, got C = " + std::to_string(num_cores) +
                    ", W = " + std::to_string(params.value_dim));
  params.num_cores = static_cast<int32_t>(num_cores);
  params.values = rows.const_data_ptr();
  if (row_scale.has_value()) {
    context.check_shape("row_scale", *row_scale, "a scalar", {});
    context.check_dtype("row_scale", *row_scale, ScalarType::Double);
    params.value_scale = static_cast<const double*>(row_scale->const_data_ptr());
  }
}

// Of what a token has; `name` is how its caller knows it.
void take_dtype(const OpContext& context, const char* name, const Tensor& tensor,
                ValueFfnParams& params) {
  params.dtype = context.dtype(name, tensor);
  context.check((params.dtype == DType::kFloat64) == (params.table_dtype == DType::kFloat64),
                std::string("rows and ") + name + " must both be float64 or neither");
}

// What a token has: [T, width], or [T, E, width] where groups are apart.
void check_tokens(const OpContext& context, const char* name, const Tensor& tensor,
                  int64_t num_tokens, int64_t expand, int64_t width, bool sum_groups) {
  if (sum_groups) {
    context.check_shape(name, tensor, "[T, W]", {num_tokens, width});
  } else {
    context.check_shape(name, tensor, "[T, E, W]", {num_tokens, expand, width});
  }
}

// C of weights [T, S, C], whose dtype is still to be checked.
int64_t cores_of(const OpContext& context, const Tensor& weights, const ValueFfnParams& params) {
  context.check_shape("weights", weights, "[T, S, C]",
                      {params.num_tokens, params.num_selected, -1});
  return weights.size(2);
}

// What an arena must be laid out for to take these factors of the entries.
TableFactorsShape appended_shape(const OpContext& context, const ValueFfnParams& entries,
                                 const Tensor& weights, const OptionalTensor& grad_a,
                                 const Tensor& grad_out, const OptionalTensor& pre_input) {
  TableFactorsShape shape;
  shape.num_selected = entries.num_selected;
  const int64_t num_cores = cores_of(context, weights, entries);
  context.check(
      num_cores >= 1 && num_cores <= kMaxNumCores,
      "the number of cores C (weights.shape[2]) must be 1..4, got " + std::to_string(num_cores));
  shape.num_cores = static_cast<int32_t>(num_cores);
  const int64_t num_groups = entries.sum_groups ? 1 : entries.addressing.expand;
  context.check(
      num_groups <= kMaxFactorGroups,
      "expand must be at most 256 with sum_groups=False, got " + std::to_string(num_groups));
  shape.num_groups = static_cast<int32_t>(num_groups);
  // The arena knows the tables' dtype as that of accumulation alone.
  shape.table_dtype = context.dtype("weights", weights);
  context.check_dtype("weights", weights, scalar_type(accumulation_dtype(shape.table_dtype)));
  shape.dtype = context.dtype("grad_out", grad_out);
  context.check((shape.dtype == DType::kFloat64) == (shape.table_dtype == DType::kFloat64),
                "weights and grad_out must both be float64 or neither");
  check_tokens(context, "grad_out", grad_out, entries.num_tokens, num_groups, -1,
               entries.sum_groups);
  shape.value_dim = grad_out.size(grad_out.dim() - 1);
  context.check(shape.value_dim >= 1 && shape.value_dim % num_cores == 0,
                "grad_out must have a width that the number of cores C divides, got C = " +
                    std::to_string(num_cores) + ", " + std::to_string(shape.value_dim));
  context.check(grad_a.has_value() == pre_input.has_value(),
                "grad_a and pre_input go together: give both or neither");
  if (pre_input.has_value()) {
    context.check_shape("grad_a", *grad_a, "[T, S]", {entries.num_tokens, entries.num_selected});
    context.check_dtype("grad_a", *grad_a, weights.scalar_type());
    context.check_shape("pre_input", *pre_input, "[T, Dp]", {entries.num_tokens, -1});
    context.check_dtype("pre_input", *pre_input, grad_out.scalar_type());
    shape.pre_value_dim = pre_input->size(1);
    context.check(shape.pre_value_dim >= 1, "pre_input must have columns");
  }
  return shape;
}

}  // namespace

Tensor slot_dots(Tensor indices, Tensor inputs, Tensor rows, int64_t num_cores,
                 OptionalTensor row_scale, OptionalTensor permutation, int64_t window,
                 int64_t offset, int64_t expand, std::string shuffle, int64_t num_keys,
                 int64_t seed, bool sum_groups, int64_t first_row, int64_t num_slots) {
  const OpContext context("slot_dots", "rows", rows);
  indices = as_contiguous(indices);
  inputs = as_contiguous(inputs);
  rows = as_contiguous(rows);
  permutation = as_contiguous(permutation);
  ValueFfnBwdParams params;
  params.sum_groups = sum_groups;
  take_indices(context, indices, params);
  take_rows(context, rows, row_scale, num_cores, params);
  take_dtype(context, "inputs", inputs, params);
  params.grad_table_dtype = params.table_dtype;
  params.addressing = make_addressing(
      context, {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      rows.size(0));
  check_tokens(context, "inputs", inputs, params.num_tokens, expand, params.value_dim, sum_groups);
  check_indices_in_debug(context, params);
  params.grad_out = inputs.const_data_ptr();
  Tensor dots = context.empty({params.num_tokens, params.num_selected, num_cores},
                              scalar_type(accumulation_dtype(params.table_dtype)));
  params.grad_scores = dots.mutable_data_ptr();
  Tensor workspace = ULTRAMEM_WORKSPACE(context, value_ffn_bwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  check_status(context, ULTRAMEM_CALL(context, value_ffn_bwd, params), params);
  return dots;
}

Tensor slot_sum(Tensor indices, Tensor weights, Tensor rows, ScalarType dtype,
                OptionalTensor row_scale, OptionalTensor permutation, int64_t window,
                int64_t offset, int64_t expand, std::string shuffle, int64_t num_keys, int64_t seed,
                bool sum_groups, int64_t first_row, int64_t num_slots) {
  const OpContext context("slot_sum", "rows", rows);
  indices = as_contiguous(indices);
  weights = as_contiguous(weights);
  rows = as_contiguous(rows);
  permutation = as_contiguous(permutation);
  ValueFfnParams params;
  params.sum_groups = sum_groups;
  take_indices(context, indices, params);
  take_rows(context, rows, row_scale, cores_of(context, weights, params), params);
  context.check_dtype("weights", weights, scalar_type(accumulation_dtype(params.table_dtype)));
  params.addressing = make_addressing(
      context, {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      rows.size(0));
  Tensor out = sum_groups ? context.empty({params.num_tokens, params.value_dim}, dtype)
                          : context.empty({params.num_tokens, expand, params.value_dim}, dtype);
  take_dtype(context, "dtype", out, params);
  check_indices_in_debug(context, params);
  params.scores = weights.const_data_ptr();
  params.out = out.mutable_data_ptr();
  Tensor workspace = ULTRAMEM_WORKSPACE(context, value_ffn_fwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  check_status(context, ULTRAMEM_CALL(context, value_ffn_fwd, params), params);
  return out;
}

void table_factors_append(Tensor indices, Tensor weights, OptionalTensor grad_a, Tensor grad_out,
                          OptionalTensor pre_input, int64_t num_rows, OptionalTensor permutation,
                          int64_t window, int64_t offset, int64_t expand, std::string shuffle,
                          int64_t num_keys, int64_t seed, bool sum_groups, Tensor factors,
                          int64_t first_row, int64_t num_slots) {
  const OpContext context("table_factors_append", "factors", factors);
  indices = as_contiguous(indices);
  weights = as_contiguous(weights);
  grad_a = as_contiguous(grad_a);
  grad_out = as_contiguous(grad_out);
  pre_input = as_contiguous(pre_input);
  permutation = as_contiguous(permutation);
  ValueFfnParams entries;
  entries.sum_groups = sum_groups;
  take_indices(context, indices, entries);
  context.check(num_rows >= 1, "num_rows must be positive, got " + std::to_string(num_rows));
  entries.addressing = make_addressing(
      context, {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      num_rows);

  TableFactorsAppendParams params;
  params.num_tokens = entries.num_tokens;
  params.sum_groups = sum_groups;
  params.indices_are_int64 = entries.indices_are_int64;
  params.addressing = entries.addressing;
  params.indices = entries.indices;
  params.weights = weights.const_data_ptr();
  params.grad_a = data_or_null(grad_a);
  params.grad_out = grad_out.const_data_ptr();
  params.pre_input = data_or_null(pre_input);
  params.factors = table_factors(
      context, factors, appended_shape(context, entries, weights, grad_a, grad_out, pre_input));
  const std::lock_guard<std::mutex> lock(factors_mutex());
  check_status(context, ULTRAMEM_CALL(context, table_factors_append, params), entries);
  note_append(context, params.factors, params.num_tokens);
}

}  // namespace ultramem::torch_binding
