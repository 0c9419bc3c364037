// Backward of the value FFN, without atomics: the same bits on every run.
//
// By token (value_ffn_bwd_tokens): dw_c = <G[slice c], V[slot, slice c]>, gradients of the scores,
// da, and dpre_input = sum_s da_s P[slot_s].
//
// By row (value_ffn_bwd_rows): entries e = t * S + s are sorted by slot, so that the terms of a row
// of dV or dP lie side by side, in token order: a run. A warp sums a run. Where it crosses one of
// the fixed positions that cut the sorted entries into pieces, its parts are summed by a warp each,
// into the workspace, and value_ffn_bwd_combine adds them in order. So a row that every token
// retrieves is no slower than many rows.
#include "kernel_registry.h"
#include "sort_pairs.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

// Per token -------------------------------------------------------------------------------------

// weights[c][i] = <grad_out[group_i, slice c], table[slot_i, slice c]>, kRowsInFlight slots a warp.
template <int kCount, typename TableT, typename InputT>
__device__ void dot_slices(const TableT* table, const InputT* grad_out, int dim, int num_cores,
                           bool sum_groups, const SlotChunk& chunk, int count) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int slice = dim / num_cores;
  for (int begin = warp * kRowsInFlight; begin < count; begin += kWarps * kRowsInFlight) {
    int64_t slots[kRowsInFlight];
    const InputT* grads[kRowsInFlight];
    float acc[kRowsInFlight][kMaxNumCores] = {};
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const int i = begin + k;
      slots[k] = i < count ? chunk.slots[i] : -1;
      grads[k] = grad_out + (i < count && !sum_groups ? int64_t{chunk.groups[i]} * dim : 0);
    }
    for (int column = lane * kCount; column < dim; column += kWarpSize * kCount) {
      const int core = column / slice;
      Pack<TableT, kCount> rows[kRowsInFlight];
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        rows[k].clear();
        if (slots[k] >= 0) rows[k].load(table + slots[k] * dim + column);
      }
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        Pack<InputT, kCount> grad;
        grad.load(grads[k] + column);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum = fmaf(grad[j], rows[k][j], sum);
#pragma unroll
        for (int c = 0; c < kMaxNumCores; ++c) acc[k][c] += c == core ? sum : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
#pragma unroll
      for (int c = 0; c < kMaxNumCores; ++c) {
        if (c >= num_cores) break;
        const float sum = warp_sum(acc[k][c]);
        if (lane == 0 && begin + k < count) chunk.weights[c * chunk.capacity + begin + k] = sum;
      }
    }
  }
}

// What the kernel has beside the operator's parameters.
struct TokenArguments {
  float* grad_a;  // [T, S]: da; null where nobody asks for it
  int capacity;
  bool vector_values, vector_pre_values;
};

// From dw, in the chunk's weights, to the gradients of the scores and da.
__device__ __forceinline__ void differentiate_scores(const ValueFfnBwdParams& params,
                                                     const TokenArguments& arguments,
                                                     const SlotChunk& chunk, int64_t entry,
                                                     int count) {
  const int num_cores = params.num_cores;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const bool in_range = chunk.slots[i] >= 0;
    const auto* scores = static_cast<const float*>(params.scores) + (entry + i) * num_cores;
    float h = 1, slope = 0, sum = 0;
    if (params.pre_values != nullptr) {
      const float a = static_cast<const float*>(params.pre_activation)[entry + i];
      h = activate(params.activation, a);
      slope = activation_slope(params.activation, a);
    }
    for (int c = 0; c < num_cores; ++c) {
      const float grad_weight = chunk.weights[c * chunk.capacity + i];
      if (params.grad_scores != nullptr) {
        static_cast<float*>(params.grad_scores)[(entry + i) * num_cores + c] =
            in_range ? h * grad_weight : 0.0f;
      }
      sum = fmaf(scores[c], grad_weight, sum);
    }
    if (arguments.grad_a != nullptr) arguments.grad_a[entry + i] = in_range ? slope * sum : 0.0f;
  }
}

