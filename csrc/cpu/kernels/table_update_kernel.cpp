// Optimizer steps on the value tables: a worker takes runs of entries, sums the gradient of a row
// and updates the row at once. Compiled without contraction, see common/table_update_math.h.
#include "ultramem/table_update.h"

#include "../arena.h"
#include "../parallel.h"
#include "common/row_runs.h"
#include "common/table_update_math.h"
#include "kernels.h"
#include "rows.h"

namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY {
namespace {

constexpr int64_t kRunsPerTile = 32;
constexpr int64_t kEntriesAhead = 8;  // whose rows are being fetched
constexpr int64_t kRowsPerTile = 256;

// The gradient of a row and what adding it up takes, [workers, 3, dim].
template <typename Acc>
struct Scratch {
  Acc* base;
  int64_t stride;

  Acc* sum(int64_t worker) const { return base + worker * 3 * stride; }
  Acc* group(int64_t worker) const { return sum(worker) + stride; }
  Acc* piece(int64_t worker) const { return sum(worker) + 2 * stride; }
};

template <typename Acc>
Scratch<Acc> take_scratch(const TableGradient& g, const Executor& executor, Arena* arena) {
  const int64_t stride = round_up(g.dim, 16);
  return {arena->take<Acc>(worker_count(executor) * 3 * stride), stride};
}

int64_t num_runs(const TableGradient& g) { return g.keys == nullptr ? g.num_rows : g.counts[0]; }

// Source: element type of grad_outs or pre_inputs, or of a dense gradient.
template <typename Acc, typename Source>
class GradientRows {
 public:
  GradientRows(const TableGradient& gradient, const Scratch<Acc>& scratch)
      : g_(gradient), scratch_(scratch), piece_(piece_length(gradient.num_entries)) {}

  int64_t row(int64_t run) const {
    return g_.keys == nullptr ? run : static_cast<int64_t>(g_.keys[g_.run_begins[run]]);
  }

  // The gradient of the run's row, in this worker's scratch.
  const Acc* sum(int64_t run, int64_t worker) const {
    Acc* sum = scratch_.sum(worker);
    if (g_.keys == nullptr) {
      widen(sum, static_cast<const Source*>(g_.source) + run * g_.dim, g_.dim);
      return sum;
    }
    const uint32_t begin = g_.run_begins[run], end = g_.run_begins[run + 1];
    if (end - begin <= piece_) {
      add_entries(begin, end, sum);
      return sum;
    }
    const uint32_t pieces = (end - begin - 1) / piece_ + 1;
    const uint32_t at_once = pieces > kPiecesPerGroup ? kPiecesPerGroup : 1;
    set_zero(sum, g_.dim);
    for (uint32_t first = 0; first < pieces; first += at_once) {
      Acc* group = scratch_.group(worker);
      add_piece(begin, end, first, group);
      for (uint32_t i = first + 1; i < smaller(first + at_once, pieces); ++i) {
        Acc* piece = scratch_.piece(worker);
        add_piece(begin, end, i, piece);
        add_scaled(group, Acc{1}, piece, g_.dim);
      }
      add_scaled(sum, Acc{1}, group, g_.dim);
    }
    return sum;
  }

 private:
  const Source* source_row(uint32_t position) const {
    const int64_t entry = g_.entries[position];
    int64_t row = entry / g_.num_selected * g_.num_groups;
    if (g_.groups != nullptr) row += smaller<int64_t>(g_.groups[entry], g_.num_groups - 1);
    return static_cast<const Source*>(g_.source) + row * g_.dim;
  }

  void add_piece(uint32_t begin, uint32_t end, uint32_t piece, Acc* out) const {
    const uint32_t first = begin + piece * piece_;
    add_entries(first, smaller(end, first + piece_), out);
  }

  void add_entries(uint32_t begin, uint32_t end, Acc* out) const {
    set_zero(out, g_.dim);
    const int64_t slice = g_.dim / g_.num_cores;
    for (uint32_t position = begin; position < end; ++position) {
      // Also those of the runs that follow.
      if (position + kEntriesAhead < g_.num_entries) {
        prefetch_row(source_row(position + kEntriesAhead), g_.dim);
      }
      const Source* source = source_row(position);
      const Acc* weights = static_cast<const Acc*>(g_.weights) +
                           static_cast<int64_t>(g_.entries[position]) * g_.num_cores;
      for (int c = 0; c < g_.num_cores; ++c) {
        add_scaled(out + c * slice, weights[c], source + c * slice, slice);
      }
    }
  }

  const TableGradient& g_;
  const Scratch<Acc>& scratch_;
  uint32_t piece_;
};

template <typename Acc, typename Body>
void with_source(const TableGradient& gradient, const Body& body) {
  with_type_accumulating_in<Acc>(gradient.source_dtype, [&](auto source) {
    body(source);
    return 0;
  });
}

// --- sum of squares

template <typename Acc>
void sum_squares(const TableGradSumSqParams& p, const Executor& executor) {
  Arena arena(p.workspace);
  const Scratch<Acc> scratch = take_scratch<Acc>(p.gradient, executor, &arena);
  const int64_t runs = num_runs(p.gradient), tiles = div_up(runs, kRunsPerTile);
  double* sums = arena.take<double>(div_up(p.gradient.num_rows, kRunsPerTile));
  with_source<Acc>(p.gradient, [&](auto source) {
    const GradientRows<Acc, decltype(source)> rows(p.gradient, scratch);
    parallel_tiles(executor, tiles, [&](int64_t worker, int64_t tile) {
      double sum = 0;
      for (int64_t run = tile * kRunsPerTile; run < smaller(runs, (tile + 1) * kRunsPerTile);
           ++run) {
        const Acc* row = rows.sum(run, worker);
        for (int64_t i = 0; i < p.gradient.dim; ++i) {
          sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
        }
      }
      sums[tile] = sum;
    });
  });
  double total = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) total += sums[tile];
  *p.sum_sq = total;
}

// --- update

// kCount consecutive elements of a dtype known at run time.
template <int kCount, typename Acc>
ULTRAMEM_ALWAYS_INLINE void load_block(const void* from, DType dtype, int64_t index, Acc* to) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    for (int i = 0; i < kCount; ++i) to[i] = static_cast<const double*>(from)[index + i];
  } else if (dtype == DType::kBFloat16) {
    for (int i = 0; i < kCount; ++i) to[i] = to_acc(static_cast<const BFloat16*>(from)[index + i]);
  } else if (dtype == DType::kFloat16) {
    for (int i = 0; i < kCount; ++i) to[i] = to_acc(static_cast<const Float16*>(from)[index + i]);
  } else {
    for (int i = 0; i < kCount; ++i) to[i] = static_cast<const float*>(from)[index + i];
  }
}

