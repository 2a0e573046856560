#include "common/isa.h"
#include "op.h"

namespace reca::RECA_ISA {

// The step is a constant, with which the compiler vectorises the loop.
template <int64_t step>
static void split(const uint8_t* __restrict__ pixels, int64_t count, uint8_t* __restrict__ red,
                  uint8_t* __restrict__ green, uint8_t* __restrict__ blue) {
  for (int64_t i = 0; i < count; ++i) {
    red[i] = pixels[step * i];
    green[i] = pixels[step * i + 1];
    blue[i] = pixels[step * i + 2];
  }
}

void image_planes(const uint8_t* image, int64_t height, int64_t width, int64_t row, int64_t step, uint8_t* out,
                  Launch) {
  const auto split_row = step == 4 ? split<4> : split<3>;
  const int64_t plane = height * width;
  for (int64_t y = 0; y < height; ++y, image += row, out += width) {
    split_row(image, width, out, out + plane, out + 2 * plane);
  }
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(image_planes,
              (const uint8_t* image, int64_t height, int64_t width, int64_t row, int64_t step, uint8_t* out, Launch on),
              (image, height, width, row, step, out, on))
