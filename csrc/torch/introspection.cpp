// C entry points of the torch library for whoever asks what it holds (csrc/python, Python's
// ctypes). Plain C, so that they bind to no Python and no C++ ABI.
#include <string>

#include "ultramem/device_info.h"
#include "ultramem/product_key_topk.h"

#define ULTRAMEM_EXPORT extern "C" __attribute__((visibility("default")))

ULTRAMEM_EXPORT int32_t ultramem_api_version() { return ultramem::kApiVersion; }

// What was built, as a JSON object; lists are joined by commas. CMakeLists.txt defines the names.
ULTRAMEM_EXPORT const char* ultramem_build_info() {
  static const std::string info =
      "{\"version\": \"" ULTRAMEM_VERSION "\", \"build_type\": \"" ULTRAMEM_BUILD_TYPE
      "\", \"cxx_compiler\": \"" ULTRAMEM_CXX_COMPILER
      "\", \"cuda_compiler\": \"" ULTRAMEM_CUDA_COMPILER
      "\", \"cuda_architectures\": \"" ULTRAMEM_CUDA_ARCHITECTURES
      "\", \"cpu_capabilities\": \"" ULTRAMEM_CPU_CAPABILITIES "\", \"api_version\": " +
      std::to_string(ultramem::kApiVersion) + "}";
  return info.c_str();
}

ULTRAMEM_EXPORT const char* ultramem_cpu_capability() { return ultramem::cpu::capability(); }

ULTRAMEM_EXPORT int32_t ultramem_kernel_count() {
#if defined(ULTRAMEM_WITH_CUDA)
  return ultramem::cuda::kernel_count();
#else
  return 0;
#endif
}

// Returns null, or why the attributes could not be read.
ULTRAMEM_EXPORT const char* ultramem_kernel_attributes(int32_t index,
                                                       ultramem::KernelAttributes* out) {
#if defined(ULTRAMEM_WITH_CUDA)
  const ultramem::Status status = ultramem::cuda::kernel_attributes(index, out);
  return status.ok() ? nullptr : status.message;
#else
  (void)index;
  (void)out;
  return "this build has no CUDA kernels";
#endif
}

// Of the CUDA graph that is being captured from the stream; 0 where there is none.
ULTRAMEM_EXPORT uint64_t ultramem_capture_id(void* stream) {
  uint64_t id = 0;
#if defined(ULTRAMEM_WITH_CUDA)
  if (!ultramem::cuda::capture_id(static_cast<ultramem::Stream>(stream), &id).ok()) return 0;
#else
  (void)stream;
#endif
  return id;
}

// The sizes of a product_key_topk call, as ultramem_cuda/_library.py hands them over.
struct UltramemRetrievalShape {
  int64_t num_tokens, num_keys, key_dim, num_heads, num_queries, tucker_rank, num_cores, axis_topk,
      topk, additive, dtype;
};

namespace {

ultramem::ProductKeyTopkBwdParams retrieval_params(const UltramemRetrievalShape& shape) {
  ultramem::ProductKeyTopkBwdParams params;
  params.num_tokens = shape.num_tokens;
  params.num_keys = shape.num_keys;
  params.key_dim = shape.key_dim;
  params.num_heads = static_cast<int32_t>(shape.num_heads);
  params.num_queries = static_cast<int32_t>(shape.num_queries);
  params.tucker_rank = static_cast<int32_t>(shape.tucker_rank);
  params.num_cores = static_cast<int32_t>(shape.num_cores);
  params.axis_topk = static_cast<int32_t>(shape.axis_topk);
  params.topk = static_cast<int32_t>(shape.topk);
  params.mode = shape.additive != 0 ? ultramem::ScoreMode::kAdditive : ultramem::ScoreMode::kTucker;
  params.dtype = static_cast<ultramem::DType>(shape.dtype);
  return params;
}

}  // namespace

// Name of the path that the forward takes on that compute capability (10 * major + minor); *reason
// says why.
ULTRAMEM_EXPORT const char* ultramem_product_key_topk_fwd_path(const UltramemRetrievalShape* shape,
                                                               int32_t compute_capability,
                                                               const char** reason) {
  switch (ultramem::cuda::product_key_topk_fwd_path(retrieval_params(*shape), compute_capability,
                                                    reason)) {
    case ultramem::RetrievalPath::kGeneric:
      return "generic";
    case ultramem::RetrievalPath::kTensorCore90:
      return "tensor cores (sm_90)";
    case ultramem::RetrievalPath::kTensorCoreSmall:
      return "tensor cores, few tokens";
    case ultramem::RetrievalPath::kTensorCore80:
      return "tensor cores (sm_80)";
  }
  return "unknown";
}

// Bytes of scratch memory on the current device, for the backward with all gradients wanted; -1 in
// a build without CUDA kernels.
ULTRAMEM_EXPORT int64_t ultramem_product_key_topk_workspace(const UltramemRetrievalShape* shape,
                                                            int32_t backward) {
#if defined(ULTRAMEM_WITH_CUDA)
  ultramem::ProductKeyTopkBwdParams params = retrieval_params(*shape);
  if (backward == 0) {
    return static_cast<int64_t>(ultramem::cuda::product_key_topk_fwd_workspace(params));
  }
  // Null gradients are not computed; nothing is written through these.
  params.grad_query = params.grad_keys = params.grad_core = &params;
  return static_cast<int64_t>(ultramem::cuda::product_key_topk_bwd_workspace(params));
#else
  (void)shape;
  (void)backward;
  return -1;
#endif
}
