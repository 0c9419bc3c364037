// Backward of the value FFN, gradients of the tables: the same bits on every run. No atomics add
// anything up; they only count.
//
// Entries e = t * S + s are sorted by slot, so that the terms of a row lie side by side, in token
// order: a run. A row of both tables' gradients is one row here, first the columns of the values,
// then those of the pre-values. A warp takes kTile sorted entries and sums the runs that begin
// there. Fixed positions cut the sorted entries into pieces; where a run crosses one, its parts are
// summed by a warp each, into the workspace, and the last to come adds them up, always in the same
// order. So a row that every token retrieves is no slower than many rows.
//
// Columns are worked off batch by batch, one for all rows before the next, so that the columns of
// grad_out and pre_input that a batch reads again and again, in any order, stay in the L2 cache.
#include "value_ffn_bwd_rows.h"

#include <utility>

#include "async_copy.cuh"
#include "kernel_registry.h"
#include "sort_pairs.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

constexpr int kRowThreads = 128;
constexpr int kRowWarps = kRowThreads / kWarpSize;
// Entries at which a warp's runs begin. It looks up a window of 32 at once, so that a run of some
// length is in sight from its beginning.
constexpr int kTile = 16;
// Columns that a lane moves at once, of a row; a batch are those of kBatch times.
constexpr int kRowColumns = 4;
// Blocks that a multiprocessor holds: bounds registers, to 72 and 64 where inputs have 16 bits. Of
// batches of 3, 64 make uniform slots 1% faster and skewed ones 10% slower.
constexpr int row_blocks(int batch, size_t element_bytes) {
  if (element_bytes == 4) return batch == 3 ? 5 : 7;
  return batch == 3 ? 7 : 8;
}
// Runs, one after the other, whose gradients are on their way from memory: the one that is summed
// and the next.
constexpr int kRing = 2;
// Entries in a piece, at least, a power of two; more where there would be more than kMaxPieces.
constexpr int kMinPieceShift = 7;
constexpr int64_t kMaxPieces = 4096;
// Pieces whose parts of a run are added up before those of other such groups.
constexpr int kGroupShift = 6;

// keys[e] = slot, or as many as there are rows where it has none: those sort behind all rows.
// Counters are cleared along with it.
__global__ void __launch_bounds__(kThreads)
    value_ffn_bwd_keys_kernel(const __grid_constant__ ValueFfnParams params, uint32_t* keys,
                              uint32_t* entries, uint32_t* counters, int64_t num_counters) {
  const int64_t num_entries = params.num_tokens * params.num_selected;
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = entry; i < num_counters; i += int64_t{gridDim.x} * kThreads) counters[i] = 0;
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
  // How many of a run's parts there are, [batches, 3 * pieces]: [pieces, 2] for parts of a group,
  // which have the index of the first of them in `partial`, and [pieces] for groups, by the piece
  // that the run begins in.
  uint32_t* counters;
  uint32_t num_entries;
  uint32_t num_pieces;
  int piece_shift;
  int num_groups;
  // 0 where the gradient of that table is not wanted.
  int value_columns, pre_value_columns;

  __device__ __forceinline__ int columns() const { return value_columns + pre_value_columns; }
  __device__ __forceinline__ uint32_t first_key(uint32_t piece) const {
    return keys[piece << piece_shift];
  }
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

// What a lane does of a row: kColumns columns, of the values or the pre-values. All but two numbers
// is worked out again where it is used: registers are what limits the warps.
template <int kColumns, typename InputT, typename GradT>
struct Part {
  uint32_t column;  // of its table
  int factor;       // in the window; negative where there are no columns

  // Those from kColumns * index on.
  __device__ __forceinline__ Part(const ValueFfnBwdParams& params, const Rows& rows, int index) {
    const int first = index * kColumns;
    if (first < rows.value_columns) {
      column = static_cast<uint32_t>(first);
      const int slice = rows.value_columns / params.num_cores;
      factor = 0;
#pragma unroll
      for (int c = 1; c < kMaxNumCores; ++c) factor += c < params.num_cores && first >= c * slice;
    } else {
      column = static_cast<uint32_t>(first - rows.value_columns);
      factor = first < rows.columns() ? kMaxNumCores : -1;
    }
  }
  __device__ __forceinline__ bool exists() const { return factor >= 0; }
  __device__ __forceinline__ bool is_pre_value() const { return factor == kMaxNumCores; }
  __device__ __forceinline__ uint64_t offset(const Rows& rows, uint32_t row) const {
    const int dim = is_pre_value() ? rows.pre_value_columns : rows.value_columns;
    return static_cast<uint64_t>(row) * static_cast<uint32_t>(dim) + column;
  }
  __device__ __forceinline__ const InputT* source(const ValueFfnBwdParams& params, const Rows& rows,
                                                  uint32_t row) const {
    const void* from = is_pre_value() ? params.pre_input : params.grad_out;
    return static_cast<const InputT*>(from) + offset(rows, row);
  }
  __device__ __forceinline__ GradT* grad(const ValueFfnBwdParams& params, const Rows& rows,
                                         uint32_t row) const {
    void* to = is_pre_value() ? params.grad_pre_values : params.grad_values;
    return static_cast<GradT*>(to) + offset(rows, row);
  }
};

