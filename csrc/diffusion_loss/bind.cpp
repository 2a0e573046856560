#include "common/bind.h"
#include "op.h"

template <>
struct reca::FromPython<reca::Diffusion>
    : reca::FromTuple<reca::Diffusion, DType, const void*, const int64_t*, const int64_t*, const float*, int64_t, int64_t,
                      int64_t, int64_t, NoiseAddress, const float*> {};

RECA_BIND(m) {
  RECA_BIND_LAUNCHER(m, diffusion_add_noise);
  RECA_BIND_LAUNCHER(m, diffusion_loss);
}
