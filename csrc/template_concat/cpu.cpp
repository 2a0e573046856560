#include "common/parallel.h"
#include "common/simd.h"
#include "op.h"

namespace reca::RECA_ISA {

namespace {

constexpr int64_t block = 1024;  // columns at a time: their fp32 sums stay in the L1 cache

template <typename T>
void read(const T* from, float* to, int64_t n, bool add) {
  int64_t i = 0;
  if (add) {
    for (; i + W <= n; i += W) store(to + i, load(to + i) + load(from + i));
    for (; i < n; ++i) to[i] += widen(from[i]);
  } else {
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = widen(from[i]);
  }
}

const char* address(const void* rows, DType dtype, int64_t element) {
  return static_cast<const char*>(rows) + element * size_of(dtype);
}

// Reads n elements into fp32 sums, or adds them.
void read(DType dtype, const void* from, float* to, int64_t n, bool add) {
  switch (dtype) {
    case DType::f32: return read(static_cast<const float*>(from), to, n, add);
    case DType::bf16: return read(static_cast<const bf16*>(from), to, n, add);
    case DType::f16: return read(static_cast<const f16*>(from), to, n, add);
  }
}

void fill(float value, DType dtype, void* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) write(dtype, &value, 1, to, i);
}

// Non-temporal stores: a long output would evict useful data from the caches, and each line would first be read.
#if defined(__AVX512F__)
using Line = __m512i;
Line line(const char* from) { return _mm512_loadu_si512(from); }
void stream(char* to, Line x) { _mm512_stream_si512(reinterpret_cast<Line*>(to), x); }
#elif defined(__AVX2__)
using Line = __m256i;
Line line(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const Line*>(from)); }
void stream(char* to, Line x) { _mm256_stream_si256(reinterpret_cast<Line*>(to), x); }
#elif defined(__SSE2__)
using Line = __m128i;
Line line(const char* from) { return _mm_loadu_si128(reinterpret_cast<const Line*>(from)); }
void stream(char* to, Line x) { _mm_stream_si128(reinterpret_cast<Line*>(to), x); }
#else
struct Line {
  char bytes[64];
};
Line line(const char* from) {
  Line x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
void stream(char* to, Line x) { std::memcpy(to, &x, sizeof x); }
#endif

// The number of bytes before the first aligned address for such a store.
int64_t unaligned(const char* to, int64_t bytes) {
  const int64_t head = -reinterpret_cast<int64_t>(to) & (sizeof(Line) - 1);
  return head < bytes ? head : bytes;
}

void stream(const char* from, char* to, int64_t bytes) {
  int64_t i = unaligned(to, bytes);
  std::memcpy(to, from, i);
  for (; i + int64_t(sizeof(Line)) <= bytes; i += sizeof(Line)) stream(to + i, line(from + i));
  std::memcpy(to + i, from + i, bytes - i);
}

void stream_zeros(char* to, int64_t bytes) {
  int64_t i = unaligned(to, bytes);
  std::memset(to, 0, i);
  for (; i + int64_t(sizeof(Line)) <= bytes; i += sizeof(Line)) stream(to + i, Line{});
  std::memset(to + i, 0, bytes - i);
}

}  // namespace

void template_concat_forward(const Sources& sources, int64_t length, int64_t width, DType out_dtype, void* out,
                             Launch on) {
  parallel_for(length, on.threads, [&](int64_t t) {
    char* const to = static_cast<char*>(out) + t * width * size_of(out_dtype);
    const Source* only = nullptr;
    int used = 0;
    bool missing = false;
    for (int64_t s = 0; s < sources.count; ++s) {
      const int64_t row = row_at(sources.of[s].index, t);
      missing |= row >= sources.of[s].count;
      if (row >= 0) only = &sources.of[s], ++used;
    }
    if (missing) return fill(NAN, out_dtype, to, width);
    if (used == 0) return stream_zeros(to, width * size_of(out_dtype));
    if (used == 1 && only->dtype == out_dtype) {
      stream(address(only->rows, out_dtype, row_at(only->index, t) * only->row_stride), to,
             width * size_of(out_dtype));
      return;
    }
    float sums[block];
    for (int64_t begin = 0; begin < width; begin += block) {
      const int64_t columns = width - begin < block ? width - begin : block;
      bool add = false;
      for (int64_t s = 0; s < sources.count; ++s) {
        const Source& source = sources.of[s];
        const int64_t row = row_at(source.index, t);
        if (row < 0) continue;
        read(source.dtype, address(source.rows, source.dtype, row * source.row_stride + begin), sums, columns, add);
        add = true;
      }
      write(out_dtype, sums, columns, to, begin);
    }
  });
}

void template_concat_backward(const SourceGradient& g, int64_t* workspace, Launch on) {
  // Stable counting sort of positions by row: those of row k are places[ends[k - 1]] to places[ends[k]], exclusive.
  int64_t* const ends = workspace;
  int64_t* const places = workspace + g.count + 1;
  std::memset(ends, 0, (g.count + 1) * sizeof(int64_t));
  for (int64_t t = 0; t < g.length; ++t) {
    const int64_t row = row_at(g.index, t);
    if (row >= 0 && row < g.count) ++ends[row + 1];
  }
  for (int64_t k = 0; k < g.count; ++k) ends[k + 1] += ends[k];
  for (int64_t t = 0; t < g.length; ++t) {
    const int64_t row = row_at(g.index, t);
    if (row >= 0 && row < g.count) places[ends[row]++] = t;
  }

  const auto first_of = [&](int64_t k) { return k == 0 ? 0 : ends[k - 1]; };
  const bool copies = g.dtype == g.grad_dtype;
  char* const gradient = static_cast<char*>(g.gradient);
  const int64_t row_bytes = g.width * size_of(g.dtype);
  if (copies) {  // rows with a single position, in the order of positions, so that grad is read sequentially
    parallel_for(g.length, on.threads, [&](int64_t t) {
      const int64_t k = row_at(g.index, t);
      if (k < 0 || k >= g.count || ends[k] - first_of(k) != 1) return;
      stream(address(g.grad, g.grad_dtype, t * g.grad_stride), gradient + k * row_bytes, row_bytes);
    });
  }
  const int64_t blocks = (g.width + block - 1) / block;
  parallel_for(g.count * blocks, on.threads, [&](int64_t item) {
    const int64_t k = item / blocks, begin = item % blocks * block;
    const int64_t columns = g.width - begin < block ? g.width - begin : block;
    const int64_t first = first_of(k), last = ends[k];
    if (copies && last - first == 1) return;
    char* const to = gradient + k * row_bytes + begin * size_of(g.dtype);
    if (first == last) return stream_zeros(to, columns * size_of(g.dtype));
    float sums[block];
    for (int64_t i = first; i < last; ++i) {
      read(g.grad_dtype, address(g.grad, g.grad_dtype, places[i] * g.grad_stride + begin), sums, columns, i > first);
    }
    write(g.dtype, sums, columns, to, 0);
  });
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(template_concat_forward,
              (const Sources& sources, int64_t length, int64_t width, DType out_dtype, void* out, Launch on),
              (sources, length, width, out_dtype, out, on))
RECA_DISPATCH(template_concat_backward, (const SourceGradient& gradient, int64_t* workspace, Launch on),
              (gradient, workspace, on))
