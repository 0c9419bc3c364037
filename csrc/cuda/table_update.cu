// Optimizer steps on the value tables: lanes that share a row sum its gradient, in registers, and
// update its columns there. Weights and states are read and written once.
//
// Rows are taken in stretches, 8 columns a lane. Adagrad needs the squares of a whole row first: it
// keeps the gradients of the first kLaneChunks stretches, and sums those of further ones again.
#include "async_copy.cuh"
#include "common/table_update_checks.h"
#include "kernel_registry.h"
#include "table_rescale.h"
#include "table_update_chunk.cuh"

namespace ultramem::cuda {
namespace table_kernels {
namespace {

struct UpdateArguments {
  GradientArguments gradient;
  TableUpdateParams update;
  const UpdateScalars<float>* scalars;
  void* weight;       // what is updated: the master copy where there is one
  void* rounded;      // its weights, rounded to nearest; or null
  int64_t num_warps;  // that share the runs
};

__global__ void table_prepare_kernel(const __grid_constant__ TableUpdateParams params,
                                     UpdateScalars<float>* scalars) {
  *scalars = prepare_update<float>(params);
}

// The row's new accumulator, from row_sum, and its step size; for all lanes of the warp, who have
// read row_sum before.
__device__ __forceinline__ float advance_row(const TableUpdateParams& p,
                                             const UpdateScalars<float>& s, const RowLane& lane,
                                             const Run& run, float row_sum, float lane_squares) {
  const float squares = lane.row_sum(lane_squares);
  const float step_size = adagrad_step_size(s, adagrad_mean_sq(p, s, run.index, squares), &row_sum);
  if (run.exists && lane.lane == 0) static_cast<float*>(p.row_sum)[run.row] = row_sum;
  return step_size;
}

// With vectors ------------------------------------------------------------------------------------

// 16-bit values are rounded stochastically where the step says so; they take `usual` as
// round_stochastically does.
template <typename T>
__device__ __forceinline__ void store_chunk(const TableUpdateParams& p, uint32_t step,
                                            RoundedTensor tensor, uint32_t row, int column,
                                            const Chunk& x, bool usual, void* to, int64_t index) {
  PackedChunk<T> packed;
  if (!std::is_same_v<T, float> && p.stochastic_rounding) {
    const RandomBits random =
        random_bits(p.seed, p.stream, tensor, step, static_cast<uint32_t>(p.first_row) + row,
                    static_cast<uint32_t>(p.first_column) + column);
    round_stochastically(x, random, usual, packed);
  } else {
    packed.set_nearest(x);
  }
  packed.store(to, index);
}

// A lane's columns of a stretch of a row, and their states.
template <TableOptimizer kOptimizer, typename WeightT, typename StateT>
struct LaneState {
  PackedChunk<WeightT> weight;
  PackedChunk<StateT> exp_avg, exp_avg_sq;

  __device__ __forceinline__ void load(const UpdateArguments& arguments, int64_t index) {
    weight.load(arguments.weight, index);
    if constexpr (kOptimizer == TableOptimizer::kAdam) {
      exp_avg.load(arguments.update.exp_avg, index);
      exp_avg_sq.load(arguments.update.exp_avg_sq, index);
    }
  }

  // g is scaled; step_size is that of the row.
  __device__ __forceinline__ void update(const UpdateArguments& arguments,
                                         const UpdateScalars<float>& s, uint32_t row, int column,
                                         int64_t index, const Chunk& g, float step_size) const {
    const TableUpdateParams& p = arguments.update;
    Chunk w;
    weight.get(w);
    if constexpr (kOptimizer == TableOptimizer::kAdam) {
      Chunk m, v;
      exp_avg.get(m);
      exp_avg_sq.get(v);
      const bool usual = adam_update(s, g, w, m, v);
      store_chunk<StateT>(p, s.step, RoundedTensor::kExpAvg, row, column, m, usual, p.exp_avg,
                          index);
      store_chunk<StateT>(p, s.step, RoundedTensor::kExpAvgSq, row, column, v, usual, p.exp_avg_sq,
                          index);
    } else {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) descend(s.keep, step_size, g[j], &w[j]);
    }
    store_chunk<WeightT>(p, s.step, RoundedTensor::kWeight, row, column, w,
                         rounds_usually(bound(w)), arguments.weight, index);
    if (std::is_same_v<WeightT, float> && arguments.rounded != nullptr) {
      value_ffn::store_elements<kLaneColumns>(arguments.rounded, p.table_dtype, index, w);
    }
  }
};

// Of the first stretches of a warp's rows, a lane's columns each: Adagrad needs the squares of a
// whole row before it changes the first weight.
template <typename WeightT>
struct KeptColumns {
  static constexpr int kWeightWords = PackedChunk<WeightT>::kWords;
  float4 gradients[kLaneChunks][2][kWarpSize];
  uint4 weights[kLaneChunks][kWeightWords][kWarpSize];

