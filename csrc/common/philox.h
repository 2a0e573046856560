// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw 2011) and standard normals from it. Host and device.
//
// The arithmetic is that of reca_kernels/philox/reference.py, operation by operation, so that all backends are
// bit-identical. It must not be contracted into fused multiply-adds.
#pragma once

#include <cstdint>

namespace reca {

constexpr uint32_t philox_m0 = 0xD2511F53, philox_m1 = 0xCD9E8D57;
constexpr uint32_t philox_w0 = 0x9E3779B9, philox_w1 = 0xBB67AE85;

// The address of a batch's noise; see `Philox` in reca_kernels/philox. The kernel reads the seed from memory, so that a
// captured CUDA graph can be replayed with another seed.
struct NoiseAddress {
  const uint64_t* seed;
  const int64_t* sample_ids;  // [B]
  uint32_t stream;
};

enum class Distribution : int { bits, uniform, normal };  // uint32 words, uniform in [0, 1), standard normal

// Cephes' single precision polynomials for log on [sqrt(1/2), sqrt(2)) and sin, cos on [-pi/4, pi/4].
constexpr float log_p[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                            -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
constexpr float sin_p[3] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
constexpr float cos_p[3] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
constexpr float two_pi = 6.28318530717958647692f;

}  // namespace reca
