// Appending a token's factors to a table's arena (ultramem/table_factors.h).
//
// The position to append at is in device memory, so that a captured graph appends at every replay:
// every block reads it, and a kernel behind them advances it.
#pragma once

#include "common.cuh"
#include "ultramem/table_factors.h"

namespace ultramem::cuda::value_ffn {

// The token of the arena that the first of num_tokens becomes, or -1 where there is no room.
__device__ __forceinline__ int64_t append_position(const TableFactors& arena, int64_t num_tokens) {
  const int64_t position = arena.header->num_tokens;
  return num_tokens <= arena.capacity - position ? position : -1;
}

// Rows of one kind, copied in the widest words that the rows of both sides are aligned to.
struct RowCopy {
  const void* from;  // [T, row_words]
  void* to;          // [capacity, row_words]
  int64_t row_words;
  int word_bytes;  // 16, 4 or 2
};

inline RowCopy row_copy(void* to, const void* from, int64_t row_bytes) {
  const auto fits = [&](int64_t word) {
    return row_bytes % word == 0 && reinterpret_cast<uintptr_t>(from) % word == 0;
  };
  const int word_bytes = fits(16) ? 16 : fits(4) ? 4 : 2;
  return {from, to, row_bytes / word_bytes, word_bytes};
}

// What a token brings beside its entries.
struct AppendedRows {
  RowCopy grad_out, pre_input;
};

inline AppendedRows appended_rows(const TableFactors& arena, const void* grad_out,
                                  const void* pre_input) {
  const int64_t element = element_size(arena.dtype);
  return {row_copy(arena.grad_outs, grad_out, arena.num_groups * arena.value_dim * element),
          row_copy(arena.pre_inputs, pre_input, arena.pre_value_dim * element)};
}

template <typename Word>
__device__ __forceinline__ void copy_words(const RowCopy& copy, int64_t token, int64_t to_token) {
  constexpr int kInFlight = 4;
  const Word* from = static_cast<const Word*>(copy.from) + token * copy.row_words;
  Word* to = static_cast<Word*>(copy.to) + to_token * copy.row_words;
  for (int64_t first = threadIdx.x; first < copy.row_words; first += kInFlight * blockDim.x) {
    Word words[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      words[k] = __ldg(from + min(first + k * blockDim.x, copy.row_words - 1));
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * blockDim.x < copy.row_words) to[first + k * blockDim.x] = words[k];
    }
  }
}

// By all threads of a block.
__device__ __forceinline__ void append_row(const RowCopy& copy, int64_t token, int64_t to_token) {
  if (copy.word_bytes == 16) {
    copy_words<uint4>(copy, token, to_token);
  } else if (copy.word_bytes == 4) {
    copy_words<uint32_t>(copy, token, to_token);
  } else {
    copy_words<uint16_t>(copy, token, to_token);
  }
}

}  // namespace ultramem::cuda::value_ffn
