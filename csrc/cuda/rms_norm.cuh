// The backward of the RMS norm in its two halves, for operators that have other work to put into
// the launch of the second.
#pragma once

#include "common.cuh"
#include "ultramem/rms_norm.h"

namespace ultramem::cuda {

// Whether rows can be read in 16-byte vectors and fit the registers of a warp.
bool rms_norm_is_vectorised(const RmsNormParams& params);
bool rms_norm_is_vectorised(const RmsNormBwdParams& params);

// How many partial sums of grad_weight the rows leave. Vectorised rows only.
int64_t rms_norm_bwd_num_partials(const RmsNormBwdParams& params);

// grad_x and partial_sums [num_partials, dim] of grad_weight, to be added in their order; either
// may be null. Vectorised rows only; reads neither grad_weight nor workspace. A kernel launched
// behind it as its programmatic dependent may begin early.
Status rms_norm_bwd_rows(const RmsNormBwdParams& params, float* partial_sums, Stream stream);

}  // namespace ultramem::cuda
