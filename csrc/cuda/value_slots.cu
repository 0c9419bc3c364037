#include "ultramem/value_slots.h"

#include <algorithm>

#include "common.cuh"
#include "kernel_registry.h"

namespace ultramem::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

__global__ void __launch_bounds__(kThreads)
    value_slots_kernel(const ValueSlotsParams params,
                       const AddressDivisors<ReciprocalDivisor> divisors) {
  AddressingParams addressing = params.addressing;
  addressing.offset = params.placement[0];
  addressing.mixed_seed = static_cast<uint64_t>(params.placement[1]);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.count; i += stride) {
    const int64_t index = params.indices_are_int64 ? static_cast<const int64_t*>(params.indices)[i]
                                                   : static_cast<const int32_t*>(params.indices)[i];
    const SlotAddress address = resolve_slot(addressing, divisors, index);
    const int64_t first = params.with_groups ? address.group * addressing.num_slots : 0;
    params.slots[i] = address.slot < 0 ? -1 : first + address.slot;
  }
}

ULTRAMEM_REGISTER_KERNEL(value_slots, "value_slots", kThreads, value_slots_kernel);

}  // namespace

Status value_slots(const ValueSlotsParams& params, Stream stream) {
  const int64_t blocks = std::min(ceil_div(params.count, kThreads), kMaxBlocks);
  if (blocks == 0) return {};
  value_slots_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      params, AddressDivisors<ReciprocalDivisor>(params.addressing));
  return launch_status();
}

}  // namespace ultramem::cuda