// How a tensor's elements are rounded: its dtype, and random numbers or none.
struct Rounding {
  DType dtype;
  bool stochastic;
  RoundedTensor tensor;
};

// The blocks of one row.
template <typename Acc>
class RowBlocks {
 public:
  RowBlocks(const TableUpdateParams& params, const UpdateScalars<Acc>& scalars, int64_t row)
      : p_(params), s_(scalars), row_(row) {}

  template <int kCount>
  void load(const void* from, DType dtype, int64_t column, Acc* to) const {
    load_block<kCount>(from, dtype, row_ * p_.gradient.dim + column, to);
  }

  template <int kCount>
  void store(void* to, const Rounding& rounding, int64_t column, const Acc* from) const {
    const int64_t index = row_ * p_.gradient.dim + column;
    if constexpr (sizeof(Acc) == sizeof(double)) {
      for (int i = 0; i < kCount; ++i) static_cast<double*>(to)[index + i] = from[i];
    } else if (rounding.dtype == DType::kFloat32) {
      for (int i = 0; i < kCount; ++i) static_cast<float*>(to)[index + i] = from[i];
    } else if (rounding.stochastic) {
      // Those of the block's columns lie in one draw (RowUpdate).
      const int64_t whole_column = p_.first_column + column;
      const int64_t first = whole_column / kLaneColumns * kLaneColumns;
      const RandomBits random =
          random_bits(p_.seed, p_.stream, rounding.tensor, s_.step,
                      static_cast<uint32_t>(p_.first_row + row_), static_cast<uint32_t>(first));
      uint16_t* out = static_cast<uint16_t*>(to) + index;
      const bool bfloat16 = rounding.dtype == DType::kBFloat16;
      for (int i = 0; i < kCount; ++i) {
        const uint32_t bits = random[static_cast<int>(whole_column - first) + i];
        out[i] = bfloat16 ? round_to_bfloat16(from[i], bits) : round_to_float16(from[i], bits);
      }
    } else if (rounding.dtype == DType::kBFloat16) {
      for (int i = 0; i < kCount; ++i) {
        static_cast<BFloat16*>(to)[index + i] = from_acc<BFloat16>(from[i]);
      }
    } else {
      for (int i = 0; i < kCount; ++i) {
        static_cast<Float16*>(to)[index + i] = from_acc<Float16>(from[i]);
      }
    }
  }

 private:
  const TableUpdateParams& p_;
  const UpdateScalars<Acc>& s_;
  int64_t row_;
};

