// The rows that indices stand for, ahead of value_ffn.
//
// value_ffn resolves indices itself, with an offset and a seed that are numbers of its launch. Here
// they are read from the device, so that one compiled program serves every layer of a model.
#pragma once

#include "ultramem/addressing.h"
#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

struct ValueSlotsParams {
  AddressingParams addressing;         // with a window; offset and mixed_seed are those below
  const int64_t* placement = nullptr;  // [2] on the device: offset, mixed_seed
  const void* indices = nullptr;       // [count], int64 or int32
  bool indices_are_int64 = true;
  int64_t count = 0;
  // Also tell the group apart: slot + num_slots * group, which value_ffn takes with a window of the
  // whole table and the same expand.
  bool with_groups = false;

  int64_t* slots = nullptr;  // [count]; -1 where the index is out of range
};

}  // namespace ULTRAMEM_API

namespace cpu ULTRAMEM_PUBLIC {
Status value_slots(const ValueSlotsParams& params, const Executor& executor);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
Status value_slots(const ValueSlotsParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
