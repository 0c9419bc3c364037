#include "ultramem/value_slots.h"

#include <algorithm>

#include "parallel.h"

namespace ultramem::cpu {
namespace {

constexpr int64_t kIndicesPerTile = 4096;  // below this, another thread costs more than it saves

template <typename Index>
void resolve(const ValueSlotsParams& params, const AddressingParams& addressing,
             const Executor& executor) {
  const auto* indices = static_cast<const Index*>(params.indices);
  const int64_t tiles = (params.count + kIndicesPerTile - 1) / kIndicesPerTile;
  parallel_tiles(executor, tiles, [&](int64_t, int64_t tile) {
    const int64_t end = std::min(params.count, (tile + 1) * kIndicesPerTile);
    for (int64_t i = tile * kIndicesPerTile; i < end; ++i) {
      const SlotAddress address = resolve_slot(addressing, indices[i]);
      const int64_t first = params.with_groups ? address.group * addressing.num_slots : 0;
      params.slots[i] = address.slot < 0 ? -1 : first + address.slot;
    }
  });
}

}  // namespace

Status value_slots(const ValueSlotsParams& params, const Executor& executor) {
  AddressingParams addressing = params.addressing;
  addressing.offset = params.placement[0];
  addressing.mixed_seed = static_cast<uint64_t>(params.placement[1]);
  if (params.indices_are_int64) {
    resolve<int64_t>(params, addressing, executor);
  } else {
    resolve<int32_t>(params, addressing, executor);
  }
  return {};
}

}  // namespace ultramem::cpu
