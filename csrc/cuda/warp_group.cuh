// Sums, extremes and places over some warps of a block, which work on one thing.
#pragma once

#include "async_copy.cuh"
#include "common.cuh"

namespace ultramem::cuda {

// Every thread of the group makes the same calls in the same order. A call holds one barrier: what
// was written to shared memory before it is there afterwards.
class WarpGroup {
 public:
  static constexpr int kMaxWarps = 16;
  static constexpr int kSlots = 2 * 2 * kMaxWarps;

  // `slots` are the group's own, and so is what it waits at: a named barrier, or the mbarrier at a
  // shared address that is not 0, of as many arrivals as the group has threads. That is for groups
  // of a block that wait each for itself at the same time, whose named barriers racecheck would
  // take for one. All are unused where the group is one warp.
  __device__ __forceinline__ WarpGroup(uint32_t* slots, int barrier, int warp, int num_warps,
                                       uint32_t mbarrier = 0)
      : slots_(slots), barrier_(barrier), warp_(warp), num_warps_(num_warps), mbarrier_(mbarrier) {
    lane_ = static_cast<int>(threadIdx.x) % kWarpSize;
  }

  __device__ __forceinline__ void sync() {
    if (num_warps_ == 1) {
      __syncwarp();
    } else if (mbarrier_ != 0) {
      mbarrier_arrive(mbarrier_);
      mbarrier_wait(mbarrier_, parity_);
      parity_ ^= 1;
    } else {
      named_barrier_sync(barrier_, num_warps_ * kWarpSize);
    }
  }

  __device__ __forceinline__ uint32_t sum(uint32_t x) {
    return __reduce_add_sync(kFullMask, exchange(__reduce_add_sync(kFullMask, x), 0));
  }
  // Of two numbers each.
  __device__ __forceinline__ void sums(uint32_t (&x)[2]) {
    x[0] = __reduce_add_sync(kFullMask, x[0]);
    x[1] = __reduce_add_sync(kFullMask, x[1]);
    if (num_warps_ == 1) {
      __syncwarp();
      return;
    }
    uint32_t* slots = next_slots();
    if (lane_ == 0) {
      slots[warp_] = x[0];
      slots[kMaxWarps + warp_] = x[1];
    }
    sync();
    const bool valid = lane_ < num_warps_;
    x[0] = __reduce_add_sync(kFullMask, valid ? slots[lane_] : 0u);
    x[1] = __reduce_add_sync(kFullMask, valid ? slots[kMaxWarps + lane_] : 0u);
  }
  __device__ __forceinline__ uint32_t highest(uint32_t x) {
    return __reduce_max_sync(kFullMask, exchange(__reduce_max_sync(kFullMask, x), 0));
  }
  __device__ __forceinline__ uint32_t lowest(uint32_t x) {
    return __reduce_min_sync(kFullMask, exchange(__reduce_min_sync(kFullMask, x), 0xffffffffu));
  }

  // What warp l of the group gives, in lane l; `other` in lanes beyond the last warp.
  __device__ __forceinline__ uint32_t exchange(uint32_t of_warp, uint32_t other) {
    if (num_warps_ == 1) {
      __syncwarp();
      return lane_ == 0 ? of_warp : other;
    }
    // Two sets of slots: whoever writes one again has passed the barrier behind which all have read
    // it.
    uint32_t* slots = next_slots();
    if (lane_ == 0) slots[warp_] = of_warp;
    sync();
    return lane_ < num_warps_ ? slots[lane_] : other;
  }

  // The same of what a warp's last lane gives.
  __device__ __forceinline__ uint32_t exchange_last(uint32_t x, uint32_t other) {
    if (num_warps_ == 1) return exchange(__shfl_sync(kFullMask, x, kWarpSize - 1), other);
    uint32_t* slots = next_slots();
    if (lane_ == kWarpSize - 1) slots[warp_] = x;
    sync();
    return lane_ < num_warps_ ? slots[lane_] : other;
  }

  // The least of all `lowest` and the greatest of all `highest`.
  __device__ __forceinline__ void extremes(uint32_t* lowest, uint32_t* highest) {
    *lowest = __reduce_min_sync(kFullMask, *lowest);
    *highest = __reduce_max_sync(kFullMask, *highest);
    if (num_warps_ == 1) {
      __syncwarp();
      return;
    }
    uint32_t* slots = next_slots();
    if (lane_ == 0) {
      slots[warp_] = *lowest;
      slots[kMaxWarps + warp_] = *highest;
    }
    sync();
    const bool valid = lane_ < num_warps_;
    *lowest = __reduce_min_sync(kFullMask, valid ? slots[lane_] : 0xffffffffu);
    *highest = __reduce_max_sync(kFullMask, valid ? slots[kMaxWarps + lane_] : 0u);
  }

  // The sum of x over all threads before this one.
  __device__ __forceinline__ uint32_t scan_exclusive(uint32_t x, uint32_t* total) {
    const auto sum = static_cast<uint32_t>(warp_scan_inclusive(static_cast<int>(x)));
    const uint32_t sums = exchange_last(sum, 0);
    *total = __reduce_add_sync(kFullMask, sums);
    return __reduce_add_sync(kFullMask, lane_ < warp_ ? sums : 0) + sum - x;
  }

 private:
  __device__ __forceinline__ uint32_t* next_slots() {
    uint32_t* slots = slots_ + turn_ * 2 * kMaxWarps;
    turn_ ^= 1;
    return slots;
  }

  uint32_t* slots_;
  int barrier_;
  int warp_;
  int num_warps_;
  uint32_t mbarrier_;
  uint32_t parity_ = 0;  // of its phase
  int lane_;
  int turn_ = 0;
};

}  // namespace ultramem::cuda
