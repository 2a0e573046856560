#include "reca/flow_matching.h"

#include "noise.h"
#include "parallel.h"

namespace reca::RECA_ISA {

constexpr int64_t chunk = 4096;  // elements; a multiple of 4 W for every W

static inline int64_t elements(const FlowMatching& args, int64_t image) {
  return args.channels * args.images[image].height * args.images[image].width;
}

static int64_t chunks(const FlowMatching& args) {
  int64_t total = 0;
  for (int64_t b = 0; b < args.count; ++b) total += (elements(args, b) + chunk - 1) / chunk;
  return total;
}

// x0's elements [begin, begin + n) in the order of the prediction: patches row by row, inside a patch (row, column,
// channel). With patch 1 that order is x0's own, and fp32 is read where it is.
static const float* gather(const FlowMatching& args, int64_t image, int64_t begin, int64_t n, float* out) {
  const FlowImage& im = args.images[image];
  if (args.patch == 1) return floats(args.x0_dtype, im.x0, begin, n, out);
  const int64_t p = args.patch, channels = args.channels, width = im.width, plane = im.height * width;
  const int64_t token = p * p * channels, columns = width / p;
  for (int64_t i = 0; i < n;) {
    const int64_t element = begin + i, number = element / token, inner = element % token;
    const int64_t pixel = inner / channels, channel = inner % channels;
    const int64_t row = number / columns * p + pixel / p, column = number % columns * p + pixel % p;
    const int64_t run = channels - channel < n - i ? channels - channel : n - i;
    const int64_t first = channel * plane + row * width + column;
    switch (args.x0_dtype) {
      case DType::f32:
        for (int64_t c = 0; c < run; ++c) out[i + c] = static_cast<const float*>(im.x0)[first + c * plane];
        break;
      case DType::bf16:
        for (int64_t c = 0; c < run; ++c) out[i + c] = widen(static_cast<const bf16*>(im.x0)[first + c * plane]);
        break;
      case DType::f16:
        for (int64_t c = 0; c < run; ++c) out[i + c] = widen(static_cast<const f16*>(im.x0)[first + c * plane]);
        break;
    }
    i += run;
  }
  return out;
}

static const float* fill_noise(const FlowMatching& args, int64_t image, int64_t begin, int64_t n, float* out) {
  const int64_t at = args.images[image].offset + begin;
  if (args.given_noise) return floats(args.noise_dtype, args.given_noise, at, n, out);
  draw<Law::normal>(args.noise, image, begin, n, out);
  return out;
}

// body(image, first element in the image, number of elements, number of the chunk)
template <typename Body>
static void for_chunks(const FlowMatching& args, const Body& body) {
  parallel_for(chunks(args), args.threads, [&](int64_t number) {
    int64_t image = 0, local = number;
    for (;; ++image) {
      const int64_t here = (elements(args, image) + chunk - 1) / chunk;
      if (local < here) break;
      local -= here;
    }
    const int64_t begin = local * chunk, rest = elements(args, image) - begin;
    body(image, begin, rest < chunk ? rest : chunk, number);
  });
}

void flow_matching_prepare(const FlowMatching& args, DType dtype, void* x_t) {
  for_chunks(args, [&](int64_t image, int64_t begin, int64_t n, int64_t) {
    float x0_buffer[chunk], noise_buffer[chunk], mixed[chunk];
    const float* const x0 = gather(args, image, begin, n, x0_buffer);
    const float* const noise = fill_noise(args, image, begin, n, noise_buffer);
    const int64_t at = args.images[image].offset + begin;
    float* const to = dtype == DType::f32 ? static_cast<float*>(x_t) + at : mixed;
    const float t = args.t[image], s = 1.0f - t;
    for (int64_t i = 0; i < n; ++i) to[i] = s * x0[i] + t * noise[i];
    if (to == mixed) write(dtype, mixed, n, x_t, at);
  });
}

void flow_matching_loss(const FlowMatching& args, DType dtype, const void* pred, void* gradient, float* losses,
                        double* partial) {
  for_chunks(args, [&](int64_t image, int64_t begin, int64_t n, int64_t number) {
    float x0_buffer[chunk], noise_buffer[chunk], pred_buffer[chunk], error_buffer[chunk];
    const float* const x0 = gather(args, image, begin, n, x0_buffer);
    const float* const noise = fill_noise(args, image, begin, n, noise_buffer);
    const int64_t at = args.images[image].offset + begin;
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
  int64_t number = 0;
  for (int64_t b = 0; b < args.count; ++b) {
    double total = 0;
    for (int64_t k = (elements(args, b) + chunk - 1) / chunk; k > 0; --k) total += partial[number++];
    losses[b] = float(total);
  }
}

int64_t flow_matching_chunks(const FlowMatching& args) { return chunks(args); }

}  // namespace reca::RECA_ISA

RECA_DISPATCH(void, flow_matching_prepare, (const FlowMatching& args, DType dtype, void* x_t), (args, dtype, x_t))
RECA_DISPATCH(void, flow_matching_loss,
              (const FlowMatching& args, DType dtype, const void* pred, void* gradient, float* losses, double* partial),
              (args, dtype, pred, gradient, losses, partial))
RECA_DISPATCH(int64_t, flow_matching_chunks, (const FlowMatching& args), (args))
