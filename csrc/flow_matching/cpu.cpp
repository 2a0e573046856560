#include "common/noise.h"
#include "common/parallel.h"
#include "op.h"

namespace reca::RECA_ISA {

constexpr int64_t chunk = 4096;  // elements; a multiple of 4 W for every W
static_assert(chunk >= flow_tile, "the workspace has one partial sum per tile");

static inline int64_t elements_of(const FlowMatching& args, const FlowRun& run) {
  return args.channels * run.height * run.width;
}

static inline int64_t chunks_of(const FlowMatching& args, const FlowRun& run) {  // per image
  return (elements_of(args, run) + chunk - 1) / chunk;
}

struct Image {
  const void* x0;  // [channels, height, width]
  int64_t width, plane;
  int64_t number, offset;  // index of the image; offset of its first element in x_t, pred and noise
};

template <typename T>
static void gather_patches(const FlowMatching& args, const Image& im, int64_t begin, int64_t n, float* out) {
  const int64_t p = args.patch, token = p * p * args.channels, columns = im.width / p, end = begin + n;
  for (int64_t number = begin / token; number * token < end;) {
    const int64_t start = number * token, from = begin > start ? begin - start : 0;
    const int64_t to = end - start < token ? end - start : token;
    // Adjacent patches that are needed completely, or one that is needed in part.
    const int64_t whole = from > 0 ? 0 : (end - start) / token, left = columns - number % columns;
    const int64_t count = whole == 0 ? 1 : whole < left ? whole : left;
    const T* const corner = static_cast<const T*>(im.x0) + number / columns * p * im.width + number % columns * p;
    for (int64_t inner = from; inner < to; ++inner) {
      const int64_t pixel = inner / args.channels, channel = inner % args.channels;
      const T* const x0 = corner + channel * im.plane + pixel / p * im.width + pixel % p;
      float* const place = out + (start - begin + inner);
      for (int64_t i = 0; i < count; ++i) place[i * token] = widen(x0[i * p]);
    }
    number += count;
  }
}

// x0's elements [begin, begin + n) in the order of the prediction: patches in row-major order, inside a patch (row,
// column, channel). Reads follow the rows of x0; writes are strided, within the L1 cache. With patch 1 the order is
// that of x0, and fp32 is used in place.
static const float* gather(const FlowMatching& args, const Image& im, int64_t begin, int64_t n, float* out) {
  if (args.patch == 1) return floats(args.x0_dtype, im.x0, begin, n, out);
  switch (args.x0_dtype) {
    case DType::f32: gather_patches<float>(args, im, begin, n, out); break;
    case DType::bf16: gather_patches<bf16>(args, im, begin, n, out); break;
    case DType::f16: gather_patches<f16>(args, im, begin, n, out); break;
  }
  return out;
}

static const float* fill_noise(const FlowMatching& args, const Image& image, int64_t begin, int64_t n, float* out) {
  if (args.explicit_noise) return args.explicit_noise + image.offset + begin;
  draw<Distribution::normal>(args.noise, image.number, begin, n, out);
  return out;
}

// Calls body(image, first element in the image, number of elements, index of the chunk) for every chunk.
template <typename Body>
static void for_chunks(const FlowMatching& args, const FlowRuns& runs, Launch on, const Body& body) {
  int64_t chunks = 0;
  for (int64_t r = 0; r < runs.count; ++r) chunks += runs.of[r].images * chunks_of(args, runs.of[r]);
  parallel_for(chunks, on.threads, [&](int64_t number) {
    int64_t first_image = 0, offset = 0, local = number;
    const FlowRun* run = runs.of;
    for (;; ++run) {
      const int64_t here = run->images * chunks_of(args, *run);
      if (local < here) break;
      local -= here, first_image += run->images, offset += run->images * elements_of(args, *run);
    }
    const int64_t elements = elements_of(args, *run), each = chunks_of(args, *run), inner = local / each;
    const Image image = {static_cast<const char*>(run->x0) + inner * elements * size_of(args.x0_dtype), run->width,
                         run->height * run->width, first_image + inner, offset + inner * elements};
    const int64_t begin = local % each * chunk, rest = elements - begin;
    body(image, begin, rest < chunk ? rest : chunk, number);
  });
}

void flow_matching_add_noise(const FlowMatching& args, const FlowRuns& runs, DType dtype, void* x_t, Launch on) {
  for_chunks(args, runs, on, [&](const Image& image, int64_t begin, int64_t n, int64_t) {
    float x0_buffer[chunk], noise_buffer[chunk], mixed[chunk];
    const float* const x0 = gather(args, image, begin, n, x0_buffer);
    const float* const noise = fill_noise(args, image, begin, n, noise_buffer);
    const int64_t at = image.offset + begin;
    float* const to = dtype == DType::f32 ? static_cast<float*>(x_t) + at : mixed;
    const float t = args.t[image.number], s = 1.0f - t;
    for (int64_t i = 0; i < n; ++i) to[i] = s * x0[i] + t * noise[i];
    if (to == mixed) write(dtype, mixed, n, x_t, at);
  });
}

void flow_matching_loss(const FlowMatching& args, const FlowRuns& runs, DType dtype, const void* pred, void* gradient,
                        float* losses, double* partial, Launch on) {
  for_chunks(args, runs, on, [&](const Image& image, int64_t begin, int64_t n, int64_t number) {
    float x0_buffer[chunk], noise_buffer[chunk], pred_buffer[chunk], error_buffer[chunk];
    const float* const x0 = gather(args, image, begin, n, x0_buffer);
    const float* const noise = fill_noise(args, image, begin, n, noise_buffer);
    const int64_t at = image.offset + begin;
    const float* const guess = floats(dtype, pred, at, n, pred_buffer);
    const bool in_place = gradient && dtype == DType::f32;
    float* const error = in_place ? static_cast<float*>(gradient) + at : error_buffer;
    vfloat sums[4] = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const vfloat d = load(guess + i) - (load(noise + i) - load(x0 + i));
      sums[i / W % 4] += d * d;
      store(error + i, d + d);
    }
    float rest = 0;
    for (; i < n; ++i) {
      const float d = guess[i] - (noise[i] - x0[i]);
      rest += d * d;
      error[i] = d + d;
    }
    partial[number] = double(sum((sums[0] + sums[1]) + (sums[2] + sums[3]))) + rest;
    if (gradient && !in_place) write(dtype, error, n, gradient, at);
  });
  for (int64_t r = 0; r < runs.count; ++r) {
    for (int64_t i = 0; i < runs.of[r].images; ++i) {
      double total = 0;
      for (int64_t k = chunks_of(args, runs.of[r]); k > 0; --k) total += *partial++;
      *losses++ = float(total);
    }
  }
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(flow_matching_add_noise,
              (const FlowMatching& args, const FlowRuns& runs, DType dtype, void* x_t, Launch on),
              (args, runs, dtype, x_t, on))
RECA_DISPATCH(flow_matching_loss,
              (const FlowMatching& args, const FlowRuns& runs, DType dtype, const void* pred, void* gradient,
               float* losses, double* partial, Launch on),
              (args, runs, dtype, pred, gradient, losses, partial, on))