template <typename TableT, typename InputT>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    value_ffn_bwd_tokens_kernel(const __grid_constant__ ValueFfnBwdParams params,
                                const __grid_constant__ TokenArguments arguments) {
  constexpr int kCount = kVector<TableT>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[kThreads * kCount];
  const SlotChunk chunk(shared, arguments.capacity, params.num_cores);
  const int64_t token = blockIdx.x;
  const int num_selected = static_cast<int>(params.num_selected);
  const int64_t entry = token * num_selected;

  const int num_groups = params.sum_groups ? 1 : static_cast<int>(params.addressing.expand);
  const int value_dim = static_cast<int>(params.value_dim);
  const auto* values = static_cast<const TableT*>(params.values);
  const auto* grad_out =
      static_cast<const InputT*>(params.grad_out) + token * num_groups * value_dim;
  for (int first = 0; first < num_selected; first += arguments.capacity) {
    const int count = min(num_selected - first, arguments.capacity);
    __syncthreads();  // the previous chunk has been read
    resolve_chunk(params, entry + first, chunk, count);
    __syncthreads();
    if (arguments.vector_values) {
      dot_slices<kCount>(values, grad_out, value_dim, params.num_cores, params.sum_groups, chunk,
                         count);
    } else {
      dot_slices<1>(values, grad_out, value_dim, params.num_cores, params.sum_groups, chunk, count);
    }
    __syncthreads();
    differentiate_scores(params, arguments, chunk, entry + first, count);
  }

  if (params.grad_pre_input == nullptr) return;
  const auto load_chunk = [&](int first, int count) {
    // A single chunk is still there from above.
    if (num_selected > arguments.capacity) resolve_chunk(params, entry + first, chunk, count);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      chunk.weights[i] = arguments.grad_a[entry + first + i];
    }
  };
  const int dim = static_cast<int>(params.pre_value_dim);
  const auto* pre_values = static_cast<const TableT*>(params.pre_values);
  InputT* grad_pre_input = static_cast<InputT*>(params.grad_pre_input) + token * dim;
  if (arguments.vector_pre_values) {
    sum_rows<kCount>(pre_values, dim, /*slice=*/dim, grad_pre_input, /*num_groups=*/1, num_selected,
                     chunk, partial, load_chunk);
  } else {
    sum_rows<1>(pre_values, dim, /*slice=*/dim, grad_pre_input, /*num_groups=*/1, num_selected,
                chunk, partial, load_chunk);
  }
}

// Per row ---------------------------------------------------------------------------------------

// Columns that a lane of a row kernel owns, and a warp.
constexpr int kRowVector = 8;
// Entries in a piece, at least; more where there would be more than kMaxPieces.
constexpr int64_t kMinPiece = 256;
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

// The gradient of one table: row[slot] = sum of weight[e, core] * source[token_e, group_e], with
// weight = act(pre_activation) * factors, or the factors alone without a pre_activation.
struct RowArguments {
  const uint32_t* keys;     // [T * S], sorted
  const uint32_t* entries;  // [T * S], in the order of the keys
  const float* factors;     // [T, S, C]
  const float* pre_activation;
  const void* source;  // [T, num_groups, dim]
  void* grad;          // [N, dim]
  float* partial;      // [pieces, 2, dim]: of the run a piece begins with, of the run it ends with
  int64_t num_entries, piece;
  int num_cores, num_groups, dim;
  bool accumulate;
};

// The sum of kCount columns of a row goes to its gradient, rounded once.
template <int kCount, typename GradT>
__device__ __forceinline__ void store_row(GradT* grad, const float (&sum)[kCount],
                                          bool accumulate) {
  Pack<GradT, kCount> packed;
  packed.clear();
  if (accumulate) packed.load_mutable(grad);
#pragma unroll
  for (int j = 0; j < kCount; ++j) packed.set(j, accumulate ? packed[j] + sum[j] : sum[j]);
  packed.store(grad);
}

