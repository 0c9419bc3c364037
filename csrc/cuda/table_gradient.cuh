// The gradients of rows of a table, in registers: what the norm and the optimizers read instead of
// a gradient table.
//
// A row's run of entries belongs to a group of 8, 16 or 32 lanes. They take it in stretches, 8
// columns a lane. A warp looks up 64 entries at once, in shared memory, for the runs of all its
// groups. Long runs are summed before, in pieces (table_gradient.cu), and only their sums are added
// up here.
#pragma once

#include "common.cuh"
#include "common/row_runs.h"
#include "common/table_update_math.h"
#include "ultramem/table_update.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda::table_kernels {

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / kWarpSize;

// So that a column and the stretch behind it are an int, and a row's bytes 32 bits.
inline constexpr int64_t kMaxCudaColumns = int64_t{1} << 29;

struct GradientArguments {
  TableGradient gradient;
  const float* piece_sums;  // [num_piece_sums(n), dim]
  uint32_t piece_length;
  // 8 columns lie in one core's slice and may be moved in words of 16 bytes. Else every column is
  // summed by itself (column_gradient).
  bool vectors;
};

// What CUDA, too, refuses; `dtype` is that of the table or of accumulation.
Status check_gradient(const TableGradient& gradient, DType dtype);
// Makes room for, and computes, the sums of the pieces of long runs.
size_t piece_sums_bytes(const TableGradient& gradient);
Status launch_piece_sums(const GradientArguments& arguments, float* piece_sums,
                         cudaStream_t stream);

inline GradientArguments gradient_arguments(const TableGradient& gradient, float* piece_sums,
                                            bool vectors) {
  vectors = vectors && gradient.dim / gradient.num_cores % kLaneColumns == 0 &&
            is_aligned(gradient.source);
  return {gradient, piece_sums, piece_length(gradient.num_entries), vectors};
}

// Eight neighbouring elements -------------------------------------------------------------------

using Chunk = float[kLaneColumns];

__device__ __forceinline__ void clear(Chunk& x) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) x[j] = 0;
}

// As they are in memory.
template <typename T>
struct PackedChunk {
  static constexpr int kWords = kLaneColumns * sizeof(T) / sizeof(uint4);
  uint4 words[kWords];

  // Of what the kernel does not write, and others read, too.
  __device__ __forceinline__ void load_shared(const void* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(static_cast<const uint4*>(from) + i);
  }
  // Streaming: nothing is used again by the kernel.
  __device__ __forceinline__ void load(const void* from, int64_t index) {
    const auto* at = reinterpret_cast<const uint4*>(static_cast<const T*>(from) + index);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(at + i);
  }
  __device__ __forceinline__ void store(void* to, int64_t index) const {
    auto* at = reinterpret_cast<uint4*>(static_cast<T*>(to) + index);
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(at + i, words[i]);
  }
  __device__ __forceinline__ void get(Chunk& x) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // The upper half of a float is a bfloat16.
      const auto* pairs = reinterpret_cast<const uint32_t*>(words);
#pragma unroll
      for (int i = 0; i < kLaneColumns / 2; ++i) {
        x[2 * i] = __uint_as_float(pairs[i] << 16);
        x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) x[j] = to_float(reinterpret_cast<const T*>(words)[j]);
    }
  }
  __device__ __forceinline__ void set_nearest(const Chunk& x) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) reinterpret_cast<T*>(words)[j] = from_float<T>(x[j]);
  }
};

// Lanes and columns -------------------------------------------------------------------------------

// Where a lane is among those of its warp that share a row, and what of the row's shape it needs.
struct RowLane {
  int dim;
  int slice;  // columns of a core
  int lanes;  // that share a row
  int lane;   // among them
  int group;  // of the warp's groups of lanes
  int groups;

  __device__ __forceinline__ RowLane(const TableGradient& g, int lanes)
      : dim(static_cast<int>(g.dim)), slice(dim / g.num_cores), lanes(lanes) {
    const int warp_lane = threadIdx.x % kWarpSize;
    lane = warp_lane & (lanes - 1);
    groups = lanes == 8 ? 4 : lanes == 16 ? 2 : 1;
    group = warp_lane * groups / kWarpSize;
  }
  // Columns of a stretch.
  __device__ __forceinline__ int stretch_columns() const { return lanes * kLaneColumns; }
  // The first of a lane's columns in the stretch that begins with column `stretch`.
  __device__ __forceinline__ int column(int stretch) const { return stretch + lane * kLaneColumns; }
  // The same, but the row's last columns for lanes behind its end, who repeat them and drop what
  // they get.
  __device__ __forceinline__ int column_in_row(int stretch) const {
    return min(column(stretch), dim - kLaneColumns);
  }
  __device__ __forceinline__ int64_t offset(uint32_t row) const {
    return static_cast<int64_t>(uint64_t{row} * static_cast<uint32_t>(dim));
  }
  __device__ __forceinline__ int core(int column) const {
    int core = 0;
#pragma unroll
    for (int c = 1; c < kMaxNumCores; ++c) core += column >= c * slice && c * slice < dim;
    return core;
  }

