// A vertical pass is a weighted sum of rows, as 16-byte vectors. The horizontal pass has the same form after a
// transpose of 16 rows: a vector then contains one channel of one column for 16 rows.
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "op.h"

namespace reca::RECA_ISA {

constexpr int64_t L = 16;       // bytes per vector, and rows at a time
constexpr int precision = 22;   // fractional bits of a weight: 32, less 8 for the value and 2 for sums beyond 1

typedef uint8_t bytes __attribute__((vector_size(L)));

static inline bytes load(const uint8_t* p) {
  bytes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(uint8_t* p, bytes x) { std::memcpy(p, &x, sizeof x); }

// The weighted sum of `count` vectors, `stride` bytes apart, rounded and clipped to 8 bits.
static inline bytes weighted(const uint8_t* values, int64_t stride, const int32_t* weights, int32_t count) {
#if defined(__AVX512BW__)
  __m512i sum = _mm512_set1_epi32(1 << (precision - 1));
  for (int32_t t = 0; t < count; ++t, values += stride) {
    const __m512i x = _mm512_cvtepu8_epi32((__m128i)load(values));
    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(x, _mm512_set1_epi32(weights[t])));
  }
  sum = _mm512_max_epi32(_mm512_srai_epi32(sum, precision), _mm512_setzero_si512());
  return (bytes)_mm512_cvtusepi32_epi8(sum);
#elif defined(__AVX2__)
  __m256i low = _mm256_set1_epi32(1 << (precision - 1)), high = low;
  for (int32_t t = 0; t < count; ++t, values += stride) {
    const __m128i x = (__m128i)load(values);
    const __m256i weight = _mm256_set1_epi32(weights[t]);
    low = _mm256_add_epi32(low, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(x), weight));
    high = _mm256_add_epi32(high, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)), weight));
  }
  low = _mm256_srai_epi32(low, precision);
  high = _mm256_srai_epi32(high, precision);
  // Packing saturates and operates within 128-bit lanes.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
  return (bytes)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  int32_t sum[L];
  for (int i = 0; i < L; ++i) sum[i] = 1 << (precision - 1);
  for (int32_t t = 0; t < count; ++t, values += stride) {
    for (int i = 0; i < L; ++i) sum[i] += values[i] * weights[t];
  }
  bytes result;
  for (int i = 0; i < L; ++i) {
    const int32_t x = sum[i] >> precision;
    result[i] = x < 0 ? 0 : x > 255 ? 255 : x;
  }
  return result;
#endif
}

// Transposes x. Each of four perfect shuffles moves one bit of the row index into the column index.
static inline void transpose(bytes (&x)[L]) {
  bytes y[L];
#ifdef __SSE2__
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < L / 2; ++i) {
      y[2 * i] = (bytes)_mm_unpacklo_epi8((__m128i)x[i], (__m128i)x[i + L / 2]);
      y[2 * i + 1] = (bytes)_mm_unpackhi_epi8((__m128i)x[i], (__m128i)x[i + L / 2]);
    }
    std::memcpy(&x, &y, sizeof x);
  }
#else
  for (int i = 0; i < L; ++i) {
    for (int j = 0; j < L; ++j) y[j][i] = x[i][j];
  }
  std::memcpy(&x, &y, sizeof x);
#endif
}

