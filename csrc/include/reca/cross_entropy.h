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

namespace cuda {

// As above; losses and stats are written for every row. scale is on the device.
void masked_cross_entropy_forward(const CrossEntropy& args, float* losses, float* stats, Launch on);
void masked_cross_entropy_backward(const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride,
                                   const float* scale, void* gradient, int64_t gradient_stride, Launch on);

// loss []: the sum of losses [rows], or their mean over the rows that carry a label. scale []: 1, or 1 / their number.
void reduce_losses(const float* losses, const void* labels, bool labels_are_int64, int64_t rows, int64_t ignore_index,
                   bool mean, float* loss, float* scale, Launch on);

// Rows of logits as chunked_head.py asks for them (reca_kernels/chunked_head.py says what these do).
struct HeadRows {
  void* logits;  // [count, pitch], whole units of 16 bytes; becomes the gradient
  int64_t pitch, count, classes;
  const void* bias;        // [pitch] in the dtype of the logits, or null
  const int64_t* labels;   // [count]
  const int64_t* rows;     // [count]: where a row's loss goes; -1: nowhere
  const float* row_grad;   // by row, or null
  const float* scale;      // []
  float* losses;           // by row
  float* dropped;          // by row, or null
  bool gradient;           // false: losses only
  int64_t low, high;       // the window, from and to whole units, or to the last class
};

void masked_linear_cross_entropy_rows(const HeadRows& args, const CrossEntropy& loss, Launch on);
void pick_rows(const void* labels, bool labels_are_int64, int64_t count, int64_t ignore_index, bool mean, int64_t most,
               float* losses, int64_t* rows, int64_t* row_labels, float* scale, Launch on);
void copy_rows(DType from, const void* source, int64_t source_stride, const int64_t* source_rows, DType to, void* out,
               int64_t out_stride, const int64_t* out_rows, int64_t count, int64_t width, Launch on);
void scale(DType dtype, const void* x, const float* factor, void* out, int64_t count, Launch on);

}  // namespace cuda

}  // namespace reca
