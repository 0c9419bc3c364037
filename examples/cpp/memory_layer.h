// One memory layer (UltraMemV2, arXiv 2508.18756, section 3) and its table, on the operators of
// ultramem:
//
//   query     = RMSNorm(x query_weight^T)                       of each segment of Kd
//   scores, v = product_key_topk(query, RMSNorm(keys), cores)
//   out       = value_ffn(v, scores, values, pre_values, x pre_weight^T)
//   y         = out value_weight^T
#pragma once

#include <ultramem/ultramem.h>

#include <cstdint>

#include "device.h"

struct LayerShape {
  int64_t num_tokens, d_model, num_keys, key_dim, num_slots, value_dim,
      pre_value_dim;                                             // T D n Kd N Dv Dp
  int32_t num_heads, num_queries, tucker_rank, num_cores, topk;  // H Q R C M
  ultramem::DType dtype;  // of everything: float32, or float64 on the CPU
  ultramem::Activation activation;
  ultramem::AddressingParams addressing;

  int32_t axis_topk() const;                                                            // m
  int64_t num_selected() const { return int64_t{num_heads} * topk; }                    // S
  int64_t query_dim() const { return int64_t{2} * num_heads * num_queries * key_dim; }  // P
};

// Parameters, or their gradients.
struct LayerParameters {
  Buffer query_weight;  // [P, D], rows ordered side, head, query, Kd
  Buffer query_norm;    // [Kd]
  Buffer keys;          // [H, 2, R, n, Kd]
  Buffer key_norm;      // [Kd]
  Buffer cores;         // [C, H, R, R]
  Buffer pre_weight;    // [Dp, D]
  Buffer value_weight;  // [D, Dv]
  Buffer values;        // [N, Dv], the table
  Buffer pre_values;    // [N, Dp], the table
};

class MemoryLayer {
 public:
  // Takes all memory that it will need, but for workspaces. What is passed must outlive it.
  MemoryLayer(Device& device, const LayerShape& shape, const LayerParameters& parameters);

  // x [T, D] to y [T, D]; keeps what the backward reads, x itself not being copied.
  void forward(const Buffer& x, const Buffer& y);
  // grad_y [T, D] to grad_x [T, D] and the gradients of all parameters, which it overwrites; those
  // of the tables must be zero before, for only rows that were read are written.
  void backward(const Buffer& x, const Buffer& grad_y, const Buffer& grad_x,
                const LayerParameters& gradients);

  const Buffer& indices() const { return indices_; }  // [T, S] int64, virtual indices
  const Buffer& scores() const { return scores_; }    // [T, S, C]

 private:
  ultramem::RmsNormParams query_norm_params() const;
  ultramem::RmsNormParams key_norm_params() const;
  ultramem::ProductKeyTopkParams retrieval_params() const;
  ultramem::ValueFfnParams value_params() const;
  Buffer array(int64_t elements);

  Device& device_;
  const LayerShape shape_;
  const LayerParameters& parameters_;
  // Of the forward, for the backward.
  Buffer projection_, query_, normed_keys_, filter_u_, filter_t_, sigma_, left_, right_;
  Buffer scores_, indices_, axis_indices_, axis_scores_, grid_positions_;
  Buffer pre_input_, pre_activation_, out_;
  // Of the backward.
  Buffer grad_out_, grad_scores_, grad_pre_input_, grad_query_, grad_projection_, grad_normed_keys_;
};

// A step of row-wise Adagrad on one table, [num_rows, dim], in place. row_sum [num_rows] and step
// (one float32) are its state, zero at first.
void adagrad_step(Device& device, ultramem::DType dtype, int64_t num_rows, int64_t dim,
                  const Buffer& gradient, double learning_rate, const Buffer& table,
                  const Buffer& row_sum, const Buffer& step);
