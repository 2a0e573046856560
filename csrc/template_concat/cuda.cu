// Gathers rows of several tables, adds them and writes the sum once; and the gradient of each table.
//
// Consecutive threads handle consecutive units of V elements: 16 bytes of the output if all rows are 16-byte aligned,
// else one element. reca_kernels/template_concat/row_gradients.py defines the order of sums.
#include <type_traits>

#include "common/cuda.cuh"
#include "op.h"

namespace reca::cuda {
namespace {

// Three blocks per multiprocessor are enough. With this bound ptxas groups the loads of a thread; without it, it saves
// registers, and each load waits for the previous one.
constexpr int warps = 8, threads = warps * warp, blocks = 3;
constexpr int ahead = 4;       // loads in flight per thread
constexpr int64_t chunk = 64;  // row_gradients.CHUNK
constexpr const char* op = "template_concat";

struct HeldSources {
  Source of[max_sources];
  int n;
};

// The positions that used each row, sorted by row.
struct Places {
  Index rows;             // [length], ascending
  const int64_t* places;  // [length]
  const int64_t* starts;  // [count + 1]
  float* sums;            // [2 * windows of a chunk, width], or null
};

// min(i, n - 1): a clamped index instead of a branch, behind which a load would wait for the previous one.
__device__ __forceinline__ int64_t inside(int64_t i, int64_t n) { return i < n ? i : n - 1; }

// ---- units of a row ----

template <int V, typename T>
__device__ __forceinline__ void read(const T* from, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = widen(*from);
  } else {
    load(from, x);
  }
}

template <int V>
__device__ __forceinline__ void write(const float (&x)[V], DType dtype, void* to, int64_t element) {
  static_assert(V == 1 || V == 4 || V == 8);
  if constexpr (V == 8) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = dtype == DType::bf16 ? pack<bf16>(x[2 * i], x[2 * i + 1]) : pack<f16>(x[2 * i], x[2 * i + 1]);
    }
    store_words(static_cast<uint16_t*>(to) + element, words);
  } else if constexpr (V == 4) {
    store(static_cast<float*>(to) + element, x);
  } else {
    type_of(dtype, [&](auto type) { static_cast<decltype(type)*>(to)[element] = narrow<decltype(type)>(x[0]); });
  }
}

// ---- a row, by one warp ----

template <int V>
__device__ __forceinline__ void fill_row(float value, DType dtype, void* to, int64_t element, int64_t units) {
  float x[V];
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = value;
#pragma unroll 1
  for (int64_t u = threadIdx.x % warp; u < units; u += warp) write(x, dtype, to, element + u * V);
}

// Copies units of `n` 32-bit words, or of 16 bits if n is 0.
template <int n>
__device__ __forceinline__ void copy_units(const char* from, char* to, int64_t units) {
  constexpr int bytes = n ? 4 * n : 2;
#pragma unroll 1
  for (int64_t begin = threadIdx.x % warp; begin < units; begin += warp * ahead) {
    uint32_t held[ahead][n ? n : 1];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const char* const p = from + (begin + warp * i) * bytes;
      if (begin + warp * i >= units) continue;
      if constexpr (n) {
        load_words(p, held[i]);
      } else {
        held[i][0] = *reinterpret_cast<const uint16_t*>(p);
      }
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      char* const p = to + (begin + warp * i) * bytes;
      if (begin + warp * i >= units) continue;
      if constexpr (n) {
        store_words(p, held[i]);
      } else {
        *reinterpret_cast<uint16_t*>(p) = uint16_t(held[i][0]);
      }
    }
  }
}

template <int V>
__device__ __forceinline__ void copy_row(DType from_dtype, const void* from, int64_t from_element, DType dtype,
                                         void* to, int64_t element, int64_t units) {
  if (from_dtype == dtype) {
    const char* const first = static_cast<const char*>(from) + from_element * (dtype == DType::f32 ? 4 : 2);
    char* const target = static_cast<char*>(to) + element * (dtype == DType::f32 ? 4 : 2);
    if constexpr (V > 1) {
      copy_units<4>(first, target, units);
    } else if (dtype == DType::f32) {
      copy_units<1>(first, target, units);
    } else {
      copy_units<0>(first, target, units);
    }
    return;
  }
  type_of(from_dtype, [&](auto type) {
    const auto* const row = static_cast<const decltype(type)*>(from) + from_element;
#pragma unroll 1
    for (int64_t u = threadIdx.x % warp; u < units; u += warp) {
      float x[V];
      read(row + u * V, x);
      write(x, dtype, to, element + u * V);
    }
  });
}

