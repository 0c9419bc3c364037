// The operators as torch sees them. Shapes: the headers in csrc/include/ultramem.
#pragma once

#include <string>
#include <tuple>

#include "common.h"

namespace ultramem::torch_binding {

Tensor rms_norm(Tensor x, Tensor weight, double eps);
std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, double eps);

std::tuple<Tensor, Tensor> tucker_query(Tensor x, Tensor weight, Tensor norm_weight,
                                        int64_t num_heads, double eps);
std::tuple<Tensor, Tensor, Tensor> tucker_query_bwd(Tensor grad_query, Tensor x, Tensor weight,
                                                    Tensor norm_weight, Tensor projection,
                                                    double eps, bool need_x, bool need_weight);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tucker_filter(Tensor core);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> product_key_topk(
    Tensor query, Tensor keys, OptionalTensor core, OptionalTensor u, OptionalTensor t,
    int64_t topk, int64_t axis_topk, std::string mode);
std::tuple<Tensor, Tensor, Tensor> product_key_topk_bwd(Tensor grad_scores, Tensor query,
                                                        Tensor keys, OptionalTensor core,
                                                        Tensor axis_indices, Tensor axis_scores,
                                                        Tensor grid_positions, std::string mode,
                                                        bool need_query, bool need_keys,
                                                        bool need_core);

std::tuple<Tensor, Tensor> value_ffn(
    Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, OptionalTensor permutation, OptionalTensor table_scale,
    OptionalTensor values_main_grad, OptionalTensor pre_values_main_grad, OptionalTensor factors,
    std::string activation, int64_t window, int64_t offset, int64_t expand, std::string shuffle,
    int64_t num_keys, int64_t seed, bool sum_groups, int64_t first_row, int64_t num_slots);
std::tuple<Tensor, Tensor, Tensor, Tensor> value_ffn_bwd(
    Tensor grad_out, Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, Tensor pre_activation, OptionalTensor permutation,
    OptionalTensor table_scale, std::string activation, int64_t window, int64_t offset,
    int64_t expand, std::string shuffle, int64_t num_keys, int64_t seed, bool sum_groups,
    bool need_values, bool need_pre_values, int64_t first_row, int64_t num_slots);
std::tuple<Tensor, Tensor> value_ffn_bwd_main_grad(
    Tensor grad_out, Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, Tensor pre_activation, OptionalTensor permutation,
    std::string activation, int64_t window, int64_t offset, int64_t expand, std::string shuffle,
    int64_t num_keys, int64_t seed, bool sum_groups, OptionalTensor values_main_grad,
    OptionalTensor pre_values_main_grad, int64_t first_row, int64_t num_slots);
std::tuple<Tensor, Tensor> value_ffn_bwd_deferred(
    Tensor grad_out, Tensor indices, Tensor scores, Tensor values, OptionalTensor pre_values,
    OptionalTensor pre_input, Tensor pre_activation, OptionalTensor permutation,
    OptionalTensor table_scale, std::string activation, int64_t window, int64_t offset,
    int64_t expand, std::string shuffle, int64_t num_keys, int64_t seed, bool sum_groups,
    Tensor factors, int64_t first_row, int64_t num_slots);

Tensor slot_dots(Tensor indices, Tensor inputs, Tensor rows, int64_t num_cores,
                 OptionalTensor row_scale, OptionalTensor permutation, int64_t window,
                 int64_t offset, int64_t expand, std::string shuffle, int64_t num_keys,
                 int64_t seed, bool sum_groups, int64_t first_row, int64_t num_slots);
Tensor slot_sum(Tensor indices, Tensor weights, Tensor rows, ScalarType dtype,
                OptionalTensor row_scale, OptionalTensor permutation, int64_t window,
                int64_t offset, int64_t expand, std::string shuffle, int64_t num_keys, int64_t seed,
                bool sum_groups, int64_t first_row, int64_t num_slots);
void table_factors_append(Tensor indices, Tensor weights, OptionalTensor grad_a, Tensor grad_out,
                          OptionalTensor pre_input, int64_t num_rows, OptionalTensor permutation,
                          int64_t window, int64_t offset, int64_t expand, std::string shuffle,
                          int64_t num_keys, int64_t seed, bool sum_groups, Tensor factors,
                          int64_t first_row, int64_t num_slots);

Tensor value_slots(Tensor indices, Tensor placement, OptionalTensor permutation, int64_t num_slots,
                   int64_t window, int64_t expand, std::string shuffle, int64_t num_keys,
                   bool with_groups);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> table_group(Tensor slots, int64_t num_rows);
Tensor table_grad_sum_sq(Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces,
                         Tensor counts, Tensor weights, OptionalTensor groups, Tensor source,
                         int64_t num_selected, int64_t num_rows);
Tensor table_grad_row_sq(Tensor keys, Tensor entries, Tensor run_begins, Tensor pieces,
                         Tensor counts, Tensor weights, OptionalTensor groups, Tensor source,
                         int64_t num_selected, int64_t num_rows);
void table_update(std::string optimizer, Tensor weight, OptionalTensor master,
                  OptionalTensor exp_avg, OptionalTensor exp_avg_sq, OptionalTensor row_sum,
                  Tensor step, OptionalTensor scale, OptionalTensor grad, OptionalTensor keys,
                  OptionalTensor entries, OptionalTensor run_begins, OptionalTensor pieces,
                  OptionalTensor counts, OptionalTensor weights, OptionalTensor groups,
                  OptionalTensor source, int64_t num_selected, OptionalTensor lr_factor,
                  OptionalTensor grad_scale, OptionalTensor loss_scale, OptionalTensor found_inf,
                  double lr, double beta1, double beta2, double eps, double weight_decay,
                  bool stochastic_rounding, int64_t seed, int64_t stream, int64_t first_row,
                  int64_t first_column, OptionalTensor row_sq, int64_t row_columns);

}  // namespace ultramem::torch_binding
