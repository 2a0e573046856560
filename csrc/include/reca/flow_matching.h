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

namespace cuda {

// Images of one size that lie one after another, in x0 and in x_t, pred and noise.
struct FlowRun {
  const void* x0;          // [images, channels, height, width]
  int64_t images;
  int64_t height, width;   // multiples of the patch
};

struct FlowMatching {
  DType x0_dtype;
  const FlowRun* runs;
  int64_t count, channels, patch;
  const float* t;  // [images]
  DeviceNoise noise;
  const float* given_noise;  // null: drawn from the address
  int64_t tiles;             // that a block handles, one after another
};

constexpr int64_t flow_tile = 2048;  // elements

// With patch > 1 an image may have up to 2^31 - 1 elements.
void flow_matching_prepare(const FlowMatching& args, DType dtype, void* x_t, Launch on);

// partial: workspace of (elements / flow_tile + images) numbers.
void flow_matching_loss(const FlowMatching& args, DType dtype, const void* pred, void* gradient, float* losses,
                        float* partial, Launch on);

}  // namespace cuda

}  // namespace reca
