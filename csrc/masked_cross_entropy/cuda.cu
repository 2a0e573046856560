// Cross-entropy of logits: a block per row in the forward pass, a block per piece of a row in the backward pass.
//
// Rows have any alignment (with Show-o's 58498 classes, 16-bit rows are only 4-byte aligned). A row is therefore read
// in 16-byte units between its first and last 16-byte boundary, and the few elements outside them one by one:
//
//     memory   |. . . . . . a a|U U U U U U U U|U U U U U U U U|b b b . . . . .|      | = a 16-byte boundary
//                           row                units                  end             a, b: edge elements
//
// For a row without a label, only the label is read, and the backward pass writes zeros.
#include "rows.cuh"

namespace reca::cuda {
namespace {

constexpr int threads = 256;
constexpr int units_a_piece = 8 * threads;

struct Rows {
  const void* logits;
  int64_t stride, classes;
  const void* labels;
  bool labels_are_int64;
  int64_t ignore_index;

  __device__ int64_t label(int64_t row) const { return label_of(labels, labels_are_int64, row); }
  __device__ bool is_class(int64_t label) const { return label != ignore_index && label >= 0 && label < classes; }
};

Rows rows_of(const CrossEntropy& args) {
  return {args.logits, args.row_stride, args.classes, args.labels, args.labels_are_int64, args.ignore_index};
}

// The layout of a row: `head` elements, then `units` units, then the remaining elements.
struct Layout {
  int head;
  int64_t units;
};

template <typename T>
__device__ __forceinline__ Layout layout_of(const T* row, int64_t classes) {
  int64_t head = (16 - int(reinterpret_cast<uintptr_t>(row) % 16)) % 16 / int(sizeof(T));
  if (head > classes) head = classes;
  return {int(head), (classes - head) / unit<T>};
}

// The edge element that this thread handles, or -1. The first threads handle those before the units, the next those
// after.
template <typename T>
__device__ __forceinline__ int64_t edge_of(const Layout& at, int64_t classes) {
  const int i = int(threadIdx.x);
  if (i < unit<T>) return i < at.head ? i : -1;
  const int64_t tail = at.head + at.units * unit<T> + (i - unit<T>);
  return i < 2 * unit<T> && tail < classes ? tail : -1;
}

template <typename T, bool general>
__global__ void __launch_bounds__(threads)
    masked_cross_entropy_forward_kernel(const Rows rows, const Terms terms, float* losses, float* stats) {
  constexpr int at_once = 4;  // units that a thread loads before using the first
  const int64_t r = blockIdx.x;
  const int64_t label = rows.label(r);
  if (!rows.is_class(label)) {
    if (threadIdx.x == 0) {
      losses[r] = label == rows.ignore_index ? 0.0f : __uint_as_float(0x7fc00000);
      stats[2 * r] = stats[2 * r + 1] = 0;
    }
    return;
  }
  const T* const row = static_cast<const T*>(rows.logits) + r * rows.stride;
  const Layout at = layout_of(row, rows.classes);
  const float z_label = softcap_logits<general>(widen(row[label]), terms);
  const float pivot = fabsf(z_label) < inf ? z_label : 0.0f;  // so that no digits are lost to a common offset
  OnlineSoftmax running;
  const int64_t edge = edge_of<T>(at, rows.classes);
  if (edge >= 0) {
    float z[1] = {widen(row[edge])};
    online_softmax_update<general>(running, z, 1, pivot, terms);
  }
  const T* const units = row + at.head;
  for (int64_t u = threadIdx.x; u < at.units; u += at_once * threads) {
    float z[at_once][unit<T>];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      if (u + i * threads < at.units) load(units + (u + i * threads) * unit<T>, z[i]);
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      if (u + i * threads < at.units) online_softmax_update<general>(running, z[i], unit<T>, pivot, terms);
    }
  }
  const RowStats done = finish<threads, general>(running, z_label, pivot, rows.classes, terms);
  if (threadIdx.x == 0) {
    losses[r] = done.loss;
    stats[2 * r] = done.row_max, stats[2 * r + 1] = done.log_sum_exp;
  }
}

template <typename T, bool general>
__global__ void __launch_bounds__(threads)
    masked_cross_entropy_backward_kernel(const Rows rows, const Terms terms, int64_t pieces, const float* stats,
                                         const float* grad, int64_t grad_stride, const float* scale, void* gradient,
                                         int64_t gradient_stride) {
  constexpr int at_once = 2;
  const int64_t r = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t label = rows.label(r);
  T* const out = static_cast<T*>(gradient) + r * gradient_stride;
  const Layout at = layout_of(out, rows.classes);
  const int64_t edge = piece == 0 ? edge_of<T>(at, rows.classes) : -1;
  const int64_t first = piece * units_a_piece;
  const int64_t last = first + units_a_piece < at.units ? first + units_a_piece : at.units;
  T* const out_units = out + at.head;

  if (!rows.is_class(label)) {
    if (edge >= 0) out[edge] = narrow<T>(0.0f);
    const float zeros[unit<T>] = {};
    for (int64_t u = first + threadIdx.x; u < last; u += threads) store(out_units + u * unit<T>, zeros);
    return;
  }

  const T* const row = static_cast<const T*>(rows.logits) + r * rows.stride;
  // The gradient may overwrite the logits, so the target logit is loaded before the stores. If another thread has
  // already overwritten it, this thread does not own that element, and the value is unused. Loading it in the owner only
  // takes 8 registers more.
  const float raw_label = widen(load_racing(row + label));
  const Slope slope = slope_of<general>(stats[2 * r], stats[2 * r + 1], raw_label, *scale * grad[r * grad_stride],
                                        rows.classes, terms);
  if (edge >= 0) {
    const float z = widen(row[edge]);
    out[edge] = narrow<T>(edge == label ? slope.target_grad : non_target_grad<general, false>(z, slope, terms));
  }
  const bool in_step = (reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const T* const units = row + at.head;
  const int64_t target_unit = label >= at.head ? (label - at.head) / unit<T> : -1;
  with_shift<general>(slope, [&](auto shifted) {
    for (int64_t u = first + threadIdx.x; u < last; u += at_once * threads) {
      float z[at_once][unit<T>];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const T* const from = units + (u + i * threads) * unit<T>;
        if (u + i * threads >= last) continue;
        if (in_step) {
          load(from, z[i]);
        } else {
#pragma unroll
          for (int k = 0; k < unit<T>; ++k) z[i][k] = widen(from[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (u + i * threads >= last) continue;
#pragma unroll
        for (int k = 0; k < unit<T>; ++k) z[i][k] = non_target_grad<general, shifted.value>(z[i][k], slope, terms);
        store(out_units + (u + i * threads) * unit<T>, z[i]);
      }
    }
  });
  // Stored by the thread that stored the unit, so that this store comes second.
  if (target_unit >= first && target_unit < last && (target_unit - first) % threads == threadIdx.x) {
    out[label] = narrow<T>(slope.target_grad);
  }
}

// Computes the loss and the factor for gradients, in one block and a fixed order.
constexpr int many_threads = 1024;

__global__ void __launch_bounds__(many_threads)
    reduce_losses_kernel(const void* labels, bool labels_are_int64, int64_t ignore_index, int64_t rows,
                         const float* losses, bool mean, float* loss, float* scale) {
  double total = 0, count = 0;
  for (int64_t r = threadIdx.x; r < rows; r += many_threads) {
    total += double(losses[r]);
    if (mean) count += label_of(labels, labels_are_int64, r) != ignore_index;
  }
  total = block_sum<many_threads>(total);
  __syncthreads();
  count = block_sum<many_threads>(count);
  if (threadIdx.x == 0) {
    const double denominator = mean && count > 0 ? count : 1.0;
    *loss = float(total / denominator);
    *scale = float(1 / denominator);
  }
}

// f(float{} or bf16{} or f16{}, true_type or false_type: general)
template <typename F>
void with_options(const CrossEntropy& args, const F& f) {
  with_type(args.dtype, [&](auto type) {
    is_general(args) ? f(type, std::true_type{}) : f(type, std::false_type{});
  });
}

constexpr const char* op = "masked_cross_entropy";

}  // namespace

void masked_cross_entropy_forward(const CrossEntropy& args, float* losses, float* stats, Launch on) {
  with_options(args, [&](auto type, auto general) {
    launch(op, on, masked_cross_entropy_forward_kernel<decltype(type), general.value>, args.rows, threads, 0,
           rows_of(args), terms_of(args), losses, stats);
  });
}

void masked_cross_entropy_backward(const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride,
                                   const float* scale, void* gradient, int64_t gradient_stride, Launch on) {
  const int64_t units = args.classes * size_of(args.dtype) / 16;
  const int64_t pieces = units > units_a_piece ? (units + units_a_piece - 1) / units_a_piece : 1;
  with_options(args, [&](auto type, auto general) {
    launch(op, on, masked_cross_entropy_backward_kernel<decltype(type), general.value>, args.rows * pieces, threads, 0,
           rows_of(args), terms_of(args), pieces, stats, grad, grad_stride, scale, gradient, gradient_stride);
  });
}

void reduce_losses(const float* losses, const void* labels, bool labels_are_int64, int64_t rows, int64_t ignore_index,
                   bool mean, float* loss, float* scale, Launch on) {
  launch(op, on, reduce_losses_kernel, 1, many_threads, 0, labels, labels_are_int64, ignore_index, rows, losses, mean,
         loss, scale);
}

}  // namespace reca::cuda
