// Cross-entropy over rows that carry a label. Shared by masked_cross_entropy and masked_linear_cross_entropy.
//
// With z = softcap * tanh(logits / softcap) (or the logits), m = max z, s = log(sum exp(z - m)), y the label:
//     loss = (1 - smoothing) * (s - (z_y - m)) + smoothing * (s - mean(z - m)) + z_loss * (m + s)^2
#pragma once

#include "reca/types.h"

namespace reca {

struct CrossEntropy {
  DType dtype;
  const void* logits;  // [rows, classes], elements of a row side by side
  int64_t row_stride;
  int64_t rows, classes;
  const void* labels;  // [rows]
  bool labels_are_int64;
  int64_t ignore_index;
  float label_smoothing, z_loss;
  float softcap;  // 0: none
  int threads;
};

// losses [rows]: 0 without a label, NaN with one outside [0, classes). stats [rows, 2]: m and s.
void masked_cross_entropy_forward(const CrossEntropy& args, float* losses, float* stats);

// gradient [rows, classes] in the dtype of the logits; may be the logits themselves. Row r is scaled by
// scale * grad[r * grad_stride].
void masked_cross_entropy_backward(const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride,
                                   float scale, void* gradient, int64_t gradient_stride);

// Both at once, while a row is in the cache, for rows that all carry a label. gradient may be the logits themselves, or
// null: losses only. Row r is scaled by scale, and by grad[r] when grad is not null.
void masked_linear_cross_entropy_rows(const CrossEntropy& args, float* losses, const float* grad, float scale,
                                      void* gradient, int64_t gradient_stride);

}  // namespace reca