// Several parts, one for each time that a lane moves columns.
template <int kBatch, int kColumns, typename InputT, typename GradT>
struct Parts {
  Part<kColumns, InputT, GradT> parts[kBatch];

  __device__ __forceinline__ Parts(const ValueFfnBwdParams& params, const Rows& rows, int index)
      : Parts(params, rows, index, std::make_integer_sequence<int, kBatch>{}) {}
  template <int... k>
  __device__ __forceinline__ Parts(const ValueFfnBwdParams& params, const Rows& rows, int index,
                                   std::integer_sequence<int, k...>)
      : parts{{params, rows, index + k * kWarpSize}...} {}
  __device__ __forceinline__ const auto& operator[](int k) const { return parts[k]; }
};

// The gradients of a row before anything is added, on their way to shared memory. A lane reads back
// what it has requested itself. Columns that are moved one at a time come when they are needed.
template <int kBatch, int kColumns, typename GradT>
struct OldRow {
  static constexpr int kLaneBytes = kColumns * sizeof(GradT);
  static constexpr bool kIsRequested = kLaneBytes >= 8;
  static constexpr int kBytes = kBatch * kWarpSize * kLaneBytes;

  template <typename Parts>
  __device__ __forceinline__ static void request(const ValueFfnBwdParams& params, const Rows& rows,
                                                 const Parts& parts, uint32_t key,
                                                 unsigned char* to) {
    if constexpr (kIsRequested) {
      const uint64_t policy = drop_policy();
      const uint32_t lane_to = shared_address(to) + threadIdx.x % kWarpSize * kLaneBytes;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (!parts[k].exists()) continue;
        cp_async_with_policy<kLaneBytes>(lane_to + k * kWarpSize * kLaneBytes,
                                         parts[k].grad(params, rows, key), policy);
      }
    }
  }
  __device__ __forceinline__ static Pack<GradT, kColumns> load(const GradT* grad, int k,
                                                               const unsigned char* from) {
    Pack<GradT, kColumns> old;
    if constexpr (kIsRequested) {
      const int at = (k * kWarpSize + threadIdx.x % kWarpSize) * kLaneBytes;
      old = *reinterpret_cast<const Pack<GradT, kColumns>*>(from + at);
    } else {
      old.load_mutable(grad);
    }
    return old;
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
// moves. Returns whether the run ends in this piece.
template <int kBatch, int kColumns, typename InputT, typename GradT>
__device__ __forceinline__ bool sum_run(const ValueFfnBwdParams& params, const Rows& rows,
                                        const Parts<kBatch, kColumns, InputT, GradT>& parts,
                                        int index, Window& window, Place& place, int at,
                                        bool run_begins, const unsigned char* old_row) {
  using Old = OldRow<kBatch, kColumns, GradT>;
  constexpr int kInFlight = 2;  // entries
  const uint64_t policy = keep_policy();
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t key = __shfl_sync(kFullMask, place.key, at);
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
        const uint32_t row = window.source_rows[parts[k].is_pre_value()][i];
        sources[k].load_kept(parts[k].source(params, rows, row), policy);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float factor = parts[k].exists() ? window.factors[parts[k].factor][i] : 0.0f;
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
  if constexpr (Old::kIsRequested) cp_async_wait<kRing - 1>();
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    if (!parts[k].exists()) continue;
    if (run_begins && run_ends) {
      GradT* grad = parts[k].grad(params, rows, key);
      Pack<GradT, kColumns> old;
      old.clear();
      if (params.accumulate) old = Old::load(grad, k, old_row);
      store_row<kColumns>(grad, sums[k], old);
    } else {
      float* partial = rows.partial + (2 * int64_t{piece} + (run_begins ? 1 : 0)) * rows.columns() +
                       (index + k * kWarpSize) * kColumns;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) partial[j] = sums[k][j];
    }
  }
  return run_ends;
}

