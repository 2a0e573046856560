#include "cross_entropy_rows.h"
#include "parallel.h"

namespace reca::RECA_ISA {

void masked_cross_entropy_forward(const CrossEntropy& args, float* losses, float* stats) {
  with_options(args, [&](auto type, auto cap, auto smooth) {
    using T = decltype(type);
    parallel_for(args.rows, args.threads, [&](int64_t r) {
      const int64_t label = label_of(args, r);
      if (label == args.ignore_index || label < 0 || label >= args.classes) {
        losses[r] = label == args.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        return;
      }
      const T* row = static_cast<const T*>(args.logits) + r * args.row_stride;
      const RowStats s = row_forward<T, cap.value, smooth.value>(args, row, label, losses + r);
      stats[2 * r] = s.peak;
      stats[2 * r + 1] = s.log_sum;
    });
  });
}

void masked_cross_entropy_backward(const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride,
                                   float scale, void* gradient, int64_t gradient_stride) {
  with_options(args, [&](auto type, auto cap, auto) {
    using T = decltype(type);
    parallel_for(args.rows, args.threads, [&](int64_t r) {
      const int64_t label = label_of(args, r);
      T* out = static_cast<T*>(gradient) + r * gradient_stride;
      if (label == args.ignore_index || label < 0 || label >= args.classes) {
        std::memset(out, 0, args.classes * sizeof(T));
        return;
      }
      const T* row = static_cast<const T*>(args.logits) + r * args.row_stride;
      row_backward<T, cap.value>(args, row, label, {stats[2 * r], stats[2 * r + 1]}, scale * grad[r * grad_stride], out);
    });
  });
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(void, masked_cross_entropy_forward, (const CrossEntropy& args, float* losses, float* stats),
              (args, losses, stats))
RECA_DISPATCH(void, masked_cross_entropy_backward,
              (const CrossEntropy& args, const float* stats, const float* grad, int64_t grad_stride, float scale,
               void* gradient, int64_t gradient_stride),
              (args, stats, grad, grad_stride, scale, gradient, gradient_stride))
