// C entry points of the torch library for whoever asks what it holds (csrc/python, Python's
// ctypes). Plain C, so that they bind to no Python and no C++ ABI.
#include "ultramem/device_info.h"

#define ULTRAMEM_EXPORT extern "C" __attribute__((visibility("default")))

ULTRAMEM_EXPORT const char* ultramem_cpu_capability() { return ultramem::cpu::capability(); }

ULTRAMEM_EXPORT int32_t ultramem_kernel_count() {
#if defined(ULTRAMEM_WITH_CUDA)
  return ultramem::cuda::kernel_count();
#else
  return 0;
#endif
}

// Returns null, or why the attributes could not be read.
ULTRAMEM_EXPORT const char* ultramem_kernel_attributes(int32_t index,
                                                       ultramem::KernelAttributes* out) {
#if defined(ULTRAMEM_WITH_CUDA)
  const ultramem::Status status = ultramem::cuda::kernel_attributes(index, out);
  return status.ok() ? nullptr : status.message;
#else
  (void)index;
  (void)out;
  return "this build has no CUDA kernels";
#endif
}
