// The part of the linear form that is not a matrix product: a chunk's losses, and its logits turned into gradients.
#include "cross_entropy_rows.h"
#include "parallel.h"

namespace reca::RECA_ISA {

void masked_linear_cross_entropy_rows(const CrossEntropy& args, float* losses, const float* grad, float scale,
                                      void* gradient, int64_t gradient_stride) {
  with_options(args, [&](auto type, auto cap, auto smooth) {
    using T = decltype(type);
    parallel_for(args.rows, args.threads, [&](int64_t r) {
      const int64_t label = label_of(args, r);
      if (label < 0 || label >= args.classes) {
        losses[r] = std::numeric_limits<float>::quiet_NaN();
        if (gradient) std::memset(static_cast<T*>(gradient) + r * gradient_stride, 0, args.classes * sizeof(T));
        return;
      }
      const T* row = static_cast<const T*>(args.logits) + r * args.row_stride;
      const RowStats stats = row_forward<T, cap.value, smooth.value>(args, row, label, losses + r);
      if (gradient == nullptr) return;
      T* out = static_cast<T*>(gradient) + r * gradient_stride;
      row_backward<T, cap.value>(args, row, label, stats, grad ? scale * grad[r] : scale, out);
    });
  });
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(void, masked_linear_cross_entropy_rows,
              (const CrossEntropy& args, float* losses, const float* grad, float scale, void* gradient,
               int64_t gradient_stride),
              (args, losses, grad, scale, gradient, gradient_stride))
