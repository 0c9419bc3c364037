// Backward of the value FFN, without atomics: the same bits on every run.
//
// By token (value_ffn_bwd_tokens): dw_c = <G[slice c], V[slot, slice c]>, gradients of the scores,
// da, and dpre_input = sum_s da_s P[slot_s].
//
// Gradients of the tables: value_ffn_bwd_rows.cu.
#include "kernel_registry.h"
#include "side_stream.h"
#include "value_ffn_bwd_rows.h"
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

// Host ------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_VALUE_FFN_BWD_TOKENS(id, name, TableT, InputT)                          \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_##id, "value_ffn_bwd_tokens<" name ">", kThreads, \
                           value_ffn_bwd_tokens_kernel<TableT, InputT>)
ULTRAMEM_FOR_EACH_DTYPE_PAIR(ULTRAMEM_REGISTER_VALUE_FFN_BWD_TOKENS);

// Where things lie in the workspace, in bytes from its beginning; what is not needed is empty.
struct Workspace {
  bool needs_grad_a, needs_rows;
  size_t grad_a = 0, rows, total;

  explicit Workspace(const ValueFfnBwdParams& params) {
    const int64_t num_entries = params.num_tokens * params.num_selected;
    needs_grad_a = params.pre_value_dim > 0 &&
                   (params.grad_pre_input != nullptr || params.grad_pre_values != nullptr);
    needs_rows =
        num_entries > 0 && (params.grad_values != nullptr || params.grad_pre_values != nullptr);
    rows = needs_grad_a ? align_up(num_entries * sizeof(float)) : 0;
    total = rows + (needs_rows ? value_ffn_bwd_rows_workspace(params) : 0);
  }
};

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
      (params.grad_pre_input != nullptr || params.grad_pre_values != nullptr)) {
    return Status::invalid_argument(
        "value_ffn_bwd: grad_pre_input and grad_pre_values need pre_values");
  }
  const Workspace workspace(params);
  if (workspace.needs_rows && (params.num_tokens * params.num_selected >= int64_t{1} << 32 ||
                               params.addressing.num_slots >= UINT32_MAX)) {
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

}  // namespace

size_t value_ffn_bwd_workspace(const ValueFfnBwdParams& params) { return Workspace(params).total; }

Status value_ffn_bwd(const ValueFfnBwdParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_bwd_params(params));
  if (params.num_tokens == 0) return {};
  const Workspace workspace(params);
  auto* base = static_cast<char*>(params.workspace);
  float* grad_a =
      workspace.needs_grad_a ? reinterpret_cast<float*>(base + workspace.grad_a) : nullptr;
  // An empty grad_scores (S = 0) is a null pointer; grad_pre_input is then still to be zeroed.
  const bool needs_tokens =
      params.grad_scores != nullptr || grad_a != nullptr || params.grad_pre_input != nullptr;
  if (!workspace.needs_rows) return needs_tokens ? launch_tokens(params, grad_a, stream) : Status{};

  // Sorting waits for latency, the other for memory.
  SideStream side(stream);
  ULTRAMEM_RETURN_IF_ERROR(side.fork());
  Status status = value_ffn_bwd_sort(params, base + workspace.rows, side.get());
  if (status.ok() && needs_tokens) status = launch_tokens(params, grad_a, stream);
  const Status joined = side.join();
  ULTRAMEM_RETURN_IF_ERROR(status);
  ULTRAMEM_RETURN_IF_ERROR(joined);
  return value_ffn_bwd_rows(params, grad_a, base + workspace.rows, stream);
}

}  // namespace ultramem::cuda
