// The rule by which the forward of product_key_topk chooses its kernels. Host arithmetic alone, so
// that a build without CUDA can answer, too.
#include "ultramem/product_key_topk.h"

namespace ultramem::cuda {
namespace {

// Null where the tensor-core kernels take it, else the first reason why they do not.
const char* why_generic(const ProductKeyTopkParams& p, int compute_capability) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return "float32 is scored in float32, which tensor cores do not offer";
  }
#if defined(ULTRAMEM_WITH_CUDA) && !defined(ULTRAMEM_WITH_SM90A)
  return "this library was built without code for sm_90a";
#endif
  if (compute_capability != 90) return "the tensor-core kernels need compute capability 9.0";
  if (p.num_keys > kTensorCore90MaxKeys) return "n is above 8192";
  if (p.key_dim > kTensorCore90MaxKeyDim) return "Kd is above 1024";
  if (p.key_dim % kTensorCore90KeyDimMultiple != 0) return "Kd is not a multiple of 8";
  if (p.axis_topk > kMaxAxisTopk) return "m is above 128";
  return nullptr;
}

}  // namespace

RetrievalPath product_key_topk_fwd_path(const ProductKeyTopkParams& params, int compute_capability,
                                        const char** reason) {
  const char* obstacle = why_generic(params, compute_capability);
  const bool few = params.num_heads <= kTensorCore90SmallHeads &&
                   (params.num_tokens <= kTensorCore90SmallTokens ||
                    (params.num_tokens <= kTensorCore90SmallTokenHeads &&
                     params.num_tokens * params.num_heads <= kTensorCore90SmallTokenHeads));
  if (reason != nullptr) {
    *reason = obstacle != nullptr ? obstacle
              : few               ? "few tokens; dtype, compute capability, n, Kd and m allow it"
                                  : "dtype, compute capability, n, Kd and m allow it";
  }
  if (obstacle != nullptr) return RetrievalPath::kGeneric;
  return few ? RetrievalPath::kTensorCore90Small : RetrievalPath::kTensorCore90;
}

}  // namespace ultramem::cuda
