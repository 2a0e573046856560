#include "common/parallel.h"
#include "rows.h"

namespace reca::RECA_ISA {

void masked_cross_entropy_forward(const CrossEntropy& args, float* losses, float* stats, Launch on) {
  with_options(args, [&](auto type, auto cap, auto smooth) {
    using T = decltype(type);
    parallel_for(args.rows, on.threads, [&](int64_t r) {
      const int64_t label = label_of(args.labels, args.labels_are_int64, r);
      if (label == args.ignore_index || label < 0 || label >= args.classes) {
        losses[r] = label == args.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        stats[2 * r] = stats[2 * r + 1] = 0;
        return;
      }
      const T* row = static_cast<const T*>(args.logits) + r * args.row_stride;
      const RowStats s = row_forward<T, cap.value, smooth.value>(args, row, nullptr, label, losses + r);
      stats[2 * r] = s.row_max;
      stats[2 * r + 1] = s.log_sum_exp;
    });
  });
}

void masked_cross_entropy_backward(const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride,
                                   const float* scale, void* gradient, int64_t gradient_stride, Launch on) {
  with_options(args, [&](auto type, auto cap, auto smooth) {
    using T = decltype(type);
    parallel_for(args.rows, on.threads, [&](int64_t r) {
      const int64_t label = label_of(args.labels, args.labels_are_int64, r);
      T* out = static_cast<T*>(gradient) + r * gradient_stride;
      if (label == args.ignore_index || label < 0 || label >= args.classes) {
        std::memset(out, 0, args.classes * sizeof(T));
        return;
      }
      const T* row = static_cast<const T*>(args.logits) + r * args.row_stride;
      const RowStats of_row = {stats[2 * r], stats[2 * r + 1]};
      row_backward<T, cap.value, smooth.value>(args, row, nullptr, label, of_row, *scale * grad[r * grad_stride], out);
    });
  });
}

// Sequential, in the order of the rows, so that the loss does not depend on the number of threads.
void reduce_losses(const float* losses, const void* labels, bool labels_are_int64, int64_t rows, int64_t ignore_index,
                   bool mean, float* loss, float* scale, Launch) {
  double total = 0;
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (label_of(labels, labels_are_int64, r) == ignore_index) continue;
    total += double(losses[r]);
    ++count;
  }
  const double denominator = mean && count > 0 ? double(count) : 1.0;
  *loss = float(total / denominator);
  *scale = float(1 / denominator);
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(masked_cross_entropy_forward, (const CrossEntropy& args, float* losses, float* stats, Launch on),
              (args, losses, stats, on))
RECA_DISPATCH(masked_cross_entropy_backward,
              (const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride, const float* scale,
               void* gradient, int64_t gradient_stride, Launch on),
              (args, stats, grad, grad_stride, scale, gradient, gradient_stride, on))
RECA_DISPATCH(reduce_losses,
              (const float* losses, const void* labels, bool labels_are_int64, int64_t rows, int64_t ignore_index,
               bool mean, float* loss, float* scale, Launch on),
              (losses, labels, labels_are_int64, rows, ignore_index, mean, loss, scale, on))
