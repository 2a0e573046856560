// Gathers rows of several tables, adds them and writes the sum once; and the gradient of each table.
#pragma once

#include "common/types.h"

namespace reca {

struct Index {
  const void* data;  // int32 or int64
  bool is_int64;
  bool negated;  // row -1 - data[t] instead of data[t]
};

static RECA_HD int64_t row_at(const Index& index, int64_t t) {
  const int64_t value = index.is_int64 ? static_cast<const int64_t*>(index.data)[t]
                                       : int64_t(static_cast<const int32_t*>(index.data)[t]);
  return index.negated ? -1 - value : value;
}

struct Source {
  DType dtype;
  const void* rows;  // [count, width]
  int64_t row_stride;
  int64_t count;
  Index index;  // [length]; a negative row adds nothing
};

struct Sources {
  const Source* of;
  int64_t count;
};

struct SourceGradient {
  DType grad_dtype;
  const void* grad;  // [length, width]
  int64_t grad_stride, length, width;
  Index index;
  int64_t count;
  DType dtype;
  void* gradient;  // [count, width]
};

constexpr int64_t max_sources = 16;  // limit of the CUDA kernel

}  // namespace reca

// out [length, width]: the fp32 sum, in the order of the sources, rounded once. A single row is copied. A position
// whose row is beyond the last row of its source becomes NaN.
RECA_LAUNCHER(void template_concat_forward(const Sources& sources, int64_t length, int64_t width, DType out_dtype,
                                           void* out, Launch on))

namespace reca {

// Row k of the gradient is the fp32 sum, in order of t, of the rows t of grad that used row k.
// workspace: [count + 1 + length].
void template_concat_backward(const SourceGradient& gradient, int64_t* workspace, Launch on);

namespace cuda {

// The same for positions sorted by row, in chunks; reca_kernels/template_concat/row_gradients.py defines the order of
// sums. rows [length], ascending; places [length]; starts [count + 1]; sums [2 * windows of a chunk, width], or null if
// no row can have more than one chunk.
void template_concat_backward_sorted(const SourceGradient& gradient, const Index& rows, const int64_t* places,
                                     const int64_t* starts, float* sums, Launch on);

// For rows that are mostly used once. used: [2, count], zeros.
void template_concat_backward_mapped(const SourceGradient& gradient, uint64_t* used, Launch on);

}  // namespace cuda
}  // namespace reca
