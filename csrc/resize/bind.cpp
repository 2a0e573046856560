#include "common/bind.h"
#include "op.h"

template <>
struct reca::FromPython<reca::Taps>
    : reca::FromTuple<reca::Taps, const int32_t*, const int32_t*, const int32_t*, int64_t, int64_t> {};

RECA_BIND(m) { RECA_BIND_HOST_LAUNCHER(m, resize_rgb); }