  __device__ __forceinline__ void keep_gradient(int k, int lane, const Chunk& g) {
    gradients[k][0][lane] = {g[0], g[1], g[2], g[3]};
    gradients[k][1][lane] = {g[4], g[5], g[6], g[7]};
  }
  __device__ __forceinline__ void get_gradient(int k, Chunk& g) const {
    const int lane = threadIdx.x % kWarpSize;
    const float4 low = gradients[k][0][lane], high = gradients[k][1][lane];
    g[0] = low.x, g[1] = low.y, g[2] = low.z, g[3] = low.w;
    g[4] = high.x, g[5] = high.y, g[6] = high.z, g[7] = high.w;
  }
  __device__ __forceinline__ void request_weights(int k, const void* from, int64_t index) {
    const auto* at = reinterpret_cast<const uint4*>(static_cast<const WeightT*>(from) + index);
#pragma unroll
    for (int i = 0; i < kWeightWords; ++i) {
      cp_async_16_alone(shared_address(&weights[k][i][threadIdx.x % kWarpSize]), at + i, true,
                        true);
    }
  }
  __device__ __forceinline__ void get_weights(int k, PackedChunk<WeightT>& to) const {
#pragma unroll
    for (int i = 0; i < kWeightWords; ++i) to.words[i] = weights[k][i][threadIdx.x % kWarpSize];
  }
};

// Whether a group of lanes would be at it for long.
__device__ __forceinline__ bool is_long_run(const GradientArguments& arguments, const Run& run) {
  constexpr uint32_t kLongRun = 16;
  const uint32_t entries = run.end - run.begin;
  return entries > kLongRun && entries <= arguments.piece_length;
}

// Grid: num_warps; blockIdx.y shares the stretches of Adam and SGD, which need no others.
template <TableOptimizer kOptimizer, typename WeightT, typename StateT>
__global__ void __launch_bounds__(kThreads, kOptimizer == TableOptimizer::kAdam ? 5 : 6)
    table_update_kernel(const __grid_constant__ UpdateArguments arguments) {
  constexpr bool kAdagrad = kOptimizer == TableOptimizer::kAdagrad;
  __shared__ EntryWindow windows[kWarps];
  __shared__ KeptColumns<WeightT> kept_columns[kAdagrad ? kWarps : 1];
  const UpdateScalars<float> s = *arguments.scalars;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (s.skip || warp >= arguments.num_warps) return;
  EntryWindow& window = windows[threadIdx.x / kWarpSize];
  KeptColumns<WeightT>& kept = kept_columns[kAdagrad ? threadIdx.x / kWarpSize : 0];
  const TableUpdateParams& p = arguments.update;
  const RowLane lane(p.gradient, row_lanes(p.gradient.dim));
  const RunBatch runs(p.gradient, warp, arguments.num_warps);
  if (runs.count() == 0) return;
  const uint32_t limit = runs.end();
  WindowPlace place;
  for (int i = 0; i < runs.count(); i += lane.groups) {
    const Run run = runs[i + lane.group];
    const auto scaled_gradient = [&](int stretch, bool skips, Chunk& g) {
      Run summed = run;
      summed.exists = run.exists && !skips;
      row_gradient(arguments.gradient, lane, stretch, summed, limit, window, place, g);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) g[j] = mul(g[j], s.grad_scale);
    };
    float step_size = s.step_size;
    if constexpr (kAdagrad) {
      const float row_sum = static_cast<const float*>(p.row_sum)[run.row];
      for (int k = 0; k < kLaneChunks && k * lane.stretch_columns() < lane.dim; ++k) {
        const int column = lane.column_in_row(k * lane.stretch_columns());
        kept.request_weights(k, arguments.weight, lane.offset(run.row) + column);
      }
      cp_async_commit();
      // Longer runs of rows that are kept whole are the whole warp's, so that others need not wait.
      const bool takes_warp = run.exists && lane.groups > 1 && is_long_run(arguments.gradient, run);
      for (int stretch = 0, k = 0; stretch < lane.dim; stretch += lane.stretch_columns(), ++k) {
        if (k >= kLaneChunks) break;
        Chunk g;
        scaled_gradient(stretch, takes_warp, g);
        kept.keep_gradient(k, threadIdx.x % kWarpSize, g);
      }
      __syncwarp();
      for (uint32_t left = __ballot_sync(kFullMask, takes_warp && lane.lane == 0); left != 0;
           left &= left - 1) {
        const int owner = __ffs(left) - 1;  // the first lane of the run's group
        const uint32_t begin = __shfl_sync(kFullMask, run.begin, owner);
        const uint32_t end = __shfl_sync(kFullMask, run.end, owner);
        const RowLane whole(p.gradient, kWarpSize);
        for (int stretch = 0; stretch < whole.dim; stretch += whole.stretch_columns()) {
          Chunk g;
          sum_entries<4>(p.gradient, whole, stretch, begin, end, end, window, place, g);
#pragma unroll
          for (int j = 0; j < kLaneColumns; ++j) g[j] = mul(g[j], s.grad_scale);
          const int chunk = stretch / kLaneColumns + whole.lane;
          if (chunk * kLaneColumns < whole.dim) {
            kept.keep_gradient(chunk / lane.lanes, owner + chunk % lane.lanes, g);
          }
        }
      }
      __syncwarp();
      float squares = 0;
      for (int stretch = 0, k = 0; stretch < lane.dim; stretch += lane.stretch_columns(), ++k) {
        Chunk g;
        if (k < kLaneChunks) {
          kept.get_gradient(k, g);
        } else {
          scaled_gradient(stretch, false, g);
        }
        if (lane.column(stretch) >= lane.dim) continue;
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) squares = add(squares, mul(g[j], g[j]));
      }
      step_size = advance_row(p, s, lane, run, row_sum, squares);
      cp_async_wait_all();
    }
    int k = 0;
    for (int stretch = static_cast<int>(blockIdx.y) * lane.stretch_columns(); stretch < lane.dim;
         stretch += static_cast<int>(gridDim.y) * lane.stretch_columns(), ++k) {
      const int64_t index = lane.offset(run.row) + lane.column_in_row(stretch);
      LaneState<kOptimizer, WeightT, StateT> state;
      Chunk g;
      if (kAdagrad && k < kLaneChunks) {
        kept.get_weights(k, state.weight);
        kept.get_gradient(k, g);
      } else {
        // On their way while the gradient is summed.
        state.load(arguments, index);
        scaled_gradient(stretch, false, g);
      }
      if (run.exists && lane.column(stretch) < lane.dim) {
        state.update(arguments, s, run.row, lane.column(stretch), index, g, step_size);
      }
    }
  }
}

