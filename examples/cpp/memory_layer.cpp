#include "memory_layer.h"

#include <algorithm>

#include "matrix_product.h"

namespace {

constexpr double kNormEps = 1e-6;
constexpr double kAdagradEps = 1e-10;

const Operator<ultramem::ProductKeyTopkParams> kRetrieve = ULTRAMEM_OPERATOR(product_key_topk_fwd);
const Operator<ultramem::ProductKeyTopkBwdParams> kRetrieveBwd =
    ULTRAMEM_OPERATOR(product_key_topk_bwd);
const Operator<ultramem::ValueFfnParams> kValueFfn = ULTRAMEM_OPERATOR(value_ffn_fwd);
const Operator<ultramem::ValueFfnBwdParams> kValueFfnBwd = ULTRAMEM_OPERATOR(value_ffn_bwd);
const Operator<ultramem::RmsNormBwdParams> kNormBwd = ULTRAMEM_OPERATOR(rms_norm_bwd);
const Operator<ultramem::TableUpdateParams> kTableUpdate = ULTRAMEM_OPERATOR(table_update);

// The backward's parameters extend the forward's.
template <typename Bwd, typename Fwd>
Bwd extended(const Fwd& params) {
  Bwd bwd;
  static_cast<Fwd&>(bwd) = params;
  return bwd;
}

}  // namespace

int32_t LayerShape::axis_topk() const {
  return static_cast<int32_t>(std::min<int64_t>({num_keys, topk, int64_t{ultramem::kMaxAxisTopk}}));
}

MemoryLayer::MemoryLayer(Device& device, const LayerShape& shape, const LayerParameters& parameters)
    : device_(device), shape_(shape), parameters_(parameters) {
  const LayerShape& s = shape_;
  const int64_t T = s.num_tokens, H = s.num_heads, R = s.tucker_rank, C = s.num_cores;
  const int64_t S = s.num_selected(), m = s.axis_topk();
  projection_ = array(T * s.query_dim());
  query_ = array(T * s.query_dim());
  normed_keys_ = array(H * 2 * R * s.num_keys * s.key_dim);
  filter_u_ = array(H * R);
  filter_t_ = array(H * R);
  sigma_ = array(H * R);
  left_ = array(H * R * R);
  right_ = array(H * R * R);
  scores_ = array(T * S * C);
  indices_ = Buffer(device, static_cast<size_t>(T * S) * sizeof(int64_t));
  axis_indices_ = Buffer(device, static_cast<size_t>(T * H * 2 * m) * sizeof(int32_t));
  axis_scores_ = array(T * H * 2 * R * m);
  grid_positions_ = Buffer(device, static_cast<size_t>(T * S) * sizeof(int16_t));
  pre_input_ = array(T * s.pre_value_dim);
  pre_activation_ = array(T * S);
  out_ = array(T * s.value_dim);
  grad_out_ = array(T * s.value_dim);
  grad_scores_ = array(T * S * C);
  grad_pre_input_ = array(T * s.pre_value_dim);
  grad_query_ = array(T * s.query_dim());
  grad_projection_ = array(T * s.query_dim());
  grad_normed_keys_ = array(H * 2 * R * s.num_keys * s.key_dim);
}

Buffer MemoryLayer::array(int64_t elements) {
  return Buffer(device_, static_cast<size_t>(elements * ultramem::element_size(shape_.dtype)));
}

ultramem::RmsNormParams MemoryLayer::query_norm_params() const {
  ultramem::RmsNormParams params;
  params.num_rows = shape_.num_tokens * shape_.query_dim() / shape_.key_dim;
  params.dim = shape_.key_dim;
  params.eps = kNormEps;
  params.dtype = params.weight_dtype = shape_.dtype;
  params.x = projection_.data();
  params.weight = parameters_.query_norm.data();
  params.y = query_.data();
  return params;
}

ultramem::RmsNormParams MemoryLayer::key_norm_params() const {
  ultramem::RmsNormParams params;
  params.num_rows = int64_t{2} * shape_.num_heads * shape_.tucker_rank * shape_.num_keys;
  params.dim = shape_.key_dim;
  params.eps = kNormEps;
  params.dtype = params.weight_dtype = shape_.dtype;
  params.x = parameters_.keys.data();
  params.weight = parameters_.key_norm.data();
  params.y = normed_keys_.data();
  return params;
}

ultramem::ProductKeyTopkParams MemoryLayer::retrieval_params() const {
  ultramem::ProductKeyTopkParams params;
  params.num_tokens = shape_.num_tokens;
  params.num_keys = shape_.num_keys;
  params.key_dim = shape_.key_dim;
  params.num_heads = shape_.num_heads;
  params.num_queries = shape_.num_queries;
  params.tucker_rank = shape_.tucker_rank;
  params.num_cores = shape_.num_cores;
  params.axis_topk = shape_.axis_topk();
  params.topk = shape_.topk;
  params.dtype = shape_.dtype;
  params.query = query_.data();
  params.keys = normed_keys_.data();
  params.core = parameters_.cores.data();
  params.u = filter_u_.data();
  params.t = filter_t_.data();
  params.scores = scores_.data();
  params.indices = indices_.data<int64_t>();
  params.axis_indices = axis_indices_.data<int32_t>();
  params.axis_scores = axis_scores_.data();
  params.grid_positions = grid_positions_.data<int16_t>();
  return params;
}

