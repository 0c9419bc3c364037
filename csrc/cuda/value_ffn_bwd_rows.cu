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
// Blocks that a multiprocessor holds: bounds registers to 96, or 128.
constexpr int row_blocks(size_t element_bytes) { return element_bytes == 4 ? 4 : 5; }
constexpr int kRowWarps = kRowThreads / kWarpSize;
// Entries at which a warp's runs begin. It looks up a window of 32 at once, so that a run of some
// length is in sight from its beginning.
constexpr int kTile = 16;
// Columns that a lane moves at once, of a row; and how often before it uses the first.
constexpr int kRowColumns = 4;
constexpr int kBatch = 3;
// Entries in a piece, at least, a power of two; more where there would be more than kMaxPieces.
constexpr int kMinPieceShift = 7;
constexpr int64_t kMaxPieces = 4096;

// keys[e] = slot, or as many as there are rows where it has none: those sort behind all rows.
__global__ void __launch_bounds__(kThreads)
    value_ffn_bwd_keys_kernel(const __grid_constant__ ValueFfnParams params, uint32_t* keys,
                              uint32_t* entries) {
  const int64_t num_entries = params.num_tokens * params.num_selected;
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= num_entries) return;
  const int64_t slot = resolve_slot(params.addressing, load_index(params, entry)).slot;
  keys[entry] = static_cast<uint32_t>(slot >= 0 ? slot : params.addressing.rows_in_memory());
  entries[entry] = static_cast<uint32_t>(entry);
}

// grad_values[slot, slice c] = sum of weights[e, c] * grad_out[t, group, slice c] and
// grad_pre_values[slot] = sum of grad_a[e] * pre_input[t].
struct Rows {
  const uint32_t* keys;     // [T * S], sorted
  const uint32_t* entries;  // [T * S], in the order of the keys
  const float* weights;     // [T, S, C]
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

// Returns the lane's key, the number of rows where there is none.
__device__ __forceinline__ uint32_t load_window(const ValueFfnBwdParams& params, const Rows& rows,
                                                uint32_t first, int lane, Window& window) {
  const auto none = static_cast<uint32_t>(params.addressing.rows_in_memory());
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
      const float* weights = rows.weights + int64_t{entry} * params.num_cores;
#pragma unroll 1
      for (int c = 0; c < params.num_cores; ++c) window.factors[c][lane] = weights[c];
    }
    if (rows.pre_value_columns > 0) window.factors[kMaxNumCores][lane] = rows.grad_a[entry];
  }
  __syncwarp();
  return key;
}

// What a lane does of a row: kColumns columns, of the values or the pre-values.
template <int kColumns, typename InputT, typename GradT>
struct Part {
  const InputT* source;  // the columns in the first row, null where there are none
  GradT* grad;
  uint32_t dim;
  int factor;  // in the window

  // Those from kColumns * index on.
  __device__ __forceinline__ Part(const ValueFfnBwdParams& params, const Rows& rows, int index) {
    int column = index * kColumns;
    if (column < rows.value_columns) {
      source = static_cast<const InputT*>(params.grad_out) + column;
      grad = static_cast<GradT*>(params.grad_values) + column;
      dim = static_cast<uint32_t>(rows.value_columns);
      const int slice = rows.value_columns / params.num_cores;
      factor = 0;
#pragma unroll
      for (int c = 1; c < kMaxNumCores; ++c) factor += c < params.num_cores && column >= c * slice;
    } else {
      column -= rows.value_columns;
      const bool exists = column < rows.pre_value_columns;
      source = exists ? static_cast<const InputT*>(params.pre_input) + column : nullptr;
      grad = static_cast<GradT*>(params.grad_pre_values) + column;
      dim = static_cast<uint32_t>(rows.pre_value_columns);
      factor = kMaxNumCores;
    }
  }
  __device__ __forceinline__ bool exists() const { return source != nullptr; }
  __device__ __forceinline__ uint64_t offset(uint32_t row) const {
    return static_cast<uint64_t>(row) * dim;
  }
};

// The sum of kColumns columns of a row goes to its gradient, rounded once.
template <int kColumns, typename GradT>
__device__ __forceinline__ void store_row(GradT* grad, const float (&sum)[kColumns],
                                          Pack<GradT, kColumns> old) {
  // Without accumulation `old` is zeros.
#pragma unroll
  for (int j = 0; j < kColumns; ++j) old.set(j, old[j] + sum[j]);
  old.store_last(grad);
}

// Where a warp is among the sorted entries.
struct Place {
  uint32_t first;  // of the tile
  uint32_t window_first;
  uint32_t key;  // the lane's, of the window
};

