// Forward of the value FFN. Rows of whole vectors: one pass over the slots (value_ffn_slots.cuh).
// Any other shape: a block takes a token, its warps first form a_s = <pre_input, P[slot]>, a row
// each, then all threads sum the weighted value rows.
#include "kernel_registry.h"
#include "value_ffn_common.cuh"
#include "value_ffn_slots.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

// Rows of whole vectors --------------------------------------------------------------------------

struct ForwardPass {
  struct alignas(16) Batch {
    uint32_t slots[kBatch];
    float scores[kMaxNumCores][kBatch];
  };
  struct Request {
    int64_t index;
    float scores[kMaxNumCores];
  };

  const ValueFfnParams& params;
  const AddressDivisors<ReciprocalDivisor>& divisors;

  __device__ __forceinline__ Request request(int64_t entry, bool exists) const {
    Request request{-1, {}};
    if (!exists) return request;
    request.index = load_index(params, entry);
    const auto* scores = static_cast<const float*>(params.scores) + entry * params.num_cores;
#pragma unroll
    for (int c = 0; c < kMaxNumCores; ++c) {
      if (c < params.num_cores) request.scores[c] = scores[c];
    }
    return request;
  }

  __device__ __forceinline__ void settle(const Request& request, Batch& batch, int i, int64_t,
                                         bool) const {
    const int64_t slot = resolve_slot(params.addressing, divisors, request.index).slot;
    batch.slots[i] = slot >= 0 ? static_cast<uint32_t>(slot) : kNoSlot;
#pragma unroll
    for (int c = 0; c < kMaxNumCores; ++c) batch.scores[c][i] = slot >= 0 ? request.scores[c] : 0;
  }

  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void finish(int64_t) const {}

  template <typename Traits>
  __device__ __forceinline__ void weigh(const float (&dots)[Traits::kVectors],
                                        const int (&cores)[Traits::kVectors], const Batch& batch,
                                        int i, int64_t entry, bool exists, int rank,
                                        float (&weights)[Traits::kVectors]) const {
    float h = 1;
    if (params.pre_values != nullptr) {
      float a = 0;
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) a += dots[v];
      a = team_sum<Traits::kLanes>(a);
      // A slot without a row adds zero even where the input is NaN.
      if (batch.slots[i] == kNoSlot) a = 0;
      if (exists && rank == 0) static_cast<float*>(params.pre_activation)[entry] = a;
      h = activate(params.activation, a);
    }
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) weights[v] = h * batch.scores[cores[v]][i];
  }
};

template <typename TableT, int kLanes, int kVectors>
__global__ void __launch_bounds__(SlotTraits<TableT, kLanes, kVectors>::kMaxWarps* kWarpSize)
    value_ffn_fwd_kernel(const __grid_constant__ ValueFfnParams params,
                         const __grid_constant__ SlotArguments arguments) {
  pass_over_slots<SlotTraits<TableT, kLanes, kVectors>>(ForwardPass{params, arguments.divisors},
                                                        arguments, params.dtype);
}

// Any shape --------------------------------------------------------------------------------------

// a[i] = scale * <x, table[slots[i]]> for `count` slots of a chunk, kRowsInFlight of them a warp; 0
// where the index was out of range. x begins at element `first_x` of its tensor.
template <int kCount, typename TableT>
__device__ void dot_rows(const TableT* table, const void* x, DType x_dtype, int64_t first_x,
                         int dim, const SlotChunk& chunk, int count, float scale, float* a) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  for (int begin = warp * kRowsInFlight; begin < count; begin += kWarps * kRowsInFlight) {
    int64_t slots[kRowsInFlight];
    float acc[kRowsInFlight] = {};
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      slots[k] = begin + k < count ? chunk.slots[begin + k] : -1;
    }
    for (int column = lane * kCount; column < dim; column += kWarpSize * kCount) {
      Pack<TableT, kCount> rows[kRowsInFlight];
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        rows[k].clear();
        if (slots[k] >= 0) rows[k].load(table + slots[k] * dim + column);
      }
      float input[kCount];
      load_elements(x, x_dtype, first_x + column, input);
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) acc[k] = fmaf(input[j], rows[k][j], acc[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const float sum = warp_sum(acc[k]);
      // A slot without a row is zero even where the input is NaN.
      if (lane == 0 && begin + k < count) a[begin + k] = slots[k] >= 0 ? scale * sum : 0.0f;
    }
  }
}

