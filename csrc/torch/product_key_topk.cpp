#include "ultramem/product_key_topk.h"

#include "ops.h"

namespace ultramem::torch_binding {
namespace {

ScoreMode parse_mode(const OpContext& context, const std::string& mode) {
  context.check(mode == "tucker" || mode == "additive",
                "mode must be 'tucker' or 'additive', got '" + mode + "'");
  return mode == "tucker" ? ScoreMode::kTucker : ScoreMode::kAdditive;
}

// Shapes and dtypes of what the forward and the backward both take.
ProductKeyTopkParams make_params(const OpContext& context, const Tensor& query, const Tensor& keys,
                                 const OptionalTensor& core, const std::string& mode) {
  ProductKeyTopkParams params;
  params.mode = parse_mode(context, mode);
  params.dtype = context.dtype("query", query);
  context.check_shape("query", query, "[T, 2, H, Q, Kd]", {-1, 2, -1, -1, -1});
  const int64_t num_heads = query.size(2), num_queries = query.size(3), key_dim = query.size(4);
  context.check_shape("keys", keys, "[H, 2, R, n, Kd]", {num_heads, 2, -1, -1, key_dim});
  context.check_dtype("keys", keys, query.scalar_type());
  const int64_t rank = keys.size(2);
  context.check(num_heads >= 1 && key_dim >= 1 && keys.size(3) >= 1,
                "H, Kd and n must be positive");
  context.check(rank >= 1 && rank <= kMaxTuckerRank,
                "the Tucker rank R (keys.shape[2]) must be 1..4, got " + std::to_string(rank));
  context.check(num_queries == 1 || num_queries == rank,
                "query.shape[3] must be 1 or R = " + std::to_string(rank) + ", got " +
                    std::to_string(num_queries));
  params.num_tokens = query.size(0);
  params.num_heads = static_cast<int32_t>(num_heads);
  params.num_queries = static_cast<int32_t>(num_queries);
  params.tucker_rank = static_cast<int32_t>(rank);
  params.key_dim = key_dim;
  params.num_keys = keys.size(3);

  const ScalarType acc = scalar_type(accumulation_dtype(params.dtype));
  if (params.mode == ScoreMode::kTucker) {
    context.check(core.has_value(), "core is required in tucker mode");
    context.check_shape("core", *core, "[C, H, R, R]", {-1, num_heads, rank, rank});
    context.check_dtype("core", *core, acc);
    const int64_t num_cores = core->size(0);
    context.check(num_cores >= 1 && num_cores <= kMaxNumCores,
                  "the number of cores C must be 1..4, got " + std::to_string(num_cores));
    params.num_cores = static_cast<int32_t>(num_cores);
  } else {
    context.check(!core.has_value(), "core must be None in additive mode");
    context.check(rank == 1, "additive mode has R = 1, keys.shape[2] is " + std::to_string(rank));
  }
  params.query = query.const_data_ptr();
  params.keys = keys.const_data_ptr();
  params.core = data_or_null(core);
  return params;
}

void check_topk(const OpContext& context, const ProductKeyTopkParams& params, int64_t topk,
                int64_t axis_topk) {
  const std::string topk_range =
      "topk must be in 1..min(axis_topk^2, 1024) with axis_topk = " + std::to_string(axis_topk) +
      ", got " + std::to_string(topk);
  context.check(topk >= 1, topk_range);
  context.check(axis_topk >= 1 && axis_topk <= kMaxAxisTopk && axis_topk <= params.num_keys,
                "axis_topk must be in 1..min(n, 128) with n = " + std::to_string(params.num_keys) +
                    ", got " + std::to_string(axis_topk));
  context.check(topk <= kMaxTopk && topk <= axis_topk * axis_topk, topk_range);
  context.check(
      params.mode == ScoreMode::kTucker || axis_topk >= topk || axis_topk == params.num_keys,
      "additive mode needs axis_topk >= min(topk, n), or the best sums can be missed; "
      "got axis_topk = " +
          std::to_string(axis_topk) + ", topk = " + std::to_string(topk));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> product_key_topk(
    Tensor query, Tensor keys, OptionalTensor core, OptionalTensor u, OptionalTensor t,
    int64_t topk, int64_t axis_topk, std::string mode) {
  const OpContext context("product_key_topk", "query", query);
  query = as_contiguous(query);
  keys = as_contiguous(keys);
  core = as_contiguous(core);
  u = as_contiguous(u);
  t = as_contiguous(t);
  ProductKeyTopkParams params = make_params(context, query, keys, core, mode);
  check_topk(context, params, topk, axis_topk);
  const ScalarType acc = scalar_type(accumulation_dtype(params.dtype));
  if (params.mode == ScoreMode::kTucker) {
    context.check(u.has_value() == t.has_value(), "u and t go together");
    if (u.has_value()) {
      context.check_shape("u", *u, "[H, R]", {params.num_heads, params.tucker_rank});
      context.check_dtype("u", *u, acc);
      context.check_shape("t", *t, "[H, R]", {params.num_heads, params.tucker_rank});
      context.check_dtype("t", *t, acc);
    }
  } else {
    context.check(!u.has_value() && !t.has_value(), "u and t must be None in additive mode");
  }
  params.u = data_or_null(u);
  params.t = data_or_null(t);
  const bool has_own_filter = params.mode == ScoreMode::kTucker && !u.has_value();
  Tensor own_filter =
      context.empty({has_own_filter ? 2 : 0, params.num_heads, params.tucker_rank}, acc);
  if (has_own_filter) params.own_filter = own_filter.mutable_data_ptr();
  params.topk = static_cast<int32_t>(topk);
  params.axis_topk = static_cast<int32_t>(axis_topk);

  const int64_t T = params.num_tokens, H = params.num_heads;
  Tensor axis_indices = context.empty({T, H, 2, axis_topk}, ScalarType::Int);
  Tensor axis_scores = context.empty({T, H, 2, params.tucker_rank, axis_topk}, acc);
  params.axis_indices = static_cast<int32_t*>(axis_indices.mutable_data_ptr());
  params.axis_scores = axis_scores.mutable_data_ptr();
#if defined(ULTRAMEM_WITH_CUDA)
  const bool joined = context.is_cuda() && cuda::product_key_topk_fwd_joined(params);
  // The workspace is given back before the outputs of the second half are allocated.
  if (context.is_cuda() && !joined) {
    Tensor workspace = context.workspace(cuda::product_key_topk_fwd_workspace(params));
    params.workspace = workspace.mutable_data_ptr();
    context.check(cuda::product_key_topk_fwd_axes(params, context.stream()));
    params.workspace = nullptr;
  }
#endif
  Tensor scores = context.empty({T, H, topk, params.num_cores}, acc);
  Tensor indices = context.empty({T, H, topk}, ScalarType::Long);
  Tensor grid_positions = context.empty({T, H, topk}, ScalarType::Short);
  params.scores = scores.mutable_data_ptr();
  params.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  params.grid_positions = static_cast<int16_t*>(grid_positions.mutable_data_ptr());
#if defined(ULTRAMEM_WITH_CUDA)
  if (context.is_cuda()) {
    if (joined) {
      Tensor workspace = context.workspace(cuda::product_key_topk_fwd_workspace(params));
      params.workspace = workspace.mutable_data_ptr();
      context.check(cuda::product_key_topk_fwd(params, context.stream()));
    } else {
      context.check(cuda::product_key_topk_fwd_grid(params, context.stream()));
    }
    return {scores, indices, axis_indices, axis_scores, grid_positions};
  }
#endif
  Tensor workspace =
      context.workspace(cpu::product_key_topk_fwd_workspace(params, context.executor()));
  params.workspace = workspace.mutable_data_ptr();
  context.check(cpu::product_key_topk_fwd(params, context.executor()));
  return {scores, indices, axis_indices, axis_scores, grid_positions};
}

std::tuple<Tensor, Tensor, Tensor> product_key_topk_bwd(Tensor grad_scores, Tensor query,
                                                        Tensor keys, OptionalTensor core,
                                                        Tensor axis_indices, Tensor axis_scores,
                                                        Tensor grid_positions, std::string mode,
                                                        bool need_query, bool need_keys,
                                                        bool need_core) {
  const OpContext context("product_key_topk_bwd", "query", query);
  query = as_contiguous(query);
  keys = as_contiguous(keys);
  core = as_contiguous(core);
  grad_scores = as_contiguous(grad_scores);
  axis_indices = as_contiguous(axis_indices);
  axis_scores = as_contiguous(axis_scores);
  grid_positions = as_contiguous(grid_positions);
  ProductKeyTopkBwdParams params;
  static_cast<ProductKeyTopkParams&>(params) = make_params(context, query, keys, core, mode);

  const int64_t T = params.num_tokens, H = params.num_heads;
  const ScalarType acc = scalar_type(accumulation_dtype(params.dtype));
  context.check_shape("grid_positions", grid_positions, "[T, H, M]", {T, H, -1});
  context.check_dtype("grid_positions", grid_positions, ScalarType::Short);
  const int64_t topk = grid_positions.size(2);
  context.check_shape("axis_indices", axis_indices, "[T, H, 2, m]", {T, H, 2, -1});
  context.check_dtype("axis_indices", axis_indices, ScalarType::Int);
  const int64_t axis_topk = axis_indices.size(3);
  check_topk(context, params, topk, axis_topk);
  context.check_shape("axis_scores", axis_scores, "[T, H, 2, R, m]",
                      {T, H, 2, params.tucker_rank, axis_topk});
  context.check_dtype("axis_scores", axis_scores, acc);
  context.check_shape("grad_scores", grad_scores, "[T, H, M, C]", {T, H, topk, params.num_cores});
  context.check_dtype("grad_scores", grad_scores, acc);
  params.topk = static_cast<int32_t>(topk);
  params.axis_topk = static_cast<int32_t>(axis_topk);
  // The backward reads what the forward wrote; the struct's pointers are the forward's outputs.
  params.axis_indices = static_cast<int32_t*>(const_cast<void*>(axis_indices.const_data_ptr()));
  params.axis_scores = const_cast<void*>(axis_scores.const_data_ptr());
  params.grid_positions = static_cast<int16_t*>(const_cast<void*>(grid_positions.const_data_ptr()));
  params.grad_scores = grad_scores.const_data_ptr();

  const ScalarType dtype = query.scalar_type();
  Tensor grad_query = need_query ? torch::stable::empty_like(query) : context.empty({0}, dtype);
  Tensor grad_keys = need_keys ? torch::stable::empty_like(keys) : context.empty({0}, dtype);
  const bool has_core_grad = need_core && core.has_value();
  Tensor grad_core = has_core_grad ? torch::stable::empty_like(*core) : context.empty({0}, acc);
  params.grad_query = need_query ? grad_query.mutable_data_ptr() : nullptr;
  params.grad_keys = need_keys ? grad_keys.mutable_data_ptr() : nullptr;
  params.grad_core = has_core_grad ? grad_core.mutable_data_ptr() : nullptr;
  Tensor workspace = ULTRAMEM_WORKSPACE(context, product_key_topk_bwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, product_key_topk_bwd, params));
  return {grad_query, grad_keys, grad_core};
}

}  // namespace ultramem::torch_binding
