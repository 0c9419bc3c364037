// Optimizer steps on the value tables: a warp sums the gradient of a row, in registers, and updates
// the row's columns there. Weights and states are read and written once.
//
// Rows of up to kTileColumns columns are a warp's. Longer ones are cut into tiles, which Adam and
// SGD take by themselves; Adagrad needs the squares of the whole row first: up to kAdagradTiles
// tiles stay in one warp's registers, for longer rows table_row_steps_kernel goes through the
// gradient before.
#include "common/table_update_checks.h"
#include "kernel_registry.h"
#include "table_gradient.cuh"
#include "table_rescale.h"

namespace ultramem::cuda {
namespace table_kernels {
namespace {

constexpr int kAdagradTiles = 4;
// Blocks a multiprocessor must hold: as many as there are registers for without spills.
template <typename TableT>
constexpr int min_blocks(TableOptimizer optimizer, int tiles) {
  if (tiles > 1) return 4;
  if (optimizer != TableOptimizer::kAdam) return 6;
  return std::is_same_v<TableT, __nv_bfloat16> ? 5 : 4;
}

struct UpdateArguments {
  GradientArguments gradient;
  TableUpdateParams update;
  const UpdateScalars<float>* scalars;
  const float* row_steps;  // [runs]: Adagrad's step sizes of rows that no warp holds; or null
  int64_t batch;           // runs of a warp
};

__global__ void table_prepare_kernel(const __grid_constant__ TableUpdateParams params,
                                     UpdateScalars<float>* scalars) {
  *scalars = prepare_update<float>(params);
}

// 8 neighbouring elements, as they are in memory: float ("wide") or of 16 bits.
struct Columns {
  uint4 words[2];

  // Streaming: nothing is used again in this step.
  __device__ __forceinline__ void load(const void* from, bool wide, int64_t index, int valid,
                                       bool vectors) {
    if (vectors) {
      if (wide) {
        const auto* at = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + index);
        words[0] = __ldcs(at);
        words[1] = __ldcs(at + 1);
      } else {
        words[0] =
            __ldcs(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + index));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      if (j >= valid) break;
      if (wide) {
        reinterpret_cast<uint32_t*>(words)[j] = static_cast<const uint32_t*>(from)[index + j];
      } else {
        reinterpret_cast<uint16_t*>(words)[j] = static_cast<const uint16_t*>(from)[index + j];
      }
    }
  }

  __device__ __forceinline__ void store(void* to, bool wide, int64_t index, int valid,
                                        bool vectors) const {
    if (vectors) {
      if (wide) {
        auto* at = reinterpret_cast<uint4*>(static_cast<float*>(to) + index);
        __stcs(at, words[0]);
        __stcs(at + 1, words[1]);
      } else {
        __stcs(reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + index), words[0]);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      if (j >= valid) break;
      if (wide) {
        static_cast<uint32_t*>(to)[index + j] = reinterpret_cast<const uint32_t*>(words)[j];
      } else {
        static_cast<uint16_t*>(to)[index + j] = reinterpret_cast<const uint16_t*>(words)[j];
      }
    }
  }

  // Narrow: __nv_bfloat16 or __half, of what is not wide.
  template <typename Narrow>
  __device__ __forceinline__ void get(bool wide, float (&x)[kLaneColumns]) const {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      x[j] = wide ? reinterpret_cast<const float*>(words)[j]
                  : to_float(reinterpret_cast<const Narrow*>(words)[j]);
    }
  }

  __device__ __forceinline__ void set_wide(const float (&x)[kLaneColumns]) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) reinterpret_cast<float*>(words)[j] = x[j];
  }
  template <typename Narrow>
  __device__ __forceinline__ void set_nearest(const float (&x)[kLaneColumns]) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      reinterpret_cast<Narrow*>(words)[j] = from_float<Narrow>(x[j]);
    }
  }
  template <typename Narrow>
  __device__ __forceinline__ void set_stochastic(const float (&x)[kLaneColumns],
                                                 const RandomBits& random) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      reinterpret_cast<uint16_t*>(words)[j] = std::is_same_v<Narrow, __half>
                                                  ? round_to_float16(x[j], random[j])
                                                  : round_to_bfloat16(x[j], random[j]);
    }
  }
};

// Where a lane's columns lie, of weights and moments alike.
struct LaneColumns {
  uint32_t row;
  int column, valid;
  int64_t index;
  bool vectors;
};

