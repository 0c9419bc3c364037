// Index to slot for a range of a value_ffn's entries. Integer work, compiled once and without
// instruction-set flags, so that the inline functions of addressing.h are too.
#pragma once

#include "ultramem/value_ffn.h"

namespace ultramem::cpu {

// slots[e - first], negative for those that are not in memory, and, unless null, groups[e - first]
// of the entries [first, last) of the flattened [T, S]. False where an index is out of range.
bool resolve_slots(const ValueFfnParams& params, int64_t first, int64_t last, int64_t* slots,
                   int64_t* groups);

}  // namespace ultramem::cpu
