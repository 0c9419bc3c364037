// Backward of the value FFN by token: dw_c = <G[slice c], V[slot, slice c]>, the gradients of the
// scores, da, and dpre_input = sum_s da_s P[slot_s]. Rows of whole vectors: one pass over the slots
// (value_ffn_slots.cuh), the mirror image of the forward. Any other shape: a block takes a token.
#include "value_ffn_bwd_tokens.h"

#include "kernel_registry.h"
#include "value_ffn_append.cuh"
#include "value_ffn_common.cuh"
#include "value_ffn_slots.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

// Rows of whole vectors --------------------------------------------------------------------------

struct BackwardArguments {
  ValueFfnBwdParams params;
  // Where the factors go; null for what nobody asks for. Of an arena: its sections.
  float* weights;
  float* grad_a;
  uint32_t* slots;  // to an arena alone
  TableFactors arena;
  AppendedRows rows;
};

BackwardArguments backward_arguments(const ValueFfnBwdParams& params, const TokenFactors& factors) {
  const TableFactors& arena = factors.arena;
  if (arena.header == nullptr) return {params, factors.weights, factors.grad_a, nullptr, arena, {}};
  return {params,
          static_cast<float*>(arena.weights),
          static_cast<float*>(arena.grad_a),
          arena.slots,
          arena,
          appended_rows(arena, params.grad_out, params.pre_input)};
}

struct BackwardPass {
  struct alignas(16) Batch {
    uint32_t slots[kBatch];
    float scores[kMaxNumCores][kBatch];
    float h[kBatch];
    float slope[kBatch];  // act'(a)
  };
  struct Request {
    int64_t index;
    float scores[kMaxNumCores];
    float a;
  };

  const BackwardArguments& arguments;
  const ValueFfnBwdParams& params;
  const AddressDivisors<ReciprocalDivisor>& divisors;
  // Of the first token, where the factors go; -1 where an arena has no room.
  int64_t position = 0;

  __device__ __forceinline__ void begin() {
    if (arguments.arena.header != nullptr) {
      position = append_position(arguments.arena, params.num_tokens);
    }
  }

  __device__ __forceinline__ void finish(int64_t token) const {
    if (arguments.arena.header == nullptr || position < 0) return;
    append_row(arguments.rows.grad_out, token, position + token);
    append_row(arguments.rows.pre_input, token, position + token);
  }

  __device__ __forceinline__ Request request(int64_t entry, bool exists) const {
    Request request{-1, {}, 0};
    if (!exists) return request;
    request.index = load_index(params, entry);
    if (params.scores != nullptr) {
      const auto* scores = static_cast<const float*>(params.scores) + entry * params.num_cores;
#pragma unroll
      for (int c = 0; c < kMaxNumCores; ++c) {
        if (c < params.num_cores) request.scores[c] = scores[c];
      }
    }
    if (params.pre_values != nullptr) {
      request.a = static_cast<const float*>(params.pre_activation)[entry];
    }
    return request;
  }

  __device__ __forceinline__ void settle(const Request& request, Batch& batch, int i, int64_t entry,
                                         bool exists) const {
    const int64_t slot = resolve_slot(params.addressing, divisors, request.index).slot;
    batch.slots[i] = slot >= 0 ? static_cast<uint32_t>(slot) : kNoSlot;
#pragma unroll
    for (int c = 0; c < kMaxNumCores; ++c) batch.scores[c][i] = slot >= 0 ? request.scores[c] : 0;
    float h = 1, slope = 0;
    if (params.pre_values != nullptr) {
      h = activate(params.activation, request.a);
      slope = activation_slope(params.activation, request.a);
    }
    if (slot < 0) h = 0;
    batch.h[i] = h;
    batch.slope[i] = slot >= 0 ? slope : 0;
    if (!exists || position < 0) return;
    const int64_t to = position * params.num_selected + entry;
    if (arguments.weights != nullptr) {
#pragma unroll
      for (int c = 0; c < kMaxNumCores; ++c) {
        if (c < params.num_cores)
          arguments.weights[to * params.num_cores + c] = h * batch.scores[c][i];
      }
    }
    if (arguments.slots != nullptr) {
      arguments.slots[to] = batch.slots[i];
    }
  }

