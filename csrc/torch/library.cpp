// Schemas and registrations. The fake implementations and autograd formulas stand beside the
// public wrappers in ultramem_cuda/ops/.
#include "ops.h"

STABLE_TORCH_LIBRARY(ultramem, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "tucker_query(Tensor x, Tensor weight, Tensor norm_weight, int num_heads, float eps)"
      " -> (Tensor query, Tensor projection)");
  m.def(
      "tucker_query_bwd(Tensor grad_query, Tensor x, Tensor weight, Tensor norm_weight,"
      " Tensor projection, float eps, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tucker_filter(Tensor core)"
      " -> (Tensor u, Tensor t, Tensor sigma, Tensor left, Tensor right)");
  m.def(
      "product_key_topk(Tensor query, Tensor keys, Tensor? core, Tensor? u, Tensor? t, int topk,"
      " int axis_topk, str mode) -> (Tensor scores, Tensor indices, Tensor axis_indices,"
      " Tensor axis_scores, Tensor grid_positions)");
  m.def(
      "product_key_topk_bwd(Tensor grad_scores, Tensor query, Tensor keys, Tensor? core,"
      " Tensor axis_indices, Tensor axis_scores, Tensor grid_positions, str mode, bool need_query,"
      " bool need_keys, bool need_core) -> (Tensor, Tensor, Tensor)");
  m.def(
      "value_ffn(Tensor indices, Tensor scores, Tensor values, Tensor? pre_values,"
      " Tensor? pre_input, Tensor? permutation, Tensor? table_scale, Tensor? values_main_grad,"
      " Tensor? pre_values_main_grad, Tensor? factors, str activation, int window, int offset,"
      " int expand, str shuffle, int num_keys, int seed, bool sum_groups,"
      " int first_row=0, int num_slots=0) -> (Tensor out, Tensor pre_activation)");
  m.def(
      "value_ffn_bwd(Tensor grad_out, Tensor indices, Tensor scores, Tensor values,"
      " Tensor? pre_values, Tensor? pre_input, Tensor pre_activation, Tensor? permutation,"
      " Tensor? table_scale, str activation, int window, int offset, int expand, str shuffle, int "
      "num_keys, int seed,"
      " bool sum_groups, bool need_values, bool need_pre_values, int first_row=0, int num_slots=0)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "value_ffn_bwd_main_grad(Tensor grad_out, Tensor indices, Tensor scores, Tensor values,"
      " Tensor? pre_values, Tensor? pre_input, Tensor pre_activation, Tensor? permutation,"
      " str activation, int window, int offset, int expand, str shuffle, int num_keys, int seed,"
      " bool sum_groups, Tensor(a!)? values_main_grad, Tensor(b!)? pre_values_main_grad,"
      " int first_row=0, int num_slots=0) -> (Tensor, Tensor)");
  m.def(
      "value_ffn_bwd_deferred(Tensor grad_out, Tensor indices, Tensor scores, Tensor values,"
      " Tensor? pre_values, Tensor? pre_input, Tensor pre_activation, Tensor? permutation,"
      " Tensor? table_scale, str activation, int window, int offset, int expand, str shuffle, int "
      "num_keys, int seed,"
      " bool sum_groups, Tensor(a!) factors, int first_row=0, int num_slots=0)"
      " -> (Tensor, Tensor)");
  m.def(
      "slot_dots(Tensor indices, Tensor inputs, Tensor rows, int num_cores, Tensor? row_scale,"
      " Tensor? permutation, int window, int offset, int expand, str shuffle, int num_keys,"
      " int seed, bool sum_groups, int first_row=0, int num_slots=0) -> Tensor");
  m.def(
      "slot_sum(Tensor indices, Tensor weights, Tensor rows, ScalarType dtype, Tensor? row_scale,"
      " Tensor? permutation, int window, int offset, int expand, str shuffle, int num_keys,"
      " int seed, bool sum_groups, int first_row=0, int num_slots=0) -> Tensor");
  m.def(
      "table_factors_append(Tensor indices, Tensor weights, Tensor? grad_a, Tensor grad_out,"
      " Tensor? pre_input, int num_rows, Tensor? permutation, int window, int offset, int expand,"
      " str shuffle, int num_keys, int seed, bool sum_groups, Tensor(a!) factors,"
      " int first_row=0, int num_slots=0) -> ()");
  m.def(
      "value_slots(Tensor indices, Tensor placement, Tensor? permutation, int num_slots, int "
      "window,"
      " int expand, str shuffle, int num_keys, bool with_groups) -> Tensor");
  m.def(
      "table_group(Tensor slots, int num_rows)"
      " -> (Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces, Tensor counts)");
  m.def(
      "table_grad_sum_sq(Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces,"
      " Tensor counts, Tensor weights, Tensor? groups, Tensor source, int num_selected,"
      " int num_rows) -> Tensor");
  m.def(
      "table_grad_row_sq(Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces,"
      " Tensor counts, Tensor weights, Tensor? groups, Tensor source, int num_selected,"
      " int num_rows) -> Tensor");
  m.def(
      "table_update(str optimizer, Tensor(a!) weight, Tensor(b!)? master, Tensor(c!)? exp_avg,"
      " Tensor(d!)? exp_avg_sq, Tensor(e!)? row_sum, Tensor(f!) step, Tensor(g!)? scale, Tensor? "
      "grad, Tensor? keys,"
      " Tensor? entries, Tensor? run_begins, Tensor? pieces, Tensor? counts, Tensor? weights,"
      " Tensor? groups, Tensor? source, int num_selected, Tensor? lr_factor, Tensor? grad_scale,"
      " Tensor? loss_scale, Tensor? found_inf, float lr, float beta1, float beta2, float eps,"
      " float weight_decay, bool stochastic_rounding, int seed, int stream,"
      " int first_row=0, int first_column=0, Tensor? row_sq=None, int row_columns=0) -> ()");
}

