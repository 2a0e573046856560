// Resizing of 8-bit RGB images by the integer arithmetic of Pillow: the same bits.
#pragma once

#include "common/types.h"

namespace reca {

// The filter along one side: output i is the sum over t < count[i] of weights[i * taps + t] * input[first[i] + t], with
// 22 bits behind the point.
struct Taps {
  const int32_t *first, *count, *weights;
  int64_t outputs, taps;
};

// Channel c of pixel x of row y is at y * row + x * 3 + c if `interleaved`, else at y * row + x + c * plane.
// out [3, rows.outputs, columns.outputs]. Each of the two passes rounds to 8 bits: `columns` goes along the rows of the
// image, `rows` down its columns; down_first: that one comes first.
void resize_rgb(const uint8_t* image, int64_t row, int64_t plane, bool interleaved, const Taps& columns,
                const Taps& rows, bool down_first, uint8_t* out, Launch on);

}  // namespace reca
