// Cross-entropy of a row of logits by one thread block; see op.h for the formula. Also used by
// masked_linear_cross_entropy.
#pragma once

#include "common/cuda.cuh"
#include "masked_cross_entropy/op.h"

namespace reca::cuda {

constexpr float inf = __builtin_huge_valf();

template <typename T>
constexpr int unit = 16 / int(sizeof(T));  // elements of one 128-bit access

// The options of the loss. general: with softcap or label smoothing; otherwise their code is not compiled in.
struct Terms {
  float smoothing, z_loss, softcap;
};

inline bool is_general(const CrossEntropy& args) { return args.softcap != 0 || args.label_smoothing != 0; }
inline Terms terms_of(const CrossEntropy& args) { return {args.label_smoothing, args.z_loss, args.softcap}; }

template <bool general>
__device__ __forceinline__ float softcap_logits(float z, const Terms& terms) {
  return general && terms.softcap != 0 ? terms.softcap * tanhf(z / terms.softcap) : z;
}

// 2^x, flushed to 0 below 2^-126, which is negligible in a sum whose largest term is 1. exp2f and __expf handle
// denormals, which takes additional instructions per logit.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = emulator::off_by_2_ulp(exp2f(x));  // the largest error that the instruction may have
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

constexpr float log2_e = 1.44269504f;

__device__ __forceinline__ float power_of_e(float x) { return power_of_2(x * log2_e); }

// ---- forward ----

// A thread's part of a row's softmax. Each thread has its own maximum, so threads synchronise only at the end.
struct OnlineSoftmax {
  float row_max = -inf;
  float total = 0;  // of e^(z - row_max)
  float sum_z = 0;  // of sum_scale * (z - pivot)
};

// Adds n logits, of which the first how_many count. The others are -inf for `total` and left out of `sum_z`.
template <bool general, int n>
__device__ __forceinline__ void online_softmax_update(OnlineSoftmax& running, float (&z)[n], int how_many, float pivot,
                                                      const Terms& terms) {
  float top = running.row_max;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (general) {
      z[i] = softcap_logits<general>(z[i], terms);
      if (i < how_many) running.sum_z += fmaf(z[i], sum_scale, -pivot * sum_scale);
    }
    if (n > 1 && i >= how_many) z[i] = -inf;
    top = fmaxf(top, z[i]);
  }
  const float finite = top == -inf ? 0.0f : top;
  running.total *= power_of_e(running.row_max - finite);
#pragma unroll
  for (int i = 0; i < n; ++i) running.total += power_of_e(z[i] - finite);
  running.row_max = top;
}

struct RowStats {
  float row_max;      // m: the maximum logit
  float log_sum_exp;  // s: log of the sum of e^(z - m)
  float loss;
};

// The log of a sum >= 1, as fp32. For a near-certain label the sum is 1 + tiny, and tiny must be preserved.
__device__ __forceinline__ float log_of_sum(double total) {
  const float tiny = float(total - 1);
  return tiny < 1e-3f ? tiny * (1 - tiny * (0.5f - tiny / 3)) : logf(float(total));
}

// Combines the parts of all threads. Every thread gets the row's statistics and loss. z_label is softcapped.
template <int threads, bool general>
__device__ __forceinline__ RowStats finish(const OnlineSoftmax& running, float z_label, float pivot, int64_t classes,
                                           const Terms& terms) {
  __shared__ float row_maxes[threads / warp];
  __shared__ float broadcast[3];
  const float top = warp_reduce(running.row_max, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x % warp == 0) row_maxes[threadIdx.x / warp] = top;
  __syncthreads();
  float row_max = row_maxes[0];
#pragma unroll
  for (int i = 1; i < threads / warp; ++i) row_max = fmaxf(row_max, row_maxes[i]);
  const float finite = row_max == -inf ? 0.0f : row_max;
  const double total = block_sum<threads>(double(running.total) * double(power_of_e(running.row_max - finite)));
  double sum_z = 0;
  if constexpr (general) {
    __syncthreads();
    sum_z = block_sum<threads>(double(running.sum_z));
  }
  if (threadIdx.x == 0) {
    const float log_sum_exp = log_of_sum(total);
    float loss = log_sum_exp - (z_label - row_max);
    if (general && terms.smoothing != 0) {
      loss = smoothed_loss(log_sum_exp, row_max, z_label, sum_z, pivot, classes, terms.smoothing);
    }
    const float lse = row_max + log_sum_exp;
    broadcast[0] = row_max, broadcast[1] = log_sum_exp, broadcast[2] = loss + terms.z_loss * lse * lse;
  }
  __syncthreads();
  return {broadcast[0], broadcast[1], broadcast[2]};
}

// ---- backward ----

// The coefficients of the gradient of a row's loss, times `scale`.
struct Slope {
  float row_max, log_sum_exp;
  float slope, level;
  float shift;        // log2(slope) - log2(e) log_sum_exp: a positive slope is applied in the exponent at no cost
  float target_grad;  // gradient of the label's logit; p - 1 is computed by expm1, without cancellation
};

template <bool general>
__device__ __forceinline__ float bend(float& z, const Terms& terms) {  // softcaps z; returns d softcapped / d z
  if (!general || terms.softcap == 0) return 1;
  const float t = tanhf(z / terms.softcap);
  z = terms.softcap * t;
  return 1 - t * t;
}

// raw_label: the label's logit before the softcap.
template <bool general>
__device__ __forceinline__ Slope slope_of(float row_max, float log_sum_exp, float raw_label, float scale, int64_t classes,
                                          const Terms& terms) {
  const float by_z_loss = 2 * terms.z_loss * (row_max + log_sum_exp);
  const float level = general ? scale * terms.smoothing / float(classes) : 0.0f;
  float z = raw_label;
  const float bent = bend<general>(z, terms);
  const float log_p = (z - row_max) - log_sum_exp;
  const float target_grad = scale * (expm1f(log_p) + power_of_e(log_p) * by_z_loss + terms.smoothing) - level;
  const float slope = scale * (1 + by_z_loss);
  return {row_max, log_sum_exp, slope, level, log2f(slope) - log2_e * log_sum_exp, target_grad * bent};
}

// shifted: the slope is applied by Slope::shift, which requires that it is not negative. with_shift decides per row.
template <bool general, bool shifted>
__device__ __forceinline__ float non_target_grad(float z, const Slope& s, const Terms& terms) {
  if constexpr (shifted) return power_of_2(fmaf(z - s.row_max, log2_e, s.shift));
  const float bent = bend<general>(z, terms);
  const float g = power_of_e((z - s.row_max) - s.log_sum_exp) * s.slope;
  return general ? (g - s.level) * bent : g;
}

// Calls f(true_type or false_type: shifted), the same for all threads of a row.
template <bool general, typename F>
__device__ __forceinline__ void with_shift(const Slope& s, const F& f) {
  if (!general && s.slope >= 0) {
    f(std::bool_constant<!general>{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace reca::cuda
