// Element types and places of work, as launchers see them.
#pragma once

#include <cstdint>

namespace reca {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Where a launcher works: on the host with so many threads, or on a CUDA device, in one of its streams.
struct Launch {
  int device;    // the device's number; -1: the host
  void* stream;  // a cudaStream_t
  int threads;   // of the host
};

}  // namespace reca

// Declares a launcher in namespace reca, which runs on the host, and its twin in reca::cuda. Tensors are addresses there.
#define RECA_LAUNCHER(...) \
  namespace reca {         \
  __VA_ARGS__;             \
  }                        \
  namespace reca::cuda {   \
  __VA_ARGS__;             \
  }
