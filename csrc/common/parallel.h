// Loops over independent rows. The caller sets the number of threads; results do not depend on the assignment of rows.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace reca::RECA_ISA {

template <typename Body>
static inline void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1) {  // without a parallel region, so that it is safe in a forked child
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace reca::RECA_ISA
