// What value_ffn's forward and backward share: how tokens are tiled.
#pragma once

#include "ultramem/value_ffn.h"
#include "vec.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

// Slots of a token are worked on in blocks: while one half of a block's arithmetic runs, the rows
// that the next half reads are on their way, wherever in a table of gigabytes they lie.
constexpr int64_t kSlotsPerBlock = 32;
constexpr int kSlotsAtOnce = 4;
// Slots of a tile: enough for the fetching ahead to run on from token to token.
constexpr int64_t kSlotsPerTile = 1024;

inline int64_t tokens_per_tile(const ValueFfnParams& p) {
  return smaller<int64_t>(larger<int64_t>(1, kSlotsPerTile / larger<int64_t>(1, p.num_selected)),
                          16);
}

inline int64_t num_groups(const ValueFfnParams& p) {
  return p.sum_groups || p.addressing.window == 0 ? 1 : p.addressing.expand;
}

template <typename Acc>
Acc load_scale(const double* scale) {
  return scale == nullptr ? Acc{1} : static_cast<Acc>(*scale);
}

}  // namespace
}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
