#include "table_rescale.h"

#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 256;
// Few, because almost always there is nothing to do.
constexpr int64_t kMaxBlocks = 1024;

// Weights are those of the master, where there is one, rounded to nearest.
__global__ void __launch_bounds__(kThreads)
    table_rescale_kernel(void* weight, DType dtype, float* master, int64_t count,
                         const float* rescale) {
  const float factor = *rescale;
  if (factor == 1.0f) return;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    const float x =
        master != nullptr ? master[i] : bits_to_float(load_bits(weight, dtype, i), dtype);
    if (master != nullptr) master[i] = x * factor;
    store_element(weight, dtype, i, x * factor);
  }
}

ULTRAMEM_REGISTER_KERNEL(table_rescale, "table_rescale", kThreads, table_rescale_kernel);

}  // namespace

Status launch_table_rescale(const TableUpdateParams& params, const float* factor, Stream stream) {
  const int64_t count = params.gradient.num_rows * params.gradient.dim;
  const int64_t blocks = std::min(ceil_div(count, kThreads), kMaxBlocks);
  if (blocks == 0) return {};
  table_rescale_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      params.weight, params.table_dtype, params.master, count, factor);
  return launch_status();
}

}  // namespace ultramem::cuda
