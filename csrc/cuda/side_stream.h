// Work that runs beside what a stream goes on with.
#pragma once

#include <cuda_runtime.h>

#include "ultramem/types.h"

namespace ultramem::cuda {

// Begins behind what `stream` holds when it is made; `join` lets the stream wait for it, and must
// be called, also where something failed in between. It is the stream itself where the side's is
// part of another capture. May be captured in a graph together with the
// stream. Memory that both use must live until `stream` is behind the join.
class SideStream {
 public:
  explicit SideStream(cudaStream_t stream) : main_(stream) {}
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  Status fork();
  cudaStream_t get() const { return side_; }
  Status join();

 private:
  cudaStream_t main_;
  cudaStream_t side_ = nullptr;
};

}  // namespace ultramem::cuda
