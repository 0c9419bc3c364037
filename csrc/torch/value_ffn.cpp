#include "ultramem/value_ffn.h"

#include "ops.h"
#include "slot_addressing.h"
#include "table_factors.h"
#include "ultramem/value_slots.h"

namespace ultramem::torch_binding {
namespace {

Activation parse_activation(const OpContext& context, const std::string& name) {
  if (name == "identity") return Activation::kIdentity;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  context.check(name == "silu",
                "activation must be 'identity', 'gelu', 'relu' or 'silu', got '" + name + "'");
  return Activation::kSilu;
}

// Shapes and dtypes of what the forward and the backward both take. Tensors must be contiguous.
ValueFfnParams make_params(const OpContext& context, const Tensor& indices, const Tensor& scores,
                           const Tensor& values, const OptionalTensor& pre_values,
                           const OptionalTensor& pre_input, const OptionalTensor& table_scale,
                           const std::string& activation, const AddressingArguments& addressing,
                           bool sum_groups) {
  ValueFfnParams params;
  params.activation = parse_activation(context, activation);
  params.sum_groups = sum_groups;
  params.table_dtype = context.dtype("values", values);
  context.check_shape("values", values, "[N, Dv]", {-1, -1});
  take_indices(context, indices, params);
  params.value_dim = values.size(1);
  const int64_t num_rows = values.size(0);
  context.check(num_rows >= 1 && params.value_dim >= 1, "values must not be empty");

  context.check(pre_values.has_value() == pre_input.has_value(),
                "pre_values and pre_input go together: give both or neither");
  params.dtype = params.table_dtype;
  if (pre_values.has_value()) {
    context.check_shape("pre_values", *pre_values, "[N, Dp]", {num_rows, -1});
    context.check_dtype("pre_values", *pre_values, values.scalar_type());
    params.pre_value_dim = pre_values->size(1);
    context.check(params.pre_value_dim >= 1, "pre_values must not be empty");
    params.dtype = context.dtype("pre_input", *pre_input);
    context.check_shape("pre_input", *pre_input, "[T, Dp]",
                        {params.num_tokens, params.pre_value_dim});
    context.check((params.dtype == DType::kFloat64) == (params.table_dtype == DType::kFloat64),
                  "values and pre_input must both be float64 or neither");
  } else {
    context.check(params.activation == Activation::kIdentity,
                  "activation needs pre_values; without them it must be 'identity'");
  }

  context.check_shape("scores", scores, "[T, S, C]", {params.num_tokens, params.num_selected, -1});
  context.check_dtype("scores", scores, scalar_type(accumulation_dtype(params.table_dtype)));
  const int64_t num_cores = scores.size(2);
  context.check(
      num_cores >= 1 && num_cores <= kMaxNumCores,
      "the number of cores C (scores.shape[2]) must be 1..4, got " + std::to_string(num_cores));
  context.check(params.value_dim % num_cores == 0,
                "the number of cores C must divide Dv, got C = " + std::to_string(num_cores) +
                    ", Dv = " + std::to_string(params.value_dim));
  params.num_cores = static_cast<int32_t>(num_cores);
  params.addressing = make_addressing(context, addressing, num_rows);
  if (table_scale.has_value()) {
    context.check_shape("table_scale", *table_scale, "[2]", {2});
    context.check_dtype("table_scale", *table_scale, ScalarType::Double);
    params.value_scale = static_cast<const double*>(table_scale->const_data_ptr());
    params.pre_value_scale = params.value_scale + 1;
  }

  params.scores = scores.const_data_ptr();
  params.values = values.const_data_ptr();
  params.pre_values = data_or_null(pre_values);
  params.pre_input = data_or_null(pre_input);
  return params;
}

// The inputs of a backward, made contiguous, and the gradients that all kinds return. Params is
// ValueFfnBwdParams or extends it.
template <typename Params = ValueFfnBwdParams>
struct Backward {
  Tensor grad_out, indices, scores, values, pre_activation;
  OptionalTensor pre_values, pre_input, permutation, table_scale;
  Params params;
  Tensor grad_scores, grad_pre_input;

