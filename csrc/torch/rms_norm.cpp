#include "ultramem/rms_norm.h"

#include "ops.h"

namespace ultramem::torch_binding {
namespace {

RmsNormParams make_params(const OpContext& context, const Tensor& x, const Tensor& weight,
                          double eps) {
  RmsNormParams params;
  params.dtype = context.dtype("x", x);
  context.check(x.dim() >= 1, "x must have at least one dimension");
  params.dim = x.size(x.dim() - 1);
  context.check(params.dim >= 1, "the last dimension of x must not be empty");
  context.check_shape("weight", weight, "[dim of x]", {params.dim});
  params.weight_dtype = context.gain_dtype("weight", weight, params.dtype);
  context.check(eps >= 0, "eps must not be negative, got " + std::to_string(eps));
  params.num_rows = x.numel() / params.dim;
  params.eps = eps;
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  return params;
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const OpContext context("rms_norm", "x", x);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  RmsNormParams params = make_params(context, x, weight, eps);
  Tensor y = torch::stable::empty_like(x);
  params.y = y.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, rms_norm_fwd, params));
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, double eps) {
  const OpContext context("rms_norm_bwd", "x", x);
  grad_y = as_contiguous(grad_y);
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  RmsNormBwdParams params;
  static_cast<RmsNormParams&>(params) = make_params(context, x, weight, eps);
  context.check_dtype("grad_y", grad_y, x.scalar_type());
  context.check(grad_y.numel() == x.numel(), "grad_y must have the shape of x");
  params.grad_y = grad_y.const_data_ptr();
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = context.empty({params.dim}, weight.scalar_type());
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_weight = grad_weight.mutable_data_ptr();
  Tensor workspace = ULTRAMEM_WORKSPACE(context, rms_norm_bwd_workspace, params);
  params.workspace = workspace.mutable_data_ptr();
  context.check(ULTRAMEM_CALL(context, rms_norm_bwd, params));
  return {grad_x, grad_weight};
}

}  // namespace ultramem::torch_binding
