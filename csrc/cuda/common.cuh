// What every CUDA kernel file shares: status plumbing, element conversions, warp reductions and
// the switch from runtime dtypes to template arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "ultramem/types.h"

namespace ultramem::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  const StatusCode code =
      error == cudaErrorMemoryAllocation ? StatusCode::kOutOfMemory : StatusCode::kCudaError;
  return {code, static_cast<int32_t>(error), cudaGetErrorString(error)};
}

// After every launch. Clears the error, so that one bad launch does not fail the next operator.
inline Status launch_status() { return to_status(cudaGetLastError()); }

#define ULTRAMEM_RETURN_IF_ERROR(expr)         \
  do {                                         \
    const ::ultramem::Status status_ = (expr); \
    if (!status_.ok()) return status_;         \
  } while (0)

#define ULTRAMEM_CUDA_RETURN_IF_ERROR(expr) \
  ULTRAMEM_RETURN_IF_ERROR(::ultramem::cuda::to_status(expr))

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether 16 bytes can be loaded at once from there.
inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Workspaces are carved into 256-byte aligned pieces.
constexpr size_t align_up(size_t bytes) { return (bytes + 255) & ~size_t{255}; }

// The 32-bit address of something in shared memory, as PTX takes it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements of a small argument whose dtype is not worth a template argument. Loading and converting
// are apart, so that other requests can go out between the two.
__device__ __forceinline__ uint32_t load_bits(const void* elements, DType dtype, int64_t i) {
  return dtype == DType::kFloat32 ? static_cast<const uint32_t*>(elements)[i]
                                  : static_cast<const uint16_t*>(elements)[i];
}

__device__ __forceinline__ float bits_to_float(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat16) {
    __half x;
    memcpy(&x, &bits, sizeof(x));
    return to_float(x);
  }
  // The upper half of a float is a bfloat16.
  const uint32_t float_bits = dtype == DType::kBFloat16 ? bits << 16 : bits;
  float x;
  memcpy(&x, &float_bits, sizeof(x));
  return x;
}

__device__ __forceinline__ void store_element(void* elements, DType dtype, int64_t i, float x) {
  if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(elements)[i] = from_float<__nv_bfloat16>(x);
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(elements)[i] = from_float<__half>(x);
  } else {
    static_cast<float*>(elements)[i] = x;
  }
}

// Every lane ends with the same sum, added in the same order on every run.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(kFullMask, x, delta);
  return x;
}

// Over four neighbouring lanes.
__device__ __forceinline__ uint32_t quad_sum(uint32_t x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

// The warp of a thread, as a number that the compiler knows to be the same in all lanes: addresses
// that depend on it take no registers of the lanes'.
__device__ __forceinline__ int warp_of(int thread) {
  return __shfl_sync(kFullMask, thread / kWarpSize, 0);
}

// Of the lanes up to this one.
__device__ __forceinline__ int warp_scan_inclusive(int x) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    // The shuffle tells by itself whether there is such a lane.
    asm volatile(
        "{\n"
        ".reg .pred inside;\n"
        ".reg .b32 other;\n"
        "shfl.sync.up.b32 other|inside, %0, %1, 0, -1;\n"
        "@inside add.s32 %0, %0, other;\n"
        "}\n"
        : "+r"(x)
        : "r"(delta));
  }
  return x;
}

// Of the lanes before this one; all of them in *total.
__device__ __forceinline__ int warp_scan_exclusive(int x, int* total) {
  const int sum = warp_scan_inclusive(x);
  *total = __shfl_sync(kFullMask, sum, kWarpSize - 1);
  return sum - x;
}

// A number as an unsigned integer of the same order: -0 equals +0.
__device__ __forceinline__ uint32_t sortable_number(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 + 0 = +0
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
// The same for every float: NaN lies below -inf.
__device__ __forceinline__ uint32_t sortable(float x) { return x != x ? 0u : sortable_number(x); }

inline constexpr uint32_t kInfinityBits = 0x7f800000u;

// Calls the lambda with `scalar_t` bound to the element type of a CUDA tensor. The only place
// where a runtime dtype becomes a template argument.
#define ULTRAMEM_DISPATCH_DTYPE(dtype, scalar_t, ...)                                      \
  [&]() -> ::ultramem::Status {                                                            \
    switch (dtype) {                                                                       \
      case ::ultramem::DType::kFloat32: {                                                  \
        using scalar_t = float;                                                            \
        return __VA_ARGS__();                                                              \
      }                                                                                    \
      case ::ultramem::DType::kBFloat16: {                                                 \
        using scalar_t = __nv_bfloat16;                                                    \
        return __VA_ARGS__();                                                              \
      }                                                                                    \
      case ::ultramem::DType::kFloat16: {                                                  \
        using scalar_t = __half;                                                           \
        return __VA_ARGS__();                                                              \
      }                                                                                    \
      default:                                                                             \
        return ::ultramem::Status::invalid_argument("float64 is offered on the CPU only"); \
    }                                                                                      \
  }()

}  // namespace ultramem::cuda
