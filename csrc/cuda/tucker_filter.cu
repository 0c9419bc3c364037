// The leading singular pair of the summed cores, one thread a head: a few hundred float64
// operations that need no more than one launch.
#include "async_copy.cuh"
#include "common.cuh"
#include "common/tucker_filter_head.h"
#include "kernel_registry.h"
#include "ultramem/tucker_filter.h"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 32;

template <int R>
__global__ void __launch_bounds__(kThreads)
    tucker_filter_kernel(const __grid_constant__ TuckerFilterParams params) {
  // Launched as usual, it begins when all before it has ended: who begins early finds all of that.
  release_dependent_grid();
  const int64_t head = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (head < params.num_heads) tucker_filter_head<R>(params, head);
}

template <int R>
Status launch_tucker_filter(const TuckerFilterParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_heads, kThreads));
  tucker_filter_kernel<R><<<blocks, kThreads, 0, stream>>>(params);
  return launch_status();
}

ULTRAMEM_REGISTER_KERNEL(tucker_filter_1, "tucker_filter<1>", kThreads, tucker_filter_kernel<1>);
ULTRAMEM_REGISTER_KERNEL(tucker_filter_2, "tucker_filter<2>", kThreads, tucker_filter_kernel<2>);
ULTRAMEM_REGISTER_KERNEL(tucker_filter_3, "tucker_filter<3>", kThreads, tucker_filter_kernel<3>);
ULTRAMEM_REGISTER_KERNEL(tucker_filter_4, "tucker_filter<4>", kThreads, tucker_filter_kernel<4>);

}  // namespace

Status tucker_filter(const TuckerFilterParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_tucker_filter(params));
  if (params.num_heads == 0) return {};
  switch (params.tucker_rank) {
    case 1:
      return launch_tucker_filter<1>(params, stream);
    case 2:
      return launch_tucker_filter<2>(params, stream);
    case 3:
      return launch_tucker_filter<3>(params, stream);
    default:
      return launch_tucker_filter<4>(params, stream);
  }
}

}  // namespace ultramem::cuda
