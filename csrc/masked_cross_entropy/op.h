// Cross-entropy over the rows that carry a label. Also used by masked_linear_cross_entropy.
//
// With z = softcap * tanh(logits / softcap), or z = logits without a softcap, m = max z, s = log(sum exp(z - m)), and
// the label y:
//     loss = (1 - smoothing) * (s - (z_y - m)) + smoothing * (s - mean(z - m)) + z_loss * (m + s)^2
#pragma once

#include "common/types.h"

namespace reca {

// Logits are summed at this scale: exact, as a power of two, and neither a difference of two fp32 numbers nor a sum of
// 2^31 of these overflows.
constexpr float sum_scale = 0x1p-33f;

struct CrossEntropy {
  DType dtype;
  const void* logits;  // [rows, classes], rows contiguous
  int64_t row_stride;
  int64_t rows, classes;
  const void* labels;  // [rows]
  bool labels_are_int64;
  int64_t ignore_index;
  float label_smoothing, z_loss;
  float softcap;  // 0: none
};

static RECA_HD int64_t label_of(const void* labels, bool are_int64, int64_t row) {
  return are_int64 ? static_cast<const int64_t*>(labels)[row] : static_cast<const int32_t*>(labels)[row];
}

// Returns the loss of a row with label smoothing, without z_loss. sum_z: of sum_scale * (z - pivot). In double, since
// differences of fp32 logits may be beyond its range.
static RECA_HD float smoothed_loss(double log_sum_exp, double row_max, double z_label, double sum_z, double pivot,
                                   int64_t classes, double smoothing) {
  const double mean = sum_z / (double(sum_scale) * double(classes)) + (pivot - row_max);  // of z - row_max
  return float((1 - smoothing) * (log_sum_exp - (z_label - row_max)) + smoothing * (log_sum_exp - mean));
}

}  // namespace reca

// losses [rows]: 0 without a label, NaN for a label outside [0, classes). stats [rows, 2]: m and s, 0 without a label.
RECA_LAUNCHER(void masked_cross_entropy_forward(const CrossEntropy& args, float* losses, float* stats, Launch on))

// gradient [rows, classes] in the dtype of the logits; may be the logits themselves. Row r is scaled by
// scale * grad[r * grad_stride].
RECA_LAUNCHER(void masked_cross_entropy_backward(const CrossEntropy& args, const float* stats, const float* grad,
                                                 int64_t grad_stride, const float* scale, void* gradient,
                                                 int64_t gradient_stride, Launch on))

// loss []: the sum of losses [rows], or with `mean` their mean over the rows that carry a label. scale []: 1, or the
// reciprocal of the number of these rows.
RECA_LAUNCHER(void reduce_losses(const float* losses, const void* labels, bool labels_are_int64, int64_t rows,
                                 int64_t ignore_index, bool mean, float* loss, float* scale, Launch on))
