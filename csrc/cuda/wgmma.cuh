// Thin wrappers of what Hopper adds: bulk tensor copies (TMA) and warpgroup matrix products. Only
// for code compiled for sm_90a.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"

namespace ultramem::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- bulk tensor copies ------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Copies the box at (x, y, z) to shared memory; its bytes complete `barrier`.
__device__ __forceinline__ void copy_box(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                         int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same of what is wanted once.
__device__ __forceinline__ void copy_box_once(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                              int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(drop_policy())
      : "memory");
}

// The same to all blocks of the cluster in `mask`, at the same place in each; completes the barrier
// at the same place in each.
__device__ __forceinline__ void copy_box_multicast(const CUtensorMap* map, uint32_t to,
                                                   uint32_t barrier, uint16_t mask, int x, int y,
                                                   int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "h"(mask), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// A hint that the box at (x, y, z) will be wanted soon. Reads nothing as far as the order of memory
// goes.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int x, int y, int z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

// ---- warpgroup matrix products -----------------------------------------------------------------

// Describes a tile in shared memory whose rows are 64 two-byte elements of the reduced dimension,
// as a tensor map with 128-byte swizzle writes them: groups of eight rows, 1024 bytes each.
// `address` is that of the first row, a multiple of 1024, plus 32 bytes for each step of 16
// elements along a row.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kGroupStride | kUnused | ((address & 0x3ffff) >> 4);
}

