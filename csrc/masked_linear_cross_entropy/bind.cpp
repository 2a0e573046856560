#include "masked_cross_entropy/bind.h"
#include "op.h"

RECA_BIND(m) {
  RECA_BIND_LAUNCHER(m, row_gradients);
  RECA_BIND_CUDA_LAUNCHER(m, compact_labelled_rows);
  RECA_BIND_CUDA_LAUNCHER(m, gather_scatter_rows);
  RECA_BIND_CUDA_LAUNCHER(m, scale);
}
