// Counter-based random numbers as tensors.
#pragma once

#include "philox.h"
#include "reca/types.h"

namespace reca {

// out [samples, n]: float numbers, or uint32 words where law is 0. law: 0 bits, 1 uniform in [0, 1), 2 standard normal.
void philox_fill(const NoiseAddress& noise, int64_t samples, int64_t n, int law, float* out, int threads);

namespace cuda {
void philox_fill(const DeviceNoise& noise, int64_t samples, int64_t n, int law, float* out, Launch on);
}

}  // namespace reca
