// The arena of a table's factors as an argument of the operators, and what the host knows of it.
#pragma once

#include <mutex>

#include "common.h"
#include "ultramem/table_factors.h"

namespace ultramem::torch_binding {

// Raises unless `arena` is a contiguous uint8 tensor on the device of the operator that is laid out
// for `shape`.
TableFactors table_factors(const OpContext& context, Tensor& arena, const TableFactorsShape& shape);

// Held while an operator appends: its kernels must not mix with those of another thread's.
std::mutex& factors_mutex();

// Notes, under the mutex, that `num_tokens` have been appended: ultramem_factors_state tells
// Python.
void note_append(const OpContext& context, const TableFactors& factors, int64_t num_tokens);

}  // namespace ultramem::torch_binding
