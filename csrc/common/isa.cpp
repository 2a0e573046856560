#include "common/isa.h"

#include <atomic>
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace reca {

#ifdef __x86_64__
// Clang's __builtin_cpu_supports does not know f16c before version 18.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa best_isa() {
#ifdef __x86_64__
  // The features that CMakeLists.txt compiles for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() && __builtin_cpu_supports("bmi2")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : Isa::avx2;
  }
#endif
  return Isa::baseline;
}

static std::atomic<Isa>& isa() {
  static std::atomic<Isa> value{best_isa()};
  return value;
}

Isa current_isa() { return isa().load(std::memory_order_relaxed); }
void set_isa(Isa value) { isa().store(value, std::memory_order_relaxed); }

}  // namespace reca