// Any shape ---------------------------------------------------------------------------------------

// The 16 bits of one column.
__device__ __forceinline__ uint32_t random_column(const TableUpdateParams& p, uint32_t step,
                                                  RoundedTensor tensor, uint32_t row, int column) {
  const uint32_t whole_column = static_cast<uint32_t>(p.first_column) + column;
  const RandomBits bits = random_bits(p.seed, p.stream, tensor, step,
                                      static_cast<uint32_t>(p.first_row) + row, whole_column);
  const uint32_t pair = whole_column % kLaneColumns / 2;
  const uint32_t word = pair < 2 ? (pair == 0 ? bits.words[0] : bits.words[1])
                                 : (pair == 2 ? bits.words[2] : bits.words[3]);
  return word >> (16 * (whole_column % 2)) & 0xffffu;
}

__device__ __forceinline__ void store_column(const TableUpdateParams& p, uint32_t step,
                                             RoundedTensor tensor, uint32_t row, int column,
                                             float x, void* to, DType dtype) {
  const int64_t index = int64_t{row} * p.gradient.dim + column;
  if (dtype == DType::kFloat32 || !p.stochastic_rounding) {
    store_element(to, dtype, index, x);
    return;
  }
  const uint32_t random = random_column(p, step, tensor, row, column);
  static_cast<uint16_t*>(to)[index] =
      dtype == DType::kFloat16 ? round_to_float16(x, random) : round_to_bfloat16(x, random);
}

