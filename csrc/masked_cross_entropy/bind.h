#pragma once

#include "common/bind.h"
#include "op.h"

template <>
struct reca::FromPython<reca::CrossEntropy>
    : reca::FromTuple<reca::CrossEntropy, DType, const void*, int64_t, int64_t, int64_t, const void*, bool, int64_t, float,
                      float, float> {};
