// Philox words and standard normals, W blocks at a time; see common/philox.h.
// CMakeLists.txt compiles files that include this with -ffp-contract=off: normals must be bit-identical to the
// reference.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace reca::RECA_ISA {

// The product of m and the lower half of every 64-bit lane. Upper halves are ignored.
static inline vwide multiply(vwide a, uint32_t m) {
#if defined(__AVX512F__)
  return (vwide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(int(m)));
#elif defined(__AVX2__)
  return (vwide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(int(m)));
#else
  return (a & 0xffffffff) * uint64_t(m);
#endif
}

struct Words {
  vuint w[4];
};

// Even and odd lanes are processed separately, each in the lower half of a 64-bit lane, so that both halves of a
// product are available without shuffles. The upper halves are never read.
static inline Words philox(vuint c0, vuint c1, vuint c2, vuint c3, uint64_t seed) {
  const vuint start[4] = {c0, c1, c2, c3};
  vwide c[2][4];
  for (int i = 0; i < 4; ++i) c[0][i] = (vwide)start[i], c[1][i] = (vwide)start[i] >> 32;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (auto& x : c) {
      const vwide p0 = multiply(x[0], philox_m0), p1 = multiply(x[2], philox_m1);
      x[0] = (p1 >> 32) ^ x[1] ^ k0;
      x[1] = p1;
      x[2] = (p0 >> 32) ^ x[3] ^ k1;
      x[3] = p0;
    }
    k0 += philox_w0;
    k1 += philox_w1;
  }
  Words words;
  for (int i = 0; i < 4; ++i) words.w[i] = (vuint)((c[0][i] & 0xffffffff) | (c[1][i] << 32));
  return words;
}

static inline vfloat to_float(vuint x) {  // to nearest, ties to even: only the final addition rounds
  return __builtin_convertvector((vint)(x >> 16), vfloat) * 65536.0f + __builtin_convertvector((vint)(x & 0xffff), vfloat);
}

static inline vfloat root(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vfloat)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

static inline vfloat uniform(vuint bits) { return __builtin_convertvector((vint)(bits >> 8), vfloat) * 0x1p-24f; }

// Two independent standard normals from two words.
static inline void normal_pair(vuint a, vuint b, vfloat* x, vfloat* y) {
  const vfloat u = to_float(a) * 0x1p-32f + 0x1p-33f;
  const vint exponent = ((vint)u - 0x3f3504f3) >> 23;
  const vfloat f = (vfloat)((vint)u - (exponent << 23)) - 1.0f;
  const vfloat e = __builtin_convertvector(exponent, vfloat), z = f * f;
  vfloat p = splat(log_p[0]);
  for (int i = 1; i < 9; ++i) p = p * f + log_p[i];
  p = p * f * z;
  p = p + e * ln2_low;
  p = p - z * 0.5f;
  const vfloat radius = root(((f + p) + e * ln2_high) * -2.0f);

  const vint k = (vint)(b >> 8);
  const vint quadrant = (k + (1 << 21)) >> 22;
  const vfloat t = __builtin_convertvector(k - (quadrant << 22), vfloat) * 0x1p-24f * two_pi;
  const vfloat q = t * t;
  vfloat s = splat(sin_p[0]), c = splat(cos_p[0]);
  for (int i = 1; i < 3; ++i) s = s * q + sin_p[i], c = c * q + cos_p[i];
  s = s * q * t + t;
  c = c * q * q - q * 0.5f + 1.0f;
  const vint odd = -(quadrant & 1);
  const vint sin_bits = ((vint)c & odd) | ((vint)s & ~odd), cos_bits = ((vint)s & odd) | ((vint)c & ~odd);
  const vfloat sin = (vfloat)(sin_bits ^ ((quadrant & 2) << 30)), cos = (vfloat)(cos_bits ^ (((quadrant + 1) & 2) << 30));
  *x = radius * cos;
  *y = radius * sin;
}

