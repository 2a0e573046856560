// The kernels around the matrix products of linear_chunks.py: rows with a label move up, and a chunk's logits become
// losses and gradients in place.
//
// A row of the buffer is whole units of 16 bytes, so nothing is handled one by one. A block keeps the row in shared
// memory (Show-o's 58498 16-bit logits are 117 KB of Hopper's 227), or as much of it as fits. Blocks stay and take row
// after row:
//
//     global   row i ----------------+                +------> gradient of row i
//                                    v                |
//     shared   |unit|unit|unit| ... read twice: sum, then gradient; a unit's place is free as soon as its gradient is
//                ^                                    written, and takes the same unit of the block's next row
//     global   row i + blocks -------+
//
// A thread reads in shared memory only what it has copied itself, so copies need no barrier; a row has those of its two
// reductions. One read and one write of global memory per logit; units that do not fit are read twice.
#include "masked_cross_entropy/rows.cuh"
#include "op.h"

namespace reca::cuda {
namespace {

constexpr const char* op = "masked_linear_cross_entropy";
constexpr int threads = 512;
constexpr int blocks_each = 2;  // at most, on a multiprocessor; so a thread may use 64 registers

struct HeadRows {
  void* logits;  // [count, pitch], whole units of 16 bytes; becomes the gradient
  int64_t pitch, count, classes;
  const void* bias;       // [pitch] in the dtype of the logits, or null
  const int64_t* labels;  // [count]
  const int64_t* rows;    // [count]: where a row's loss goes; -1: nowhere
  const float* row_grad;  // by row, or null
  const float* scale;     // []
  float* losses;          // by row
  bool gradient;          // false: losses only
};

// `held`: how many units of a row fit into shared memory.
template <typename T, bool general>
__global__ void __launch_bounds__(threads, blocks_each) row_gradients_kernel(const HeadRows a, const Terms terms, int held) {
  constexpr int n = unit<T>;
  T* const shared = static_cast<T*>(dynamic_shared());
  T* const all = static_cast<T*>(a.logits);
  const T* const bias = static_cast<const T*>(a.bias);
  const int classes = int(a.classes), units = (classes + n - 1) / n;
  const auto is_class = [&](int64_t label) { return label >= 0 && label < a.classes; };
  const auto is_read = [&](int64_t i) { return i < a.count && a.rows[i] >= 0 && is_class(a.labels[i]); };
  const auto fetch = [&](int64_t i, int u) { copy_async(shared + u * n, all + i * a.pitch + u * n); };
  const auto logits_at = [&](const T* row, int u, float(&z)[n]) {
    if (u < held) {
      load(shared + u * n, z);
    } else {
      load(row + u * n, z);
    }
    if (bias) {
      float b[n];
      load(bias + u * n, b);
#pragma unroll
      for (int k = 0; k < n; ++k) z[k] += b[k];
    }
  };
  const float factor = a.scale ? *a.scale : 0.0f;

  if (is_read(blockIdx.x)) {
    for (int u = int(threadIdx.x); u < held; u += threads) fetch(blockIdx.x, u);
  }
  for (int64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
    const int64_t row = a.rows[i], label = a.labels[i];
    const int64_t next = i + gridDim.x;
    T* const logits = all + i * a.pitch;
    const int fetched = is_read(next) ? held : 0;
    if (!is_read(i)) {
      if (row >= 0 && threadIdx.x == 0) a.losses[row] = __uint_as_float(0x7fc00000);
      const float zeros[n] = {};
      for (int u = int(threadIdx.x); u < units; u += threads) {
        if (u < fetched) fetch(next, u);
        if (a.gradient) store(logits + u * n, zeros);
      }
      continue;
    }

    float raw_label = widen(logits[label]);
    if (bias) raw_label += widen(bias[label]);
    const float z_label = softcap_logits<general>(raw_label, terms);
    const float pivot = fabsf(z_label) < inf ? z_label : 0.0f;  // so that a common offset costs no digits
    OnlineSoftmax running;
    wait_for_copies();
    for (int u = int(threadIdx.x); u < units; u += threads) {
      float z[n];
      logits_at(logits, u, z);
      const int left = classes - u * n;
      online_softmax_update<general>(running, z, left < n ? left : n, pivot, terms);
    }
    const RowStats done = finish<threads, general>(running, z_label, pivot, a.classes, terms);
    if (threadIdx.x == 0) a.losses[row] = done.loss;
    if (!a.gradient) {
      for (int u = int(threadIdx.x); u < fetched; u += threads) fetch(next, u);
      continue;
    }

    const float scale = a.row_grad ? factor * a.row_grad[row] : factor;
    const Slope slope = slope_of<general>(done.row_max, done.log_sum_exp, raw_label, scale, a.classes, terms);
    const int target_unit = int(label / n);
    const int target_place = int(label % n);
    for (int u = int(threadIdx.x); u < units; u += threads) {
      float z[n];
      logits_at(logits, u, z);
#pragma unroll
      for (int k = 0; k < n; ++k) z[k] = non_target_grad<general>(z[k], slope, terms);
      if (u == target_unit) {
#pragma unroll
        for (int k = 0; k < n; ++k) z[k] = k == target_place ? slope.target_grad : z[k];
      }
      store(logits + u * n, z);
      if (u < fetched) fetch(next, u);  // over what this thread has just used up
    }
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

// A block copies a row; `wide`: 8 elements at a time.
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

template <typename T>
__global__ void __launch_bounds__(copy_threads)
    scale_kernel(const T* x, const float* factor, T* out, int64_t count, bool wide) {
  const int64_t k = 8 * (int64_t(blockIdx.x) * copy_threads + threadIdx.x);
  if (wide && k + 8 <= count) {
    float v[8];
    load(x + k, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= *factor;
    store(out + k, v);
  } else {
    for (int64_t i = k; i < count && i < k + 8; ++i) out[i] = narrow<T>(widen(x[i]) * *factor);
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
  const int64_t room = (shared_most - 1024) / 16;  // a block's own reductions need less than 1 KB
  const int64_t held = units < room ? units : room;
  int64_t each = shared_each / (held * 16 + 2048);  // blocks; the system takes 1 KB of each
  each = each < 1 ? 1 : each < blocks_each ? each : blocks_each;
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
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, on, scale_kernel<T>, (count + 8 * copy_threads - 1) / (8 * copy_threads), copy_threads, 0,
           static_cast<const T*>(x), factor, static_cast<T*>(out), count, aligned(x, 16) && aligned(out, 16));
  });
}

}  // namespace reca::cuda