// Describes a tile in shared memory whose rows are the reduced dimension, as boxes of 64 columns
// side by side, box_bytes apart: an operand that the instruction transposes. Within a box a row is
// 128 swizzled bytes. Of the two strides, the leading one (bits 16 on) leads from 64 columns to the
// next 64, box_bytes; the other (bits 32 on) from eight rows to the next eight, 1024. `address` is
// that of the first row, a multiple of 1024, plus 2048 bytes for each step of 16 rows.
__device__ __forceinline__ uint64_t transposed_tile_descriptor(uint32_t address,
                                                               uint32_t box_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupStride | uint64_t{box_bytes >> 4} << 16 | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sums are not what the instruction that names them left: none may be read before a wait. This
// keeps the compiler from moving what is done with them ahead of it.
template <int kCount>
__device__ __forceinline__ void wgmma_results(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define ULTRAMEM_FLOATS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ULTRAMEM_FLOATS_16(d, i)                                                     \
  ULTRAMEM_FLOATS_4(d, i), ULTRAMEM_FLOATS_4(d, i + 4), ULTRAMEM_FLOATS_4(d, i + 8), \
      ULTRAMEM_FLOATS_4(d, i + 12)
#define ULTRAMEM_FLOATS_32(d, i) ULTRAMEM_FLOATS_16(d, i), ULTRAMEM_FLOATS_16(d, i + 16)
#define ULTRAMEM_REGS_24                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23"
#define ULTRAMEM_REGS_32                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ULTRAMEM_REGS_36 ULTRAMEM_REGS_32 ", %32, %33, %34, %35"
#define ULTRAMEM_REGS_64                                                                    \
  ULTRAMEM_REGS_32                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define ULTRAMEM_WGMMA_48(d, a, b, accumulate, type)                                    \
  asm volatile(                                                                         \
      "{\n"                                                                             \
      ".reg .pred p;\n"                                                                 \
      "setp.ne.b32 p, %26, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type " {" ULTRAMEM_REGS_24 \
      "}, %24, %25, p, 1, 1, 0, 0;\n"                                                   \
      "}\n"                                                                             \
      : ULTRAMEM_FLOATS_16(d, 0), ULTRAMEM_FLOATS_4(d, 16), ULTRAMEM_FLOATS_4(d, 20)    \
      : "l"(a), "l"(b), "r"(accumulate))

#define ULTRAMEM_WGMMA_64(d, a, b, accumulate, type)                                    \
  asm volatile(                                                                         \
      "{\n"                                                                             \
      ".reg .pred p;\n"                                                                 \
      "setp.ne.b32 p, %34, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" ULTRAMEM_REGS_32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n"                                                   \
      "}\n"                                                                             \
      : ULTRAMEM_FLOATS_32(d, 0)                                                        \
      : "l"(a), "l"(b), "r"(accumulate))

#define ULTRAMEM_WGMMA_72(d, a, b, accumulate, type)                                    \
  asm volatile(                                                                         \
      "{\n"                                                                             \
      ".reg .pred p;\n"                                                                 \
      "setp.ne.b32 p, %38, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n72k16.f32." type "." type " {" ULTRAMEM_REGS_36 \
      "}, %36, %37, p, 1, 1, 0, 0;\n"                                                   \
      "}\n"                                                                             \
      : ULTRAMEM_FLOATS_32(d, 0), ULTRAMEM_FLOATS_4(d, 32)                              \
      : "l"(a), "l"(b), "r"(accumulate))

#define ULTRAMEM_WGMMA_128(d, a, b, accumulate, type)                                    \
  asm volatile(                                                                          \
      "{\n"                                                                              \
      ".reg .pred p;\n"                                                                  \
      "setp.ne.b32 p, %66, 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" ULTRAMEM_REGS_64 \
      "}, %64, %65, p, 1, 1, 0, 0;\n"                                                    \
      "}\n"                                                                              \
      : ULTRAMEM_FLOATS_32(d, 0), ULTRAMEM_FLOATS_32(d, 32)                              \
      : "l"(a), "l"(b), "r"(accumulate))

// d [64, N] (+)= a [64, 16] b [N, 16]^T over a warpgroup, N = 2 * kCount; d is overwritten where
// `accumulate` is 0. Thread t of warp w holds, for each group of eight columns i, in d[4i .. 4i+3]:
// row 16 w + t/4, columns 8i + 2 (t%4) and the next; then the same columns of the row eight below.
template <typename scalar_t, int kCount>
__device__ __forceinline__ void wgmma_k16(float (&d)[kCount], uint64_t a, uint64_t b,
                                          int accumulate) {
  static_assert(kCount == 24 || kCount == 32 || kCount == 36 || kCount == 64,
                "48, 64, 72 or 128 columns");
  constexpr bool kBFloat16 = sizeof(scalar_t) == 2 && !std::is_same<scalar_t, __half>::value;
  if constexpr (kCount == 24 && kBFloat16) ULTRAMEM_WGMMA_48(d, a, b, accumulate, "bf16");
  if constexpr (kCount == 24 && !kBFloat16) ULTRAMEM_WGMMA_48(d, a, b, accumulate, "f16");
  if constexpr (kCount == 32 && kBFloat16) ULTRAMEM_WGMMA_64(d, a, b, accumulate, "bf16");
  if constexpr (kCount == 32 && !kBFloat16) ULTRAMEM_WGMMA_64(d, a, b, accumulate, "f16");
  if constexpr (kCount == 36 && kBFloat16) ULTRAMEM_WGMMA_72(d, a, b, accumulate, "bf16");
  if constexpr (kCount == 36 && !kBFloat16) ULTRAMEM_WGMMA_72(d, a, b, accumulate, "f16");
  if constexpr (kCount == 64 && kBFloat16) ULTRAMEM_WGMMA_128(d, a, b, accumulate, "bf16");
  if constexpr (kCount == 64 && !kBFloat16) ULTRAMEM_WGMMA_128(d, a, b, accumulate, "f16");
}

// Begins the same over the 64 columns of two boxes, described by tile_descriptor, as one group; d
// is overwritten unless `accumulate`.
template <typename scalar_t, int kCount>
__device__ __forceinline__ void multiply_boxes(float (&d)[kCount], uint64_t a, uint64_t b,
                                               bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma_k16<scalar_t>(d, a + 2 * k, b + 2 * k, accumulate || k > 0);  // 32 bytes, by 16
  }
  wgmma_commit();
}

#define ULTRAMEM_WGMMA_REGISTERS_64(d, a, b, accumulate, type)                          \
  asm volatile(                                                                         \
      "{\n"                                                                             \
      ".reg .pred p;\n"                                                                 \
      "setp.ne.b32 p, %37, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" ULTRAMEM_REGS_32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"                                     \
      "}\n"                                                                             \
      : ULTRAMEM_FLOATS_32(d, 0)                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// The same for 64 columns, with `a` in registers: thread t of warp w holds, of its columns 2 (t%4)
// and the next, row 16 w + t/4 and the row eight below, and then those eight columns further on.
template <typename scalar_t>
__device__ __forceinline__ void wgmma_k16_registers(float (&d)[32], const uint32_t (&a)[4],
                                                    uint64_t b, int accumulate) {
  if constexpr (std::is_same<scalar_t, __half>::value) {
    ULTRAMEM_WGMMA_REGISTERS_64(d, a, b, accumulate, "f16");
  } else {
    ULTRAMEM_WGMMA_REGISTERS_64(d, a, b, accumulate, "bf16");
  }
}

#define ULTRAMEM_REGS_96                                                                    \
  ULTRAMEM_REGS_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ULTRAMEM_REGS_128                                                                      \
  ULTRAMEM_REGS_96                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

#define ULTRAMEM_WGMMA_TRANSPOSED_192(d, a, b, trans_a, type)                            \
  asm volatile(                                                                          \
      "{\n"                                                                              \
      ".reg .pred p;\n"                                                                  \
      "setp.eq.b32 p, 0, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" ULTRAMEM_REGS_96 \
      "}, %96, %97, p, 1, 1, %98, 1;\n"                                                  \
      "}\n"                                                                              \
      : ULTRAMEM_FLOATS_32(d, 0), ULTRAMEM_FLOATS_32(d, 32), ULTRAMEM_FLOATS_32(d, 64)   \
      : "l"(a), "l"(b), "n"(static_cast<int>(trans_a)))

#define ULTRAMEM_WGMMA_TRANSPOSED_256(d, a, b, trans_a, type)                             \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred p;\n"                                                                   \
      "setp.eq.b32 p, 0, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" ULTRAMEM_REGS_128 \
      "}, %128, %129, p, 1, 1, %130, 1;\n"                                                \
      "}\n"                                                                               \
      : ULTRAMEM_FLOATS_32(d, 0), ULTRAMEM_FLOATS_32(d, 32), ULTRAMEM_FLOATS_32(d, 64),   \
        ULTRAMEM_FLOATS_32(d, 96)                                                         \
      : "l"(a), "l"(b), "n"(static_cast<int>(trans_a)))

