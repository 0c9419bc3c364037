// What the library was built for and what its kernels use, for reports and profiling.
#pragma once

#include "ultramem/types.h"

namespace ultramem {

struct KernelAttributes {
  const char* name;  // operator, direction and template arguments
  int32_t registers_per_thread;
  int32_t static_shared_bytes;
  int32_t max_dynamic_shared_bytes;
  int32_t local_bytes_per_thread;  // spills and stack
  int32_t max_threads_per_block;
  int32_t block_threads;                     // as launched
  int32_t active_blocks_per_multiprocessor;  // at block_threads and no dynamic shared memory
  int32_t binary_version;                    // 10 * major + minor of the code that was loaded
};

namespace cpu {
// "AVX512", "AVX2" or "DEFAULT": what the operators run on this machine. The environment variable
// ULTRAMEM_CPU_CAPABILITY (avx512, avx2, default) lowers it.
const char* capability();
}  // namespace cpu

namespace cuda {
int32_t kernel_count();
// Attributes of kernel `index` on the current device.
Status kernel_attributes(int32_t index, KernelAttributes* out);
// Which CUDA graph is being captured from the stream: a number that no other capture of the process
// has, 0 where there is none.
Status capture_id(Stream stream, uint64_t* id);
}  // namespace cuda

}  // namespace ultramem
