#include "common/noise.cuh"
#include "op.h"

namespace reca::cuda {
namespace {

constexpr int threads = 256;

// A thread draws four elements.
template <Distribution distribution>
__global__ void __launch_bounds__(threads)
    philox_fill_kernel(const NoiseAddress noise, int64_t tasks, int64_t n, bool wide, float* __restrict__ out) {
  const int64_t task = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (task >= tasks) return;
  const int64_t blocks = (n + 3) / 4;
  int64_t sample, block;
  if (tasks <= 0xffffffff) {  // a 64-bit division costs more than the noise
    sample = uint32_t(task) / uint32_t(blocks), block = uint32_t(task) % uint32_t(blocks);
  } else {
    sample = task / blocks, block = task % blocks;
  }
  const Stream stream = stream_of(noise, sample);
  float x[4];
  if constexpr (distribution == Distribution::normal) {
    normals(stream, uint64_t(block), x);
  } else {
    uint32_t w[4];
    philox(stream, uint64_t(block), w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = distribution == Distribution::uniform ? uniform(w[i]) : __uint_as_float(w[i]);
    }
  }
  float* const to = out + sample * n + 4 * block;
  if (wide) {
    store(to, x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * block + i < n) to[i] = x[i];
    }
  }
}

}  // namespace

void philox_fill(const NoiseAddress& noise, int64_t samples, int64_t n, Distribution distribution, float* out,
                 Launch on) {
  const int64_t tasks = samples * ((n + 3) / 4);
  auto kernel = philox_fill_kernel<Distribution::normal>;
  if (distribution == Distribution::bits) kernel = philox_fill_kernel<Distribution::bits>;
  if (distribution == Distribution::uniform) kernel = philox_fill_kernel<Distribution::uniform>;
  launch("philox", on, kernel, (tasks + threads - 1) / threads, threads, 0, noise, tasks, n,
         n % 4 == 0 && aligned(out, 16), out);
}

}  // namespace reca::cuda
