#include "kernel_registry.h"

#include "common.cuh"
#include "ultramem/device_info.h"

namespace ultramem::cuda {
namespace {
const KernelEntry* g_first = nullptr;
int32_t g_count = 0;
}  // namespace

KernelEntry::KernelEntry(const char* name, const void* function, int block_threads)
    : name(name), function(function), block_threads(block_threads), next(g_first) {
  g_first = this;
  ++g_count;
}

int32_t kernel_count() { return g_count; }

Status kernel_attributes(int32_t index, KernelAttributes* out) {
  if (index < 0 || index >= g_count) return Status::invalid_argument("no kernel of that index");
  const KernelEntry* entry = g_first;
  for (; index > 0; --index) entry = entry->next;
  cudaFuncAttributes attributes{};
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, entry->function));
  int active_blocks = 0;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &active_blocks, entry->function, entry->block_threads, /*dynamicSMemSize=*/0));
  *out = {entry->name,
          attributes.numRegs,
          static_cast<int32_t>(attributes.sharedSizeBytes),
          attributes.maxDynamicSharedSizeBytes,
          static_cast<int32_t>(attributes.localSizeBytes),
          attributes.maxThreadsPerBlock,
          entry->block_threads,
          active_blocks,
          attributes.binaryVersion};
  return {};
}

Status capture_id(Stream stream, uint64_t* id) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaStreamGetCaptureInfo(stream, &status, &capture));
  *id = status == cudaStreamCaptureStatusNone ? 0 : capture;
  return {};
}

}  // namespace ultramem::cuda