// A warp a position of the sorted entries; those at which neither a run nor a piece begins have
// nothing to do.
template <int kCount, typename InputT, typename GradT>
__device__ void sum_run(const ValueFfnParams& params, const RowArguments& arguments,
                        int64_t position) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t key = arguments.keys[position];
  const bool run_begins = position == 0 || arguments.keys[position - 1] != key;
  const bool piece_begins = position % arguments.piece == 0;
  if (key == params.addressing.num_slots || !(run_begins || piece_begins)) return;

  const int64_t piece = position / arguments.piece;
  const int64_t piece_end = min((piece + 1) * arguments.piece, arguments.num_entries);
  const uint32_t num_selected = static_cast<uint32_t>(params.num_selected);
  const int dim = arguments.dim;
  const int slice = dim / arguments.num_cores;
  const auto* source = static_cast<const InputT*>(arguments.source);

  for (int64_t tile = int64_t{blockIdx.y} * kWarpSize * kCount; tile < dim;
       tile += int64_t{gridDim.y} * kWarpSize * kCount) {
    const int column = static_cast<int>(tile) + lane * kCount;
    const bool in_row = column < dim;
    const int core = in_row ? column / slice : 0;
    float acc[kCount] = {};
    int64_t end = position;
    for (bool more = true; more;) {
      // Each lane looks up an entry; then the warp takes them one after the other.
      const bool mine = end + lane < piece_end && arguments.keys[end + lane] == key;
      uint32_t entry = 0;
      int64_t source_row = 0;
      float h = 0;
      if (mine) {
        entry = arguments.entries[end + lane];
        source_row = entry / num_selected;
        if (arguments.num_groups > 1) {
          const int64_t group = resolve_slot(params.addressing, load_index(params, entry)).group;
          source_row = source_row * arguments.num_groups + group;
        }
        h = arguments.pre_activation != nullptr
                ? activate(params.activation, arguments.pre_activation[entry])
                : 1.0f;
      }
      // Sorted, so the entries of the run are the first lanes'.
      const int count = __popc(__ballot_sync(kFullMask, mine));
      for (int begin = 0; begin < count; begin += kRowsInFlight) {
        Pack<InputT, kCount> rows[kRowsInFlight];
        float weight[kRowsInFlight];
#pragma unroll
        for (int k = 0; k < kRowsInFlight; ++k) {
          // Shuffles are for all lanes; those beyond the last entry repeat it and are not used.
          const int from = min(begin + k, count - 1);
          const int64_t row = __shfl_sync(kFullMask, source_row, from);
          const int64_t from_entry = __shfl_sync(kFullMask, entry, from);
          const float from_h = __shfl_sync(kFullMask, h, from);
          weight[k] = 0;
          rows[k].clear();
          if (in_row && begin + k < count) {
            weight[k] = from_h * arguments.factors[from_entry * arguments.num_cores + core];
            rows[k].load(source + row * dim + column);
          }
        }
#pragma unroll
        for (int k = 0; k < kRowsInFlight; ++k) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) acc[j] = fmaf(weight[k], rows[k][j], acc[j]);
        }
      }
      end += count;
      more = count == kWarpSize;
    }
    if (!in_row) continue;
    const bool run_ends = end == arguments.num_entries || arguments.keys[end] != key;
    if (run_begins && run_ends) {
      GradT* grad = static_cast<GradT*>(arguments.grad) + int64_t{key} * dim + column;
      store_row<kCount>(grad, acc, arguments.accumulate);
    } else {
      float* partial = arguments.partial + (2 * piece + (run_begins ? 1 : 0)) * dim + column;
#pragma unroll
      for (int j = 0; j < kCount; ++j) partial[j] = acc[j];
    }
  }
}

template <typename InputT, typename GradT>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    value_ffn_bwd_rows_kernel(const __grid_constant__ ValueFfnParams params,
                              const __grid_constant__ RowArguments arguments, bool vectors) {
  const int64_t position = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (position >= arguments.num_entries) return;
  if (vectors) {
    sum_run<kRowVector, InputT, GradT>(params, arguments, position);
  } else {
    sum_run<1, InputT, GradT>(params, arguments, position);
  }
}

