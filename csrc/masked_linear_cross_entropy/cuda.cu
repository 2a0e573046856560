// The kernels between the matmuls of linear_chunks.py: rows with a label are compacted, and the logits of a chunk are
// turned into losses and gradients in place.
//
// A row of the buffer consists of whole 16-byte units, so there are no edge elements. A block keeps the row in shared
// memory (Show-o's 58498 16-bit logits are 117 KB of Hopper's 227), or as much of it as fits. Blocks are persistent and
// process one row after another:
//
//     global   row i ----------------+                +------> gradient of row i
//                                    v                |
//     shared   |unit|unit|unit| ... read twice: sum, then gradient; a unit's slot is free as soon as its gradient is
//                ^                                    written, and is refilled with that unit of the block's next row
//     global   row i + blocks -------+
//
// A thread reads from shared memory only what it copied itself, so copies need no barrier; the only barriers of a row
// are those of its two reductions. Global memory is read once and written once per logit; units that do not fit into
// shared memory are read twice.
#include "masked_cross_entropy/rows.cuh"
#include "op.h"

namespace reca::cuda {
namespace {

constexpr const char* op = "masked_linear_cross_entropy";
constexpr int threads = 512;
constexpr int blocks_each = 2;  // most blocks per multiprocessor; limits a thread to 64 registers

struct HeadRows {
  void* logits;  // [count, pitch], whole 16-byte units; overwritten with the gradient
  int64_t pitch, count, classes;
  const void* bias;       // [pitch] in the dtype of the logits, or null
  const int64_t* labels;  // [count]
  const int64_t* rows;    // [count]: index of a row's loss; -1: none
  const float* row_grad;  // by row, or null
  const float* scale;     // []
  float* losses;          // by row
  bool gradient;          // false: losses only
};

// A thread's current 16-byte unit of a row. Addresses are incremented: computing them from the unit's index took a
// third of the instructions.
template <typename T>
struct Cursor {
  int number;
  T* logits;
  T* next;    // the same unit of the block's next row
  T* shared;  // its slot in shared memory, if it has one

  __device__ __forceinline__ void advance() {
    constexpr int step = threads * unit<T>;
    number += threads, logits += step, next += step, shared += step;
  }

  // Reads the unit's logits and adds the bias. Units below `held` are in shared memory.
  __device__ __forceinline__ void read(int held, const T* bias, float (&z)[unit<T>]) const {
    if (number < held) {
      load(shared, z);
    } else {
      load(logits, z);
    }
    if (bias) {
      float b[unit<T>];
      load(bias + number * unit<T>, b);
#pragma unroll
      for (int k = 0; k < unit<T>; ++k) z[k] += b[k];
    }
  }

