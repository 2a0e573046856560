#include "common/noise.h"
#include "common/parallel.h"
#include "op.h"

namespace reca::RECA_ISA {

constexpr int64_t chunk = 4096;  // elements; a multiple of 4 W for every W

template <Distribution distribution>
static void fill(const NoiseAddress& noise, int64_t samples, int64_t n, float* out, int threads) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  parallel_for(samples * chunks, threads, [&](int64_t task) {
    const int64_t sample = task / chunks, begin = task % chunks * chunk;
    const int64_t count = n - begin < chunk ? n - begin : chunk;
    float buffer[chunk];
    draw<distribution>(noise, sample, begin, count, buffer);
    std::memcpy(out + sample * n + begin, buffer, count * sizeof(float));
  });
}

void philox_fill(const NoiseAddress& noise, int64_t samples, int64_t n, Distribution distribution, float* out,
                 Launch on) {
  switch (distribution) {
    case Distribution::bits: return fill<Distribution::bits>(noise, samples, n, out, on.threads);
    case Distribution::uniform: return fill<Distribution::uniform>(noise, samples, n, out, on.threads);
    case Distribution::normal: return fill<Distribution::normal>(noise, samples, n, out, on.threads);
  }
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(philox_fill,
              (const NoiseAddress& noise, int64_t samples, int64_t n, Distribution distribution, float* out, Launch on),
              (noise, samples, n, distribution, out, on))
