#include "masked_cross_entropy/bind.h"

RECA_BIND(m) {
  RECA_BIND_LAUNCHER(m, masked_cross_entropy_forward);
  RECA_BIND_LAUNCHER(m, masked_cross_entropy_backward);
  RECA_BIND_LAUNCHER(m, reduce_losses);
}
