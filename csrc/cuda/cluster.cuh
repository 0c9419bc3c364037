// Thread block clusters, of compute capability 9.0 and later: who one is among the blocks, their
// barrier, stores to each other's shared memory, and how many clusters a device has room for.
#pragma once

#include <atomic>

#include "common.cuh"
#include "device.h"

namespace ultramem::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The barrier of all threads of a cluster. Warps arrive and wait as a whole.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Its halves, for blocks that tell each other that they have read what may now be overwritten, and
// behind `mbarrier_init_fence`: what was written before is not made visible, for that would wait
// for all that is on its way to global memory. A __syncthreads ahead completes the reads of the
// block.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// The same place in shared memory in another block of the cluster.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, uint32_t block) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(block));
  return remote;
}

__device__ __forceinline__ float4 load_in_block(uint32_t remote) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(remote)
               : "memory");
  return value;
}

// 16 bytes, or 4, into the shared memory of a block, which count for a barrier of that block. Does
// not wait: the receiver does, for the barrier, with `mbarrier_wait_cluster`.
__device__ __forceinline__ void store_async(uint32_t remote, float4 value,
                                            uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(remote),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_barrier)
      : "memory");
}

__device__ __forceinline__ void store_async(uint32_t remote, float value, uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];\n" ::"r"(
          remote),
      "f"(value), "r"(remote_barrier)
      : "memory");
}

// `mbarrier_wait` for what other blocks of the cluster have written.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

#endif

// ---- on the host -------------------------------------------------------------------------------

// Hopper allows more than the 8 blocks of a portable cluster.
inline constexpr int kLargeCluster = 16;
inline constexpr int kPortableCluster = 8;

// Clusters of each size that the device holds at once, of blocks that fill a multiprocessor; zeros
// where it has none.
struct ClusterLimits {
  int large = 0;
  int portable = 0;
  int shared_bytes = 0;  // of a block
};

template <typename Kernel>
cudaError_t allow_clusters(Kernel* kernel, int shared_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

inline cudaLaunchConfig_t cluster_config(dim3 grid, int cluster_blocks, int block_threads,
                                         int shared_bytes, cudaLaunchAttribute* attribute,
                                         Stream stream) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

template <typename... Arguments>
Status launch_clusters_as(bool overlapping, void (*kernel)(Arguments...), dim3 grid,
                          int cluster_blocks, int block_threads, int shared_bytes, Stream stream,
                          const Arguments&... arguments) {
  // The device's maximum, not `shared_bytes`: the limit belongs to the kernel, and another host
  // thread may be about to launch the same one with more.
  int limit = 0;
  ULTRAMEM_RETURN_IF_ERROR(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limit));
  ULTRAMEM_CUDA_RETURN_IF_ERROR(allow_clusters(kernel, limit));
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config =
      cluster_config(grid, cluster_blocks, block_threads, shared_bytes, attributes, stream);
  if (overlapping) {
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 2;
  }
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, kernel, arguments...));
  return launch_status();
}

// `launch_overlapping` of clusters. The kernel ahead may be any: this one calls
// `wait_for_prerequisite_grid` before it reads or writes a tensor that may not be there yet or is
// still needed.
template <typename... Arguments>
Status launch_overlapping_clusters(void (*kernel)(Arguments...), dim3 grid, int cluster_blocks,
                                   int block_threads, int shared_bytes, Stream stream,
                                   const Arguments&... arguments) {
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  return launch_clusters_as(true, kernel, grid, cluster_blocks, block_threads, shared_bytes, stream,
                            arguments...);
}

template <typename Kernel>
ClusterLimits query_cluster_limits(Kernel* kernel, int block_threads, int device) {
  cudaFuncAttributes attributes{};
  ClusterLimits limits;
  // Code made from the PTX of an older architecture has no clusters in it, whatever it runs on.
  const bool usable =
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
      cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                             device) == cudaSuccess &&
      allow_clusters(kernel, limits.shared_bytes) == cudaSuccess;
  auto max_clusters = [&](int cluster_blocks) {
    int clusters = 0;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config =
        cluster_config(dim3(cluster_blocks), cluster_blocks, block_threads, limits.shared_bytes,
                       &attribute, nullptr);
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
  };
  if (usable) {
    limits.large = max_clusters(kLargeCluster);
    limits.portable = max_clusters(kPortableCluster);
  }
  cudaGetLastError();  // a device without clusters is not an error
  return limits;
}

// Of a kernel like `kernel`, asked once a device: the answers take longer than a kernel of few
// tokens. Every caller has a cache of its own, a static array.
inline constexpr int kMaxClusterDevices = 64;
using ClusterLimitsCache = std::atomic<uint64_t>[kMaxClusterDevices];

template <typename Kernel>
ClusterLimits cluster_limits(Kernel* kernel, int block_threads, ClusterLimitsCache& known) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxClusterDevices) return {};
  // A bit that says the rest is known, then 24 for the bytes and 16 each.
  constexpr uint64_t kKnown = uint64_t{1} << 63;
  uint64_t packed = known[device].load(std::memory_order_relaxed);
  if ((packed & kKnown) == 0) {
    const ClusterLimits limits = query_cluster_limits(kernel, block_threads, device);
    packed = kKnown | static_cast<uint64_t>(limits.shared_bytes) << 32 |
             static_cast<uint64_t>(limits.large) << 16 | static_cast<uint64_t>(limits.portable);
    known[device].store(packed, std::memory_order_relaxed);
  }
  return {static_cast<int>(packed >> 16 & 0xffff), static_cast<int>(packed & 0xffff),
          static_cast<int>(packed >> 32 & 0xffffff)};
}

}  // namespace ultramem::cuda
