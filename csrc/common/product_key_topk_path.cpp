// The rule by which the forward of product_key_topk chooses its kernels. Host arithmetic alone, so
// that a build without CUDA can answer, too.
#include "ultramem/product_key_topk.h"

namespace ultramem::cuda {
namespace {

// Null where both kinds of tensor-core kernels could take it, else the first reason why neither
// does.
const char* why_generic(const ProductKeyTopkParams& p, int compute_capability) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return "float32 is scored in float32, which tensor cores do not offer";
  }
  if (compute_capability < 80) return "the tensor-core kernels need compute capability 8.0";
  if (p.key_dim > kTensorCoreMaxKeyDim) return "Kd is above 1024";
  if (p.key_dim % kTensorCoreKeyDimMultiple != 0) return "Kd is not a multiple of 8";
  if (p.axis_topk > kMaxAxisTopk) return "m is above 128";
  return nullptr;
}

// Null where the kernels of sm_90 take what why_generic lets pass.
const char* why_not_90(const ProductKeyTopkParams& p, int compute_capability) {
#if defined(ULTRAMEM_WITH_CUDA) && !defined(ULTRAMEM_WITH_SM90A)
  (void)p;
  (void)compute_capability;
  return "this library was built without code for sm_90a";
#else
  if (compute_capability != 90) return "those of sm_90 need compute capability 9.0";
  if (p.num_keys > kTensorCore90MaxKeys) return "n is above 8192, more than those of sm_90 take";
  return nullptr;
#endif
}

// Null where the kernels of sm_80 take what those of sm_90 do not.
const char* why_not_80(const ProductKeyTopkParams& p) {
  if (p.num_keys > kTensorCore80MaxKeys) return "n is above 65536";
  // No product: tokens may be many.
  if (p.num_tokens < kTensorCore80MinTokenHeads &&
      p.num_tokens * p.num_heads < kTensorCore80MinTokenHeads) {
    return "fewer than 64 tokens times heads, and n is above 8192, more than the kernels for few "
           "tokens take";
  }
  return nullptr;
}

bool few_tokens(const ProductKeyTopkParams& p) {
  // No product before its factors are known to be small.
  return p.num_keys <= kTensorCoreSmallMaxKeys && p.num_tokens <= kTensorCoreSmallTokenHeads &&
         p.num_heads <= kTensorCoreSmallTokenHeads &&
         p.num_tokens * p.num_heads <= kTensorCoreSmallTokenHeads &&
         8 * p.num_tokens * p.num_heads * p.tucker_rank * p.num_keys <= kTensorCoreSmallBytes;
}

struct PathAndReason {
  RetrievalPath path;
  const char* reason;
};

PathAndReason choose(const ProductKeyTopkParams& p, int compute_capability) {
  if (const char* obstacle = why_generic(p, compute_capability); obstacle != nullptr) {
    return {RetrievalPath::kGeneric, obstacle};
  }
  if (few_tokens(p)) {
    return {RetrievalPath::kTensorCoreSmall,
            "few tokens; dtype, compute capability, n, Kd and m allow it"};
  }
  const char* not_90 = why_not_90(p, compute_capability);
  if (not_90 == nullptr) {
    return {RetrievalPath::kTensorCore90, "dtype, compute capability, n, Kd and m allow it"};
  }
  if (const char* obstacle = why_not_80(p); obstacle != nullptr) {
    return {RetrievalPath::kGeneric, obstacle};
  }
  return {RetrievalPath::kTensorCore80, not_90};
}

}  // namespace

RetrievalPath product_key_topk_fwd_path(const ProductKeyTopkParams& params, int compute_capability,
                                        const char** reason) {
  const PathAndReason chosen = choose(params, compute_capability);
  if (reason != nullptr) *reason = chosen.reason;
  return chosen.path;
}

}  // namespace ultramem::cuda