// Adds up a run that goes beyond the piece it begins in: a block for each piece, a thread a column.
template <typename GradT>
__global__ void __launch_bounds__(kThreads)
    value_ffn_bwd_combine_kernel(const __grid_constant__ RowArguments arguments,
                                 int64_t num_slots) {
  const uint32_t* keys = arguments.keys;
  const int64_t piece = blockIdx.x;
  const int64_t begin = piece * arguments.piece;
  const int64_t end = begin + arguments.piece;
  if (end >= arguments.num_entries) return;
  const uint32_t key = keys[end - 1];
  const bool goes_on = key != num_slots && keys[end] == key;
  const bool begins_here = keys[begin] != key || begin == 0 || keys[begin - 1] != key;
  if (!goes_on || !begins_here) return;

  // The last piece that begins with the run, by bisection.
  int64_t last = piece + 1;
  int64_t beyond = ceil_div(arguments.num_entries, arguments.piece);
  while (beyond - last > 1) {
    const int64_t middle = (last + beyond) / 2;
    (keys[middle * arguments.piece] == key ? last : beyond) = middle;
  }
  const int64_t dim = arguments.dim;
  for (int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x; column < dim;
       column += int64_t{gridDim.y} * kThreads) {
    float sum[1] = {arguments.partial[(2 * piece + 1) * dim + column]};
#pragma unroll 8
    for (int64_t i = piece + 1; i <= last; ++i) sum[0] += arguments.partial[2 * i * dim + column];
    store_row<1>(static_cast<GradT*>(arguments.grad) + int64_t{key} * dim + column, sum,
                 arguments.accumulate);
  }
}

// Host ------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_VALUE_FFN_BWD_TOKENS(id, name, TableT, InputT)                          \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_##id, "value_ffn_bwd_tokens<" name ">", kThreads, \
                           value_ffn_bwd_tokens_kernel<TableT, InputT>)
#define ULTRAMEM_REGISTER_VALUE_FFN_BWD_ROWS(id, name, InputT, GradT)                         \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_rows_##id, "value_ffn_bwd_rows<" name ">", kThreads, \
                           value_ffn_bwd_rows_kernel<InputT, GradT>)
ULTRAMEM_FOR_EACH_DTYPE_PAIR(ULTRAMEM_REGISTER_VALUE_FFN_BWD_TOKENS);
ULTRAMEM_FOR_EACH_DTYPE_PAIR(ULTRAMEM_REGISTER_VALUE_FFN_BWD_ROWS);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_keys, "value_ffn_bwd_keys", kThreads,
                         value_ffn_bwd_keys_kernel);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_combine_f32, "value_ffn_bwd_combine<f32>", kThreads,
                         value_ffn_bwd_combine_kernel<float>);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_combine_bf16, "value_ffn_bwd_combine<bf16>", kThreads,
                         value_ffn_bwd_combine_kernel<__nv_bfloat16>);
ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_combine_f16, "value_ffn_bwd_combine<f16>", kThreads,
                         value_ffn_bwd_combine_kernel<__half>);

// Where things lie in the workspace, in bytes from its beginning; what is not needed is empty.
struct Workspace {
  bool needs_grad_a, needs_rows;
  int64_t num_entries, piece, num_pieces;
  int num_bits;
  size_t grad_a, keys_in, keys, entries_in, entries, partial, sort, sort_bytes, total = 0;

