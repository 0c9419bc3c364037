// What the current device is.
#pragma once

#include "common.cuh"

namespace ultramem::cuda {

inline Status device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  return to_status(cudaDeviceGetAttribute(value, attribute, device));
}

// For choices that cannot report an error: zeros where it cannot be told.

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  return device_attribute(attribute, &value).ok() ? value : 0;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Bytes that a block may have if it asks for them.
inline int max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// 90 for 9.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace ultramem::cuda