// The same steps, a column at a time.
__global__ void __launch_bounds__(kThreads, 8)
    table_update_columns_kernel(const __grid_constant__ UpdateArguments arguments) {
  const UpdateScalars<float> s = *arguments.scalars;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (s.skip || warp >= arguments.num_warps) return;
  const TableUpdateParams& p = arguments.update;
  const int dim = static_cast<int>(p.gradient.dim);
  const DType weight_dtype = p.master != nullptr ? DType::kFloat32 : p.table_dtype;
  const RowLane lane(p.gradient, row_lanes(dim));
  const RunBatch runs(p.gradient, warp, arguments.num_warps);
  for (int i = 0; i < runs.count(); i += lane.groups) {
    const Run run = runs[i + lane.group];
    const auto gradient = [&](int column) {
      return mul(column_gradient(arguments.gradient, run, column), s.grad_scale);
    };
    float step_size = s.step_size;
    if (p.optimizer == TableOptimizer::kAdagrad) {
      float squares = 0;
      for (int chunk = lane.column(0); run.exists && chunk < dim; chunk += lane.stretch_columns()) {
        for (int column = chunk; column < min(chunk + kLaneColumns, dim); ++column) {
          const float g = gradient(column);
          squares = add(squares, mul(g, g));
        }
      }
      const float row_sum = static_cast<const float*>(p.row_sum)[run.row];
      step_size = advance_row(p, s, lane, run, row_sum, squares);
    }
    const int stride = static_cast<int>(gridDim.y) * lane.stretch_columns();
    for (int chunk = lane.column(0) + static_cast<int>(blockIdx.y) * lane.stretch_columns();
         run.exists && chunk < dim; chunk += stride) {
      for (int column = chunk; column < min(chunk + kLaneColumns, dim); ++column) {
        const int64_t index = int64_t{run.row} * dim + column;
        const auto load = [&](const void* from, DType dtype) {
          return bits_to_float(load_bits(from, dtype, index), dtype);
        };
        float w = load(arguments.weight, weight_dtype);
        if (p.optimizer == TableOptimizer::kAdam) {
          float m = load(p.exp_avg, p.state_dtype), v = load(p.exp_avg_sq, p.state_dtype);
          adam_update(s, gradient(column), &w, &m, &v);
          store_column(p, s.step, RoundedTensor::kExpAvg, run.row, column, m, p.exp_avg,
                       p.state_dtype);
          store_column(p, s.step, RoundedTensor::kExpAvgSq, run.row, column, v, p.exp_avg_sq,
                       p.state_dtype);
        } else {
          descend(s.keep, step_size, gradient(column), &w);
        }
        store_column(p, s.step, RoundedTensor::kWeight, run.row, column, w, arguments.weight,
                     weight_dtype);
        if (arguments.rounded != nullptr) {
          store_element(arguments.rounded, p.table_dtype, index, w);
        }
      }
    }
  }
}

// Host --------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_TABLE_UPDATE(id, name, optimizer, WeightT, StateT)      \
  ULTRAMEM_REGISTER_KERNEL(table_update_##id, "table_update<" name ">", kThreads, \
                           table_update_kernel<TableOptimizer::optimizer, WeightT, StateT>)
