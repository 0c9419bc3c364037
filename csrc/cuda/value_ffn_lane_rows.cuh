// How a lane requests and reads its vectors of a table's rows: with Traits of value_ffn_slots.cuh,
// vectors rank, rank + kLanes, ..., kVectors at most, of which each has a place of its own in
// shared memory, a warp's side by side.
#pragma once

#include "async_copy.cuh"
#include "value_ffn_common.cuh"

namespace ultramem::cuda::value_ffn {

// A lane's part of a table's rows.
struct LaneRows {
  const char* first;   // its first vector of row 0
  uint32_t row_bytes;  // of a whole row
  int left;            // vectors of a row from its first on

  template <typename Traits>
  __device__ __forceinline__ static LaneRows of(const void* table, int row_vectors, int rank) {
    return {static_cast<const char*>(table) + rank * 16, static_cast<uint32_t>(row_vectors) * 16,
            row_vectors - rank};
  }
};

// Requests a lane's vectors of a row, zeros where there is no slot; nothing behind the row's end.
template <typename Traits>
__device__ __forceinline__ void request_row(const LaneRows& rows, uint32_t slot, uint32_t to) {
  const bool exists = slot != kNoSlot;
  const char* row = rows.first + uint64_t{exists ? slot : 0} * rows.row_bytes;
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    cp_async_16_alone(to + v * kWarpSize * 16, row + v * Traits::kLanes * 16,
                      v * Traits::kLanes < rows.left, exists);
  }
}

// Zeros behind the end of a row, in a place of the ring: what is there is multiplied by zero.
template <typename Traits>
__device__ __forceinline__ void clear_behind_row(uint4* place, int row_vectors, int rank) {
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    const bool is_read = v * Traits::kLanes < row_vectors;
    if (is_read && v * Traits::kLanes + rank >= row_vectors) place[v * kWarpSize] = uint4{};
  }
}

// A lane's vectors of a row that has arrived.
template <typename Traits>
__device__ __forceinline__ void load_row(const uint4* from, int row_vectors,
                                         uint4 (&row)[Traits::kVectors]) {
#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    if (v * Traits::kLanes < row_vectors) row[v] = from[v * kWarpSize];
  }
}

}  // namespace ultramem::cuda::value_ffn