// Adds the squares as row_lanes lanes would.
template <typename Acc>
Acc sum_row_squares(const Acc* row, Acc scale, int64_t dim) {
  const int num_lanes = row_lanes(dim);
  Acc lanes[kMaxRowLanes] = {};
  for (int64_t column = 0; column < dim; ++column) {
    const Acc g = mul(row[column], scale);
    Acc& lane = lanes[column / kLaneColumns % num_lanes];
    lane = add(lane, mul(g, g));
  }
  for (int distance = num_lanes / 2; distance > 0; distance /= 2) {
    for (int i = 0; i < distance; ++i) lanes[i] = add(lanes[i], lanes[i + distance]);
  }
  return lanes[0];
}

template <typename Acc>
class RowUpdate {
 public:
  RowUpdate(const TableUpdateParams& params, const UpdateScalars<Acc>& scalars)
      : p_(params),
        s_(scalars),
        weight_{params.table_dtype, params.stochastic_rounding && params.master == nullptr,
                RoundedTensor::kWeight},
        exp_avg_{params.state_dtype, params.stochastic_rounding, RoundedTensor::kExpAvg},
        exp_avg_sq_{params.state_dtype, params.stochastic_rounding, RoundedTensor::kExpAvgSq} {}

  void operator()(int64_t run, int64_t row, const Acc* gradient) const {
    const int64_t dim = p_.gradient.dim;
    Acc step_size = s_.step_size;
    if (p_.optimizer == TableOptimizer::kAdagrad) {
      const Acc sum_sq =
          p_.row_sq == nullptr ? sum_row_squares(gradient, s_.grad_scale, dim) : Acc{0};
      const Acc mean_sq = adagrad_mean_sq(p_, s_, run, sum_sq);
      step_size = adagrad_step_size(s_, mean_sq, static_cast<Acc*>(p_.row_sum) + row);
    }
    // Blocks begin at multiples of their length in the whole table, so that their random bits are
    // one draw.
    const int64_t head =
        smaller((kLaneColumns - p_.first_column % kLaneColumns) % kLaneColumns, dim);
    int64_t column = 0;
    for (; column < head; ++column) update<1>(row, column, gradient, step_size);
    for (; column + kLaneColumns <= dim; column += kLaneColumns) {
      update<kLaneColumns>(row, column, gradient, step_size);
    }
    for (; column < dim; ++column) update<1>(row, column, gradient, step_size);
  }

 private:
  template <int kCount>
  ULTRAMEM_ALWAYS_INLINE void update(int64_t row, int64_t column, const Acc* gradient,
                                     Acc step_size) const {
    const RowBlocks<Acc> blocks(p_, s_, row);
    Acc g[kCount], weight[kCount];
    for (int i = 0; i < kCount; ++i) g[i] = mul(gradient[column + i], s_.grad_scale);
    const bool has_master = p_.master != nullptr;
    blocks.template load<kCount>(has_master ? static_cast<const void*>(p_.master) : p_.weight,
                                 has_master ? DType::kFloat32 : p_.table_dtype, column, weight);
    if (p_.optimizer == TableOptimizer::kAdam) {
      Acc exp_avg[kCount], exp_avg_sq[kCount];
      blocks.template load<kCount>(p_.exp_avg, p_.state_dtype, column, exp_avg);
      blocks.template load<kCount>(p_.exp_avg_sq, p_.state_dtype, column, exp_avg_sq);
      for (int i = 0; i < kCount; ++i) {
        adam_update(s_, g[i], &weight[i], &exp_avg[i], &exp_avg_sq[i]);
      }
      blocks.template store<kCount>(p_.exp_avg, exp_avg_, column, exp_avg);
      blocks.template store<kCount>(p_.exp_avg_sq, exp_avg_sq_, column, exp_avg_sq);
    } else {
      for (int i = 0; i < kCount; ++i) descend(s_.keep, step_size, g[i], &weight[i]);
    }
    if (has_master) {
      blocks.template store<kCount>(p_.master, {DType::kFloat32, false, RoundedTensor::kWeight},
                                    column, weight);
    }
    blocks.template store<kCount>(p_.weight, weight_, column, weight);
  }

  const TableUpdateParams& p_;
  const UpdateScalars<Acc>& s_;
  Rounding weight_, exp_avg_, exp_avg_sq_;
};

// All weights times scalars.rescale, rounded to nearest.
template <typename Acc>
void rescale(const TableUpdateParams& p, const UpdateScalars<Acc>& scalars,
             const Executor& executor) {
  const int64_t rows = p.gradient.num_rows;
  const bool has_master = p.master != nullptr;
  parallel_tiles(executor, div_up(rows, kRowsPerTile), [&](int64_t, int64_t tile) {
    for (int64_t row = tile * kRowsPerTile; row < smaller(rows, (tile + 1) * kRowsPerTile); ++row) {
      const RowBlocks<Acc> blocks(p, scalars, row);
      for (int64_t column = 0; column < p.gradient.dim; ++column) {
        Acc weight;
        blocks.template load<1>(has_master ? static_cast<const void*>(p.master) : p.weight,
                                has_master ? DType::kFloat32 : p.table_dtype, column, &weight);
        weight = mul(weight, scalars.rescale);
        if (has_master) {
          blocks.template store<1>(p.master, {DType::kFloat32, false, RoundedTensor::kWeight},
                                   column, &weight);
        }
        blocks.template store<1>(p.weight, {p.table_dtype, false, RoundedTensor::kWeight}, column,
                                 &weight);
      }
    }
  });
}

