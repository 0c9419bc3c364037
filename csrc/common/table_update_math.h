// One optimizer step on one weight, stochastic rounding and its random numbers: the same operations
// in the same order on host and device.
//
// No operation may be contracted to a fused multiply-add: device code says so with intrinsics, host
// code that includes this file is compiled with -ffp-contract=off. Internal linkage throughout, for
// the reason given in csrc/cpu/kernels/vec.h.
#pragma once

#include <cstdint>

#include "ultramem/table_update.h"

#if defined(__CUDACC__)
#define ULTRAMEM_UPDATE_FUNCTION __host__ __device__ __forceinline__
#else
#define ULTRAMEM_UPDATE_FUNCTION inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define ULTRAMEM_UPDATE_UNROLL _Pragma("unroll")
#else
#define ULTRAMEM_UPDATE_UNROLL
#endif

namespace ultramem {
namespace {

// --- arithmetic, each operation rounded to nearest

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double div(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double root(double a) { return __dsqrt_rn(a); }
#else
ULTRAMEM_UPDATE_FUNCTION float add(float a, float b) { return a + b; }
ULTRAMEM_UPDATE_FUNCTION float mul(float a, float b) { return a * b; }
ULTRAMEM_UPDATE_FUNCTION float div(float a, float b) { return a / b; }
ULTRAMEM_UPDATE_FUNCTION float root(float a) { return __builtin_sqrtf(a); }
ULTRAMEM_UPDATE_FUNCTION double add(double a, double b) { return a + b; }
ULTRAMEM_UPDATE_FUNCTION double mul(double a, double b) { return a * b; }
ULTRAMEM_UPDATE_FUNCTION double div(double a, double b) { return a / b; }
ULTRAMEM_UPDATE_FUNCTION double root(double a) { return __builtin_sqrt(a); }
#endif

ULTRAMEM_UPDATE_FUNCTION uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// --- what a step needs of the hyperparameters

template <typename Acc>
struct UpdateScalars {
  Acc grad_scale;  // of the gradient
  Acc rescale;     // of all weights, before the step: a power of two, or 1
  Acc keep;        // of the weight: 1 - lr * weight_decay; 1 where a scale decays
  Acc step_size;   // Adam: lr / (1 - beta1^step); else lr; of a scaled table, over the scale
  Acc one_minus_beta1, beta2, one_minus_beta2;
  Acc root_scale;  // 1 / sqrt(1 - beta2^step)
  Acc eps;
  uint32_t step;  // counter of the random numbers
  uint32_t skip;  // nothing is to change
};

// Without decay a scale stays as it is, and no kernel need look at it.
ULTRAMEM_UPDATE_FUNCTION bool decays_scale(const TableUpdateParams& p) {
  return p.scale != nullptr && p.weight_decay != 0;
}

// x^n by squaring: products alone, so that every backend gets the same bits.
ULTRAMEM_UPDATE_FUNCTION double power(double x, uint32_t n) {
  double result = 1;
  for (; n != 0; n >>= 1) {
    if (n & 1) result = mul(result, x);
    x = mul(x, x);
  }
  return result;
}

// Multiplies the table's scale by `keep` and brings it back where it has become small. Returns what
// all weights are to be multiplied by in turn: a power of two, so that only subnormal numbers
// round.
ULTRAMEM_UPDATE_FUNCTION double decay_scale(double keep, double* table_scale) {
  double scale = mul(*table_scale, keep), rescale = 1;
  for (; scale > 0 && scale < kMinTableScale; scale = div(scale, kMinTableScale)) {
    rescale = mul(rescale, kMinTableScale);
  }
  *table_scale = scale;
  return rescale;
}

// Counts the step and decays the table's scale, unless there is no step: found_inf says so, or
// nothing would be left of the scale, which could never come back, or it would grow.
template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION UpdateScalars<Acc> prepare_update(const TableUpdateParams& p) {
  UpdateScalars<Acc> s;
  double lr = p.learning_rate;
  if (p.lr != nullptr) lr = mul(lr, static_cast<double>(*p.lr));
  double keep = add(1.0, -mul(lr, p.weight_decay));
  s.skip = (p.found_inf != nullptr && *p.found_inf != 0.0f) ||
           (decays_scale(p) && !(keep > 0 && keep <= 1));
  const float step = s.skip ? *p.step : *p.step + 1.0f;
  *p.step = step;
  s.step = static_cast<uint32_t>(step);

  double scale = 1;
  if (p.grad_scale != nullptr) scale = *p.grad_scale;
  if (p.loss_scale != nullptr) scale = div(scale, static_cast<double>(*p.loss_scale));
  const bool adam = p.optimizer == TableOptimizer::kAdam;
  const double correction1 = adam ? add(1.0, -power(p.beta1, s.step)) : 1.0;
  const double correction2 = adam ? add(1.0, -power(p.beta2, s.step)) : 1.0;
  double step_size = div(lr, correction1), rescale = 1;
  if (p.scale != nullptr) {
    if (decays_scale(p) && !s.skip) rescale = decay_scale(keep, p.scale);
    step_size = div(step_size, *p.scale);
    keep = 1;
  }
  s.grad_scale = static_cast<Acc>(scale);
  s.rescale = static_cast<Acc>(rescale);
  s.keep = static_cast<Acc>(keep);
  s.step_size = static_cast<Acc>(step_size);
  s.one_minus_beta1 = static_cast<Acc>(add(1.0, -p.beta1));
  s.beta2 = static_cast<Acc>(p.beta2);
  s.one_minus_beta2 = static_cast<Acc>(add(1.0, -p.beta2));
  const double root_scale = div(1.0, root(correction2));
  s.root_scale = static_cast<Acc>(root_scale);
  s.eps = static_cast<Acc>(p.eps_before_correction ? mul(p.eps, root_scale) : p.eps);
  return s;
}

// --- one weight; g is scaled already

template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION void adam_moments(const UpdateScalars<Acc>& s, Acc g, Acc* exp_avg,
                                           Acc* exp_avg_sq) {
  *exp_avg = add(*exp_avg, mul(s.one_minus_beta1, add(g, -*exp_avg)));
  *exp_avg_sq = add(mul(s.beta2, *exp_avg_sq), mul(mul(s.one_minus_beta2, g), g));
}

// What exp_avg is divided by.
template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION Acc adam_size(const UpdateScalars<Acc>& s, Acc root_of_exp_avg_sq) {
  return add(mul(root_of_exp_avg_sq, s.root_scale), s.eps);
}

template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION void descend(Acc keep, Acc step_size, Acc direction, Acc* weight) {
  *weight = add(mul(*weight, keep), -mul(step_size, direction));
}

template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION void adam_update(const UpdateScalars<Acc>& s, Acc g, Acc* weight,
                                          Acc* exp_avg, Acc* exp_avg_sq) {
  adam_moments(s, g, exp_avg, exp_avg_sq);
  const Acc size = adam_size(s, root(*exp_avg_sq));
  descend(s.keep, s.step_size, div(*exp_avg, size), weight);
}

// What Adagrad adds to a run's row's sum: the mean of the scaled gradient's squares over the whole
// row. sum_sq: of the scaled gradient's row, taken where the parameters give no row_sq.
template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION Acc adagrad_mean_sq(const TableUpdateParams& p,
                                             const UpdateScalars<Acc>& s, int64_t run, Acc sum_sq) {
  if (p.row_sq != nullptr) {
    // The scale twice, for its square may be too small for a float.
    sum_sq = mul(mul(static_cast<const Acc*>(p.row_sq)[run], s.grad_scale), s.grad_scale);
  }
  const int64_t columns = p.row_columns != 0 ? p.row_columns : p.gradient.dim;
  return div(sum_sq, static_cast<Acc>(columns));
}

// The row's new sum becomes *row_sum.
template <typename Acc>
ULTRAMEM_UPDATE_FUNCTION Acc adagrad_step_size(const UpdateScalars<Acc>& s, Acc mean_sq,
                                               Acc* row_sum) {
  *row_sum = add(*row_sum, mean_sq);
  return div(s.step_size, add(root(*row_sum), s.eps));
}

// The columns of a row belong to row_lanes lanes, 8 neighbours each, again and again. A lane adds
// the squares of its columns from left to right; then neighbours at distance row_lanes / 2, .., 1
// are added.
constexpr int kLaneColumns = 8;
constexpr int kMaxRowLanes = 32;
// 8 neighbours of which a GPU's lane holds at once.
constexpr int kLaneChunks = 3;

ULTRAMEM_UPDATE_FUNCTION int row_lanes(int64_t dim) {
  int lanes = 8;
  while (lanes < kMaxRowLanes && lanes * kLaneChunks * kLaneColumns < dim) lanes *= 2;
  return lanes;
}

// --- random numbers

enum class RoundedTensor : uint32_t { kWeight = 0, kExpAvg = 1, kExpAvgSq = 2 };

// 16 bits for each of kLaneColumns columns, from the first on which is a multiple of that. Rows and
// columns are those of the whole table.
struct RandomBits {
  uint32_t words[kLaneColumns / 2];
  ULTRAMEM_UPDATE_FUNCTION uint32_t operator[](int i) const {
    return words[i / 2] >> (16 * (i % 2)) & 0xffffu;
  }
};

// Philox4x32 (Salmon et al., SC 2011) with 7 rounds, which passes BigCrush.
ULTRAMEM_UPDATE_FUNCTION RandomBits random_bits(uint64_t seed, uint32_t stream,
                                                RoundedTensor tensor, uint32_t step, uint32_t row,
                                                uint32_t column) {
  uint32_t c0 = row, c1 = column / kLaneColumns, c2 = step;
  uint32_t c3 = stream * 4 + static_cast<uint32_t>(tensor);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  ULTRAMEM_UPDATE_UNROLL
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// --- stochastic rounding: up with the probability of the fraction that is dropped. A number that
// is representable stays; NaN and infinity stay; a finite number never becomes infinite within an
// ulp above the largest one.

// Exact: 16 random bits against the 16 that are dropped.
ULTRAMEM_UPDATE_FUNCTION uint16_t round_to_bfloat16(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) {
    return magnitude > 0x7f800000u ? 0x7fc0 : static_cast<uint16_t>(bits >> 16);
  }
  const uint32_t rounded = (bits + random) >> 16;
  return static_cast<uint16_t>((rounded & 0x7fffu) == 0x7f80u ? rounded - 1 : rounded);
}

ULTRAMEM_UPDATE_FUNCTION uint16_t round_to_float16(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // from 65536 on
    rounded = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // from 2^-14 on: 13 bits are dropped
    rounded = (magnitude - 0x38000000u + (random & 0x1fffu)) >> 13;
    if (rounded == 0x7c00u) rounded = 0x7bffu;
  } else {  // in units of 2^-24 * 2^-16, what lies below is lost
    const float size = mul(x < 0 ? -x : x, 0x1p40f);
    rounded = (static_cast<uint32_t>(size) + random) >> 16;
  }
  return static_cast<uint16_t>(sign | rounded);
}

}  // namespace
}  // namespace ultramem
