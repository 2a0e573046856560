// A thread handles eight consecutive elements in the order of the prediction: two Philox blocks, and 16 bytes of 16-bit
// elements. A block handles some tiles of one image and writes one partial sum of the loss; a second kernel adds an
// image's partial sums in a fixed order.
#include <algorithm>

#include "common/noise.cuh"
#include "op.h"

namespace reca::cuda {
namespace {

constexpr int threads = 256, mine = 8;  // mine: elements per thread
constexpr int most_runs = 32;           // most runs that fit into a kernel's parameters
static_assert(threads * mine == flow_tile);

// Division by a launch-time constant, for dividends below 2^31 (Granlund, Montgomery 1994).
struct Divisor {
  uint32_t number, multiplier, shift;
  Divisor() = default;
  explicit Divisor(int64_t d) : number(uint32_t(std::max<int64_t>(d, 1))), shift(0) {
    while ((uint64_t(1) << shift) < number) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - number)) / number + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  __device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t& rest) const {
    const uint32_t q = divide(n);
    rest = n - q * number;
    return q;
  }
};

struct Run {
  const void* x0;
  int64_t elements, offset;        // per image; of the first image in x_t, pred and noise
  uint32_t first_block, first_image, images;
  uint32_t width, plane;           // of x0, for patches
  Divisor blocks, columns;         // blocks per image; patches per row of patches
};

struct Work {
  DType x0_dtype, dtype;
  int count;               // runs
  uint32_t blocks, tiles;  // total blocks, tiles per block
  uint32_t patch, channels;
  Divisor by_channels, by_patch, by_patch_area;
  NoiseAddress noise;
  const float* explicit_noise;
  Run runs[most_runs];
};
static_assert(sizeof(Work) < 4000);

// The elements of a block: `begin` to `end` of one image.
struct Part {
  const Run* run;
  uint32_t image, image_of_run;
  int64_t begin, end, offset;  // offset: of the image in x_t, pred and noise
};

__device__ __forceinline__ Part part_of(const Work& work, uint32_t block) {
  int r = 0;
  while (r + 1 < work.count && block >= work.runs[r + 1].first_block) ++r;
  const Run& run = work.runs[r];
  uint32_t inner;
  const uint32_t image = run.blocks.divide(block - run.first_block, inner);
  const int64_t begin = int64_t(inner) * work.tiles * flow_tile;
  const int64_t end = begin + int64_t(work.tiles) * flow_tile;
  return {&run, run.first_image + image, image, begin, end < run.elements ? end : run.elements,
          run.offset + image * run.elements};
}

// The offset in x0 of element `i` of the prediction: patches in row-major order, inside a patch (row, column, channel).
__device__ __forceinline__ int64_t place(const Work& work, const Run& run, int64_t i) {
  if (work.patch == 1) return i;
  uint32_t channel, pixel, row, column;
  const uint32_t token = work.by_patch_area.divide(work.by_channels.divide(uint32_t(i), channel), pixel);
  const uint32_t y = work.by_patch.divide(pixel, column), line = run.columns.divide(token, row);
  // `line` is the row of patches, and `row` the index of the patch within it.
  return channel * run.plane + (line * work.patch + y) * run.width + row * work.patch + column;
}

// Computes the noise of the eight elements of the image from `i` on.
__device__ __forceinline__ void noise_of(const Work& work, const Stream& stream, int64_t i, float (&x)[mine]) {
  normals(stream, uint64_t(i) / 4, x);
  normals(stream, uint64_t(i) / 4 + 1, x + 4);
}

// Calls body(i, fetched, x0, noise) for every eight consecutive elements of this thread. fetched is fetch(i), called
// before the noise is generated so that loads overlap with it. With patches, the eight elements are channels of one
// pixel.
template <typename X, bool patches, typename Fetch, typename Body>
__device__ __forceinline__ void for_vectors(const Work& work, const Part& part, const Fetch& fetch, const Body& body) {
  const X* const x0 = static_cast<const X*>(part.run->x0) + part.image_of_run * part.run->elements;
  const Stream stream = work.explicit_noise ? Stream{} : stream_of(work.noise, part.image);
#pragma unroll 1
  for (int64_t i = part.begin + threadIdx.x * mine; i < part.end; i += flow_tile) {
    float x[mine], eps[mine];
    const auto fetched = fetch(i);
    if constexpr (patches) {
      const X* const from = x0 + place(work, *part.run, i);
#pragma unroll
      for (int k = 0; k < mine; ++k) x[k] = widen(from[int64_t(k) * part.run->plane]);
    } else {
      load(x0 + i, x);
    }
    if (work.explicit_noise) {
      load(work.explicit_noise + part.offset + i, eps);
    } else {
      noise_of(work, stream, i, eps);
    }
    body(i, fetched, x, eps);
  }
}

