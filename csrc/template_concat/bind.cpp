#include "common/bind.h"
#include "op.h"

template <>
struct reca::FromPython<reca::Index> : reca::FromTuple<reca::Index, const void*, bool, bool> {};

template <>
struct reca::FromPython<reca::Source>
    : reca::FromTuple<reca::Source, DType, const void*, int64_t, int64_t, reca::Index> {};

template <>
struct reca::FromPython<reca::Sources> : reca::FromList<reca::Sources, reca::Source> {};

template <>
struct reca::FromPython<reca::SourceGradient>
    : reca::FromTuple<reca::SourceGradient, DType, const void*, int64_t, int64_t, int64_t, reca::Index, int64_t, DType,
                      void*> {};

RECA_BIND(m) {
  RECA_BIND_LAUNCHER(m, template_concat_forward);
  RECA_BIND_HOST_LAUNCHER(m, template_concat_backward);
  RECA_BIND_CUDA_LAUNCHER(m, template_concat_backward_sorted);
  RECA_BIND_CUDA_LAUNCHER(m, template_concat_backward_mapped);
}
