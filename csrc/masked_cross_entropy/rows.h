// One row of logits: its loss, and its gradient. Used by masked_cross_entropy and masked_linear_cross_entropy.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "masked_cross_entropy/op.h"

namespace reca::RECA_ISA {

constexpr float inf = std::numeric_limits<float>::infinity();

static inline int64_t label_of(const void* labels, bool are_int64, int64_t row) {
  return are_int64 ? static_cast<const int64_t*>(labels)[row] : static_cast<const int32_t*>(labels)[row];
}

template <bool CAP>
static inline vfloat softcap_logits(vfloat z, float softcap) {
  if constexpr (CAP) return softcap * tanh(z / softcap);
  return z;
}

struct RowStats {
  float row_max;      // m: the largest logit
  float log_sum_exp;  // s: log of the sum of e^(z - m)
};

// Reads the row once. In blocks that stay in the first-level cache: first a block's maximum, then its sum of exponentials.
template <typename T, bool CAP, bool SMOOTH>
static RowStats row_forward(const CrossEntropy& args, const T* row, int64_t label, float* loss) {
  constexpr int64_t block = 1024;
  const int64_t classes = args.classes;
  float softcapped[CAP ? block : 1];

  const float z_label = softcap_logits<CAP>(splat(widen(row[label])), args.softcap)[0];
  const float pivot = SMOOTH && std::fabs(z_label) < inf ? z_label : 0.0f;  // so that a common offset costs no digits
  double sum_z = 0;
  float row_max = -inf;
  double total = 0;  // of e^(z - row_max)
  for (int64_t begin = 0; begin < classes; begin += block) {
    const int64_t n = classes - begin < block ? classes - begin : block;
    const int64_t whole = n / W * W;
    const T* const p = row + begin;

    vfloat tops[4] = {splat(-inf), splat(-inf), splat(-inf), splat(-inf)};
    vfloat sums[4] = {};
    for (int64_t i = 0; i < n; i += W) {
      vfloat z = i < whole ? load(p + i) : load_some(p + i, n - i, -inf);
      if constexpr (CAP) {
        z = softcap_logits<CAP>(z, args.softcap);
        if (i >= whole) {
          for (int64_t k = n - i; k < W; ++k) z[k] = -inf;
        }
        store(softcapped + i, z);
      }
      vfloat& top = tops[i / W % 4];
      top = max(top, z);
      if constexpr (SMOOTH) {
        if (i >= whole) {
          for (int64_t k = n - i; k < W; ++k) z[k] = pivot;
        }
        sums[i / W % 4] += z - pivot;
      }
    }
    const float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    if constexpr (SMOOTH) sum_z += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (top == -inf) continue;  // e^(z - row_max) is 0 throughout
    if (top > row_max) {
      total *= std::exp(double(row_max) - double(top));
      row_max = top;
    }
    vfloat exps[4] = {};
    for (int64_t i = 0; i < n; i += W) {
      vfloat z;
      if constexpr (CAP) {
        z = load(softcapped + i);
      } else {
        z = i < whole ? load(p + i) : load_some(p + i, n - i, -inf);
      }
      exps[i / W % 4] += exp(z - row_max);
    }
    // In fp64: beside the 1 of a certain label, what the others have is below the last digit of fp32.
    total += sum((to_double(exps[0]) + to_double(exps[1])) + (to_double(exps[2]) + to_double(exps[3])));
  }

  const float log_sum_exp = float(std::log(total));
  float value = log_sum_exp - (z_label - row_max);
  if constexpr (SMOOTH) {
    const float mean = float(sum_z / double(classes) + (double(pivot) - double(row_max)));
    value = (1 - args.label_smoothing) * value + args.label_smoothing * (log_sum_exp - mean);
  }
  const float lse = row_max + log_sum_exp;
  if (args.z_loss != 0) value += args.z_loss * lse * lse;
  *loss = value;
  return {row_max, log_sum_exp};
}

template <typename T, bool CAP>
static void row_backward(const CrossEntropy& args, const T* row, int64_t label, RowStats stats, float scale, T* out) {
  const int64_t classes = args.classes;
  const float by_z_loss = 2 * args.z_loss * (stats.row_max + stats.log_sum_exp);
  const float slope = scale * (1 + by_z_loss);
  const float level = scale * args.label_smoothing / float(classes);
  const auto gradient = [&](vfloat raw) {
    const vfloat z = softcap_logits<CAP>(raw, args.softcap);
    vfloat g = exp((z - stats.row_max) - stats.log_sum_exp) * slope - level;
    if constexpr (CAP) {
      const vfloat t = z / args.softcap;
      g = g * (1.0f - t * t);
    }
    return g;
  };

  // The target's gradient, before the row may be overwritten: p - 1 is formed before anything is rounded.
  const float raw = widen(row[label]);
  const float z = softcap_logits<CAP>(splat(raw), args.softcap)[0];
  const float log_p = (z - stats.row_max) - stats.log_sum_exp;
  float target_grad = std::expm1(log_p) + std::exp(log_p) * by_z_loss + args.label_smoothing;
  target_grad = scale * target_grad - level;
  if constexpr (CAP) {
    const float t = z / args.softcap;
    target_grad *= 1 - t * t;
  }

  const int64_t whole = classes / W * W;
  for (int64_t i = 0; i < whole; i += W) store(out + i, gradient(load(row + i)));
  if (whole < classes) {
    store_some(out + whole, gradient(load_some(row + whole, classes - whole, -inf)), classes - whole);
  }
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