#define ULTRAMEM_REGISTER_TABLE_UPDATES(id, name, WeightT)                                     \
  ULTRAMEM_REGISTER_TABLE_UPDATE(adam_##id##_f32, "adam," name ",f32", kAdam, WeightT, float); \
  ULTRAMEM_REGISTER_TABLE_UPDATE(adam_##id##_bf16, "adam," name ",bf16", kAdam, WeightT,       \
                                 __nv_bfloat16);                                               \
  ULTRAMEM_REGISTER_TABLE_UPDATE(adagrad_##id, "adagrad," name, kAdagrad, WeightT, float);     \
  ULTRAMEM_REGISTER_TABLE_UPDATE(sgd_##id, "sgd," name, kSgd, WeightT, float)
ULTRAMEM_REGISTER_TABLE_UPDATES(f32, "f32", float);
ULTRAMEM_REGISTER_TABLE_UPDATES(bf16, "bf16", __nv_bfloat16);
ULTRAMEM_REGISTER_TABLE_UPDATES(f16, "f16", __half);
ULTRAMEM_REGISTER_KERNEL(table_update_columns, "table_update_columns", kThreads,
                         table_update_columns_kernel);
ULTRAMEM_REGISTER_KERNEL(table_prepare, "table_prepare", 1, table_prepare_kernel);

// Where things lie in the workspace, in bytes from its beginning.
struct Workspace {
  size_t scalars, piece_sums, total = 0;

  explicit Workspace(const TableUpdateParams& params) {
    scalars = take(sizeof(UpdateScalars<float>));
    piece_sums = take(piece_sums_bytes(params.gradient));
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
  return check_gradient(params.gradient, params.table_dtype);
}

bool update_is_vectors(const TableUpdateParams& params) {
  // Eight columns have their random bits from one draw.
  const bool one_draw = !params.stochastic_rounding || params.first_column % kLaneColumns == 0;
  return one_draw && params.gradient.dim % kLaneColumns == 0 && is_aligned(params.weight) &&
         is_aligned(params.master) && is_aligned(params.exp_avg) && is_aligned(params.exp_avg_sq);
}

dim3 grid(const UpdateArguments& arguments) {
  constexpr int64_t kMaxGridY = 65535;
  const TableUpdateParams& p = arguments.update;
  // Of what lanes hold at once of a row; Adagrad's need the whole.
  const int64_t columns = int64_t{row_lanes(p.gradient.dim)} * kLaneChunks * kLaneColumns;
  const int64_t stretches =
      p.optimizer == TableOptimizer::kAdagrad ? 1 : ceil_div(p.gradient.dim, columns);
  return dim3(static_cast<unsigned>(ceil_div(arguments.num_warps, kWarps)),
              static_cast<unsigned>(stretches < kMaxGridY ? stretches : kMaxGridY));
}

template <typename WeightT>
Status launch(const UpdateArguments& arguments, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    kernel<<<grid(arguments), kThreads, 0, stream>>>(arguments);
    return launch_status();
  };
  switch (arguments.update.optimizer) {
    case TableOptimizer::kAdam:
      return arguments.update.state_dtype == DType::kFloat32
                 ? start(table_update_kernel<TableOptimizer::kAdam, WeightT, float>)
                 : start(table_update_kernel<TableOptimizer::kAdam, WeightT, __nv_bfloat16>);
    case TableOptimizer::kAdagrad:
      return start(table_update_kernel<TableOptimizer::kAdagrad, WeightT, float>);
    case TableOptimizer::kSgd:
      break;
  }
  return start(table_update_kernel<TableOptimizer::kSgd, WeightT, float>);
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
      gradient_arguments(params.gradient, piece_sums, update_is_vectors(params)),
      params,
      scalars,
      params.master != nullptr ? params.master : params.weight,
      params.master != nullptr ? params.weight : nullptr,
      num_run_warps(runs)};
  ULTRAMEM_RETURN_IF_ERROR(launch_piece_sums(arguments.gradient, piece_sums, stream));
  if (!arguments.gradient.vectors) {
    table_update_columns_kernel<<<grid(arguments), kThreads, 0, stream>>>(arguments);
    return launch_status();
  }
  if (params.master != nullptr) return launch<float>(arguments, stream);
  return ULTRAMEM_DISPATCH_DTYPE(params.table_dtype, WeightT,
                                 [&] { return launch<WeightT>(arguments, stream); });
}

}  // namespace ultramem::cuda
