// Stable radix sort of (key, value) pairs, the front end of every deterministic scatter: entries
// that go to the same row come to lie side by side, in token order.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "ultramem/types.h"

namespace ultramem::cuda {

// Bits needed to hold values in [0, max_key].
int key_bits(uint64_t max_key);

size_t sort_pairs_workspace(int64_t num_items, int num_bits);

// Sorts by the low `num_bits` bits of the keys; all four buffers are distinct, [num_items].
Status sort_pairs(const uint32_t* keys_in, uint32_t* keys_out, const uint32_t* values_in,
                  uint32_t* values_out, int64_t num_items, int num_bits, void* workspace,
                  size_t workspace_bytes, cudaStream_t stream);

}  // namespace ultramem::cuda
