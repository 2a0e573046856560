// Rows of several tables gathered, added and written once; and the reverse, each table's gradient.
#pragma once

#include "reca/types.h"

namespace reca {

struct Index {
  const void* data;  // int32 or int64
  bool is_int64;
  bool flipped;  // row -1 - data[t] instead of data[t]
};

struct Source {
  DType dtype;
  const void* rows;  // [count, width]
  int64_t row_stride;
  int64_t count;
  Index index;  // [length]; a negative row adds nothing
};

// The first (position, source) whose row is not below the source's count, as position * sources + source; -1: none.
int64_t template_concat_check(const Source* sources, int n, int64_t length);

// out [length, width]: the sum, in the order of the sources, in fp32, rounded once. One row without a sum is copied.
void template_concat_forward(const Source* sources, int n, int64_t length, int64_t width, DType out_dtype, void* out,
                             int threads);

// gradient [count, width]: row k is the fp32 sum, in order of t, of the rows t of grad [length, width] that used row k.
// workspace: int64 [count + 1 + length].
void template_concat_backward(DType grad_dtype, const void* grad, int64_t grad_stride, int64_t length, int64_t width,
                              Index index, int64_t count, DType dtype, void* gradient, int64_t* workspace, int threads);

namespace cuda {

constexpr int max_sources = 16;

// The same on a GPU. A position whose row is not below its source's count becomes NaN.
void template_concat_forward(const Source* sources, int n, int64_t length, int64_t width, DType out_dtype, void* out,
                             Launch on);

struct Gradient {  // of one source
  DType grad_dtype;
  const void* grad;  // [length, width]
  int64_t grad_stride, length, width;
  Index index;
  int64_t count;
  DType dtype;
  void* gradient;  // [count, width]
};

// What reca_kernels/template_concat/row_gradients.py has sorted, and room for what does not fit one chunk.
struct Places {
  Index rows;             // [length], ascending
  const int64_t* places;  // [length]
  const int64_t* starts;  // [count + 1]
  float* sums;            // [2 * windows of a chunk, width]; null where no row can have more than one chunk
};

void template_concat_backward(const Gradient& gradient, const Places& places, Launch on);

// For rows that most likely are used once. used: [2, count], zeros.
void template_concat_backward(const Gradient& gradient, uint64_t* used, Launch on);

}  // namespace cuda

}  // namespace reca