// How many pieces on, in steps of +1 or -1, begin inside the run as this one does or ends; by the
// whole warp, up to `most`.
__device__ __forceinline__ uint32_t pieces_on(const Rows& rows, uint32_t key, uint32_t piece,
                                              int step, uint32_t most) {
  static_assert(kMaxPieces == int64_t{kWarpSize} * 128, "128 and 4 are the steps of this search");
  const int lane = threadIdx.x % kWarpSize;
  uint32_t count = 0;
#pragma unroll
  for (const uint32_t stride : {128u, 4u, 1u}) {
    const uint32_t on = count + (lane + 1) * stride;
    const bool inside = on <= most && rows.first_key(piece + step * static_cast<int>(on)) == key;
    count += __popc(__ballot_sync(kFullMask, inside)) * stride;
  }
  return count;
}

// Counts the calling warp's part, which all its lanes have written. Returns whether it is the last
// of so many, and then all its lanes see those of the others.
__device__ __forceinline__ bool is_last(uint32_t* counter, uint32_t num_parts) {
  __syncwarp();
  uint32_t before = 0;
  if (threadIdx.x % kWarpSize == 0) {
    __threadfence();
    before = atomicAdd(counter, 1);
    __threadfence();
  }
  before = __shfl_sync(kFullMask, before, 0);
  __syncwarp();
  return before + 1 == num_parts;
}

// A batch's part of a run that does not begin and end in the piece. The last to come of a group of
// pieces adds up the group's, the last of those the groups; each in order.
template <int kBatch, int kColumns, typename InputT, typename GradT>
__device__ __noinline__ void add_part(const ValueFfnBwdParams& params, const Rows& rows,
                                      uint32_t key, uint32_t piece, bool begins, bool ends) {
  // The pieces that the run begins and ends in.
  uint32_t first = piece, last = piece;
  if (!begins) {
    first -= pieces_on(rows, key, piece, -1, piece);
    const uint32_t entry = first << rows.piece_shift;
    if (entry > 0 && rows.keys[entry - 1] == key) --first;
  }
  if (!ends) last += pieces_on(rows, key, piece, 1, rows.num_pieces - 1 - piece);

  const int lane = threadIdx.x % kWarpSize;
  const int64_t columns = rows.columns();
  constexpr int kWidth = kBatch * kWarpSize * kColumns;
  constexpr int kUnroll = kBatch == 3 ? 4 : 2;  // as registers allow
  const int64_t batch = blockIdx.y;
  const int64_t first_column = batch * kWidth + lane * kColumns;
  const int64_t end_column = min(columns, (batch + 1) * kWidth);
  uint32_t* counters = rows.counters + batch * 3 * rows.num_pieces;
  const auto row_of = [&](uint32_t index) { return rows.partial + index * columns; };
  // The sum of rows of `partial`: that of index `head`, then `count` more, from `next` on.
  const auto sum_rows = [&](int64_t column, uint32_t head, uint32_t next, uint32_t step,
                            uint32_t count, float (&sum)[kColumns]) {
    Pack<float, kColumns> pack;
    pack.load_shared_by_blocks(row_of(head) + column);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sum[j] = pack[j];
#pragma unroll kUnroll
    for (uint32_t i = 0; i < count; ++i) {
      pack.load_shared_by_blocks(row_of(next + i * step) + column);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[j] += pack[j];
    }
  };
  const uint32_t first_group = first >> kGroupShift, last_group = last >> kGroupShift;
  const uint32_t group_begin = piece >> kGroupShift << kGroupShift;
  const uint32_t first_here = max(first, group_begin);
  const uint32_t last_here = min(last, group_begin + (1u << kGroupShift) - 1);
  uint32_t head = first >= group_begin ? 2 * first + 1 : 2 * group_begin;
  uint32_t next = 2 * (first_here + 1), step = 2, count = last_here - first_here;
  if (!is_last(counters + head, count + 1)) return;
  if (first_group != last_group) {
    for (int64_t column = first_column; column < end_column; column += kWarpSize * kColumns) {
      float sum[kColumns];
      sum_rows(column, head, next, step, count, sum);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) row_of(head)[column + j] = sum[j];
    }
    count = last_group - first_group;
    if (!is_last(counters + 2 * rows.num_pieces + first, count + 1)) return;
    head = 2 * first + 1;
    next = (first_group + 1) << (kGroupShift + 1);
    step = 2 << kGroupShift;
  }
  for (int64_t column = first_column; column < end_column; column += kWarpSize * kColumns) {
    float sum[kColumns];
    sum_rows(column, head, next, step, count, sum);
    const Part<kColumns, InputT, GradT> part(params, rows, static_cast<int>(column / kColumns));
    GradT* grad = part.grad(params, rows, key);
    Pack<GradT, kColumns> old;
    old.clear();
    if (params.accumulate) old.load_mutable(grad);
    store_row<kColumns>(grad, sum, old);
  }
}

