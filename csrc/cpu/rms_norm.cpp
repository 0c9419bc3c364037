// rms_norm on the CPU: checks, then the kernels of this machine's instruction set.
#include "ultramem/rms_norm.h"

#include <cstring>

#include "kernel_table.h"

namespace ultramem::cpu {
namespace {

Status check(const RmsNormParams& params) {
  if (params.num_rows < 0) {
    return Status::invalid_argument("rms_norm: num_rows must not be negative");
  }
  if (params.dim < 1) return Status::invalid_argument("rms_norm: dim must be positive");
  if (params.dtype < DType::kFloat32 || params.dtype > DType::kFloat64) {
    return Status::invalid_argument("rms_norm: unknown dtype");
  }
  if (params.weight_dtype != params.dtype &&
      params.weight_dtype != accumulation_dtype(params.dtype)) {
    return Status::invalid_argument("rms_norm: weight_dtype must be dtype or its accumulation's");
  }
  return {};
}

}  // namespace

Status rms_norm_fwd(const RmsNormParams& params, const Executor& executor) {
  const Status status = check(params);
  if (!status.ok() || params.num_rows == 0) return status;
  kernel_table().rms_norm_fwd(params, executor);
  return {};
}

size_t rms_norm_bwd_workspace(const RmsNormBwdParams& params, const Executor& executor) {
  if (!check(params).ok() || params.num_rows == 0) return 0;
  return kernel_table().rms_norm_bwd_workspace(params, executor);
}

Status rms_norm_bwd(const RmsNormBwdParams& params, const Executor& executor) {
  const Status status = check(params);
  if (!status.ok()) return status;
  if (params.num_rows == 0) {
    std::memset(params.grad_weight, 0,
                static_cast<size_t>(params.dim * element_size(params.weight_dtype)));
    return {};
  }
  if (params.workspace == nullptr) {
    return Status::invalid_argument("rms_norm backward: workspace is null");
  }
  kernel_table().rms_norm_bwd(params, executor);
  return {};
}

}  // namespace ultramem::cpu