// ---- forward ----

template <int V>
__device__ __forceinline__ void add_rows(const HeldSources& sources, int64_t t, DType dtype, void* to, int64_t width) {
  constexpr int held = 2;
  const int64_t units = width / V;
#pragma unroll 1
  for (int64_t begin = threadIdx.x % warp; begin < units; begin += warp * held) {
    float sum[held][V] = {};
    bool first = true;
#pragma unroll 1
    for (int s = 0; s < sources.n; ++s) {
      const Source& source = sources.of[s];
      const int64_t row = row_at(source.index, t);
      if (row < 0) continue;
      type_of(source.dtype, [&](auto type) {
        const auto* const from = static_cast<const decltype(type)*>(source.rows) + row * source.row_stride;
        float x[held][V];
#pragma unroll
        for (int i = 0; i < held; ++i) read(from + inside(begin + warp * i, units) * V, x[i]);
#pragma unroll
        for (int i = 0; i < held; ++i) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[i][v] = first ? x[i][v] : sum[i][v] + x[i][v];
        }
      });
      first = false;
    }
#pragma unroll
    for (int i = 0; i < held; ++i) {
      if (begin + warp * i < units) write(sum[i], dtype, to, t * width + (begin + warp * i) * V);
    }
  }
}

// A warp writes a row.
template <int V>
__global__ void __launch_bounds__(threads, blocks)
    concat_forward_kernel(const __grid_constant__ HeldSources sources, int64_t length, int64_t width, DType dtype,
                          void* out) {
  const int64_t t = int64_t(blockIdx.x) * warps + threadIdx.x / warp;
  if (t >= length) return;
  int used = 0, last = 0;
  bool missing = false;
#pragma unroll 1
  for (int s = 0; s < sources.n; ++s) {
    const int64_t row = row_at(sources.of[s].index, t);
    missing |= row >= sources.of[s].count;
    if (row >= 0) ++used, last = s;
  }
  const Source& source = sources.of[last];
  if (missing) {
    fill_row<V>(__uint_as_float(0x7fc00000), dtype, out, t * width, width / V);
  } else if (used == 1 && source.dtype == dtype) {
    copy_row<V>(dtype, source.rows, row_at(source.index, t) * source.row_stride, dtype, out, t * width, width / V);
  } else {
    add_rows<V>(sources, t, dtype, out, width);
  }
}

// ---- backward ----

// Sums n > 0 rows in order; row i is at from + at(i).
template <int V, typename T, typename At>
__device__ __forceinline__ void sum_rows(const T* from, int64_t n, const At& at, float (&sum)[V]) {
  read(from + at(0), sum);
#pragma unroll 1
  for (int64_t begin = 1; begin < n; begin += ahead) {
    float x[ahead][V];
#pragma unroll
    for (int i = 0; i < ahead; ++i) read(from + at(inside(begin + i, n)), x[i]);
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = begin + i < n ? sum[v] + x[i][v] : sum[v];
    }
  }
}

template <int V>
__device__ __forceinline__ void sum_places(const SourceGradient& g, const int64_t* places, int64_t n, int64_t unit,
                                           float (&sum)[V]) {
  type_of(g.grad_dtype, [&](auto type) {
    const auto* const grad = static_cast<const decltype(type)*>(g.grad) + unit * V;
    sum_rows(grad, n, [&](int64_t i) { return places[i] * g.grad_stride; }, sum);
  });
}

