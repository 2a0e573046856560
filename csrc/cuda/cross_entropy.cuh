// Cross-entropy of a row of logits by one block of threads. Shared by masked_cross_entropy and masked_linear_cross_entropy;
// csrc/include/reca/cross_entropy.h has the formula.
#pragma once

#include "common.cuh"
#include "reca/cross_entropy.h"

namespace reca::cuda {

constexpr float inf = __builtin_huge_valf();

template <typename T>
constexpr int unit = 16 / int(sizeof(T));  // elements of one 128-bit access

__device__ __forceinline__ int64_t label_of(const void* labels, bool are_int64, int64_t row) {
  return are_int64 ? static_cast<const int64_t*>(labels)[row] : static_cast<const int32_t*>(labels)[row];
}

// What the kernels are told of the loss. general: softcap or label smoothing; without them the code for them is left out.
struct Terms {
  float smoothing, z_loss, softcap;
};

inline bool is_general(const CrossEntropy& args) { return args.softcap != 0 || args.label_smoothing != 0; }
inline Terms terms_of(const CrossEntropy& args) { return {args.label_smoothing, args.z_loss, args.softcap}; }

template <bool general>
__device__ __forceinline__ float capped(float z, const Terms& terms) {
  return general && terms.softcap != 0 ? terms.softcap * tanhf(z / terms.softcap) : z;
}

// e^x, 0 where that is below 2^-126: of a row whose largest term is 1 such a term is nothing. __expf keeps denormals, for
// which it compares and multiplies twice more per logit.
__device__ __forceinline__ float power_of_e(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  const float y = __expf(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// ---- forward ----

// What a thread has seen of a row. Each keeps its own peak, so threads wait for each other only at the end.
struct Seen {
  float peak = -inf;
  float total = 0;  // of e^(z - peak)
  float sum_z = 0;  // of z - pivot
};

// n more logits; -inf adds nothing to `total`, and must not be there for `sum_z`: how_many of them count.
template <bool general, int n>
__device__ __forceinline__ void see(Seen& seen, float (&z)[n], int how_many, float pivot, const Terms& terms) {
  float top = seen.peak;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (general) {
      z[i] = capped<general>(z[i], terms);
      if (i < how_many) seen.sum_z += z[i] - pivot;
    }
    if (n > 1 && i >= how_many) z[i] = -inf;
    top = fmaxf(top, z[i]);
  }
  const float finite = top == -inf ? 0.0f : top;
  seen.total *= power_of_e(seen.peak - finite);
#pragma unroll
  for (int i = 0; i < n; ++i) seen.total += power_of_e(z[i] - finite);
  seen.peak = top;
}

struct RowStats {
  float peak;     // m: the largest logit
  float log_sum;  // s: log of the sum of e^(z - m)
  float loss;
};

// log of a sum >= 1, as fp32. Of a certain label the sum is 1 + tiny, and tiny must not be lost.
__device__ __forceinline__ float log_of_sum(double total) {
  const float tiny = float(total - 1);
  return tiny < 1e-3f ? tiny * (1 - tiny * (0.5f - tiny / 3)) : logf(float(total));
}

// The row's statistics and loss in every thread, once each has `seen` its share. z_label is capped already.
template <int threads, bool general>
__device__ __forceinline__ RowStats finish(const Seen& seen, float z_label, float pivot, int64_t classes,
                                           const Terms& terms) {
  __shared__ float peaks[threads / warp];
  __shared__ float broadcast[3];
  const float top = warp_reduce(seen.peak, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x % warp == 0) peaks[threadIdx.x / warp] = top;
  __syncthreads();
  float peak = peaks[0];
#pragma unroll
  for (int i = 1; i < threads / warp; ++i) peak = fmaxf(peak, peaks[i]);
  const float finite = peak == -inf ? 0.0f : peak;
  const double total = block_sum<threads>(double(seen.total) * double(power_of_e(seen.peak - finite)));
  double sum_z = 0;
  if constexpr (general) {
    __syncthreads();
    sum_z = block_sum<threads>(double(seen.sum_z));
  }
  if (threadIdx.x == 0) {
    const float log_sum = log_of_sum(total);
    float loss = log_sum - (z_label - peak);
    if constexpr (general) {
      const float mean = float(sum_z / double(classes)) + (pivot - peak);
      if (terms.smoothing != 0) loss = (1 - terms.smoothing) * loss + terms.smoothing * (log_sum - mean);
    }
    const float lse = peak + log_sum;
    broadcast[0] = peak, broadcast[1] = log_sum, broadcast[2] = loss + terms.z_loss * lse * lse;
  }
  __syncthreads();
  return {broadcast[0], broadcast[1], broadcast[2]};
}

// ---- backward ----

// The gradient of a row's loss, times `scale`.
struct Slope {
  float peak, log_sum;
  float slope, level;
  float own;  // of the label's logit: p - 1 is formed before anything is rounded
};

template <bool general>
__device__ __forceinline__ float bend(float& z, const Terms& terms) {  // caps z; returns d capped / d z
  if (!general || terms.softcap == 0) return 1;
  const float t = tanhf(z / terms.softcap);
  z = terms.softcap * t;
  return 1 - t * t;
}

// raw_label: the label's logit, not capped.
template <bool general>
__device__ __forceinline__ Slope slope_of(float peak, float log_sum, float raw_label, float scale, int64_t classes,
                                          const Terms& terms) {
  const float by_z_loss = 2 * terms.z_loss * (peak + log_sum);
  const float level = general ? scale * terms.smoothing / float(classes) : 0.0f;
  float z = raw_label;
  const float bent = bend<general>(z, terms);
  const float log_p = (z - peak) - log_sum;
  const float own = scale * (expm1f(log_p) + power_of_e(log_p) * by_z_loss + terms.smoothing) - level;
  return {peak, log_sum, scale * (1 + by_z_loss), level, own * bent};
}

template <bool general>
__device__ __forceinline__ float gradient_of(float z, const Slope& s, const Terms& terms) {
  const float bent = bend<general>(z, terms);
  const float g = power_of_e((z - s.peak) - s.log_sum) * s.slope;
  return general ? (g - s.level) * bent : g;
}

}  // namespace reca::cuda
