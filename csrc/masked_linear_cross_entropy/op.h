// The kernels between the matmuls of reca_kernels/masked_linear_cross_entropy/linear_chunks.py.
#pragma once

#include "masked_cross_entropy/op.h"

// Both passes over the rows of a chunk: writes losses[rows[i]] of logits[i] + bias and, with `gradient`, overwrites the
// logits with their gradient, scaled by *scale, and by row_grad[rows[i]] if row_grad is not null. Rows with index -1
// are padding: no loss, gradient 0. A label outside [0, classes) gives loss NaN and gradient 0.
// bias [row_stride] in the dtype of the logits, or null. On devices labels are int64 and row_stride is a multiple of 16
// bytes.
RECA_LAUNCHER(void row_gradients(const CrossEntropy& args, const int64_t* rows, const void* bias, const float* row_grad,
                                 const float* scale, float* losses, bool gradient, Launch on))

namespace reca::cuda {

// rows, row_labels [most]: the rows that carry a label, in order, padded with -1 and ignore_index.
// losses [count]: 0, and NaN for a labelled row beyond the first `most`. scale []: 1, or with `mean` 1 / number of labels.
void compact_labelled_rows(const void* labels, bool labels_are_int64, int64_t count, int64_t ignore_index, bool mean,
                           int64_t most, float* losses, int64_t* rows, int64_t* row_labels, float* scale, Launch on);

// out[out_rows[i]] = source[source_rows[i]]. Source row -1 reads zeros, out row -1 is skipped; null rows stand for i.
void gather_scatter_rows(DType from, const void* source, int64_t source_stride, const int64_t* source_rows, DType to,
                         void* out, int64_t out_stride, const int64_t* out_rows, int64_t count, int64_t width, Launch on);

// out [count] = x [count] * *factor, in fp32, rounded once. out may be x; a *factor of 1 then returns at once.
void scale(DType dtype, const void* x, const float* factor, void* out, int64_t count, Launch on);

}  // namespace reca::cuda
