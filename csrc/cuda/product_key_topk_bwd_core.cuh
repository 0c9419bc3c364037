// The last sums of dcore, which are too short for a launch of their own: the dense path makes them
// beside its buckets.
#pragma once

#include "common.cuh"
#include "product_key_topk_bwd.h"

namespace ultramem::cuda {

// A warp per element sums over the slices of tokens.
__device__ __forceinline__ void sum_core_partials(const ProductKeyTopkBwdParams& p,
                                                  const CorePartials& partials, int64_t element) {
  const int64_t num_elements = core_elements(p);  // of [H, C, R, R]
  if (element >= num_elements) return;
  const int lane = threadIdx.x % kWarpSize;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t slice = lane; slice < partials.num_slices; slice += kWarpSize) {
    sum += partials.data[slice * num_elements + element];
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const int64_t matrix = int64_t{p.tucker_rank} * p.tucker_rank;
  const int64_t c = element / matrix % p.num_cores;
  const int64_t head = element / matrix / p.num_cores;
  static_cast<float*>(p.grad_core)[(c * p.num_heads + head) * matrix + element % matrix] = sum;
}

}  // namespace ultramem::cuda
