#include "ultramem/table_update.h"

#include "ops.h"

namespace ultramem::torch_binding {
namespace {

const uint32_t* words(const Tensor& tensor) {
  return static_cast<const uint32_t*>(tensor.const_data_ptr());
}
uint32_t* mutable_words(Tensor& tensor) {
  return static_cast<uint32_t*>(tensor.mutable_data_ptr());
}

// The results of table_group, as the other operators take them.
struct Grouping {
  const Tensor& keys;        // [n]
  const Tensor& entries;     // [n]
  const Tensor& run_begins;  // [min(n, N) + 1]
  const Tensor& pieces;      // [*, 2]
  const Tensor& counts;      // [2]
};

TableGradient factored_gradient(const OpContext& context, const Grouping& grouping,
                                const Tensor& weights, const OptionalTensor& groups,
                                const Tensor& source, int64_t num_selected, int64_t num_rows,
                                int64_t dim, DType acc_dtype) {
  TableGradient gradient;
  gradient.num_rows = num_rows;
  gradient.dim = dim;
  context.check_shape("keys", grouping.keys, "[n]", {-1});
  const int64_t n = grouping.keys.size(0);
  context.check_shape("entries", grouping.entries, "[n]", {n});
  context.check_shape("run_begins", grouping.run_begins, "[min(n, N) + 1]",
                      {(n < num_rows ? n : num_rows) + 1});
  context.check_shape("pieces", grouping.pieces, "[max_pieces(n), 2]",
                      {table_group_max_pieces(n), 2});
  context.check_shape("counts", grouping.counts, "[2]", {kGroupCounts});
  for (const Tensor* tensor : {&grouping.keys, &grouping.entries, &grouping.run_begins,
                               &grouping.pieces, &grouping.counts}) {
    context.check_dtype("the results of table_group", *tensor, ScalarType::Int);
    context.check(tensor->is_contiguous(), "the results of table_group must be contiguous");
  }
  // Not null, which would be a dense gradient, where there are no entries.
  gradient.keys = words(n > 0 ? grouping.keys : grouping.run_begins);
  gradient.entries = words(grouping.entries);
  gradient.run_begins = words(grouping.run_begins);
  gradient.pieces = words(grouping.pieces);
  gradient.counts = static_cast<const int32_t*>(grouping.counts.const_data_ptr());
  gradient.num_entries = n;

  context.check_shape("weights", weights, "[n, C]", {n, -1});
  context.check_dtype("weights", weights, scalar_type(acc_dtype));
  context.check(weights.size(1) >= 1 && weights.size(1) <= kMaxNumCores,
                "the number of cores C (weights.shape[1]) must be 1..4, got " +
                    std::to_string(weights.size(1)));
  gradient.weights = weights.const_data_ptr();
  gradient.num_cores = static_cast<int32_t>(weights.size(1));
  context.check_shape("source", source, "[tokens, G, dim]", {-1, -1, dim});
  gradient.source = source.const_data_ptr();
  gradient.source_dtype = context.dtype("source", source);
  gradient.num_groups = source.size(1);
  gradient.num_selected = num_selected > 0 ? num_selected : 1;
  context.check(num_selected >= 0 && source.size(0) * num_selected == n,
                "n must be tokens * num_selected, got n = " + std::to_string(n) +
                    ", tokens = " + std::to_string(source.size(0)) +
                    ", num_selected = " + std::to_string(num_selected));
  if (groups.has_value()) {
    context.check_shape("groups", *groups, "[n]", {n});
    context.check_dtype("groups", *groups, ScalarType::Byte);
    gradient.groups = static_cast<const uint8_t*>(groups->const_data_ptr());
  }
  return gradient;
}

TableOptimizer parse_optimizer(const OpContext& context, const std::string& name) {
  if (name == "adam") return TableOptimizer::kAdam;
  if (name == "adagrad") return TableOptimizer::kAdagrad;
  context.check(name == "sgd", "optimizer must be 'adam', 'adagrad' or 'sgd', got '" + name + "'");
  return TableOptimizer::kSgd;
}

// A scalar that stays on the device.
const float* scalar(const OpContext& context, const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return nullptr;
  context.check_shape(name, *tensor, "a scalar", {});
  context.check_dtype(name, *tensor, ScalarType::Float);
  return static_cast<const float*>(tensor->const_data_ptr());
}

// What is updated in place, [N, dim], or nothing.
void* updated(const OpContext& context, const char* name, OptionalTensor& tensor,
              const Tensor& weight, ScalarType dtype) {
  if (!tensor.has_value()) return nullptr;
  context.check_shape(name, *tensor, "like weight", {weight.size(0), weight.size(1)});
  context.check_dtype(name, *tensor, dtype);
  context.check(tensor->is_contiguous(), std::string(name) + " must be contiguous");
  return tensor->mutable_data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> table_group(Tensor slots, int64_t num_rows) {
  const OpContext context("table_group", "slots", slots);
  context.check_shape("slots", slots, "[n]", {-1});
  context.check_dtype("slots", slots, ScalarType::Int);
  slots = as_contiguous(slots);
  const int64_t n = slots.size(0);
  Tensor keys = context.empty({n}, ScalarType::Int);
  Tensor entries = context.empty({n}, ScalarType::Int);
  Tensor run_begins = context.empty({(n < num_rows ? n : num_rows) + 1}, ScalarType::Int);
  Tensor pieces = context.empty({table_group_max_pieces(n), 2}, ScalarType::Int);
  Tensor counts = context.empty({kGroupCounts}, ScalarType::Int);
  TableGroupParams params;
  params.slots = words(slots);
  params.num_entries = n;
  params.num_rows = num_rows;
  params.keys = mutable_words(keys);
  params.entries = mutable_words(entries);
  params.run_begins = mutable_words(run_begins);
  params.pieces = mutable_words(pieces);
  params.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  Tensor workspace = ULTRAMEM_WORKSPACE(context, table_group_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, table_group, params));
  return {keys, entries, run_begins, pieces, counts};
}

Tensor table_grad_sum_sq(Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces,
                         Tensor counts, Tensor weights, OptionalTensor groups, Tensor source,
                         int64_t num_selected, int64_t num_rows) {
  const OpContext context("table_grad_sum_sq", "weights", weights);
  weights = as_contiguous(weights);
  groups = as_contiguous(groups);
  source = as_contiguous(source);
  context.check_shape("source", source, "[tokens, G, dim]", {-1, -1, -1});
  TableGradSumSqParams params;
  params.acc_dtype = context.dtype("weights", weights);
  params.gradient =
      factored_gradient(context, {keys, entries, run_begins, pieces, counts}, weights, groups,
                        source, num_selected, num_rows, source.size(2), params.acc_dtype);
  Tensor sum_sq = context.empty({}, ScalarType::Double);
  params.sum_sq = static_cast<double*>(sum_sq.mutable_data_ptr());
  Tensor workspace = ULTRAMEM_WORKSPACE(context, table_grad_sum_sq_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, table_grad_sum_sq, params));
  return sum_sq;
}

Tensor table_grad_row_sq(Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces,
                         Tensor counts, Tensor weights, OptionalTensor groups, Tensor source,
                         int64_t num_selected, int64_t num_rows) {
  const OpContext context("table_grad_row_sq", "weights", weights);
  weights = as_contiguous(weights);
  groups = as_contiguous(groups);
  source = as_contiguous(source);
  context.check_shape("source", source, "[tokens, G, dim]", {-1, -1, -1});
  TableGradRowSqParams params;
  params.acc_dtype = context.dtype("weights", weights);
  params.gradient =
      factored_gradient(context, {keys, entries, run_begins, pieces, counts}, weights, groups,
                        source, num_selected, num_rows, source.size(2), params.acc_dtype);
  Tensor row_sq = context.empty({max_runs(params.gradient)}, weights.scalar_type());
  params.row_sq = row_sq.mutable_data_ptr();
  Tensor workspace = ULTRAMEM_WORKSPACE(context, table_grad_row_sq_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, table_grad_row_sq, params));
  return row_sq;
}