// A float for each column, rounded as its tensor is.
template <typename Narrow>
__device__ __forceinline__ void store_rounded(const TableUpdateParams& p, uint32_t step,
                                              RoundedTensor tensor, bool stochastic, void* to,
                                              bool wide, const LaneColumns& at,
                                              const float (&x)[kLaneColumns]) {
  Columns columns;
  if (wide) {
    columns.set_wide(x);
  } else if (stochastic) {
    columns.set_stochastic<Narrow>(
        x, random_bits(p.seed, p.stream, tensor, step, at.row, static_cast<uint32_t>(at.column)));
  } else {
    columns.set_nearest<Narrow>(x);
  }
  columns.store(to, wide, at.index, at.valid, at.vectors);
}

// A lane's columns of one row and its states.
template <typename TableT, TableOptimizer kOptimizer>
struct LaneState {
  // Of a float table nothing is narrow.
  using Narrow = std::conditional_t<std::is_same_v<TableT, float>, __nv_bfloat16, TableT>;

  Columns weight, exp_avg, exp_avg_sq;

  static __device__ __forceinline__ bool weight_is_wide(const TableUpdateParams& p) {
    return std::is_same_v<TableT, float> || p.master != nullptr;
  }

  __device__ __forceinline__ void load(const TableUpdateParams& p, const LaneColumns& at) {
    const void* from = p.master != nullptr ? p.master : p.weight;
    weight.load(from, weight_is_wide(p), at.index, at.valid, at.vectors);
    if constexpr (kOptimizer == TableOptimizer::kAdam) {
      const bool wide = p.state_dtype == DType::kFloat32;
      exp_avg.load(p.exp_avg, wide, at.index, at.valid, at.vectors);
      exp_avg_sq.load(p.exp_avg_sq, wide, at.index, at.valid, at.vectors);
    }
  }

  // g is scaled; step_size is that of the row.
  __device__ __forceinline__ void update(const TableUpdateParams& p, const UpdateScalars<float>& s,
                                         const LaneColumns& at, const float (&g)[kLaneColumns],
                                         float step_size) {
    float w[kLaneColumns];
    weight.get<Narrow>(weight_is_wide(p), w);
    if constexpr (kOptimizer == TableOptimizer::kAdam) {
      const bool wide = p.state_dtype == DType::kFloat32;
      float m[kLaneColumns], v[kLaneColumns];
      exp_avg.get<__nv_bfloat16>(wide, m);
      exp_avg_sq.get<__nv_bfloat16>(wide, v);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) adam_update(s, g[j], &w[j], &m[j], &v[j]);
      store_rounded<__nv_bfloat16>(p, s.step, RoundedTensor::kExpAvg, p.stochastic_rounding,
                                   p.exp_avg, wide, at, m);
      store_rounded<__nv_bfloat16>(p, s.step, RoundedTensor::kExpAvgSq, p.stochastic_rounding,
                                   p.exp_avg_sq, wide, at, v);
    } else {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) descend(s.keep, step_size, g[j], &w[j]);
    }
    if (p.master != nullptr) {
      weight.set_wide(w);
      weight.store(p.master, true, at.index, at.valid, at.vectors);
    }
    store_rounded<Narrow>(p, s.step, RoundedTensor::kWeight,
                          p.stochastic_rounding && p.master == nullptr, p.weight,
                          std::is_same_v<TableT, float>, at, w);
  }
};

// This lane's squares of a row's scaled gradient, after `sum`.
template <int kTiles>
__device__ __forceinline__ float add_squares(const RowSum<kTiles>& g, float sum) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) sum = add(sum, mul(g[t][j], g[t][j]));
  }
  return sum;
}

template <int kTiles>
__device__ __forceinline__ void scale_gradient(RowSum<kTiles>& g, float scale) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) g[t][j] = mul(g[t][j], scale);
  }
}

// The row's accumulator and, from it, its step size; for all lanes.
__device__ __forceinline__ float advance_row(const TableUpdateParams& p,
                                             const UpdateScalars<float>& s, uint32_t row,
                                             float lane_squares) {
  auto* row_sums = static_cast<float*>(p.row_sum);
  float row_sum = row_sums[row];
  const float step_size = adagrad_step_size(s, warp_sum(lane_squares), p.gradient.dim, &row_sum);
  if (threadIdx.x % kWarpSize == 0) row_sums[row] = row_sum;
  return step_size;
}

