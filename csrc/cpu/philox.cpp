#include "reca/noise.h"

#include "noise.h"
#include "parallel.h"

namespace reca::RECA_ISA {

constexpr int64_t chunk = 4096;  // elements; a multiple of 4 W for every W

template <Law law>
static void fill(const NoiseAddress& noise, int64_t samples, int64_t n, float* out, int threads) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  parallel_for(samples * chunks, threads, [&](int64_t task) {
    const int64_t sample = task / chunks, begin = task % chunks * chunk;
    const int64_t count = n - begin < chunk ? n - begin : chunk;
    float buffer[chunk];
    draw<law>(noise, sample, begin, count, buffer);
    std::memcpy(out + sample * n + begin, buffer, count * sizeof(float));
  });
}

void philox_fill(const NoiseAddress& noise, int64_t samples, int64_t n, int law, float* out, int threads) {
  if (law == 0) fill<Law::bits>(noise, samples, n, out, threads);
  if (law == 1) fill<Law::uniform>(noise, samples, n, out, threads);
  if (law == 2) fill<Law::normal>(noise, samples, n, out, threads);
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(void, philox_fill,
              (const NoiseAddress& noise, int64_t samples, int64_t n, int law, float* out, int threads),
              (noise, samples, n, law, out, threads))