void table_update(std::string optimizer, Tensor weight, OptionalTensor master,
                  OptionalTensor exp_avg, OptionalTensor exp_avg_sq, OptionalTensor row_sum,
                  Tensor step, OptionalTensor scale, OptionalTensor grad, OptionalTensor keys,
                  OptionalTensor entries, OptionalTensor run_begins, OptionalTensor pieces,
                  OptionalTensor counts, OptionalTensor weights, OptionalTensor groups,
                  OptionalTensor source, int64_t num_selected, OptionalTensor lr_factor,
                  OptionalTensor grad_scale, OptionalTensor loss_scale, OptionalTensor found_inf,
                  double lr, double beta1, double beta2, double eps, double weight_decay,
                  bool stochastic_rounding, int64_t seed, int64_t stream, int64_t first_row,
                  int64_t first_column, OptionalTensor row_sq, int64_t row_columns) {
  const OpContext context("table_update", "weight", weight);
  TableUpdateParams params;
  params.optimizer = parse_optimizer(context, optimizer);
  params.table_dtype = context.dtype("weight", weight);
  const DType acc_dtype = accumulation_dtype(params.table_dtype);
  context.check_shape("weight", weight, "[N, dim]", {-1, -1});
  context.check(weight.is_contiguous(), "weight must be contiguous");
  const int64_t num_rows = weight.size(0), dim = weight.size(1);
  if (num_rows == 0 || dim == 0) return;

  if (grad.has_value()) {
    context.check_shape("grad", *grad, "like weight", {num_rows, dim});
    grad = as_contiguous(grad);
    params.gradient.num_rows = num_rows;
    params.gradient.dim = dim;
    params.gradient.source = grad->const_data_ptr();
    params.gradient.source_dtype = context.dtype("grad", *grad);
  } else {
    context.check(keys.has_value() && entries.has_value() && run_begins.has_value() &&
                      pieces.has_value() && counts.has_value() && weights.has_value() &&
                      source.has_value(),
                  "without grad, the results of table_group, weights and source must be given");
    weights = as_contiguous(weights);
    groups = as_contiguous(groups);
    source = as_contiguous(source);
    params.gradient =
        factored_gradient(context, {*keys, *entries, *run_begins, *pieces, *counts}, *weights,
                          groups, *source, num_selected, num_rows, dim, acc_dtype);
  }

  params.weight = weight.mutable_data_ptr();
  params.master =
      static_cast<float*>(updated(context, "master", master, weight, ScalarType::Float));
  if (params.optimizer == TableOptimizer::kAdam) {
    context.check(exp_avg.has_value() && exp_avg_sq.has_value(),
                  "adam needs exp_avg and exp_avg_sq");
    params.state_dtype = context.dtype("exp_avg", *exp_avg);
    const ScalarType dtype = exp_avg->scalar_type();
    params.exp_avg = updated(context, "exp_avg", exp_avg, weight, dtype);
    params.exp_avg_sq = updated(context, "exp_avg_sq", exp_avg_sq, weight, dtype);
  } else if (params.optimizer == TableOptimizer::kAdagrad) {
    context.check(row_sum.has_value(), "adagrad needs row_sum");
    context.check_shape("row_sum", *row_sum, "[N]", {num_rows});
    context.check_dtype("row_sum", *row_sum, scalar_type(acc_dtype));
    context.check(row_sum->is_contiguous(), "row_sum must be contiguous");
    params.row_sum = row_sum->mutable_data_ptr();
  }
  if (row_sq.has_value()) {
    row_sq = as_contiguous(row_sq);
    context.check_shape("row_sq", *row_sq, grad.has_value() ? "[N]" : "[min(n, N)]",
                        {max_runs(params.gradient)});
    context.check_dtype("row_sq", *row_sq, scalar_type(acc_dtype));
    params.row_sq = row_sq->const_data_ptr();
  }
  params.row_columns = row_columns;
  params.first_row = first_row;
  params.first_column = first_column;
  params.step = const_cast<float*>(scalar(context, "step", step));
  if (scale.has_value()) {
    context.check_shape("scale", *scale, "a scalar", {});
    context.check_dtype("scale", *scale, ScalarType::Double);
    params.scale = static_cast<double*>(scale->mutable_data_ptr());
  }
  params.lr = scalar(context, "lr_factor", lr_factor);
  params.grad_scale = scalar(context, "grad_scale", grad_scale);
  params.loss_scale = scalar(context, "loss_scale", loss_scale);
  params.found_inf = scalar(context, "found_inf", found_inf);
  params.learning_rate = lr;
  params.beta1 = beta1;
  params.beta2 = beta2;
  params.eps = eps;
  params.eps_before_correction = !grad.has_value();
  params.weight_decay = weight_decay;
  params.stochastic_rounding = stochastic_rounding;
  params.seed = static_cast<uint64_t>(seed);
  params.stream = static_cast<uint32_t>(stream);
  Tensor workspace = ULTRAMEM_WORKSPACE(context, table_update_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, table_update, params));
}

}  // namespace ultramem::torch_binding