// Calls body(i, x0, noise) for each element of this thread, for any types, alignment and sizes.
template <typename Body>
__device__ __forceinline__ void for_elements(const Work& work, const Part& part, const Body& body) {
  const int64_t first = part.image_of_run * part.run->elements;
  const Stream stream = work.explicit_noise ? Stream{} : stream_of(work.noise, part.image);
#pragma unroll 1
  for (int64_t i = part.begin + threadIdx.x * 4; i < part.end; i += threads * 4) {
    float eps[4];
    if (!work.explicit_noise) normals(stream, uint64_t(i) / 4, eps);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k >= part.end) break;
      const float x = read(work.x0_dtype, part.run->x0, first + place(work, *part.run, i + k));
      body(i + k, x, work.explicit_noise ? work.explicit_noise[part.offset + i + k] : eps[k]);
    }
  }
}

__device__ __forceinline__ float mixed(float t, float x0, float noise) {
  return add(mul(add(1.0f, -t), x0), mul(t, noise));
}

template <typename X, typename P, bool patches>
__global__ void __launch_bounds__(threads)
    flow_add_noise_kernel(const __grid_constant__ Work work, const float* __restrict__ t, P* __restrict__ x_t) {
  const Part part = part_of(work, blockIdx.x);
  const float level = t[part.image];
  const auto nothing = [](int64_t) { return 0; };
  for_vectors<X, patches>(work, part, nothing, [&](int64_t i, int, float (&x)[mine], const float (&eps)[mine]) {
#pragma unroll
    for (int k = 0; k < mine; ++k) x[k] = mixed(level, x[k], eps[k]);
    store(x_t + part.offset + i, x);
  });
}

__global__ void __launch_bounds__(threads)
    flow_add_noise_any_kernel(const __grid_constant__ Work work, const float* __restrict__ t, void* __restrict__ x_t) {
  const Part part = part_of(work, blockIdx.x);
  const float level = t[part.image];
  for_elements(work, part, [&](int64_t i, float x, float eps) {
    write(work.dtype, x_t, part.offset + i, mixed(level, x, eps));
  });
}

// pred - (noise - x0). The gradient is twice this.
__device__ __forceinline__ float error(float pred, float x0, float noise) { return add(pred, add(x0, -noise)); }

template <typename X, typename P, bool patches>
__global__ void __launch_bounds__(threads)
    flow_loss_kernel(const __grid_constant__ Work work, const P* __restrict__ pred, P* __restrict__ gradient,
                     float* __restrict__ partial) {
  const Part part = part_of(work, blockIdx.x);
  float sum = 0;
  struct Guess {
    float v[mine];
  };
  const auto guess_at = [&](int64_t i) {
    Guess guess;
    load(pred + part.offset + i, guess.v);
    return guess;
  };
  const auto body = [&](int64_t i, const Guess& guess, float (&x)[mine], const float (&eps)[mine]) {
#pragma unroll
    for (int k = 0; k < mine; ++k) {
      const float d = error(guess.v[k], x[k], eps[k]);
      sum = __fmaf_rn(d, d, sum);
      x[k] = d + d;
    }
    if (gradient) store(gradient + part.offset + i, x);
  };
  for_vectors<X, patches>(work, part, guess_at, body);
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(threads)
    flow_loss_any_kernel(const __grid_constant__ Work work, const void* __restrict__ pred, void* __restrict__ gradient,
                         float* __restrict__ partial) {
  const Part part = part_of(work, blockIdx.x);
  float sum = 0;
  for_elements(work, part, [&](int64_t i, float x, float eps) {
    const float d = error(read(work.dtype, pred, part.offset + i), x, eps);
    sum = __fmaf_rn(d, d, sum);
    if (gradient) write(work.dtype, gradient, part.offset + i, d + d);
  });
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Each block adds the partial sums of one image.
__global__ void __launch_bounds__(threads)
    flow_total_kernel(const __grid_constant__ Work work, const float* __restrict__ partial, float* __restrict__ losses) {
  const uint32_t image = work.runs[0].first_image + blockIdx.x;
  int r = 0;
  while (r + 1 < work.count && image >= work.runs[r + 1].first_image) ++r;
  const Run& run = work.runs[r];
  const int64_t blocks = run.elements ? run.blocks.number : 0;
  const float* const mine_first = partial + run.first_block + (image - run.first_image) * blocks;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += threads) sum += mine_first[i];
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) losses[image] = float(sum);
}

// ---- launches ----

