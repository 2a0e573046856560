// Resizing of 8-bit RGB images in Pillow's integer arithmetic, bit-identical to Pillow.
#pragma once

#include "common/types.h"

namespace reca {

// The filter along one dimension: output i is the sum over t < count[i] of weights[i * taps + t] * input[first[i] + t].
// Weights have 22 fractional bits.
struct Taps {
  const int32_t *first, *count, *weights;
  int64_t outputs, taps;
};

// Channel c of pixel x of row y is at y * row + x * 3 + c if `interleaved`, else at y * row + x + c * plane.
// out [3, rows.outputs, columns.outputs]. `columns` filters horizontally and `rows` vertically; each pass rounds to 8
// bits. down_first: the vertical pass is first.
void resize_rgb(const uint8_t* image, int64_t row, int64_t plane, bool interleaved, const Taps& columns,
                const Taps& rows, bool down_first, uint8_t* out, Launch on);

}  // namespace reca
