// The gradient of a row of a table, in registers: what the norm and the optimizers read instead of
// a gradient table.
//
// A warp sums a run, 8 neighbouring columns a lane. It looks up 32 entries at once, a lane each,
// and keeps them for the runs that follow; their source rows then come several at a time. Long runs
// are summed before, in pieces (table_gradient.cu), and only their sums are added up here.
#pragma once

#include "common.cuh"
#include "common/row_runs.h"
#include "common/table_update_math.h"
#include "ultramem/table_update.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda::table_kernels {

using value_ffn::Pack;

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / kWarpSize;
// Columns of a row that a warp holds at once.
inline constexpr int kTileColumns = kRowLanes * kLaneColumns;
static_assert(kRowLanes == kWarpSize, "a lane of a row is a lane of a warp");

struct GradientArguments {
  TableGradient gradient;
  const float* piece_sums;  // [num_piece_sums(n), dim]
  uint32_t piece_length;
  bool vectors;  // 8 columns lie in one core's slice and may be moved in words of 16 bytes
};

// Makes room for, and computes, the sums of the pieces of long runs.
size_t piece_sums_bytes(const TableGradient& gradient);
Status launch_piece_sums(const GradientArguments& arguments, float* piece_sums,
                         cudaStream_t stream);

// Whether the source of a gradient allows vectors.
inline bool source_is_vectors(const TableGradient& gradient) {
  return gradient.dim / gradient.num_cores % kLaneColumns == 0 && is_aligned(gradient.source);
}

// 32 neighbours among the sorted entries, one a lane.
struct EntryWindow {
  uint32_t begin = 0xffffff00u;  // holds none
  uint32_t entry;
  int64_t row;  // of the source

  __device__ __forceinline__ void load(const TableGradient& g, uint32_t position) {
    begin = position;
    const uint32_t last = static_cast<uint32_t>(g.num_entries) - 1;
    entry = g.entries[min(position + threadIdx.x % kWarpSize, last)];
    row = entry / static_cast<uint32_t>(g.num_selected);
    if (g.num_groups > 1) {
      row = row * g.num_groups + min(static_cast<int64_t>(g.groups[entry]), g.num_groups - 1);
    }
  }
};

// What a lane holds of a row: columns first + tile * kTileColumns + lane * 8 and the 7 that follow.
template <int kTiles>
struct RowColumns {
  int first;
  int dim;

  __device__ __forceinline__ int column(int tile) const {
    return first + tile * kTileColumns + static_cast<int>(threadIdx.x % kWarpSize) * kLaneColumns;
  }
};

template <int kTiles>
using RowSum = float[kTiles][kLaneColumns];

// Adds entries [begin, end) from left to right.
template <int kTiles, typename SourceT>
__device__ __forceinline__ void add_entries(const TableGradient& g,
                                            const RowColumns<kTiles>& columns, uint32_t begin,
                                            uint32_t end, EntryWindow* window,
                                            RowSum<kTiles>& sum) {
  // Rows whose loads are in the air at once.
  constexpr int kRows = kTiles > 1 ? 1 : sizeof(SourceT) == 4 ? 2 : 4;
  const auto* source = static_cast<const SourceT*>(g.source);
  const auto* weights = static_cast<const float*>(g.weights);
  const int slice = columns.dim / g.num_cores;
  int core[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) core[t] = g.num_cores == 1 ? 0 : columns.column(t) / slice;

  for (uint32_t position = begin; position < end;) {
    if (position - window->begin >= kWarpSize) window->load(g, position);
    const uint32_t stop = min(end, window->begin + kWarpSize);
    for (; position < stop; position += kRows) {
      Pack<SourceT, kLaneColumns> rows[kRows][kTiles];
      float weight[kRows][kTiles];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        // Shuffles are for all lanes; those beyond the last entry repeat it and are not used.
        const int from = static_cast<int>(min(position + k, stop - 1) - window->begin);
        const int64_t row = __shfl_sync(kFullMask, window->row, from);
        const int64_t entry = __shfl_sync(kFullMask, window->entry, from);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int column = columns.column(t);
          rows[k][t].clear();
          weight[k][t] = 0;
          if (position + k < stop && column < columns.dim) {
            rows[k][t].load(source + row * columns.dim + column);
            weight[k][t] = weights[entry * g.num_cores + core[t]];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (position + k >= stop) break;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int j = 0; j < kLaneColumns; ++j) {
            sum[t][j] = add(sum[t][j], mul(rows[k][t][j], weight[k][t]));
          }
        }
      }
    }
    position = stop;
  }
}

// The same an element at a time.
template <int kTiles>
__device__ __forceinline__ void add_entries_by_element(const TableGradient& g,
                                                       const RowColumns<kTiles>& columns,
                                                       uint32_t begin, uint32_t end,
                                                       EntryWindow* window, RowSum<kTiles>& sum) {
  const auto* weights = static_cast<const float*>(g.weights);
  const int slice = columns.dim / g.num_cores;
  for (uint32_t position = begin; position < end; ++position) {
    if (position - window->begin >= kWarpSize) window->load(g, position);
    const int from = static_cast<int>(position - window->begin);
    const int64_t row = __shfl_sync(kFullMask, window->row, from);
    const int64_t entry = __shfl_sync(kFullMask, window->entry, from);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const int column = columns.column(t) + j;
        if (column >= columns.dim) break;
        const uint32_t bits = load_bits(g.source, g.source_dtype, row * columns.dim + column);
        const float weight = weights[entry * g.num_cores + column / slice];
        sum[t][j] = add(sum[t][j], mul(bits_to_float(bits, g.source_dtype), weight));
      }
    }
  }
}