template <typename TableT>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    value_ffn_fwd_any_kernel(const __grid_constant__ ValueFfnParams params,
                             const __grid_constant__ AddressDivisors<ReciprocalDivisor> divisors,
                             int capacity, bool vector_pre_values, bool vector_values) {
  constexpr int kCount = kVector<TableT>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[kThreads * kCount];
  const SlotChunk chunk(shared, capacity, params.num_cores);
  const int64_t token = blockIdx.x;
  const int num_selected = static_cast<int>(params.num_selected);
  const int num_cores = params.num_cores;
  const int64_t entry = token * num_selected;
  const bool one_chunk = num_selected <= capacity;
  // Written here and read back by other threads of the block: no pointer to const.
  float* a =
      params.pre_values != nullptr ? static_cast<float*>(params.pre_activation) + entry : nullptr;

  if (one_chunk) {
    resolve_chunk(params, divisors, entry, chunk, num_selected);
    __syncthreads();
  }
  if (a != nullptr) {
    const auto* table = static_cast<const TableT*>(params.pre_values);
    const int dim = static_cast<int>(params.pre_value_dim);
    const float scale = load_scale(params.pre_value_scale);
    for (int first = 0; first < num_selected; first += capacity) {
      const int count = min(num_selected - first, capacity);
      if (!one_chunk) {
        __syncthreads();
        resolve_chunk(params, divisors, entry + first, chunk, count);
        __syncthreads();
      }
      if (vector_pre_values) {
        dot_rows<kCount>(table, params.pre_input, params.dtype, token * dim, dim, chunk, count,
                         scale, a + first);
      } else {
        dot_rows<1>(table, params.pre_input, params.dtype, token * dim, dim, chunk, count, scale,
                    a + first);
      }
    }
  }

  const auto load_chunk = [&](int first, int count) {
    if (!one_chunk) resolve_chunk(params, divisors, entry + first, chunk, count);
    const float scale = load_scale(params.value_scale);
    // Not kept beside the sums, which would spill registers.
    const auto* scores = static_cast<const float*>(params.scores) + (entry + first) * num_cores;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const float h = a != nullptr ? activate(params.activation, a[first + i]) : 1.0f;
      for (int c = 0; c < num_cores; ++c) {
        chunk.weights[c * chunk.capacity + i] = h * (scale * scores[int64_t{i} * num_cores + c]);
      }
    }
  };
  const int num_groups = params.sum_groups ? 1 : static_cast<int>(params.addressing.expand);
  const int dim = static_cast<int>(params.value_dim);
  const int slice = dim / num_cores;
  const auto* table = static_cast<const TableT*>(params.values);
  const int64_t first_out = token * num_groups * dim;
  if (vector_values) {
    sum_rows<kCount>(table, dim, slice, params.out, params.dtype, first_out, num_groups,
                     num_selected, chunk, partial, load_chunk);
  } else {
    sum_rows<1>(table, dim, slice, params.out, params.dtype, first_out, num_groups, num_selected,
                chunk, partial, load_chunk);
  }
}

__global__ void __launch_bounds__(kThreads)
    check_indices_kernel(const __grid_constant__ ValueFfnParams params, int32_t* index_error) {
  const int64_t num_entries = params.num_tokens * params.num_selected;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_entries; i += step) {
    if (resolve_slot(params.addressing, load_index(params, i)).slot == kIndexOutOfRange) {
      *index_error = 1;
    }
  }
}