  explicit Workspace(const ValueFfnBwdParams& params) {
    num_entries = params.num_tokens * params.num_selected;
    needs_grad_a = params.grad_a == nullptr && params.pre_value_dim > 0 &&
                   (params.grad_pre_input != nullptr || params.grad_pre_values != nullptr);
    needs_rows =
        num_entries > 0 && (params.grad_values != nullptr || params.grad_pre_values != nullptr);
    piece = ceil_div(num_entries, kMaxPieces);
    if (piece < kMinPiece) piece = kMinPiece;
    num_pieces = ceil_div(num_entries, piece);
    num_bits = key_bits(static_cast<uint64_t>(params.addressing.num_slots));

    const int64_t words = needs_rows ? num_entries : 0;
    const int64_t dim =
        params.value_dim > params.pre_value_dim ? params.value_dim : params.pre_value_dim;
    grad_a = take(needs_grad_a ? num_entries * sizeof(float) : 0);
    keys_in = take(words * sizeof(uint32_t));
    keys = take(words * sizeof(uint32_t));
    entries_in = take(words * sizeof(uint32_t));
    entries = take(words * sizeof(uint32_t));
    partial = take(needs_rows ? 2 * num_pieces * dim * sizeof(float) : 0);
    sort_bytes = needs_rows ? sort_pairs_workspace(num_entries, num_bits) : 0;
    sort = take(sort_bytes);
  }

 private:
  size_t take(size_t bytes) {
    const size_t offset = total;
    total += align_up(bytes);
    return offset;
  }
};

template <typename T>
T* at(void* workspace, size_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + offset);
}

Status check_bwd_params(const ValueFfnBwdParams& params) {
  ULTRAMEM_RETURN_IF_ERROR(check_params(params));
  if (params.grad_table_dtype == DType::kFloat64) {
    return Status::invalid_argument("value_ffn_bwd: float64 is offered on the CPU only");
  }
  if (params.num_tokens == 0) return {};
  if (params.grad_out == nullptr) {
    return Status::invalid_argument("value_ffn_bwd: grad_out must not be null");
  }
  if (params.pre_values == nullptr &&
      (params.grad_pre_input != nullptr || params.grad_pre_values != nullptr ||
       params.grad_a != nullptr)) {
    return Status::invalid_argument(
        "value_ffn_bwd: grad_pre_input, grad_pre_values and grad_a need pre_values");
  }
  const Workspace workspace(params);
  if (workspace.needs_rows &&
      (workspace.num_entries >= int64_t{1} << 32 || params.addressing.num_slots >= UINT32_MAX)) {
    return Status::invalid_argument(
        "value_ffn_bwd: CUDA offers gradients of the tables for fewer than 2^32 retrieved slots "
        "and fewer than 2^32-1 rows");
  }
  if (workspace.total > 0 && params.workspace == nullptr) {
    return Status::invalid_argument("value_ffn_bwd: the workspace must not be null");
  }
  return {};
}

Status launch_tokens(const ValueFfnBwdParams& params, float* grad_a, cudaStream_t stream) {
  TokenArguments arguments;
  arguments.grad_a = grad_a;
  arguments.capacity = chunk_capacity(params.num_selected);
  arguments.vector_values = values_are_vectors(params, params.grad_out);
  arguments.vector_pre_values = pre_values_are_vectors(params, params.grad_pre_input);
  const size_t shared_bytes = SlotChunk::bytes(arguments.capacity, params.num_cores);
  return ULTRAMEM_DISPATCH_DTYPE(params.table_dtype, TableT, [&] {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, InputT, [&] {
      value_ffn_bwd_tokens_kernel<TableT, InputT>
          <<<static_cast<unsigned>(params.num_tokens), kThreads, shared_bytes, stream>>>(params,
                                                                                         arguments);
      return launch_status();
    });
  });
}

Status sort_entries(const ValueFfnBwdParams& params, const Workspace& workspace,
                    cudaStream_t stream) {
  uint32_t* keys_in = at<uint32_t>(params.workspace, workspace.keys_in);
  uint32_t* entries_in = at<uint32_t>(params.workspace, workspace.entries_in);
  const auto blocks = static_cast<unsigned>(ceil_div(workspace.num_entries, kThreads));
  value_ffn_bwd_keys_kernel<<<blocks, kThreads, 0, stream>>>(params, keys_in, entries_in);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  return sort_pairs(keys_in, at<uint32_t>(params.workspace, workspace.keys), entries_in,
                    at<uint32_t>(params.workspace, workspace.entries), workspace.num_entries,
                    workspace.num_bits, at<void>(params.workspace, workspace.sort),
                    workspace.sort_bytes, stream);
}

