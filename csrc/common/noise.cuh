// Philox words and standard normals, one block of four elements at a time; see common/philox.h.
//
// Results are bit-identical to reca_kernels/philox/reference.py, which rounds every multiplication and addition
// separately. mul() and add() do the same, and a fused multiply-add is used only where the product is exact: by powers
// of two, or with few enough bits.
#pragma once

#include "common/cuda.cuh"
#include "common/philox.h"

namespace reca::cuda {

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }

// The address of a sample's noise, read from memory once.
struct Stream {
  uint32_t k0, k1, c1, c2, c3;  // c1: only its upper 8 bits
};

__device__ __forceinline__ Stream stream_of(const NoiseAddress& noise, int64_t sample) {
  const uint64_t seed = *noise.seed, id = uint64_t(noise.sample_ids[sample]);
  return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(id >> 56) << 24, uint32_t(id),
          uint32_t(id >> 32) << 8 | noise.stream};
}

// The lower and upper half of a product, in one instruction. From 64-bit C++ nvcc 13 adds 0 to every upper half.
__device__ __forceinline__ uint2 product(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint2 p;
  asm("{.reg .b64 wide; mul.wide.u32 wide, %2, %3; mov.b64 {%0, %1}, wide;}" : "=r"(p.x), "=r"(p.y) : "r"(a), "r"(b));
  return p;
#else
  const uint64_t p = uint64_t(a) * b;
  return make_uint2(uint32_t(p), uint32_t(p >> 32));
#endif
}

// The words of elements [4 block, 4 block + 4).
__device__ __forceinline__ void philox(Stream s, uint64_t block, uint32_t (&w)[4]) {
  w[0] = uint32_t(block), w[1] = uint32_t(block >> 32) | s.c1, w[2] = s.c2, w[3] = s.c3;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint2 p0 = product(w[0], philox_m0), p1 = product(w[2], philox_m1);
    w[0] = p1.y ^ w[1] ^ s.k0;
    w[1] = p1.x;
    w[2] = p0.y ^ w[3] ^ s.k1;
    w[3] = p0.x;
    s.k0 += philox_w0, s.k1 += philox_w1;
  }
}

__device__ __forceinline__ float uniform(uint32_t word) { return mul(float(word >> 8), 0x1p-24f); }

// The square root of x, which is 0 (of either sign) or a normal number, rounded to nearest. Equal to sqrt.rn, without
// its branch for denormals, infinities and negative numbers; a GPU test compares them.
__device__ __forceinline__ float root(float x) {
#ifdef __CUDACC__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(x, 0x1p-100f)));
  const float s = mul(x, y), rest = __fmaf_rn(-s, s, x);
  return __fmaf_rn(rest, mul(y, 0.5f), s);
#else
  return emulator::square_root(x);
#endif
}

// Box-Muller: two independent standard normals from two words; radius from the first, angle from the second.
__device__ __forceinline__ void normal_pair(uint32_t a, uint32_t b, float& x, float& y) {
  const float u = __fmaf_rn(float(a), 0x1p-32f, 0x1p-33f);  // (0, 1]
  // u = (1 + f) 2^e, 1 + f in [sqrt(1/2), sqrt(2)). All terms are twice those of the reference, to give 2 log(u).
  const uint32_t exponent = (__float_as_uint(u) - 0x3f3504f3) & 0xff800000;  // e 2^23
  const float f = add(__uint_as_float(__float_as_uint(u) - exponent), -1.0f);
  const float e = float(int32_t(exponent)), z = mul(f, f);
  constexpr float l[9] = {log_p[0], log_p[1], log_p[2], log_p[3], log_p[4], log_p[5], log_p[6], log_p[7], log_p[8]};
  float p = 2 * l[0];
#pragma unroll
  for (int i = 1; i < 9; ++i) p = add(mul(p, f), 2 * l[i]);
  p = mul(mul(p, f), z);
  p = add(p, mul(e, 2 * ln2_low * 0x1p-23f));
  p = add(p, -z);
  p = __fmaf_rn(e, 2 * ln2_high * 0x1p-23f, __fmaf_rn(f, 2.0f, p));
  const float radius = root(-p);

  // b / 2^32 turns, without its lower 8 bits, is the nearest quadrant plus a signed remainder of 22 bits.
  const uint32_t quadrant = b + 0x20000000;  // its upper 2 bits
  const float t = mul(float(int32_t(b << 2 & 0xfffffc00)), two_pi * 0x1p-34f), q = mul(t, t);
  float s = add(mul(add(mul(sin_p[0], q), sin_p[1]), q), sin_p[2]);
  float c = add(mul(add(mul(cos_p[0], q), cos_p[1]), q), cos_p[2]);
  s = add(mul(mul(s, q), t), t);
  c = add(__fmaf_rn(q, -0.5f, mul(mul(c, q), q)), 1.0f);
  const bool odd = quadrant & 0x40000000;
  const uint32_t sine = __float_as_uint(odd ? c : s) ^ (quadrant & 0x80000000);
  const uint32_t cosine = __float_as_uint(odd ? s : c) ^ ((quadrant + 0x40000000) & 0x80000000);
  x = mul(radius, __uint_as_float(cosine));
  y = mul(radius, __uint_as_float(sine));
}

// The normals of elements [4 block, 4 block + 4).
__device__ __forceinline__ void normals(const Stream& s, uint64_t block, float* x) {
  uint32_t w[4];
  philox(s, block, w);
  normal_pair(w[0], w[1], x[0], x[1]);
  normal_pair(w[2], w[3], x[2], x[3]);
}

}  // namespace reca::cuda
