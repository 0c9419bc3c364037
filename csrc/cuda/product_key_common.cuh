// What the forward and the backward of product_key_topk share: the shapes they offer, packets of
// elements, division by numbers that the host knows, and shared memory beyond 48 KB.
#pragma once

#include "common.cuh"
#include "device.h"
#include "ultramem/product_key_topk.h"

namespace ultramem::cuda {

// Elements a thread moves at once where rows allow it. Four floats of shared memory are one
// conflict-free 16-byte access of a warp, whatever the element type on the other side.
inline constexpr int kPacket = 4;

template <typename scalar_t, int kVec>
struct alignas(sizeof(scalar_t) * kVec) Packet {
  scalar_t elements[kVec];
};

template <int kVec, typename scalar_t>
__device__ __forceinline__ void load_floats(const scalar_t* from, float (&to)[kVec]) {
  const auto packet = *reinterpret_cast<const Packet<scalar_t, kVec>*>(from);
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = to_float(packet.elements[i]);
}

template <int kVec, typename scalar_t>
__device__ __forceinline__ void store_rounded(const float (&from)[kVec], scalar_t* to) {
  Packet<scalar_t, kVec> packet;
#pragma unroll
  for (int i = 0; i < kVec; ++i) packet.elements[i] = from_float<scalar_t>(from[i]);
  *reinterpret_cast<Packet<scalar_t, kVec>*>(to) = packet;
}

// What orders keys (their scores and the filter) and pairs of them (the factors of row and column):
// sum_r x_r y_r, by the same instructions wherever it is computed.
template <int kPlanes>
__device__ __forceinline__ float rank_value(const float (&x)[kPlanes], const float (&y)[kPlanes]) {
  float sum = __fmul_rn(x[0], y[0]);
#pragma unroll
  for (int r = 1; r < kPlanes; ++r) sum = __fmaf_rn(x[r], y[r], sum);
  return sum;
}

// Whether rows of `dim` elements that start at `pointer` can be moved in packets.
inline bool packets_fit(const void* pointer, int64_t dim, DType dtype) {
  const auto bytes = static_cast<uintptr_t>(kPacket * element_size(dtype));
  return dim % kPacket == 0 && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Divides integers below 2^31 by one that the host knows, without an integer division, of which a
// kernel would make half a dozen, one after the other, before it knows where it begins.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) {
    while (int64_t{1} << (shift_ - 31) < divisor) ++shift_;
    inverse_ = static_cast<uint32_t>(ceil_div(int64_t{1} << shift_, divisor));
  }
  // The inverse is less than 1 too large: the quotient by less than 2^31 / 2^shift, at most
  // 1 / divisor.
  __host__ __device__ int quotient(int x) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x)} * inverse_ >> shift_);
  }

 private:
  uint32_t inverse_ = 1u << 31;
  int shift_ = 31;
};

// Hands out 16-byte aligned offsets into dynamic shared memory. A layout built with it is computed
// by the same code on the host, for the launch, and in the kernel.
class SharedLayout {
 public:
  __host__ __device__ int take(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += (bytes + 15) / 16 * 16;
    return static_cast<int>(offset);
  }
  __host__ __device__ int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Lets a kernel without static shared memory be launched with `bytes` of it. The limit is set to
// the device's maximum, not to `bytes`: it belongs to the kernel, and another host thread may be
// about to launch the same one with more.
template <typename Kernel>
Status allow_shared_memory(Kernel* kernel, int64_t bytes) {
  constexpr int64_t kWithoutOptIn = 48 * 1024;
  if (bytes <= kWithoutOptIn) return {};
  int limit = 0;
  ULTRAMEM_RETURN_IF_ERROR(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limit));
  if (bytes > limit) {
    return Status::invalid_argument(
        "product_key_topk: this shape needs more shared memory than the device has");
  }
  return to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
}

// The shapes on offer. Counts of blocks and of (head, side, key) rows stay below 2^31.
inline Status check_product_key_topk(const ProductKeyTopkParams& p) {
  constexpr int64_t kMaxInt = 0x7fffffff;
  constexpr int64_t kMaxKeyDim = 1 << 20;
  if (p.dtype == DType::kFloat64) {
    return Status::invalid_argument("product_key_topk: float64 is offered on the CPU only");
  }
  if (p.num_tokens < 0 || p.num_heads < 1) {
    return Status::invalid_argument(
        "product_key_topk: num_tokens must be at least 0, num_heads at least 1");
  }
  if (p.tucker_rank < 1 || p.tucker_rank > kMaxTuckerRank || p.num_cores < 1 ||
      p.num_cores > kMaxNumCores) {
    return Status::invalid_argument(
        "product_key_topk: tucker_rank and num_cores must be in [1, 4]");
  }
  if (p.num_queries != 1 && p.num_queries != p.tucker_rank) {
    return Status::invalid_argument("product_key_topk: num_queries must be 1 or tucker_rank");
  }
  if (p.mode == ScoreMode::kAdditive && (p.tucker_rank != 1 || p.num_cores != 1)) {
    return Status::invalid_argument(
        "product_key_topk: additive mode needs tucker_rank = num_cores = 1");
  }
  if (p.key_dim < 1 || p.key_dim > kMaxKeyDim) {
    return Status::invalid_argument("product_key_topk: key_dim must be in [1, 2^20]");
  }
  if (p.num_keys < 1 || p.num_keys > kMaxInt / 2 / p.num_heads) {
    return Status::invalid_argument(
        "product_key_topk: num_keys must be at least 1, 2 * num_heads * num_keys below 2^31");
  }
  if (p.axis_topk < 1 || p.axis_topk > kMaxAxisTopk || p.axis_topk > p.num_keys) {
    return Status::invalid_argument(
        "product_key_topk: axis_topk must be in [1, min(num_keys, 128)]");
  }
  if (p.topk < 1 || p.topk > kMaxTopk || p.topk > p.axis_topk * p.axis_topk) {
    return Status::invalid_argument(
        "product_key_topk: topk must be in [1, min(axis_topk^2, 1024)]");
  }
  if (p.num_tokens > kMaxInt / 2 / p.num_heads) {
    return Status::invalid_argument(
        "product_key_topk: 2 * num_heads * num_tokens must be below 2^31");
  }
  return {};
}

}  // namespace ultramem::cuda
