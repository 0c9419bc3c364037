// Whether kernels that need sm_90a (wgmma, TMA) may run: this build has them and the current device
// is of that architecture, which is not forward-compatible.
#pragma once

#include <cuda_runtime.h>

namespace ultramem::cuda {

inline bool sm90a_available() {
#if defined(ULTRAMEM_WITH_SM90A)
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#else
  return false;
#endif
}

}  // namespace ultramem::cuda
