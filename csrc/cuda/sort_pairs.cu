#include "sort_pairs.h"

#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"

namespace ultramem::cuda {

int key_bits(uint64_t max_key) {
  int bits = 1;
  while (bits < 32 && (max_key >> bits) != 0) ++bits;
  return bits;
}

size_t sort_pairs_workspace(int64_t num_items, int num_bits) {
  size_t bytes = 0;
  // A size query launches nothing and touches no pointer.
  cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint32_t*>(nullptr),
                                  static_cast<uint32_t*>(nullptr),
                                  static_cast<const uint32_t*>(nullptr),
                                  static_cast<uint32_t*>(nullptr), num_items, 0, num_bits);
  return align_up(bytes);
}

Status sort_pairs(const uint32_t* keys_in, uint32_t* keys_out, const uint32_t* values_in,
                  uint32_t* values_out, int64_t num_items, int num_bits, void* workspace,
                  size_t workspace_bytes, cudaStream_t stream) {
  return to_status(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, keys_in, keys_out,
                                                   values_in, values_out, num_items, 0, num_bits,
                                                   stream));
}

}  // namespace ultramem::cuda
