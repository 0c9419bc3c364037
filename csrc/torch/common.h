// What the torch bindings share: checks that name the operator and the argument, allocation, and
// the bridge from torch's thread pool and streams to the core library.
//
// Only the stable ABI is used (torch/csrc/stable), so one binary serves every torch >= 2.11.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "ultramem/types.h"

namespace ultramem::torch_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One operator call: where it runs, and how its errors begin.
class OpContext {
 public:
  // Everything runs on the device of `reference`, the argument of that name, which becomes the
  // current device.
  OpContext(const char* op, const char* reference_name, const Tensor& reference);

  bool is_cuda() const { return is_cuda_; }
  const Executor& executor() const { return executor_; }
  Stream stream() const { return stream_; }

  // dtype of a floating argument; raises for anything else, and for float64 on CUDA.
  DType dtype(const char* name, const Tensor& tensor) const;

  // Raises unless `tensor` lives where the operator runs and has exactly these sizes; -1 accepts
  // any. `layout` is how the documentation writes the shape.
  void check_shape(const char* name, const Tensor& tensor, const char* layout,
                   std::initializer_list<int64_t> sizes) const;
  void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) const;
  // dtype of a norm's gain, which must be `dtype` or its accumulation's.
  DType gain_dtype(const char* name, const Tensor& gain, DType dtype) const;
  void check(bool condition, const std::string& message) const;
  void check(const Status& status) const;

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const;
  Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype) const;
  // Scratch memory of the operator; freed (stream-ordered) when the tensor goes out of scope.
  Tensor workspace(size_t bytes) const;

 private:
  const char* op_;
  const char* reference_name_;
  const Tensor& reference_;
  bool is_cuda_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Executor executor_;
  Stream stream_ = nullptr;
};

ScalarType scalar_type(DType dtype);

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// torch's `contiguous` goes through the dispatcher even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_contiguous(*tensor);
}

}  // namespace ultramem::torch_binding

// Calls the function of the backend that the operator runs on. In a build without CUDA no CUDA
// tensor reaches a kernel: nothing is registered for that dispatch key.
#if defined(ULTRAMEM_WITH_CUDA)
#define ULTRAMEM_CALL(context, function, params)                                \
  ((context).is_cuda() ? ::ultramem::cuda::function(params, (context).stream()) \
                       : ::ultramem::cpu::function(params, (context).executor()))
#define ULTRAMEM_WORKSPACE(context, function, params)          \
  (context).workspace((context).is_cuda()                      \
                          ? ::ultramem::cuda::function(params) \
                          : ::ultramem::cpu::function(params, (context).executor()))
#else
#define ULTRAMEM_CALL(context, function, params) \
  ::ultramem::cpu::function(params, (context).executor())
#define ULTRAMEM_WORKSPACE(context, function, params) \
  (context).workspace(::ultramem::cpu::function(params, (context).executor()))
#endif
