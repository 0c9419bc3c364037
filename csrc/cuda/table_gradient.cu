// Gradients of tables from factors: the order of the entries, the sums of the pieces of long runs,
// the norm.
#include <thrust/iterator/counting_iterator.h>

#include <cub/device/device_select.cuh>

#include "common/table_update_checks.h"
#include "kernel_registry.h"
#include "sort_pairs.h"
#include "table_gradient.cuh"

namespace ultramem::cuda {
namespace table_kernels {
namespace {

// Blocks a multiprocessor must hold: up to 80 registers, which avoids spills.
constexpr int kMinBlocks = 6;

// Order of the entries ----------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    table_group_keys_kernel(const uint32_t* slots, int64_t num_entries, uint32_t num_rows,
                            uint32_t* keys, uint32_t* entries) {
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= num_entries) return;
  keys[entry] = min(slots[entry], num_rows);  // those out of range sort behind all rows
  entries[entry] = static_cast<uint32_t>(entry);
}

// Whether a run of a row begins at a position.
__global__ void __launch_bounds__(kThreads)
    table_group_begins_kernel(const uint32_t* keys, int64_t num_entries, uint32_t num_rows,
                              uint8_t* begins) {
  const int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= num_entries) return;
  const uint32_t key = keys[position];
  begins[position] = key != num_rows && (position == 0 || keys[position - 1] != key);
}

// The end of the last run; and the pieces of runs longer than one, in any order.
__global__ void __launch_bounds__(kThreads)
    table_group_pieces_kernel(const __grid_constant__ TableGroupParams params, uint32_t length) {
  const auto position = static_cast<uint32_t>(int64_t{blockIdx.x} * kThreads + threadIdx.x);
  const auto num_entries = static_cast<uint32_t>(params.num_entries);
  const auto num_rows = static_cast<uint32_t>(params.num_rows);
  if (position >= num_entries) return;
  const uint32_t key = params.keys[position];
  const bool last = position + 1 == num_entries;
  if (key != num_rows && (last || params.keys[position + 1] == num_rows)) {
    params.run_begins[params.counts[0]] = position + 1;
  }
  if (position == 0 && key == num_rows) params.run_begins[0] = 0;
  // A thread a run from here on.
  if (position >= static_cast<uint32_t>(params.counts[0])) return;
  const uint32_t begin = params.run_begins[position];
  uint32_t end = num_entries;
  if (position + 1 < static_cast<uint32_t>(params.counts[0])) {
    end = params.run_begins[position + 1];
  } else {
    // The end of the last run may not be written yet: the first key beyond it, by bisection.
    uint32_t low = begin;
    while (end - low > 1) {
      const uint32_t middle = low + (end - low) / 2;
      (params.keys[middle] == num_rows ? end : low) = middle;
    }
  }
  if (end - begin <= length) return;
  const uint32_t pieces = (end - begin - 1) / length + 1;
  const int first = atomicAdd(params.counts + 1, static_cast<int>(pieces));
  for (uint32_t i = 0; i < pieces; ++i) {
    params.pieces[2 * (first + i)] = position;
    params.pieces[2 * (first + i) + 1] = i;
  }
}

// Sums of pieces ----------------------------------------------------------------------------------

// A warp a piece, or, without vectors, a thread one of its columns.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    table_piece_sums_kernel(const __grid_constant__ GradientArguments arguments,
                            float* piece_sums) {
  __shared__ EntryWindow windows[kWarps];
  const TableGradient& g = arguments.gradient;
  const int dim = static_cast<int>(g.dim);
  const int warp = threadIdx.x / kWarpSize;
  const RowLane lane(g, kWarpSize);
  for (int64_t i = int64_t{blockIdx.x} * kWarps + warp; i < g.counts[1];
       i += int64_t{gridDim.x} * kWarps) {
    const uint32_t run = g.pieces[2 * i], piece = g.pieces[2 * i + 1];
    const uint32_t run_begin = g.run_begins[run];
    const uint32_t begin = run_begin + piece * arguments.piece_length;
    const uint32_t end = min(begin + arguments.piece_length, g.run_begins[run + 1]);
    float* to =
        piece_sums +
        static_cast<int64_t>(piece_sum_row(run_begin, piece, arguments.piece_length)) * g.dim;
    if (!arguments.vectors) {
      for (int column = lane.lane; column < dim; column += kWarpSize) {
        to[column] = sum_column(g, column, begin, end);
      }
      continue;
    }
    for (int stretch = 0; stretch < dim; stretch += lane.stretch_columns()) {
      WindowPlace place;
      Chunk sum;
      sum_entries<8>(g, lane, stretch, begin, end, end, windows[warp], place, sum);
      if (lane.column(stretch) >= dim) continue;
      PackedChunk<float> packed;
      packed.set_nearest(sum);
      packed.store(to, lane.column(stretch));
    }
  }
}

