// Chooses the instruction set, once. Compiled without instruction-set flags.
#include <strings.h>

#include <cstdlib>

#include "kernel_table.h"
#include "ultramem/device_info.h"

namespace ultramem::cpu {
namespace {

#if defined(__x86_64__)

bool machine_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool machine_has_avx512() {
  return machine_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

const KernelTable& choose_kernel_table() {
  const char* limit = std::getenv("ULTRAMEM_CPU_CAPABILITY");
  const bool allow_avx2 = limit == nullptr || strcasecmp(limit, "default") != 0;
  const bool allow_avx512 = allow_avx2 && (limit == nullptr || strcasecmp(limit, "avx2") != 0);
  __builtin_cpu_init();
  if (allow_avx512 && machine_has_avx512()) return AVX512::kernel_table();
  if (allow_avx2 && machine_has_avx2()) return AVX2::kernel_table();
  return DEFAULT::kernel_table();
}

#else

const KernelTable& choose_kernel_table() { return DEFAULT::kernel_table(); }

#endif

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose_kernel_table();
  return table;
}

const char* capability() { return kernel_table().capability; }

}  // namespace ultramem::cpu
