// Backward of the value FFN, gradients of the tables, without atomics: the same bits on every run.
//
// Entries e = t * S + s are sorted by slot, so that the terms of a row lie side by side, in token
// order: a run. A row of both tables' gradients is one row here, first the columns of the values,
// then those of the pre-values. A warp takes kTile sorted entries and sums the runs that begin
// there. Fixed positions cut the sorted entries into pieces; where a run crosses one, its parts are
// summed by a warp each, into the workspace, and value_ffn_bwd_combine adds them in order. So a row
// that every token retrieves is no slower than many rows.
#include "value_ffn_bwd_rows.h"

#include "kernel_registry.h"
#include "sort_pairs.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

constexpr int kRowThreads = 128;
// Bounds registers to 96.
constexpr int kRowBlocks = 5;
constexpr int kRowWarps = kRowThreads / kWarpSize;
// Entries at which a warp's runs begin. It looks up a window of 32 at once, so that a run of some
// length is in sight from its beginning.
constexpr int kTile = 16;
// Columns that a lane moves at once, of a row; and how often before it uses the first.
constexpr int kRowColumns = 4;
constexpr int kBatch = 3;
// Entries in a piece, at least, a power of two; more where there would be more than kMaxPieces.
constexpr int kMinPieceShift = 8;
constexpr int64_t kMaxPieces = 4096;

// keys[e] = slot, num_slots where the index is out of range: those sort behind all rows.
__global__ void __launch_bounds__(kThreads)
    value_ffn_bwd_keys_kernel(const __grid_constant__ ValueFfnParams params, uint32_t* keys,
                              uint32_t* entries) {
  const int64_t num_entries = params.num_tokens * params.num_selected;
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= num_entries) return;
  const int64_t slot = resolve_slot(params.addressing, load_index(params, entry)).slot;
  keys[entry] = static_cast<uint32_t>(slot >= 0 ? slot : params.addressing.num_slots);
  entries[entry] = static_cast<uint32_t>(entry);
}

// grad_values[slot, slice c] = sum of h * scores[e, c] * grad_out[t, group, slice c] and
// grad_pre_values[slot] = sum of grad_a[e] * pre_input[t].
struct Rows {
  const uint32_t* keys;     // [T * S], sorted
  const uint32_t* entries;  // [T * S], in the order of the keys
  const float* grad_a;      // [T, S]
  float* partial;  // [pieces, 2, columns]: of the run a piece begins with, of the run it ends with
  uint32_t num_entries;
  int piece_shift;
  int num_groups;
  // 0 where the gradient of that table is not wanted.
  int value_columns, pre_value_columns;

  __device__ __forceinline__ int columns() const { return value_columns + pre_value_columns; }
};

// 32 consecutive sorted entries, what a warp knows of them, in shared memory.
struct Window {
  // Of grad_out and of pre_input.
  uint32_t source_rows[2][kWarpSize];
  // Those of the cores, then grad_a.
  float factors[kMaxNumCores + 1][kWarpSize];
};

// Returns the lane's key, num_slots where there is none.
__device__ __forceinline__ uint32_t load_window(const ValueFfnBwdParams& params, const Rows& rows,
                                                uint32_t first, int lane, Window& window) {
  const auto none = static_cast<uint32_t>(params.addressing.num_slots);
  const uint32_t position = first + lane;
  // Not `position < num_entries`, which may have wrapped around.
  const uint32_t key =
      static_cast<uint32_t>(lane) < rows.num_entries - first ? rows.keys[position] : none;
  __syncwarp();  // all have read the window before
  if (key != none) {
    const uint32_t entry = rows.entries[position];
    const uint32_t token = entry / static_cast<uint32_t>(params.num_selected);
    window.source_rows[1][lane] = token;
    if (rows.value_columns > 0) {
      uint32_t source_row = token;
      if (rows.num_groups > 1) {
        const auto group = resolve_slot(params.addressing, load_index(params, entry)).group;
        source_row = token * rows.num_groups + static_cast<uint32_t>(group);
      }
      window.source_rows[0][lane] = source_row;
      const float h =
          params.pre_values != nullptr
              ? activate(params.activation, static_cast<const float*>(params.pre_activation)[entry])
              : 1.0f;
      const auto* scores =
          static_cast<const float*>(params.scores) + int64_t{entry} * params.num_cores;
      for (int c = 0; c < params.num_cores; ++c) window.factors[c][lane] = h * scores[c];
    }
    if (rows.pre_value_columns > 0) window.factors[kMaxNumCores][lane] = rows.grad_a[entry];
  }
  __syncwarp();
  return key;
}