template <int kBatch, int kColumns, typename InputT, typename GradT>
__device__ __forceinline__ void sum_tile(const ValueFfnBwdParams& params, const Rows& rows,
                                         uint32_t first, Window& window, unsigned char* ring) {
  using Old = OldRow<kBatch, kColumns, GradT>;
  const int lane = threadIdx.x % kWarpSize;
  Place place{first, first, load_window(params, rows, first, lane, window)};
  const uint32_t tile_key = place.key;
  uint32_t before = __shfl_up_sync(kFullMask, place.key, 1);
  if (lane == 0 && first > 0) before = rows.keys[first - 1];
  const uint32_t position = first + lane;
  const bool run_begins = position == 0 || before != place.key;
  const bool piece_begins = (position & ((1u << rows.piece_shift) - 1)) == 0;
  const bool exists = place.key != params.addressing.rows_in_memory();
  const uint32_t heads =
      __ballot_sync(kFullMask, lane < kTile && exists && (run_begins || piece_begins));
  const uint32_t begins = __ballot_sync(kFullMask, run_begins);
  const int index = static_cast<int>(blockIdx.y) * kBatch * kWarpSize + lane;
  const Parts<kBatch, kColumns, InputT, GradT> parts(params, rows, index);
  uint32_t to_request = heads;
  const auto request_next = [&](int slot) {
    const int at = __ffs(to_request) - 1;
    const uint32_t key = __shfl_sync(kFullMask, tile_key, max(at, 0));
    if (params.accumulate && at >= 0) {
      Old::request(params, rows, parts, key, ring + slot * Old::kBytes);
    }
    cp_async_commit();
    to_request &= to_request - 1;
  };
#pragma unroll
  for (int slot = 0; slot < kRing - 1; ++slot) request_next(slot);
  int slot = 0;
  uint32_t ends = 0;
  for (uint32_t left = heads; left != 0; left &= left - 1) {
    const int at = __ffs(left) - 1;
    request_next((slot + kRing - 1) % kRing);
    const bool run_ends = sum_run<kBatch, kColumns, InputT, GradT>(
        params, rows, parts, index, window, place, at, (begins >> at & 1) != 0,
        ring + slot * Old::kBytes);
    ends |= run_ends ? 1u << at : 0;
    slot = (slot + 1) % kRing;
  }
  for (uint32_t left = heads & ~(begins & ends); left != 0; left &= left - 1) {
    const int at = __ffs(left) - 1;
    add_part<kBatch, kColumns, InputT, GradT>(params, rows, __shfl_sync(kFullMask, tile_key, at),
                                              (first + at) >> rows.piece_shift,
                                              (begins >> at & 1) != 0, (ends >> at & 1) != 0);
  }
}

// Grid: kRowWarps tiles a block, then the batches.
template <int kBatch, typename InputT, typename GradT>
__global__ void __launch_bounds__(kRowThreads, row_blocks(kBatch, sizeof(InputT)))
    value_ffn_bwd_rows_kernel(const __grid_constant__ ValueFfnBwdParams params,
                              const __grid_constant__ Rows rows, bool vectors) {
  const int warp = threadIdx.x / kWarpSize;
  const int64_t tile = int64_t{blockIdx.x} * kRowWarps + warp;
  if (tile * kTile >= rows.num_entries) return;
  __shared__ Window windows[kRowWarps];
  __shared__ __align__(
      16) unsigned char rings[kRowWarps][kRing * OldRow<kBatch, kRowColumns, GradT>::kBytes];
  const auto first = static_cast<uint32_t>(tile * kTile);
  if (vectors) {
    sum_tile<kBatch, kRowColumns, InputT, GradT>(params, rows, first, windows[warp], rings[warp]);
  } else {
    sum_tile<kBatch, 1, InputT, GradT>(params, rows, first, windows[warp], rings[warp]);
  }
}

// Host ------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_VALUE_FFN_BWD_ROWS(id, name, InputT, GradT)                 \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_rows_2_##id,                                 \
                           "value_ffn_bwd_rows<" name ", batches of 2>", kRowThreads, \
                           (value_ffn_bwd_rows_kernel<2, InputT, GradT>));            \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_rows_3_##id,                                 \
                           "value_ffn_bwd_rows<" name ", batches of 3>", kRowThreads, \
                           (value_ffn_bwd_rows_kernel<3, InputT, GradT>))
