// tucker_query and tucker_filter. The projection and its gradients are torch's matrix products, the
// norm between them is ours; for few tokens on CUDA, so is the whole.
#include <array>

#include "ops.h"
#include "ultramem/rms_norm.h"
#include "ultramem/tucker_filter.h"
#include "ultramem/tucker_query.h"

namespace ultramem::torch_binding {
namespace {

// out [M, N] = a [M, K] times b [K, N], in their dtype. The out variant, because autocast, which
// would change the dtype under an operator that was called inside it, leaves that alone.
void matmul(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The result is a second handle of `out`.
  torch::stable::detail::to<Tensor>(stack[0]);
}

struct QueryShape {
  int64_t num_tokens, d_model, num_heads, num_queries, key_dim;
};

// The norm of the projection's segments.
template <typename Params>
Params norm_params(const OpContext& context, const Tensor& projection, const Tensor& norm_weight,
                   double eps) {
  Params params;
  params.dtype = context.dtype("x", projection);
  params.weight_dtype = context.gain_dtype("norm_weight", norm_weight, params.dtype);
  params.dim = norm_weight.size(0);
  params.num_rows = projection.numel() / params.dim;
  params.eps = eps;
  params.x = projection.const_data_ptr();
  params.weight = norm_weight.const_data_ptr();
  return params;
}

#if defined(ULTRAMEM_WITH_CUDA)

template <typename Params>
Params query_params(const OpContext& context, const Tensor& x, const Tensor& weight,
                    const Tensor& norm_weight, const Tensor& projection, double eps) {
  Params params;
  params.num_tokens = x.size(0);
  params.d_model = x.size(1);
  params.key_dim = norm_weight.size(0);
  params.num_segments = weight.size(0) / params.key_dim;
  params.eps = eps;
  params.dtype = context.dtype("x", x);
  params.norm_dtype = context.gain_dtype("norm_weight", norm_weight, params.dtype);
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.norm_weight = norm_weight.const_data_ptr();
  params.projection = projection.mutable_data_ptr();
  return params;
}

// The kernels for few tokens, where they take the shape: whether they did. The matrix products take
// any strides; these do not.
bool few_tokens_fwd(const OpContext& context, const Tensor& x, const Tensor& weight,
                    const Tensor& norm_weight, double eps, const Tensor& query,
                    const Tensor& projection) {
  if (!context.is_cuda() || !x.is_contiguous() || !weight.is_contiguous()) return false;
  auto params = query_params<TuckerQueryParams>(context, x, weight, norm_weight, projection, eps);
  params.query = query.mutable_data_ptr();
  if (!cuda::tucker_query_small_fwd_supported(params)) return false;
  context.check(cuda::tucker_query_small_fwd(params, context.stream()));
  return true;
}

// The product alone, for few tokens where the norm is better off in a kernel of its own.
bool few_tokens_project(const OpContext& context, const Tensor& x, const Tensor& weight,
                        const Tensor& norm_weight, double eps, const Tensor& projection) {
  if (!context.is_cuda() || !x.is_contiguous() || !weight.is_contiguous()) return false;
  const auto params =
      query_params<TuckerQueryParams>(context, x, weight, norm_weight, projection, eps);
  if (!cuda::tucker_query_project_supported(params)) return false;
  context.check(cuda::tucker_query_project(params, context.stream()));
  return true;
}

// grad_x and grad_weight are empty where they are not wanted.
bool few_tokens_bwd(const OpContext& context, const Tensor& grad_query, const Tensor& x,
                    const Tensor& weight, const Tensor& norm_weight, const Tensor& projection,
                    double eps, const Tensor& grad_x, const Tensor& grad_weight,
                    const Tensor& grad_norm_weight) {
  if (!context.is_cuda() || !x.is_contiguous() || !weight.is_contiguous()) return false;
  auto params =
      query_params<TuckerQueryBwdParams>(context, x, weight, norm_weight, projection, eps);
  params.grad_query = grad_query.const_data_ptr();
  if (grad_x.numel() > 0) params.grad_x = grad_x.mutable_data_ptr();
  if (grad_weight.numel() > 0) params.grad_weight = grad_weight.mutable_data_ptr();
  params.grad_norm_weight = grad_norm_weight.mutable_data_ptr();
  if (!cuda::tucker_query_small_bwd_supported(params)) return false;
  Tensor workspace = context.workspace(cuda::tucker_query_small_bwd_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  context.check(cuda::tucker_query_small_bwd(params, context.stream()));
  return true;
}

#endif  // ULTRAMEM_WITH_CUDA

QueryShape check_query_arguments(const OpContext& context, const Tensor& x, const Tensor& weight,
                                 const Tensor& norm_weight, int64_t num_heads, double eps) {
  const DType dtype = context.dtype("x", x);
  context.check_shape("x", x, "[T, D]", {-1, -1});
  context.check_shape("weight", weight, "[2*H*Q*Kd, D]", {-1, x.size(1)});
  context.check_dtype("weight", weight, x.scalar_type());
  context.check_shape("norm_weight", norm_weight, "[Kd]", {-1});
  context.gain_dtype("norm_weight", norm_weight, dtype);
  context.check(num_heads >= 1, "num_heads must be positive, got " + std::to_string(num_heads));
  context.check(eps >= 0, "eps must not be negative, got " + std::to_string(eps));
  const int64_t key_dim = norm_weight.size(0);
  context.check(key_dim >= 1, "norm_weight must not be empty");
  const int64_t segment = 2 * num_heads * key_dim;
  const int64_t num_queries = weight.size(0) / segment;
  context.check(
      num_queries >= 1 && num_queries <= kMaxTuckerRank && weight.size(0) == num_queries * segment,
      "weight must have 2*H*Q*Kd rows with H = " + std::to_string(num_heads) + ", Kd = " +
          std::to_string(key_dim) + " and Q in 1..4, got " + std::to_string(weight.size(0)));
  return {x.size(0), x.size(1), num_heads, num_queries, key_dim};
}

}  // namespace

std::tuple<Tensor, Tensor> tucker_query(Tensor x, Tensor weight, Tensor norm_weight,
                                        int64_t num_heads, double eps) {
  const OpContext context("tucker_query", "x", x);
  const QueryShape shape = check_query_arguments(context, x, weight, norm_weight, num_heads, eps);
  norm_weight = as_contiguous(norm_weight);
  Tensor query = context.empty(
      {shape.num_tokens, 2, shape.num_heads, shape.num_queries, shape.key_dim}, x.scalar_type());
  Tensor projection = context.empty({shape.num_tokens, weight.size(0)}, x.scalar_type());
#if defined(ULTRAMEM_WITH_CUDA)
  const auto project = [&] {
    return few_tokens_project(context, x, weight, norm_weight, eps, projection);
  };
  bool projected = weight.numel() > kTuckerQuerySmallWeight && project();
  if (!projected && few_tokens_fwd(context, x, weight, norm_weight, eps, query, projection)) {
    return {query, projection};
  }
  projected = projected || project();
#else
  const bool projected = false;
#endif

  if (!projected) matmul(x, transpose(weight, 0, 1), projection);
  auto params = norm_params<RmsNormParams>(context, projection, norm_weight, eps);
  params.y = query.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, rms_norm_fwd, params));
  return {query, projection};
}