// What a lane does of a row: kColumns columns, of the values or the pre-values.
template <int kColumns>
struct Part {
  int column;  // of the table, the first
  int factor;  // in the window

  // Those from kColumns * index on.
  __device__ __forceinline__ Part(const ValueFfnBwdParams& params, const Rows& rows, int index) {
    column = index * kColumns;
    factor = kMaxNumCores;
    if (column < rows.value_columns) {
      const int slice = rows.value_columns / params.num_cores;
      factor = 0;
#pragma unroll
      for (int c = 1; c < kMaxNumCores; ++c) factor += c < params.num_cores && column >= c * slice;
    } else {
      column = column < rows.columns() ? column - rows.value_columns : -1;
    }
  }
  __device__ __forceinline__ bool exists() const { return column >= 0; }
  __device__ __forceinline__ bool of_values() const { return factor < kMaxNumCores; }
  template <typename InputT>
  __device__ __forceinline__ const InputT* source(const ValueFfnBwdParams& params,
                                                  const Window& window, int entry) const {
    const int64_t row = window.source_rows[of_values() ? 0 : 1][entry];
    return static_cast<const InputT*>(of_values() ? params.grad_out : params.pre_input) +
           (row * (of_values() ? params.value_dim : params.pre_value_dim) + column);
  }
  template <typename GradT>
  __device__ __forceinline__ GradT* grad(const ValueFfnBwdParams& params, uint32_t key) const {
    return static_cast<GradT*>(of_values() ? params.grad_values : params.grad_pre_values) +
           (int64_t{key} * (of_values() ? params.value_dim : params.pre_value_dim) + column);
  }
};

// The sum of kColumns columns of a row goes to its gradient, rounded once.
template <int kColumns, typename GradT>
__device__ __forceinline__ void store_row(GradT* grad, const float (&sum)[kColumns],
                                          Pack<GradT, kColumns> old) {
  // Without accumulation `old` is zeros.
#pragma unroll
  for (int j = 0; j < kColumns; ++j) old.set(j, old[j] + sum[j]);
  old.store(grad);
}

