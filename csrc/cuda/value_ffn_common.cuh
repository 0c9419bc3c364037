// What the forward and the backward of the value FFN share: rows as packed vectors, activations,
// argument checks, and of the kernels for any shape the slots of a token in shared memory and the
// weighted sums of rows. The kernels for rows of whole vectors are in value_ffn_slots.cuh.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "common/value_ffn_checks.h"
#include "ultramem/value_ffn.h"

namespace ultramem::cuda::value_ffn {

// Of the kernels for any shape: a block works on one token.
inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / kWarpSize;
// Blocks a multiprocessor must hold: bounds the registers to 80 and, unlike the compiler's own
// choice, avoids spills.
inline constexpr int kMinBlocks = 6;
// Rows a thread loads before it uses the first: what hides the latency of random reads.
inline constexpr int kRowsInFlight = 4;
// Slots of a token held in shared memory at once; more are worked off in chunks.
inline constexpr int kMaxChunk = 1024;

__device__ __forceinline__ uint4 ldg_with_policy(const uint4* from, uint64_t policy) {
  uint4 x;
  asm("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from), "l"(policy));
  return x;
}
__device__ __forceinline__ uint2 ldg_with_policy(const uint2* from, uint64_t policy) {
  uint2 x;
  asm("ld.global.nc.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
      : "=r"(x.x), "=r"(x.y)
      : "l"(from), "l"(policy));
  return x;
}
__device__ __forceinline__ uint32_t ldg_with_policy(const uint32_t* from, uint64_t policy) {
  uint32_t x;
  asm("ld.global.nc.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(x) : "l"(from), "l"(policy));
  return x;
}
__device__ __forceinline__ uint16_t ldg_with_policy(const uint16_t* from, uint64_t policy) {
  uint16_t x;
  asm("ld.global.nc.L2::cache_hint.u16 %0, [%1], %2;" : "=h"(x) : "l"(from), "l"(policy));
  return x;
}

// kCount consecutive elements, moved in words of up to 16 bytes.
template <typename T, int kCount>
struct Pack {
  static constexpr int kBytes = kCount * sizeof(T);
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  static_assert(kWords * sizeof(Word) == kBytes, "a pack is a whole number of words");

  Word words[kWords];

  // From memory that the kernel does not write.
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
  // .. which is the last to leave the L2 cache (keep_policy).
  __device__ __forceinline__ void load_kept(const T* from, uint64_t policy) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = ldg_with_policy(reinterpret_cast<const Word*>(from) + i, policy);
    }
  }
  // From memory that it does, and then not again: it is the first to leave the caches.
  __device__ __forceinline__ void load_mutable(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(reinterpret_cast<const Word*>(from) + i);
  }
  // From memory that other blocks have written meanwhile: not through the L1 cache.
  __device__ __forceinline__ void load_shared_by_blocks(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcg(reinterpret_cast<const Word*>(from) + i);
  }
  __device__ __forceinline__ void store_last(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<Word*>(to) + i, words[i]);
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Word{};
  }
  __device__ __forceinline__ float operator[](int i) const {
    return to_float(reinterpret_cast<const T*>(words)[i]);
  }
  __device__ __forceinline__ void set(int i, float x) {
    reinterpret_cast<T*>(words)[i] = from_float<T>(x);
  }
};

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Calls the function with an element of that type. For what a token reads or writes once or is not
// in a hurry: its dtype needs no instantiation of the kernel.
template <typename Function>
__device__ __forceinline__ void with_element_type(DType dtype, Function function) {
  if (dtype == DType::kBFloat16) {
    function(__nv_bfloat16{});
  } else if (dtype == DType::kFloat16) {
    function(__half{});
  } else {
    function(0.0f);
  }
}

// kCount elements from the first one on, in memory that the kernel does not write.
template <int kCount>
__device__ __forceinline__ void load_elements(const void* elements, DType dtype, int64_t first,
                                              float (&to)[kCount]) {
  with_element_type(dtype, [&](auto element) {
    Pack<decltype(element), kCount> packed;
    packed.load(static_cast<const decltype(element)*>(elements) + first);
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = packed[j];
  });
}

template <int kCount>
__device__ __forceinline__ void store_elements(void* elements, DType dtype, int64_t first,
                                               const float (&from)[kCount]) {
  with_element_type(dtype, [&](auto element) {
    Pack<decltype(element), kCount> packed;
#pragma unroll
    for (int j = 0; j < kCount; ++j) packed.set(j, from[j]);
    packed.store(static_cast<decltype(element)*>(elements) + first);
  });
}

// A part of a token's slots, in shared memory.
struct SlotChunk {
  int64_t* slots;   // [capacity], negative where there is no row
  float* weights;   // [C, capacity]
  int32_t* groups;  // [capacity]
  int capacity;

  __device__ SlotChunk(void* memory, int capacity, int num_cores) : capacity(capacity) {
    slots = static_cast<int64_t*>(memory);
    weights = reinterpret_cast<float*>(slots + capacity);
    groups = reinterpret_cast<int32_t*>(weights + num_cores * capacity);
  }
  static constexpr size_t bytes(int capacity, int num_cores) {
    return static_cast<size_t>(capacity) *
           (sizeof(int64_t) + num_cores * sizeof(float) + sizeof(int32_t));
  }
};

