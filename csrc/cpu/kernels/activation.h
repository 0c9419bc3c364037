// The activation of a slot's single hidden unit, and its derivative.
//
// float32 is computed in vectors: libm's functions, one element at a time, took longer than the
// products they stand between.
#pragma once

#include "ultramem/types.h"
#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

// exp(x + tail) for |tail| << 1; over- and underflows as exp does.
inline VecF32 exponential(VecF32 x, VecF32 tail) {
  x = x > 89.0f ? broadcast(89.0f) : x;
  x = x < -104.5f ? broadcast(-104.5f) : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const VecF32 shifted = x * 1.44269504f + 12582912.0f;
  const VecF32 whole = shifted - 12582912.0f;
  const VecF32 r = (x - whole * 0.693359375f) + (whole * 2.12194440e-4f + tail);
  VecF32 series = r * (1.0f / 5040) + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  // 2^whole in two factors, so that neither leaves the range of normal numbers.
  const VecI32 power = (VecI32)shifted - 0x4b400000;
  const VecI32 half = power >> 1;
  return series * (VecF32)((half + 127) << 23) * (VecF32)((power - half + 127) << 23);
}

inline VecF64 exponential(VecF64 x) {
  VecF64 result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = __builtin_exp(x[i]);
  return result;
}
inline VecF32 exponential(VecF32 x) { return exponential(x, VecF32{}); }

template <typename Acc>
struct Normal {
  Vec<Acc> cdf;
  Vec<Acc> bell;  // exp(-a^2 / 2)
};

// The left tail comes from erfc, not from 1 + erf, which cancels to nothing there.
inline Normal<float> normal(VecF32 a) {
  // erfc(x) exp(x^2) / t for t = 1 / (1 + 0.3 x), x in [0, 10.5]; fitted to 2e-8 (relative).
  constexpr float kFit[] = {0.16918745f, 0.17072333f, 0.14828922f, 0.21509718f, -0.09500747f,
                            0.54818426f, -0.5126469f, 0.48572705f, -0.1295541f};
  VecF32 magnitude = a < 0.0f ? -a : a;
  magnitude = magnitude > 15.0f ? broadcast(15.0f) : magnitude;  // where the tail is zero
  // a^2 in two parts, the first of them exact.
  const VecF32 high = (VecF32)((VecU32)magnitude & 0xfffff000u);
  const VecF32 bell =
      exponential(high * high * -0.5f, (magnitude - high) * (magnitude + high) * -0.5f);
  const VecF32 t = 1.0f / (magnitude * 0.21213203f + 1.0f);
  VecF32 fit = broadcast(kFit[8]);
  for (int i = 7; i >= 0; --i) fit = fit * t + kFit[i];
  const VecF32 tail = fit * t * bell * 0.5f;
  return {a < 0.0f ? tail : 1.0f - tail, bell};
}

inline Normal<double> normal(VecF64 a) {
  Normal<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    result.cdf[i] = 0.5 * __builtin_erfc(a[i] * -0.7071067811865476);
    result.bell[i] = __builtin_exp(-0.5 * a[i] * a[i]);
  }
  return result;
}

// hidden = act(a), derivative = act'(a) unless null. The arrays are padded to whole vectors.
template <typename Acc>
void activate(Activation activation, const Acc* a, int64_t count, Acc* hidden, Acc* derivative) {
  constexpr int kW = kLanes<Acc>;
  const auto each = [&](const auto& function) {
    for (int64_t i = 0; i < count; i += kW) {
      Vec<Acc> slope;
      store(hidden + i, function(load(a + i), &slope));
      if (derivative != nullptr) store(derivative + i, slope);
    }
  };
  const Vec<Acc> zero = {}, one = broadcast(Acc{1});
  switch (activation) {
    case Activation::kGelu:
      each([&](Vec<Acc> x, Vec<Acc>* slope) {
        const Normal<Acc> n = normal(x);
        *slope = n.cdf + x * (n.bell * static_cast<Acc>(0.3989422804014327));
        return x * n.cdf;
      });
      break;
    case Activation::kRelu:
      each([&](Vec<Acc> x, Vec<Acc>* slope) {
        *slope = x <= zero ? zero : one;  // 1 for NaN, so that it passes on
        return x < zero ? zero : x;
      });
      break;
    case Activation::kSilu:
      each([&](Vec<Acc> x, Vec<Acc>* slope) {
        const Vec<Acc> divisor = one + exponential(-x), sigmoid = one / divisor;
        *slope = sigmoid * (one + x * (one - sigmoid));
        return x / divisor;
      });
      break;
    case Activation::kIdentity:
      each([&](Vec<Acc> x, Vec<Acc>* slope) {
        *slope = one;
        return x;
      });
      break;
  }
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
