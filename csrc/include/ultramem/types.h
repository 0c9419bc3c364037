// Common types of the public C++ API: element types, status, streams, the CPU executor.
//
// The headers of this directory know neither torch nor Python nor CUDA. Every operator is one POD
// parameter struct (the backward's extends the forward's) and one function per backend. docs/cpp.md
// is the manual. What holds for all of them, unless a comment says otherwise:
//
// Pointers are to contiguous row-major memory on the backend's device, aligned to their elements
// at least; to 16 bytes, which the vectorised kernels ask for, everything is faster. Sizes are in
// elements, 64-bit. Inputs and outputs must not overlap. Memory stays the caller's.
//
// Workspace. `op_workspace(params)` says how many bytes of scratch memory `op(params)` needs at
// `params.workspace`, for the same sizes, dtypes and pointers (the workspace's apart), on the
// current device or with the same executor; 0 also where the parameters are invalid. Of 0 bytes the
// pointer may be null. On CUDA it is aligned to 256 bytes, as cudaMalloc aligns; on the CPU it may
// start anywhere. Its contents need no initialisation and mean nothing afterwards. Two calls that
// may run at once need two.
//
// Errors. Functions throw nothing and return a Status. Shapes, dtypes and options are checked
// before anything is written; pointers are checked for null only where null has a meaning or sizes
// alone would not tell. After any other failure outputs hold anything.
//
// Streams. Functions of `cuda` launch on `stream`, whose device must be current, and return without
// waiting for it; memory must live until the stream has come past it. They allocate nothing on the
// device, so that CUDA graphs may capture them; a graph replays with the pointers and sizes of its
// capture. float64 is offered on the CPU only. Functions of `cpu` return when all is done.
//
// Threads. Every function may be called from several host threads at once, on memory of their own.
// A call repeats bit for bit on the same device or, on the CPU, instruction set and number of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ultramem/version.h"

// cudaStream_t without the CUDA headers.
struct CUstream_st;

namespace ultramem {
inline namespace ULTRAMEM_API {

inline constexpr int kMaxTuckerRank = 4;
inline constexpr int kMaxNumCores = 4;
inline constexpr int kMaxAxisTopk = 128;
inline constexpr int kMaxTopk = 1024;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Accumulation type: float64 for float64, float32 for everything else.
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// In bytes.
constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// kGelu is the exact one (erf).
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
// executor runs everything on the calling thread. The body throws nothing.
struct Executor {
  using Body = void (*)(void* context, int64_t first, int64_t last);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body,
                       void* context) = nullptr;
  int32_t num_threads = 1;
};

}  // namespace ULTRAMEM_API
}  // namespace ultramem