// d [64, N] += a [64, 16] b [16, N], N = 2 * kCount; b by transposed_tile_descriptor, and a, if
// kTransposedA, by that of its transposed. Threads hold parts of d as above.
template <typename scalar_t, bool kTransposedA, int kCount>
__device__ __forceinline__ void wgmma_k16_transposed(float (&d)[kCount], uint64_t a, uint64_t b) {
  static_assert(kCount == 96 || kCount == 128, "192 or 256 columns");
  constexpr bool kBFloat16 = !std::is_same<scalar_t, __half>::value;
  if constexpr (kCount == 96 && kBFloat16)
    ULTRAMEM_WGMMA_TRANSPOSED_192(d, a, b, kTransposedA, "bf16");
  if constexpr (kCount == 96 && !kBFloat16)
    ULTRAMEM_WGMMA_TRANSPOSED_192(d, a, b, kTransposedA, "f16");
  if constexpr (kCount == 128 && kBFloat16)
    ULTRAMEM_WGMMA_TRANSPOSED_256(d, a, b, kTransposedA, "bf16");
  if constexpr (kCount == 128 && !kBFloat16)
    ULTRAMEM_WGMMA_TRANSPOSED_256(d, a, b, kTransposedA, "f16");
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// A tensor map of a contiguous [depth, rows, columns] array of two-byte elements whose row and
// plane strides are given in elements; boxes are one plane of box_rows rows of 64 columns, 128-byte
// swizzled. What lies outside reads as zero.
Status make_tensor_map(CUtensorMap* map, const void* data, DType dtype, int64_t columns,
                       int64_t rows, int64_t depth, int64_t row_stride, int64_t plane_stride,
                       int box_rows);

}  // namespace ultramem::cuda