  template <typename Traits>
  __device__ __forceinline__ void weigh(const float (&dots)[Traits::kVectors],
                                        const int (&cores)[Traits::kVectors], const Batch& batch,
                                        int i, int64_t entry, bool exists, int rank,
                                        float (&weights)[Traits::kVectors]) const {
    const bool in_range = batch.slots[i] != kNoSlot;
    const float h = batch.h[i];
    float sum = 0;
    float grad_score = 0;
    // Two at a time, for their sums to overlap. Cores that do not exist have zeros.
#pragma unroll
    for (int first = 0; first < kMaxNumCores; first += 2) {
      if (first >= params.num_cores) break;
      float grad_weights[2] = {};
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
        for (int c = 0; c < 2; ++c) grad_weights[c] += cores[v] == first + c ? dots[v] : 0.0f;
      }
#pragma unroll
      for (float& x : grad_weights) x = team_sum<Traits::kLanes>(x);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        // A slot without a row adds zero even where grad_out is NaN.
        if (!in_range) grad_weights[c] = 0;
        sum = fmaf(batch.scores[first + c][i], grad_weights[c], sum);
        if (rank == first + c) grad_score = h * grad_weights[c];
      }
    }
    const float da = batch.slope[i] * sum;
    if (exists && rank < params.num_cores && params.grad_scores != nullptr) {
      static_cast<float*>(params.grad_scores)[entry * params.num_cores + rank] = grad_score;
    }
    if (exists && rank == 0 && arguments.grad_a != nullptr && position >= 0) {
      arguments.grad_a[position * params.num_selected + entry] = da;
    }
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) weights[v] = da;
  }
};

template <typename TableT, int kLanes, int kVectors>
__global__ void __launch_bounds__(SlotTraits<TableT, kLanes, kVectors>::kMaxWarps* kWarpSize)
    value_ffn_bwd_tokens_kernel(const __grid_constant__ BackwardArguments backward,
                                const __grid_constant__ SlotArguments arguments) {
  pass_over_slots<SlotTraits<TableT, kLanes, kVectors>>(
      BackwardPass{backward, backward.params, arguments.divisors}, arguments,
      backward.params.dtype);
}

// Any shape --------------------------------------------------------------------------------------

// weights[c][i] = <grad_out[group_i, slice c], table[slot_i, slice c]>, kRowsInFlight slots a warp.
// The token's grad_out begins at element `first_grad`.
template <int kCount, typename TableT>
__device__ void dot_slices(const TableT* table, const ValueFfnBwdParams& params, int64_t first_grad,
                           const SlotChunk& chunk, int count) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int dim = static_cast<int>(params.value_dim);
  const int num_cores = params.num_cores;
  const int slice = dim / num_cores;
  for (int begin = warp * kRowsInFlight; begin < count; begin += kWarps * kRowsInFlight) {
    int64_t slots[kRowsInFlight];
    int64_t grads[kRowsInFlight];
    float acc[kRowsInFlight][kMaxNumCores] = {};
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const int i = begin + k;
      slots[k] = i < count ? chunk.slots[i] : -1;
      grads[k] =
          first_grad + (i < count && !params.sum_groups ? int64_t{chunk.groups[i]} * dim : 0);
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
        float grad[kCount];
        load_elements(params.grad_out, params.dtype, grads[k] + column, grad);
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
struct AnyArguments {
  TokenFactors factors;
  AddressDivisors<ReciprocalDivisor> divisors;
  int capacity;
  bool vector_values, vector_pre_values;
};

// From dw, but for the values' scale, in the chunk's weights to the gradients of the scores and da.
__device__ __forceinline__ void differentiate_scores(const ValueFfnBwdParams& params,
                                                     const AnyArguments& arguments,
                                                     const SlotChunk& chunk, int64_t entry,
                                                     int count) {
  const int num_cores = params.num_cores;
  const float scale = load_scale(params.value_scale);
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
      const float grad_weight = scale * chunk.weights[c * chunk.capacity + i];
      if (params.grad_scores != nullptr) {
        static_cast<float*>(params.grad_scores)[(entry + i) * num_cores + c] =
            in_range ? h * grad_weight : 0.0f;
      }
      if (arguments.factors.weights != nullptr) {
        arguments.factors.weights[(entry + i) * num_cores + c] = in_range ? h * scores[c] : 0.0f;
      }
      if (params.scores != nullptr) sum = fmaf(scores[c], grad_weight, sum);
    }
    if (arguments.factors.grad_a != nullptr) {
      arguments.factors.grad_a[entry + i] = in_range ? slope * sum : 0.0f;
    }
  }
}

