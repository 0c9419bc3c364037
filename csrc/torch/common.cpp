#include "common.h"

#include <dlfcn.h>

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace ultramem::torch_binding {
namespace {

// STD_TORCH_CHECK would begin the message with this file's name; ours begin with the operator's.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_string(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(tensor.size(i));
  }
  return text + "]";
}

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    default:
      return "another dtype";
  }
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (!tensor.is_cuda()) return "another device";
  return "cuda:" + std::to_string(tensor.get_device_index());
}

void torch_pool_parallel_for(int64_t begin, int64_t end, int64_t grain, Executor::Body body,
                             void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(context, first, last); });
}

// torch's CUDA library is looked up at run time: the same binary then loads under a torch without
// CUDA. It is resident whenever a CUDA tensor exists.
Stream current_cuda_stream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  require(get_stream != nullptr,
          "ultramem: this torch has no aoti_torch_get_current_cuda_stream; "
          "a CUDA build of torch >= 2.11 is needed");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return static_cast<Stream>(stream);
}

}  // namespace

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

OpContext::OpContext(const char* op, const char* reference_name, const Tensor& reference)
    : op_(op),
      reference_name_(reference_name),
      reference_(reference),
      is_cuda_(reference.is_cuda()) {
  if (is_cuda_) {
    guard_.emplace(reference.get_device_index());
    stream_ = current_cuda_stream(reference.get_device_index());
  } else {
    executor_ = {torch_pool_parallel_for, static_cast<int32_t>(torch::stable::get_num_threads())};
  }
}

DType OpContext::dtype(const char* name, const Tensor& tensor) const {
  const ScalarType type = tensor.scalar_type();
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      require(!is_cuda_, op_, ": ", name,
              " is float64, which is offered on the CPU only; use float32, bfloat16 or "
              "float16 on CUDA");
      return DType::kFloat64;
    default:
      require(false, op_, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
              dtype_name(type));
      return DType::kFloat32;
  }
}

void OpContext::check_shape(const char* name, const Tensor& tensor, const char* layout,
                            std::initializer_list<int64_t> sizes) const {
  const bool same_device =
      tensor.is_cuda() == is_cuda_ && tensor.is_cpu() == reference_.is_cpu() &&
      (!is_cuda_ || tensor.get_device_index() == reference_.get_device_index());
  require(same_device, op_, ": ", name, " must be on the device of ", reference_name_, ", ",
          device_name(reference_), ", got ", device_name(tensor));
  bool matches = tensor.dim() == static_cast<int64_t>(sizes.size());
  bool any_known = false;
  std::string expected = "[";
  int64_t i = 0;
  for (const int64_t size : sizes) {
    any_known = any_known || size >= 0;
    if (matches && size >= 0 && tensor.size(i) != size) matches = false;
    expected += (i > 0 ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    ++i;
  }
  require(matches, op_, ": ", name, " must be ", layout, any_known ? " = " + expected + "]" : "",
          ", got ", shape_string(tensor));
}

void OpContext::check_dtype(const char* name, const Tensor& tensor, ScalarType expected) const {
  require(tensor.scalar_type() == expected, op_, ": ", name, " must be ", dtype_name(expected),
          ", got ", dtype_name(tensor.scalar_type()));
}

DType OpContext::gain_dtype(const char* name, const Tensor& gain, DType dtype) const {
  if (gain.scalar_type() == scalar_type(dtype)) return dtype;
  check_dtype(name, gain, scalar_type(accumulation_dtype(dtype)));
  return accumulation_dtype(dtype);
}

void OpContext::check(bool condition, const std::string& message) const {
  require(condition, op_, ": ", message);
}

void OpContext::check(const Status& status) const {
  // The core library's messages begin with the operator's name; the driver's do not.
  const bool named = std::string_view(status.message).substr(0, std::strlen(op_)) == op_;
  require(status.ok(), named ? "" : op_, named ? "" : ": ", status.message);
}

Tensor OpContext::empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
  return torch::stable::new_empty(reference_, sizes, dtype);
}

Tensor OpContext::zeros(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
  return torch::stable::new_zeros(reference_, sizes, dtype);
}

Tensor OpContext::workspace(size_t bytes) const {
  return empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace ultramem::torch_binding