// Sums the chunks of rows that have more than one chunk, with a warp per chunk and 32 units. A chunk is stored by the
// window of `chunk` sorted positions in which it begins. Two chunks can begin in one window, the last of a row and the
// first of the next: slot 2 window + 1 is for the first chunk of a row, slot 2 window for a later one.
template <int V>
__global__ void __launch_bounds__(threads, blocks) concat_chunks_kernel(const SourceGradient g, const Places p) {
  const int64_t units = g.width / V, groups = (units + warp - 1) / warp;
  const int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / warp;
  const int64_t slot = item / groups, unit = item % groups * warp + threadIdx.x % warp;
  if (slot / 2 * chunk >= g.length || unit >= units) return;
  const bool first = slot % 2;
  const int64_t low = slot / 2 * chunk, high = low + chunk < g.length ? low + chunk : g.length;
  const int64_t row = row_at(p.rows, first ? high - 1 : low);
  if (row < 0 || row >= g.count) return;
  const int64_t start = p.starts[row], end = p.starts[row + 1];
  const int64_t begin = first ? start : start + (low - start + chunk - 1) / chunk * chunk;
  if (end - start <= chunk || begin < low || begin >= high || begin >= end || first != (begin == start)) return;
  float sum[V];
  sum_places(g, p.places + begin, end - begin < chunk ? end - begin : chunk, unit, sum);
  float* const to = p.sums + slot * g.width + unit * V;
  if constexpr (V == 1) {
    *to = sum[0];
  } else {
    store(to, sum);
  }
}

// A block writes `warps` rows: one per warp if there is nothing to add, else all warps together, row by row.
template <int V>
__global__ void __launch_bounds__(threads, blocks) concat_rows_kernel(const SourceGradient g, const Places p) {
  const int64_t from = int64_t(blockIdx.x) * warps, units = g.width / V;
  if (const int64_t k = from + threadIdx.x / warp; k < g.count) {
    const int64_t start = p.starts[k], n = p.starts[k + 1] - start;
    if (n == 0) fill_row<V>(0.0f, g.dtype, g.gradient, k * g.width, units);
    if (n == 1) {
      copy_row<V>(g.grad_dtype, g.grad, p.places[start] * g.grad_stride, g.dtype, g.gradient, k * g.width, units);
    }
  }
#pragma unroll 1
  for (int64_t k = from; k < from + warps && k < g.count; ++k) {
    const int64_t start = p.starts[k], n = p.starts[k + 1] - start;
    if (n < 2) continue;
#pragma unroll 1
    for (int64_t unit = threadIdx.x; unit < units; unit += threads) {
      float sum[V];
      if (n <= chunk) {
        sum_places(g, p.places + start, n, unit, sum);
      } else {
        const auto slot = [&](int64_t i) { return ((start / chunk + i) * 2 + (i == 0)) * g.width; };
        sum_rows(p.sums + unit * V, (n + chunk - 1) / chunk, slot, sum);
      }
      write(sum, g.dtype, g.gradient, k * g.width + unit * V);
    }
  }
}

// used, initially 0: length minus the first position of each row, and 1 plus the last.
__global__ void __launch_bounds__(threads, blocks) concat_map_kernel(const SourceGradient g, unsigned long long* used) {
  const int64_t t = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (t >= g.length) return;
  const int64_t row = row_at(g.index, t);
  if (row < 0 || row >= g.count) return;
  atomicMax(used + row, static_cast<unsigned long long>(g.length - t));
  atomicMax(used + g.count + row, static_cast<unsigned long long>(t + 1));
}

// Searches for row k's positions between its first and its last. The order of sums is that of the sorted version.
template <int V>
__device__ __forceinline__ void sum_found(const SourceGradient& g, int64_t k, int64_t first, int64_t end, int64_t unit,
                                          float (&sum)[V]) {
  type_of(g.grad_dtype, [&](auto type) {
    const auto* const grad = static_cast<const decltype(type)*>(g.grad) + unit * V;
    bool any = false;
#pragma unroll 1
    for (int64_t t = first; t < end;) {
      float part[V] = {};
      int64_t n = 0;
#pragma unroll 1
      for (; t < end && n < chunk; ++t) {
        if (row_at(g.index, t) != k) continue;
        float x[V];
        read(grad + t * g.grad_stride, x);
#pragma unroll
        for (int v = 0; v < V; ++v) part[v] = n > 0 ? part[v] + x[v] : x[v];
        ++n;
      }
      if (n == 0) break;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = any ? sum[v] + part[v] : part[v];
      any = true;
    }
  });
}

