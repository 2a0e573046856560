// Arguments of launchers: element types, and where to run.
#pragma once

#include <cstdint>

// A function of host and device. It is declared static as well: every CPU file then compiles its own copy, for its
// instruction set.
#ifdef __CUDACC__
#define RECA_HD __host__ __device__ __forceinline__
#else
#define RECA_HD inline
#endif

namespace reca {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Where a launcher runs: on the host with `threads` threads, or on a CUDA device in `stream`.
struct Launch {
  int device;    // index of the device; -1: the host
  void* stream;  // a cudaStream_t
  int threads;   // on the host
};

}  // namespace reca

// Declares a launcher in namespace reca, which runs on the host, and in reca::cuda, which runs on a device.
#define RECA_LAUNCHER(...) \
  namespace reca {         \
  __VA_ARGS__;             \
  }                        \
  namespace reca::cuda {   \
  __VA_ARGS__;             \
  }