// A run from lane `at` of the window on, which begins with entry `first` and where the lanes' keys
// are `keys`. Where it goes beyond the window, no other of the tile's begins behind it, and the
// window moves.
template <int kColumns, typename InputT, typename GradT>
__device__ __forceinline__ void sum_run(const ValueFfnBwdParams& params, const Rows& rows,
                                        Window& window, uint32_t first, uint32_t keys, int at,
                                        bool run_begins) {
  constexpr int kInFlight = 2;  // entries
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t key = __shfl_sync(kFullMask, keys, at);
  const uint32_t piece = (first + at) >> rows.piece_shift;
  // May be 2^32, where the last piece ends.
  const uint64_t piece_end =
      min((uint64_t{piece} + 1) << rows.piece_shift, uint64_t{rows.num_entries});
  uint32_t window_first = first;
  for (int batch = 0; batch * kColumns < rows.columns(); batch += kBatch * kWarpSize) {
    const Part<kColumns> parts[kBatch] = {{params, rows, batch + lane},
                                          {params, rows, batch + kWarpSize + lane},
                                          {params, rows, batch + 2 * kWarpSize + lane}};
    float sums[kBatch][kColumns] = {};
    Pack<GradT, kColumns> old[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      old[k].clear();
      if (params.accumulate && parts[k].exists()) {
        old[k].load_mutable(parts[k].template grad<GradT>(params, key));
      }
    }
    if (window_first != first) {
      window_first = first;
      keys = load_window(params, rows, first, lane, window);
    }
    int from = at;
    bool run_ends = false;
    while (true) {
      const bool in_run = lane >= from && keys == key && uint64_t{window_first} + lane < piece_end;
      const int to = from + __popc(__ballot_sync(kFullMask, in_run));
      for (int i = from; i < to; i += kInFlight) {
        Pack<InputT, kColumns> sources[kInFlight][kBatch];
        float factors[kInFlight][kBatch];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            factors[n][k] = 0.0f;
            sources[n][k].clear();
            if (!parts[k].exists() || i + n >= to) continue;
            factors[n][k] = window.factors[parts[k].factor][i + n];
            sources[n][k].load(parts[k].template source<InputT>(params, window, i + n));
          }
        }
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              sums[k][j] = fmaf(factors[n][k], sources[n][k][j], sums[k][j]);
            }
          }
        }
      }
      const uint64_t end = uint64_t{window_first} + to;
      if (to < kWarpSize) {
        run_ends = end == rows.num_entries || __shfl_sync(kFullMask, keys, to) != key;
        break;
      }
      if (end == piece_end) {
        run_ends = end == rows.num_entries || rows.keys[end] != key;
        break;
      }
      window_first += kWarpSize;
      from = 0;
      keys = load_window(params, rows, window_first, lane, window);
    }
    const bool whole = run_begins && run_ends;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (!parts[k].exists()) continue;
      if (whole) {
        store_row<kColumns>(parts[k].template grad<GradT>(params, key), sums[k], old[k]);
      } else {
        const int index = batch + k * kWarpSize + lane;
        float* partial = rows.partial +
                         (2 * int64_t{piece} + (run_begins ? 1 : 0)) * rows.columns() +
                         index * kColumns;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) partial[j] = sums[k][j];
      }
    }
  }
}

template <int kColumns, typename InputT, typename GradT>
__device__ __forceinline__ void sum_tile(const ValueFfnBwdParams& params, const Rows& rows,
                                         uint32_t first, Window& window) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t keys = load_window(params, rows, first, lane, window);
  uint32_t before = __shfl_up_sync(kFullMask, keys, 1);
  if (lane == 0 && first > 0) before = rows.keys[first - 1];
  const uint32_t position = first + lane;
  const bool run_begins = position == 0 || before != keys;
  const bool piece_begins = (position & ((1u << rows.piece_shift) - 1)) == 0;
  const bool exists = keys != params.addressing.num_slots;
  uint32_t heads = __ballot_sync(kFullMask, lane < kTile && exists && (run_begins || piece_begins));
  const uint32_t begins = __ballot_sync(kFullMask, run_begins);
  for (; heads != 0; heads &= heads - 1) {
    const int at = __ffs(heads) - 1;
    sum_run<kColumns, InputT, GradT>(params, rows, window, first, keys, at,
                                     (begins >> at & 1) != 0);
  }
}

// Grid: kRowWarps tiles a block.
template <typename InputT, typename GradT>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    value_ffn_bwd_rows_kernel(const __grid_constant__ ValueFfnBwdParams params,
                              const __grid_constant__ Rows rows, bool vectors) {
  const int64_t tile = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
  if (tile * kTile >= rows.num_entries) return;
  __shared__ Window windows[kRowWarps];
  Window& window = windows[threadIdx.x / kWarpSize];
  const auto first = static_cast<uint32_t>(tile * kTile);
  if (vectors) {
    sum_tile<kRowColumns, InputT, GradT>(params, rows, first, window);
  } else {
    sum_tile<1, InputT, GradT>(params, rows, first, window);
  }
}