// A warp a batch of runs, blockIdx.y a stretch of kTiles tiles of their rows.
template <typename TableT, TableOptimizer kOptimizer, int kTiles>
__global__ void __launch_bounds__(kThreads, min_blocks<TableT>(kOptimizer, kTiles))
    table_update_kernel(const __grid_constant__ UpdateArguments arguments) {
  const UpdateScalars<float> s = *arguments.scalars;
  if (s.skip) return;
  const TableUpdateParams& p = arguments.update;
  const int dim = static_cast<int>(p.gradient.dim);
  const RowColumns<kTiles> columns{static_cast<int>(blockIdx.y) * kTiles * kTileColumns, dim};
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize) * arguments.batch;
  const RunBatch runs(p.gradient, first, arguments.batch);
  EntryWindow window;
  for (int i = 0; i < runs.count; ++i) {
    const uint32_t row = __shfl_sync(kFullMask, runs.row, i);
    const uint32_t begin = __shfl_sync(kFullMask, runs.begin, i);
    const uint32_t end = __shfl_sync(kFullMask, runs.end, i);
    const auto lane_columns = [&](int tile) {
      const int column = columns.column(tile);
      return LaneColumns{row, column, dim - column, int64_t{row} * dim + column,
                         arguments.gradient.vectors};
    };
    LaneState<TableT, kOptimizer> state;
    RowSum<kTiles> g;
    // A single tile's weights and states are on their way while the gradient is summed.
    if (kTiles == 1 && columns.column(0) < dim) state.load(p, lane_columns(0));
    row_gradient<kTiles>(arguments.gradient, columns, row, begin, end, &window, g);
    scale_gradient<kTiles>(g, s.grad_scale);
    float step_size = s.step_size;
    if constexpr (kOptimizer == TableOptimizer::kAdagrad) {
      step_size = arguments.row_steps != nullptr
                      ? arguments.row_steps[first + i]
                      : advance_row(p, s, row, add_squares<kTiles>(g, 0.0f));
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (columns.column(t) >= dim) break;
      const LaneColumns at = lane_columns(t);
      if (kTiles > 1) state.load(p, at);
      state.update(p, s, at, g[t], step_size);
    }
  }
}

// Adagrad's step sizes of rows that are too long for one warp's registers.
__global__ void __launch_bounds__(kThreads, min_blocks<float>(TableOptimizer::kSgd, 1))
    table_row_steps_kernel(const __grid_constant__ UpdateArguments arguments, float* row_steps) {
  const UpdateScalars<float> s = *arguments.scalars;
  if (s.skip) return;
  const TableUpdateParams& p = arguments.update;
  const int dim = static_cast<int>(p.gradient.dim);
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize) * arguments.batch;
  const RunBatch runs(p.gradient, first, arguments.batch);
  EntryWindow window;
  for (int i = 0; i < runs.count; ++i) {
    const uint32_t row = __shfl_sync(kFullMask, runs.row, i);
    const uint32_t begin = __shfl_sync(kFullMask, runs.begin, i);
    const uint32_t end = __shfl_sync(kFullMask, runs.end, i);
    float squares = 0;
    for (int column = 0; column < dim; column += kTileColumns) {
      RowSum<1> g;
      row_gradient<1>(arguments.gradient, {column, dim}, row, begin, end, &window, g);
      scale_gradient<1>(g, s.grad_scale);
      squares = add_squares<1>(g, squares);
    }
    const float step_size = advance_row(p, s, row, squares);
    if (threadIdx.x % kWarpSize == 0) row_steps[first + i] = step_size;
  }
}

// Host --------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_TABLE_UPDATE(id, name, TableT, optimizer, tiles)        \
  ULTRAMEM_REGISTER_KERNEL(table_update_##id, "table_update<" name ">", kThreads, \
                           table_update_kernel<TableT, TableOptimizer::optimizer, tiles>)
