#include "common/noise.h"
#include "common/parallel.h"
#include "first_step.h"
#include "op.h"

namespace reca::RECA_ISA {

constexpr int64_t group = 64;       // rows per task
constexpr int64_t widest = 128;     // most channels that fit into the buffers
constexpr float bits = 1.44269504f;  // 1 / ln 2

static inline const float* entry(const Diffusion& args, int64_t row) {
  return args.table + args.t[row] * diffusion_columns;
}

static void fill_noise(const Diffusion& args, int64_t begin, int64_t rows, float* out) {
  if (args.explicit_noise) {
    std::memcpy(out, args.explicit_noise + begin * args.channels, rows * args.channels * sizeof(float));
    return;
  }
  if (args.channels % 4 == 0) return draw_rows<Distribution::normal>(args.noise, begin, rows, args.channels, out);
  for (int64_t r = 0; r < rows; ++r) {
    float buffer[widest + 4 * W];
    draw<Distribution::normal>(args.noise, begin + r, 0, args.channels, buffer);
    std::memcpy(out + r * args.channels, buffer, args.channels * sizeof(float));
  }
}

template <typename Body>
static void for_groups(const Diffusion& args, Launch on, const Body& body) {
  parallel_for((args.count + group - 1) / group, on.threads, [&](int64_t task) {
    const int64_t begin = task * group, rest = args.count - begin;
    body(begin, rest < group ? rest : group);
  });
}

void diffusion_add_noise(const Diffusion& args, DType dtype, void* x_t, Launch on) {
  const int64_t channels = args.channels;
  for_groups(args, on, [&](int64_t begin, int64_t rows) {
    float noise[group * widest + 4 * W], buffer[widest];
    fill_noise(args, begin, rows, noise);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = begin + r;
      const float* const table = entry(args, m);
      float* const x = noise + r * channels;
      const float* const x0 = floats(args.x0_dtype, args.x0, (args.rows ? args.rows[m] : m) * channels, channels, buffer);
      for (int64_t c = 0; c < channels; ++c) x[c] = table[0] * x0[c] + table[1] * x[c];
    }
    write(dtype, noise, rows * channels, x_t, begin * channels);
  });
}

void diffusion_loss(const Diffusion& args, DType dtype, const void* out, void* gradient, float* losses, Launch on) {
  const int64_t channels = args.channels;
  const float share = 1.0f / float(channels);
  for_groups(args, on, [&](int64_t begin, int64_t rows) {
    float noise[group * widest + 4 * W], x0_buffer[widest], row_buffer[2 * widest], d_buffer[2 * widest];
    const bool in_place = gradient && dtype == DType::f32;
    fill_noise(args, begin, rows, noise);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = begin + r;
      const float* const table = entry(args, m);
      const float* const eps = noise + r * channels;
      const float log_posterior = table[6], log_beta = table[7], range = 0.5f * (log_beta - log_posterior);
      const float posterior = std::exp(log_posterior);
      const int64_t source = args.rows ? args.rows[m] : m;
      const float* const x0 = floats(args.x0_dtype, args.x0, source * channels, channels, x0_buffer);
      const float* const row = floats(dtype, out, m * 2 * channels, 2 * channels, row_buffer);
      float* const d_row = in_place ? static_cast<float*>(gradient) + m * 2 * channels : d_buffer;
      vfloat squares = {}, bound = {};
      float rest_squares = 0, rest_bound = 0;
      const bool first = args.t[m] == 0;
      const auto means = [&](auto x, auto e, auto predicted) {  // of the posterior, true and predicted
        const auto noisy = table[0] * x + table[1] * e;
        const auto guess = table[2] * noisy - table[3] * predicted;
        struct {
          decltype(noisy) truth, model;
        } both{table[4] * x + table[5] * noisy, table[4] * guess + table[5] * noisy};
        return both;
      };
      int64_t c = 0;
      for (; c + W <= channels && !first; c += W) {
        const vfloat x = load(x0 + c), e = load(eps + c), predicted = load(row + c), v = load(row + channels + c);
        const vfloat error = predicted - e;
        squares += error * error;
        store(d_row + c, error * (2 * share));
        const auto mean = means(x, e, predicted);
        const vfloat log_variance = (v + 1.0f) * range + log_posterior;
        const vfloat distance = mean.truth - mean.model;
        // exp in simd.h is valid up to 88. NaN stays NaN.
        const vfloat precision = log_variance < -88.0f ? splat(INFINITY) : exp(-log_variance);
        const vfloat shrink = posterior * precision;
        const vfloat scaled = distance * distance * precision;
        bound += 0.5f * (log_variance - log_posterior - 1.0f + shrink + scaled);
        store(d_row + channels + c, (1.0f - shrink - scaled) * (0.5f * range * share * bits));
      }
      for (; c < channels; ++c) {
        const float error = row[c] - eps[c];
        rest_squares += error * error;
        d_row[c] = error * (2 * share);
        const auto mean = means(x0[c], eps[c], row[c]);
        const float log_variance = (row[channels + c] + 1.0f) * range + log_posterior;
        if (first) {
          float derivative;
          rest_bound += first_step(x0[c], mean.model, log_variance, &derivative) / bits;
          d_row[channels + c] = derivative * range * share;
          continue;
        }
        const float distance = mean.truth - mean.model;
        const float precision = std::exp(-log_variance), shrink = posterior * precision;
        const float scaled = distance * distance * precision;
        rest_bound += 0.5f * (log_variance - log_posterior - 1.0f + shrink + scaled);
        d_row[channels + c] = (1.0f - shrink - scaled) * (0.5f * range * share * bits);
      }
      losses[m] = (sum(squares) + rest_squares) * share + (sum(bound) + rest_bound) * (share * bits);
      if (gradient && !in_place) write(dtype, d_row, 2 * channels, gradient, m * 2 * channels);
    }
  });
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(diffusion_add_noise, (const Diffusion& args, DType dtype, void* x_t, Launch on), (args, dtype, x_t, on))
RECA_DISPATCH(diffusion_loss,
              (const Diffusion& args, DType dtype, const void* out, void* gradient, float* losses, Launch on),
              (args, dtype, out, gradient, losses, on))
