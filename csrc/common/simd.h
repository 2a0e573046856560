// A vector of floats of the instruction set's width, and the operations that the kernels need.
// Included by every file that is compiled per instruction set, and therefore in its namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "common/types.h"

namespace reca::RECA_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// GCC and Clang vector types: they support + - * / and comparisons, and a * b + c contracts to a fused multiply-add.
typedef float vfloat __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef uint32_t vuint __attribute__((vector_size(4 * W)));
typedef uint64_t vwide __attribute__((vector_size(4 * W)));
typedef double vdouble __attribute__((vector_size(8 * W)));
typedef uint16_t vhalf __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline vfloat splat(float x) { return vfloat{} + x; }

// The maximum, or b if either is NaN. So max(bound, x) propagates NaN in x.
static inline vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// Lane i of the result is lane Order::of(i) of x and y, concatenated.
template <typename Order, size_t... i>
static inline vfloat shuffle(vfloat x, vfloat y, std::index_sequence<i...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, Order::of(i)...);
#else  // GCC has __builtin_shufflevector only from version 12 on
  return __builtin_shuffle(x, y, vint{Order::of(i)...});
#endif
}
template <typename Order>
static inline vfloat shuffle(vfloat x, vfloat y) {
  return shuffle<Order>(x, y, std::make_index_sequence<W>());
}

template <int half>
struct Partner {
  static constexpr int of(int i) { return i ^ half; }
};

template <int half>
static inline float fold(vfloat x) {
  x += shuffle<Partner<half>>(x, x);
  if constexpr (half > 1) return fold<half / 2>(x);
  return x[0];
}

// Pairwise, in a fixed order; a sequential sum would make every addition wait for the previous one.
static inline float sum(vfloat x) { return fold<W / 2>(x); }

static inline vdouble to_double(vfloat x) { return __builtin_convertvector(x, vdouble); }

static inline double sum(vdouble x) {
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

template <int half>
static inline float fold_largest(vfloat x) {
  x = max(x, shuffle<Partner<half>>(x, x));
  if constexpr (half > 1) return fold_largest<half / 2>(x);
  return x[0];
}

static inline float largest(vfloat x) { return fold_largest<W / 2>(x); }

// ---- memory ----

static inline vfloat load(const float* p) {
  vfloat x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, vfloat x) { std::memcpy(p, &x, sizeof x); }

static inline vfloat load(const bf16* p) {
  vhalf h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}
// bf16 in the upper halves, rounded to nearest, ties to even; NaN stays NaN.
static inline vuint bf16_bits(vfloat x) {
  const vuint u = (vuint)x, rounded = u + 0x7fff + ((u >> 16) & 1);
  return x == x ? rounded : vuint{} + 0x7fc00000;
}
static inline void store(bf16* p, vfloat x) {
  vhalf h = __builtin_convertvector(bf16_bits(x) >> 16, vhalf);
  std::memcpy(p, &h, sizeof h);
}

static inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, u;
  if (rest >= 0x7c00) {
    u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else {  // exact: a multiplication adjusts the exponent, which handles denormals too
    u = rest << 13;
    float f;
    std::memcpy(&f, &u, 4);
    f *= 0x1p112f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}
static inline f16 narrow_f16(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or beyond
  if (u < 0x38800000) {                                   // denormal: the addition rounds at the right bit
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return {uint16_t(sign | (u - 0x3f000000))};
  }
  return {uint16_t(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13))};
#endif
}
static inline float widen(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline bf16 narrow_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline float widen(float x) { return x; }
static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, bf16* p) { *p = narrow_bf16(x); }
static inline void narrow(float x, f16* p) { *p = narrow_f16(x); }

static inline vfloat load(const f16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vfloat x;
  for (int i = 0; i < W; ++i) x[i] = widen(p[i]);
  return x;
#endif
}
static inline void store(f16* p, vfloat x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = narrow_f16(x[i]);
#endif
}

// Prefetches memory that will be read soon. The range may extend beyond the allocation.
static inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
}

// Load or store 2 W elements at once, in an unspecified lane order that both share, so that 16-bit elements need no
// cross-lane moves.
template <typename T>
static inline void load_pair(const T* p, vfloat& a, vfloat& b) {
  a = load(p), b = load(p + W);
}
static inline void load_pair(const bf16* p, vfloat& a, vfloat& b) {
  vuint both;
  std::memcpy(&both, p, sizeof both);
  a = (vfloat)(both << 16), b = (vfloat)(both & 0xffff0000);
}
template <typename T>
static inline void store_pair(T* p, vfloat a, vfloat b) {
  store(p, a), store(p + W, b);
}
// NaN stays NaN unless all its bits are set, which arithmetic never produces from other values.
static inline void store_pair(bf16* p, vfloat a, vfloat b) {
#if defined(__AVX512BW__)
  // Rounds both at once in 16-bit lanes: the kept half is incremented if the cut half plus the kept half's last bit
  // exceeds 0x8000.
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000)), x = (__m512i)a, y = (__m512i)b;
  const __m512i kept = _mm512_ternarylogic_epi32(upper, y, _mm512_srli_epi32(x, 16), 0xca);  // upper ? y : x
  const __m512i cut = _mm512_ternarylogic_epi32(upper, _mm512_slli_epi32(y, 16), x, 0xca);
  const __m512i last = _mm512_and_si512(kept, _mm512_set1_epi16(1));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(_mm512_adds_epu16(cut, last), _mm512_set1_epi16(int16_t(0x8000)));
  _mm512_storeu_si512(p, _mm512_mask_add_epi16(kept, up, kept, _mm512_set1_epi16(1)));
