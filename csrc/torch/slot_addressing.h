// How the arguments of SlotAddressing and of a table's shard reach the operators.
#pragma once

#include <string>

#include "common.h"
#include "ultramem/value_ffn.h"

namespace ultramem::torch_binding {

struct AddressingArguments {
  const OptionalTensor& permutation;
  int64_t window, offset, expand;
  const std::string& shuffle;
  int64_t num_keys, seed;
  // The table's rows are [first_row, first_row + N) of num_slots; 0: of N.
  int64_t first_row, num_slots;
};

// For a table whose rows in memory are `num_rows`. The permutation must be contiguous.
AddressingParams make_addressing(const OpContext& context, const AddressingArguments& arguments,
                                 int64_t num_rows);

// indices [T, S] into the parameters' sizes and pointer.
void take_indices(const OpContext& context, const Tensor& indices, ValueFfnParams& params);

// With ULTRAMEM_DEBUG=1 an index out of range is an exception on CUDA, too, at the price of a
// synchronisation.
void check_indices_in_debug(const OpContext& context, const ValueFfnParams& params);

// Raises unless the status is good; on the CPU naming the index that is out of range.
void check_status(const OpContext& context, const Status& status, const ValueFfnParams& params);

}  // namespace ultramem::torch_binding