  Backward(const OpContext& context, const Tensor& grad_out_, const Tensor& indices_,
           const Tensor& scores_, const Tensor& values_, const OptionalTensor& pre_values_,
           const OptionalTensor& pre_input_, const Tensor& pre_activation_,
           const OptionalTensor& permutation_, const OptionalTensor& table_scale_,
           const std::string& activation, const AddressingArguments& addressing, bool sum_groups)
      : grad_out(as_contiguous(grad_out_)),
        indices(as_contiguous(indices_)),
        scores(as_contiguous(scores_)),
        values(as_contiguous(values_)),
        pre_activation(as_contiguous(pre_activation_)),
        pre_values(as_contiguous(pre_values_)),
        pre_input(as_contiguous(pre_input_)),
        permutation(as_contiguous(permutation_)),
        table_scale(as_contiguous(table_scale_)) {
    static_cast<ValueFfnParams&>(params) = make_params(
        context, indices, scores, values, pre_values, pre_input, table_scale, activation,
        {permutation, addressing.window, addressing.offset, addressing.expand, addressing.shuffle,
         addressing.num_keys, addressing.seed, addressing.first_row, addressing.num_slots},
        sum_groups);
    if (pre_input.has_value()) {
      context.check_dtype("grad_out", grad_out, scalar_type(params.dtype));
    } else {
      params.dtype = context.dtype("grad_out", grad_out);
      context.check((params.dtype == DType::kFloat64) == (params.table_dtype == DType::kFloat64),
                    "values and grad_out must both be float64 or neither");
    }
    const int64_t groups = sum_groups ? 1 : params.addressing.expand;
    context.check(grad_out.numel() == params.num_tokens * groups * params.value_dim,
                  "grad_out must have the shape of out");
    params.grad_out = grad_out.const_data_ptr();
    grad_scores = torch::stable::empty_like(scores);
    params.grad_scores = grad_scores.mutable_data_ptr();
    if (pre_input.has_value()) {
      context.check_shape("pre_activation", pre_activation, "[T, S]",
                          {params.num_tokens, params.num_selected});
      context.check_dtype("pre_activation", pre_activation, scores.scalar_type());
      params.pre_activation = const_cast<void*>(pre_activation.const_data_ptr());
      grad_pre_input = torch::stable::empty_like(*pre_input);
      params.grad_pre_input = grad_pre_input.mutable_data_ptr();
    } else {
      grad_pre_input = context.empty({0}, values.scalar_type());
    }
  }
};

void run(const OpContext& context, ValueFfnBwdParams& params) {
  Tensor workspace = ULTRAMEM_WORKSPACE(context, value_ffn_bwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, value_ffn_bwd, params));
}

}  // namespace