// Adds up a run that goes beyond the piece it begins in: a block for each piece, a thread a column.
template <typename GradT>
__global__ void __launch_bounds__(kThreads)
    value_ffn_bwd_combine_kernel(const __grid_constant__ ValueFfnBwdParams params,
                                 const __grid_constant__ Rows rows) {
  const uint32_t* keys = rows.keys;
  const int64_t piece = blockIdx.x;
  const int64_t begin = piece << rows.piece_shift;
  const int64_t end = (piece + 1) << rows.piece_shift;
  if (end >= rows.num_entries) return;
  const uint32_t key = keys[end - 1];
  const bool goes_on = key != params.addressing.num_slots && keys[end] == key;
  const bool begins_here = keys[begin] != key || begin == 0 || keys[begin - 1] != key;
  if (!goes_on || !begins_here) return;

  // The last piece that begins with the run, by bisection.
  int64_t last = piece + 1;
  int64_t beyond = ceil_div(rows.num_entries, int64_t{1} << rows.piece_shift);
  while (beyond - last > 1) {
    const int64_t middle = (last + beyond) / 2;
    (keys[middle << rows.piece_shift] == key ? last : beyond) = middle;
  }
  const int64_t columns = rows.columns();
  for (int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x; column < columns;
       column += int64_t{gridDim.y} * kThreads) {
    float sum[1] = {rows.partial[(2 * piece + 1) * columns + column]};
#pragma unroll 8
    for (int64_t i = piece + 1; i <= last; ++i) sum[0] += rows.partial[2 * i * columns + column];
    GradT* grad = Part<1>(params, rows, static_cast<int>(column)).grad<GradT>(params, key);
    Pack<GradT, 1> old;
    old.clear();
    if (params.accumulate) old.load_mutable(grad);
    store_row<1>(grad, sum, old);
  }
}

// Host ------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_VALUE_FFN_BWD_ROWS(id, name, InputT, GradT)                            \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_rows_##id, "value_ffn_bwd_rows<" name ">", kRowThreads, \
                           value_ffn_bwd_rows_kernel<InputT, GradT>)
ULTRAMEM_FOR_EACH_DTYPE_PAIR(ULTRAMEM_REGISTER_VALUE_FFN_BWD_ROWS);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_keys, "value_ffn_bwd_keys", kThreads,
                         value_ffn_bwd_keys_kernel);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_combine_f32, "value_ffn_bwd_combine<f32>", kThreads,
                         value_ffn_bwd_combine_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_combine_bf16, "value_ffn_bwd_combine<bf16>", kThreads,
                         value_ffn_bwd_combine_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_combine_f16, "value_ffn_bwd_combine<f16>", kThreads,
                         value_ffn_bwd_combine_kernel<__half>);

// Where things lie in the workspace, in bytes from its beginning.
struct Workspace {
  int64_t num_entries, num_pieces, columns;
  int piece_shift = kMinPieceShift;
  int num_bits;
  size_t keys_in, keys, entries_in, entries, partial, sort, sort_bytes, total = 0;

  explicit Workspace(const ValueFfnBwdParams& params) {
    num_entries = params.num_tokens * params.num_selected;
    columns = (params.grad_values != nullptr ? params.value_dim : 0) +
              (params.grad_pre_values != nullptr ? params.pre_value_dim : 0);
    while (ceil_div(num_entries, int64_t{1} << piece_shift) > kMaxPieces) ++piece_shift;
    num_pieces = ceil_div(num_entries, int64_t{1} << piece_shift);
    num_bits = key_bits(static_cast<uint64_t>(params.addressing.num_slots));
    keys_in = take(num_entries * sizeof(uint32_t));
    keys = take(num_entries * sizeof(uint32_t));
    entries_in = take(num_entries * sizeof(uint32_t));
    entries = take(num_entries * sizeof(uint32_t));
    partial = take(2 * num_pieces * columns * sizeof(float));
    sort_bytes = sort_pairs_workspace(num_entries, num_bits);
    sort = take(sort_bytes);
  }