namespace ultramem::torch_binding {
namespace {

// One function an operator serves every backend; the device of its arguments decides.
void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
  m.impl("tucker_query", TORCH_BOX(&tucker_query));
  m.impl("tucker_query_bwd", TORCH_BOX(&tucker_query_bwd));
  m.impl("tucker_filter", TORCH_BOX(&tucker_filter));
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk));
  m.impl("product_key_topk_bwd", TORCH_BOX(&product_key_topk_bwd));
  m.impl("value_ffn", TORCH_BOX(&value_ffn));
  m.impl("value_ffn_bwd", TORCH_BOX(&value_ffn_bwd));
  m.impl("value_ffn_bwd_main_grad", TORCH_BOX(&value_ffn_bwd_main_grad));
  m.impl("value_ffn_bwd_deferred", TORCH_BOX(&value_ffn_bwd_deferred));
  m.impl("slot_dots", TORCH_BOX(&slot_dots));
  m.impl("slot_sum", TORCH_BOX(&slot_sum));
  m.impl("table_factors_append", TORCH_BOX(&table_factors_append));
  m.impl("value_slots", TORCH_BOX(&value_slots));
  m.impl("table_group", TORCH_BOX(&table_group));
  m.impl("table_grad_sum_sq", TORCH_BOX(&table_grad_sum_sq));
  m.impl("table_grad_row_sq", TORCH_BOX(&table_grad_row_sq));
  m.impl("table_update", TORCH_BOX(&table_update));
}

}  // namespace
}  // namespace ultramem::torch_binding

STABLE_TORCH_LIBRARY_IMPL(ultramem, CPU, m) { ultramem::torch_binding::register_all(m); }

#if defined(ULTRAMEM_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(ultramem, CUDA, m) { ultramem::torch_binding::register_all(m); }
#endif
