// The likelihood of a pixel's bin: the bound of step 0 in MAR's diffusion loss. Host and device.
#pragma once

#include <cmath>

#include "common/types.h"

namespace reca {

// Returns -log2 of the probability of the bin of width 2/255 around x0 under a normal, and its derivative with respect
// to the log variance. The normal CDF is its tanh approximation; probabilities are clamped at 1e-12. Computed in fp64,
// because the probability is a small difference of two CDF values.
static RECA_HD float first_step(float x0, float mean, float log_variance, float* derivative) {
  constexpr float bits = 1.44269504f;  // 1 / ln 2
  const double centered = double(x0) - mean, inverse = std::exp(-0.5 * double(log_variance)), half_bin = 1.0 / 255.0;
  const auto cdf = [](double x, double* slope) {
    const double inner = 0.7978845608028654 * (x + 0.044715 * x * x * x), th = std::tanh(inner);
    *slope = 0.5 * (1 - th * th) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
    return 0.5 * (1 + th);
  };
  const double high = inverse * (centered + half_bin), low = inverse * (centered - half_bin);
  double high_slope, low_slope;
  const double above = cdf(high, &high_slope), below = cdf(low, &low_slope);
  // d(high)/d(log variance) = -high / 2
  double p, dp;
  if (x0 < -0.999f) {
    p = above, dp = high_slope * -0.5 * high;
  } else if (x0 > 0.999f) {
    p = 1 - below, dp = low_slope * 0.5 * low;
  } else {
    p = above - below, dp = high_slope * -0.5 * high + low_slope * 0.5 * low;
  }
  const bool clamped = p <= 1e-12;  // false for NaN
  *derivative = clamped ? 0.0f : float(-dp / p * bits);
  return float(-std::log(clamped ? 1e-12 : p) * bits);
}

}  // namespace reca