// Calls f(X{}, P{}, patches) with the types of x0 and of the prediction: equal types, or fp32 and one 16-bit type.
template <typename F>
void with_types(const Work& work, const F& f) {
  with_type(work.x0_dtype, [&](auto x) {
    with_type(work.dtype, [&](auto p) {
      using X = decltype(x);
      using P = decltype(p);
      if constexpr (std::is_same_v<X, float> || std::is_same_v<P, float> || std::is_same_v<X, P>) {
        work.patch == 1 ? f(x, p, std::false_type()) : f(x, p, std::true_type());
      }
    });
  });
}

// Calls f(work, wide) for every most_runs runs. wide: types and alignment permit vector accesses.
template <typename F>
void for_launches(const FlowMatching& args, const FlowRuns& runs, DType dtype, std::initializer_list<const void*> tensors,
                  const F& f) {
  int64_t image = 0, offset = 0;
  const bool two_types = dtype != args.x0_dtype && dtype != DType::f32 && args.x0_dtype != DType::f32;
  bool wide = !two_types && (args.patch == 1 || args.channels % mine == 0);
  for (const void* tensor : tensors) wide = wide && aligned(tensor, 16);
  for (int64_t r = 0; r < runs.count; ++r) {
    const FlowRun& run = runs.of[r];
    const int64_t elements = args.channels * run.height * run.width;
    if (args.patch > 1 && elements > 0x7fffffff) {
      throw std::runtime_error("flow_matching: with patch > 1 an image may have up to 2^31 - 1 elements");
    }
    wide = wide && elements % mine == 0 && aligned(run.x0, 16);
  }
  Work work = {};
  work.x0_dtype = args.x0_dtype, work.dtype = dtype, work.tiles = uint32_t(args.tiles);
  work.patch = uint32_t(args.patch), work.channels = uint32_t(args.channels);
  work.by_channels = Divisor(args.channels), work.by_patch = Divisor(args.patch);
  work.by_patch_area = Divisor(args.patch * args.patch);
  work.noise = args.noise, work.explicit_noise = args.explicit_noise;
  for (int64_t r = 0; r < runs.count; ++r) {
    const FlowRun& run = runs.of[r];
    const int64_t elements = args.channels * run.height * run.width;
    const int64_t span = args.tiles * flow_tile, blocks = (elements + span - 1) / span;
    Run& to = work.runs[work.count++];
    to = {run.x0, elements, offset, work.blocks, uint32_t(image), uint32_t(run.images), uint32_t(run.width),
          uint32_t(run.height * run.width), Divisor(blocks), Divisor(run.width / args.patch)};
    offset += run.images * elements, image += run.images, work.blocks += uint32_t(run.images * blocks);
    if (work.count == most_runs || r + 1 == runs.count) {
      f(work, wide);
      work.count = 0, work.blocks = 0;
    }
  }
}

}  // namespace

void flow_matching_add_noise(const FlowMatching& args, const FlowRuns& runs, DType dtype, void* x_t, Launch on) {
  for_launches(args, runs, dtype, {x_t, args.explicit_noise}, [&](const Work& work, bool wide) {
    if (!wide) {
      return launch("flow_matching", on, flow_add_noise_any_kernel, work.blocks, threads, 0, work, args.t, x_t);
    }
    with_types(work, [&](auto x, auto p, auto patches) {
      using P = decltype(p);
      launch("flow_matching", on, flow_add_noise_kernel<decltype(x), P, decltype(patches)::value>, work.blocks, threads, 0,
             work, args.t, static_cast<P*>(x_t));
    });
  });
}

void flow_matching_loss(const FlowMatching& args, const FlowRuns& runs, DType dtype, const void* pred, void* gradient,
                        float* losses, double* workspace, Launch on) {
  auto* const partial = reinterpret_cast<float*>(workspace);  // used by one launch after another
  for_launches(args, runs, dtype, {pred, gradient, args.explicit_noise}, [&](const Work& work, bool wide) {
    if (wide) {
      with_types(work, [&](auto x, auto p, auto patches) {
        using P = decltype(p);
        launch("flow_matching", on, flow_loss_kernel<decltype(x), P, decltype(patches)::value>, work.blocks, threads, 0,
               work, static_cast<const P*>(pred), static_cast<P*>(gradient), partial);
      });
    } else {
      launch("flow_matching", on, flow_loss_any_kernel, work.blocks, threads, 0, work, pred, gradient, partial);
    }
    const Run& last = work.runs[work.count - 1];
    launch("flow_matching", on, flow_total_kernel, last.first_image + last.images - work.runs[0].first_image, threads, 0,
           work, partial, losses);
  });
}

}  // namespace reca::cuda
