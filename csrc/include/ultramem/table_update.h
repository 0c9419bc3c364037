// Optimizer steps on the value tables: each row that a step touched, and its state, is read and
// written once, and no gradient table exists.
//
// The gradient of a table comes as factors (design: deferred gradients). An entry e = t * S + s is
// a retrieved slot, and
//   grad[slots[e], slice c] += weights[e, c] * source[t, group_e, slice c].
// table_group orders the entries by slot, once for both tables of a step; table_grad_sum_sq and
// table_update then take the terms of a row from a run of neighbours. A dense gradient goes the
// same way: every row is a run of one term, with weight 1.
//
// Arithmetic is fixed to the last bit: terms are added in the order of the entries (a long run in
// pieces, see common/row_runs.h), nothing is contracted to fused multiply-adds, and random numbers
// are counter-based. So the result depends on neither the launch, nor the number of threads, nor
// the backend. (The squares of table_grad_sum_sq are added in float64, in an order of each
// backend's own.)
//
// A table may be a shard of a larger one, some of its rows or some of its columns. It is updated as
// the whole would be, to the last bit, where first_row, first_column and, for Adagrad on some of
// the columns, row_sq say so.
#pragma once

#include "ultramem/types.h"

namespace ultramem {
inline namespace ULTRAMEM_API {

// Invalid: 2^31 entries or more, no rows, 2^32 - 1 rows or more.
struct TableGroupParams {
  const uint32_t* slots = nullptr;  // [n]; one outside [0, num_rows) contributes nothing
  int64_t num_entries = 0;          // n < 2^31
  int64_t num_rows = 0;             // N < 2^32 - 1

  uint32_t* keys = nullptr;        // [n]: slots in ascending order, those out of range as N
  uint32_t* entries = nullptr;     // [n]: their entries, ascending where slots are equal
  uint32_t* run_begins = nullptr;  // [min(n, N) + 1]: where runs of equal keys < N begin, and end
  uint32_t* pieces = nullptr;      // [table_group_max_pieces(n), 2]: (run, piece) of the long runs
  int32_t* counts = nullptr;       // [kGroupCounts]: runs, pieces

  void* workspace = nullptr;  // table_group_workspace(params) bytes
};

inline constexpr int kGroupCounts = 2;

// One table's gradient: factors, or a dense one, which has num_rows, dim, source and source_dtype
// alone. Invalid: C outside 1..4 or not dividing dim, a float64 source for another table, more than
// 256 groups, groups without their ids.
struct TableGradient {
  int64_t num_rows = 0;  // N
  int64_t dim = 0;       // columns of a row

  // The results of table_group; null for a dense gradient.
  const uint32_t* keys = nullptr;
  const uint32_t* entries = nullptr;
  const uint32_t* run_begins = nullptr;
  const uint32_t* pieces = nullptr;
  const int32_t* counts = nullptr;
  int64_t num_entries = 0;  // n; null keys mean a dense gradient, so 0 needs some pointer there

  const void* weights = nullptr;    // [n, C] acc
  const uint8_t* groups = nullptr;  // [n] or null: group of an entry, below num_groups
  // [n / num_selected, num_groups, dim]; a dense gradient: [N, dim]
  const void* source = nullptr;
  DType source_dtype = DType::kFloat32;
  int32_t num_cores = 1;     // C divides dim
  int64_t num_selected = 1;  // S
  int64_t num_groups = 1;
};

// Runs, at most: how many sums of squares there are of rows.
inline int64_t max_runs(const TableGradient& gradient) {
  return gradient.keys == nullptr || gradient.num_rows < gradient.num_entries
             ? gradient.num_rows
             : gradient.num_entries;
}

struct TableGradSumSqParams {
  TableGradient gradient;
  DType acc_dtype = DType::kFloat32;  // float64 for float64 tables (CPU)
  double* sum_sq = nullptr;           // [1]: sum of the squares of all rows of the gradient
  void* workspace = nullptr;          // table_grad_sum_sq_workspace(params) bytes
};

// Adagrad's sums of squares, for shards that hold some columns of a row each: to be added up over
// them.
struct TableGradRowSqParams {
  TableGradient gradient;
  DType acc_dtype = DType::kFloat32;
  // [min(n, N)] acc, of a dense gradient [N]: sums of the squares of a row of the gradient, in the
  // order of the runs; zero behind the last run.
  void* row_sq = nullptr;
  void* workspace = nullptr;
};

enum class TableOptimizer : int32_t { kAdam = 0, kAdagrad = 1, kSgd = 2 };

// A table's scale that falls below this is multiplied by its inverse, and all weights by it.
inline constexpr double kMinTableScale = 0x1p-8;

// With g = gradient * grad_scale / loss_scale, p <- p * (1 - lr * weight_decay) and then
//   Adam     m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
//            p <- p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
//   Adagrad  s <- s + mean over the row of g^2;  p <- p - lr * g / (sqrt(s) + eps)
//   SGD      p <- p - lr * g
// With a scale, p is weight * scale. The decay is the scale's alone, which makes it that of every
// row, and the weights of touched rows move by 1 / scale of what p does. Where there is decay and
// 1 - lr * weight_decay is not in (0, 1], nothing changes, as where found_inf is not 0.
//
// Only rows that occur in the gradient move (of a dense gradient all do): without a scale, weight
// decay is theirs alone, too. Invalid: a null step, a master for a float32 or float64 table,
// moments of another dtype than noted.
struct TableUpdateParams {
  TableGradient gradient;
  TableOptimizer optimizer = TableOptimizer::kSgd;

  DType table_dtype = DType::kFloat32;
  void* weight = nullptr;               // [N, dim]
  float* master = nullptr;              // [N, dim] or null: the weights that bf16/fp16 ones round
  DType state_dtype = DType::kFloat32;  // of the moments: float32, bfloat16 (float64 with float64)
  void* exp_avg = nullptr;              // [N, dim]: m
  void* exp_avg_sq = nullptr;           // [N, dim]: v
  void* row_sum = nullptr;              // [N] acc: s
  float* step = nullptr;                // [1]: updates done; this one is counted first
  double* scale = nullptr;              // [1] or null for 1; positive

  // Scalars on the device, null for 1 (found_inf: 0).
  const float* lr = nullptr;          // multiplies learning_rate
  const float* grad_scale = nullptr;  // multiplies the gradient
  const float* loss_scale = nullptr;  // divides it
  const float* found_inf = nullptr;   // where it is not 0 nothing changes, step included

  double learning_rate = 0;
  double beta1 = 0, beta2 = 0;
  double eps = 0;
  bool eps_before_correction = false;  // Adam: / ((sqrt(v) + eps) / sqrt(1 - beta2^step))
  double weight_decay = 0;

  // bf16 weights and moments, and fp16 weights, are rounded stochastically with random numbers from
  // (seed, stream, step, row, column); else to nearest even. With a master, weights are rounded to
  // nearest.
  bool stochastic_rounding = false;
  uint64_t seed = 0;
  uint32_t stream = 0;  // a different one for every table
  // Of the weight's first element in the whole table, for the random numbers.
  int64_t first_row = 0;
  int64_t first_column = 0;

  // Adagrad: the sums of squares of the whole rows, laid out like those of table_grad_row_sq. They
  // are those of the gradient before it is multiplied by grad_scale / loss_scale; the step
  // multiplies them by its square. Null: those of the rows of `gradient`.
  const void* row_sq = nullptr;
  int64_t row_columns = 0;  // of a whole row, which the mean is over; 0: dim

  void* workspace = nullptr;  // table_update_workspace(params) bytes
};

}  // namespace ULTRAMEM_API

}  // namespace ultramem

