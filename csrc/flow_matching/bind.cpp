#include "common/bind.h"
#include "op.h"

template <>
struct reca::FromPython<reca::FlowRun> : reca::FromTuple<reca::FlowRun, const void*, int64_t, int64_t, int64_t> {};

template <>
struct reca::FromPython<reca::FlowRuns> : reca::FromList<reca::FlowRuns, reca::FlowRun> {};

template <>
struct reca::FromPython<reca::FlowMatching>
    : reca::FromTuple<reca::FlowMatching, DType, int64_t, int64_t, const float*, NoiseAddress, const float*, int64_t> {};

RECA_BIND(m) {
  m.attr("flow_tile") = reca::flow_tile;
  RECA_BIND_LAUNCHER(m, flow_matching_add_noise);
  RECA_BIND_LAUNCHER(m, flow_matching_loss);
}