inline int chunk_capacity(int64_t num_selected) {
  return static_cast<int>(num_selected < kMaxChunk ? num_selected : kMaxChunk);
}

__device__ __forceinline__ int64_t load_index(const ValueFfnParams& params, int64_t entry) {
  return params.indices_are_int64 ? static_cast<const int64_t*>(params.indices)[entry]
                                  : static_cast<const int32_t*>(params.indices)[entry];
}

// Slots first .. first+count of the token whose entries begin at `entry`. Thread i of the block
// writes elements i, i + kThreads, ...; a barrier is the caller's.
__device__ __forceinline__ void resolve_chunk(const ValueFfnParams& params,
                                              const AddressDivisors<ReciprocalDivisor>& divisors,
                                              int64_t entry, const SlotChunk& chunk, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const SlotAddress address =
        resolve_slot(params.addressing, divisors, load_index(params, entry + i));
    chunk.slots[i] = address.slot;
    chunk.groups[i] = static_cast<int32_t>(address.group);
  }
}

__device__ __forceinline__ float load_scale(const double* scale) {
  return scale != nullptr ? static_cast<float>(*scale) : 1.0f;
}

// h = act(a).
__device__ __forceinline__ float activate(Activation activation, float a) {
  switch (activation) {
    case Activation::kGelu:
      // erfc keeps its precision where 1 + erf cancels.
      return 0.5f * a * erfcf(-a * 0.70710678118654752f);
    case Activation::kRelu:
      return a < 0 ? 0.0f : a;  // so that NaN stays NaN
    case Activation::kSilu:
      return a / (1 + expf(-a));
    default:
      return a;
  }
}

// act'(a).
__device__ __forceinline__ float activation_slope(Activation activation, float a) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * erfcf(-a * 0.70710678118654752f) +
             a * 0.39894228040143268f * expf(-0.5f * a * a);
    case Activation::kRelu:
      return a <= 0 ? 0.0f : 1.0f;
    case Activation::kSilu: {
      const float sigmoid = 1 / (1 + expf(-a));
      return sigmoid * (1 + a * (1 - sigmoid));
    }
    default:
      return 1;
  }
}

// out[group] = sum_s weight_{core,s} * table[slot_s] over the slots of each group, for one token;
// column i belongs to core i / slice; `out` begins at element `first_out` of its tensor. Slots are
// added in an order that depends on the shape alone.
//
// Threads lie side by side along a row, kCount columns each; where a row is shorter than the block,
// several rows are read in parallel and their sums combined at the end through `partial`, kCount
// floats a thread in shared memory. `load_chunk(first, count)` makes slots first .. first+count
// current and is called by all threads, between barriers. With a single group the slots' groups
// are not looked at.
template <int kCount, typename TableT, typename LoadChunk>
__device__ void sum_rows(const TableT* table, int dim, int slice, void* out, DType out_dtype,
                         int64_t first_out, int num_groups, int num_selected,
                         const SlotChunk& chunk, float* partial, LoadChunk load_chunk) {
  const int num_vectors = dim / kCount;
  const int row_threads = min(num_vectors, kThreads);
  const int row_lanes = kThreads / row_threads;
  const int row_lane = threadIdx.x / row_threads;
  const int row_thread = threadIdx.x % row_threads;
  const bool one_chunk = num_selected <= chunk.capacity;

  if (one_chunk) {
    __syncthreads();
    load_chunk(0, num_selected);
    __syncthreads();
  }
  for (int tile = 0; tile < num_vectors; tile += row_threads) {
    const int column = (tile + row_thread) * kCount;
    const bool in_row = row_lane < row_lanes && column < dim;
    const float* weights = in_row ? chunk.weights + column / slice * chunk.capacity : nullptr;
    for (int group = 0; group < num_groups; ++group) {
      float acc[kCount] = {};
      for (int first = 0; first < num_selected; first += chunk.capacity) {
        const int count = min(num_selected - first, chunk.capacity);
        if (!one_chunk) {
          __syncthreads();
          load_chunk(first, count);
          __syncthreads();
        }
        if (!in_row) continue;
        for (int begin = row_lane; begin < count; begin += kRowsInFlight * row_lanes) {
          Pack<TableT, kCount> rows[kRowsInFlight];
          float weight[kRowsInFlight];
#pragma unroll
          for (int k = 0; k < kRowsInFlight; ++k) {
            const int i = begin + k * row_lanes;
            const bool wanted = i < count && (num_groups == 1 || chunk.groups[i] == group);
            const int64_t slot = wanted ? chunk.slots[i] : -1;
            weight[k] = 0;
            rows[k].clear();
            if (slot >= 0) {
              weight[k] = weights[i];
              rows[k].load(table + slot * dim + column);
            }
          }
#pragma unroll
          for (int k = 0; k < kRowsInFlight; ++k) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) acc[j] = fmaf(weight[k], rows[k][j], acc[j]);
          }
        }
      }
      if (row_lanes > 1) {
        __syncthreads();  // the sums of the previous group have been read
        if (in_row) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) partial[threadIdx.x * kCount + j] = acc[j];
        }
        __syncthreads();
        if (in_row && row_lane == 0) {
          for (int lane = 1; lane < row_lanes; ++lane) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              acc[j] += partial[(lane * row_threads + row_thread) * kCount + j];
            }
          }
        }
      }
      if (in_row && row_lane == 0) {
        store_elements(out, out_dtype, first_out + int64_t{group} * dim + column, acc);
      }
    }
  }
}

