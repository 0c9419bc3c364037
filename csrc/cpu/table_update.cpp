// Optimizer steps on the value tables on the CPU: checks, the order of the entries, then the
// kernels of this machine's instruction set.
#include "ultramem/table_update.h"

#include "arena.h"
#include "common/row_runs.h"
#include "common/table_update_checks.h"
#include "kernel_table.h"
#include "parallel.h"
#include "row_groups.h"

namespace ultramem {

int64_t table_group_max_pieces(int64_t num_entries) { return num_piece_sums(num_entries); }

namespace cpu {
namespace {

constexpr int64_t kEntriesPerTile = 16384;

struct GroupLayout {
  int64_t* rows;  // [n]
  char* grouping;
};

// One row more than the table has: that of the entries out of range.
GroupLayout lay_out(const TableGroupParams& p, const Executor& executor, Arena* arena) {
  GroupLayout layout;
  layout.rows = arena->take<int64_t>(p.num_entries);
  layout.grouping = arena->take<char>(
      static_cast<int64_t>(group_rows_workspace(p.num_entries, p.num_rows + 1, executor)));
  return layout;
}

}  // namespace

size_t table_group_workspace(const TableGroupParams& params, const Executor& executor) {
  if (!check_table_group(params).ok() || params.num_entries == 0) return 0;
  Arena arena(nullptr);
  lay_out(params, executor, &arena);
  return arena.bytes();
}

Status table_group(const TableGroupParams& p, const Executor& executor) {
  const Status status = check_table_group(p);
  if (!status.ok()) return status;
  p.counts[0] = p.counts[1] = 0;
  p.run_begins[0] = 0;
  if (p.num_entries == 0) return {};
  if (p.workspace == nullptr) return Status::invalid_argument("table_group: workspace is null");

  Arena arena(p.workspace);
  const GroupLayout layout = lay_out(p, executor, &arena);
  parallel_tiles(executor, (p.num_entries - 1) / kEntriesPerTile + 1, [&](int64_t, int64_t tile) {
    const int64_t begin = tile * kEntriesPerTile;
    for (int64_t e = begin; e < p.num_entries && e < begin + kEntriesPerTile; ++e) {
      layout.rows[e] = p.slots[e] < p.num_rows ? p.slots[e] : p.num_rows;
    }
  });
  const RowGroups groups =
      group_rows(layout.rows, p.num_entries, p.num_rows + 1, layout.grouping, executor);
  parallel_tiles(executor, groups.num_buckets, [&](int64_t, int64_t bucket) {
    for (int64_t i = groups.bucket_begin[bucket]; i < groups.bucket_begin[bucket + 1]; ++i) {
      p.entries[i] = static_cast<uint32_t>(groups.pairs[i]);
      p.keys[i] = static_cast<uint32_t>((bucket << groups.shift) +
                                        static_cast<int64_t>(groups.pairs[i] >> 32));
    }
  });

  int32_t runs = 0;
  int64_t position = 0;
  for (; position < p.num_entries && p.keys[position] < p.num_rows; ++position) {
    if (position == 0 || p.keys[position] != p.keys[position - 1]) {
      p.run_begins[runs++] = static_cast<uint32_t>(position);
    }
  }
  p.run_begins[runs] = static_cast<uint32_t>(position);
  p.counts[0] = runs;  // the kernels find the pieces of a long run by themselves
  return {};
}

size_t table_grad_sum_sq_workspace(const TableGradSumSqParams& params, const Executor& executor) {
  if (!check_table_gradient(params.gradient, params.acc_dtype).ok()) return 0;
  return kernel_table().table_grad_sum_sq_workspace(params, executor);
}

Status table_grad_sum_sq(const TableGradSumSqParams& params, const Executor& executor) {
  const Status status = check_table_gradient(params.gradient, params.acc_dtype);
  if (!status.ok()) return status;
  if (params.workspace == nullptr) {
    return Status::invalid_argument("table_grad_sum_sq: workspace is null");
  }
  kernel_table().table_grad_sum_sq(params, executor);
  return {};
}

size_t table_grad_row_sq_workspace(const TableGradRowSqParams& params, const Executor& executor) {
  if (!check_table_gradient(params.gradient, params.acc_dtype).ok()) return 0;
  return kernel_table().table_grad_row_sq_workspace(params, executor);
}

Status table_grad_row_sq(const TableGradRowSqParams& params, const Executor& executor) {
  const Status status = check_table_gradient(params.gradient, params.acc_dtype);
  if (!status.ok()) return status;
  if (params.workspace == nullptr) {
    return Status::invalid_argument("table_grad_row_sq: workspace is null");
  }
  kernel_table().table_grad_row_sq(params, executor);
  return {};
}

size_t table_update_workspace(const TableUpdateParams& params, const Executor& executor) {
  if (!check_table_update(params).ok()) return 0;
  return kernel_table().table_update_workspace(params, executor);
}

Status table_update(const TableUpdateParams& params, const Executor& executor) {
  const Status status = check_table_update(params);
  if (!status.ok()) return status;
  if (params.workspace == nullptr) {
    return Status::invalid_argument("table_update: workspace is null");
  }
  kernel_table().table_update(params, executor);
  return {};
}

}  // namespace cpu
}  // namespace ultramem
