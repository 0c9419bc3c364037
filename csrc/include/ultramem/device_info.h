// What the library was built for and what its kernels use, for reports and profiling.
#pragma once

#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

// One instantiation of a CUDA kernel.
struct KernelAttributes {
  const char* name;  // operator, direction and template arguments; static text
  int32_t registers_per_thread;
  int32_t static_shared_bytes;
  int32_t max_dynamic_shared_bytes;
  int32_t local_bytes_per_thread;  // spills and stack
  int32_t max_threads_per_block;
  int32_t block_threads;                     // as launched
  int32_t active_blocks_per_multiprocessor;  // at block_threads and no dynamic shared memory
  int32_t binary_version;                    // 10 * major + minor of the code that was loaded
};

}  // namespace ULTRAMEM_API
}  // namespace ultramem

// Of the library that was linked or loaded, whatever headers the caller was compiled with. They
// return static text and never fail.
namespace ultramem ULTRAMEM_PUBLIC {

// The package's version: "0.1.0".
const char* version();
// kApiVersion of the headers that the library was compiled with.
int32_t api_version();
// Whether the functions of `cuda` are in the library. Where they are not, a call of one does not
// link.
bool has_cuda_kernels();
// The GPU code inside, in CMake's notation, separated by commas: "80,90a-real". Empty without any.
const char* cuda_architectures();

}  // namespace ultramem ULTRAMEM_PUBLIC

namespace ultramem {

namespace cpu ULTRAMEM_PUBLIC {
// "AVX512", "AVX2" or "DEFAULT": what the operators run on this machine. The environment variable
// ULTRAMEM_CPU_CAPABILITY (avx512, avx2, default) lowers it. Static text; decided at the first call
// of this or an operator.
const char* capability();
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
// Kernels that kernel_attributes knows.
int32_t kernel_count();
// Attributes of kernel `index`, in [0, kernel_count()), on the current device. Loads the kernel.
// kInvalidArgument for another index, kCudaError without a device or without code for it.
Status kernel_attributes(int32_t index, KernelAttributes* out);
// Which CUDA graph is being captured from the stream: a number that no other capture of the process
// has, 0 where there is none.
Status capture_id(Stream stream, uint64_t* id);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
