// Counter-based random numbers as tensors.
#pragma once

#include "common/philox.h"
#include "common/types.h"

// out [samples, n]: float numbers, or uint32 words for Distribution::bits.
RECA_LAUNCHER(void philox_fill(const NoiseAddress& noise, int64_t samples, int64_t n, Distribution distribution,
                               float* out, Launch on))
