// Rectified flow: x_t = (1 - t) x0 + t eps, target eps - x0, in the element order of the prediction.
#pragma once

#include "philox.h"
#include "reca/types.h"

namespace reca {

struct FlowImage {
  const void* x0;        // [channels, height, width]
  int64_t height, width; // multiples of the patch
  int64_t offset;        // of its first element in x_t, pred and noise
};

struct FlowMatching {
  DType x0_dtype;
  const FlowImage* images;
  int64_t count, channels, patch;
  const float* t;  // [count]
  NoiseAddress noise;
  DType noise_dtype;
  const void* given_noise;  // null: drawn from the address
  int threads;
};

void flow_matching_prepare(const FlowMatching& args, DType dtype, void* x_t);

// losses [count]: sum of squared errors per image. gradient: its derivative by pred, in the dtype of pred, or null.
// partial: workspace of flow_matching_chunks(args) numbers.
void flow_matching_loss(const FlowMatching& args, DType dtype, const void* pred, void* gradient, float* losses,
                        double* partial);

int64_t flow_matching_chunks(const FlowMatching& args);

}  // namespace reca