#define ULTRAMEM_REGISTER_VALUE_FFN_FWD(id, name, TableT)                                         \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_short_##id, "value_ffn_fwd<" name ", short rows>",       \
                           kWarpSize, value_ffn_fwd_kernel<TableT, 8, 3>);                        \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_half_##id, "value_ffn_fwd<" name ", half-warp rows>",    \
                           kWarpSize, value_ffn_fwd_kernel<TableT, 16, 3>);                       \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_medium_##id, "value_ffn_fwd<" name ", medium rows>",     \
                           kWarpSize, value_ffn_fwd_kernel<TableT, 32, 3>);                       \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_wide_##id, "value_ffn_fwd<" name ", wide rows>",         \
                           kWarpSize, value_ffn_fwd_kernel<TableT, 32, 4>);                       \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_long_##id, "value_ffn_fwd<" name ", long rows>",         \
                           kWarpSize, value_ffn_fwd_kernel<TableT, 32, 8>);                       \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_any_##id, "value_ffn_fwd<" name ", any rows>", kThreads, \
                           value_ffn_fwd_any_kernel<TableT>)
ULTRAMEM_FOR_EACH_TABLE_DTYPE(ULTRAMEM_REGISTER_VALUE_FFN_FWD);
ULTRAMEM_REGISTER_KERNEL(check_indices, "check_indices", kThreads, check_indices_kernel);

template <typename TableT>
Status launch_fwd(const ValueFfnParams& params, Stream stream) {
  SlotArguments arguments = slot_arguments<TableT>(params);
  arguments.input = params.pre_input;
  arguments.dot_table = params.pre_values;
  arguments.dot_vectors = static_cast<int>(params.pre_value_dim / kVector<TableT>);
  arguments.sum_table = params.values;
  arguments.sum_vectors = static_cast<int>(params.value_dim / kVector<TableT>);
  arguments.dot_scale = params.pre_value_scale;
  arguments.sum_scale = params.value_scale;
  arguments.output = params.out;
  return with_slot_traits<TableT>(arguments, [&](auto traits) {
    using Traits = decltype(traits);
    return launch_slots<Traits, ForwardPass>(
        value_ffn_fwd_kernel<TableT, Traits::kLanes, Traits::kVectors>, params, arguments,
        params.num_tokens, false, stream);
  });
}

template <typename TableT>
Status launch_fwd_any(const ValueFfnParams& params, Stream stream) {
  const int capacity = chunk_capacity(params.num_selected);
  const size_t shared_bytes = SlotChunk::bytes(capacity, params.num_cores);
  value_ffn_fwd_any_kernel<TableT>
      <<<static_cast<unsigned>(params.num_tokens), kThreads, shared_bytes, stream>>>(
          params, AddressDivisors<ReciprocalDivisor>(params.addressing), capacity,
          pre_values_are_vectors(params, nullptr), values_are_vectors(params, params.out));
  return launch_status();
}

}  // namespace

Status check_indices(const ValueFfnParams& params, int32_t* index_error, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_addressing(params.addressing));
  const int64_t num_entries = params.num_tokens * params.num_selected;
  if (index_error == nullptr || num_entries == 0) return {};
  constexpr int64_t kMaxBlocks = 4096;
  const int64_t blocks = ceil_div(num_entries, kThreads);
  check_indices_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads,
                         0, stream>>>(params, index_error);
  return launch_status();
}

size_t value_ffn_fwd_workspace(const ValueFfnParams& /*params*/) { return 0; }

Status value_ffn_fwd(const ValueFfnParams& params, Stream stream) {
  ULTRAMEM_RETURN_IF_ERROR(check_params(params, /*needs_scores=*/true));
  if (params.num_tokens == 0) return {};
  if (params.out == nullptr) return Status::invalid_argument("value_ffn: out must not be null");
  const bool one_pass = takes_one_pass(params, params.out, nullptr);
  return ULTRAMEM_DISPATCH_DTYPE(params.table_dtype, TableT, [&] {
    return one_pass ? launch_fwd<TableT>(params, stream) : launch_fwd_any<TableT>(params, stream);
  });
}

}  // namespace ultramem::cuda
