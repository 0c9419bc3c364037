// Groups entries by the row they name, so that each row of a gradient has one owner and its terms
// are added in the order of the entries: the result depends on neither the number of threads nor
// chance.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ultramem/types.h"

namespace ultramem::cpu {

// Rows are split into buckets of 2^shift consecutive rows. A pair holds the row within its bucket
// (high 32 bits) and the entry (low 32 bits); the pairs of a bucket ascend.
struct RowGroups {
  const uint64_t* pairs;        // [num_entries]
  const int64_t* bucket_begin;  // [num_buckets + 1], into pairs
  int64_t num_buckets;
  int32_t shift;
};

inline constexpr int64_t kMaxGroupedEntries = int64_t{1} << 32;

size_t group_rows_workspace(int64_t num_entries, int64_t num_rows, const Executor& executor);

// rows[e] in [0, num_rows), or negative where it names none, for each of num_entries <
// kMaxGroupedEntries entries. The result lies in `workspace`.
RowGroups group_rows(const int64_t* rows, int64_t num_entries, int64_t num_rows, void* workspace,
                     const Executor& executor);

}  // namespace ultramem::cpu