ultramem::ValueFfnParams MemoryLayer::value_params() const {
  ultramem::ValueFfnParams params;
  params.num_tokens = shape_.num_tokens;
  params.num_selected = shape_.num_selected();
  params.pre_value_dim = shape_.pre_value_dim;
  params.value_dim = shape_.value_dim;
  params.num_cores = shape_.num_cores;
  params.activation = shape_.activation;
  params.table_dtype = params.dtype = shape_.dtype;
  params.addressing = shape_.addressing;
  params.indices = indices_.data();
  params.scores = scores_.data();
  params.values = parameters_.values.data();
  params.pre_values = parameters_.pre_values.data();
  params.pre_input = pre_input_.data();
  params.out = out_.data();
  params.pre_activation = pre_activation_.data();
  return params;
}

void MemoryLayer::forward(const Buffer& x, const Buffer& y) {
  const LayerShape& s = shape_;
  const LayerParameters& p = parameters_;
  const Matrix tokens = Matrix::of(x, s.num_tokens, s.d_model);
  const Matrix query_weight = Matrix::of(p.query_weight, s.query_dim(), s.d_model);
  const Matrix pre_weight = Matrix::of(p.pre_weight, s.pre_value_dim, s.d_model);
  const Matrix value_weight = Matrix::of(p.value_weight, s.d_model, s.value_dim);

  matrix_product(device_, s.dtype, tokens, query_weight.transposed(), projection_);
  device_.rms_norm_fwd(query_norm_params());
  device_.rms_norm_fwd(key_norm_params());

  ultramem::TuckerFilterParams filter;
  filter.num_cores = s.num_cores;
  filter.num_heads = s.num_heads;
  filter.tucker_rank = s.tucker_rank;
  filter.dtype = s.dtype;
  filter.core = p.cores.data();
  filter.u = filter_u_.data();
  filter.t = filter_t_.data();
  filter.sigma = sigma_.data();
  filter.left = left_.data();
  filter.right = right_.data();
  device_.tucker_filter(filter);

  device_.run(kRetrieve, retrieval_params());
  matrix_product(device_, s.dtype, tokens, pre_weight.transposed(), pre_input_);
  device_.run(kValueFfn, value_params());
  matrix_product(device_, s.dtype, Matrix::of(out_, s.num_tokens, s.value_dim),
                 value_weight.transposed(), y);
}

void MemoryLayer::backward(const Buffer& x, const Buffer& grad_y, const Buffer& grad_x,
                           const LayerParameters& gradients) {
  const LayerShape& s = shape_;
  const LayerParameters& p = parameters_;
  const Matrix tokens = Matrix::of(x, s.num_tokens, s.d_model);
  const Matrix query_weight = Matrix::of(p.query_weight, s.query_dim(), s.d_model);
  const Matrix pre_weight = Matrix::of(p.pre_weight, s.pre_value_dim, s.d_model);
  const Matrix value_weight = Matrix::of(p.value_weight, s.d_model, s.value_dim);
  const Matrix grad_output = Matrix::of(grad_y, s.num_tokens, s.d_model);

  matrix_product(device_, s.dtype, grad_output, value_weight, grad_out_);
  matrix_product(device_, s.dtype, grad_output.transposed(),
                 Matrix::of(out_, s.num_tokens, s.value_dim), gradients.value_weight);

  auto value = extended<ultramem::ValueFfnBwdParams>(value_params());
  value.grad_out = grad_out_.data();
  value.grad_scores = grad_scores_.data();
  value.grad_pre_input = grad_pre_input_.data();
  value.grad_values = gradients.values.data();
  value.grad_pre_values = gradients.pre_values.data();
  value.grad_table_dtype = s.dtype;
  device_.run(kValueFfnBwd, value);

  auto retrieval = extended<ultramem::ProductKeyTopkBwdParams>(retrieval_params());
  retrieval.grad_scores = grad_scores_.data();
  retrieval.grad_query = grad_query_.data();
  retrieval.grad_keys = grad_normed_keys_.data();
  retrieval.grad_core = gradients.cores.data();
  device_.run(kRetrieveBwd, retrieval);

  auto key_norm = extended<ultramem::RmsNormBwdParams>(key_norm_params());
  key_norm.grad_y = grad_normed_keys_.data();
  key_norm.grad_x = gradients.keys.data();
  key_norm.grad_weight = gradients.key_norm.data();
  device_.run(kNormBwd, key_norm);

  auto query_norm = extended<ultramem::RmsNormBwdParams>(query_norm_params());
  query_norm.grad_y = grad_query_.data();
  query_norm.grad_x = grad_projection_.data();
  query_norm.grad_weight = gradients.query_norm.data();
  device_.run(kNormBwd, query_norm);

  const Matrix grad_projection = Matrix::of(grad_projection_, s.num_tokens, s.query_dim());
  const Matrix grad_pre_input = Matrix::of(grad_pre_input_, s.num_tokens, s.pre_value_dim);
  matrix_product(device_, s.dtype, grad_projection.transposed(), tokens, gradients.query_weight);
  matrix_product(device_, s.dtype, grad_pre_input.transposed(), tokens, gradients.pre_weight);
  matrix_product(device_, s.dtype, grad_projection, query_weight, grad_x);
  matrix_product(device_, s.dtype, grad_pre_input, pre_weight, grad_x, /*accumulate=*/true);
}

void adagrad_step(Device& device, ultramem::DType dtype, int64_t num_rows, int64_t dim,
                  const Buffer& gradient, double learning_rate, const Buffer& table,
                  const Buffer& row_sum, const Buffer& step) {
  ultramem::TableUpdateParams params;
  params.gradient.num_rows = num_rows;
  params.gradient.dim = dim;
  params.gradient.source = gradient.data();
  params.gradient.source_dtype = dtype;
  params.optimizer = ultramem::TableOptimizer::kAdagrad;
  params.table_dtype = dtype;
  params.weight = table.data();
  params.row_sum = row_sum.data();
  params.step = step.data<float>();
  params.learning_rate = learning_rate;
  params.eps = kAdagradEps;
  device.run(kTableUpdate, params);
}