namespace ultramem ULTRAMEM_PUBLIC {

// Rows of `pieces` for that many entries: runs longer than a piece are summed in pieces.
int64_t table_group_max_pieces(int64_t num_entries);

}  // namespace ultramem ULTRAMEM_PUBLIC

namespace ultramem {

namespace cpu ULTRAMEM_PUBLIC {
size_t table_group_workspace(const TableGroupParams& params, const Executor& executor);
Status table_group(const TableGroupParams& params, const Executor& executor);
size_t table_grad_sum_sq_workspace(const TableGradSumSqParams& params, const Executor& executor);
Status table_grad_sum_sq(const TableGradSumSqParams& params, const Executor& executor);
size_t table_grad_row_sq_workspace(const TableGradRowSqParams& params, const Executor& executor);
Status table_grad_row_sq(const TableGradRowSqParams& params, const Executor& executor);
size_t table_update_workspace(const TableUpdateParams& params, const Executor& executor);
Status table_update(const TableUpdateParams& params, const Executor& executor);
}  // namespace cpu ULTRAMEM_PUBLIC

namespace cuda ULTRAMEM_PUBLIC {
size_t table_group_workspace(const TableGroupParams& params);
Status table_group(const TableGroupParams& params, Stream stream);
size_t table_grad_sum_sq_workspace(const TableGradSumSqParams& params);
Status table_grad_sum_sq(const TableGradSumSqParams& params, Stream stream);
size_t table_grad_row_sq_workspace(const TableGradRowSqParams& params);
Status table_grad_row_sq(const TableGradRowSqParams& params, Stream stream);
size_t table_update_workspace(const TableUpdateParams& params);
Status table_update(const TableUpdateParams& params, Stream stream);
}  // namespace cuda ULTRAMEM_PUBLIC

}  // namespace ultramem
