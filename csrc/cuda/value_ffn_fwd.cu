// Forward of the value FFN. A block takes a token: its warps first form a_s = <pre_input, P[slot]>,
// a row each, then all threads sum the weighted value rows.
#include "kernel_registry.h"
#include "value_ffn_common.cuh"

namespace ultramem::cuda {
namespace {

using namespace value_ffn;

// a[i] = <x, table[slots[i]]> for `count` slots of a chunk, kRowsInFlight of them a warp; 0 where
// the index was out of range.
template <int kCount, typename TableT, typename InputT>
__device__ void dot_rows(const TableT* table, const InputT* x, int dim, const SlotChunk& chunk,
                         int count, float* a) {
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
      Pack<InputT, kCount> input;
      input.load(x + column);
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
      if (lane == 0 && begin + k < count) a[begin + k] = slots[k] >= 0 ? sum : 0.0f;
    }
  }
}

template <typename TableT, typename InputT>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    value_ffn_fwd_kernel(const __grid_constant__ ValueFfnParams params, int capacity,
                         bool vector_pre_values, bool vector_values) {
  constexpr int kCount = kVector<TableT>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[kThreads * kCount];
  const SlotChunk chunk(shared, capacity, params.num_cores);
  const int64_t token = blockIdx.x;
  const int num_selected = static_cast<int>(params.num_selected);
  const int num_cores = params.num_cores;
  const int64_t entry = token * num_selected;
  const bool one_chunk = num_selected <= capacity;
  const auto* scores = static_cast<const float*>(params.scores) + entry * num_cores;
  // Written here and read back by other threads of the block: no pointer to const.
  float* a =
      params.pre_values != nullptr ? static_cast<float*>(params.pre_activation) + entry : nullptr;

  if (one_chunk) {
    resolve_chunk(params, entry, chunk, num_selected);
    __syncthreads();
  }
  if (a != nullptr) {
    const auto* table = static_cast<const TableT*>(params.pre_values);
    const int dim = static_cast<int>(params.pre_value_dim);
    const auto* x = static_cast<const InputT*>(params.pre_input) + token * dim;
    for (int first = 0; first < num_selected; first += capacity) {
      const int count = min(num_selected - first, capacity);
      if (!one_chunk) {
        __syncthreads();
        resolve_chunk(params, entry + first, chunk, count);
        __syncthreads();
      }
      if (vector_pre_values) {
        dot_rows<kCount>(table, x, dim, chunk, count, a + first);
      } else {
        dot_rows<1>(table, x, dim, chunk, count, a + first);
      }
    }
  }

  const auto load_chunk = [&](int first, int count) {
    if (!one_chunk) resolve_chunk(params, entry + first, chunk, count);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const float h = a != nullptr ? activate(params.activation, a[first + i]) : 1.0f;
      for (int c = 0; c < num_cores; ++c) {
        chunk.weights[c * chunk.capacity + i] = h * scores[int64_t{first + i} * num_cores + c];
      }
    }
  };
  const int num_groups = params.sum_groups ? 1 : static_cast<int>(params.addressing.expand);
  const int dim = static_cast<int>(params.value_dim);
  const int slice = dim / num_cores;
  const auto* table = static_cast<const TableT*>(params.values);
  InputT* out = static_cast<InputT*>(params.out) + token * num_groups * dim;
  if (vector_values) {
    sum_rows<kCount>(table, dim, slice, out, num_groups, num_selected, chunk, partial, load_chunk);
  } else {
    sum_rows<1>(table, dim, slice, out, num_groups, num_selected, chunk, partial, load_chunk);
  }
}

__global__ void __launch_bounds__(kThreads)
    check_indices_kernel(const __grid_constant__ ValueFfnParams params, int32_t* index_error) {
  const int64_t num_entries = params.num_tokens * params.num_selected;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_entries; i += step) {
    if (resolve_slot(params.addressing, load_index(params, i)).slot < 0) *index_error = 1;
  }
}

#define ULTRAMEM_REGISTER_VALUE_FFN_FWD(id, name, TableT, InputT)                   \
  ULTRAMEM_REGISTER_KERNEL(value_ffn_fwd_##id, "value_ffn_fwd<" name ">", kThreads, \
                           value_ffn_fwd_kernel<TableT, InputT>)
ULTRAMEM_FOR_EACH_DTYPE_PAIR(ULTRAMEM_REGISTER_VALUE_FFN_FWD);
ULTRAMEM_REGISTER_KERNEL(check_indices, "check_indices", kThreads, check_indices_kernel);

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
  ULTRAMEM_RETURN_IF_ERROR(check_params(params));
  if (params.num_tokens == 0) return {};
  if (params.out == nullptr) return Status::invalid_argument("value_ffn: out must not be null");
  return ULTRAMEM_DISPATCH_DTYPE(params.table_dtype, TableT, [&] {
    return ULTRAMEM_DISPATCH_DTYPE(params.dtype, InputT, [&] {
      const int capacity = chunk_capacity(params.num_selected);
      const size_t shared_bytes = SlotChunk::bytes(capacity, params.num_cores);
      value_ffn_fwd_kernel<TableT, InputT>
          <<<static_cast<unsigned>(params.num_tokens), kThreads, shared_bytes, stream>>>(
              params, capacity, pre_values_are_vectors(params, nullptr),
              values_are_vectors(params, params.out));
      return launch_status();
    });
  });
}

}  // namespace ultramem::cuda
