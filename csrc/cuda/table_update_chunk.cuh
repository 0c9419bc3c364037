// Eight neighbouring weights, or moments, of an optimizer step: updated and rounded together.
//
// The bits are those of common/table_update_math.h. Where all eight are of usual size, a step takes
// fewer instructions here: the quotients and roots of the intrinsics without their tests for every
// element, and random rounding without those for NaN, infinity and overflow.
#pragma once

#include "fast_math.cuh"
#include "table_gradient.cuh"

namespace ultramem::cuda::table_kernels {

// Rounds to bfloat16 or float16; `usual` says that no element needs care (rounds_usually).
template <typename T>
__device__ __forceinline__ void round_stochastically(const Chunk& x, const RandomBits& random,
                                                     bool usual, PackedChunk<T>& to) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (usual) {
      auto* pairs = reinterpret_cast<uint32_t*>(to.words);
#pragma unroll
      for (int i = 0; i < kLaneColumns / 2; ++i) {
        const uint32_t low = __float_as_uint(x[2 * i]) + (random.words[i] & 0xffffu);
        const uint32_t high = __float_as_uint(x[2 * i + 1]) + (random.words[i] >> 16);
        pairs[i] = __byte_perm(low, high, 0x7632);
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    reinterpret_cast<uint16_t*>(to.words)[j] = std::is_same_v<T, __half>
                                                   ? round_to_float16(x[j], random[j])
                                                   : round_to_bfloat16(x[j], random[j]);
  }
}

// At least the largest magnitude; NaN where one is NaN.
__device__ __forceinline__ float bound(const Chunk& x) {
  float sum = fabsf(x[0]);
#pragma unroll
  for (int j = 1; j < kLaneColumns; ++j) sum += fabsf(x[j]);
  return sum;
}
// The smallest magnitude that is a number.
__device__ __forceinline__ float smallest(const Chunk& x) {
  float least = fabsf(x[0]);
#pragma unroll
  for (int j = 1; j < kLaneColumns; ++j) least = fminf(least, fabsf(x[j]));
  return least;
}
// Whether stochastic rounding to bfloat16 needs no care.
__device__ __forceinline__ bool rounds_usually(float bound) { return bound < 0x1p127f; }

// Rounded correctly for x from 2^-100 to 2^100.
__device__ __forceinline__ float usual_root(float x) {
  const float inverse = reciprocal_root_fast(x);
  const float y = x * inverse;
  return fmaf(fmaf(-y, y, x), 0.5f * inverse, y);
}
// Rounded correctly where |a|, |b| and |a / b| are from 2^-120 to 2^120 and |a| is from 2^-90 on.
__device__ __forceinline__ float usual_quotient(float a, float b) {
  float inverse = reciprocal_fast(b);
  inverse = fmaf(fmaf(-b, inverse, 1.0f), inverse, inverse);
  float y = a * inverse;
  y = fmaf(fmaf(-b, y, a), inverse, y);
  return fmaf(fmaf(-b, y, a), inverse, y);
}

// adam_update of a chunk. Returns whether all are of usual size: then the new moments are, too.
__device__ __forceinline__ bool adam_update(const UpdateScalars<float>& s, const Chunk& g,
                                            Chunk& weight, Chunk& exp_avg, Chunk& exp_avg_sq) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    adam_moments(s, g[j], &exp_avg[j], &exp_avg_sq[j]);
  }
  // root_scale is 1 at least. So the divisor is between 2^-50 and 2^51, the quotient between 2^-111
  // and 2^110.
  const bool usual = smallest(exp_avg) >= 0x1p-60f && bound(exp_avg) <= 0x1p60f &&
                     smallest(exp_avg_sq) >= 0x1p-100f && bound(exp_avg_sq) <= 0x1p60f &&
                     s.root_scale <= 0x1p20f && s.eps <= 0x1p20f;
  if (usual) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const float size = adam_size(s, usual_root(exp_avg_sq[j]));
      descend(s.keep, s.step_size, usual_quotient(exp_avg[j], size), &weight[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const float size = adam_size(s, root(exp_avg_sq[j]));
      descend(s.keep, s.step_size, div(exp_avg[j], size), &weight[j]);
    }
  }
  return usual;
}

}  // namespace ultramem::cuda::table_kernels