template <typename TableT>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    value_ffn_bwd_tokens_any_kernel(const __grid_constant__ ValueFfnBwdParams params,
                                    const __grid_constant__ AnyArguments arguments) {
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
  const int64_t first_grad = token * num_groups * value_dim;
  for (int first = 0; first < num_selected; first += arguments.capacity) {
    const int count = min(num_selected - first, arguments.capacity);
    __syncthreads();  // the previous chunk has been read
    resolve_chunk(params, arguments.divisors, entry + first, chunk, count);
    __syncthreads();
    if (arguments.vector_values) {
      dot_slices<kCount>(values, params, first_grad, chunk, count);
    } else {
      dot_slices<1>(values, params, first_grad, chunk, count);
    }
    __syncthreads();
    differentiate_scores(params, arguments, chunk, entry + first, count);
  }

  if (params.grad_pre_input == nullptr) return;
  const auto load_chunk = [&](int first, int count) {
    // A single chunk is still there from above.
    if (num_selected > arguments.capacity) {
      resolve_chunk(params, arguments.divisors, entry + first, chunk, count);
    }
    const float scale = load_scale(params.pre_value_scale);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      chunk.weights[i] = scale * arguments.factors.grad_a[entry + first + i];
    }
  };
  const int dim = static_cast<int>(params.pre_value_dim);
  const auto* pre_values = static_cast<const TableT*>(params.pre_values);
  if (arguments.vector_pre_values) {
    sum_rows<kCount>(pre_values, dim, /*slice=*/dim, params.grad_pre_input, params.dtype,
                     token * dim, /*num_groups=*/1, num_selected, chunk, partial, load_chunk);
  } else {
    sum_rows<1>(pre_values, dim, /*slice=*/dim, params.grad_pre_input, params.dtype, token * dim,
                /*num_groups=*/1, num_selected, chunk, partial, load_chunk);
  }
}

// The factors of a token, a block each. grad_a: [T, S], or null without pre-values.
__global__ void __launch_bounds__(kThreads)
    value_ffn_factors_kernel(const __grid_constant__ ValueFfnParams params, const float* grad_a,
                             const __grid_constant__ TableFactors arena,
                             const __grid_constant__ AppendedRows rows) {
  const int64_t position = append_position(arena, params.num_tokens);
  if (position < 0) return;
  const int64_t token = blockIdx.x;
  const int64_t to_token = position + token;
  const int num_cores = params.num_cores;
  const int num_selected = static_cast<int>(params.num_selected);
  for (int i = threadIdx.x; i < num_selected; i += kThreads) {
    const int64_t entry = token * num_selected + i;
    const int64_t to = to_token * num_selected + i;
    const SlotAddress address = resolve_slot(params.addressing, load_index(params, entry));
    const bool in_range = address.slot >= 0;
    float h = 1;
    if (params.pre_activation != nullptr) {
      h = activate(params.activation, static_cast<const float*>(params.pre_activation)[entry]);
    }
    const float* scores = static_cast<const float*>(params.scores) + entry * num_cores;
    float* weights = static_cast<float*>(arena.weights) + to * num_cores;
    for (int c = 0; c < num_cores; ++c) weights[c] = in_range ? h * scores[c] : 0.0f;
    arena.slots[to] = in_range ? static_cast<uint32_t>(address.slot) : kNoSlot;
    if (arena.groups != nullptr) arena.groups[to] = static_cast<uint8_t>(address.group);
    if (arena.grad_a != nullptr) {
      static_cast<float*>(arena.grad_a)[to] = in_range ? grad_a[entry] : 0.0f;
    }
  }
  append_row(rows.grad_out, token, to_token);
  append_row(rows.pre_input, token, to_token);
}

// Host ------------------------------------------------------------------------------------------

