// Entries of dS in buckets of 64 tokens by 64 keys, for the kernels that make them and those that
// unfold them.
#pragma once

#include "common.cuh"

namespace ultramem::cuda {

inline constexpr int kBucketSize = 64;  // tokens, and keys

// A bucket unfolded: tokens by keys of two bytes, in rows whose 16-byte pieces are swizzled as
// wgmma takes them.
inline constexpr int kBucketRowBytes = 2 * kBucketSize;
__device__ __forceinline__ uint32_t bucket_offset(uint32_t token, uint32_t key) {
  return token * kBucketRowBytes + (2 * key ^ token % 8 * 16);
}

// An entry is its value, rounded, in the upper half; below it where the unfolded bucket has it.
__device__ __forceinline__ uint32_t pack_entry(uint16_t value, uint32_t token, uint32_t key) {
  return static_cast<uint32_t>(value) << 16 | bucket_offset(token, key);
}

// counts [num_counts + 1] becomes its exclusive sums. By one warp.
__device__ __forceinline__ void exclusive_sums(uint32_t* counts, int num_counts, int lane) {
  uint32_t total = 0;
#pragma unroll 1
  for (int base = 0; base < num_counts; base += kWarpSize) {
    const int i = base + lane;
    const uint32_t count = i < num_counts ? counts[i] : 0;
    uint32_t sum = count;
#pragma unroll
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      const uint32_t below = __shfl_up_sync(kFullMask, sum, delta);
      if (lane >= delta) sum += below;
    }
    if (i < num_counts) counts[i] = total + sum - count;
    total += __shfl_sync(kFullMask, sum, kWarpSize - 1);
  }
  if (lane == 0) counts[num_counts] = total;
}

}  // namespace ultramem::cuda