// Temporary memory of a call.
struct Buffer {
  uint8_t* data;
  explicit Buffer(int64_t size) : data(static_cast<uint8_t*>(std::malloc(size))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
};

static inline int64_t padded(int64_t length) { return (length + L - 1) / L * L; }

// The range of inputs that a filter reads.
struct Range {
  int64_t begin, size;
  explicit Range(const Taps& taps)
      : begin(taps.first[0]), size(taps.first[taps.outputs - 1] + taps.count[taps.outputs - 1] - begin) {}
};

// 3 channels of pixels; see resize_rgb.
struct Image {
  const uint8_t* data;
  int64_t row, plane;
  bool interleaved;
  int64_t step() const { return interleaved ? 3 : 1; }             // bytes from one pixel to the next
  int64_t segments() const { return interleaved ? 1 : 3; }         // per row, of `width * step()` bytes each
};

// Loads up to 16 bytes, padded with zeros.
static inline bytes some(const uint8_t* from, int64_t count) {
  if (count >= L) return load(from);
  bytes x = {};
  std::memcpy(&x, from, count);
  return x;
}

// Filters vertically, `length` bytes per row.
static void down(const uint8_t* from, int64_t row, int64_t length, const Taps& taps, uint8_t* to, int64_t to_row) {
  const int64_t whole = length / L * L;
  for (int64_t o = 0; o < taps.outputs; ++o, to += to_row) {
    const uint8_t* first = from + taps.first[o] * row;
    const int32_t *weights = taps.weights + o * taps.taps, count = taps.count[o];
    for (int64_t x = 0; x < whole; x += L) store(to + x, weighted(first + x, row, weights, count));
    for (int64_t x = whole; x < length; ++x) {  // one by one, to read no byte beyond the last row
      int32_t sum = 1 << (precision - 1);
      for (int32_t t = 0; t < count; ++t) sum += first[t * row + x] * weights[t];
      sum >>= precision;
      to[x] = sum < 0 ? 0 : sum > 255 ? 255 : sum;
    }
  }
}

// Filters `height` rows horizontally. The result is planes of rows of `to_row` bytes, a multiple of 16.
static void across(const Image& image, int64_t height, const Taps& taps, uint8_t* to, int64_t to_row,
                   int64_t to_plane) {
  const Range used(taps);
  const int64_t step = image.step(), length = used.size * step, segment = padded(length);
  const int64_t apart = image.interleaved ? 1 : segment;  // distance between channels
  Buffer turned(image.segments() * segment * L);          // [segment, L]: 16 rows, transposed
  for (int64_t y = 0; y < height; y += L) {
    const int64_t rows = height - y < L ? height - y : L;
    const uint8_t* from = image.data + y * image.row + used.begin * step;
    for (int64_t s = 0; s < image.segments(); ++s) {
      for (int64_t j = 0; j < length; j += L) {
        bytes block[L];
        for (int64_t i = 0; i < L; ++i) {
          block[i] = i < rows ? some(from + s * image.plane + i * image.row + j, length - j) : bytes{};
        }
        transpose(block);
        for (int64_t i = 0; i < L; ++i) store(turned.data + (s * segment + j + i) * L, block[i]);
      }
    }
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t x = 0; x < taps.outputs; x += L) {
        bytes block[L] = {};
        for (int64_t i = 0; i < L && x + i < taps.outputs; ++i) {
          const int64_t o = x + i;
          block[i] = weighted(turned.data + ((taps.first[o] - used.begin) * step + c * apart) * L, step * L,
                              taps.weights + o * taps.taps, taps.count[o]);
        }
        transpose(block);
        for (int64_t i = 0; i < rows; ++i) store(to + c * to_plane + (y + i) * to_row + x, block[i]);
      }
    }
  }
}

void resize_rgb(const uint8_t* data, int64_t row, int64_t plane, bool interleaved, const Taps& columns,
                const Taps& rows, bool down_first, uint8_t* out, Launch) {
  const Image image{data, row, plane, interleaved};
  const int64_t w = columns.outputs, h = rows.outputs, wide = padded(w);
  if (down_first) {
    const Range used(columns);
    const int64_t step = image.step(), segment = padded(used.size * step), length = used.size * step;
    Buffer flat(image.segments() * segment * h), result(3 * wide * h);
    for (int64_t s = 0; s < image.segments(); ++s) {
      down(data + s * plane + used.begin * step, row, length, rows, flat.data + s * segment * h, segment);
    }
    const Image between{flat.data - used.begin * step, segment, segment * h, interleaved};
    across(between, h, columns, result.data, wide, wide * h);
    for (int64_t y = 0; y < 3 * h; ++y) std::memcpy(out + y * w, result.data + y * wide, w);
    return;
  }
  const Range used(rows);
  Buffer narrow(3 * wide * used.size);
  across({data + used.begin * row, row, plane, interleaved}, used.size, columns, narrow.data, wide, wide * used.size);
  for (int64_t c = 0; c < 3; ++c) {
    down(narrow.data + (c * used.size - used.begin) * wide, wide, w, rows, out + c * h * w, w);
  }
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(resize_rgb,
              (const uint8_t* image, int64_t row, int64_t plane, bool interleaved, const Taps& columns,
               const Taps& rows, bool down_first, uint8_t* out, Launch on),
              (image, row, plane, interleaved, columns, rows, down_first, out, on))
