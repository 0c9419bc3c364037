#include "side_stream.h"

#include <array>

#include "common.cuh"

namespace ultramem::cuda {
namespace {

// One of the current device for each host thread. Never destroyed, for threads end after the driver
// has.
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

// What a stream records into, 0 for none. One thread may run the backward of several streams, of
// which one is captured: the side stream is then part of that capture until it ends.
Status capture_of(cudaStream_t stream, unsigned long long* id) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  *id = 0;
  unsigned long long of_stream = 0;
  ULTRAMEM_CUDA_RETURN_IF_ERROR(cudaStreamGetCaptureInfo(stream, &status, &of_stream));
  if (status != cudaStreamCaptureStatusNone) *id = of_stream;
  return {};
}

}  // namespace

Status SideStream::fork() {
  side_ = main_;
  cudaStream_t side = nullptr;
  unsigned long long of_main = 0, of_side = 0;
  ULTRAMEM_RETURN_IF_ERROR(side_stream(&side));
  ULTRAMEM_RETURN_IF_ERROR(capture_of(main_, &of_main));
  ULTRAMEM_RETURN_IF_ERROR(capture_of(side, &of_side));
  if (of_side != 0 && of_side != of_main) return {};
  side_ = side;
  return order(main_, side_);
}

Status SideStream::join() {
  if (side_ == main_) return {};
  const Status status = order(side_, main_);
  // Whose memory it uses may then not know that it still does.
  if (!status.ok()) cudaStreamSynchronize(side_);
  return status;
}

}  // namespace ultramem::cuda