#define ULTRAMEM_REGISTER_VALUE_FFN_BWD_TOKENS(id, name, TableT)                        \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_short_##id,                             \
                           "value_ffn_bwd_tokens<" name ", short rows>", kWarpSize,     \
                           value_ffn_bwd_tokens_kernel<TableT, 8, 3>);                  \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_half_##id,                              \
                           "value_ffn_bwd_tokens<" name ", half-warp rows>", kWarpSize, \
                           value_ffn_bwd_tokens_kernel<TableT, 16, 3>);                 \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_medium_##id,                            \
                           "value_ffn_bwd_tokens<" name ", medium rows>", kWarpSize,    \
                           value_ffn_bwd_tokens_kernel<TableT, 32, 3>);                 \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_wide_##id,                              \
                           "value_ffn_bwd_tokens<" name ", wide rows>", kWarpSize,      \
                           value_ffn_bwd_tokens_kernel<TableT, 32, 4>);                 \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_long_##id,                              \
                           "value_ffn_bwd_tokens<" name ", long rows>", kWarpSize,      \
                           value_ffn_bwd_tokens_kernel<TableT, 32, 8>);                 \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_bwd_tokens_any_##id,                               \
                           "value_ffn_bwd_tokens<" name ", any rows>", kThreads,        \
                           value_ffn_bwd_tokens_any_kernel<TableT>)
ULTRAMEM_FOR_EACH_TABLE_DTYPE(ULTRAMEM_REGISTER_VALUE_FFN_BWD_TOKENS);
ULTRAMEM_REGISTER_KERNEL(value_ffn_factors, "value_ffn_factors", kThreads,
                         value_ffn_factors_kernel);

template <typename TableT>
Status launch_bwd(const ValueFfnBwdParams& params, const TokenFactors& factors, bool leaves_room,
                  Stream stream) {
  SlotArguments arguments = slot_arguments<TableT>(params);
  arguments.input = params.grad_out;
  arguments.dot_table = params.values;
  arguments.dot_vectors = static_cast<int>(params.value_dim / kVector<TableT>);
  arguments.dot_scale = params.value_scale;
  if (params.grad_pre_input != nullptr) {
    arguments.sum_table = params.pre_values;
    arguments.sum_vectors = static_cast<int>(params.pre_value_dim / kVector<TableT>);
    arguments.sum_scale = params.pre_value_scale;
    arguments.output = params.grad_pre_input;
  }
  return with_slot_traits<TableT>(arguments, [&](auto traits) {
    using Traits = decltype(traits);
    return launch_slots<Traits, BackwardPass>(
        value_ffn_bwd_tokens_kernel<TableT, Traits::kLanes, Traits::kVectors>,
        backward_arguments(params, factors), arguments, params.num_tokens, leaves_room, stream);
  });
}

template <typename TableT>
Status launch_bwd_any(const ValueFfnBwdParams& params, const TokenFactors& factors, Stream stream) {
  AnyArguments arguments;
  arguments.factors = factors;
  arguments.divisors = AddressDivisors<ReciprocalDivisor>(params.addressing);
  arguments.capacity = chunk_capacity(params.num_selected);
  arguments.vector_values = values_are_vectors(params, params.grad_out);
  arguments.vector_pre_values = pre_values_are_vectors(params, params.grad_pre_input);
  const size_t shared_bytes = SlotChunk::bytes(arguments.capacity, params.num_cores);
  value_ffn_bwd_tokens_any_kernel<TableT>
      <<<static_cast<unsigned>(params.num_tokens), kThreads, shared_bytes, stream>>>(params,
                                                                                     arguments);
  ULTRAMEM_RETURN_IF_ERROR(launch_status());
  return factors.arena.header == nullptr ? Status{}
                                         : launch_value_ffn_factors(params, factors, stream);
}

}  // namespace

Status launch_value_ffn_factors(const ValueFfnBwdParams& params, const TokenFactors& factors,
                                Stream stream) {
  value_ffn_factors_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(
      params, factors.grad_a, factors.arena,
      appended_rows(factors.arena, params.grad_out, params.pre_input));
  return launch_status();
}

Status launch_value_ffn_bwd_tokens(const ValueFfnBwdParams& params, const TokenFactors& factors,
                                   bool leaves_room, Stream stream) {
  const bool one_pass = takes_one_pass(params, params.grad_out, params.grad_pre_input);
  return ULTRAMEM_DISPATCH_DTYPE(params.table_dtype, TableT, [&] {
    return one_pass ? launch_bwd<TableT>(params, factors, leaves_room, stream)
                    : launch_bwd_any<TableT>(params, factors, stream);
  });
}

}  // namespace ultramem::cuda