ULTRAMEM_FOR_EACH_DTYPE_PAIR(ULTRAMEM_REGISTER_VALUE_FFN_BWD_ROWS);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_keys, "value_ffn_bwd_keys", kThreads,
                         value_ffn_bwd_keys_kernel);

// Where things lie in the workspace, in bytes from its beginning.
struct Workspace {
  int64_t num_entries, num_pieces, columns;
  int piece_shift = kMinPieceShift;
  int batch, num_bits;
  size_t keys_in, keys, entries_in, entries, partial, counters, sort, sort_bytes, total = 0;

  explicit Workspace(const ValueFfnBwdParams& params) {
    num_entries = params.num_tokens * params.num_selected;
    columns = (params.grad_values != nullptr ? params.value_dim : 0) +
              (params.grad_pre_values != nullptr ? params.pre_value_dim : 0);
    while (ceil_div(num_entries, int64_t{1} << piece_shift) > kMaxPieces) ++piece_shift;
    num_pieces = ceil_div(num_entries, int64_t{1} << piece_shift);
    // Whichever leaves fewer lanes without columns; 3 if both do as well.
    const int64_t moves = ceil_div(columns, kWarpSize * kRowColumns);
    batch = 3 * ceil_div(moves, 3) <= 2 * ceil_div(moves, 2) ? 3 : 2;
    num_bits = key_bits(static_cast<uint64_t>(params.addressing.rows_in_memory()));
    keys_in = take(num_entries * sizeof(uint32_t));
    keys = take(num_entries * sizeof(uint32_t));
    entries_in = take(num_entries * sizeof(uint32_t));
    entries = take(num_entries * sizeof(uint32_t));
    partial = take(2 * num_pieces * columns * sizeof(float));
    counters = take(num_counters(false) * sizeof(uint32_t));
    sort_bytes = sort_pairs_workspace(num_entries, num_bits);
    sort = take(sort_bytes);
  }
  int64_t num_batches(bool vectors) const {
    return ceil_div(columns, batch * kWarpSize * (vectors ? kRowColumns : 1));
  }
  int64_t num_counters(bool vectors) const { return 3 * num_pieces * num_batches(vectors); }

 private:
  size_t take(size_t bytes) {
    const size_t offset = total;
    total += align_up(bytes);
    return offset;
  }
};

// Whether rows of a gradient, and of what it is summed from, are moved kRowColumns at a time.
bool rows_are_vectors(const ValueFfnBwdParams& params) {
  const auto moves = [](const void* grad, int64_t columns) {
    return grad == nullptr || (columns % kRowColumns == 0 && is_aligned(grad));
  };
  return moves(params.grad_values, params.value_dim / params.num_cores) &&
         moves(params.grad_pre_values, params.pre_value_dim) && is_aligned(params.grad_out) &&
         is_aligned(params.pre_input);
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
  value_ffn_bwd_keys_kernel<<<blocks, kThreads, 0, stream>>>(
      params, keys_in, entries_in, reinterpret_cast<uint32_t*>(base + layout.counters),
      layout.num_counters(rows_are_vectors(params)));
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
  rows.counters = reinterpret_cast<uint32_t*>(base + layout.counters);
  rows.num_pieces = static_cast<uint32_t>(layout.num_pieces);
  rows.num_entries = static_cast<uint32_t>(layout.num_entries);
  rows.piece_shift = layout.piece_shift;
  rows.num_groups = params.sum_groups ? 1 : static_cast<int>(params.addressing.expand);
  if (params.grad_values != nullptr) rows.value_columns = static_cast<int>(params.value_dim);
  if (params.grad_pre_values != nullptr) {
    rows.pre_value_columns = static_cast<int>(params.pre_value_dim);
  }

  const bool vectors = rows_are_vectors(params);
  const dim3 grid(static_cast<unsigned>(ceil_div(layout.num_entries, kTile * kRowWarps)),
                  static_cast<unsigned>(layout.num_batches(vectors)));
  return ULTRAMEM_DISPATCH_DTYPE(params.grad_table_dtype, GradT, [&] {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, InputT, [&] {
      auto* kernel = layout.batch == 3 ? value_ffn_bwd_rows_kernel<3, InputT, GradT>
                                       : value_ffn_bwd_rows_kernel<2, InputT, GradT>;
      kernel<<<grid, kRowThreads, 0, stream>>>(params, rows, vectors);
      return launch_status();
    });
  });
}

}  // namespace ultramem::cuda
