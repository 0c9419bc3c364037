// What this library is, from the build.
#include "ultramem/device_info.h"

namespace ultramem {

const char* version() { return ULTRAMEM_VERSION; }

int32_t api_version() { return kApiVersion; }

bool has_cuda_kernels() {
#if defined(ULTRAMEM_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

const char* cuda_architectures() { return ULTRAMEM_CUDA_ARCHITECTURES; }

}  // namespace ultramem
