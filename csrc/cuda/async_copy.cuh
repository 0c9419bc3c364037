// Copies from global to shared memory that run while the thread goes on, and kernels that begin
// while the one ahead of them runs.
#pragma once

#include "common.cuh"

namespace ultramem::cuda {

// 16 bytes, or 16 zero bytes where not `valid`; `global` is then not read. The rest of its line of
// 128 bytes is on its way to the L2 cache as well: neighbours want it soon.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(source_bytes)
      : "memory");
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until all but the thread's last kPending groups have arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Programmatic dependent launch. A kernel that is launched that way may begin before the one ahead
// of it in the stream has ended, once all blocks of that have called `release_dependent_grid`; what
// that one writes is there after `wait_for_prerequisite_grid`. Neither does anything otherwise.
__device__ __forceinline__ void release_dependent_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_prerequisite_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// One thread initialises a barrier and announces the bytes that bulk copies will bring.
__device__ __forceinline__ void mbarrier_expect_once(uint64_t* barrier, uint32_t bytes) {
  const uint32_t address = shared_address(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address), "r"(bytes)
               : "memory");
}

// A multiple of 16 bytes between 16-byte aligned addresses.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait_first_phase(uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(shared_address(barrier))
      : "memory");
}

#endif

}  // namespace ultramem::cuda
