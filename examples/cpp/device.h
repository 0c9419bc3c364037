// Where the layer runs: memory, copies and the call of an operator, on the CPU or on a CUDA stream.
#pragma once

#include <ultramem/ultramem.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

// Throws where an operator has not run.
void check(const ultramem::Status& status, const char* what);

class Device;

// Zeroed memory on a device, which must outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device& device, size_t bytes);

  template <typename T = void>
  T* data() const {
    return static_cast<T*>(memory_.get());
  }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<void> memory_;
  size_t bytes_ = 0;
};

// One operator on both backends, as the headers of ultramem declare it.
template <typename Params>
struct Operator {
  const char* name;
  ultramem::Status (*cpu)(const Params&, const ultramem::Executor&);
  size_t (*cpu_workspace)(const Params&, const ultramem::Executor&);
#if defined(ULTRAMEM_WITH_CUDA)
  ultramem::Status (*cuda)(const Params&, ultramem::Stream);
  size_t (*cuda_workspace)(const Params&);
#endif
};

#if defined(ULTRAMEM_WITH_CUDA)
#define ULTRAMEM_OPERATOR(name)                                                       \
  {#name, ultramem::cpu::name, ultramem::cpu::name##_workspace, ultramem::cuda::name, \
   ultramem::cuda::name##_workspace}
#else
#define ULTRAMEM_OPERATOR(name) {#name, ultramem::cpu::name, ultramem::cpu::name##_workspace}
#endif

class Device {
 public:
  // num_threads is for the CPU. On CUDA: device 0, a stream of its own.
  Device(bool is_cuda, int num_threads);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  bool is_cuda() const { return is_cuda_; }
  const ultramem::Executor& executor() const { return executor_; }
  ultramem::Stream stream() const { return stream_; }

  // Zeroed behind what the stream holds.
  void* allocate(size_t bytes);
  void release(void* memory) noexcept;
  // Both wait for the stream.
  void copy_in(void* on_device, const void* on_host, size_t bytes);
  void copy_out(void* on_host, const void* on_device, size_t bytes);

  // Runs an operator, with the workspace that it asks for.
  template <typename Params>
  void run(const Operator<Params>& op, Params params) {
#if defined(ULTRAMEM_WITH_CUDA)
    if (is_cuda_) {
      params.workspace = workspace(op.cuda_workspace(params));
      return check(op.cuda(params, stream_), op.name);
    }
#endif
    params.workspace = workspace(op.cpu_workspace(params, executor_));
    check(op.cpu(params, executor_), op.name);
  }

  // These two need none.
  void rms_norm_fwd(const ultramem::RmsNormParams& params);
  void tucker_filter(const ultramem::TuckerFilterParams& params);

 private:
  // One for all operators: on a stream, as on a thread, they run one after the other.
  void* workspace(size_t bytes);

  bool is_cuda_;
  ultramem::Executor executor_;
  ultramem::Stream stream_ = nullptr;
  Buffer workspace_;
};
