// What the L2 cache keeps, copies from global to shared memory that run while the thread goes on,
// the barriers that they complete, and kernels that begin while the one ahead of them runs. Shared
// memory is named by its 32-bit address.
#pragma once

#include "common.cuh"

namespace ultramem::cuda {

// ---- what the L2 cache keeps -------------------------------------------------------------------

// Policies for instructions that take a hint: lines that are the last to leave the L2 cache, for
// they are read again, beside much that is read once; and lines that are the first. On sm_90 as
// CUTLASS has them for bulk copies: with what createpolicy makes the cache kept less.
__device__ __forceinline__ uint64_t keep_policy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return 0x14f0000000000000u;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}
__device__ __forceinline__ uint64_t drop_policy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return 0x12f0000000000000u;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

__device__ __forceinline__ float4 load_with_policy(const float4* from, uint64_t policy) {
  float4 value;
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from), "l"(policy)
               : "memory");
  return value;
}
// The 128 bytes there, a line, are not read again: they need not be written to memory.
__device__ __forceinline__ void discard_line(const void* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}
__device__ __forceinline__ void store_with_policy(float4* to, float4 value, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "l"(policy)
               : "memory");
}

// ---- cp.async ----------------------------------------------------------------------------------

// 16 bytes to that shared address, or 16 zero bytes where not `valid`; `global` is then not read.
// The rest of its line of 128 bytes is on its way to the L2 cache as well: neighbours want it soon.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global,
                                            bool valid = true) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(source_bytes)
               : "memory");
}

// The same without the rest of the line, whose neighbours may be nobody's; nothing at all where not
// `wanted`. Without branches, so that several go out together.
__device__ __forceinline__ void cp_async_16_alone(uint32_t shared, const void* global, bool wanted,
                                                  bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; "
      "}\n" ::"r"(shared),
      "l"(global), "r"(source_bytes), "r"(static_cast<int>(wanted))
      : "memory");
}

// 8 or 16 bytes that stay in the L2 cache as the policy says.
template <int kBytes>
__device__ __forceinline__ void cp_async_with_policy(uint32_t shared, const void* global,
                                                     uint64_t policy) {
  static_assert(kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(shared),
                 "l"(global), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 8, %2;\n" ::"r"(shared),
                 "l"(global), "l"(policy)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared), "l"(global) : "memory");
}

// What the L2 cache fetches at once. A hint that asks for it: what is read later is what is in
// memory then, whoever writes it in between.
inline constexpr int kPrefetchBytes = 64;
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until all but the thread's last kPending groups have arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Until all of the thread's copies have arrived, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

// ---- barriers in shared memory -----------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }\n" ::"r"(barrier)
               : "memory");
}

// Arrives once all earlier cp.async of this thread are complete; one of the barrier's arrivals.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is complete. A new barrier is in phase 0: waiting for
// parity 1 returns at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  } while (done == 0);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Arrives, and announces how many bytes of copies this phase waits for.
__device__ __forceinline__ void mbarrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at a barrier in another block of the cluster (address_in_block), for a block that has
// only read what others may now overwrite, by instructions it has waited for: without a scope that
// spans the cluster, which would flush caches.
__device__ __forceinline__ void mbarrier_arrive_in_block(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(remote_barrier) : "memory");
}

// What this thread has written to shared memory is there for matrix products and bulk copies that
// are ordered after this.
__device__ __forceinline__ void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// A multiple of 16 bytes between 16-byte aligned addresses; its bytes complete `barrier`.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

inline constexpr uint32_t kMaxPrefetchBytes = 1u << 19;

// A hint: a multiple of 16 bytes from a 16-byte aligned address will be wanted soon. Reads nothing
// as far as the order of memory goes.
__device__ __forceinline__ void prefetch_to_l2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(global), "r"(bytes) : "memory");
}

#endif

// One of kCount places that are used in turn, and the parity of the phase of its barriers.
template <int kCount>
struct RingCursor {
  int place = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++place == kCount) {
      place = 0;
      parity ^= 1;
    }
  }
};

// ---- warps that copy for warps that multiply ---------------------------------------------------

// Named barrier 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int name, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(name), "r"(num_threads) : "memory");
}

// The same without waiting: others do.
__device__ __forceinline__ void named_barrier_arrive(int name, int num_threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(name), "r"(num_threads) : "memory");
}

// Moves registers between the warps of a block, by whole warpgroups (four aligned warps): the sum
// over the block must stay what it was launched with. Does nothing before sm_90a.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

// ---- kernels that overlap ----------------------------------------------------------------------

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

// Goes on once these words are in registers.
template <typename... Words>
__device__ __forceinline__ void wait_for_words(Words... words) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Something that depends on them; a pause of no time where it ever happens.
  const uint32_t all = (static_cast<uint32_t>(words) ^ ...);
  asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0xffffffff; @p nanosleep.u32 0; }" ::"r"(all)
               : "memory");
#endif
}

// Reads these arguments of the kernel, one of each line of 64 bytes that is needed behind a wait:
// the first read of a line takes longer than one of global memory.
template <typename... Words>
__device__ __forceinline__ void read_arguments(Words... words) {
  wait_for_words(words...);
}

// Launches a kernel that calls `wait_for_prerequisite_grid` before it needs anything of the kernel
// ahead of it, so that it may begin before that one has ended. Some thread of the grid has to call
// it in any case: what follows takes the end of this kernel for the end of both.
//
// `carveout` is what it prefers of a multiprocessor's memory as shared memory, in percent. A kernel
// that prefers another division than the one ahead finds no room until a multiprocessor is empty.
template <typename... Arguments>
Status launch_with_carveout(int carveout, void (*kernel)(Arguments...), dim3 grid,
                            int block_threads, int64_t shared_bytes, Stream stream,
                            const Arguments&... arguments) {
  ULTRAMEM_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout));
  cudaFuncAttributes attributes{};
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, kernel));
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  // Code made from the PTX of an older architecture does not wait, whatever it runs on.
  config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, kernel, arguments...));
  return launch_status();
}

// With the division that all such kernels prefer unless they say otherwise: as much shared memory
// as there is, however little their blocks take.
template <typename... Arguments>
Status launch_overlapping(void (*kernel)(Arguments...), dim3 grid, int block_threads,
                          int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  return launch_with_carveout(cudaSharedmemCarveoutMaxShared, kernel, grid, block_threads,
                              shared_bytes, stream, arguments...);
}

}  // namespace ultramem::cuda
