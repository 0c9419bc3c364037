// Common types of the public C++ API: element types, status, streams, the CPU executor.
//
// The headers of this directory know neither torch nor Python nor CUDA. Every operator is one POD
// parameter struct (the backward's extends the forward's) and one function per backend. Pointers
// are to contiguous row-major memory on the backend's device unless a comment says otherwise;
// sizes are in elements, 64-bit.
#pragma once

#include <cstddef>
#include <cstdint>

// cudaStream_t without the CUDA headers.
struct CUstream_st;

namespace ultramem {

// Bumped whenever a struct or a function of these headers changes its layout or meaning.
inline constexpr int kApiVersion = 5;

inline constexpr int kMaxTuckerRank = 4;
inline constexpr int kMaxNumCores = 4;
inline constexpr int kMaxAxisTopk = 128;
inline constexpr int kMaxTopk = 1024;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Accumulation type: float64 for float64, float32 for everything else.
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

enum class Activation : int32_t { kIdentity = 0, kGelu = 1, kRelu = 2, kSilu = 3 };

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // a shape, dtype or option the operator does not offer
  kOutOfRange = 2,       // an index outside its range (CPU, or CUDA with checking)
  kOutOfMemory = 3,
  kCudaError = 4,  // `cuda_error` holds the cudaError_t
};

// What every operator returns. `message` points to static storage.
struct Status {
  StatusCode code = StatusCode::kOk;
  int32_t cuda_error = 0;
  const char* message = "";

  bool ok() const { return code == StatusCode::kOk; }
  static Status invalid_argument(const char* message) {
    return {StatusCode::kInvalidArgument, 0, message};
  }
};

using Stream = CUstream_st*;

// How CPU operators run in parallel. `parallel_for` calls body(context, first, last) on
// disjoint ranges that cover [begin, end), each of at least `grain` elements where possible, and
// returns when all are done; `num_threads` bounds how many run at once. A default-constructed
// executor runs everything on the calling thread.
struct Executor {
  using Body = void (*)(void* context, int64_t first, int64_t last);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body,
                       void* context) = nullptr;
  int32_t num_threads = 1;
};

}  // namespace ultramem