  __device__ __forceinline__ void fetch_next() const { copy_async(shared, next); }
};

// held: the number of units of a row in shared memory.
template <typename T, bool general>
__global__ void __launch_bounds__(threads, blocks_each) row_gradients_kernel(const HeadRows a, const Terms terms, int held) {
  constexpr int n = unit<T>;
  T* const shared = static_cast<T*>(dynamic_shared());
  T* const all = static_cast<T*>(a.logits);
  const T* const bias = static_cast<const T*>(a.bias);
  const int classes = int(a.classes), full = classes / n, units = (classes + n - 1) / n;
  const auto is_class = [&](int64_t label) { return label >= 0 && label < a.classes; };
  const auto is_read = [&](int64_t i) { return i < a.count && a.rows[i] >= 0 && is_class(a.labels[i]); };
  const auto first_unit = [&](int64_t i) {  // of row i
    const int place = int(threadIdx.x) * n;
    T* const logits = all + i * a.pitch + place;
    return Cursor<T>{int(threadIdx.x), logits, logits + int64_t(gridDim.x) * a.pitch, shared + place};
  };
  const float factor = a.scale ? *a.scale : 0.0f;

  if (is_read(blockIdx.x)) {
    for (auto at = first_unit(blockIdx.x); at.number < held; at.advance()) copy_async(at.shared, at.logits);
  }
  for (int64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
    const int64_t row = a.rows[i], label = a.labels[i];
    const int64_t next = i + gridDim.x;
    T* const logits = all + i * a.pitch;
    const int fetched = is_read(next) ? held : 0;
    if (!is_read(i)) {
      if (row >= 0 && threadIdx.x == 0) a.losses[row] = __uint_as_float(0x7fc00000);
      const float zeros[n] = {};
      for (auto at = first_unit(i); at.number < units; at.advance()) {
        if (at.number < fetched) at.fetch_next();
        if (a.gradient) store(at.logits, zeros);
      }
      continue;
    }

    float raw_label = widen(logits[label]);
    if (bias) raw_label += widen(bias[label]);
    const float z_label = softcap_logits<general>(raw_label, terms);
    const float pivot = fabsf(z_label) < inf ? z_label : 0.0f;  // so that no digits are lost to a common offset
    OnlineSoftmax running;
    wait_for_copies();
    auto at = first_unit(i);
    for (; at.number < full; at.advance()) {
      float z[n];
      at.read(held, bias, z);
      online_softmax_update<general>(running, z, n, pivot, terms);
    }
    if (at.number < units) {
      float z[n];
      at.read(held, bias, z);
      online_softmax_update<general>(running, z, classes % n, pivot, terms);
    }
    const RowStats done = finish<threads, general>(running, z_label, pivot, a.classes, terms);
    if (threadIdx.x == 0) a.losses[row] = done.loss;
    if (!a.gradient) {
      for (at = first_unit(i); at.number < fetched; at.advance()) at.fetch_next();
      continue;
    }

    const float scale = a.row_grad ? factor * a.row_grad[row] : factor;
    const Slope slope = slope_of<general>(done.row_max, done.log_sum_exp, raw_label, scale, a.classes, terms);
    with_shift<general>(slope, [&](auto shifted) {
      for (auto at = first_unit(i); at.number < units; at.advance()) {
        float z[n];
        at.read(held, bias, z);
#pragma unroll
        for (int k = 0; k < n; ++k) z[k] = non_target_grad<general, shifted.value>(z[k], slope, terms);
        store(at.logits, z);
        if (at.number < fetched) at.fetch_next();  // overwrites a slot that this thread has finished reading
      }
    });
    // Stored by the thread that stored the unit, so that this store comes second.
    if (int(label / n) % threads == int(threadIdx.x)) logits[label] = narrow<T>(slope.target_grad);
  }
}

// ---- rows that carry a label ----

constexpr int many_threads = 1024;

__global__ void __launch_bounds__(many_threads)
    compact_labelled_rows_kernel(const void* labels, bool labels_are_int64, int64_t count, int64_t ignore_index,
                                 bool mean, int64_t most, float* losses, int64_t* rows, int64_t* row_labels,
                                 float* scale) {
  __shared__ int of_warp[many_threads / warp];
  const int lane = int(threadIdx.x) % warp, my_warp = int(threadIdx.x) / warp;
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += many_threads) {
    const int64_t r = begin + threadIdx.x;
    const int64_t label = r < count ? label_of(labels, labels_are_int64, r) : ignore_index;
    const bool keep = label != ignore_index;
    const unsigned kept = __ballot_sync(all_lanes, keep);
    if (lane == 0) of_warp[my_warp] = __popc(kept);
    __syncthreads();
    int64_t place = found + __popc(kept & ((1u << lane) - 1));
    for (int w = 0; w < many_threads / warp; ++w) {
      if (w < my_warp) place += of_warp[w];
      found += of_warp[w];
    }
    if (keep && place < most) rows[place] = r, row_labels[place] = label;
    if (r < count) losses[r] = keep && place >= most ? __uint_as_float(0x7fc00000) : 0.0f;
    __syncthreads();
  }
  for (int64_t i = found + threadIdx.x; i < most; i += many_threads) rows[i] = -1, row_labels[i] = ignore_index;
  if (threadIdx.x == 0) *scale = mean ? float(1.0 / double(found > 0 ? found : 1)) : 1.0f;
}

// A block copies a row. wide: 8 elements at a time.
constexpr int copy_threads = 256;

template <typename From, typename To>
__global__ void __launch_bounds__(copy_threads)
    gather_scatter_rows_kernel(const From* source, int64_t source_stride, const int64_t* source_rows, To* out,
                               int64_t out_stride, const int64_t* out_rows, int64_t width, bool wide) {
  const int64_t i = blockIdx.x;
  const int64_t from = source_rows ? source_rows[i] : i, to = out_rows ? out_rows[i] : i;
  if (to < 0) return;
  source += from * source_stride, out += to * out_stride;
  if (wide) {
    for (int64_t k = 8 * threadIdx.x; k < width; k += 8 * copy_threads) {
      float x[8] = {};
      if (from >= 0) load(source + k, x);
      store(out + k, x);
    }
  } else {
    for (int64_t k = threadIdx.x; k < width; k += copy_threads) out[k] = narrow<To>(from < 0 ? 0.0f : widen(source[k]));
  }
}

constexpr int most_scale_blocks = 4096;  // limited, because in place with factor 1 all blocks exit at once

template <typename T>
__global__ void __launch_bounds__(copy_threads)
    scale_kernel(const T* x, const float* factor, T* out, int64_t count, bool wide) {
  const float by = *factor;
  if (x == out && by == 1) return;
  const int64_t step = 8 * copy_threads * int64_t(gridDim.x);
  for (int64_t k = 8 * (int64_t(blockIdx.x) * copy_threads + threadIdx.x); k < count; k += step) {
    if (wide && k + 8 <= count) {
      float v[8];
      load(x + k, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= by;
      store(out + k, v);
    } else {
      for (int64_t i = k; i < count && i < k + 8; ++i) out[i] = narrow<T>(widen(x[i]) * by);
    }
  }
}

}  // namespace

void row_gradients(const CrossEntropy& args, const int64_t* rows, const void* bias, const float* row_grad,
                   const float* scale, float* losses, bool gradient, Launch on) {
  const HeadRows head = {const_cast<void*>(args.logits), args.row_stride, args.rows, args.classes, bias,
                         static_cast<const int64_t*>(args.labels), rows, row_grad, scale, losses, gradient};
  const OnDevice guard(op, on.device);
  int processors, shared_each, shared_most;
  for (const auto& [value, what] : {std::pair(&processors, cudaDevAttrMultiProcessorCount),
                                    std::pair(&shared_each, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                                    std::pair(&shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin)}) {
    check(op, cudaDeviceGetAttribute(value, what, on.device));
  }
  const int64_t units = (args.classes * size_of(args.dtype) + 15) / 16;
  // A block needs 2 KB besides the row: less than 1 for its reductions, and 1 reserved by the system. With several
  // blocks per multiprocessor, loads overlap with computation, which is worth reading up to a tenth of the row twice
  // (from L2).
  int64_t each = blocks_each, held = 0;
  for (; each > 0; --each) {
    const int64_t of_block = shared_each / each - 2048, most = shared_most - 1024;
    const int64_t room = (of_block < most ? of_block : most) / 16;
    held = units < room ? units : room;
    if (10 * held >= 9 * units || each == 1) break;
  }
  const int64_t blocks = each * processors < args.rows ? each * processors : args.rows;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = is_general(args) ? row_gradients_kernel<T, true> : row_gradients_kernel<T, false>;
    launch(op, on, kernel, blocks, threads, size_t(held) * 16, head, terms_of(args), int(held));
  });
}