// What the forward and the backward offer. Dimensions are 32-bit inside the kernels, offsets 64.
// scores may be null where the caller says so.
inline Status check_params(const ValueFfnParams& params, bool needs_scores) {
  ULTRAMEM_RETURN_IF_ERROR(check_addressing(params.addressing));
  if (params.addressing.num_slots < 1) {
    return Status::invalid_argument("value_ffn: the table must have at least one slot");
  }
  if (params.table_dtype == DType::kFloat64 || params.dtype == DType::kFloat64) {
    return Status::invalid_argument("value_ffn: float64 is offered on the CPU only");
  }
  if (params.num_cores < 1 || params.num_cores > kMaxNumCores) {
    return Status::invalid_argument("value_ffn: the number of cores C must be 1..4");
  }
  constexpr int64_t kMaxDim = int64_t{1} << 30;
  if (params.value_dim < 1 || params.value_dim > kMaxDim ||
      params.value_dim % params.num_cores != 0) {
    return Status::invalid_argument(
        "value_ffn: value_dim must be in 1..2^30 and a multiple of the number of cores C");
  }
  if (params.num_tokens < 0 || params.num_tokens > INT32_MAX) {
    return Status::invalid_argument("value_ffn: CUDA offers up to 2^31-1 tokens");
  }
  if (params.num_selected < 0 || params.num_selected > kMaxDim) {
    return Status::invalid_argument("value_ffn: CUDA offers up to 2^30 slots a token");
  }
  const bool has_pre_values = params.pre_value_dim != 0;
  if (params.pre_value_dim < 0 || params.pre_value_dim > kMaxDim ||
      has_pre_values != (params.pre_values != nullptr)) {
    return Status::invalid_argument(
        "value_ffn: pre_value_dim must be in 1..2^30 with pre_values and 0 without");
  }
  if (params.num_tokens > 0 && has_pre_values != (params.pre_input != nullptr)) {
    return Status::invalid_argument("value_ffn: pre_values and pre_input go together");
  }
  if (params.num_tokens > 0 && params.num_selected > 0) {
    if (params.indices == nullptr || (needs_scores && params.scores == nullptr) ||
        params.values == nullptr) {
      return Status::invalid_argument("value_ffn: indices, scores and values must not be null");
    }
    if (has_pre_values && params.pre_activation == nullptr) {
      return Status::invalid_argument("value_ffn: pre_values need pre_activation");
    }
  }
  return {};
}

// Whether rows of the values, and of a tensor of `dtype` beside them, may be moved 16 bytes at a
// time, with every vector inside one core's slice.
inline bool values_are_vectors(const ValueFfnParams& params, const void* beside) {
  const int64_t count = 16 / element_size(params.table_dtype);
  return params.value_dim / params.num_cores % count == 0 && is_aligned(params.values) &&
         is_aligned(beside);
}

inline bool pre_values_are_vectors(const ValueFfnParams& params, const void* beside) {
  const int64_t count = 16 / element_size(params.table_dtype);
  return params.pre_value_dim % count == 0 && is_aligned(params.pre_values) &&
         is_aligned(params.pre_input) && is_aligned(beside);
}

// Expands macro(id, name, FirstT, SecondT) for every pair of dtypes.
#define ULTRAMEM_FOR_EACH_DTYPE_PAIR(macro)                    \
  macro(f32_f32, "f32,f32", float, float);                     \
  macro(f32_bf16, "f32,bf16", float, __nv_bfloat16);           \
  macro(f32_f16, "f32,f16", float, __half);                    \
  macro(bf16_f32, "bf16,f32", __nv_bfloat16, float);           \
  macro(bf16_bf16, "bf16,bf16", __nv_bfloat16, __nv_bfloat16); \
  macro(bf16_f16, "bf16,f16", __nv_bfloat16, __half);          \
  macro(f16_f32, "f16,f32", __half, float);                    \
  macro(f16_bf16, "f16,bf16", __half, __nv_bfloat16);          \
  macro(f16_f16, "f16,f16", __half, __half)

// Expands macro(id, name, TableT) for every dtype of a table.
#define ULTRAMEM_FOR_EACH_TABLE_DTYPE(macro) \
  macro(f32, "f32", float);                  \
  macro(bf16, "bf16", __nv_bfloat16);        \
  macro(f16, "f16", __half)

}  // namespace ultramem::cuda::value_ffn
