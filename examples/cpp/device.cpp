#include "device.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(ULTRAMEM_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace {

int g_num_threads = 1;

// The simplest there is. A program with a thread pool hands that in.
void run_on_threads(int64_t begin, int64_t end, int64_t grain, ultramem::Executor::Body body,
                    void* context) {
  const int64_t length = end - begin;
  int64_t parts = grain > 0 ? length / grain : length;
  if (parts > g_num_threads) parts = g_num_threads;
  if (parts < 1) parts = 1;
  std::vector<std::thread> threads;
  for (int64_t part = 1; part < parts; ++part) {
    threads.emplace_back(body, context, begin + length * part / parts,
                         begin + length * (part + 1) / parts);
  }
  if (length > 0) body(context, begin, begin + length / parts);
  for (std::thread& thread : threads) thread.join();
}

#if defined(ULTRAMEM_WITH_CUDA)
void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}
#endif

}  // namespace

void check(const ultramem::Status& status, const char* what) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + ": " + status.message);
}

Buffer::Buffer(Device& device, size_t bytes)
    : memory_(device.allocate(bytes), [&device](void* memory) { device.release(memory); }),
      bytes_(bytes) {}

Device::Device(bool is_cuda, int num_threads) : is_cuda_(is_cuda) {
  if (!is_cuda) {
    g_num_threads = num_threads;
    if (num_threads > 1) executor_ = {run_on_threads, num_threads};
    return;
  }
#if defined(ULTRAMEM_WITH_CUDA)
  check_cuda(cudaSetDevice(0), "cudaSetDevice");
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
#else
  throw std::runtime_error("--device cuda: this build of ultramem has no CUDA kernels");
#endif
}

Device::~Device() {
  workspace_ = Buffer();
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) cudaStreamDestroy(stream_);
#endif
}

void* Device::allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = nullptr;
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) {
    check_cuda(cudaMalloc(&memory, bytes), "cudaMalloc");
    check_cuda(cudaMemsetAsync(memory, 0, bytes, stream_), "cudaMemsetAsync");
    return memory;
  }
#endif
  memory = std::calloc(bytes, 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void Device::release(void* memory) noexcept {
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) {
    cudaFree(memory);  // waits for the stream
    return;
  }
#endif
  std::free(memory);
}

void Device::copy_in(void* on_device, const void* on_host, size_t bytes) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) {
    check_cuda(cudaMemcpyAsync(on_device, on_host, bytes, cudaMemcpyHostToDevice, stream_),
               "cudaMemcpyAsync");
    return check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
#endif
  std::memcpy(on_device, on_host, bytes);
}

void Device::copy_out(void* on_host, const void* on_device, size_t bytes) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) {
    check_cuda(cudaMemcpyAsync(on_host, on_device, bytes, cudaMemcpyDeviceToHost, stream_),
               "cudaMemcpyAsync");
    // Errors of kernels, too, come to light here.
    return check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
#endif
  std::memcpy(on_host, on_device, bytes);
}

void Device::rms_norm_fwd(const ultramem::RmsNormParams& params) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) return check(ultramem::cuda::rms_norm_fwd(params, stream_), "rms_norm_fwd");
#endif
  check(ultramem::cpu::rms_norm_fwd(params, executor_), "rms_norm_fwd");
}

void Device::tucker_filter(const ultramem::TuckerFilterParams& params) {
#if defined(ULTRAMEM_WITH_CUDA)
  if (is_cuda_) return check(ultramem::cuda::tucker_filter(params, stream_), "tucker_filter");
#endif
  check(ultramem::cpu::tucker_filter(params), "tucker_filter");
}

void* Device::workspace(size_t bytes) {
  if (bytes > workspace_.bytes()) workspace_ = Buffer(*this, bytes);
  return workspace_.data();
}
