#include "slots.h"

namespace ultramem::cpu {
namespace {

template <typename Index>
bool resolve(const AddressingParams& addressing, const Index* indices, int64_t count,
             int64_t* slots, int64_t* groups) {
  bool in_range = true;
  for (int64_t e = 0; e < count; ++e) {
    const SlotAddress address = resolve_slot(addressing, indices[e]);
    in_range &= address.slot != kIndexOutOfRange;
    slots[e] = address.slot;
    if (groups != nullptr) groups[e] = address.group;
  }
  return in_range;
}

}  // namespace

bool resolve_slots(const ValueFfnParams& params, int64_t first, int64_t last, int64_t* slots,
                   int64_t* groups) {
  if (params.indices_are_int64) {
    return resolve(params.addressing, static_cast<const int64_t*>(params.indices) + first,
                   last - first, slots, groups);
  }
  return resolve(params.addressing, static_cast<const int32_t*>(params.indices) + first,
                 last - first, slots, groups);
}

}  // namespace ultramem::cpu
