// Loss and gradient of one row of logits. Used by masked_cross_entropy and masked_linear_cross_entropy.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "masked_cross_entropy/op.h"

namespace reca::RECA_ISA {

constexpr float inf = std::numeric_limits<float>::infinity();

template <bool CAP>
static inline vfloat softcap_logits(vfloat z, float softcap) {
  if constexpr (CAP) return softcap * tanh(z / softcap);
  return z;
}

// Softcaps z and returns d softcapped / d z.
static inline vfloat bend(vfloat& z, float softcap) {
  const vfloat t = tanh(z / softcap);
  z = softcap * t;
  return 1.0f - t * t;
}

struct RowStats {
  float row_max;      // m: the maximum logit
  float log_sum_exp;  // s: log of the sum of e^(z - m)
};

// The logit of a class; bias may be null.
template <typename T>
static inline float logit(const T* row, const T* bias, int64_t i) {
  return bias ? widen(row[i]) + widen(bias[i]) : widen(row[i]);
}

// Calls f(i, z, n) for every 4 W elements of row + bias, from element i on, in the lane order of load_pair. The last
// call has n elements, first and in memory order; the rest of z is -inf. bias may be null.
template <typename T, typename F>
static inline void for_each_four(const T* row, const T* bias, int64_t classes, const F& f) {
  vfloat z[4];
  int64_t i = 0;
  for (; i + 4 * W <= classes; i += 4 * W) {
    load_pair(row + i, z[0], z[1]);
    load_pair(row + i + 2 * W, z[2], z[3]);
    if (bias) {
      vfloat b[4];
      load_pair(bias + i, b[0], b[1]);
      load_pair(bias + i + 2 * W, b[2], b[3]);
      for (int k = 0; k < 4; ++k) z[k] += b[k];
    }
    f(i, z, 4 * W);
  }
  if (i < classes) {
    float last[4 * W];
    for (int64_t k = 0; k < 4 * W; ++k) last[k] = i + k < classes ? logit(row, bias, i + k) : -inf;
    for (int k = 0; k < 4; ++k) z[k] = load(last + k * W);
    f(i, z, int(classes - i));
  }
}

// Reads the row from memory once, in blocks. A block stays in the L1 cache between its maximum and its exponentials,
// while the next block is prefetched.
template <typename T, bool CAP, bool SMOOTH>
static RowStats row_forward(const CrossEntropy& args, const T* row, const T* bias, int64_t label, float* loss) {
  constexpr int64_t block = 8192 / sizeof(T), part = 64 * W;  // part: 16 additions per lane
  const int64_t classes = args.classes;
  float softcapped[CAP ? block + 4 * W : 1];

  const float z_label = softcap_logits<CAP>(splat(logit(row, bias, label)), args.softcap)[0];
  const float pivot = SMOOTH && std::fabs(z_label) < inf ? z_label : 0.0f;  // so that no digits are lost to an offset
  double sum_z = 0;  // of sum_scale * (z - pivot)
  float row_max = -inf;
  vdouble total = {};  // of e^(z - row_max)
  for (int64_t begin = 0; begin < classes; begin += block) {
    const int64_t n = classes - begin < block ? classes - begin : block;
    const T* const p = row + begin;
    const T* const b = bias ? bias + begin : nullptr;

    vfloat tops[4] = {splat(-inf), splat(-inf), splat(-inf), splat(-inf)};
    vfloat sums[4] = {};
    for_each_four(p, b, n, [&](int64_t i, vfloat(&z)[4], int count) {
      if constexpr (CAP) {
        for (int k = 0; k < 4; ++k) z[k] = softcap_logits<CAP>(z[k], args.softcap);
        for (int k = count; k < 4 * W; ++k) z[k / W][k % W] = -inf;
        for (int k = 0; k < 4; ++k) store(softcapped + i + k * W, z[k]);
      }
      for (int k = 0; k < 4; ++k) tops[k] = max(tops[k], z[k]);
      if constexpr (SMOOTH) {
        for (int k = count; k < 4 * W; ++k) z[k / W][k % W] = pivot;
        for (int k = 0; k < 4; ++k) sums[k] += z[k] * sum_scale - pivot * sum_scale;
      }
    });
    const float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    if constexpr (SMOOTH) sum_z += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (top > row_max) {
      total *= std::exp(double(row_max) - double(top));
      row_max = top;
    }
    const float base = row_max == -inf ? 0.0f : row_max;  // so that -inf always adds 0 and NaN stays NaN
    // Parts are added in fp64: next to the 1 of a near-certain label, the other terms are below the precision of fp32.
    for (int64_t from = 0; from < n; from += part) {
      const int64_t to = n - from < part ? n - from : part;
      vfloat exps[4] = {};
      const auto add = [&](int64_t i, vfloat(&z)[4], int) {
        if constexpr (!CAP) prefetch(p + block + from + i, 4 * W * sizeof(T));
        for (int k = 0; k < 4; ++k) exps[k] += exp(z[k] - base);
      };
      if constexpr (CAP) {
        for_each_four<float>(softcapped + from, nullptr, to, add);
      } else {
        for_each_four(p + from, b ? b + from : nullptr, to, add);
      }
      total += (to_double(exps[0]) + to_double(exps[1])) + (to_double(exps[2]) + to_double(exps[3]));
    }
  }

  const float log_sum_exp = float(std::log(sum(total)));
  float value = log_sum_exp - (z_label - row_max);
  if constexpr (SMOOTH) {
    value = smoothed_loss(log_sum_exp, row_max, z_label, sum_z, pivot, classes, args.label_smoothing);
  }
  const float lse = row_max + log_sum_exp;
  if (args.z_loss != 0) value += args.z_loss * lse * lse;
  *loss = value;
  return {row_max, log_sum_exp};
}

// out may be the row itself.
template <typename T, bool CAP, bool SMOOTH>
static void row_backward(const CrossEntropy& args, const T* row, const T* bias, int64_t label, RowStats stats, float scale,
                         T* out) {
  const int64_t classes = args.classes;
  const float by_z_loss = 2 * args.z_loss * (stats.row_max + stats.log_sum_exp);
  const float level = scale * args.label_smoothing / float(classes);
  // One subtraction per logit: the rounding error of lse is corrected in the slope.
  const float lse = stats.row_max + stats.log_sum_exp;
  const double lost = std::fabs(lse) < inf ? (double(stats.row_max) - double(lse)) + double(stats.log_sum_exp) : 0.0;
  float slope = scale * (1 + by_z_loss) * float(std::exp(-lost));
  if (slope != slope) slope = std::numeric_limits<float>::quiet_NaN();  // for store_pair

  // The target's gradient is computed before the row may be overwritten, with p - 1 by expm1, without cancellation.
  vfloat z_label = splat(logit(row, bias, label));
  const float bent = CAP ? bend(z_label, args.softcap)[0] : 1.0f;
  const float log_p = (z_label[0] - stats.row_max) - stats.log_sum_exp;
  float target_grad = std::expm1(log_p) + std::exp(log_p) * by_z_loss + args.label_smoothing;
  target_grad = (scale * target_grad - level) * bent;

  for_each_four(row, bias, classes, [&](int64_t i, vfloat(&z)[4], int n) {
    for (int k = 0; k < 4; ++k) {
      vfloat slope_of_cap;
      if constexpr (CAP) slope_of_cap = bend(z[k], args.softcap);
      z[k] = exp(z[k] - lse, slope);
      if constexpr (SMOOTH) z[k] = z[k] - level;
      if constexpr (CAP) z[k] = z[k] * slope_of_cap;
    }
    if (n == 4 * W) {
      store_pair(out + i, z[0], z[1]);
      store_pair(out + i + 2 * W, z[2], z[3]);
    } else {
      for (int k = 0; k < n; ++k) narrow(z[k / W][k % W], out + i + k);
    }
  });
  narrow(target_grad, out + label);
}

// Calls f(T{}, bool_constant CAP, bool_constant SMOOTH) for the types and options in args.
template <typename F>
static void with_options(const CrossEntropy& args, const F& f) {
  const auto with_type = [&](auto type) {
    const bool smooth = args.label_smoothing != 0;
    if (args.softcap != 0) {
      smooth ? f(type, std::true_type{}, std::true_type{}) : f(type, std::true_type{}, std::false_type{});
    } else {
      smooth ? f(type, std::false_type{}, std::true_type{}) : f(type, std::false_type{}, std::false_type{});
    }
  };
  switch (args.dtype) {
    case DType::f32: return with_type(float{});
    case DType::bf16: return with_type(bf16{});
    case DType::f16: return with_type(f16{});
  }
}

}  // namespace reca::RECA_ISA
