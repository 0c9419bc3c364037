// The sparse value FFN: every retrieved slot is an FFN of inner width one (PEER, arXiv 2407.04153;
// UltraMemV2, arXiv 2508.18756, section 3).
//
//   a_s = <pre_input, pre_values[slot_s]>     h_s = act(a_s)     (h = 1 without pre-values)
//   out[group_s] += concat_c( h_s * score_{s,c} * values[slot_s, slice c] )
//
// Where a table is sharded, the two halves are of use by themselves. Without pre-values the forward
// is the second, a weighted sum of rows; with nothing but grad_scores wanted the backward without
// pre-values is the first, products <grad_out[group_s, slice c], values[slot_s, slice c]>.
#pragma once

#include "ultramem/addressing.h"
#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

// Invalid: C outside 1..4 or not dividing Dv, a float64 dtype beside another, addressing that
// addressing.h does not allow, a positive Dp without pre_values and pre_input. `out` is
// overwritten.
//
// An index out of range: on the CPU kOutOfRange, and outputs hold anything; on CUDA it contributes
// zero (check_indices finds it).
struct ValueFfnParams {
  int64_t num_tokens = 0;                         // T
  int64_t num_selected = 0;                       // S = H * M
  int64_t pre_value_dim = 0;                      // Dp, 0 without pre-values
  int64_t value_dim = 0;                          // Dv, a multiple of C
  int32_t num_cores = 1;                          // C
  bool sum_groups = true;                         // out [T, Dv]; false: out [T, E, Dv]
  bool indices_are_int64 = true;                  // else int32
  Activation activation = Activation::kIdentity;  // act; not used without pre-values
  DType table_dtype = DType::kFloat32;            // of values and pre_values
  // Of pre_input and out. "acc" below is the accumulation dtype. Either both dtypes are float64 or
  // neither is.
  DType dtype = DType::kFloat32;
  AddressingParams addressing;  // num_slots is N; E is addressing.expand

  const void* indices = nullptr;  // [T, S] int64 or int32
  // [T, S, C] acc. The backward needs none where there are no pre-values and neither grad_values
  // nor factors are wanted.
  const void* scores = nullptr;
  const void* values = nullptr;      // [N, Dv]
  const void* pre_values = nullptr;  // [N, Dp] or null
  const void* pre_input = nullptr;   // [T, Dp] or null
  // [1] or null for 1, read by the kernels: values and pre_values stand for their products with
  // these.
  const double* value_scale = nullptr;
  const double* pre_value_scale = nullptr;

  void* out = nullptr;             // [T, Dv] or [T, E, Dv]
  void* pre_activation = nullptr;  // [T, S] acc: a, saved for the backward; null without pre-values

  void* workspace = nullptr;  // value_ffn_fwd_workspace(params) bytes
};

// Reads the inputs and pre_activation of the forward, not `out`. Null gradients are not computed;
// others are overwritten, but for those of the tables. For gradients of the tables T * S must be
// below 2^32 and their rows together of at most 2^21 elements, on the CPU neither. Sums are in a
// fixed order, which no atomics decide.
struct ValueFfnBwdParams : ValueFfnParams {
  const void* grad_out = nullptr;  // like out
  void* grad_scores = nullptr;     // [T, S, C] acc
  void* grad_pre_input = nullptr;  // [T, Dp] or null
  // Gradients of the tables: dense [N, Dv] and [N, Dp]. Rows that no token retrieved are left as
  // they are (so the caller zeroes a fresh gradient); touched rows are overwritten with their sum,
  // rounded once, or, with accumulate, have it added. Not offered where there are scales.
  void* grad_values = nullptr;
  void* grad_pre_values = nullptr;
  DType grad_table_dtype = DType::kFloat32;
  bool accumulate = false;
  void* grad_a = nullptr;  // [T, S] acc: da; null: not wanted (always null without pre-values)
};

}  // namespace ULTRAMEM_API

namespace cpu ULTRAMEM_PUBLIC {
size_t value_ffn_fwd_workspace(const ValueFfnParams& params, const Executor& executor);
Status value_ffn_fwd(const ValueFfnParams& params, const Executor& executor);
size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params, const Executor& executor);
Status value_ffn_bwd(const ValueFfnBwdParams& params, const Executor& executor);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
// Sets *index_error (on the device, zeroed by the caller) to 1 where an index is out of range.
// Reads only indices and addressing of the parameters.
Status check_indices(const ValueFfnParams& params, int32_t* index_error, Stream stream);
size_t value_ffn_fwd_workspace(const ValueFfnParams& params);
Status value_ffn_fwd(const ValueFfnParams& params, Stream stream);
size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params);
Status value_ffn_bwd(const ValueFfnBwdParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