  // A sum over the lanes that share a row; for all lanes of the warp.
  __device__ __forceinline__ float row_sum(float x) const {
    for (int delta = lanes / 2; delta > 0; delta /= 2) {
      x = add(x, __shfl_xor_sync(kFullMask, x, delta));
    }
    return x;
  }
};

// Runs --------------------------------------------------------------------------------------------

// Warps that share so many runs.
inline int64_t num_run_warps(int64_t max_runs) {
  constexpr int64_t kEnoughWarps = 16384;
  const int64_t warps = ceil_div(max_runs, kWarpSize);
  return warps < kEnoughWarps ? (max_runs < kEnoughWarps ? max_runs : kEnoughWarps) : warps;
}

// One of a warp's runs; a group of lanes has its own.
struct Run {
  bool exists;
  uint32_t row;
  uint32_t index;       // among all runs
  uint32_t begin, end;  // of its entries; none of a dense gradient
};

// A warp's share of the runs, a lane each: as many for every warp, however few runs there are.
class RunBatch {
 public:
  __device__ __forceinline__ RunBatch(const TableGradient& g, int64_t warp, int64_t num_warps) {
    const int64_t runs = g.keys == nullptr ? g.num_rows : g.counts[0];
    const int64_t batch = ceil_div(runs, num_warps);
    const int64_t first = warp * batch;
    first_ = static_cast<uint32_t>(first);
    count_ = static_cast<int>(max(min(batch, runs - first), int64_t{0}));
    const int lane = threadIdx.x % kWarpSize;
    row_ = begin_ = end_ = 0;
    if (lane >= count_) return;
    row_ = static_cast<uint32_t>(first + lane);
    if (g.keys == nullptr) return;
    begin_ = g.run_begins[first + lane];
    end_ = g.run_begins[first + lane + 1];
    row_ = g.keys[begin_];
  }

  __device__ __forceinline__ int count() const { return count_; }
  // For all lanes of the warp.
  __device__ __forceinline__ Run operator[](int i) const {
    const int from = min(i, count_ - 1);
    return {i < count_, __shfl_sync(kFullMask, row_, from), first_ + from,
            __shfl_sync(kFullMask, begin_, from), __shfl_sync(kFullMask, end_, from)};
  }
  // Behind its last entry.
  __device__ __forceinline__ uint32_t end() const {
    return __shfl_sync(kFullMask, end_, count_ - 1);
  }

 private:
  int count_;
  uint32_t first_, row_, begin_, end_;
};

// Neighbours among the sorted entries, looked up together.
struct EntryWindow {
  static constexpr int kEntries = 2 * kWarpSize;
  uint32_t rows[kEntries];                                // of the source
  float weights[kMaxNumCores][kEntries + kWarpSize / 2];  // cores in different banks
};

// Which of them a warp's window holds.
struct WindowPlace {
  uint32_t begin = 0, end = 0;

  __device__ __forceinline__ bool holds(uint32_t position) const {
    return position - begin < end - begin;
  }

  // From `position` on, up to `limit`; for all lanes of the warp.
  __device__ __forceinline__ void load(const TableGradient& g, uint32_t position, uint32_t limit,
                                       EntryWindow& window) {
    begin = position;
    end = min(position + EntryWindow::kEntries, limit);
    __syncwarp();  // all have read the window before
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarpSize; i < end - begin; i += kWarpSize) {
      const uint32_t entry = g.entries[begin + i];
      uint32_t row = entry / static_cast<uint32_t>(g.num_selected);
      if (g.num_groups > 1) {
        const auto num_groups = static_cast<uint32_t>(g.num_groups);
        row = row * num_groups + min(uint32_t{g.groups[entry]}, num_groups - 1);
      }
      window.rows[i] = row;
      const float* weights = static_cast<const float*>(g.weights) + int64_t{entry} * g.num_cores;
#pragma unroll 1
      for (int c = 0; c < g.num_cores; ++c) window.weights[c][i] = weights[c];
    }
    __syncwarp();
  }
};

// Adds entries [begin, end) of the window from left to right, the rows of kInFlight at once.
template <int kInFlight, typename SourceT>
__device__ __forceinline__ void add_entries(const TableGradient& g, const RowLane& lane,
                                            int stretch, const EntryWindow& window, uint32_t begin,
                                            uint32_t end, Chunk& sum) {
  const int column = lane.column_in_row(stretch);
  const auto* source =
      reinterpret_cast<const char*>(static_cast<const SourceT*>(g.source) + column);
  const float* weights = window.weights[lane.core(column)];
  const auto row_bytes = static_cast<uint32_t>(lane.dim * sizeof(SourceT));
#pragma unroll 1
  for (uint32_t i = begin; i < end; i += kInFlight) {
    PackedChunk<SourceT> rows[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      rows[u].load_shared(source + uint64_t{window.rows[min(i + u, end - 1)]} * row_bytes);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      // No branch, for the requests would be moved behind it.
      const bool exists = u == 0 || i + u < end;
      const float weight = weights[min(i + u, end - 1)];
      Chunk row;
      rows[u].get(row);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const float next = add(sum[j], mul(row[j], weight));
        sum[j] = exists ? next : sum[j];
      }
    }
  }
}

