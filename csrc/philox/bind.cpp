#include "common/bind.h"
#include "op.h"

RECA_BIND(m) { RECA_BIND_LAUNCHER(m, philox_fill); }