// The lane's parts of the row of a run, from lane `at` of the window on, which is at the tile's
// beginning. Where the run goes beyond it, no other of the tile's begins behind it, and the window
// moves.
template <int kColumns, typename InputT, typename GradT>
__device__ __forceinline__ void sum_run(const ValueFfnBwdParams& params, const Rows& rows,
                                        const Part<kColumns, InputT, GradT> (&parts)[kBatch],
                                        int index, Window& window, Place& place, int at,
                                        bool run_begins) {
  constexpr int kInFlight = 2;  // entries
  const uint64_t policy = keep_policy();
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t key = __shfl_sync(kFullMask, place.key, at);
  Pack<GradT, kColumns> old[kBatch];
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    old[k].clear();
    if (params.accumulate && parts[k].exists()) {
      old[k].load_mutable(parts[k].grad + parts[k].offset(key));
    }
  }
  const uint32_t piece = (place.first + at) >> rows.piece_shift;
  // Of the piece, from the window's first entry on. The last piece ends where there are no keys.
  uint32_t left = ((piece + 1) << rows.piece_shift) - place.first;
  float sums[kBatch][kColumns] = {};
  int from = at;
  bool run_ends = false;
  while (true) {
    const bool in_run = lane >= from && place.key == key && static_cast<uint32_t>(lane) < left;
    const int to = from + __popc(__ballot_sync(kFullMask, in_run));
#pragma unroll kInFlight
    for (int i = from; i < to; ++i) {
      Pack<InputT, kColumns> sources[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        sources[k].clear();
        if (!parts[k].exists()) continue;
        const uint32_t row = window.source_rows[parts[k].factor / kMaxNumCores][i];
        sources[k].load_kept(parts[k].source + parts[k].offset(row), policy);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float factor = window.factors[parts[k].factor][i];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[k][j] = fmaf(factor, sources[k][j], sums[k][j]);
      }
    }
    if (to < kWarpSize) {
      // Behind the last entry there are no keys, either.
      run_ends = __shfl_sync(kFullMask, place.key, to) != key;
      break;
    }
    const bool last = rows.num_entries - place.window_first <= kWarpSize;
    if (last || left <= kWarpSize) {
      run_ends = last || rows.keys[place.window_first + kWarpSize] != key;
      break;
    }
    left -= kWarpSize;
    from = 0;
    place.window_first += kWarpSize;
    place.key = load_window(params, rows, place.window_first, lane, window);
  }
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    if (!parts[k].exists()) continue;
    if (run_begins && run_ends) {
      store_row<kColumns>(parts[k].grad + parts[k].offset(key), sums[k], old[k]);
    } else {
      float* partial = rows.partial + (2 * int64_t{piece} + (run_begins ? 1 : 0)) * rows.columns() +
                       (index + k * kWarpSize) * kColumns;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) partial[j] = sums[k][j];
    }
  }
}

template <int kColumns, typename InputT, typename GradT>
__device__ __forceinline__ void sum_tile(const ValueFfnBwdParams& params, const Rows& rows,
                                         uint32_t first, Window& window) {
  const int lane = threadIdx.x % kWarpSize;
  Place place{first, first, load_window(params, rows, first, lane, window)};
  uint32_t before = __shfl_up_sync(kFullMask, place.key, 1);
  if (lane == 0 && first > 0) before = rows.keys[first - 1];
  const uint32_t position = first + lane;
  const bool run_begins = position == 0 || before != place.key;
  const bool piece_begins = (position & ((1u << rows.piece_shift) - 1)) == 0;
  const bool exists = place.key != params.addressing.rows_in_memory();
  const uint32_t heads =
      __ballot_sync(kFullMask, lane < kTile && exists && (run_begins || piece_begins));
  const uint32_t begins = __ballot_sync(kFullMask, run_begins);
  for (int index = lane; (index - lane) * kColumns < rows.columns(); index += kBatch * kWarpSize) {
    if (place.window_first != first) {
      place.window_first = first;
      place.key = load_window(params, rows, first, lane, window);
    }
    const Part<kColumns, InputT, GradT> parts[kBatch] = {{params, rows, index},
                                                         {params, rows, index + kWarpSize},
                                                         {params, rows, index + 2 * kWarpSize}};
    for (uint32_t left = heads; left != 0; left &= left - 1) {
      const int at = __ffs(left) - 1;
      sum_run<kColumns, InputT, GradT>(params, rows, parts, index, window, place, at,
                                       (begins >> at & 1) != 0);
    }
  }
}

// Grid: kRowWarps tiles a block.
template <typename InputT, typename GradT>
__global__ void __launch_bounds__(kRowThreads, row_blocks(sizeof(InputT)))
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

// Adds up the runs that go beyond the piece they begin in: a block for kCombinePieces pieces, a
// thread a column.
constexpr int kCombinePieces = 8;