// Of more than kPiecesPerGroup pieces, the first of a group becomes the group's sum. A thread a
// column, and further ones.
__global__ void __launch_bounds__(kThreads)
    table_piece_groups_kernel(const __grid_constant__ GradientArguments arguments,
                              float* piece_sums) {
  const TableGradient& g = arguments.gradient;
  const uint32_t length = arguments.piece_length;
  for (int64_t i = blockIdx.x; i < g.counts[1]; i += gridDim.x) {
    const uint32_t run = g.pieces[2 * i], first = g.pieces[2 * i + 1];
    const uint32_t begin = g.run_begins[run];
    const uint32_t pieces = (g.run_begins[run + 1] - begin - 1) / length + 1;
    if (first % kPiecesPerGroup != 0 || pieces <= kPiecesPerGroup) continue;
    const uint32_t last = min(first + kPiecesPerGroup, pieces);
    for (int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x; column < g.dim;
         column += int64_t{gridDim.y} * kThreads) {
      const auto at = [&](uint32_t piece) -> float& {
        return piece_sums[static_cast<int64_t>(piece_sum_row(begin, piece, length)) * g.dim +
                          column];
      };
      float sum = at(first);
#pragma unroll 8
      for (uint32_t piece = first + 1; piece < last; ++piece) sum = add(sum, at(piece));
      at(first) = sum;
    }
  }
}

// Norm --------------------------------------------------------------------------------------------

// Calls add_square with the elements of the rows of a warp's runs, each by the lane whose column it
// is, from left to right; end_run(run, lane) behind every row.
template <typename AddSquare, typename EndRun>
__device__ __forceinline__ void for_each_element(const GradientArguments& arguments, int64_t warp,
                                                 int64_t num_warps, EntryWindow& window,
                                                 AddSquare add_square, EndRun end_run) {
  const TableGradient& g = arguments.gradient;
  const int dim = static_cast<int>(g.dim);
  const RowLane lane(g, row_lanes(dim));
  const RunBatch runs(g, warp, num_warps);
  if (runs.count() == 0) return;
  const uint32_t limit = runs.end();
  WindowPlace place;
  for (int i = 0; i < runs.count(); i += lane.groups) {
    const Run run = runs[i + lane.group];
    for (int stretch = 0; stretch < dim; stretch += lane.stretch_columns()) {
      const int column = lane.column(stretch);
      if (!arguments.vectors) {
        for (int j = 0; run.exists && j < kLaneColumns && column + j < dim; ++j) {
          add_square(column_gradient(arguments, run, column + j));
        }
        continue;
      }
      Chunk sum;
      row_gradient(arguments, lane, stretch, run, limit, window, place, sum);
      if (!run.exists || column >= dim) continue;
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) add_square(sum[j]);
    }
    end_run(run, lane);
  }
}

// sums[warp]: of the squares of the rows of a warp's runs.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    table_grad_sum_sq_kernel(const __grid_constant__ GradientArguments arguments, int64_t num_warps,
                             double* sums) {
  __shared__ EntryWindow windows[kWarps];
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (warp >= num_warps) return;
  double total = 0;
  for_each_element(
      arguments, warp, num_warps, windows[threadIdx.x / kWarpSize],
      [&](float x) { total += static_cast<double>(x) * static_cast<double>(x); },
      [](const Run&, const RowLane&) {});
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
    total += __shfl_xor_sync(kFullMask, total, delta);
  }
  if (threadIdx.x % kWarpSize == 0) sums[warp] = total;
}

// row_sq[run]: of the squares of its row, added as Adagrad adds them.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    table_grad_row_sq_kernel(const __grid_constant__ GradientArguments arguments, int64_t num_warps,
                             float* row_sq) {
  __shared__ EntryWindow windows[kWarps];
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (warp >= num_warps) return;
  float squares = 0;
  for_each_element(
      arguments, warp, num_warps, windows[threadIdx.x / kWarpSize],
      [&](float x) { squares = add(squares, mul(x, x)); },
      [&](const Run& run, const RowLane& lane) {
        const float sum = lane.row_sum(squares);
        if (run.exists && lane.lane == 0) row_sq[run.index] = sum;
        squares = 0;
      });
}

constexpr int kTotalThreads = 1024;

__global__ void __launch_bounds__(kTotalThreads)
    table_grad_total_kernel(const double* sums, int64_t count, double* total) {
  __shared__ double partial[kTotalThreads];
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) sum += sums[i];
  partial[threadIdx.x] = sum;
  for (int half = kTotalThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *total = partial[0];
}