void compact_labelled_rows(const void* labels, bool labels_are_int64, int64_t count, int64_t ignore_index, bool mean,
                           int64_t most, float* losses, int64_t* rows, int64_t* row_labels, float* scale, Launch on) {
  launch(op, on, compact_labelled_rows_kernel, 1, many_threads, 0, labels, labels_are_int64, count, ignore_index, mean,
         most, losses, rows, row_labels, scale);
}

void gather_scatter_rows(DType from, const void* source, int64_t source_stride, const int64_t* source_rows, DType to,
                         void* out, int64_t out_stride, const int64_t* out_rows, int64_t count, int64_t width, Launch on) {
  const bool wide = width % 8 == 0 && source_stride % 8 == 0 && out_stride % 8 == 0 && aligned(source, 16) &&
                    aligned(out, 16);
  with_type(from, [&](auto from_type) {
    with_type(to, [&](auto to_type) {
      using From = decltype(from_type);
      using To = decltype(to_type);
      launch(op, on, gather_scatter_rows_kernel<From, To>, count, copy_threads, 0, static_cast<const From*>(source),
             source_stride, source_rows, static_cast<To*>(out), out_stride, out_rows, width, wide);
    });
  });
}

void scale(DType dtype, const void* x, const float* factor, void* out, int64_t count, Launch on) {
  const int64_t blocks = (count + 8 * copy_threads - 1) / (8 * copy_threads);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, on, scale_kernel<T>, blocks < most_scale_blocks ? blocks : most_scale_blocks, copy_threads, 0,
           static_cast<const T*>(x), factor, static_cast<T*>(out), count, aligned(x, 16) && aligned(out, 16));
  });
}

}  // namespace reca::cuda
