// Lays out arrays in a caller's workspace. With a null base it only measures, so that one function
// describes both the size and the layout.
//
// Internal linkage throughout, for the reason given in parallel.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ultramem::cpu {
namespace {

class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {
    // The caller's memory may start anywhere; arrays start at cache lines.
    if (base_ != 0) base_ = (base_ + kAlignment - 1) / kAlignment * kAlignment;
  }

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t address = base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == 0 ? nullptr : reinterpret_cast<T*>(address);
  }

  size_t bytes() const { return used_ == 0 ? 0 : used_ + kAlignment; }

 private:
  static constexpr size_t kAlignment = 64;
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace ultramem::cpu