static inline vuint lanes() {
  vuint i = {};
  for (int k = 0; k < W; ++k) i[k] = uint32_t(k);
  return i;
}

// x0 y0 x1 y1 …, from the lower or the upper halves of x and y.
template <bool upper>
struct Zipped {
  static constexpr int of(int i) { return (upper ? W / 2 : 0) + i / 2 + (i % 2) * W; }
};
template <bool upper>
static inline vfloat zip(vfloat x, vfloat y) {
  return shuffle<Zipped<upper>>(x, y);
}

// Stores lane i's four values at out[4 i ... 4 i + 3].
static inline void interleave(const vfloat* values, float* out) {
  const vfloat even_low = zip<false>(values[0], values[2]), even_high = zip<true>(values[0], values[2]);
  const vfloat odd_low = zip<false>(values[1], values[3]), odd_high = zip<true>(values[1], values[3]);
  store(out, zip<false>(even_low, odd_low));
  store(out + W, zip<true>(even_low, odd_low));
  store(out + 2 * W, zip<false>(even_high, odd_high));
  store(out + 3 * W, zip<true>(even_high, odd_high));
}

template <Distribution distribution>
static inline void finish(const Words& words, float* out) {
  vfloat values[4];
  if constexpr (distribution == Distribution::normal) {
    normal_pair(words.w[0], words.w[1], &values[0], &values[1]);
    normal_pair(words.w[2], words.w[3], &values[2], &values[3]);
  } else {
    for (int j = 0; j < 4; ++j) values[j] = distribution == Distribution::uniform ? uniform(words.w[j]) : (vfloat)words.w[j];
  }
  interleave(values, out);
}

// Draws elements [begin, begin + n) of one sample; begin is a multiple of 4. out has room for n rounded up to 4 W.
template <Distribution distribution>
static void draw(const NoiseAddress& noise, int64_t sample, int64_t begin, int64_t n, float* out) {
  const uint64_t id = uint64_t(noise.sample_ids[sample]);
  const vuint c2 = vuint{} + uint32_t(id), c3 = vuint{} + (uint32_t(id >> 32) << 8 | noise.stream);
  const uint32_t top = uint32_t(id >> 56) << 24;
  const uint64_t seed = *noise.seed;
  for (int64_t done = 0; done < n; done += 4 * W) {
    const uint64_t block = uint64_t(begin + done) / 4;
    const vuint c0 = uint32_t(block) + lanes();
    const vuint carry = (vuint)(c0 < uint32_t(block)) & 1;  // a true comparison is all ones
    finish<distribution>(philox(c0, (uint32_t(block >> 32) | top) + carry, c2, c3, seed), out + done);
  }
}

// Draws rows [begin, begin + rows), each of one sample with `channels` elements, a multiple of 4.
// out has room for rows * channels rounded up to 4 W.
template <Distribution distribution>
static void draw_rows(const NoiseAddress& noise, int64_t begin, int64_t rows, int64_t channels, float* out) {
  const int64_t blocks = channels / 4, total = rows * blocks;
  const int64_t* id = noise.sample_ids + begin;
  const uint64_t seed = *noise.seed;
  int64_t block = 0;
  for (int64_t done = 0; done < total; done += W) {
    alignas(vuint) uint32_t c0[W] = {}, c1[W] = {}, c2[W] = {}, c3[W] = {};
    const int64_t here = total - done < W ? total - done : W;
    for (int64_t i = 0; i < here; ++i) {
      c0[i] = uint32_t(block);
      c1[i] = uint32_t(uint64_t(*id) >> 56) << 24;
      c2[i] = uint32_t(*id);
      c3[i] = uint32_t(uint64_t(*id) >> 32) << 8 | noise.stream;
      if (++block == blocks) block = 0, ++id;
    }
    const auto lanes = [](const uint32_t* p) { return *reinterpret_cast<const vuint*>(p); };
    finish<distribution>(philox(lanes(c0), lanes(c1), lanes(c2), lanes(c3), seed), out + 4 * done);
  }
}

}  // namespace reca::RECA_ISA