ULTRAMEM_REGISTER_KERNEL(table_group_keys, "table_group_keys", kThreads, table_group_keys_kernel);
ULTRAMEM_REGISTER_KERNEL(table_group_begins, "table_group_begins", kThreads,
                         table_group_begins_kernel);
ULTRAMEM_REGISTER_KERNEL(table_group_pieces, "table_group_pieces", kThreads,
                         table_group_pieces_kernel);
ULTRAMEM_REGISTER_KERNEL(table_piece_sums, "table_piece_sums", kThreads, table_piece_sums_kernel);
ULTRAMEM_REGISTER_KERNEL(table_piece_groups, "table_piece_groups", kThreads,
                         table_piece_groups_kernel);
ULTRAMEM_REGISTER_KERNEL(table_grad_sum_sq, "table_grad_sum_sq", kThreads,
                         table_grad_sum_sq_kernel);
ULTRAMEM_REGISTER_KERNEL(table_grad_row_sq, "table_grad_row_sq", kThreads,
                         table_grad_row_sq_kernel);
ULTRAMEM_REGISTER_KERNEL(table_grad_total, "table_grad_total", kTotalThreads,
                         table_grad_total_kernel);

// Host --------------------------------------------------------------------------------------------

struct GroupWorkspace {
  size_t keys_in, entries_in, sort, sort_bytes, select, select_bytes, total = 0;
  int num_bits;

  explicit GroupWorkspace(const TableGroupParams& params) {
    num_bits = key_bits(static_cast<uint64_t>(params.num_rows));
    keys_in = take(params.num_entries * sizeof(uint32_t));
    entries_in = take(params.num_entries * sizeof(uint32_t));
    sort_bytes = sort_pairs_workspace(params.num_entries, num_bits);
    sort = take(sort_bytes);
    select_bytes = 0;
    select_run_begins(params, nullptr, nullptr, &select_bytes, nullptr);
    select = take(select_bytes);
  }

  static cudaError_t select_run_begins(const TableGroupParams& params, const uint8_t* begins,
                                       void* workspace, size_t* bytes, cudaStream_t stream) {
    return cub::DeviceSelect::Flagged(workspace, *bytes, thrust::counting_iterator<uint32_t>(0),
                                      begins, params.run_begins, params.counts,
                                      static_cast<int>(params.num_entries), stream);
  }

 private:
  size_t take(size_t bytes) {
    const size_t offset = total;
    total += align_up(bytes);
    return offset;
  }
};

}  // namespace

Status check_gradient(const TableGradient& gradient, DType dtype) {
  ULTRAMEM_RETURN_IF_ERROR(check_table_gradient(gradient, dtype));
  if (dtype == DType::kFloat64) {
    return Status::invalid_argument("table_update: float64 is offered on the CPU only");
  }
  if (gradient.dim > kMaxCudaColumns) {
    return Status::invalid_argument("table_update: CUDA offers rows of up to 2^29 columns");
  }
  return {};
}

size_t piece_sums_bytes(const TableGradient& gradient) {
  if (gradient.keys == nullptr) return 0;
  return align_up(num_piece_sums(gradient.num_entries) * gradient.dim * sizeof(float));
}

Status launch_piece_sums(const GradientArguments& arguments, float* piece_sums,
                         cudaStream_t stream) {
  const TableGradient& g = arguments.gradient;
  if (g.keys == nullptr || num_piece_sums(g.num_entries) == 0) return {};
  // How many pieces there are only the device knows; that there are none is the usual case.
  constexpr int64_t kMaxBlocks = 1024;
  const int64_t pieces = table_group_max_pieces(g.num_entries);
  const auto blocks = [&](int64_t wanted) {
    return static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  };
  table_piece_sums_kernel<<<blocks(ceil_div(pieces, kWarps)), kThreads, 0, stream>>>(arguments,
                                                                                     piece_sums);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  table_piece_groups_kernel<<<dim3(blocks(pieces), blocks(ceil_div(g.dim, kThreads))), kThreads, 0,
                              stream>>>(arguments, piece_sums);
  return launch_status();
}

}  // namespace table_kernels

using namespace table_kernels;

size_t table_group_workspace(const TableGroupParams& params) {
  if (!check_table_group(params).ok() || params.num_entries == 0) return 0;
  return GroupWorkspace(params).total;
}

