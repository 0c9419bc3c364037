// From a product index to a row of the value table.
//
//   v' = shuffle(v);  slot = (v' % window + offset) % num_slots;  group = v' // window
//
// for a virtual index v in [0, expand * window). One definition serves every backend, so that all
// of them agree bit for bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ULTRAMEM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ULTRAMEM_HOST_DEVICE inline
#endif

namespace ultramem {

enum class Shuffle : int32_t {
  kNone = 0,
  kFeistel = 1,      // four keyed additions on (row, col); needs num_keys^2 == expand * window
  kPermutation = 2,  // an explicit table, as the code released with UltraMemV2 uses
};

struct AddressingParams {
  int64_t num_slots = 0;  // N, physical rows of the table
  int64_t window = 0;     // rows one layer sees; 0: no addressing, the index is the slot
  int64_t offset = 0;     // first row of the window, in [0, num_slots)
  int64_t expand = 1;     // E, virtual copies of the window
  Shuffle shuffle = Shuffle::kNone;
  int64_t num_keys = 0;                  // n, for kFeistel
  uint64_t mixed_seed = 0;               // mix64(seed), for kFeistel
  const int64_t* permutation = nullptr;  // [expand * window], for kPermutation

  // Number of indices that are in range.
  ULTRAMEM_HOST_DEVICE int64_t num_indices() const {
    return window == 0 ? num_slots : expand * window;
  }
};

struct SlotAddress {
  int64_t slot;   // -1 if the index was out of range
  int64_t group;  // in [0, expand)
};

// The finaliser of splitmix64.
ULTRAMEM_HOST_DEVICE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

ULTRAMEM_HOST_DEVICE int64_t feistel_hash(uint64_t mixed_seed, int round, int64_t value,
                                          int64_t num_keys) {
  const uint64_t counter = 4ull * static_cast<uint64_t>(value) + static_cast<uint64_t>(round) + 1;
  return static_cast<int64_t>(mix64(mixed_seed + 0x9e3779b97f4a7c15ull * counter) %
                              static_cast<uint64_t>(num_keys));
}

// Bijective on [0, n^2): every step adds to one coordinate a function of the other.
ULTRAMEM_HOST_DEVICE int64_t feistel_shuffle(uint64_t mixed_seed, int64_t index, int64_t num_keys) {
  int64_t row = index / num_keys;
  int64_t col = index - row * num_keys;
  row = (row + feistel_hash(mixed_seed, 0, col, num_keys)) % num_keys;
  col = (col + feistel_hash(mixed_seed, 1, row, num_keys)) % num_keys;
  row = (row + feistel_hash(mixed_seed, 2, col, num_keys)) % num_keys;
  col = (col + feistel_hash(mixed_seed, 3, row, num_keys)) % num_keys;
  return row * num_keys + col;
}

ULTRAMEM_HOST_DEVICE SlotAddress resolve_slot(const AddressingParams& params, int64_t index) {
  if (index < 0 || index >= params.num_indices()) return {-1, 0};
  if (params.window == 0) return {index, 0};
  if (params.shuffle == Shuffle::kFeistel) {
    index = feistel_shuffle(params.mixed_seed, index, params.num_keys);
  } else if (params.shuffle == Shuffle::kPermutation) {
    index = params.permutation[index];
    // The table's contents are the caller's: an entry that is no index must not become an address.
    if (index < 0 || index >= params.num_indices()) return {-1, 0};
  }
  const int64_t group = index / params.window;
  const int64_t slot = (index - group * params.window + params.offset) % params.num_slots;
  return {slot, group};
}

}  // namespace ultramem
