// MAR's diffusion loss: noise prediction with learned-range variance (Nichol, Dhariwal 2021).
#pragma once

#include "common/philox.h"
#include "common/types.h"

namespace reca {

// Columns per step, fp32: sqrt(abar), sqrt(1 - abar), sqrt(1 / abar), sqrt(1 / abar - 1), the posterior mean's
// coefficients c1 of x0 and c2 of x_t, the logs of the posterior variance and of beta.
constexpr int diffusion_columns = 8;

struct Diffusion {
  DType x0_dtype;
  const void* x0;       // [samples, channels], up to 128 channels
  const int64_t* rows;  // [count]: row of x0 for each row; null: the same row
  const int64_t* t;     // [count]
  const float* table;   // [steps, 8]
  int64_t count, channels, samples, steps;
  NoiseAddress noise;           // one sample id per row
  const float* explicit_noise;  // [count, channels]; null: generated from the address
};

}  // namespace reca

RECA_LAUNCHER(void diffusion_add_noise(const Diffusion& args, DType dtype, void* x_t, Launch on))

// out [count, 2 channels]: predicted noise, then variance in [-1, 1]. losses [count].
// gradient [count, 2 channels]: derivative of a row's loss with respect to out, in the dtype of out, or null.
RECA_LAUNCHER(void diffusion_loss(const Diffusion& args, DType dtype, const void* out, void* gradient, float* losses,
                                  Launch on))
