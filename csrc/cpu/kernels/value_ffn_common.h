// What value_ffn's forward and backward share: how tokens are tiled.
#pragma once

#include "ultramem/value_ffn.h"
#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

// Rows lie anywhere in a table of gigabytes; this many slots' rows are on their way at any time.
constexpr int64_t kSlotsAhead = 6;
// Slots of a tile: enough for the fetching ahead to run on from token to token.
constexpr int64_t kSlotsPerTile = 1024;

inline int64_t tokens_per_tile(const ValueFfnParams& p) {
  return smaller<int64_t>(larger<int64_t>(1, kSlotsPerTile / larger<int64_t>(1, p.num_selected)),
                          16);
}

inline int64_t num_groups(const ValueFfnParams& p) {
  return p.sum_groups || p.addressing.window == 0 ? 1 : p.addressing.expand;
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
