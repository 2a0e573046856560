// Element types as the launchers see them.
#pragma once

#include <cstdint>

namespace reca {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Where a CUDA launcher puts its work: the device's number and one of its streams (a cudaStream_t).
struct Launch {
  int device;
  void* stream;
};

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

}  // namespace reca
