// Loads from and stores to shared memory that is named by its 32-bit address.
#pragma once

#include "common.cuh"

namespace ultramem::cuda {

__device__ __forceinline__ uint32_t load_shared_u16(uint32_t from) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_u16(uint32_t to, uint32_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(static_cast<uint16_t>(x)) : "memory");
}
__device__ __forceinline__ uint32_t load_shared_u32(uint32_t from) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_u32(uint32_t to, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
template <int kCount>
__device__ __forceinline__ void load_shared_floats(uint32_t from, float (&x)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "");
  if constexpr (kCount == 1) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x[0]) : "r"(from) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x[0]), "=f"(x[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(from)
                 : "memory");
  }
}
template <int kCount>
__device__ __forceinline__ void store_shared_floats(uint32_t to, const float (&x)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "");
  if constexpr (kCount == 1) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x[0]), "f"(x[1]) : "memory");
  } else {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
  }
}

}  // namespace ultramem::cuda