#else
  const vuint both = bf16_bits(a) >> 16 | (bf16_bits(b) & 0xffff0000);
  std::memcpy(p, &both, sizeof both);
#endif
}

// ---- conversion between typed memory and float buffers ----

static inline void read(DType type, const void* from, int64_t begin, int64_t n, float* to) {
  const auto copy = [&](auto* p) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(p + begin + i));
    for (; i < n; ++i) to[i] = widen(p[begin + i]);
  };
  if (type == DType::f32) copy(static_cast<const float*>(from));
  if (type == DType::bf16) copy(static_cast<const bf16*>(from));
  if (type == DType::f16) copy(static_cast<const f16*>(from));
}

// n elements as floats: in place if they are fp32, else widened into the buffer.
static inline const float* floats(DType type, const void* from, int64_t begin, int64_t n, float* buffer) {
  if (type == DType::f32) return static_cast<const float*>(from) + begin;
  read(type, from, begin, n, buffer);
  return buffer;
}

static inline void write(DType type, const float* from, int64_t n, void* to, int64_t begin) {
  const auto copy = [&](auto* p) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(p + begin + i, load(from + i));
    for (; i < n; ++i) narrow(from[i], p + begin + i);
  };
  if (type == DType::f32) copy(static_cast<float*>(to));
  if (type == DType::bf16) copy(static_cast<bf16*>(to));
  if (type == DType::f16) copy(static_cast<f16*>(to));
}

// ---- functions ----

// factor e^x for x <= 88, with relative error at most 2e-7 + 1.4e-8 |x|; 0 below -87.3, where e^x is denormal; NaN
// stays NaN. Beyond 88 the result depends on the instruction set: the test for it would cost a fifth with AVX2.
static inline vfloat exp(vfloat x, float factor = 1) {
#if defined(__AVX512F__)
  // 2^(n + r): the fraction of n, a multiple of 1/32, by lookup table, and |r| <= 1/64 by a quadratic polynomial. This
  // takes half the instructions of the version below, and the factor is multiplied into the table outside the loop.
  const __m512 low = _mm512_setr_ps(1.0f, 1.02189720f, 1.04427373f, 1.06714046f, 1.09050775f, 1.11438680f, 1.13878858f,
                                    1.16372490f, 1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f,
                                    1.32523668f, 1.35425556f, 1.38390994f);
  const __m512 high = _mm512_setr_ps(1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.57598090f,
                                     1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
                                     1.83400810f, 1.87416768f, 1.91520655f, 1.95714414f);
  const __m512 log2_e = _mm512_set1_ps(1.44269504f), wide = _mm512_set1_ps(factor);
  const __m512 moved = _mm512_fmadd_ps((__m512)x, log2_e, _mm512_set1_ps(393216.0f));  // 1.5 2^18: its last bit is 1/32
  const vfloat n = (vfloat)moved - 393216.0f;
  const vfloat r = (vfloat)_mm512_fmsub_ps((__m512)x, log2_e, (__m512)n);  // fused even under -ffp-contract=off
  const vfloat t = (vfloat)_mm512_permutex2var_ps(low * wide, (__m512i)moved, high * wide);
  const vfloat y = t * ((r * 0.240226507f + 0.693157315f) * r) + t;
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(kept, (__m512)y, (__m512)n);
#else
  vfloat bounded = max(splat(-87.5f), x);
  // Rounds to the nearest integer by the addition of 1.5 2^23, whose low bits are then the integer.
  vfloat shifted = bounded * 1.44269504f + 12582912.0f;
  vfloat n = shifted - 12582912.0f;
  vfloat r = bounded - n * 0.693359375f;  // ln 2 in two parts (Cody and Waite)
  r = r + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = (vfloat)((vuint)p + ((vuint)shifted << 23));  // times 2^n
  return x < -87.3f ? splat(0.0f) : p * factor;
#endif
}

// Hyperbolic tangent, absolute error below 2e-7.
static inline vfloat tanh(vfloat x) {
  vfloat size = (vfloat)((vint)x & 0x7fffffff);
  vfloat e = exp(size * -2.0f);
  vfloat far = (1.0f - e) / (1.0f + e);
  vfloat s = x * x;  // near 0 a polynomial, because 1 - e cancels there
  vfloat near = size + size * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
  vfloat t = size < 0.25f ? near : far;
  return (vfloat)((vuint)t | ((vuint)x & 0x80000000u));
}

}  // namespace reca::RECA_ISA
