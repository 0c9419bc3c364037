// Factors of the value table's gradients: what the backward of value_ffn leaves behind where no
// gradient table shall exist.
//
//   grad_values[slot_e, slice c] += weight_{e,c} * grad_out[token_e, group_e, slice c]
//   grad_pre_values[slot_e]      += grad_a_e * pre_input[token_e]
//
// An entry e = (token, s) is one retrieved slot. The tokens of all layers that share the table, and
// of all micro-batches, lie behind one another in one piece of memory, the arena:
//
//   header | slots | weights | grad_a | groups | grad_outs | pre_inputs
//
// A section holds `capacity` tokens. The capacity is a multiple of kFactorTokens, so every section
// begins on a multiple of 256 bytes from the arena's beginning, whatever its elements.
//
// To use it: allocate factors_bytes(shape, tokens of a step), zero the header, take `factors_in` of
// it, hand that to value_ffn_bwd_deferred of every layer and micro-batch. Then table_group over the
// slots held and table_update for each table (table_update.h), and zero the header's first 16
// bytes.
#pragma once

#include "ultramem/types.h"
#include "ultramem/value_ffn.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

// An arena's capacity is a multiple of so many tokens.
inline constexpr int64_t kFactorTokens = 256;
// A slot that was out of range, or in a row that is not in memory (addressing.h). Its weights and
// grad_a are zero.
inline constexpr uint32_t kNoSlot = 0xffffffffu;
inline constexpr int64_t kMaxFactorGroups = 256;

// The beginning of the arena, on the device of the factors. All zero: empty.
struct TableFactorsHeader {
  int64_t num_tokens;  // held
  // Of appends for which there was no room, and of which nothing was written.
  int64_t overflow;
  int64_t reserved[30];
};
inline constexpr int64_t kFactorsHeaderBytes = 256;
static_assert(sizeof(TableFactorsHeader) == kFactorsHeaderBytes,
              "sections are aligned to the header's size");

// What an arena's layout follows from; the same for all that is appended to it.
struct TableFactorsShape {
  int64_t num_selected = 0;   // S
  int64_t value_dim = 0;      // Dv
  int64_t pre_value_dim = 0;  // Dp, 0 without pre-values
  int32_t num_cores = 1;      // C
  int32_t num_groups = 1;     // E where out is [T, E, Dv], else 1
  DType table_dtype = DType::kFloat32;
  DType dtype = DType::kFloat32;  // of grad_out and pre_input
};

// Bytes a token takes in the sections that lie before this one; empty sections take none.
struct TableFactorsSections {
  int64_t slots, weights, grad_a, groups, grad_outs, pre_inputs, end;
};

// Rows of the value table's gradient come from grad_outs and weights, those of the pre-value
// table's from pre_inputs and grad_a.
constexpr TableFactorsSections factors_sections(const TableFactorsShape& shape) {
  const int64_t acc = element_size(accumulation_dtype(shape.table_dtype));
  const int64_t element = element_size(shape.dtype);
  TableFactorsSections before{};
  before.slots = 0;
  before.weights = before.slots + shape.num_selected * 4;
  before.grad_a = before.weights + shape.num_selected * shape.num_cores * acc;
  before.groups = before.grad_a + (shape.pre_value_dim > 0 ? shape.num_selected * acc : 0);
  before.grad_outs = before.groups + (shape.num_groups > 1 ? shape.num_selected : 0);
  before.pre_inputs = before.grad_outs + shape.num_groups * shape.value_dim * element;
  before.end = before.pre_inputs + shape.pre_value_dim * element;
  return before;
}

// Of an arena for that many tokens, rounded up.
constexpr int64_t factors_bytes(const TableFactorsShape& shape, int64_t num_tokens) {
  const int64_t capacity = (num_tokens + kFactorTokens - 1) / kFactorTokens * kFactorTokens;
  return kFactorsHeaderBytes + capacity * factors_sections(shape).end;
}