template <typename GradT>
__global__ void __launch_bounds__(kThreads)
    value_ffn_bwd_combine_kernel(const __grid_constant__ ValueFfnBwdParams params,
                                 const __grid_constant__ Rows rows, int64_t num_pieces) {
  const uint32_t* keys = rows.keys;
  const auto begin_of = [&](int64_t piece) { return piece << rows.piece_shift; };
  const auto begins_long_run = [&](int64_t piece) {
    const int64_t begin = begin_of(piece), end = begin_of(piece + 1);
    if (end >= rows.num_entries) return false;
    const uint32_t key = keys[end - 1];
    return key != params.addressing.rows_in_memory() && keys[end] == key &&
           (keys[begin] != key || begin == 0 || keys[begin - 1] != key);
  };
  const int64_t first = int64_t{blockIdx.x} * kCombinePieces;
  const int lane = threadIdx.x % kWarpSize;
  uint32_t left = __ballot_sync(kFullMask, lane < kCombinePieces && first + lane < num_pieces &&
                                               begins_long_run(first + lane));
  for (; left != 0; left &= left - 1) {
    const int64_t piece = first + __ffs(left) - 1;
    const uint32_t key = keys[begin_of(piece + 1) - 1];
    // The last piece that begins with the run: most often the next, else by steps that double, then
    // by bisection.
    int64_t last = piece + 1, beyond = last + 1;
    for (int64_t step = 1; beyond < num_pieces && keys[begin_of(beyond)] == key; step *= 2) {
      last = beyond;
      beyond += step;
    }
    beyond = min(beyond, num_pieces);
    while (beyond - last > 1) {
      const int64_t middle = (last + beyond) / 2;
      (keys[begin_of(middle)] == key ? last : beyond) = middle;
    }
    const int64_t columns = rows.columns();
    for (int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x; column < columns;
         column += int64_t{gridDim.y} * kThreads) {
      float sum[1] = {rows.partial[(2 * piece + 1) * columns + column]};
#pragma unroll 8
      for (int64_t i = piece + 1; i <= last; ++i) sum[0] += rows.partial[2 * i * columns + column];
      const Part<1, float, GradT> part(params, rows, static_cast<int>(column));
      GradT* grad = part.grad + part.offset(key);
      Pack<GradT, 1> old;
      old.clear();
      if (params.accumulate) old.load_mutable(grad);
      store_row<1>(grad, sum, old);
    }
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
    num_bits = key_bits(static_cast<uint64_t>(params.addressing.rows_in_memory()));
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

Status value_ffn_bwd_keys(const ValueFfnBwdParams& params, void* workspace, cudaStream_t stream) {
  const Workspace layout(params);
  auto* base = static_cast<char*>(workspace);
  auto* keys_in = reinterpret_cast<uint32_t*>(base + layout.keys_in);
  auto* entries_in = reinterpret_cast<uint32_t*>(base + layout.entries_in);
  const auto blocks = static_cast<unsigned>(ceil_div(layout.num_entries, kThreads));
  value_ffn_bwd_keys_kernel<<<blocks, kThreads, 0, stream>>>(params, keys_in, entries_in);
  return launch_status();
}

Status value_ffn_bwd_sort(const ValueFfnBwdParams& params, void* workspace, cudaStream_t stream) {
  const Workspace layout(params);
  auto* base = static_cast<char*>(workspace);
  auto* keys_in = reinterpret_cast<uint32_t*>(base + layout.keys_in);
  auto* entries_in = reinterpret_cast<uint32_t*>(base + layout.entries_in);
  return sort_pairs(keys_in, reinterpret_cast<uint32_t*>(base + layout.keys), entries_in,
                    reinterpret_cast<uint32_t*>(base + layout.entries), layout.num_entries,
                    layout.num_bits, base + layout.sort, layout.sort_bytes, stream);
}

Status value_ffn_bwd_rows(const ValueFfnBwdParams& params, const TokenFactors& factors,
                          void* workspace, cudaStream_t stream) {
  const Workspace layout(params);
  auto* base = static_cast<char*>(workspace);
  Rows rows{};
  rows.keys = reinterpret_cast<const uint32_t*>(base + layout.keys);
  rows.entries = reinterpret_cast<const uint32_t*>(base + layout.entries);
  rows.weights = factors.weights;
  rows.grad_a = factors.grad_a;
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
      static_cast<unsigned>(ceil_div(layout.num_pieces, kCombinePieces)),
      static_cast<unsigned>(column_blocks < kMaxGridY ? column_blocks : kMaxGridY));
  return ULTRAMEM_DISPATCH_DTYPE(params.grad_table_dtype, GradT, [&] {
    ULTRAMEM_RETURN_IF_ERROR(ULTRAMEM_DISPATCH_DTYPE(params.dtype, InputT, [&] {
      value_ffn_bwd_rows_kernel<InputT, GradT>
          <<<blocks, kRowThreads, 0, stream>>>(params, rows, vectors);
      return launch_status();
    }));
    if (layout.num_pieces == 1) return Status{};
    value_ffn_bwd_combine_kernel<GradT>
        <<<combine_grid, kThreads, 0, stream>>>(params, rows, layout.num_pieces);
    return launch_status();
  });
}

}  // namespace ultramem::cuda
