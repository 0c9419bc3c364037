// The last sums of dcore, which are too short for a launch of their own where another kernel has
// time for them.
#pragma once

#include "common.cuh"
#include "product_key_topk_bwd.h"

namespace ultramem::cuda {

// A warp per element sums over the slices of tokens: this warp of so many.
__device__ __forceinline__ void sum_core(const CoreSums& core, int warp, int num_warps) {
  const auto num_elements = static_cast<int>(core.num_elements());
  const int lane = threadIdx.x % kWarpSize;
  for (int element = warp; element < num_elements; element += num_warps) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t slice = lane; slice < core.num_slices; slice += kWarpSize) {
      sum += __ldcg(core.partials + slice * num_elements + element);
    }
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const int c = element / core.matrix % core.num_cores;
    const int head = element / core.matrix / core.num_cores;
    core.grad_core[(c * core.num_heads + head) * core.matrix + element % core.matrix] = sum;
  }
}

}  // namespace ultramem::cuda