// Each warp writes one row.
template <int V>
__global__ void __launch_bounds__(threads, blocks)
    concat_mapped_kernel(const SourceGradient g, const unsigned long long* used) {
  const int64_t k = int64_t(blockIdx.x) * warps + threadIdx.x / warp, units = g.width / V;
  if (k >= g.count) return;
  const int64_t first = g.length - int64_t(used[k]), end = int64_t(used[g.count + k]);
  if (end == 0) {
    fill_row<V>(0.0f, g.dtype, g.gradient, k * g.width, units);
  } else if (first + 1 == end) {
    copy_row<V>(g.grad_dtype, g.grad, first * g.grad_stride, g.dtype, g.gradient, k * g.width, units);
  } else {
#pragma unroll 1
    for (int64_t unit = threadIdx.x % warp; unit < units; unit += warp) {
      float sum[V];
      sum_found(g, k, first, end, unit, sum);
      write(sum, g.dtype, g.gradient, k * g.width + unit * V);
    }
  }
}

// ---- launches ----

int64_t blocks_of(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

bool wide_rows(DType dtype, const void* rows, int64_t stride) {
  return aligned(rows, 16) && stride * size_of(dtype) % 16 == 0;
}

// Calls f with the number of elements per unit, as a type: 16 bytes of `written` if every row that is read is wide.
template <typename F>
void with_units(DType written, bool wide, int64_t width, const F& f) {
  if (wide && written == DType::f32 && width % 4 == 0) return f(std::integral_constant<int, 4>());
  if (wide && written != DType::f32 && width % 8 == 0) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, 1>());
}

}  // namespace

void template_concat_forward(const Sources& sources, int64_t length, int64_t width, DType out_dtype, void* out,
                             Launch on) {
  if (sources.count > max_sources) {
    throw std::invalid_argument(std::string(op) + ": the CUDA kernel adds at most " + std::to_string(max_sources - 2) +
                                " tables, got " + std::to_string(sources.count - 2) + "; add some of them beforehand");
  }
  HeldSources held = {{}, int(sources.count)};
  bool wide = aligned(out, 16);
  for (int s = 0; s < held.n; ++s) {
    const Source& source = held.of[s] = sources.of[s];
    wide &= source.count == 0 || wide_rows(source.dtype, source.rows, source.row_stride);
  }
  with_units(out_dtype, wide, width, [&](auto units) {
    constexpr int V = decltype(units)::value;
    launch(op, on, concat_forward_kernel<V>, blocks_of(length, warps), threads, 0, held, length, width, out_dtype, out);
  });
}

void template_concat_backward_sorted(const SourceGradient& g, const Index& rows, const int64_t* places,
                                     const int64_t* starts, float* sums, Launch on) {
  const Places p = {rows, places, starts, sums};
  const bool wide = wide_rows(g.grad_dtype, g.grad, g.grad_stride) && aligned(g.gradient, 16) && aligned(p.sums, 16);
  with_units(g.dtype, wide, g.width, [&](auto units) {
    constexpr int V = decltype(units)::value;
    if (p.sums) {
      const int64_t groups = blocks_of(g.width / V, warp), slots = 2 * blocks_of(g.length, chunk);
      launch(op, on, concat_chunks_kernel<V>, blocks_of(slots * groups, warps), threads, 0, g, p);
    }
    launch(op, on, concat_rows_kernel<V>, blocks_of(g.count, warps), threads, 0, g, p);
  });
}

void template_concat_backward_mapped(const SourceGradient& g, uint64_t* used, Launch on) {
  auto* const map = reinterpret_cast<unsigned long long*>(used);  // atomicMax takes no uint64_t
  launch(op, on, concat_map_kernel, blocks_of(g.length, threads), threads, 0, g, map);
  const bool wide = wide_rows(g.grad_dtype, g.grad, g.grad_stride) && aligned(g.gradient, 16);
  with_units(g.dtype, wide, g.width, [&](auto units) {
    constexpr int V = decltype(units)::value;
    launch(op, on, concat_mapped_kernel<V>, blocks_of(g.count, warps), threads, 0, g, map);
  });
}

}  // namespace reca::cuda