std::tuple<Tensor, Tensor, Tensor> tucker_query_bwd(Tensor grad_query, Tensor x, Tensor weight,
                                                    Tensor norm_weight, Tensor projection,
                                                    double eps, bool need_x, bool need_weight) {
  const OpContext context("tucker_query_bwd", "x", x);
  grad_query = as_contiguous(grad_query);
  norm_weight = as_contiguous(norm_weight);
  projection = as_contiguous(projection);
  context.check_dtype("grad_query", grad_query, x.scalar_type());
  context.check(grad_query.numel() == projection.numel(), "grad_query must have query's shape");

  auto gradient_of = [&](const Tensor& tensor, bool needed) {
    return needed ? context.empty({tensor.size(0), tensor.size(1)}, tensor.scalar_type())
                  : context.empty({0}, tensor.scalar_type());
  };
  Tensor grad_x = gradient_of(x, need_x);
  Tensor grad_weight = gradient_of(weight, need_weight);
  Tensor grad_norm_weight = context.empty({norm_weight.size(0)}, norm_weight.scalar_type());
#if defined(ULTRAMEM_WITH_CUDA)
  if (few_tokens_bwd(context, grad_query, x, weight, norm_weight, projection, eps, grad_x,
                     grad_weight, grad_norm_weight)) {
    return {grad_x, grad_weight, grad_norm_weight};
  }
#endif

  Tensor grad_projection = torch::stable::empty_like(projection);
  auto params = norm_params<RmsNormBwdParams>(context, projection, norm_weight, eps);
  params.grad_y = grad_query.const_data_ptr();
  params.grad_x = grad_projection.mutable_data_ptr();
  params.grad_weight = grad_norm_weight.mutable_data_ptr();
  Tensor workspace = ULTRAMEM_WORKSPACE(context, rms_norm_bwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, rms_norm_bwd, params));

  if (need_x) matmul(grad_projection, weight, grad_x);
  if (need_weight) matmul(transpose(grad_projection, 0, 1), x, grad_weight);
  return {grad_x, grad_weight, grad_norm_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tucker_filter(Tensor core) {
  const OpContext context("tucker_filter", "core", core);
  core = as_contiguous(core);
  TuckerFilterParams params;
  params.dtype = context.dtype("core", core);
  context.check(params.dtype == accumulation_dtype(params.dtype),
                "core must be float32 or float64 here; the Python wrapper casts");
  context.check_shape("core", core, "[C, H, R, R]", {-1, -1, -1, -1});
  const int64_t num_cores = core.size(0), num_heads = core.size(1), rank = core.size(2);
  context.check(core.size(3) == rank, "the last two dimensions of core must be equal");
  context.check(rank >= 1 && rank <= kMaxTuckerRank,
                "the Tucker rank R must be 1..4, got " + std::to_string(rank));
  context.check(num_cores >= 1 && num_cores <= kMaxNumCores,
                "the number of cores C must be 1..4, got " + std::to_string(num_cores));
  context.check(num_heads >= 1, "core must have at least one head");
  params.num_cores = static_cast<int32_t>(num_cores);
  params.num_heads = static_cast<int32_t>(num_heads);
  params.tucker_rank = static_cast<int32_t>(rank);
  params.core = core.const_data_ptr();
  const ScalarType dtype = core.scalar_type();
  Tensor u = context.empty({num_heads, rank}, dtype);
  Tensor t = context.empty({num_heads, rank}, dtype);
  Tensor sigma = context.empty({num_heads, rank}, dtype);
  Tensor left = context.empty({num_heads, rank, rank}, dtype);
  Tensor right = context.empty({num_heads, rank, rank}, dtype);
  params.u = u.mutable_data_ptr();
  params.t = t.mutable_data_ptr();
  params.sigma = sigma.mutable_data_ptr();
  params.left = left.mutable_data_ptr();
  params.right = right.mutable_data_ptr();
#if defined(ULTRAMEM_WITH_CUDA)
  context.check(context.is_cuda() ? cuda::tucker_filter(params, context.stream())
                                  : cpu::tucker_filter(params));
#else
  context.check(cpu::tucker_filter(params));
#endif
  return {u, t, sigma, left, right};
}

}  // namespace ultramem::torch_binding
