// The part of the linear form between the matmuls: losses of a chunk, and gradients in place of its logits.
#include "common/parallel.h"
#include "masked_cross_entropy/rows.h"
#include "op.h"

namespace reca::RECA_ISA {

void row_gradients(const CrossEntropy& args, const int64_t* rows, const void* bias, const float* row_grad, const float* scale,
                   float* losses, bool gradient, Launch on) {
  with_options(args, [&](auto type, auto cap, auto smooth) {
    using T = decltype(type);
    const T* const b = static_cast<const T*>(bias);
    parallel_for(args.rows, on.threads, [&](int64_t i) {
      T* const logits = const_cast<T*>(static_cast<const T*>(args.logits)) + i * args.row_stride;
      const int64_t row = rows[i], label = label_of(args.labels, args.labels_are_int64, i);
      if (row < 0 || label < 0 || label >= args.classes) {
        if (row >= 0) losses[row] = std::numeric_limits<float>::quiet_NaN();
        if (gradient) std::memset(logits, 0, args.classes * sizeof(T));
        return;
      }
      const RowStats stats = row_forward<T, cap.value, smooth.value>(args, logits, b, label, losses + row);
      if (!gradient) return;
      const float factor = row_grad ? *scale * row_grad[row] : *scale;
      row_backward<T, cap.value, smooth.value>(args, logits, b, label, stats, factor, logits);
    });
  });
}

}  // namespace reca::RECA_ISA

RECA_DISPATCH(row_gradients,
              (const CrossEntropy& args, const int64_t* rows, const void* bias, const float* row_grad, const float* scale,
               float* losses, bool gradient, Launch on),
              (args, rows, bias, row_grad, scale, losses, gradient, on))
