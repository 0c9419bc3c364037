// The query projection with its norm for few tokens:
//   query = RMSNorm_Kd(x W^T),  the norm over each segment of Kd outputs (side, head, query)
//
// For many tokens, on the CPU, and on other GPUs the projection is a matrix product like any other,
// which this library leaves to others (BLAS, cuBLAS): query = rms_norm(x W^T) with num_rows =
// T * num_segments and dim = Kd, from rms_norm.h.
#pragma once

#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

inline constexpr int kTuckerQuerySmallTokens = 64;
// Elements of the weight beyond which the forward is faster as tucker_query_project and rms_norm,
// where that is offered, than as one kernel: the longer the product takes, the more it matters that
// all multiprocessors have a part in it.
inline constexpr int64_t kTuckerQuerySmallWeight = int64_t{1} << 21;

// Rows of the weight, and segments of a query, are ordered side, head, query.
struct TuckerQueryParams {
  int64_t num_tokens = 0;    // T
  int64_t d_model = 0;       // D
  int64_t num_segments = 0;  // 2 H Q
  int64_t key_dim = 0;       // Kd
  double eps = 1e-6;
  DType dtype = DType::kFloat32;       // of everything but norm_weight
  DType norm_dtype = DType::kFloat32;  // of norm_weight and its gradient: `dtype` or kFloat32

  const void* x = nullptr;            // [T, D]
  const void* weight = nullptr;       // [2 H Q Kd, D]
  const void* norm_weight = nullptr;  // [Kd]
  void* query = nullptr;              // [T, 2, H, Q, Kd]
  void* projection = nullptr;         // [T, 2 H Q Kd], what was normalised: for the backward
};

// Reads x, weight, norm_weight and projection of the forward; `query` is not read.
struct TuckerQueryBwdParams : TuckerQueryParams {
  const void* grad_query = nullptr;  // [T, 2, H, Q, Kd]
  void* grad_x = nullptr;            // [T, D], or null where it is not wanted
  void* grad_weight = nullptr;       // [2 H Q Kd, D], or null
  void* grad_norm_weight = nullptr;  // [Kd]
  void* workspace = nullptr;         // tucker_query_small_bwd_workspace(params) bytes
};

}  // namespace ULTRAMEM_API

namespace cuda ULTRAMEM_PUBLIC {
// One kernel that reads the weight once. Offered where `supported` says so on the current device:
// compute capability 9.0, bfloat16 or float16, 1 to kTuckerQuerySmallTokens tokens, 16-byte aligned
// rows, and shapes that fit shared memory.
// `supported` looks at sizes, dtypes and the alignment of the pointers, which must be set. Calls of
// what is not supported return kInvalidArgument.
bool tucker_query_small_fwd_supported(const TuckerQueryParams& params);
Status tucker_query_small_fwd(const TuckerQueryParams& params, Stream stream);

// projection = x W^T alone, for 1 to kTuckerQuerySmallTokens tokens; the norm is left to rms_norm.
// Offered where `supported` says so on the current device: compute capability 9.0 and a library
// with code for sm_90a, bfloat16 or float16, 16-byte aligned rows, an even number of those of the
// weight. `query`, norm_weight and eps are not read.
bool tucker_query_project_supported(const TuckerQueryParams& params);
Status tucker_query_project(const TuckerQueryParams& params, Stream stream);

// One kernel that reads the weight and writes its gradient once, with the norm's in one of its own
// ahead of it for more than 32 tokens. Offered as the forward is; needs whole 16-byte vectors in
// key_dim as well, no more than 1024 of it, and at most 16 segments.
bool tucker_query_small_bwd_supported(const TuckerQueryBwdParams& params);
size_t tucker_query_small_bwd_workspace(const TuckerQueryBwdParams& params);
Status tucker_query_small_bwd(const TuckerQueryBwdParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
