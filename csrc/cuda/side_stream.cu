#include "side_stream.h"

#include <array>

#include "common.cuh"

namespace ultramem::cuda {
namespace {

// One of the current device for each host thread: two threads that record into the same stream
// while one of them captures would disturb each other. Never destroyed, for threads end after the
// driver has.
Status side_stream(cudaStream_t* stream) {
  constexpr int kMaxDevices = 64;
  thread_local std::array<cudaStream_t, kMaxDevices> streams{};
  int device = 0;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  if (device >= kMaxDevices) return Status::invalid_argument("more than 64 devices");
  cudaStream_t& own = streams[device];
  if (own == nullptr) {
    // Ahead of the other stream's blocks, which would leave small kernels no room.
    int least = 0, greatest = 0;
    ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    ULTRAMEM_CUDA_RETURN_IF_ERROR(
        cudaStreamCreateWithPriority(&own, cudaStreamNonBlocking, greatest));
  }
  *stream = own;
  return {};
}

// `then` goes on behind what `first` holds.
Status order(cudaStream_t first, cudaStream_t then) {
  cudaEvent_t event = nullptr;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  Status status = to_status(cudaEventRecord(event, first));
  if (status.ok()) status = to_status(cudaStreamWaitEvent(then, event, 0));
  // Whoever waits for it goes on to do so.
  const Status destroyed = to_status(cudaEventDestroy(event));
  return status.ok() ? destroyed : status;
}

}  // namespace

Status SideStream::fork() {
  ULTRAMEM_RETURN_IF_ERROR(side_stream(&side_));
  return order(main_, side_);
}

Status SideStream::join() { return order(side_, main_); }

}  // namespace ultramem::cuda