// sum becomes that of entries [begin, end), added from left to right.
template <int kTiles>
__device__ __forceinline__ void sum_entries(const GradientArguments& arguments,
                                            const RowColumns<kTiles>& columns, uint32_t begin,
                                            uint32_t end, EntryWindow* window,
                                            RowSum<kTiles>& sum) {
  const TableGradient& g = arguments.gradient;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) sum[t][j] = 0;
  }
  if (!arguments.vectors) {
    add_entries_by_element<kTiles>(g, columns, begin, end, window, sum);
  } else if (g.source_dtype == DType::kBFloat16) {
    add_entries<kTiles, __nv_bfloat16>(g, columns, begin, end, window, sum);
  } else if (g.source_dtype == DType::kFloat16) {
    add_entries<kTiles, __half>(g, columns, begin, end, window, sum);
  } else {
    add_entries<kTiles, float>(g, columns, begin, end, window, sum);
  }
}

// Adds the sums of a long run's pieces, or of their groups.
template <int kTiles>
__device__ __forceinline__ void sum_pieces(const GradientArguments& arguments,
                                           const RowColumns<kTiles>& columns, uint32_t begin,
                                           uint32_t end, RowSum<kTiles>& sum) {
  const uint32_t length = arguments.piece_length;
  const uint32_t pieces = (end - begin - 1) / length + 1;
  const uint32_t stride = pieces > kPiecesPerGroup ? kPiecesPerGroup : 1;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) sum[t][j] = 0;
  }
  for (uint32_t piece = 0; piece < pieces; piece += stride) {
    const float* from = arguments.piece_sums +
                        static_cast<int64_t>(piece_sum_row(begin, piece, length)) * columns.dim;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int column = columns.column(t);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        if (column + j < columns.dim) sum[t][j] = add(sum[t][j], from[column + j]);
      }
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void load_dense(const GradientArguments& arguments,
                                           const RowColumns<kTiles>& columns, int64_t row,
                                           RowSum<kTiles>& sum) {
  const TableGradient& g = arguments.gradient;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int column = columns.column(t);
    const int64_t index = row * columns.dim + column;
    if (arguments.vectors && column < columns.dim) {
      if (g.source_dtype == DType::kFloat32) {
        Pack<float, kLaneColumns> pack;
        pack.load(static_cast<const float*>(g.source) + index);
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) sum[t][j] = pack[j];
      } else {
        Pack<__half, kLaneColumns> pack;
        pack.load(static_cast<const __half*>(g.source) + index);
        const auto* bits = reinterpret_cast<const uint16_t*>(pack.words);
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) sum[t][j] = bits_to_float(bits[j], g.source_dtype);
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      sum[t][j] =
          column + j < columns.dim
              ? bits_to_float(load_bits(g.source, g.source_dtype, index + j), g.source_dtype)
              : 0.0f;
    }
  }
}

// A warp's share of the runs: the runs [first, first + count), a lane each.
struct RunBatch {
  int count;
  uint32_t row, begin, end;  // of this lane's run

  __device__ __forceinline__ RunBatch(const TableGradient& g, int64_t first, int64_t batch) {
    const int64_t runs = g.keys == nullptr ? g.num_rows : g.counts[0];
    count = static_cast<int>(max(min(batch, runs - first), int64_t{0}));
    const int lane = threadIdx.x % kWarpSize;
    row = begin = end = 0;
    if (lane >= count) return;
    row = static_cast<uint32_t>(first + lane);
    if (g.keys == nullptr) return;
    begin = g.run_begins[first + lane];
    end = g.run_begins[first + lane + 1];
    row = g.keys[begin];
  }
};

// The gradient of one row's columns; begin and end are those of its run.
template <int kTiles>
__device__ __forceinline__ void row_gradient(const GradientArguments& arguments,
                                             const RowColumns<kTiles>& columns, uint32_t row,
                                             uint32_t begin, uint32_t end, EntryWindow* window,
                                             RowSum<kTiles>& sum) {
  if (arguments.gradient.keys == nullptr) {
    load_dense<kTiles>(arguments, columns, row, sum);
  } else if (end - begin <= arguments.piece_length) {
    sum_entries<kTiles>(arguments, columns, begin, end, window, sum);
  } else {
    sum_pieces<kTiles>(arguments, columns, begin, end, sum);
  }
}

// Runs, at most, and how many of them a warp takes. Few, for neighbours may all be long; but what a
// warp looks up first should serve several.
inline int64_t max_runs(const TableGradient& g) {
  return g.keys == nullptr || g.num_rows < g.num_entries ? g.num_rows : g.num_entries;
}
inline int64_t runs_per_warp(int64_t num_runs) {
  constexpr int64_t kEnoughWarps = 16384, kMaxBatch = 8;
  const int64_t batch = num_runs / kEnoughWarps;
  return batch < 1 ? 1 : batch > kMaxBatch ? kMaxBatch : batch;
}

inline GradientArguments gradient_arguments(const TableGradient& gradient, float* piece_sums,
                                            bool vectors) {
  return {gradient, piece_sums, piece_length(gradient.num_entries),
          vectors && source_is_vectors(gradient)};
}

}  // namespace ultramem::cuda::table_kernels