Status launch_rows(const ValueFfnBwdParams& params, const Workspace& workspace,
                   RowArguments arguments, cudaStream_t stream) {
  arguments.keys = at<const uint32_t>(params.workspace, workspace.keys);
  arguments.entries = at<const uint32_t>(params.workspace, workspace.entries);
  arguments.partial = at<float>(params.workspace, workspace.partial);
  arguments.num_entries = workspace.num_entries;
  arguments.piece = workspace.piece;
  arguments.accumulate = params.accumulate;

  const bool vectors = arguments.dim / arguments.num_cores % kRowVector == 0 &&
                       is_aligned(arguments.source) && is_aligned(arguments.grad);
  constexpr int64_t kMaxGridY = 65535;
  const auto grid_y = [](int64_t tiles) {
    return static_cast<unsigned>(tiles < kMaxGridY ? tiles : kMaxGridY);
  };
  const dim3 grid(static_cast<unsigned>(ceil_div(workspace.num_entries, kWarps)),
                  grid_y(ceil_div(arguments.dim, kWarpSize * (vectors ? kRowVector : 1))));
  const dim3 combine_grid(static_cast<unsigned>(workspace.num_pieces),
                          grid_y(ceil_div(arguments.dim, kThreads)));
  return ULTRAMEM_DISPATCH_DTYPE(params.grad_table_dtype, GradT, [&] {
    ULTRAMEM_RETURN_IF_ERROR(ULTRAMEM_DISPATCH_DTYPE(params.dtype, InputT, [&] {
      value_ffn_bwd_rows_kernel<InputT, GradT>
          <<<grid, kThreads, 0, stream>>>(params, arguments, vectors);
      return launch_status();
    }));
    if (workspace.num_pieces == 1) return Status{};
    value_ffn_bwd_combine_kernel<GradT>
        <<<combine_grid, kThreads, 0, stream>>>(arguments, params.addressing.num_slots);
    return launch_status();
  });
}

}  // namespace

size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params) { return Workspace(params).total; }

Status value_ffn_bwd(const ValueFfnBwdParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_bwd_params(params));
  if (params.num_tokens == 0) return {};
  const Workspace workspace(params);
  float* grad_a = workspace.needs_grad_a ? at<float>(params.workspace, workspace.grad_a)
                                         : static_cast<float*>(params.grad_a);
  // An empty grad_scores (S = 0) is a null pointer; grad_pre_input is then still to be zeroed.
  if (params.grad_scores != nullptr || grad_a != nullptr || params.grad_pre_input != nullptr) {
    ULTRAMEM_RETURN_IF_ERROR(launch_tokens(params, grad_a, stream));
  }
  if (!workspace.needs_rows) return {};

  ULTRAMEM_RETURN_IF_ERROR(sort_entries(params, workspace, stream));
  if (params.grad_values != nullptr) {
    RowArguments arguments{};
    arguments.factors = static_cast<const float*>(params.scores);
    arguments.pre_activation =
        params.pre_values != nullptr ? static_cast<const float*>(params.pre_activation) : nullptr;
    arguments.source = params.grad_out;
    arguments.grad = params.grad_values;
    arguments.num_cores = params.num_cores;
    arguments.num_groups = params.sum_groups ? 1 : static_cast<int>(params.addressing.expand);
    arguments.dim = static_cast<int>(params.value_dim);
    ULTRAMEM_RETURN_IF_ERROR(launch_rows(params, workspace, arguments, stream));
  }
  if (params.grad_pre_values != nullptr) {
    RowArguments arguments{};
    arguments.factors = grad_a;
    arguments.source = params.pre_input;
    arguments.grad = params.grad_pre_values;
    arguments.num_cores = 1;
    arguments.num_groups = 1;
    arguments.dim = static_cast<int>(params.pre_value_dim);
    ULTRAMEM_RETURN_IF_ERROR(launch_rows(params, workspace, arguments, stream));
  }
  return {};
}

}  // namespace ultramem::cuda
