// Product-key retrieval with Tucker-decomposed scores (UltraMem, arXiv 2411.12364, section 3;
// additive mode: product keys, arXiv 1907.05242).
//
//   S_row[r,i] = <query[0,r], keys[0,r,i]>     S_col[s,j] = <query[1,s], keys[1,s,j]>
//   I_row = top-m of u.S_row                   I_col = top-m of t.S_col
//   score_c[i,j] = S_row[:,i]^T core_c S_col[:,j]
//   kept  = top-M of sum_c score_c over I_row x I_col;  index = row * n + col
//
// Additive mode: R = C = 1, the axes are ranked by S themselves, score = S_row[i] + S_col[j].
//
// Order, on every backend: descending rank; equal ranks (-0 equals +0) by the lower index (the key
// on an axis, row * n + col in the grid); NaN below -inf.
#pragma once

#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

enum class ScoreMode : int32_t { kTucker = 0, kAdditive = 1 };

// The kernels that the forward runs on a GPU.
enum class RetrievalPath : int32_t {
  kGeneric = 0,          // scores by FMAs in float32: every shape, and exact for float32 inputs
  kTensorCore90 = 1,     // scores by the tensor cores of compute capability 9.0
  kTensorCoreSmall = 2,  // for few tokens, by those of 8.0 and later, long keys on 9.0 by its own:
                         // all scores of a call are kept, in the L2 cache as a rule
  kTensorCore80 = 3,     // for many tokens, by those of 8.0 and later
};

// What all but kGeneric take, of bfloat16 and float16; query and keys at addresses that are
// multiples of 16, too, or else the generic kernels run.
inline constexpr int64_t kTensorCoreMaxKeyDim = 1024;
inline constexpr int64_t kTensorCoreKeyDimMultiple = 8;  // rows of 16 bytes
inline constexpr int64_t kTensorCore90MaxKeys = 8192;
// kTensorCoreSmall: up to so many tokens times heads, keys, and bytes of scores (4 for each token,
// head, side, rank and key).
inline constexpr int64_t kTensorCoreSmallTokenHeads = 1024;
inline constexpr int64_t kTensorCoreSmallMaxKeys = 8192;
inline constexpr int64_t kTensorCoreSmallBytes = int64_t{32} << 20;
// kTensorCore80: what kTensorCore90 and kTensorCoreSmall do not take. From so many tokens times
// heads on: of fewer, each has a block for either side in the generic kernels.
inline constexpr int64_t kTensorCore80MaxKeys = 65536;
inline constexpr int64_t kTensorCore80MinTokenHeads = 64;

// Invalid: sizes outside what is noted beside them, another rank than 1 or more cores than one in
// additive mode, and, in Tucker mode, a null core and, of the forward, a null u or t, unless both
// are and own_filter is not. Additive mode finds the M best sums only with axis_topk >= min(topk,
// n); less is the caller's choice. All outputs of the forward are written; the backward reads the
// last three of them.
struct ProductKeyTopkParams {
  int64_t num_tokens = 0;   // T
  int64_t num_keys = 0;     // n, per side, below 2^31
  int64_t key_dim = 0;      // Kd
  int32_t num_heads = 1;    // H
  int32_t num_queries = 1;  // Q: 1 (shared by the ranks) or R
  int32_t tucker_rank = 1;  // R <= kMaxTuckerRank
  int32_t num_cores = 1;    // C <= kMaxNumCores
  int32_t axis_topk = 0;    // m <= min(n, kMaxAxisTopk)
  int32_t topk = 0;         // M <= min(m * m, kMaxTopk)
  ScoreMode mode = ScoreMode::kTucker;
  DType dtype = DType::kFloat32;  // of query and keys; "acc" below is its accumulation dtype

  const void* query = nullptr;  // [T, 2, H, Q, Kd]
  const void* keys = nullptr;   // [H, 2, R, n, Kd]
  const void* core = nullptr;   // [C, H, R, R] acc; null in additive mode
  // From tucker_filter, [H, R] acc; null in additive mode and where own_filter is given.
  const void* u = nullptr;
  const void* t = nullptr;
  // [2, H, R] acc: where u and t are null, the forward computes both, like tucker_filter, and
  // leaves them here. On a GPU that takes less time than to do so ahead of it.
  void* own_filter = nullptr;

  void* scores = nullptr;             // [T, H, M, C] acc, in descending order of their sums
  int64_t* indices = nullptr;         // [T, H, M], row * n + col
  int32_t* axis_indices = nullptr;    // [T, H, 2, m], the kept key ids, ascending
  void* axis_scores = nullptr;        // [T, H, 2, R, m] acc, S at the kept keys
  int16_t* grid_positions = nullptr;  // [T, H, M], i * m + j into the kept keys

  void* workspace = nullptr;  // product_key_topk_fwd_workspace(params) bytes
};

// Reads query, keys, core, axis_indices, axis_scores and grid_positions of the forward; writes no
// output of it. Selection is not differentiated. Null gradients are not computed, others are
// overwritten. What lies where grad_query goes is scratch memory until the end. T * H * 2 * m must
// be below 2^32. On the CPU, kOutOfRange for axis_indices or grid_positions that no forward wrote.
//
// What is not finite stays with the tokens and keys that hold it: an infinite or NaN dS, query or
// key spoils the gradients of that token and of the keys in its pairs, may spoil those of other
// keys that it kept, and no other. The CUDA backward, where it uses tensor cores, makes all of a
// spoiled row NaN, and may take a query for not finite where all scores of a rank at the kept keys
// are infinite or NaN.
struct ProductKeyTopkBwdParams : ProductKeyTopkParams {
  const void* grad_scores = nullptr;  // [T, H, M, C] acc
  void* grad_query = nullptr;         // like query
  void* grad_keys = nullptr;          // like keys
  void* grad_core = nullptr;          // like core; null in additive mode
};

}  // namespace ULTRAMEM_API

namespace cpu ULTRAMEM_PUBLIC {
size_t product_key_topk_fwd_workspace(const ProductKeyTopkParams& params, const Executor& executor);
Status product_key_topk_fwd(const ProductKeyTopkParams& params, const Executor& executor);
size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params,
                                      const Executor& executor);
Status product_key_topk_bwd(const ProductKeyTopkBwdParams& params, const Executor& executor);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
// The path that the forward takes for these sizes and this dtype: the one place of that rule. Reads
// no pointer and needs no device. compute_capability is 10 * major + minor; where reason is not
// null, *reason becomes static text that says why.
RetrievalPath product_key_topk_fwd_path(const ProductKeyTopkParams& params, int compute_capability,
                                        const char** reason = nullptr);
size_t product_key_topk_fwd_workspace(const ProductKeyTopkParams& params);
// Whether the forward of few tokens is faster as one call than by its halves below. Reads where
// query and keys are, and what the current device is.
bool product_key_topk_fwd_joined(const ProductKeyTopkParams& params);
// Runs on the path above, with the compute capability of the current device.
Status product_key_topk_fwd(const ProductKeyTopkParams& params, Stream stream);
// Its two halves, one after the other on a stream. The first leaves axis_indices, axis_scores and
// own_filter, where that is to be computed; the second needs no workspace, whose memory may be that
// of scores, indices and grid_positions, which the first does not touch.
Status product_key_topk_fwd_axes(const ProductKeyTopkParams& params, Stream stream);
Status product_key_topk_fwd_grid(const ProductKeyTopkParams& params, Stream stream);
size_t product_key_topk_bwd_workspace(const ProductKeyTopkBwdParams& params);
Status product_key_topk_bwd(const ProductKeyTopkBwdParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
