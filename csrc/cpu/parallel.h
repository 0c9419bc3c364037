// Work sharing over an Executor.
//
// Everything here has internal linkage: the file is included by kernels that are compiled for
// several instruction sets, and no copy may stand in for another.
#pragma once

#include <cstdint>

#include "ultramem/types.h"

namespace ultramem::cpu {
namespace {

// How many bodies of parallel_tiles run at once, hence how many scratch areas they need.
inline int64_t worker_count(const Executor& executor) {
  return executor.parallel_for != nullptr && executor.num_threads > 1 ? executor.num_threads : 1;
}

// body(worker, tile) for every tile in [0, num_tiles), each once. Tiles are handed out one at a
// time, so that a slow core does not hold up the others; nothing a body computes may depend on
// `worker`, which only names a scratch area.
template <typename Body>
void parallel_tiles(const Executor& executor, int64_t num_tiles, const Body& body) {
  struct Context {
    const Body* body;
    int64_t num_tiles;
    int64_t next_tile;
  } context{&body, num_tiles, 0};
  const int64_t workers = worker_count(executor);
  if (workers == 1 || num_tiles <= 1) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) body(0, tile);
    return;
  }
  const auto run = [](void* opaque, int64_t first, int64_t last) {
    Context& shared = *static_cast<Context*>(opaque);
    for (int64_t worker = first; worker < last; ++worker) {
      for (;;) {
        const int64_t tile = __atomic_fetch_add(&shared.next_tile, 1, __ATOMIC_RELAXED);
        if (tile >= shared.num_tiles) break;
        (*shared.body)(worker, tile);
      }
    }
  };
  executor.parallel_for(0, workers < num_tiles ? workers : num_tiles, 1, run, &context);
}

}  // namespace
}  // namespace ultramem::cpu