#define ULTRAMEM_REGISTER_TABLE_UPDATES(id, name, TableT)                                      \
  ULTRAMEM_REGISTER_TABLE_UPDATE(adam_##id, "adam," name, TableT, kAdam, 1);                   \
  ULTRAMEM_REGISTER_TABLE_UPDATE(adagrad_##id, "adagrad," name, TableT, kAdagrad, 1);          \
  ULTRAMEM_REGISTER_TABLE_UPDATE(adagrad_long_##id, "adagrad," name ",long", TableT, kAdagrad, \
                                 kAdagradTiles);                                               \
  ULTRAMEM_REGISTER_TABLE_UPDATE(sgd_##id, "sgd," name, TableT, kSgd, 1)
ULTRAMEM_REGISTER_TABLE_UPDATES(f32, "f32", float);
ULTRAMEM_REGISTER_TABLE_UPDATES(bf16, "bf16", __nv_bfloat16);
ULTRAMEM_REGISTER_TABLE_UPDATES(f16, "f16", __half);
ULTRAMEM_REGISTER_KERNEL(table_prepare, "table_prepare", 1, table_prepare_kernel);
ULTRAMEM_REGISTER_KERNEL(table_row_steps, "table_row_steps", kThreads, table_row_steps_kernel);

bool needs_row_steps(const TableUpdateParams& params) {
  return params.optimizer == TableOptimizer::kAdagrad &&
         params.gradient.dim > kAdagradTiles * kTileColumns;
}

// Where things lie in the workspace, in bytes from its beginning.
struct Workspace {
  size_t scalars, piece_sums, row_steps, total = 0;

  explicit Workspace(const TableUpdateParams& params) {
    scalars = take(sizeof(UpdateScalars<float>));
    piece_sums = take(piece_sums_bytes(params.gradient));
    row_steps = take(needs_row_steps(params) ? max_runs(params.gradient) * sizeof(float) : 0);
  }

 private:
  size_t take(size_t bytes) {
    const size_t offset = total;
    total += align_up(bytes);
    return offset;
  }
};

Status check(const TableUpdateParams& params) {
  ULTRAMEM_RETURN_IF_ERROR(check_table_update(params));
  if (params.table_dtype == DType::kFloat64) {
    return Status::invalid_argument("table_update: float64 is offered on the CPU only");
  }
  constexpr int64_t kMaxTiles = 65535;  // a grid's second dimension
  if (params.gradient.dim > kMaxTiles * kTileColumns) {
    return Status::invalid_argument("table_update: CUDA offers rows of up to 2^24 - 256 columns");
  }
  return {};
}

template <typename TableT, TableOptimizer kOptimizer, int kTiles>
Status launch_tiles(const UpdateArguments& arguments, unsigned blocks, cudaStream_t stream) {
  const auto stretches =
      static_cast<unsigned>(ceil_div(arguments.update.gradient.dim, kTiles * kTileColumns));
  table_update_kernel<TableT, kOptimizer, kTiles>
      <<<dim3(blocks, stretches), kThreads, 0, stream>>>(arguments);
  return launch_status();
}

template <typename TableT>
Status launch(const UpdateArguments& arguments, unsigned blocks, cudaStream_t stream) {
  switch (arguments.update.optimizer) {
    case TableOptimizer::kAdam:
      return launch_tiles<TableT, TableOptimizer::kAdam, 1>(arguments, blocks, stream);
    case TableOptimizer::kSgd:
      return launch_tiles<TableT, TableOptimizer::kSgd, 1>(arguments, blocks, stream);
    case TableOptimizer::kAdagrad:
      break;
  }
  if (arguments.row_steps != nullptr || arguments.update.gradient.dim <= kTileColumns) {
    return launch_tiles<TableT, TableOptimizer::kAdagrad, 1>(arguments, blocks, stream);
  }
  return launch_tiles<TableT, TableOptimizer::kAdagrad, kAdagradTiles>(arguments, blocks, stream);
}

bool update_is_vectors(const TableUpdateParams& params) {
  return params.gradient.dim % kLaneColumns == 0 && is_aligned(params.weight) &&
         is_aligned(params.master) && is_aligned(params.exp_avg) && is_aligned(params.exp_avg_sq);
}

}  // namespace
}  // namespace table_kernels

using namespace table_kernels;

size_t table_update_workspace(const TableUpdateParams& params) {
  return check(params).ok() ? Workspace(params).total : 0;
}

Status table_update(const TableUpdateParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check(params));
  if (params.workspace == nullptr) {
    return Status::invalid_argument("table_update: the workspace must not be null");
  }
  const Workspace workspace(params);
  auto* base = static_cast<unsigned char*>(params.workspace);
  auto* scalars = reinterpret_cast<UpdateScalars<float>*>(base + workspace.scalars);
  table_prepare_kernel<<<1, 1, 0, stream>>>(params, scalars);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  if (decays_scale(params)) {
    ULTRAMEM_RETURN_IF_ERROR(launch_table_rescale(params, &scalars->rescale, stream));
  }
  const int64_t runs = max_runs(params.gradient);
  if (runs == 0) return {};

  auto* piece_sums = reinterpret_cast<float*>(base + workspace.piece_sums);
  UpdateArguments arguments{
      gradient_arguments(params.gradient, piece_sums, update_is_vectors(params)), params, scalars,
      nullptr, runs_per_warp(runs)};
  ULTRAMEM_RETURN_IF_ERROR(launch_piece_sums(arguments.gradient, piece_sums, stream));
  const auto blocks = static_cast<unsigned>(ceil_div(ceil_div(runs, arguments.batch), kWarps));
  if (needs_row_steps(params)) {
    auto* row_steps = reinterpret_cast<float*>(base + workspace.row_steps);
    table_row_steps_kernel<<<blocks, kThreads, 0, stream>>>(arguments, row_steps);
    ULTRAMEM_RETURN_IF_ERROR(launch_status());
    arguments.row_steps = row_steps;
  }
  return ULTRAMEM_DISPATCH_DTYPE(params.table_dtype, TableT,
                                 [&] { return launch<TableT>(arguments, blocks, stream); });
}

}  // namespace ultramem::cuda
