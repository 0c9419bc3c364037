// A list of the kernels in this library, so that their registers, shared memory and occupancy can
// be reported (device_info.h). Each kernel file registers its own instantiations.
#pragma once

namespace ultramem::cuda {

struct KernelEntry {
  KernelEntry(const char* name, const void* function, int block_threads);

  const char* name;
  const void* function;
  int block_threads;
  const KernelEntry* next;
};

// At namespace scope of a .cu file, once per instantiation.
#define ULTRAMEM_REGISTER_KERNEL(id, name, block_threads, ...)  \
  static const ::ultramem::cuda::KernelEntry kernel_entry_##id( \
      name, reinterpret_cast<const void*>(__VA_ARGS__), block_threads)

}  // namespace ultramem::cuda