std::tuple<Tensor, Tensor> value_ffn(Tensor indices, Tensor scores, Tensor values,
                                     OptionalTensor pre_values, OptionalTensor pre_input,
                                     OptionalTensor permutation, OptionalTensor table_scale,
                                     OptionalTensor values_main_grad,
                                     OptionalTensor pre_values_main_grad,
                                     OptionalTensor /*factors*/, std::string activation,
                                     int64_t window, int64_t offset, int64_t expand,
                                     std::string shuffle, int64_t num_keys, int64_t seed,
                                     bool sum_groups, int64_t first_row, int64_t num_slots) {
  const OpContext context("value_ffn", "values", values);
  context.check(!table_scale.has_value() ||
                    (!values_main_grad.has_value() && !pre_values_main_grad.has_value()),
                "table_scale and a main_grad of the tables exclude each other");
  indices = as_contiguous(indices);
  scores = as_contiguous(scores);
  values = as_contiguous(values);
  pre_values = as_contiguous(pre_values);
  pre_input = as_contiguous(pre_input);
  permutation = as_contiguous(permutation);
  table_scale = as_contiguous(table_scale);
  ValueFfnParams params = make_params(
      context, indices, scores, values, pre_values, pre_input, table_scale, activation,
      {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      sum_groups);
  check_indices_in_debug(context, params);
  const int64_t T = params.num_tokens;
  const ScalarType dtype = scalar_type(params.dtype);
  Tensor out = sum_groups ? context.empty({T, params.value_dim}, dtype)
                          : context.empty({T, expand, params.value_dim}, dtype);
  Tensor pre_activation = pre_values.has_value()
                              ? context.empty({T, params.num_selected}, scores.scalar_type())
                              : context.empty({0}, scores.scalar_type());
  params.out = out.mutable_data_ptr();
  params.pre_activation = pre_values.has_value() ? pre_activation.mutable_data_ptr() : nullptr;
  Tensor workspace = ULTRAMEM_WORKSPACE(context, value_ffn_fwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  check_status(context, ULTRAMEM_CALL(context, value_ffn_fwd, params), params);
  return {out, pre_activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> value_ffn_bwd(
    Tensor grad_out, Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, Tensor pre_activation, OptionalTensor permutation,
    OptionalTensor table_scale, std::string activation, int64_t window, int64_t offset,
    int64_t expand, std::string shuffle, int64_t num_keys, int64_t seed, bool sum_groups,
    bool need_values, bool need_pre_values, int64_t first_row, int64_t num_slots) {
  const OpContext context("value_ffn_bwd", "values", values);
  Backward<> backward(
      context, grad_out, indices, scores, values, pre_values, pre_input, pre_activation,
      permutation, table_scale, activation,
      {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      sum_groups);
  const ScalarType dtype = values.scalar_type();
  backward.params.grad_table_dtype = backward.params.table_dtype;
  Tensor grad_values = need_values ? context.zeros({values.size(0), values.size(1)}, dtype)
                                   : context.empty({0}, dtype);
  if (need_values) backward.params.grad_values = grad_values.mutable_data_ptr();
  const bool has_pre = need_pre_values && pre_values.has_value();
  Tensor grad_pre_values = has_pre
                               ? context.zeros({pre_values->size(0), pre_values->size(1)}, dtype)
                               : context.empty({0}, dtype);
  if (has_pre) backward.params.grad_pre_values = grad_pre_values.mutable_data_ptr();
  run(context, backward.params);
  return {backward.grad_scores, backward.grad_pre_input, grad_values, grad_pre_values};
}

std::tuple<Tensor, Tensor> value_ffn_bwd_main_grad(
    Tensor grad_out, Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, Tensor pre_activation, OptionalTensor permutation,
    std::string activation, int64_t window, int64_t offset, int64_t expand, std::string shuffle,
    int64_t num_keys, int64_t seed, bool sum_groups, OptionalTensor values_main_grad,
    OptionalTensor pre_values_main_grad, int64_t first_row, int64_t num_slots) {
  const OpContext context("value_ffn_bwd_main_grad", "values", values);
  Backward<> backward(
      context, grad_out, indices, scores, values, pre_values, pre_input, pre_activation,
      permutation, std::nullopt, activation,
      {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      sum_groups);
  const ScalarType acc = scalar_type(accumulation_dtype(backward.params.table_dtype));
  backward.params.grad_table_dtype = accumulation_dtype(backward.params.table_dtype);
  backward.params.accumulate = true;
  if (values_main_grad.has_value()) {
    context.check_shape("values.main_grad", *values_main_grad, "[N, Dv]",
                        {values.size(0), values.size(1)});
    context.check_dtype("values.main_grad", *values_main_grad, acc);
    context.check(values_main_grad->is_contiguous(), "values.main_grad must be contiguous");
    backward.params.grad_values = values_main_grad->mutable_data_ptr();
  }
  if (pre_values_main_grad.has_value()) {
    context.check(pre_values.has_value(), "pre_values_main_grad needs pre_values");
    context.check_shape("pre_values.main_grad", *pre_values_main_grad, "[N, Dp]",
                        {pre_values->size(0), pre_values->size(1)});
    context.check_dtype("pre_values.main_grad", *pre_values_main_grad, acc);
    context.check(pre_values_main_grad->is_contiguous(), "pre_values.main_grad must be contiguous");
    backward.params.grad_pre_values = pre_values_main_grad->mutable_data_ptr();
  }
  run(context, backward.params);
  return {backward.grad_scores, backward.grad_pre_input};
}

std::tuple<Tensor, Tensor> value_ffn_bwd_deferred(
    Tensor grad_out, Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, Tensor pre_activation, OptionalTensor permutation,
    OptionalTensor table_scale, std::string activation, int64_t window, int64_t offset,
    int64_t expand, std::string shuffle, int64_t num_keys, int64_t seed, bool sum_groups,
    Tensor factors, int64_t first_row, int64_t num_slots) {
  const OpContext context("value_ffn_bwd_deferred", "values", values);
  Backward<ValueFfnBwdDeferredParams> backward(
      context, grad_out, indices, scores, values, pre_values, pre_input, pre_activation,
      permutation, table_scale, activation,
      {permutation, window, offset, expand, shuffle, num_keys, seed, first_row, num_slots},
      sum_groups);
  ValueFfnBwdDeferredParams& params = backward.params;
  TableFactorsShape shape;
  shape.num_selected = params.num_selected;
  shape.value_dim = params.value_dim;
  shape.pre_value_dim = params.pre_value_dim;
  shape.num_cores = params.num_cores;
  const int64_t num_groups = sum_groups ? 1 : params.addressing.expand;
  context.check(
      num_groups <= kMaxFactorGroups,
      "expand must be at most 256 with sum_groups=False, got " + std::to_string(num_groups));
  shape.num_groups = static_cast<int32_t>(num_groups);
  shape.table_dtype = params.table_dtype;
  shape.dtype = params.dtype;
  params.factors = table_factors(context, factors, shape);
  Tensor workspace = ULTRAMEM_WORKSPACE(context, value_ffn_bwd_deferred_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  const std::lock_guard<std::mutex> lock(factors_mutex());
  context.check(ULTRAMEM_CALL(context, value_ffn_bwd_deferred, params));
  note_append(context, params.factors, params.num_tokens);
  return {backward.grad_scores, backward.grad_pre_input};
}

Tensor value_slots(Tensor indices, Tensor placement, OptionalTensor permutation, int64_t num_slots,
                   int64_t window, int64_t expand, std::string shuffle, int64_t num_keys,
                   bool with_groups) {
  const OpContext context("value_slots", "indices", indices);
  indices = as_contiguous(indices);
  placement = as_contiguous(placement);
  permutation = as_contiguous(permutation);
  const ScalarType index_type = indices.scalar_type();
  context.check(index_type == ScalarType::Long || index_type == ScalarType::Int,
                "indices must be int64 or int32");
  context.check_shape("placement", placement, "[2]", {2});
  context.check_dtype("placement", placement, ScalarType::Long);
  context.check(window >= 1, "window must be positive, got " + std::to_string(window));
  ValueSlotsParams params;
  params.addressing = make_addressing(
      context, {permutation, window, 0, expand, shuffle, num_keys, 0, 0, 0}, num_slots);
  params.placement = static_cast<const int64_t*>(placement.const_data_ptr());
  params.indices = indices.const_data_ptr();
  params.indices_are_int64 = index_type == ScalarType::Long;
  params.count = indices.numel();
  params.with_groups = with_groups;
  Tensor slots = torch::stable::new_empty(indices, indices.sizes(), ScalarType::Long);
  params.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  context.check(ULTRAMEM_CALL(context, value_slots, params));
  return slots;
}

}  // namespace ultramem::torch_binding
