// Vectors of the instruction set a kernel source is being compiled for, and the element types.
//
// Built on the compilers' vector extension, so that one source serves x86 and other machines; the
// few operations the extension lacks have their intrinsics here and nowhere else.
//
// Kernel sources are compiled several times with different flags and linked together. A function
// with external linkage that two of them define would be merged by the linker, and code for one
// instruction set could end up in the path of another. Hence everything in these headers sits in an
// unnamed namespace within the capability's own, and the kernels use neither containers nor inline
// functions from elsewhere.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ultramem/types.h"

#if !defined(ULTRAMEM_CPU_CAPABILITY)
#error "ULTRAMEM_CPU_CAPABILITY must name the namespace of this build: DEFAULT, AVX2 or AVX512"
#endif

#define ULTRAMEM_ALWAYS_INLINE inline __attribute__((always_inline))

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kVecRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kVecRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVecBytes = 16;
constexpr int kVecRegisters = 32;
#else
constexpr int kVecBytes = 16;
constexpr int kVecRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct AccumulationType {
  using Type = float;
};
template <>
struct AccumulationType<double> {
  using Type = double;
};
template <typename T>
using AccOf = typename AccumulationType<T>::Type;

typedef float VecF32 __attribute__((vector_size(kVecBytes)));
typedef double VecF64 __attribute__((vector_size(kVecBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));

template <typename Acc>
struct VecType;
template <>
struct VecType<float> {
  using Type = VecF32;
};
template <>
struct VecType<double> {
  using Type = VecF64;
};
template <typename Acc>
using Vec = typename VecType<Acc>::Type;

template <typename Acc>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(Acc));

template <typename T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// --- scalars

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

ULTRAMEM_ALWAYS_INLINE float to_acc(float value) { return value; }
ULTRAMEM_ALWAYS_INLINE double to_acc(double value) { return value; }
ULTRAMEM_ALWAYS_INLINE float to_acc(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_acc(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Rescaled by 2^112, which normalises subnormal numbers as well.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

template <typename T>
T from_acc(AccOf<T> value);
template <>
ULTRAMEM_ALWAYS_INLINE float from_acc<float>(float value) {
  return value;
}
template <>
ULTRAMEM_ALWAYS_INLINE double from_acc<double>(double value) {
  return value;
}
template <>
inline BFloat16 from_acc<BFloat16>(float value) {
  if (value != value) return {0x7fc0};
  const uint32_t bits = bits_of(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Float16 from_acc<Float16>(float value) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the subnormal half, rounded to even, in the low bits.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// --- loads that widen and stores that round to nearest even; no alignment is assumed

ULTRAMEM_ALWAYS_INLINE VecF32 load(const float* p) {
  VecF32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
ULTRAMEM_ALWAYS_INLINE VecF64 load(const double* p) {
  VecF64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
ULTRAMEM_ALWAYS_INLINE VecF32 load(const BFloat16* p) {
  VecU16 narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return (VecF32)(__builtin_convertvector(narrow, VecU32) << 16);
}
ULTRAMEM_ALWAYS_INLINE VecF32 load(const Float16* p) {
#if defined(__AVX512F__)
  // The masked form, for GCC 12 warns about the other's undefined source operand.
  return (VecF32)_mm512_maskz_cvtph_ps(0xffff,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VecF32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float wide[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = to_acc(p[i]);
  return load(wide);
#endif
}

ULTRAMEM_ALWAYS_INLINE void store(float* p, VecF32 v) { __builtin_memcpy(p, &v, sizeof v); }
ULTRAMEM_ALWAYS_INLINE void store(double* p, VecF64 v) { __builtin_memcpy(p, &v, sizeof v); }
ULTRAMEM_ALWAYS_INLINE void store(BFloat16* p, VecF32 v) {
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const VecU32 is_number = (VecU32)(v == v);
  const VecU16 narrow =
      __builtin_convertvector((rounded & is_number) | (0x7fc0u & ~is_number), VecU16);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
ULTRAMEM_ALWAYS_INLINE void store(Float16* p, VecF32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_acc<Float16>(v[i]);
#endif
}

// The first `count` lanes, zero beyond.
template <typename T>
inline Vec<AccOf<T>> load_partial(const T* p, int64_t count) {
  T padded[kLanes<AccOf<T>>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <typename Acc>
ULTRAMEM_ALWAYS_INLINE Vec<Acc> broadcast(Acc value) {
  return value - Vec<Acc>{};  // unlike a sum with zero, a no-op for -0 too
}

// --- across lanes

// Halves are added until one lane is left.
ULTRAMEM_ALWAYS_INLINE float sum_lanes(VecF32 v) {
#if defined(__AVX512F__)
  const auto oct = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto quad =
      __builtin_shufflevector(oct, oct, 0, 1, 2, 3) + __builtin_shufflevector(oct, oct, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const auto quad =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const VecF32 quad = v;
#endif
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}
ULTRAMEM_ALWAYS_INLINE double sum_lanes(VecF64 v) {
  double lanes[kLanes<double>];
  store(lanes, v);
  for (int half = kLanes<double> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Bit i is set where a[i] >= b[i]; a NaN compares false.
ULTRAMEM_ALWAYS_INLINE uint32_t mask_greater_equal(VecF32 a, VecF32 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<float>; ++i) mask |= static_cast<uint32_t>(a[i] >= b[i]) << i;
  return mask;
#endif
}
ULTRAMEM_ALWAYS_INLINE uint32_t mask_greater_equal(VecF64 a, VecF64 b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<double>; ++i) mask |= static_cast<uint32_t>(a[i] >= b[i]) << i;
  return mask;
}

// --- from a run-time type to a compile-time one: body is a generic lambda and gets a value of it

template <typename Body>
auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat32:
      break;
  }
  return body(float{});
}

// The same among the types that accumulate in Acc.
template <typename Acc, typename Body>
auto with_type_accumulating_in(DType dtype, const Body& body) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    return body(double{});
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        return body(BFloat16{});
      case DType::kFloat16:
        return body(Float16{});
      default:
        return body(float{});
    }
  }
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
