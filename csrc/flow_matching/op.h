// Rectified flow: x_t = (1 - t) x0 + t eps, target eps - x0, in the element order of the prediction.
#pragma once

#include "common/philox.h"
#include "common/types.h"

namespace reca {

// Images of one size that are contiguous in x0, and in x_t, pred and noise.
struct FlowRun {
  const void* x0;  // [images, channels, height, width]
  int64_t images;
  int64_t height, width;  // multiples of the patch
};

struct FlowRuns {
  const FlowRun* of;
  int64_t count;
};

struct FlowMatching {
  DType x0_dtype;
  int64_t channels, patch;
  const float* t;  // [images]; null for the loss
  NoiseAddress noise;
  const float* explicit_noise;  // null: generated from the address
  int64_t tiles;                // tiles per thread block on a GPU
};

constexpr int64_t flow_tile = 2048;  // elements per tile

}  // namespace reca

// On a GPU with patch > 1 an image may have up to 2^31 - 1 elements.
RECA_LAUNCHER(void flow_matching_add_noise(const FlowMatching& args, const FlowRuns& runs, DType dtype, void* x_t,
                                           Launch on))

// losses [images]: sum of squared errors per image. gradient: its derivative with respect to pred, in the dtype of
// pred, or null. partial: workspace of (elements / flow_tile + images) numbers.
RECA_LAUNCHER(void flow_matching_loss(const FlowMatching& args, const FlowRuns& runs, DType dtype, const void* pred,
                                      void* gradient, float* losses, double* partial, Launch on))