template <typename Acc>
void update(const TableUpdateParams& p, const Executor& executor) {
  const UpdateScalars<Acc> scalars = prepare_update<Acc>(p);
  if (scalars.skip) return;
  if (scalars.rescale != 1) rescale(p, scalars, executor);
  Arena arena(p.workspace);
  const Scratch<Acc> scratch = take_scratch<Acc>(p.gradient, executor, &arena);
  const RowUpdate<Acc> update_row(p, scalars);
  const int64_t runs = num_runs(p.gradient);
  with_source<Acc>(p.gradient, [&](auto source) {
    const GradientRows<Acc, decltype(source)> rows(p.gradient, scratch);
    parallel_tiles(executor, div_up(runs, kRunsPerTile), [&](int64_t worker, int64_t tile) {
      for (int64_t run = tile * kRunsPerTile; run < smaller(runs, (tile + 1) * kRunsPerTile);
           ++run) {
        update_row(run, rows.row(run), rows.sum(run, worker));
      }
    });
  });
}

// Into Acc[min(n, N)].
template <typename Acc>
void row_squares(const TableGradRowSqParams& p, const Executor& executor) {
  const TableGradient& g = p.gradient;
  Arena arena(p.workspace);
  const Scratch<Acc> scratch = take_scratch<Acc>(g, executor, &arena);
  auto* row_sq = static_cast<Acc*>(p.row_sq);
  const int64_t runs = num_runs(g);
  if (runs < max_runs(g)) set_zero(row_sq + runs, max_runs(g) - runs);
  with_source<Acc>(g, [&](auto source) {
    const GradientRows<Acc, decltype(source)> rows(g, scratch);
    parallel_tiles(executor, div_up(runs, kRunsPerTile), [&](int64_t worker, int64_t tile) {
      for (int64_t run = tile * kRunsPerTile; run < smaller(runs, (tile + 1) * kRunsPerTile);
           ++run) {
        row_sq[run] = sum_row_squares(rows.sum(run, worker), Acc{1}, g.dim);
      }
    });
  });
}

// Of what goes over the rows of a gradient and keeps nothing else.
template <typename Acc>
size_t gradient_workspace(const TableGradient& g, const Executor& executor) {
  Arena arena(nullptr);
  take_scratch<Acc>(g, executor, &arena);
  return arena.bytes();
}

template <typename Acc>
size_t sum_squares_workspace(const TableGradSumSqParams& p, const Executor& executor) {
  Arena arena(nullptr);
  take_scratch<Acc>(p.gradient, executor, &arena);
  arena.take<double>(div_up(p.gradient.num_rows, kRunsPerTile));
  return arena.bytes();
}

}  // namespace

size_t table_grad_sum_sq_workspace(const TableGradSumSqParams& params, const Executor& executor) {
  return params.acc_dtype == DType::kFloat64 ? sum_squares_workspace<double>(params, executor)
                                             : sum_squares_workspace<float>(params, executor);
}

void table_grad_sum_sq(const TableGradSumSqParams& params, const Executor& executor) {
  if (params.acc_dtype == DType::kFloat64) {
    sum_squares<double>(params, executor);
  } else {
    sum_squares<float>(params, executor);
  }
}

size_t table_grad_row_sq_workspace(const TableGradRowSqParams& params, const Executor& executor) {
  return params.acc_dtype == DType::kFloat64 ? gradient_workspace<double>(params.gradient, executor)
                                             : gradient_workspace<float>(params.gradient, executor);
}

void table_grad_row_sq(const TableGradRowSqParams& params, const Executor& executor) {
  if (params.acc_dtype == DType::kFloat64) {
    row_squares<double>(params, executor);
  } else {
    row_squares<float>(params, executor);
  }
}

size_t table_update_workspace(const TableUpdateParams& params, const Executor& executor) {
  return params.table_dtype == DType::kFloat64
             ? gradient_workspace<double>(params.gradient, executor)
             : gradient_workspace<float>(params.gradient, executor);
}

void table_update(const TableUpdateParams& params, const Executor& executor) {
  if (params.table_dtype == DType::kFloat64) {
    update<double>(params, executor);
  } else {
    update<float>(params, executor);
  }
}

}  // namespace ultramem::cpu::ULTRAMEM_CPU_CAPABILITY
