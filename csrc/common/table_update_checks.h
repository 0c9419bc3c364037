// What both backends refuse of a table's optimizer step.
#pragma once

#include "ultramem/table_update.h"

namespace ultramem {
namespace {

constexpr int64_t kMaxTableEntries = int64_t{1} << 31;
constexpr int64_t kMaxTableRows = (int64_t{1} << 32) - 1;

inline bool is_known(DType dtype) { return dtype >= DType::kFloat32 && dtype <= DType::kFloat64; }

inline Status check_table_group(const TableGroupParams& p) {
  if (p.num_entries < 0 || p.num_entries >= kMaxTableEntries) {
    return Status::invalid_argument("table_group: there must be fewer than 2^31 entries");
  }
  if (p.num_rows < 1 || p.num_rows >= kMaxTableRows) {
    return Status::invalid_argument("table_group: num_rows must be in 1..2^32-2");
  }
  return {};
}

inline Status check_table_gradient(const TableGradient& g, DType acc_dtype) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  if (g.num_rows < 0 || g.num_rows >= kMaxTableRows) {
    return invalid("table_update: num_rows must be in 0..2^32-2");
  }
  if (g.dim < 1 || g.dim >= int64_t{1} << 31) {
    return invalid("table_update: a row must have 1..2^31-1 columns");
  }
  if (!is_known(g.source_dtype) ||
      accumulation_dtype(g.source_dtype) != accumulation_dtype(acc_dtype)) {
    return invalid("table_update: the gradient must be float64 if and only if the table is");
  }
  if (g.num_cores < 1 || g.num_cores > kMaxNumCores || g.dim % g.num_cores != 0) {
    return invalid("table_update: num_cores must be 1..4 and divide the columns of a row");
  }
  if (g.keys == nullptr) return {};
  if (g.num_entries < 0 || g.num_entries >= kMaxTableEntries) {
    return invalid("table_update: there must be fewer than 2^31 entries");
  }
  if (g.num_selected < 1 || g.num_groups < 1 || g.num_groups > 256) {
    return invalid("table_update: num_selected must be positive, num_groups in 1..256");
  }
  if (g.num_entries / g.num_selected * g.num_groups >= int64_t{1} << 32) {
    return invalid("table_update: there must be fewer than 2^32 rows to sum");
  }
  if (g.num_groups > 1 && g.groups == nullptr) {
    return invalid("table_update: more than one group needs the groups of the entries");
  }
  return {};
}

// Of a shard: where it lies in the whole table.
inline Status check_shard(const TableUpdateParams& p) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  if (p.first_row < 0 || p.first_row >= kMaxTableRows - p.gradient.num_rows) {
    return invalid("table_update: first_row + num_rows must be in 0..2^32-2");
  }
  if (p.first_column < 0 || p.first_column >= (int64_t{1} << 31) - p.gradient.dim) {
    return invalid("table_update: the columns must end below 2^31");
  }
  if (p.row_sq == nullptr) {
    return p.row_columns == 0 ? Status{} : invalid("table_update: row_columns needs row_sq");
  }
  if (p.optimizer != TableOptimizer::kAdagrad) {
    return invalid("table_update: row_sq is Adagrad's");
  }
  if (p.row_columns != 0 && p.row_columns < p.gradient.dim) {
    return invalid("table_update: row_columns must be 0 or at least the columns of the gradient");
  }
  return {};
}

inline Status check_table_update(const TableUpdateParams& p) {
  const auto invalid = [](const char* message) { return Status::invalid_argument(message); };
  if (!is_known(p.table_dtype)) return invalid("table_update: unknown dtype");
  Status status = check_table_gradient(p.gradient, p.table_dtype);
  if (status.ok()) status = check_shard(p);
  if (!status.ok()) return status;
  if (p.step == nullptr) return invalid("table_update: step must not be null");
  const bool is_double = p.table_dtype == DType::kFloat64;
  if (p.master != nullptr && (is_double || p.table_dtype == DType::kFloat32)) {
    return invalid("table_update: a master copy is for bfloat16 and float16 tables");
  }
  switch (p.optimizer) {
    case TableOptimizer::kAdam:
      if (p.state_dtype != DType::kFloat32 && p.state_dtype != DType::kBFloat16 &&
          p.state_dtype != DType::kFloat64) {
        return invalid("table_update: the moments must be float32, bfloat16 or float64");
      }
      if ((p.state_dtype == DType::kFloat64) != is_double) {
        return invalid("table_update: the moments must be float64 if and only if the table is");
      }
      return {};
    case TableOptimizer::kAdagrad:
    case TableOptimizer::kSgd:
      return {};
  }
  return invalid("table_update: unknown optimizer");
}

}  // namespace
}  // namespace ultramem
