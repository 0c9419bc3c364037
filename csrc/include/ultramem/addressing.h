// From a product index to a row of the value table.
//
//   v' = shuffle(v);  slot = (v' % window + offset) % num_slots;  group = v' // window
//
// for a virtual index v in [0, expand * window). One definition serves every backend, so that all
// of them agree bit for bit. Inline throughout: host code and, under nvcc, kernels may call it.
//
// The table in memory may be a shard: rows [first_row, first_row + num_rows) of those that indices
// address. An index that leads to another shard is no error. It contributes zero and reads nothing.
#pragma once

#include <cstdint>

#include "ultramem/version.h"

#if defined(__CUDACC__)
#define ULTRAMEM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ULTRAMEM_HOST_DEVICE inline
#endif

namespace ultramem {
inline namespace ULTRAMEM_API {

enum class Shuffle : int32_t {
  kNone = 0,
  kFeistel = 1,      // four keyed additions on (row, col); needs num_keys^2 == expand * window
  kPermutation = 2,  // an explicit table, as the code released with UltraMemV2 uses
};

// Which rows of the table a layer's indices address. value_ffn refuses a window above num_slots, an
// offset outside [0, num_slots), and kFeistel unless num_keys^2 == expand * window.
struct AddressingParams {
  int64_t num_slots = 0;  // N, physical rows of the table
  int64_t window = 0;     // rows one layer sees; 0: no addressing, the index is the slot
  int64_t offset = 0;     // first row of the window, in [0, num_slots)
  int64_t expand = 1;     // E, virtual copies of the window
  Shuffle shuffle = Shuffle::kNone;
  int64_t num_keys = 0;     // n, for kFeistel
  uint64_t mixed_seed = 0;  // mix64(seed), for kFeistel
  // [expand * window], for kPermutation, on the operator's device; an entry outside [0, expand *
  // window) makes its index one that is out of range.
  const int64_t* permutation = nullptr;

  // The rows in memory, those that the operators' pointers and N are about.
  int64_t first_row = 0;
  int64_t num_rows = 0;  // 0: all num_slots

  // Number of indices that are in range.
  ULTRAMEM_HOST_DEVICE int64_t num_indices() const {
    return window == 0 ? num_slots : expand * window;
  }
  ULTRAMEM_HOST_DEVICE int64_t rows_in_memory() const {
    return num_rows > 0 ? num_rows : num_slots;
  }
};

// In place of a slot, both negative.
inline constexpr int64_t kIndexOutOfRange = -1;
inline constexpr int64_t kSlotElsewhere = -2;  // in a row that is not in memory

struct SlotAddress {
  int64_t slot;   // among the rows in memory, or one of the above
  int64_t group;  // in [0, expand)
};

// The finaliser of splitmix64.
ULTRAMEM_HOST_DEVICE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// A number to divide by.
struct Divisor {
  uint64_t value;

  Divisor() = default;
  ULTRAMEM_HOST_DEVICE explicit Divisor(int64_t value) : value(static_cast<uint64_t>(value)) {}
  ULTRAMEM_HOST_DEVICE uint64_t quotient(uint64_t x) const { return x / value; }
};

// The same by a multiplication on a GPU, which has no instruction that divides.
struct ReciprocalDivisor {
  uint64_t value;
  uint64_t reciprocal;  // floor((2^64 - 1) / value)

  ReciprocalDivisor() = default;
  ULTRAMEM_HOST_DEVICE explicit ReciprocalDivisor(int64_t value)
      : value(static_cast<uint64_t>(value)),
        reciprocal(value > 0 ? UINT64_MAX / static_cast<uint64_t>(value) : 0) {}
  ULTRAMEM_HOST_DEVICE uint64_t quotient(uint64_t x) const {
#if defined(__CUDA_ARCH__)
    // reciprocal >= 2^64 / value - 1, so that the product's upper half is too small by one at most.
    const uint64_t guess = __umul64hi(x, reciprocal);
    return x - guess * value < value ? guess : guess + 1;
#else
    return x / value;
#endif
  }
};

// What an address is divided by; made once for many addresses.
template <typename DivisorT>
struct AddressDivisors {
  DivisorT num_keys, window, num_slots;

  AddressDivisors() = default;
  ULTRAMEM_HOST_DEVICE explicit AddressDivisors(const AddressingParams& params)
      : num_keys(params.num_keys), window(params.window), num_slots(params.num_slots) {}
};

template <typename DivisorT>
ULTRAMEM_HOST_DEVICE int64_t remainder(int64_t x, const DivisorT& by) {
  const auto dividend = static_cast<uint64_t>(x);
  return static_cast<int64_t>(dividend - by.quotient(dividend) * by.value);
}

template <typename DivisorT>
ULTRAMEM_HOST_DEVICE int64_t feistel_hash(uint64_t mixed_seed, int round, int64_t value,
                                          const DivisorT& num_keys) {
  const uint64_t counter = 4ull * static_cast<uint64_t>(value) + static_cast<uint64_t>(round) + 1;
  const uint64_t hash = mix64(mixed_seed + 0x9e3779b97f4a7c15ull * counter);
  return remainder(static_cast<int64_t>(hash), num_keys);
}

// Bijective on [0, n^2): every step adds to one coordinate a function of the other.
template <typename DivisorT>
ULTRAMEM_HOST_DEVICE int64_t feistel_shuffle(uint64_t mixed_seed, int64_t index,
                                             const DivisorT& num_keys) {
  const auto n = static_cast<int64_t>(num_keys.value);
  auto row = static_cast<int64_t>(num_keys.quotient(static_cast<uint64_t>(index)));
  int64_t col = index - row * n;
  row = remainder(row + feistel_hash(mixed_seed, 0, col, num_keys), num_keys);
  col = remainder(col + feistel_hash(mixed_seed, 1, row, num_keys), num_keys);
  row = remainder(row + feistel_hash(mixed_seed, 2, col, num_keys), num_keys);
  col = remainder(col + feistel_hash(mixed_seed, 3, row, num_keys), num_keys);
  return row * n + col;
}

// Where a row of all num_slots lies among those in memory.
ULTRAMEM_HOST_DEVICE int64_t row_in_memory(const AddressingParams& params, int64_t slot) {
  // One comparison: in unsigned arithmetic a row before the first is beyond the last, and the last
  // of num_rows = 0, which are all, is beyond any.
  const int64_t row = slot - params.first_row;
  const uint64_t last = static_cast<uint64_t>(params.num_rows) - 1;
  return static_cast<uint64_t>(row) <= last ? row : kSlotElsewhere;
}

// The rule at the top of this file; slot -1 for an index out of range. params.permutation must be
// readable from where this runs.
template <typename DivisorT>
ULTRAMEM_HOST_DEVICE SlotAddress resolve_slot(const AddressingParams& params,
                                              const AddressDivisors<DivisorT>& by, int64_t index) {
  if (index < 0 || index >= params.num_indices()) return {kIndexOutOfRange, 0};
  if (params.window == 0) return {row_in_memory(params, index), 0};
  if (params.shuffle == Shuffle::kFeistel) {
    index = feistel_shuffle(params.mixed_seed, index, by.num_keys);
  } else if (params.shuffle == Shuffle::kPermutation) {
    index = params.permutation[index];
    // The table's contents are the caller's: an entry that is no index must not become an address.
    if (index < 0 || index >= params.num_indices()) return {kIndexOutOfRange, 0};
  }
  const auto group = static_cast<int64_t>(by.window.quotient(static_cast<uint64_t>(index)));
  const int64_t slot = remainder(index - group * params.window + params.offset, by.num_slots);
  return {row_in_memory(params, slot), group};
}

ULTRAMEM_HOST_DEVICE SlotAddress resolve_slot(const AddressingParams& params, int64_t index) {
  return resolve_slot(params, AddressDivisors<Divisor>(params), index);
}

}  // namespace ULTRAMEM_API
}  // namespace ultramem
