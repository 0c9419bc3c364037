// The activation of a slot's single hidden unit, and its derivative.
#pragma once

#include "ultramem/types.h"
#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

// The builtins, not the overloads of <cmath>, which are inline functions with external linkage.
ULTRAMEM_ALWAYS_INLINE float complementary_error_function(float x) { return __builtin_erfcf(x); }
ULTRAMEM_ALWAYS_INLINE double complementary_error_function(double x) { return __builtin_erfc(x); }
ULTRAMEM_ALWAYS_INLINE float exponential(float x) { return __builtin_expf(x); }
ULTRAMEM_ALWAYS_INLINE double exponential(double x) { return __builtin_exp(x); }

// The normal distribution function. Not 1 + erf, which cancels to nothing in the left tail.
template <typename Acc>
Acc normal_cdf(Acc a) {
  return Acc{0.5} * complementary_error_function(a * static_cast<Acc>(-0.7071067811865476));
}

template <typename Acc>
Acc activate(Activation activation, Acc a) {
  switch (activation) {
    case Activation::kGelu:
      return a * normal_cdf(a);
    case Activation::kRelu:
      return a < 0 ? Acc{0} : a;
    case Activation::kSilu:
      return a / (Acc{1} + exponential(-a));
    case Activation::kIdentity:
      break;
  }
  return a;
}

template <typename Acc>
Acc activation_derivative(Activation activation, Acc a) {
  switch (activation) {
    case Activation::kGelu: {
      const Acc density = static_cast<Acc>(0.3989422804014327) * exponential(Acc{-0.5} * a * a);
      return normal_cdf(a) + a * density;
    }
    case Activation::kRelu:
      return a <= 0 ? Acc{0} : Acc{1};  // 1 for NaN, so that it passes on
    case Activation::kSilu: {
      const Acc sigmoid = Acc{1} / (Acc{1} + exponential(-a));
      return sigmoid * (Acc{1} + a * (Acc{1} - sigmoid));
    }
    case Activation::kIdentity:
      break;
  }
  return Acc{1};
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
