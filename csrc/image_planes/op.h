// Splits the interleaved channels of an 8-bit image, as decoders return it, into planes.
#pragma once

#include "common/types.h"

namespace reca {

// Channel c of pixel x of row y of `image` is at y * row + x * step + c, with step 3 or 4; a fourth byte is skipped.
// out [3, height, width].
void image_planes(const uint8_t* image, int64_t height, int64_t width, int64_t row, int64_t step, uint8_t* out,
                  Launch on);

}  // namespace reca