Status table_group(const TableGroupParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_table_group(params));
  ULTRAMEM_CUDA_RETURN_IF_ERROR(
      cudaMemsetAsync(params.counts, 0, kGroupCounts * sizeof(int32_t), stream));
  if (params.num_entries == 0) {
    return to_status(cudaMemsetAsync(params.run_begins, 0, sizeof(uint32_t), stream));
  }
  if (params.workspace == nullptr) {
    return Status::invalid_argument("table_group: the workspace must not be null");
  }
  GroupWorkspace workspace(params);
  auto* base = static_cast<unsigned char*>(params.workspace);
  auto* keys_in = reinterpret_cast<uint32_t*>(base + workspace.keys_in);
  auto* entries_in = reinterpret_cast<uint32_t*>(base + workspace.entries_in);
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_entries, kThreads));
  table_group_keys_kernel<<<blocks, kThreads, 0, stream>>>(params.slots, params.num_entries,
                                                           static_cast<uint32_t>(params.num_rows),
                                                           keys_in, entries_in);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  ULTRAMEM_RETURN_IF_ERROR(sort_pairs(keys_in, params.keys, entries_in, params.entries,
                                      params.num_entries, workspace.num_bits, base + workspace.sort,
                                      workspace.sort_bytes, stream));
  auto* begins = reinterpret_cast<uint8_t*>(keys_in);  // which the sort has read
  table_group_begins_kernel<<<blocks, kThreads, 0, stream>>>(
      params.keys, params.num_entries, static_cast<uint32_t>(params.num_rows), begins);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  ULTRAMEM_CUDA_RETURN_IF_ERROR(GroupWorkspace::select_run_begins(
      params, begins, base + workspace.select, &workspace.select_bytes, stream));
  table_group_pieces_kernel<<<blocks, kThreads, 0, stream>>>(params,
                                                             piece_length(params.num_entries));
  return launch_status();
}

size_t table_grad_sum_sq_workspace(const TableGradSumSqParams& params) {
  const TableGradient& g = params.gradient;
  if (!check_gradient(g, params.acc_dtype).ok()) return 0;
  return piece_sums_bytes(g) + align_up(num_run_warps(max_runs(g)) * sizeof(double));
}

Status table_grad_sum_sq(const TableGradSumSqParams& params, Stream stream) {
  const TableGradient& g = params.gradient;
  ULTRAMEM_RETURN_IF_ERROR(check_gradient(g, params.acc_dtype));
  const int64_t runs = max_runs(g);
  if (runs == 0) return to_status(cudaMemsetAsync(params.sum_sq, 0, sizeof(double), stream));
  if (params.workspace == nullptr) {
    return Status::invalid_argument("table_grad_sum_sq: the workspace must not be null");
  }
  auto* piece_sums = static_cast<float*>(params.workspace);
  auto* sums = reinterpret_cast<double*>(static_cast<unsigned char*>(params.workspace) +
                                         piece_sums_bytes(g));
  const GradientArguments arguments = gradient_arguments(g, piece_sums, /*vectors=*/true);
  ULTRAMEM_RETURN_IF_ERROR(launch_piece_sums(arguments, piece_sums, stream));
  const int64_t warps = num_run_warps(runs);
  table_grad_sum_sq_kernel<<<static_cast<unsigned>(ceil_div(warps, kWarps)), kThreads, 0, stream>>>(
      arguments, warps, sums);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  table_grad_total_kernel<<<1, kTotalThreads, 0, stream>>>(sums, warps, params.sum_sq);
  return launch_status();
}

size_t table_grad_row_sq_workspace(const TableGradRowSqParams& params) {
  return check_gradient(params.gradient, params.acc_dtype).ok() ? piece_sums_bytes(params.gradient)
                                                                : 0;
}

Status table_grad_row_sq(const TableGradRowSqParams& params, Stream stream) {
  const TableGradient& g = params.gradient;
  ULTRAMEM_RETURN_IF_ERROR(check_gradient(g, params.acc_dtype));
  const int64_t runs = max_runs(g);
  if (runs == 0) return {};
  if (piece_sums_bytes(g) > 0 && params.workspace == nullptr) {
    return Status::invalid_argument("table_grad_row_sq: the workspace must not be null");
  }
  // How many runs there are only the device knows.
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(params.row_sq, 0, runs * sizeof(float), stream));
  auto* piece_sums = static_cast<float*>(params.workspace);
  const GradientArguments arguments = gradient_arguments(g, piece_sums, /*vectors=*/true);
  ULTRAMEM_RETURN_IF_ERROR(launch_piece_sums(arguments, piece_sums, stream));
  const int64_t warps = num_run_warps(runs);
  table_grad_row_sq_kernel<<<static_cast<unsigned>(ceil_div(warps, kWarps)), kThreads, 0, stream>>>(
      arguments, warps, static_cast<float*>(params.row_sq));
  return launch_status();
}

}  // namespace ultramem::cuda
