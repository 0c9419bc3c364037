// How the terms of a long run are added, the same on every backend.
//
// A run of up to piece_length entries is added from left to right. A longer one is cut into pieces
// of that length, counted from its begin; of more than kPiecesPerGroup pieces, the sums of that
// many neighbours are added first. Pieces, groups and their sums are each added from left to right.
#pragma once

#include <cstdint>

#include "ultramem/table_update.h"

#if defined(__CUDACC__)
#define ULTRAMEM_RUNS_FUNCTION __host__ __device__ inline
#else
#define ULTRAMEM_RUNS_FUNCTION inline
#endif

namespace ultramem {
namespace {

constexpr int64_t kMinPieceLength = 64;
constexpr int64_t kMaxPiecesOfAll = 65536;  // bounds the memory that their sums take
constexpr uint32_t kPiecesPerGroup = 32;

ULTRAMEM_RUNS_FUNCTION uint32_t piece_length(int64_t num_entries) {
  int64_t length = kMinPieceLength;
  while (num_entries / length > kMaxPiecesOfAll) length *= 2;
  return static_cast<uint32_t>(length);
}

// Where the sum of a piece lies among num_piece_sums(n) rows. A window of piece_length entries has
// at most one first piece of a long run, and one later piece, beginning in it.
ULTRAMEM_RUNS_FUNCTION uint32_t piece_sum_row(uint32_t run_begin, uint32_t piece, uint32_t length) {
  return 2 * ((run_begin + piece * length) / length) + (piece == 0 ? 1 : 0);
}
ULTRAMEM_RUNS_FUNCTION int64_t num_piece_sums(int64_t num_entries) {
  const int64_t length = piece_length(num_entries);
  return num_entries > length ? 2 * ((num_entries + length - 1) / length) : 0;
}

}  // namespace
}  // namespace ultramem