// Pointers into an arena, all of them multiples of 256 bytes from its beginning. "acc" is the
// accumulation dtype of the tables.
struct TableFactors : TableFactorsShape {
  int64_t capacity = 0;                  // tokens
  TableFactorsHeader* header = nullptr;  // null: no arena
  uint32_t* slots = nullptr;             // [capacity, S], rows in memory or kNoSlot
  void* weights = nullptr;               // [capacity, S, C] acc: act(a) * score
  void* grad_a = nullptr;                // [capacity, S] acc: da; null without pre-values
  uint8_t* groups = nullptr;             // [capacity, S]; null for a single group
  void* grad_outs = nullptr;             // [capacity, groups, Dv]
  void* pre_inputs = nullptr;            // [capacity, Dp]; null without pre-values
};

// The arena of `bytes` bytes at `memory`, which is aligned to 16 bytes at least. An arena of
// another shape, told by its size, has a null header.
inline TableFactors factors_in(const TableFactorsShape& shape, void* memory, int64_t bytes) {
  TableFactors factors;
  static_cast<TableFactorsShape&>(factors) = shape;
  const TableFactorsSections before = factors_sections(shape);
  const int64_t room = bytes - kFactorsHeaderBytes;
  if (room < 0 || room % (kFactorTokens * before.end) != 0) return factors;
  factors.capacity = room / before.end;
  auto* base = static_cast<unsigned char*>(memory);
  const auto at = [&](int64_t section) -> void* {
    return base + kFactorsHeaderBytes + factors.capacity * section;
  };
  factors.header = reinterpret_cast<TableFactorsHeader*>(base);
  factors.slots = static_cast<uint32_t*>(at(before.slots));
  factors.weights = at(before.weights);
  if (shape.pre_value_dim > 0) factors.grad_a = at(before.grad_a);
  if (shape.num_groups > 1) factors.groups = static_cast<uint8_t*>(at(before.groups));
  factors.grad_outs = at(before.grad_outs);
  if (shape.pre_value_dim > 0) factors.pre_inputs = at(before.pre_inputs);
  return factors;
}

// The backward that appends to `factors` instead of writing gradients of the tables, which must be
// null, as must grad_a. Invalid also: a null header, a shape other than the factors', more than
// kMaxFactorGroups groups, a table of 2^32 - 1 rows or more. Where there are scales, the factors
// are those of the gradients of the products with them. Where the tokens do not fit in what is left
// of the capacity, nothing is appended and the header's overflow grows by their number; the other
// gradients are right all the same.
struct ValueFfnBwdDeferredParams : ValueFfnBwdParams {
  TableFactors factors;
};

// Factors that are known already, as where a token's dot products were summed over the shards of a
// table: appended as the backward appends its own. T, S, C, Dv, Dp, the dtypes and the groups are
// those of `factors`.
struct TableFactorsAppendParams {
  int64_t num_tokens = 0;  // T
  bool sum_groups = true;
  bool indices_are_int64 = true;
  AddressingParams addressing;

  const void* indices = nullptr;    // [T, S] int64 or int32
  const void* weights = nullptr;    // [T, S, C] acc
  const void* grad_a = nullptr;     // [T, S] acc; null without pre-values
  const void* grad_out = nullptr;   // [T, Dv] or [T, E, Dv]
  const void* pre_input = nullptr;  // [T, Dp]; null without pre-values
  TableFactors factors;
};

}  // namespace ULTRAMEM_API

namespace cpu ULTRAMEM_PUBLIC {
size_t value_ffn_bwd_deferred_workspace(const ValueFfnBwdDeferredParams& params,
                                        const Executor& executor);
// One call at a time on the same factors.
Status value_ffn_bwd_deferred(const ValueFfnBwdDeferredParams& params, const Executor& executor);
Status table_factors_append(const TableFactorsAppendParams& params, const Executor& executor);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
// The position to append at is read and advanced on the device, in the stream's order: calls on the
// same factors from several streams or host threads are the caller's to order.
size_t value_ffn_bwd_deferred_workspace(const ValueFfnBwdDeferredParams& params);
Status value_ffn_bwd_deferred(const ValueFfnBwdDeferredParams& params, Stream stream);
Status table_factors_append(const TableFactorsAppendParams& params, Stream stream);
// Whether a CUDA graph is being captured from the stream: what is launched there will write to the
// same arena at every replay.
Status is_capturing(Stream stream, bool* capturing);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