 private:
  size_t take(size_t bytes) {
    const size_t offset = total;
    total += align_up(bytes);
    return offset;
  }
};

Status sort_entries(const ValueFfnBwdParams& params, const Workspace& layout, char* workspace,
                    cudaStream_t stream) {
  auto* keys_in = reinterpret_cast<uint32_t*>(workspace + layout.keys_in);
  auto* entries_in = reinterpret_cast<uint32_t*>(workspace + layout.entries_in);
  const auto blocks = static_cast<unsigned>(ceil_div(layout.num_entries, kThreads));
  value_ffn_bwd_keys_kernel<<<blocks, kThreads, 0, stream>>>(params, keys_in, entries_in);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  return sort_pairs(keys_in, reinterpret_cast<uint32_t*>(workspace + layout.keys), entries_in,
                    reinterpret_cast<uint32_t*>(workspace + layout.entries), layout.num_entries,
                    layout.num_bits, workspace + layout.sort, layout.sort_bytes, stream);
}

// Whether rows of a gradient, and of what it is summed from, are moved kRowColumns at a time.
bool rows_are_vectors(const ValueFfnBwdParams& params, const Rows& rows) {
  const int slice = rows.value_columns / params.num_cores;
  return slice % kRowColumns == 0 && rows.pre_value_columns % kRowColumns == 0 &&
         is_aligned(params.grad_out) && is_aligned(params.pre_input) &&
         is_aligned(params.grad_values) && is_aligned(params.grad_pre_values);
}

}  // namespace

size_t value_ffn_bwd_rows_workspace(const ValueFfnBwdParams& params) {
  return Workspace(params).total;
}

Status value_ffn_bwd_rows(const ValueFfnBwdParams& params, const float* grad_a, void* workspace,
                          cudaStream_t stream) {
  const Workspace layout(params);
  auto* base = static_cast<char*>(workspace);
  ULTRAMEM_RETURN_IF_ERROR(sort_entries(params, layout, base, stream));
  Rows rows{};
  rows.keys = reinterpret_cast<const uint32_t*>(base + layout.keys);
  rows.entries = reinterpret_cast<const uint32_t*>(base + layout.entries);
  rows.grad_a = grad_a;
  rows.partial = reinterpret_cast<float*>(base + layout.partial);
  rows.num_entries = static_cast<uint32_t>(layout.num_entries);
  rows.piece_shift = layout.piece_shift;
  rows.num_groups = params.sum_groups ? 1 : static_cast<int>(params.addressing.expand);
  if (params.grad_values != nullptr) rows.value_columns = static_cast<int>(params.value_dim);
  if (params.grad_pre_values != nullptr) {
    rows.pre_value_columns = static_cast<int>(params.pre_value_dim);
  }

  const bool vectors = rows_are_vectors(params, rows);
  const auto blocks = static_cast<unsigned>(ceil_div(layout.num_entries, kTile * kRowWarps));
  constexpr int64_t kMaxGridY = 65535;
  const int64_t column_blocks = ceil_div(layout.columns, kThreads);
  const dim3 combine_grid(
      static_cast<unsigned>(layout.num_pieces),
      static_cast<unsigned>(column_blocks < kMaxGridY ? column_blocks : kMaxGridY));
  return ULTRAMEM_DISPATCH_DTYPE(params.grad_table_dtype, GradT, [&] {
    ULTRAMEM_RETURN_IF_ERROR(ULTRAMEM_DISPATCH_DTYPE(params.dtype, InputT, [&] {
      value_ffn_bwd_rows_kernel<InputT, GradT>
          <<<blocks, kRowThreads, 0, stream>>>(params, rows, vectors);
      return launch_status();
    }));
    if (layout.num_pieces == 1) return Status{};
    value_ffn_bwd_combine_kernel<GradT><<<combine_grid, kThreads, 0, stream>>>(params, rows);
    return launch_status();
  });
}

}  // namespace ultramem::cuda