// Adds the sums of a long run's pieces, or of their groups.
template <typename AddRow>
__device__ __forceinline__ void for_each_piece_sum(const GradientArguments& arguments,
                                                   uint32_t begin, uint32_t end, AddRow add_row) {
  const uint32_t length = arguments.piece_length;
  const uint32_t pieces = (end - begin - 1) / length + 1;
  const uint32_t stride = pieces > kPiecesPerGroup ? kPiecesPerGroup : 1;
#pragma unroll 2
  for (uint32_t piece = 0; piece < pieces; piece += stride) {
    add_row(arguments.piece_sums +
            static_cast<int64_t>(piece_sum_row(begin, piece, length)) * arguments.gradient.dim);
  }
}

// sum becomes that of entries [begin, end), added from left to right: of a stretch of the row of
// each group of lanes. For all lanes of the warp; `limit` is behind the last entry it will ask for.
template <int kInFlight>
__device__ __forceinline__ void sum_entries(const TableGradient& g, const RowLane& lane,
                                            int stretch, uint32_t begin, uint32_t end,
                                            uint32_t limit, EntryWindow& window, WindowPlace& place,
                                            Chunk& sum) {
  clear(sum);
#pragma unroll 1
  while (true) {
    if (begin < end && place.holds(begin)) {
      const uint32_t from = begin - place.begin, to = min(end, place.end) - place.begin;
      if (g.source_dtype == DType::kBFloat16) {
        add_entries<kInFlight, __nv_bfloat16>(g, lane, stretch, window, from, to, sum);
      } else if (g.source_dtype == DType::kFloat16) {
        add_entries<kInFlight, __half>(g, lane, stretch, window, from, to, sum);
      } else {
        add_entries<(kInFlight + 1) / 2, float>(g, lane, stretch, window, from, to, sum);
      }
      begin = place.begin + to;
    }
    const uint32_t next = __reduce_min_sync(kFullMask, begin < end ? begin : limit);
    if (next == limit) break;
    place.load(g, next, limit, window);
  }
}

// The gradient of a stretch of a run's row; for all lanes of the warp, with vectors.
__device__ __forceinline__ void row_gradient(const GradientArguments& arguments,
                                             const RowLane& lane, int stretch, const Run& run,
                                             uint32_t limit, EntryWindow& window,
                                             WindowPlace& place, Chunk& sum) {
  const TableGradient& g = arguments.gradient;
  const int column = lane.column_in_row(stretch);
  if (g.keys == nullptr) {
    value_ffn::load_elements<kLaneColumns>(g.source, g.source_dtype, lane.offset(run.row) + column,
                                           sum);
    return;
  }
  const bool in_pieces = run.end - run.begin > arguments.piece_length;
  const bool in_entries = run.exists && !in_pieces;
  sum_entries<4>(g, lane, stretch, run.begin, in_entries ? run.end : run.begin, limit, window,
                 place, sum);
  if (!in_pieces || !run.exists) return;
  for_each_piece_sum(arguments, run.begin, run.end, [&](const float* from) {
    PackedChunk<float> packed;
    packed.load(from, column);
    Chunk piece;
    packed.get(piece);
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) sum[j] = add(sum[j], piece[j]);
  });
}

// Any shape: one column, by one thread ------------------------------------------------------------

// The sum of entries [begin, end), added from left to right.
__device__ __forceinline__ float sum_column(const TableGradient& g, int column, uint32_t begin,
                                            uint32_t end) {
  const int core = g.num_cores == 1 ? 0 : column / (static_cast<int>(g.dim) / g.num_cores);
  float sum = 0;
#pragma unroll 1
  for (uint32_t position = begin; position < end; ++position) {
    const uint32_t entry = g.entries[position];
    int64_t row = entry / static_cast<uint32_t>(g.num_selected);
    if (g.num_groups > 1) {
      row = row * g.num_groups + min(int64_t{g.groups[entry]}, g.num_groups - 1);
    }
    const uint32_t bits = load_bits(g.source, g.source_dtype, row * g.dim + column);
    const float weight = static_cast<const float*>(g.weights)[int64_t{entry} * g.num_cores + core];
    sum = add(sum, mul(bits_to_float(bits, g.source_dtype), weight));
  }
  return sum;
}

__device__ __forceinline__ float column_gradient(const GradientArguments& arguments, const Run& run,
                                                 int64_t column) {
  const TableGradient& g = arguments.gradient;
  if (g.keys == nullptr) {
    const uint32_t bits = load_bits(g.source, g.source_dtype, int64_t{run.row} * g.dim + column);
    return bits_to_float(bits, g.source_dtype);
  }
  if (run.end - run.begin <= arguments.piece_length) {
    return sum_column(g, column, run.begin, run.end);
  }
  float sum = 0;
  for_each_piece_sum(arguments, run.begin, run.end,
                     [&](const float* from) { sum = add(sum, from[column]); });
  return sum;
}

}  // namespace ultramem::cuda::table_kernels
